"""AlpacaEval: outputs in its format, win rates by a judge or by the package, and the way through ``lco-lite eval``."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.console import Console
from lco_lite.errors import DataError, LcoError, UsageError
from lco_lite.evaluation.compare import paired_bootstrap
from lco_lite.judging import alpaca
from lco_lite.judging.keys import judge_key
from lco_lite.recipe import Eval
from lco_lite.tasks import alpaca_eval, load_task
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
    assert metrics["win_rate"] == [1.0, 1.0, 0.0, 0.0]  # the third is one character shorter than its reference
    assert "lc_win_rate" not in metrics and "not AlpacaEval's 805 instructions" in screen.told
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
    assert metrics["win_rate"] == [0.5] * 4 and metrics["off_point"] == 1.0
    assert "8 of 8 verdicts were neither" in screen.told


def test_length_is_controlled_for_by_an_instructions_place_and_its_absence_is_not_for_good(task, tmp_path, monkeypatch):
    """Where the package or its table is not to be had, the raw win rate stands and the same command tries again."""
    texts = "\n".join(" ".join(row["instruction"].split()) for row in ROWS)
    monkeypatch.setattr(alpaca_eval, "INSTRUCTIONS", hashlib.sha256(texts.encode()).hexdigest()[:16])
    asked = []

    def controlled(scores, rows, outputs, places, console):
        asked.append((scores, [row["row"]["output"] for row in rows], [o["output"] for o in outputs], places))
        return None if len(asked) < 3 else [0.25] * len(scores)

    monkeypatch.setattr(alpaca, "length_controlled", controlled)
    rows = rows_of(task, ["longer", "a far longer one", "word word", "x"])
    with chat_server(prefers_longer) as server:
        some = task.aggregate([rows[1], rows[3]], judged(server.url), folder_of(tmp_path), Screen())
        assert some["lc_win_rate"] is None and some["win_rate"] == [1.0, 0.0]
        assert asked[0] == ([1.0, 0.0], [ROWS[1]["output"], ROWS[3]["output"]], ["a far longer one", "x"], [1, 3])

        save("llama", tmp_path / "model", max_position_embeddings=512)
        judge = ["--judge-url", server.url, "--judge-model", "m", "--yes", "--json"]
        # a pass of two has it, and a metric that only one has is none
        first = json.loads(evaluate(tmp_path, *judge).stdout)["alpaca_eval"]
        assert first["missing"] == ["lc_win_rate"] and "lc_win_rate" not in first["metrics"]
        assert first["metric"] == "win_rate" and first["stderr"] is not None
        requests = len(server.requests)
        again = evaluate(tmp_path, *judge)
        second = json.loads(again.stdout)["alpaca_eval"]
        assert "only the scores are made anew" in again.stderr and len(server.requests) == requests
        assert second["metrics"]["lc_win_rate"] == {"mean": 0.25, "std": 0.0, "stderr": 0.0}
        assert "missing" not in second and second["metrics"]["win_rate"] == first["metrics"]["win_rate"]
        assert "has been scored already" in evaluate(tmp_path, *judge).stderr


@pytest.mark.parametrize("name", ["alpaca_eval_gpt4_1106_preview", "alpaca_eval_text_davinci_003"])
def test_the_real_instructions_are_known_and_have_their_places(name):
    folder = os.environ.get("LCO_LITE_DATA")
    if not folder or not Path(folder, f"{name}.jsonl").exists():
        pytest.skip(f"LCO_LITE_DATA names no folder with {name}.jsonl")
    task = load_task("alpaca_eval", Path(folder, f"{name}.jsonl"))
    items = task.items("test")
    assert task._places([{"id": items[i].id} for i in (7, 804)]) == [7, 804]


def test_scores_of_a_judge_are_compared_item_by_item(task, tmp_path, monkeypatch):
    """Against the mean of both passes, from what ``judged.jsonl`` says of each row."""
    write(tmp_path / "alpaca.jsonl", *(ROWS[i % 4] | {"instruction": f"Say {i}"} for i in range(8)))
    for seed, family in enumerate(("llama", "qwen3")):
        save(family, tmp_path / f"model{seed}", max_position_embeddings=512)
    runs, flags = tmp_path / "runs", ["-s", "eval.max_new_tokens=12", "--runs", str(tmp_path / "runs")]
    with chat_server(prefers_longer) as server:
        judge = ["--judge-url", server.url, "--judge-model", "m", "--yes", "--data", str(tmp_path / "alpaca.jsonl")]
        for seed in (0, 1):
            of = ["--model", str(tmp_path / f"model{seed}"), "--name", f"m{seed}", "--device", "cpu", "--seeds", "2"]
            unjudged = CliRunner().invoke(app, ["eval", "alpaca_eval", *of, *flags, *judge[5:]])
            assert unjudged.exit_code == 0, unjudged.output
        both = ["eval", "alpaca_eval", "--runs", str(runs), "--compare", "m0/base", "m1/base"]
        refused = CliRunner().invoke(app, both)
        assert refused.exit_code == 2 and "not there item by item" in " ".join(refused.stderr.split())
        assert "--judge-url" in refused.stderr
        for seed in (0, 1):
            of = ["--model", str(tmp_path / f"model{seed}"), "--name", f"m{seed}", "--device", "cpu", "--seeds", "2"]
            assert CliRunner().invoke(app, ["eval", "alpaca_eval", *of, *flags, *judge]).exit_code == 0
    result = CliRunner().invoke(app, [*both, "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)["alpaca_eval"]
    means = []
    for seed in (0, 1):
        files = sorted((runs / f"m{seed}").rglob("judged.jsonl"))
        passes = [[json.loads(line)["score"] for line in file.read_text().splitlines()] for file in files]
        assert len(passes) == 2
        means.append([(x + y) / 2 for x, y in zip(*passes, strict=True)])
    found = paired_bootstrap(torch.tensor(means[1]) - torch.tensor(means[0]))
    assert made["metric"] == "win_rate" and made["items"] == 8 and made["flipped"] == []
    assert made["difference"] == pytest.approx(found.mean) and made["p"] == found.p
    assert made["mean_a"] == pytest.approx(sum(means[0]) / 8)
    shown = " ".join(CliRunner().invoke(app, both).stdout.split())
    assert f"alpaca_eval win_rate: m0/base {made['mean_a']:.3f} → m1/base {made['mean_b']:.3f}" in shown


@pytest.mark.parametrize(
    ("url", "named", "confirmed", "sent"),
    [
        ("https://api.openai.com/v1", None, None, "sk-openai"),
        ("https://API.OpenAI.com/v1", "OPENAI_API_KEY", None, "sk-openai"),
        ("http://api.openai.com/v1", None, None, None),
        ("https://api.example.com/v1", None, None, None),
        ("http://localhost:8000/v1", None, None, None),
        ("http://localhost:8000/v1", None, "MY_KEY@localhost", "sk-mine"),
        ("http://127.0.0.1:8000/v1", "MY_KEY", "MY_KEY@127.0.0.1:8000", "sk-mine"),
        ("https://llm.example.com/v1", None, "MY_KEY@llm.example.com", "sk-mine"),
        ("https://api.openai.com/v1", None, "MY_KEY@api.openai.com", "sk-mine"),
    ],
)
def test_a_key_goes_to_the_host_it_belongs_to_or_where_the_command_line_sends_it(
    monkeypatch, url, named, confirmed, sent
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    settings = judged(url, judge_key_variable=named)
    settings.confirm_key(confirmed)
    assert judge_key(settings) == sent


@pytest.mark.parametrize(
    ("url", "named", "confirmed", "told"),
    [
        ("https://stranger.example/v1", "HOME", None, "a recipe alone sends no variable anywhere"),
        ("https://stranger.example/v1", "OPENAI_API_KEY", None, "--judge-key OPENAI_API_KEY@stranger.example"),
        ("https://api.openai.com/v1", "AWS_SECRET_ACCESS_KEY", None, "is not known to belong to api.openai.com"),
        ("http://api.openai.com/v1", "OPENAI_API_KEY", None, "https is needed"),
        ("http://192.168.0.7:8000/v1", None, "MY_KEY@192.168.0.7", "https is needed"),
        ("https://stranger.example/v1", None, "MY_KEY@llm.example.com", "the judge is at stranger.example"),
        ("https://llm.example.com/v1", "OTHER", "MY_KEY@llm.example.com", "names another variable, OTHER"),
        ("https://llm.example.com/v1", None, "ABSENT@llm.example.com", "ABSENT is not set"),
        ("https://llm.example.com/v1", None, "MY_KEY", "write VARIABLE@HOST"),
    ],
)
def test_a_recipe_alone_sends_no_environment_variable_anywhere(monkeypatch, url, named, confirmed, told):
    for name in ("OPENAI_API_KEY", "MY_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "sk-secret")
    settings = judged(url, judge_key_variable=named)
    with pytest.raises(UsageError, match=told):
        settings.confirm_key(confirmed)
        judge_key(settings)


@pytest.mark.parametrize("key", ["sk-\u00e9", "sk-a\rb", "sk-a\nb"])
def test_a_key_that_no_header_takes_is_refused_without_being_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match="OPENAI_API_KEY has characters") as e:
        judge_key(judged("https://api.openai.com/v1"))
    assert "sk-" not in str(e.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai\r\n")
    assert judge_key(judged("https://api.openai.com/v1")) == "sk-openai"


def test_no_file_confirms_a_key():
    with pytest.raises(ValueError, match="_confirmed_key"):
        judged("https://stranger.example/v1", _confirmed_key=("MY_KEY", "stranger.example"))
    settings = judged("https://stranger.example/v1")
    settings.confirm_key("MY_KEY@stranger.example")
    assert "stranger" not in str(settings.model_dump(exclude={"judge_url"}))


def test_the_key_of_the_command_line_reaches_the_judge(task, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-mine")
    settings = judged("https://llm.example.com/v1")
    settings.confirm_key("MY_KEY@llm.example.com")
    task.check(settings, 4, 1, Screen())
    with pytest.raises(UsageError, match="is no annotator"):
        (tmp_path / "mine").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        task.check(Eval(judge_url="alpaca-eval", judge_model="mine"), 4, 1, Screen())


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
        settings = judged("http://localhost/v1", judge_key_variable="MY_KEY")
        settings.confirm_key("MY_KEY@localhost")
        task.check(settings, 4, 1, Screen())


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

    fake = ModuleType("alpaca_eval")
    fake.__spec__ = importlib.machinery.ModuleSpec("alpaca_eval", None)
    fake.calls = []

    def evaluate(**called):
        fake.calls.append(called)
        if fake.fails:
            raise RuntimeError("no key")
        preferences = dict(zip([o["instruction"] for o in called["model_outputs"]], fake.preferences, strict=False))
        return None, [{"instruction": i, "preference": p} for i, p in reversed(preferences.items())]

    fake.preferences = [1.0, 2.0, 1.25, 1.5]
    fake.evaluate, fake.fails = evaluate, False
    monkeypatch.setitem(sys.modules, "alpaca_eval", fake)
    return fake


def test_the_package_judges_where_it_is_asked_for(task, tmp_path, package):
    folder = folder_of(tmp_path)
    rows = rows_of(task, ["a", "b", "c", "d"])
    metrics = task.aggregate(rows, Eval(judge_url="alpaca-eval", judge_confirmed=True), folder, Screen())
    assert metrics == {"win_rate": [0.0, 1.0, 0.25, 0.5], "mean_length": 1.0}
    kept = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
    assert kept[2] == {"id": "alpaca_eval/test/2", "score": 0.25}
    called = package.calls[0]
    assert called["model_outputs"] == json.loads((folder / "outputs.json").read_text())
    assert called["reference_outputs"] == ROWS
    assert called["annotators_config"] == "weighted_alpaca_eval_gpt4_turbo"
    assert called["precomputed_leaderboard"] is None and called["fn_metric"] == "get_winrate"


@pytest.mark.parametrize("none", [None, math.nan])
def test_what_the_package_has_no_preference_for_is_left_out_and_told(task, tmp_path, package, none):
    package.preferences = [none, 2.0, 0, 1.0]  # 0 is a draw in its older annotations
    screen, settings = Screen(), Eval(judge_url="alpaca-eval", judge_confirmed=True)
    metrics = task.aggregate(rows_of(task, ["a"] * 4), settings, folder_of(tmp_path), screen)
    assert metrics["win_rate"] == [None, 1.0, 0.5, 0.0] and "1 of 4 pairs have no verdict" in screen.told
    package.preferences = [none] * 4
    with pytest.raises(LcoError, match="none of its 4 annotations"):
        task.aggregate(rows_of(task, ["a"] * 4), settings, tmp_path, Screen())


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
