"""The length-controlled win rate is the package's own, on annotations that are made here."""

from __future__ import annotations

import builtins
import io
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from lco_lite.console import Console
from lco_lite.judging.alpaca import length_controlled
from lco_lite.recipe import Eval
from lco_lite.tasks import load_task

N = 805


@pytest.fixture
def told() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(told) -> Console:
    return Console(stdout=told, stderr=told)


@pytest.fixture(scope="module")
def annotations() -> list[dict[str, Any]]:
    """text_davinci_003 against GPT-4 Turbo, judged by GPT-4 Turbo."""
    file = Path(os.environ.get("LCO_LITE_DATA", ""), "alpaca_eval_pref_davinci003_vs_gpt4turbo.jsonl")
    if not os.environ.get("LCO_LITE_DATA") or not file.exists():
        pytest.skip(f"LCO_LITE_DATA names no folder with {file.name}")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def package(monkeypatch, tmp_path):
    """The package with a table of its form in place of the hub's: difficulties, and two answers of other lengths."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("alpaca_eval", reason="the extra `alpaca` is not installed", exc_type=ImportError)
    from alpaca_eval.metrics import glm_winrate

    rng = random.Random(0)
    difficulty = [rng.gauss(0, 1.5) for _ in range(N)]
    table = []
    for name, shift in (("concise", 1.0), ("verbose", -1.0)):
        for i in range(N):
            delta = rng.gauss(shift, 0.7)
            preference = 1 / (1 + math.exp(-(0.2 * difficulty[i] - 0.8 * math.tanh(delta) + rng.gauss(0, 0.5))))
            row = {"model": name, "preference": preference, "index": i, "std_delta_len": delta}
            table.append(row | {"instruction_difficulty": difficulty[i], "not_gamed_baseline": False})
    pandas.DataFrame(table).to_csv(tmp_path / "df_gamed.csv", index=False)
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **asked: str(tmp_path / asked["filename"]))
    glm_winrate.difficulty = difficulty
    return glm_winrate


def given(annotations: list[dict[str, Any]], places: list[int]) -> tuple[Any, ...]:
    """The first four arguments of ``length_controlled``."""
    chosen = [annotations[i] for i in places]
    scores = [None if one["preference"] is None else one["preference"] - 1 for one in chosen]
    rows = [{"row": {"output": one["output_1"]}} for one in chosen]
    return scores, rows, [{"output": one["output_2"]} for one in chosen], places


def test_win_rates_and_their_errors_are_the_packages_on_real_annotations(annotations, package, console, told):
    theirs = package.get_length_controlled_winrate(annotations, save_weights_dir=None)
    found = length_controlled(*given(annotations, list(range(N))), console)
    assert 100 * sum(found) / N == pytest.approx(theirs["length_controlled_winrate"], abs=1e-9)
    assert 100 * error(found) == pytest.approx(theirs["lc_standard_error"], abs=1e-9)
    raw = [one["preference"] - 1 for one in annotations]
    assert 100 * sum(raw) / N == pytest.approx(theirs["win_rate"], abs=1e-9) == pytest.approx(1.9621, abs=1e-4)
    assert 100 * error(raw) == pytest.approx(theirs["standard_error"], abs=1e-9) == pytest.approx(0.4347, abs=1e-4)
    assert theirs["length_controlled_winrate"] > 2 * theirs["win_rate"] and told.getvalue() == ""


@pytest.mark.slow
def test_the_packages_annotator_gives_its_own_leaderboards_numbers_through_the_task(annotations, package, tmp_path):
    """With the verdicts that GPT-4 Turbo gave in the package's cache, nothing is asked."""
    data = Path(os.environ["LCO_LITE_DATA"], "alpaca_eval_gpt4_1106_preview.jsonl")
    if not data.exists():
        pytest.skip(f"LCO_LITE_DATA names no folder with {data.name}")
    task, folder = load_task("alpaca_eval", data), tmp_path / "alpaca_eval--base.files" / "seed-0"
    folder.mkdir(parents=True)
    known = [one | {"output_2": one["output_2"].strip()} for one in annotations]
    (folder / "alpaca-eval-cache.json").write_text(json.dumps(known))
    texts = {one["instruction"]: one["output_2"] for one in known}
    rows = [{"id": i.id, "response": texts[i.prompt], "row": dict(i.row)} for i in task.items("test")]
    settings, screen = Eval(judge_url="alpaca-eval", judge_confirmed=True), Console(stdout=io.StringIO(), quiet=True)
    found = task.aggregate(rows, settings, folder, screen)
    theirs = package.get_length_controlled_winrate(known, save_weights_dir=None)
    assert 100 * sum(found["win_rate"]) / N == pytest.approx(theirs["win_rate"], abs=1e-9)
    assert 100 * sum(found["lc_win_rate"]) / N == pytest.approx(theirs["length_controlled_winrate"], abs=1e-9)
    board = next(folder.rglob("leaderboard.csv")).read_text()
    assert f",{theirs['win_rate']:.6f}"[:8] in board


def error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def test_an_instruction_keeps_its_difficulty_where_others_are_left_out(annotations, package, console):
    places = list(range(700, 100, -2))
    found = length_controlled(*given(annotations, places), console)
    logits, difficulty = [math.log(p / (1 - p)) for p in found], [package.difficulty[i] for i in places]
    slope = (logits[1] - logits[0]) / (difficulty[1] - difficulty[0])
    assert abs(slope) > 1e-3
    assert logits == pytest.approx([logits[0] + slope * (d - difficulty[0]) for d in difficulty], abs=1e-6)


def test_pairs_without_a_verdict_are_left_out_of_the_fit(annotations, package, console):
    some = [one | {"preference": None} if i % 50 == 0 else one for i, one in enumerate(annotations)]
    theirs = package.get_length_controlled_winrate(some, save_weights_dir=None)
    found = length_controlled(*given(some, list(range(N))), console)
    assert 100 * sum(found) / N == pytest.approx(theirs["length_controlled_winrate"], abs=1e-9)


def test_without_the_hub_it_is_said_what_is_missing(annotations, package, console, told, monkeypatch):
    def offline(**asked: Any) -> None:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(package, "hf_hub_download", offline)
    assert length_controlled(*given(annotations, list(range(N))), console) is None
    said = " ".join(told.getvalue().split())
    assert "OSError: cannot reach the hub" in said and "df_gamed.csv of the hub set tatsu-lab/alpaca_eval" in said


def test_without_the_package_its_extra_is_named(console, told, monkeypatch):
    real = builtins.__import__

    def absent(name: str, *more: Any) -> Any:
        if name.startswith("alpaca_eval"):
            raise ModuleNotFoundError("No module named 'alpaca_eval'")
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert length_controlled([1.0], [{"row": {"output": "a"}}], [{"output": "b"}], [0], console) is None
    assert "lco-lite[alpaca]" in told.getvalue()
