"""What would fail late fails before the first stage, and in a dry run, with the recipe's field."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.models.loading import build_scratch, byte_tokenizer, resolve_device
from lco_lite.recipe.file import load_recipe
from lco_lite.recipe.sections import Init
from lco_lite.run import Run
from lco_lite.train import before
from lco_lite.train.before import numbers_of, written
from tests.conftest import TINY

SCORED = {"objective": "grpo", "feedback": "reward_model"}
JUDGE = {"judge_url": "https://judge.example.com/v1", "judge_model": "j", "judge_key_variable": "MY_KEY"}
LATE: dict[str, dict[str, Any]] = {
    "model.lora.targets": {"model": {"lora": {"targets": ["q_proj", "qproj"]}}},
    "reward_model.path": {"reward_model": {"path": "./gone"}},
    "data.preferences": {"data": {"preferences": "gone.jsonl"}},
    "data.prompts": {"data": {"prompts": "gone.jsonl"}},
    "no prompts are left": {"rl": {"max_length": 16}},
    "rl.objective": {"rl": {"objective": "own.py:gone", "feedback": "rule"}},
    "rl.target": {"rl": {"target": "own.py:gone"}},
    "rl.reward_function": {"rl": {"objective": "grpo", "feedback": "function", "reward_function": "gone.py:reward"}},
    "rl.reward_classifier": {"rl": SCORED | {"reward_classifier": "./gone"}},
    "train_rm.max_length": {"train_rm": {"max_length": 16}},  # 7 tokens of a prompt and 12 of a response
    "eval.tasks": {"eval": {"tasks": ["arithmetic", "qa_feedback"]}},
    "eval.few_shot": {"eval": {"few_shot": 9000}},
    "eval.examples": {"eval": {"examples": "gone.jsonl"}},
    "eval.samples": {"eval": {"samples": 2, "temperature": 0}},
    "eval.judge_key_variable": {"eval": {"tasks": ["alpaca_eval"]} | JUDGE},
}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return base | {k: merged(base.get(k) or {}, v) if isinstance(v, dict) else v for k, v in change.items()}


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def said(*words: object) -> str:
    """The message of what is refused, on one line."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LCO_LITE_DATA", str(tmp_path))
    (tmp_path / "own.py").write_text("x = 1\n")
    row = {"instruction": "a", "output": "b", "generator": "g"}
    (tmp_path / "alpaca_eval_gpt4_turbo.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def recipe_with(change: dict[str, Any]) -> Path:
    Path("late.yaml").write_text(yaml.safe_dump(merged(copy.deepcopy(TINY), change)))
    return Path("late.yaml")


@pytest.mark.parametrize("field", LATE)
def test_what_would_fail_late_fails_before_the_first_stage_and_in_a_dry_run(folder, field, monkeypatch):
    if field == "eval.judge_key_variable":
        from lco_lite.tasks import alpaca_eval

        monkeypatch.setattr(alpaca_eval, "FILES", ("alpaca_eval_gpt4_turbo.jsonl",))
    recipe = recipe_with(LATE[field])
    told = said("run", recipe, "--dry-run")
    assert field in told and told == said("run", recipe)
    assert not Path("runs/tiny/sft").exists() and not Path("runs/tiny/base").exists()


def test_the_scores_are_no_matter_of_a_command_that_makes_none(folder):
    recipe = recipe_with(LATE["eval.few_shot"])
    assert call("rl", recipe, "--dry-run").exit_code == 0


def test_a_classifier_is_refused_by_its_config_and_files(folder):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=300, num_labels=3, **small)).save_pretrained("scorer")
    byte_tokenizer(64).save_pretrained("scorer")
    recipe = recipe_with({"rl": SCORED | {"reward_classifier": "./scorer"}})
    assert "rl.reward_classifier: ./scorer: has 3 labels" in said("rl", recipe, "--dry-run")
    Path("scorer/model.safetensors").unlink()
    assert "no weights" in said("rl", recipe, "--dry-run")


def test_a_stage_that_is_done_is_not_looked_at_and_one_that_was_started_otherwise_is_refused(folder):
    recipe = recipe_with({})
    assert call("sft", recipe, "-q").exit_code == 0
    told = call("run", recipe, "--dry-run")
    assert told.exit_code == 0 and "sft       done already" in told.output and "sft 0." not in told.output
    other = ("run", recipe, "--set", "sft.lr=0.5")
    told = said(*other, "--dry-run")
    assert "sft.lr: 0.001 → 0.5" in told and told == said(*other)
    assert call(*other, "--fresh", "--dry-run").exit_code == 0
    said("run", recipe_with(LATE["rl.reward_classifier"]), "--fresh")
    assert Run(Path("runs/tiny")).stage("sft").is_done(), "neither a dry run nor what is refused deletes anything"


