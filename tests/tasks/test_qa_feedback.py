"""QA-Feedback: rows of both shapes, the prompt, three reward models, and the whole way through ``lco-lite eval``."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.console import Console
from lco_lite.errors import DataError, ModelError, UsageError
from lco_lite.files import read_jsonl
from lco_lite.recipe import Eval
from lco_lite.tasks import load_task
from lco_lite.tasks.qa_feedback import qa_prompt
from tests.judging.reward_folders import save_reward_model
from tests.models.families import save

ROW = {
    "question": "Who sang it?",
    "passages": [
        {"wikipage": "Song", "content": "Ann sang it."},
        {"wikipage": "May", "content": "It came out in May."},
    ],
    "answer": ["Ann sang it.", "Ann"],
    "text": "question: Who sang it? context: "
    "wikipage: Song text: Ann sang it. | wikipage: May text: It came out in May.",
}
FEEDBACK_ROW = {
    "question": "Who sang it?",
    "passages": [["Song", "Ann sang it.", "Bob did not."]],
    "gold": "Ann sang it. ",
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def quiet() -> Console:
    return Console(quiet=True, stdout=io.StringIO(), stderr=io.StringIO())


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    relevance = save_reward_model(tmp_path / "relevance", True, ["Ignore", "NF-ERR", "O"], seed=1)
    factuality = save_reward_model(tmp_path / "factuality", True, ["F-ERR", "Ignore", "O"], seed=2)
    completeness = save_reward_model(tmp_path / "completeness", False, 1, seed=3)
    return {"relevance": str(relevance), "factuality": str(factuality), "completeness": str(completeness)}


def rows_of(task, responses: list[str]) -> list[dict]:
    return [
        {"id": item.id, "response": response, "row": dict(item.row)}
        for item, response in zip(task.items("test"), responses, strict=True)
    ]


def test_the_prompt_is_question_and_passages_as_the_data_writes_them(tmp_path):
    item = load_task("qa_feedback", write(tmp_path / "qa.jsonl", ROW)).items("test")[0]
    assert item.prompt == ROW["text"]
    assert item.gold == "Ann sang it." and item.demonstration is None


def test_rows_of_the_feedback_files_are_read_too(tmp_path):
    item = load_task("qa_feedback", write(tmp_path / "qa.jsonl", FEEDBACK_ROW)).items("test")[0]
    assert item.prompt == "question: Who sang it? context: wikipage: Song text: Ann sang it. Bob did not."
    assert item.gold == "Ann sang it."


def test_a_question_without_passages_stands_alone():
    assert qa_prompt(" Why? ", []) == "question: Why?"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question": " "}, "field question is ' '"),
        ({"passages": "x"}, "field passages is 'x', not a list"),
        ({"passages": [{"wikipage": "Song"}]}, "has neither wikipage and content nor"),
        ({"passages": [["Song"]]}, "has neither wikipage and content nor"),
        ({"answer": []}, "field answer or gold is []"),
        ({"answer": [" "]}, "field answer or gold is ' '"),
        ({"answer": 3}, "field answer or gold is 3"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(tmp_path, change, told):
    task = load_task("qa_feedback", write(tmp_path / "qa.jsonl", ROW, ROW | change))
    with pytest.raises(DataError, match="line 2") as caught:
        task.items("test")
    assert told in str(caught.value)


def test_a_row_without_an_answer_names_the_field(tmp_path):
    row = {key: ROW[key] for key in ("question", "passages")}
    with pytest.raises(DataError, match="has no field 'gold'"):
        load_task("qa_feedback", write(tmp_path / "qa.jsonl", row)).items("test")


def test_absent_data_names_the_files_and_where_they_are_from(tmp_path, monkeypatch):
    monkeypatch.delenv("LCO_LITE_DATA", raising=False)
    with pytest.raises(DataError, match="qa_feedback_test.jsonl or qa_feedback_dev.jsonl.*FineGrainedRLHF"):
        load_task("qa_feedback").items("test")
    with pytest.raises(DataError, match=f"the folder {tmp_path} has no qa_feedback_train.jsonl"):
        load_task("qa_feedback", tmp_path).items("train")


def test_training_items_show_their_answer(tmp_path):
    write(tmp_path / "qa_feedback_train.jsonl", ROW)
    assert load_task("qa_feedback", tmp_path).items("train")[0].demonstration == "Ann sang it."


def test_each_reward_is_a_number_an_answer_and_the_main_one_the_mean_of_the_three(tmp_path, models):
    task = load_task("qa_feedback", write(tmp_path / "qa.jsonl", ROW, FEEDBACK_ROW, ROW))
    rows = rows_of(task, ["<think>Ann?</think> Ann sang it. It came out in May.", "Bob.", ""])
    metrics = task.aggregate(rows, Eval(reward_models=models), tmp_path, quiet())
    kept = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert list(metrics)[0] == "reward"
    assert [row["id"] for row in kept] == [row["id"] for row in rows]
    for name in models:
        assert metrics[name] == [row[name] for row in kept]
    assert metrics["reward"] == pytest.approx([sum(row[name] for name in models) / 3 for row in kept])
    assert {"relevance_share", "factuality_share"} < set(metrics) and "completeness_share" not in metrics
    assert kept[2]["relevance"] == kept[2]["factuality"] == -1.0
    assert all(0 <= metrics[f"{name}_share"] <= 1 for name in ("relevance", "factuality"))


def test_thoughts_are_not_scored(tmp_path, models):
    task = load_task("qa_feedback", write(tmp_path / "qa.jsonl", ROW))
    scored = [
        task.aggregate(rows_of(task, [response]), Eval(reward_models=models), tmp_path, quiet())
        for response in ("Ann sang it.", "<think>Bob. Or May.</think>\n\nAnn sang it.")
    ]
    assert scored[0] == scored[1]


def test_relevance_reads_no_passages_and_the_other_two_do(tmp_path, models):
    """As the reward models are trained: other passages change factuality or completeness, and never relevance."""
    task = load_task("qa_feedback", write(tmp_path / "qa.jsonl", ROW))
    rows = rows_of(task, ["Ann sang it."])
    other = [{**rows[0], "row": rows[0]["row"] | {"passages": [["Else", "Nothing of the kind."]]}}]
    found = [task.aggregate(some, Eval(reward_models=models), tmp_path, quiet()) for some in (rows, other)]
    assert found[0]["relevance"] == found[1]["relevance"]
    assert found[0]["completeness"] != found[1]["completeness"]


def test_a_reward_model_that_is_not_named_is_asked_for_by_its_setting(tmp_path, models):
    task = load_task("qa_feedback", write(tmp_path / "qa.jsonl", ROW))
    with pytest.raises(UsageError) as caught:
        task.check(Eval(reward_models={"factuality": models["factuality"]}), 1, 4, quiet())
    told = str(caught.value)
    assert "eval.reward_models.relevance=" in told and "eval.reward_models.completeness=" in told
    assert "eval.reward_models.factuality" not in told


def test_a_reward_model_that_is_not_there_is_named(tmp_path, models):
    task = load_task("qa_feedback", write(tmp_path / "qa.jsonl", ROW))
    wrong = Eval(reward_models=models | {"completeness": str(tmp_path / "none")})
    with pytest.raises(ModelError, match=f"{tmp_path / 'none'}: no such folder"):
        task.aggregate(rows_of(task, ["Ann."]), wrong, tmp_path, quiet())


def test_a_response_is_never_right_by_itself(tmp_path):
    task = load_task("qa_feedback", write(tmp_path / "qa.jsonl", ROW))
    assert not task.grade("Ann sang it.", task.items("test")[0]).right


def evaluate(tmp_path: Path, *args: str):
    common = ["--model", str(tmp_path / "model"), "--device", "cpu", "--runs", str(tmp_path / "runs"), "--seeds", "2"]
    return CliRunner().invoke(app, ["eval", "qa_feedback", "-s", "eval.max_new_tokens=12", *common, *args])


def test_it_is_scored_by_the_command_line_and_anew_by_other_reward_models(tmp_path, models):
    save("llama", tmp_path / "model", max_position_embeddings=512)
    data = ["--data", str(write(tmp_path / "qa.jsonl", ROW, FEEDBACK_ROW))]
    refused = evaluate(tmp_path, *data)
    assert refused.exit_code == 2 and "eval.reward_models.relevance" in refused.output
    named = [arg for name, path in models.items() for arg in ("-s", f"eval.reward_models.{name}={path}")]
    first = evaluate(tmp_path, *data, *named, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)["qa_feedback"]
    assert found["metric"] == "reward" and found["seeds"] == 2 and found["std"] is not None
    rows = next((tmp_path / "runs").glob("*/eval/qa_feedback--base.rows.jsonl"))
    before = read_jsonl(rows)
    assert sum(row["score"] for row in before) / 4 == pytest.approx(found["mean"])
    assert found["stderr"] is not None
    other = save_reward_model(tmp_path / "other", False, 2, seed=9)
    again = evaluate(tmp_path, *data, *named, "-s", f"eval.reward_models.completeness={other}", "--json")
    changed = json.loads(again.stdout)["qa_feedback"]
    assert changed["metrics"]["completeness"] != found["metrics"]["completeness"]
    assert changed["metrics"]["relevance"] == found["metrics"]["relevance"]
    after = read_jsonl(rows)
    assert [row | {"score": 0} for row in after] == [row | {"score": 0} for row in before], "the same responses"
    assert [row["score"] for row in after] != [row["score"] for row in before]


@pytest.mark.parametrize(
    ("split", "name", "size"), [("test", "qa_feedback_dev.jsonl", 500), ("train", "qa_feedback_train_1k.jsonl", 1_000)]
)
def test_every_row_of_the_real_files_is_read_and_its_prompt_is_theirs(split, name, size):
    folder = os.environ.get("LCO_LITE_DATA")
    if not folder or not Path(folder, name).exists():
        pytest.skip(f"LCO_LITE_DATA names no folder with {name}")
    items = load_task("qa_feedback").items(split)
    assert len(items) == size
    assert all(item.prompt.split() == item.row["text"].split() for item in items if item.row["passages"])


def test_the_real_feedback_file_is_scored(tmp_path, models):
    folder = os.environ.get("LCO_LITE_DATA")
    file = Path(folder or "", "qa_feedback_dev_feedback.jsonl")
    if not folder or not file.exists():
        pytest.skip(f"LCO_LITE_DATA names no folder with {file.name}")
    task = load_task("qa_feedback", file)
    assert len(task.items("test")) == 500
    some = task.items("test")[:6]
    rows = [{"id": item.id, "response": item.row["prediction 1"], "row": dict(item.row)} for item in some]
    metrics = task.aggregate(rows, Eval(reward_models=models), tmp_path, quiet())
    assert all(-1 <= value <= 1 for name in ("relevance", "factuality") for value in metrics[name])
