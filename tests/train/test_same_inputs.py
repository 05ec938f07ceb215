"""What a stage is trained on and the run does not hold, a base on the disk and rows, is the same when it goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.data.prompts import trained_on
from lco_lite.files import write_json
from lco_lite.recipe import Recipe
from lco_lite.run import Input, Run
from lco_lite.train.training import StageTraining
from tests.conftest import TINY
from tests.models.families import save
from tests.train.test_chain import Killed

SHORT = {
    "model": {"path": "m", "lora": {"r": 2}},
    "sft": TINY["sft"] | {"examples": 16, "max_steps": 2, "batch_size": 8},
    "train_rm": TINY["train_rm"] | {"prompts": 4, "check_items": 0, "max_steps": 1},
    "rl": TINY["rl"] | {"feedback": "rule", "steps": 1, "inner_epochs": 1, "prompts_per_step": 4, "eval_every": 0},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save("llama", tmp_path / "m")
    Path("r.yaml").write_text(yaml.safe_dump(TINY | SHORT))
    return tmp_path


def call(*words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == status, result.output
    return result


def refused(*words: str) -> str:
    return " ".join(call(*words, status=2).stderr.split())


@contextmanager
def noise(model: Path) -> Iterator[None]:
    """Other weights, of the same shapes, sizes and times."""
    file, kept = model / "model.safetensors", model.parent / "kept"
    before = shutil.copy2(file, kept).stat()
    save_file({name: tensor + 0.05 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    yield
    shutil.move(kept, file)


def killed_after(step: int, *words: str) -> None:
    """The command, and the process is gone once ``step`` is kept."""
    real = StageTraining.keep

    def keep(self: StageTraining, done: int, *args: object) -> None:
        real(self, done, *args)  # type: ignore[arg-type]
        if done + 1 == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageTraining, "keep", keep)
        call(*words)


# --- the base


def test_an_adapter_is_not_put_on_a_base_that_changed_since(folder):
    call("sft", "r.yaml")
    call("eval", "--policy", "sft")
    with noise(folder / "m"):
        for command in (["eval", "--policy", "sft"], ["rl"], ["export", "tiny", "--to", "merged"]):
            told = refused(*command)
            assert "m: has changed since sft was trained on it" in told and "`lco-lite sft --fresh`" in told
        assert "goes on after step 2" not in refused("sft", "-s", "sft.max_steps=3").partition("m: has")[2]
        assert not Path("runs/tiny/rl-kld").exists()
    assert "scored already" in call("eval", "--policy", "sft").stdout
    (folder / "n").symlink_to(folder / "m")
    assert "has been scored" in call("eval", "--policy", "sft", "-s", "model.path=n").stdout, (
        "another place is no change"
    )


def test_a_stage_does_not_go_on_with_another_base_and_one_of_an_earlier_version_does(folder):
    killed_after(1, "sft", "r.yaml")
    with noise(folder / "m"):
        assert "m: has changed since sft was trained on it" in refused("sft")
        begun = json.loads(Path("runs/tiny/sft/stage.json").read_text())
        assert set(begun.pop("inputs")) >= {"model.path"}
        write_json(Path("runs/tiny/sft/stage.json"), begun)
        call("sft")


def test_the_base_of_a_reward_model_is_compared_too(folder):
    save("llama", folder / "other", num_hidden_layers=1)
    own = ["-s", "reward_model={path: other, lora: {r: 2}}", "-s", "rl.feedback=dpo"]
    call("train-rm", "r.yaml", *own)
    with noise(folder / "other"):
        assert "other: has changed since rm was trained on it" in refused("rl")


# --- the rows


def write_rows(file: str, **fields: str) -> None:
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1), "response": f"= {i + 1}"} | fields for i in range(24)]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_stage_does_not_go_on_with_rows_that_were_edited(folder):
    write_rows("rows.jsonl")
    own = TINY | SHORT | {"task": "custom:string", "data": {"task": "rows.jsonl", "held_out": 0.2}}
    Path("r.yaml").write_text(yaml.safe_dump(own))
    killed_after(1, "sft", "r.yaml")
    write_rows("rows.jsonl", response="no idea")
    told = refused("sft")
    assert "task custom:string (rows.jsonl): has changed since sft was trained on it" in told
    assert "Put it back as it was" in told and "`lco-lite sft --fresh`" in told
    write_rows("rows.jsonl")
    call("sft")
    write_rows("rows.jsonl", response="no idea")
    assert "rows.jsonl" in refused("sft", "-s", "sft.max_steps=3")
    call("sft")  # it is done: nothing is read
    killed_after(1, "rl", "-s", "rl.steps=2")
    write_rows("rows.jsonl", answer="7")
    assert "rows.jsonl): has changed since rl-kld was trained on it" in refused("rl")


def test_demonstrations_preferences_and_prompts_are_each_compared(folder):
    rows = {"task": None, "data": {name: f"{name}.jsonl" for name in ("demonstrations", "preferences", "prompts")}}
    for file in rows["data"].values():
        write_rows(file, chosen="yes", rejected="no")
    recipe = Recipe.model_validate(TINY | SHORT | rows | {"rl": SHORT["rl"] | {"feedback": "dpo", "eval_every": 0}})
    for stage, name in (("sft", "demonstrations"), ("rm", "preferences"), ("rl-kld", "prompts")):
        before = trained_on(recipe, stage)
        assert list(before) == [f"data.{name}"] and before == trained_on(recipe, stage)
        write_rows(f"{name}.jsonl", chosen="no", rejected="yes", response="!")
        assert before != trained_on(recipe, stage)


def test_what_was_sampled_for_other_prompts_before_the_first_checkpoint_is_sampled_anew(folder):
    stage = Run.open(folder, "run").stage("rl-kld")
    stage.begin({"seed": 0}, {}, {"task": Input("task", "0" * 64)})
    (stage.path / "rollouts").mkdir()
    assert not stage.begin({"seed": 0}, {}, {"task": Input("task", "0" * 64)})
    assert stage.begin({"seed": 0}, {}, {"task": Input("task", "1" * 64)})
    assert not (stage.path / "rollouts").exists()
