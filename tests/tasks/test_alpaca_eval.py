"""AlpacaEval: outputs in its format, win rates by a judge or by the package, and the way through ``lco-lite eval``."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.console import Console
from lco_lite.errors import DataError, LcoError, UsageError
from lco_lite.judging.alpaca import judge_key
from lco_lite.recipe import Eval
from lco_lite.tasks import load_task
from tests.judging.server import Said, chat_server
from tests.models.families import save

ROWS = [
    {"instruction": f"Say {i} ", "output": "word " * i, "generator": "reference", "dataset": "made"} for i in range(4)
]


@pytest.fixture
def task(tmp_path):
    return load_task("alpaca_eval", write(tmp_path / "alpaca.jsonl", *ROWS))


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Screen(Console):
    """What is said lands in ``told``."""

    def __init__(self) -> None:
        self.out = io.StringIO()
        super().__init__(stdout=self.out, stderr=self.out)

    @property
    def told(self) -> str:
        return " ".join(self.out.getvalue().split())


def rows_of(task, responses: list[str]) -> list[dict]:
    items = task.items("test")
    return [{"id": i.id, "response": r, "row": dict(i.row)} for i, r in zip(items, responses, strict=False)]


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "eval" / "alpaca_eval--rl-kld.files" / "seed-0"
    folder.mkdir(parents=True)
    return folder


def prefers_longer(request, n) -> Said:
    asked = request["messages"][0]["content"]
    a, b = re.search(r"<answer A>\n(.*)\n</answer A>\n\n<answer B>\n(.*)\n</answer B>", asked, re.S).groups()
    return Said("tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B")


def judged(url: str, **more) -> Eval:
    return Eval(judge_url=url, judge_model="m", **more)


def test_instructions_are_prompts_as_they_are_and_the_reference_is_gold(task):
    items = task.items("test")
    assert [item.prompt for item in items] == [row["instruction"] for row in ROWS]
    assert [item.gold for item in items] == [row["output"] for row in ROWS]
    assert not task.grade("word ", items[1]).right


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"instruction": " \n"}, "field instruction is empty"),
        ({"instruction": None}, "field instruction is None"),
        ({"output": 3}, "field output is 3"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(tmp_path, change, told):
    task = load_task("alpaca_eval", write(tmp_path / "alpaca.jsonl", ROWS[0], ROWS[1] | change))
    with pytest.raises(DataError, match="line 2") as caught:
        task.items("test")
    assert told in str(caught.value)


def test_a_folder_without_the_files_and_no_hub_names_both(tmp_path, monkeypatch):
    monkeypatch.delenv("LCO_LITE_DATA", raising=False)
    broken = ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", broken)
    with pytest.raises(DataError) as caught:
        load_task("alpaca_eval", tmp_path).items("test")
    assert "tatsu-lab/alpaca_eval" in str(caught.value) and "alpaca_eval_gpt4_1106_preview.jsonl" in str(caught.value)


def test_the_hub_has_one_list_of_rows(tmp_path, monkeypatch):
    monkeypatch.delenv("LCO_LITE_DATA", raising=False)
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    hub = ModuleType("huggingface_hub")
    hub.hf_hub_download = lambda repo, file, repo_type: str(tmp_path / "list.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert len(load_task("alpaca_eval").items("test")) == len(ROWS)


def test_gpt4s_reference_goes_before_davincis(tmp_path):
    write(tmp_path / "alpaca_eval_text_davinci_003.jsonl", *ROWS[:1])
    assert len(load_task("alpaca_eval", tmp_path).items("test")) == 1
    write(tmp_path / "alpaca_eval_gpt4_1106_preview.jsonl", *ROWS)
    assert len(load_task("alpaca_eval", tmp_path).items("test")) == 4


def test_outputs_are_written_in_alpaca_evals_format_without_thoughts(task, tmp_path):
    folder, screen = folder_of(tmp_path), Screen()
    metrics = task.aggregate(rows_of(task, ["<think>x</think>\n\nyes \n", "", "no", "é"]), Eval(), folder, screen)
    outputs = json.loads((folder / "outputs.json").read_text(encoding="utf-8"))
    assert outputs[0] == {"instruction": "Say 0 ", "output": "yes", "generator": "rl-kld", "dataset": "made"}
    assert [o["output"] for o in outputs] == ["yes", "", "no", "é"]
    assert metrics == {"mean_length": 6 / 4}
    assert "--judge-url" in screen.told and "alpaca-eval" in screen.told


def test_a_judge_gives_win_rates_and_its_verdicts_are_kept(task, tmp_path):
    folder, screen = folder_of(tmp_path), Screen()
    rows = rows_of(task, ["longer", "a far longer one", "word word", "x"])
    with chat_server(prefers_longer) as server:
        metrics = task.aggregate(rows, judged(server.url, judge_price=(1.0, 1.0)), folder, screen)
        again = task.aggregate(rows, judged(server.url, judge_limit=0), folder, Screen())
        assert len(server.requests) == 8
    assert list(metrics)[:2] == ["win_rate", "lc_win_rate"]
    assert metrics["win_rate"] == 0.5  # the third is one character shorter than its reference
    assert metrics["orders_agree"] == 1.0 and metrics["off_point"] == 0.0
    assert again == metrics
    assert "8 requests" in screen.told and "$" in screen.told
    kept = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
    assert [(line["id"], line["score"]) for line in kept] == [
        (row["id"], score) for row, score in zip(rows, [1.0, 1.0, 0.0, 0.0], strict=True)
    ]


def test_a_judge_that_is_off_the_point_is_reported(task, tmp_path):
    screen = Screen()
    with chat_server(lambda request, n: Said("I cannot say")) as server:
        metrics = task.aggregate(rows_of(task, ["a"] * 4), judged(server.url), folder_of(tmp_path), screen)
    assert metrics["win_rate"] == 0.5 and metrics["off_point"] == 1.0
    assert "8 of 8 verdicts were neither" in screen.told


def test_answers_all_shorter_than_the_reference_come_with_a_warning(tmp_path):
    task = load_task(
        "alpaca_eval", write(tmp_path / "alpaca.jsonl", *(ROWS[3] | {"instruction": str(i)} for i in range(40)))
    )
    screen = Screen()
    with chat_server(prefers_longer) as server:
        task.aggregate(rows_of(task, ["x"] * 40), judged(server.url), folder_of(tmp_path), screen)
    assert "0% of the answers are longer" in screen.told


def test_the_difficulty_of_instructions_is_used_where_the_data_has_it(tmp_path):
    rows = [ROWS[2] | {"instruction": f"Do {i}", "instruction_difficulty": float(i % 5 - 2)} for i in range(40)]
    # whether an answer wins is a matter of its instruction; where it wins it is longer too
    responses = ["word " * (3 + i % 2) if i % 5 > 2 else "w" for i in range(40)]
    found = []
    for known in (True, False):
        keep = rows if known else [{k: v for k, v in row.items() if k != "instruction_difficulty"} for row in rows]
        task = load_task("alpaca_eval", write(tmp_path / f"{known}.jsonl", *keep))
        with chat_server(prefers_longer) as server:
            folder = tmp_path / str(known) / "seed-0"
            folder.mkdir(parents=True)
            found.append(task.aggregate(rows_of(task, responses), judged(server.url), folder, Screen()))
    assert found[0]["win_rate"] == found[1]["win_rate"]
    assert found[0]["lc_win_rate"] != pytest.approx(found[1]["lc_win_rate"], abs=1e-3)


@pytest.mark.parametrize(
    ("url", "named", "sent"),
    [
        ("https://api.example.com/v1", None, "sk-openai"),
        ("http://localhost:8000/v1", None, "sk-openai"),
        ("http://192.168.0.7:8000/v1", None, None),
        ("http://192.168.0.7:8000/v1", "MY_KEY", "sk-mine"),
    ],
)
def test_openais_key_goes_to_https_and_this_machine_only_and_a_named_one_everywhere(monkeypatch, url, named, sent):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    assert judge_key(judged(url, judge_key_variable=named)) == sent


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("localhost:8000/v1", "neither http"),
        ("ftp://host/v1", "neither http"),
        ("https://me:sk-secret@host/v1", "belongs into an environment variable"),
        ("https://host/v1?key=sk-secret", "belongs into an environment variable"),
    ],
)
def test_a_judges_url_is_host_and_path_and_nothing_secret(url, told):
    with pytest.raises(ValueError, match=told):
        judged(url)


def test_a_judge_needs_a_models_name():
    with pytest.raises(ValueError, match="judge_model"):
        Eval(judge_url="http://localhost:8000/v1")


def test_a_key_variable_that_is_not_set_is_said_before_anything_is_generated(task, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UsageError, match="MY_KEY is not set"):
        task.check(judged("http://localhost/v1", judge_key_variable="MY_KEY"), 4, 1, Screen())


def test_many_requests_are_announced_before_anything_is_generated(task):
    screen = Screen()
    task.check(judged("http://localhost/v1"), 805, 4, screen)
    assert "1,610 requests a pass (4)" in screen.told and "--yes" in screen.told
    silent = Screen()
    task.check(judged("http://localhost/v1", judge_confirmed=True), 805, 4, silent)
    assert silent.told == ""


@pytest.fixture
def package(monkeypatch):
    """An ``alpaca_eval`` that remembers what it was called with."""
    import importlib.machinery

    import pandas

    fake = ModuleType("alpaca_eval")
    fake.__spec__ = importlib.machinery.ModuleSpec("alpaca_eval", None)
    fake.calls = []

    def evaluate(**called):
        fake.calls.append(called)
        if fake.fails:
            raise RuntimeError("no key")
        return pandas.DataFrame({"win_rate": [12.5], "length_controlled_winrate": [25.0]}, index=[called["name"]]), None

    fake.evaluate, fake.fails = evaluate, False
    monkeypatch.setitem(sys.modules, "alpaca_eval", fake)
    return fake


def test_the_package_judges_where_it_is_asked_for(task, tmp_path, package):
    folder = folder_of(tmp_path)
    rows = rows_of(task, ["a", "b", "c", "d"])
    metrics = task.aggregate(rows, Eval(judge_url="alpaca-eval", judge_confirmed=True), folder, Screen())
    assert metrics == {"win_rate": 0.125, "lc_win_rate": 0.25, "mean_length": 1.0}
    called = package.calls[0]
    assert called["model_outputs"] == json.loads((folder / "outputs.json").read_text())
    assert called["reference_outputs"] == ROWS
    assert called["annotators_config"] == "weighted_alpaca_eval_gpt4_turbo"
    assert called["precomputed_leaderboard"] is None and called["metric_kwargs"] == {"save_weights_dir": None}


def test_the_package_is_not_called_for_more_than_the_limit_without_a_yes(task, tmp_path, package):
    with pytest.raises(UsageError, match="4 requests.*--yes"):
        rows = rows_of(task, ["a"] * 4)
        task.aggregate(rows, Eval(judge_url="alpaca-eval", judge_limit=3), folder_of(tmp_path), Screen())
    assert package.calls == []


def test_a_failure_of_the_package_is_one_message(task, tmp_path, package):
    package.fails = True
    with pytest.raises(LcoError, match="alpaca-eval failed: RuntimeError: no key"):
        task.aggregate(rows_of(task, ["a"]), Eval(judge_url="alpaca-eval"), folder_of(tmp_path), Screen())


def test_the_package_that_is_absent_is_named_with_its_extra(task, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"lco-lite\[alpaca\]"):
        task.check(Eval(judge_url="alpaca-eval"), 4, 1, Screen())


def evaluate(tmp_path: Path, *args: str):
    where = ["--model", str(tmp_path / "model"), "--device", "cpu", "--runs", str(tmp_path / "runs")]
    size = ["--seeds", "2", "--data", str(tmp_path / "alpaca.jsonl"), "-s", "eval.max_new_tokens=12"]
    return CliRunner().invoke(app, ["eval", "alpaca_eval", *size, *where, *args])


def test_the_command_line_keeps_the_responses_until_judging_is_confirmed_and_spends_nothing_twice(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    save("llama", tmp_path / "model", max_position_embeddings=512)
    write(tmp_path / "alpaca.jsonl", *ROWS)
    with chat_server(prefers_longer) as server:
        judge = ["--judge-url", server.url, "--judge-model", "m", "-s", "eval.judge_limit=3"]
        refused = evaluate(tmp_path, *judge)
        assert refused.exit_code == 2 and "--yes" in refused.output and server.requests == []
        partial = next((tmp_path / "runs").rglob("*.partial.jsonl")).read_bytes()
        found = evaluate(tmp_path, *judge, "--yes", "--json")
        assert found.exit_code == 0, found.output
        assert "goes on after 8 of 8 responses" in found.stderr
        asked = len(server.requests)
        assert 0 < asked <= 16
        result = json.loads(found.stdout)["alpaca_eval"]
        assert result["metric"] == "win_rate" and result["seeds"] == 2
        assert json.loads(evaluate(tmp_path, *judge, "--json").stdout)["alpaca_eval"] == result
        assert len(server.requests) == asked
    rows = next((tmp_path / "runs").rglob("alpaca_eval--base.rows.jsonl"))
    responses = [json.loads(line)["response"] for line in rows.read_text(encoding="utf-8").splitlines()]
    kept = [row["response"] for line in partial.splitlines()[1:] for row in json.loads(line)["rows"]]
    assert sorted(kept) == sorted(responses)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"sk-secret" in path.read_bytes()]


def test_responses_without_a_judge_are_judged_later_without_new_ones(tmp_path):
    save("llama", tmp_path / "model", max_position_embeddings=512)
    write(tmp_path / "alpaca.jsonl", *ROWS)
    first = evaluate(tmp_path, "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["alpaca_eval"]["metric"] == "mean_length"
    with chat_server(prefers_longer) as server:
        later = evaluate(tmp_path, "--judge-url", server.url, "--judge-model", "m", "--yes", "--json")
        found = json.loads(later.stdout)["alpaca_eval"]
        assert server.requests
    assert found["metric"] == "win_rate" and "mean_length" in found["metrics"]
    assert "only the scores are made anew" in later.stderr


@pytest.mark.parametrize("name", ["alpaca_eval_gpt4_1106_preview", "alpaca_eval_text_davinci_003"])
def test_every_row_of_the_real_files_is_read(name):
    folder = os.environ.get("LCO_LITE_DATA")
    if not folder or not Path(folder, f"{name}.jsonl").exists():
        pytest.skip(f"LCO_LITE_DATA names no folder with {name}.jsonl")
    items = load_task("alpaca_eval", Path(folder, f"{name}.jsonl")).items("test")
    assert len(items) == 805 == len({item.prompt for item in items})
    assert all(item.prompt == item.row["instruction"] for item in items)
