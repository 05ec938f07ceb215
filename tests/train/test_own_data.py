"""A run on the user's own data without a task: what is held out stays out, and the run ends with a score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.console import Console
from lco_lite.data.prompts import demonstrations, held_out_prompts, held_out_rows, recipe_task, rl_prompts
from lco_lite.errors import RecipeError, UsageError
from lco_lite.evaluation.held_out import held_out_task
from lco_lite.files import read_jsonl
from lco_lite.recipe.file import load_recipe
from lco_lite.run import Run, stage_settings
from lco_lite.train.training import StageTraining
from tests.conftest import TINY

REWARDS = """
from length import of

def short(completions, **columns):
    return [-of(c) for c in completions]

def even(prompts, responses, rows):
    return [float("e" in r) if row["n"] % 2 == 0 else None for r, row in zip(responses, rows)]
"""
FUNCTIONS = {"short": "rewards.py:short", "even": "rewards.py:even"}


def recipe_of(**changed):
    own = {
        "task": None,
        "name": "own",
        "data": {
            "prompts": "rows.jsonl",
            "demonstrations": "shown.jsonl",
            "preferences": "rows.jsonl",
            "held_out": 0.2,
        },
        "sft": TINY["sft"] | {"max_steps": 2},
        "train_rm": TINY["train_rm"] | {"max_steps": 2, "check_items": 0},
        "rl": TINY["rl"]
        | {
            "steps": 1,
            "feedback": "dpo + function",
            "reward_function": FUNCTIONS,
            "inner_epochs": 1,
            "max_length": 200,
        },
    }
    return TINY | own | changed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {i}.", "n": i, "chosen": "yes", "rejected": "no"} for i in range(20)]
    shown = [{"prompt": f"say  {i}.", "completion": str(i)} for i in range(10, 30)]
    for name, lines in (("rows", rows), ("shown", shown)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("rewards.py").write_text(REWARDS)
    Path("length.py").write_text("def of(text):\n    return float(len(text))\n")
    Path("own.yaml").write_text(yaml.safe_dump(recipe_of()))
    return tmp_path


def call(*words, status=0):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == status, result.output
    return result


def test_a_run_without_a_task_ends_with_rewards_loss_and_margin_before_and_after(folder):
    said = call("run", "own.yaml").output
    run = Run(Path("runs/own"))
    table = said[said.index("held out: mean") :]
    assert all(word in table for word in ("reward", "short", "even", "loss", "margin", "log chosen/rejected of"))
    score = json.loads(run.eval_path("held_out", "rl-kld").read_text())
    parts = score["metrics"]
    assert parts["short"]["mean"] < 0 and 0 <= parts["even"]["mean"] <= 1
    rows = read_jsonl(run.eval_path("held_out", "rl-kld").with_suffix(".rows.jsonl"))
    held = {row["prompt"] for row in read_jsonl("runs/own/held_out.jsonl")}
    assert {row["prompt"].casefold() for row in rows} <= held
    recipe = load_recipe(Path("own.yaml"))
    uneven = [r for r in rows if int(r["prompt"].split()[1].rstrip(".")) % 2]
    assert all(row["score"] == -len(row["response"]) for row in uneven), "where even says nothing, short alone counts"
    likely = json.loads(run.eval_path("held_out-likelihood", "rm").read_text())
    kept = held_out_rows(recipe)
    assert (likely["pairs"], likely["demonstrations"]) == (len(kept["preferences"]), len(kept["demonstrations"]))
    assert likely["loss"] > 0
    command = said.strip().splitlines()[-1].rpartition("next: ")[2]
    assert "difference" in call(*command.removeprefix("lco-lite ").split()).output
    Path("rewards.py").write_text(REWARDS.replace("-of(c)", "of(c)"))
    again = call("eval", "--policy", "rl-kld").output
    assert "only the scores are made anew" in again
    assert json.loads(run.eval_path("held_out", "rl-kld").read_text())["metrics"]["short"]["mean"] > 0


def test_what_is_held_out_of_one_file_is_held_out_of_all(folder):
    recipe = load_recipe(Path("own.yaml"))
    held = held_out_prompts(recipe, None)
    assert held == held_out_prompts(load_recipe(Path("own.yaml"), ["rl.steps=3"]), None)
    assert held != held_out_prompts(load_recipe(Path("own.yaml"), ["seed=1"]), None)
    trained = {p.messages[-1]["content"] for p in rl_prompts(recipe, None)}
    trained |= {" ".join(d.messages[-1]["content"].split()).capitalize() for d in demonstrations(recipe, None)}
    assert len(held) >= 4 and not {text.casefold() for text in trained} & held
    assert len(trained) + len(held) == 30
    everything = load_recipe(Path("own.yaml"), ["data.held_out=0"])
    assert not held_out_prompts(everything, None) and len(rl_prompts(everything, None)) == 20


def test_a_run_does_not_go_on_with_other_prompts_held_out(folder):
    call("sft", "own.yaml")
    with Path("rows.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"prompt": f"More {i}.", "n": i, "chosen": "a", "rejected": "b"}) + "\n" for i in range(20)
        )
    assert "other prompts are held out than" in call("rl", "own.yaml", status=2).stderr
    assert "data.held_out: 0.2 → 0.3" in call("rl", "own.yaml", "-s", "data.held_out=0.3", status=2).stderr


def test_no_score_is_taken_on_prompts_that_were_trained_on(folder):
    """A row less, or another file, and the same share draws others, trained ones among them."""
    call("sft", "own.yaml")
    whole = Path("rows.jsonl").read_text()
    held = {row["prompt"] for row in read_jsonl("runs/own/held_out.jsonl")}
    first = next(i for i, row in enumerate(read_jsonl("rows.jsonl")) if row["prompt"].casefold() in held)
    Path("rows.jsonl").write_text("".join(line for i, line in enumerate(whole.splitlines(True)) if i != first))
    assert "other prompts are held out than" in call("eval", "held_out", status=2).stderr
    Path("rows.jsonl").write_text(whole)
    Path("other.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}.", "n": i}) + "\n" for i in range(5, 40)))
    other = ("-s", "data.prompts=other.jsonl")
    assert "other prompts are held out than" in call("rl", "own.yaml", *other, status=2).stderr
    assert "other prompts are held out than" in call("eval", "held_out", *other, status=2).stderr
    call("eval", "held_out", "--limit", "2")


def test_a_score_knows_how_long_its_responses_may_be_and_which_columns_a_function_read(folder):
    call("sft", "own.yaml")
    evaluate = ("eval", "held_out", "-s", "eval.max_new_tokens=null")
    call(*evaluate)
    assert "has been scored already" in call(*evaluate).output
    assert "has been scored already" not in call(*evaluate, "-s", "rl.max_new_tokens=9").output
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace('"n": ', '"n": 1'))
    assert "only the scores are made anew" in call(*evaluate, "-s", "rl.max_new_tokens=9").output


def test_a_run_does_not_go_on_where_it_is_not_known_what_it_holds_out(folder):
    call("sft", "own.yaml")
    file = Path("runs/own/held_out.jsonl")
    kept = file.read_bytes()
    file.write_bytes(b"\xff" + kept)
    assert "held_out.jsonl: is not UTF-8 (byte 1)" in " ".join(call("rl", "own.yaml", status=2).stderr.split())
    file.unlink()
    told = " ".join(call("rl", "own.yaml", status=2).stderr.split())
    assert "held_out.jsonl: is missing" in told and "`lco-lite sft --fresh`" in told and not file.exists()
    assert "data.held_out: 0.2 → 0.3" in call("rl", "own.yaml", "-s", "data.held_out=0.3", status=2).stderr
    call("sft", "--fresh")
    assert file.read_bytes() == kept


def test_until_a_stage_has_started_others_may_be_held_out(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageTraining, "steps", killed)
        CliRunner().invoke(app, ["sft", "own.yaml"])
    assert Path("runs/own/sft/stage.json").exists()
    before = Path("runs/own/held_out.jsonl").read_text()
    call("sft", "own.yaml", "-s", "data.held_out=0.4")
    assert len(Path("runs/own/held_out.jsonl").read_text()) > len(before)
    call("sft", "-s", "sft.max_steps=3")


def test_runs_from_before_there_was_a_choice_hold_nothing_out(folder):
    recipe = load_recipe(Path("own.yaml"), ["data.held_out=0"])
    assert "data.held_out" not in stage_settings(recipe, "rl-kld")
    assert stage_settings(load_recipe(Path("own.yaml"), ["data.held_out=null"]), "sft")["data.held_out"] is None
    kept = yaml.safe_load(Path("own.yaml").read_text())
    del kept["data"]["held_out"]
    Path("runs/own").mkdir(parents=True)
    Path("runs/own/recipe.yaml").write_text(yaml.safe_dump(kept))
    assert Run(Path("runs/own")).recipe().data.held_out == 0


def test_a_reward_that_returns_the_wrong_thing_is_told_before_anything_is_trained(folder):
    Path("rewards.py").write_text("def short(completions, **columns):\n    return 1\neven = short\n")
    message = call("run", "own.yaml", status=2).stderr.replace("\n", " ")
    assert ": came back 1; a list with a number for each response is needed" in message
    assert "tried on 'Say " in message and not Path("runs/own/sft").exists()
    dry = call("run", "own.yaml", "--dry-run", status=2)
    assert "came back 1" in dry.stderr.replace("\n", " ")


def test_a_task_that_holds_items_out_takes_no_share(folder):
    for field in ("data.held_out=0.1", "data.columns.task.prompt=q"):
        with pytest.raises(RecipeError, match="arithmetic"):
            load_recipe(
                Path("own.yaml"), ["task=arithmetic", field if "held" in field else "data.held_out=null", field]
            )


def test_the_score_without_a_task_is_refused_where_there_is_one(folder):
    from lco_lite.evaluation.held_out import held_out_task

    with pytest.raises(UsageError, match="runs without a task"):
        held_out_task(load_recipe(Path("own.yaml"), ["task=arithmetic", "data.held_out=null"]), None)


def test_the_leaks_of_one_file_into_another_are_closed_for_choices_too(folder):
    rows = [{"prompt": f"Which {i}?", "choices": ["red", "green"], "answer": "A"} for i in range(20)]
    shown = [{"prompt": row["prompt"], "completion": "A"} for row in rows]
    for name, lines in (("items", rows), ("shown", shown)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"task": "items.jsonl", "demonstrations": "shown.jsonl", "held_out": 0.3}
    Path("own.yaml").write_text(yaml.safe_dump(recipe_of(task="custom:choice", data=data, rl=TINY["rl"])))
    recipe = load_recipe(Path("own.yaml"))
    task = recipe_task(recipe)
    held = held_out_prompts(recipe, task)
    trained = {d.messages[-1]["content"].casefold() for d in demonstrations(recipe, task)}
    assert len(held) == 6 and len(trained) == 14 and not held & trained


def test_functions_of_one_name_are_two_and_one_called_reward_is_not_the_score(folder, monkeypatch):
    recipe = load_recipe(Path("own.yaml"), ["rl.reward_function={reward: rewards.py:short, even: rewards.py:even}"])
    task = held_out_task(recipe, torch.device("cpu"))
    rows = [{"id": item.id, "response": "xx", "row": item.row} for item in task.items("test")]
    values = task.aggregate(rows, recipe.eval, folder, Console(quiet=True))
    assert values["reward (function)"] == [-2.0] * len(rows)
    even = [row["row"]["n"] % 2 == 0 for row in rows]
    assert values["reward"] == [-1.0 if is_even else -2.0 for is_even in even]


def test_a_score_of_a_run_without_a_task_does_not_stop_report_or_export(folder):
    call("sft", "own.yaml")
    call("eval", "--policy", "sft")
    assert Run(Path("runs/own")).eval_path("held_out-likelihood", "sft").exists()
    assert call("report", "own").output.strip().endswith("report.html")
    card = Path(call("export", "own", "--to", "merged").output.split()[0]) / "README.md"
    assert "| held_out | sft | reward |" in card.read_text()


def test_a_run_from_before_there_was_a_choice_goes_on_with_its_own_recipe_file(folder):
    old = recipe_of()
    old["data"] = {name: value for name, value in old["data"].items() if name != "held_out"}
    Path("own.yaml").write_text(yaml.safe_dump(old))
    call("sft", "own.yaml", "-s", "data.held_out=0")
    stage, kept = Path("runs/own/sft/stage.json"), yaml.safe_load(Path("runs/own/recipe.yaml").read_text())
    assert "data.held_out" not in json.loads(stage.read_text())["settings"], "as that version left it"
    del kept["data"]["held_out"]
    Path("runs/own/recipe.yaml").write_text(yaml.safe_dump(kept))
    assert "done already" in call("sft", "own.yaml").output
    said = call("sft", "own.yaml", "-s", "sft.max_steps=3").output
    assert "goes on after step 2" in said and "held out:" not in said


def test_held_out_pairs_that_are_too_long_are_left_out_and_told(folder):
    held, lines = held_out_prompts(load_recipe(Path("own.yaml")), None), Path("rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    long = next(row for row in rows if row["prompt"].casefold() in held)
    long["chosen"] = "yes " * 200
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = " ".join(call("train-rm", "own.yaml", "-s", "train_rm.max_length=100").output.split())
    n = sum(row["prompt"].casefold() in held for row in rows)
    assert f"1 of {n} held-out pairs are too long and left out" in said and f"of {n - 1} held-out pairs" in said
