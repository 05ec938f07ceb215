"""``lco-lite data check``: what it counts, what it refuses, and that it makes no run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.data.check import Sample, TrainingData, lengths, recipe_sources, report
from lco_lite.data.prompts import demonstrations, recipe_task
from lco_lite.models.chat import ChatFormat
from lco_lite.models.loading import byte_tokenizer
from lco_lite.recipe.file import load_recipe
from lco_lite.tasks import Own, load_task

REAL = Path(os.environ.get("LCO_LITE_DATA", ""))
real = pytest.mark.skipif(
    not (REAL / "math_train.jsonl").is_file(), reason="LCO_LITE_DATA names no folder of real data"
)


def check(*arguments: object):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def found(*arguments: object) -> dict:
    return json.loads(check(*arguments, "--json").stdout)


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_lengths_are_order_statistics():
    assert lengths([3]) == {"least": 3, "median": 3, "p95": 3, "most": 3}
    assert lengths(range(101)) == {"least": 0, "median": 50, "p95": 95, "most": 100}


def test_a_report_counts_in_tokens_of_the_recipes_model():
    chat = ChatFormat(byte_tokenizer(64))
    samples = [
        Sample("row 1", user("ab"), ("yes", "no")),
        Sample("row 2", user("AB"), ("Yes", "no")),
        Sample("row 3", user("c" * 30), ("same", "SAME ")),
        Sample("row 4", user("d"), ("word", "")),
    ]
    r = report(TrainingData("preferences", "x.jsonl", samples, window=30), chat)
    counts = ("rows", "unit", "duplicates", "same_pairs", "silent", "over_window")
    assert [r[count] for count in counts] == [4, "tokens", 1, 1, 1, 1]
    prompt, response = r["prompt"], r["response"]
    assert (prompt["least"], prompt["most"]) == (3, 32), "a byte is a token, and so are the marks of the two speakers"
    assert (response["least"], response["most"]) == (1, 6), "with the end of the turn"
    assert r["example"] == "<|user|>ab<|assistant|>⟦yes<|end|>⟧"
    for room, over in ((27, 1), (26, 0)):
        asked = TrainingData("prompts", "x", [Sample("row 1", user("ab"))], window=30, room=room)
        assert report(asked, chat)["over_window"] == over


def test_without_a_tokenizer_lengths_are_in_characters_and_that_is_said(tiny, tmp_path):
    sets = ["-s", "model={path: /none/such}", "-s", f"data.demonstrations={tmp_path / 'd.jsonl'}"]
    write(tmp_path / "d.jsonl", [{"prompt": "abc", "completion": "de"}])
    said = found(tiny, *sets)
    shown = said["sources"][0]
    assert (shown["unit"], shown["prompt"]["most"], shown["over_window"]) == ("characters", 5, None)
    assert any("no tokenizer" in note and "/none/such" in note for note in said["notes"])


def test_the_quickstart_has_no_duplicates_and_no_overlap_and_no_run_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = check("quickstart")
    assert result.exit_code == 0, result.stderr
    assert "⟦2+5+0=7 1+9+0=10 #107<|end|>⟧" in result.stdout and "preferences: sampled" in result.stdout
    assert not list(tmp_path.iterdir())


def test_evaluation_items_in_a_training_file_are_told_by_row_and_refused_unless_named(tiny, tmp_path):
    items = load_task("arithmetic").items("test")
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "free"}, {"prompt": f" {items[3].prompt}\n"}])
    sets = [tiny, "-s", f"data.prompts={prompts}"]
    result = check(*sets)
    assert result.exit_code == 2
    assert f"prompts, row 2: the same as {items[3].id}" in result.stdout
    assert "data.allow_overlap: [arithmetic:same]" in result.stderr
    allowed = check(*sets, "-s", "data.allow_overlap=['arithmetic:same']")
    assert allowed.exit_code == 0 and "allowed" in allowed.stdout


@pytest.mark.parametrize("task", [True, False])
def test_what_the_recipe_holds_out_is_left_out_and_counted_as_training_leaves_it_out(tiny, tmp_path, task):
    rows = [{"prompt": f"{i} + 1?", "answer": i + 1} for i in range(40)]
    shown = write(tmp_path / "shown.jsonl", [{"prompt": f" {r['prompt']}", "response": str(r["answer"])} for r in rows])
    sets = ["-s", f"data.demonstrations={shown}", "-s", f"data.prompts={write(tmp_path / 'mine.jsonl', rows)}"]
    if task:
        sets += ["-s", "task=custom", "-s", f"data.task={tmp_path / 'mine.jsonl'}"]
    else:
        (rewards := tmp_path / "r.py").write_text("def f(response):\n    return 1.0\n")
        function = f"rl={{feedback: function, objective: grpo, reward_function: '{rewards}:f'}}"
        sets += ["-s", "task=null", "-s", function]
    result = check(tiny, *sets)
    assert result.exit_code == 0, result.stderr
    assert "held out     4 rows more" in result.stdout
    sources = found(tiny, *sets)["sources"]
    assert [(s["use"], s["rows"], s["held_out"]) for s in sources] == [("demonstrations", 36, 4), ("prompts", 36, 4)]
    recipe = load_recipe(tiny, sets[1::2])
    trained = demonstrations(recipe, recipe_task(recipe))
    source = recipe_sources(recipe, recipe_task(recipe))[0]
    assert {s.responses[0] for s in source.samples} == {d.response for d in trained}
    assert all(s.at == f"row {s.responses[0]}" for s in source.samples), "rows keep their places in the file"


def test_a_file_of_held_out_prompts_alone_is_refused(tiny, tmp_path):
    rows = [{"prompt": f"{i} + 1?", "answer": i + 1} for i in range(40)]
    sets = ["-s", "task=custom", "-s", f"data.task={write(tmp_path / 'mine.jsonl', rows)}"]
    held = load_task("custom", tmp_path / "mine.jsonl", Own(held_out=None)).items("test")
    shown = write(tmp_path / "shown.jsonl", [{"prompt": item.prompt, "response": item.gold} for item in held])
    result = check(tiny, *sets, "-s", f"data.demonstrations={shown}", "-s", "seed=0")
    assert result.exit_code == 2
    assert f"{shown}: all of its prompts are held out: set data.held_out to a smaller share" in result.stderr


def test_evaluation_data_that_cannot_be_loaded_is_noted(tiny, monkeypatch):
    def offline(*args: object, **kw: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.delenv("LCO_LITE_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", offline)
    notes = found(tiny, "-s", "eval.tasks=[arithmetic, amc23]")["notes"]
    assert any("overlap with amc23 is not checked" in note for note in notes)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["data.demonstrations=none.jsonl"], "none.jsonl: no such file"),
        (["data.columns.demonstrations.promt=q"], "did you mean 'data.columns.demonstrations.prompt'?"),
        (["eval.tasks=[math5000]"], "did you mean math500?"),
    ],
)
def test_a_mistake_is_one_message(tiny, sets, told):
    result = check(tiny, *(part for text in sets for part in ("-s", text)))
    assert result.exit_code == 2 and told in result.stderr


@real
def test_mathematics_is_held_out_but_for_near_twins_which_its_recipe_allows_by_name(tmp_path):
    byte_tokenizer(8_192).save_pretrained(tmp_path / "model")
    sets = ["math", "-s", f"model.path={tmp_path / 'model'}"]
    shown, asked = found(*sets)["overlaps"]
    assert shown["same"] == asked["same"] == 0 and shown["checked"] == 500
    assert shown["twins"] + asked["twins"] == 114
    refused = check(*sets, "-s", "data.allow_overlap=[]")
    assert refused.exit_code == 2 and "data.allow_overlap: [math500]" in refused.stderr


@real
@pytest.mark.parametrize(
    ("recipe", "sets", "rows"),
    [
        (
            "ultrafeedback",  # a sample of the same kind of data stands in for the hub's set
            [f"data.{use}={REAL / 'dpo_en_demo.jsonl'}" for use in ("demonstrations", "preferences", "prompts")],
            [300, 300, 300],
        ),
        (
            "qa_feedback",  # the comparisons on the dev questions, which are evaluation items, stand in for train's
            [f"data.preferences={REAL / 'qa_feedback_dev_feedback.jsonl'}", "data.allow_overlap=['qa_feedback:same']"],
            [1_000, 2_616, 1_000],
        ),
    ],
)
def test_the_recipes_of_the_papers_other_domains_pass_on_real_data(tmp_path, recipe, sets, rows):
    byte_tokenizer(8_192).save_pretrained(tmp_path / "model")
    said = found(recipe, "-s", f"model.path={tmp_path / 'model'}", *(part for text in sets for part in ("-s", text)))
    assert [source["rows"] + source["held_out"] for source in said["sources"]] == rows
    assert all(overlap["allowed"] for overlap in said["overlaps"])


@real
def test_near_twins_are_all_that_qa_feedbacks_recipe_allows(tmp_path):
    sets = ["-s", "model={path: /none/such}", "-s", f"data.preferences={REAL / 'qa_feedback_dev_feedback.jsonl'}"]
    by_use = {o["use"]: o for o in found("qa_feedback", *sets)["overlaps"]}
    assert by_use["prompts"]["same"] == 0 and by_use["prompts"]["twins"] and by_use["prompts"]["allowed"]
    assert by_use["preferences"]["same"] and not by_use["preferences"]["allowed"]


def test_rows_beyond_the_models_own_window_are_counted(tiny, tmp_path):
    rows = write(
        tmp_path / "rows.jsonl", [{"prompt": "a" * 10, "completion": "b"}, {"prompt": "a" * 90, "completion": "b"}]
    )
    sets = ["-s", f"data.demonstrations={rows}", "-s", "model.init.max_length=64"]
    (shown,) = (one for one in found(tiny, *sets)["sources"] if one["use"] == "demonstrations")
    assert (shown["window"], shown["over_window"]) == (64, 1)