def test_a_full_disk_is_told_before_it_is_full_with_both_numbers(folder, monkeypatch):
    recipe, usage = recipe_with({}), shutil.disk_usage(".")
    monkeypatch.setattr(before.shutil, "disk_usage", lambda path: usage._replace(free=104858))
    for more in (["--dry-run"], []):
        told = said("run", recipe, *more)
        assert (
            "--runs runs:" in told
            and "sft, rm, rl-kld write at least 489.5 KiB" in told
            and "102.4 KiB are free" in told
        )
    assert not Path("runs/tiny/sft").exists()
    monkeypatch.setattr(before.shutil, "disk_usage", lambda path: usage._replace(free=700 * 2**10))
    tight = call("run", recipe, "--dry-run")
    assert tight.exit_code == 0 and "warning: up to" in tight.stderr
    Path("taken").write_text("")
    assert "is a file" in said("run", recipe, "--dry-run", "--runs", "taken/runs")


def test_what_is_trained_and_written_is_what_was_foreseen(folder):
    recipe = load_recipe(recipe_with({"rl": {"steps": 3}}))
    assert call("rl", "late.yaml", "-q").exit_code == 0
    n, made = numbers_of(recipe.model, torch.device("cpu"), "model").trained, Path("runs/tiny/rl-kld")
    size = (made / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 4 * n <= size <= 4 * n + 10_000
    whole = sum(one.stat().st_size for one in made.rglob("*.safetensors"))
    least, most = (written(recipe, {"rl-kld": n}, kept)["rl-kld"] for kept in (1, 3))
    assert least <= whole <= most + 60_000  # heads of files, random states


def test_an_apple_gpu_refuses_what_is_made_for_cuda_in_one_message(folder, monkeypatch):
    change = {
        "device": "mps",
        "model": {"init": None, "path": "./m", "quantization": "nf4", "dtype": "bfloat16"},
        "rl": {"optimizer": "paged_adamw_8bit"},
        "rollout": {"engine": "paged"},
        "memory_limit": "4GiB",
    }
    told = said("run", recipe_with(change), "--dry-run")
    fields = ("model.quantization to none", "model.dtype to float32", "rl.optimizer to adamw", "rollout.engine to hf")
    assert told.count("mps computes in float32") == 1 and all(one in told for one in (*fields, "memory_limit to null"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for more in (["--dry-run"], []):
        assert "no Apple GPU" in said("run", recipe_with({"device": "mps"}), *more)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (resolve_device("mps").type, resolve_device("auto").type) == ("mps", "cpu")
    assert "mps" in json.loads(call("env", "--json").output)["device"]


def test_a_model_is_looked_at_by_its_config_and_files(folder):
    build_scratch(Init(hidden_size=32, layers=1, heads=2, intermediate_size=64), Path("m"), 0)
    own = {"path": "./m", "lora": {"targets": ["nope"]}}
    recipe = recipe_with({"model": {"init": None, "path": "./m"}, "reward_model": own})
    assert "reward_model.lora.targets: no linear layer named nope" in said("run", recipe, "--dry-run")
    Path("m/model.safetensors").unlink()
    assert "model.path: m: no weights" in said("run", recipe, "--dry-run")


def test_what_looks_at_the_model_while_it_is_trained_grades_as_a_score_does(folder):
    recipe = recipe_with({"eval": {"grader": "gone.py:right"}})
    for command in ("train-rm", "rl"):
        told = said(command, recipe)
        assert told == said(command, recipe, "--dry-run") and "eval.grader: gone.py: no such file" in told
    assert not Path("runs/tiny/sft").exists()
    never = ("-s", "rl.eval_every=0", "-s", "train_rm.check_items=0")
    assert call("rl", recipe, "--dry-run", *never).exit_code == 0


def test_gkd_wants_a_demonstration_of_each_prompt_that_it_may_show(folder):
    rows = [{"prompt": f"say {i}", "answer": f"{i}", "response": f"it is {i}"} for i in range(30)]
    del rows[29]["response"]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"task": "custom:exact", "data": {"task": "items.jsonl", "held_out": 0.1}, "sft": {"examples": 8}}
    recipe = recipe_with(sets | {"rl": {"objective": "gkd"}, "train_rm": {"prompts": None}})
    told = said("rl", recipe)
    assert "rl.on_policy: 0.5 asks for demonstrations" in told and "'say 29' has none" in told
    assert call("rl", recipe, "--dry-run", "-s", "rl.on_policy=1").exit_code == 0


def test_a_response_has_to_fit_the_window_of_a_reward_model_of_its_own_too(folder):
    for name, positions in (("m", 64), ("small", 16)):
        build_scratch(Init(hidden_size=32, layers=1, heads=2, intermediate_size=64), Path(name), 0)
        config = json.loads(Path(name, "config.json").read_text())
        Path(name, "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    own = {"path": "./small", "lora": {"r": 2}}
    recipe = recipe_with({"model": {"init": None, "path": "./m"}, "reward_model": own})
    assert "no prompts are left: all are longer than 16 tokens" in said("rl", recipe)
    assert call("rl", recipe, "--dry-run", "-s", "reward_model.path=./m").exit_code == 0
    assert call("sft", recipe, "--dry-run").exit_code == 0
