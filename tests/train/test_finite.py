"""A number that is not finite changes no weight: its batch is named and left out, and what is kept was looked at."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
import yaml
from torch import Tensor
from torch.nn import Parameter

from lco_lite import checkpoint, weights
from lco_lite.checkpoint import checkpoints, load_latest, newest_good, save_checkpoint
from lco_lite.console import Console
from lco_lite.context import Context
from lco_lite.errors import DataError, Diverged, ModelError, WeightsLost
from lco_lite.files import JsonLines, read_jsonl
from lco_lite.finite import not_finite_in, rows_not_finite, witness
from lco_lite.metrics import read_log
from lco_lite.recipe.file import load_recipe
from lco_lite.recipe.sections import Lora, TrainRm
from lco_lite.run import Run
from lco_lite.train import rollouts
from lco_lite.train.training import StageTraining
from tests.conftest import TINY
from tests.models.families import load, save
from tests.train.test_chain import killed_after, run_stage, same, start, trained

ROWS = [{"pair": 7, "prompt": "1+1", "chosen": "2"}]
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_of_many_that_is_not_finite_is_seen_and_large_ones_are_numbers(bad, dtype):
    whole = {"a": torch.full((70, 1000), 60_000.0, dtype=dtype), "b": torch.ones(3, 2, dtype=dtype), "c": torch.ones(1)}
    assert witness(whole.values()).isfinite() and not_finite_in(whole) is None
    assert rows_not_finite(whole["a"]) is None
    whole["b"][1, 1] = bad
    assert not witness(whole.values()).isfinite() and not_finite_in(whole) == "b"
    rows = rows_not_finite(whole["b"])
    assert rows is not None and rows.tolist() == [False, True, False]


@pytest.fixture
def training(tiny: Path, tmp_path: Path) -> Callable[..., StageTraining]:
    """What trains one weight of 3 numbers, in a run of its own; made again it goes on where that one stopped."""

    def make(most: int = 1, **settings: Any) -> StageTraining:
        ctx = Context(Run.open(tmp_path, "run"), load_recipe(tiny), Console(quiet=True), torch.device("cpu"))
        rm = TrainRm(lr=0.1, schedule="constant", skip_batches=most, **settings)
        return StageTraining(ctx, ctx.run.stage("rm"), [("w", Parameter(torch.ones(3)))], rm, 20, 20)

    return make


def one(stage: StageTraining, loss: float = 1.0, gradient: float = 1.0) -> dict[str, float] | None:
    """A step of one update."""
    (weight,) = stage.parameters.values()
    weight.grad = torch.full((3,), gradient)
    made = stage.update({"loss": loss}, lambda: ROWS)
    stage.keep(stage.done, {"loss": loss} | made if made else {})
    return made


WRONG = [*((bad, 1.0, "loss") for bad in BAD), *((1.0, bad, "gradient") for bad in (math.nan, math.inf, 3e19))]


@pytest.mark.parametrize(("loss", "gradient", "named"), WRONG)
def test_a_batch_whose_numbers_are_not_finite_changes_nothing_and_is_named(training, capsys, loss, gradient, named):
    with training(max_grad_norm=None) as stage:
        assert one(stage) is not None
        before, moments = stage.parameters["w"].detach().clone(), [s.clone() for s in states(stage)]
        assert one(stage, loss, gradient) is None
        assert torch.equal(stage.parameters["w"], before) and all(map(torch.equal, states(stage), moments))
        (line,) = JsonLines(stage.stage.path / "skipped.jsonl").rows
        assert line == {"step": 2, "update": 2, "not_finite": [named], "left_out": True, "rows": ROWS}
        assert f"update 2: not finite: {named}; its rows: pair 7, prompt '1+1', chosen '2'" in capsys.readouterr().err
        assert one(stage) is not None and not torch.equal(stage.parameters["w"], before)
    rows = read_log(stage.stage.metrics)
    assert [row.get("not_finite") for row in rows] == [None, 1, None] and "loss" not in rows[1]


def states(stage: StageTraining) -> list[Tensor]:
    return [x for state in stage.adamw.state.values() for x in state.values()]


def test_one_batch_too_many_ends_the_stage_at_a_checkpoint_that_is_finite_and_is_tried_again(training):
    with training(most=2) as stage:
        one(stage)
        assert one(stage, math.nan) is one(stage, math.nan) is None
        weight = stage.parameters["w"].detach().clone()
        with pytest.raises(Diverged, match=r"update 4: .*rm.skip_batches allows 2 .*rm/skipped.jsonl"):
            one(stage, math.nan)
    assert newest_good(stage.stage.checkpoints) == checkpoints(stage.stage.checkpoints)[-1]
    with training(most=2) as again:
        assert again.done == 3 and torch.equal(again.parameters["w"], weight)
        with pytest.raises(Diverged, match="update 4"):
            one(again, math.nan)
    with training(most=2) as mended:
        assert one(mended) is not None, "what was wrong with it is no longer so"
    with training(most=3) as patient:
        assert patient.done == 3 and one(patient, math.nan) is None
    left_out = [line["left_out"] for line in read_jsonl(stage.stage.path / "skipped.jsonl")]
    assert left_out == [True, True, False, True]


def test_a_batch_that_was_left_out_stays_so_when_its_update_is_made_again(training):
    with training(save_every=50) as stage:
        one(stage)
        stage.save()
        one(stage)
        (weight,) = stage.parameters.values()
        weight.grad = torch.ones(3)
        stage.update({"loss": math.nan}, lambda: ROWS)
    with training() as again:
        assert again.done == 1 and again.updates == 1
        assert one(again) is not None
        assert one(again) is None, "its loss is finite this time"


@pytest.mark.parametrize("most", [0, 1])
def test_a_weight_that_a_step_makes_no_number_sends_the_stage_back_to_its_checkpoint(training, most):
    with training(most=most) as stage:
        one(stage)
        stage.save()
        good = stage.parameters["w"].detach().clone()

        def spoil(*_: Any) -> None:
            with torch.no_grad():
                stage.parameters["w"][1] = math.inf

        stage.adamw.register_step_post_hook(spoil)
        with pytest.raises(WeightsLost if most else Diverged, match="weights after the step; its rows: pair 7"):
            one(stage)
        assert newest_good(stage.stage.checkpoints).name == "step-00000001"
        if most:
            with pytest.raises(Diverged, match="left out, and weights are not finite all the same"):
                one(stage)
    with training(most=most) as again:
        assert torch.equal(again.parameters["w"], good)
        assert (one(again) is None) == bool(most)


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_no_checkpoint_is_made_of_what_is_not_finite(training, what):
    with training(save_every=1) as stage:
        one(stage)
        made = checkpoints(stage.stage.checkpoints)
        with torch.no_grad():
            target = stage.parameters["w"] if what == "weights" else stage.adamw.state[stage.parameters["w"]]["exp_avg"]
            target[0] = math.nan
        with pytest.raises(Diverged, match="no checkpoint is made"):
            stage.keep(stage.done, {})
    assert checkpoints(stage.stage.checkpoints) == made


def test_a_checkpoint_of_an_earlier_version_that_is_not_finite_gives_way_to_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"w": torch.ones(2)}, None, {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "not_finite_in", lambda tensors: None)
        save_checkpoint(tmp_path, 2, {"w": torch.tensor([1.0, math.nan])}, None, {})
    with pytest.warns(UserWarning, match="step-00000002 is damaged .w is not finite."):
        found = load_latest(tmp_path)
    assert found is not None and found.step == 1 and newest_good(tmp_path) == found.path


def test_a_product_that_is_not_finite_is_not_kept_and_one_that_is_there_is_not_opened(training, tmp_path):
    model = load(save("llama", tmp_path / "m"))
    model.add_adapter("policy", Lora(r=2), 0)
    named = model.trainable("policy")
    stage = training().stage
    model.save_adapter("policy", tmp_path / "good")
    with torch.no_grad():
        named[0][1][0, 0] = math.nan
    with pytest.raises(Diverged, match="lora_A.* is not finite: they are not kept"):
        weights.save(weights.Role(model, "policy"), stage, {})
    assert not stage.adapter.exists()
    model.save_adapter("policy", tmp_path / "bad")
    with pytest.raises(ModelError, match="adapter_model.safetensors: .*lora_A.* is not finite"):
        model.load_adapter("other", tmp_path / "bad")


# the whole of it


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run after sft."""
    file = tmp_path_factory.mktemp("finite") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    run_stage(file, "sft", "sft.max_steps=1", name="warm")
    return file


def spoilt(patch: pytest.MonkeyPatch, stage: str, update: int, spoil: Callable[[StageTraining, dict], Any]) -> list:
    """``spoil`` is let at update ``update`` of ``stage``, each time that it comes."""
    real, calls = StageTraining.update, []

    def spoiling(self: StageTraining, numbers: dict, rows: Any) -> Any:
        if self.stage.name == stage and self.updates + 1 == update:
            spoil(self, numbers)
            calls.append(update)
        return real(self, numbers, rows)

    patch.setattr(StageTraining, "update", spoiling)
    return calls


def weight_is_nan(training: StageTraining, numbers: dict[str, float]) -> None:
    with torch.no_grad():
        next(iter(training.parameters.values()))[0] = math.nan


def test_a_weight_that_is_no_number_before_the_last_update_leaves_no_such_model(tiny, monkeypatch, capsys):
    calls = spoilt(monkeypatch, "sft", 4, lambda *a: weight_is_nan(*a) if not calls else None)
    ctx = run_stage(tiny, "sft")
    assert calls == [4, 4], "from the checkpoint of step 3 once more, without its batch"
    assert ctx.run.stage("sft").is_done() and not_finite_in(trained(ctx, "sft")) is None
    (line,) = read_jsonl(ctx.run.stage("sft").path / "skipped.jsonl")
    assert (line["update"], line["not_finite"], len(line["rows"])) == (4, ["weights after the step"], 16)
    assert set(line["rows"][0]) == {"demonstration", "prompt", "response"} and "<|user|>" in line["rows"][0]["prompt"]
    assert "back to" in (told := capsys.readouterr().err) and "step-00000003" in told


def test_a_weight_that_is_no_number_time_and_again_ends_with_status_4_and_a_good_checkpoint(tiny, monkeypatch, capsys):
    spoilt(monkeypatch, "sft", 2, weight_is_nan)
    for _ in range(2):  # a restart too
        with pytest.raises(typer.Exit) as end:
            run_stage(tiny, "sft")
        assert end.value.exit_code == Diverged.exit_code
        assert "the last good checkpoint is" in (told := capsys.readouterr().err) and "step-00000001" in told
    assert not (tiny.parent / "runs/tiny/sft/done.json").exists()


def test_a_stage_that_left_a_batch_out_is_killed_and_goes_on_to_the_same_bits(tiny, monkeypatch):
    sets = ("sft.save_every=3", "sft.max_steps=5")
    spoilt(monkeypatch, "sft", 2, lambda training, numbers: numbers.update(loss=math.nan))
    whole = run_stage(tiny, "sft", *sets, name="whole")
    with killed_after(monkeypatch, "sft", 4):
        run_stage(tiny, "sft", *sets, name="cut")
    cut = run_stage(tiny, "sft", *sets, name="cut")
    assert same(trained(whole, "sft"), trained(cut, "sft"))
    logs = [read_jsonl(ctx.run.stage("sft").path / "skipped.jsonl") for ctx in (whole, cut)]
    assert logs[0] == logs[1] and [line["update"] for line in logs[0]] == [2]


def test_a_reward_that_is_no_number_leaves_its_batches_out_and_names_its_response(warm, monkeypatch):
    """One response of eight, in a minibatch of four: the other one is made."""
    shutil.copytree(warm.parent / "runs/warm", warm.parent / "runs/reward")
    wrong = torch.tensor([1.0, -1.0, 1.0, math.nan, -1.0, 1.0, -1.0, 1.0])
    monkeypatch.setattr(rollouts, "reward_sources", lambda rl, device: {"rule": lambda *asked: wrong})
    sets = ("sft.max_steps=1", "rl.feedback=rule", "rl.baseline=none", "rl.steps=1", "rl.inner_epochs=1")
    ctx = run_stage(warm, "rl-kld", *sets, "rl.eval_every=0", name="reward")
    stage = ctx.run.stage("rl-kld")
    (line,) = read_jsonl(stage.path / "skipped.jsonl")
    assert "rewards" in line["not_finite"] and "advantages" in line["not_finite"] and len(line["rows"]) == 4
    (row,) = [row for row in line["rows"] if "not_finite" in row]
    assert row["response_number"] == 4 and {"prompt", "response", "item"} <= set(row)
    (metrics,) = read_log(stage.metrics)
    assert metrics["not_finite"] == 1 and metrics["reward"] is None and math.isfinite(metrics["loss"])
    assert len(read_log(stage.path / "updates.jsonl")) == 1 and not_finite_in(trained(ctx, "rl-kld")) is None


def test_hidden_states_that_are_no_numbers_are_found_in_the_forward_pass_of_an_update(warm, monkeypatch):
    shutil.copytree(warm.parent / "runs/warm", warm.parent / "runs/hidden")
    real = weights.Role.hidden

    def hidden(self: Any, batch: Any) -> Tensor:
        made = real(self, batch)
        if torch.is_grad_enabled() and made.requires_grad:
            made = torch.where((batch.rows == 1)[:, None], math.nan, made)
        return made

    monkeypatch.setattr(weights.Role, "hidden", hidden)
    sets = ("sft.max_steps=1", "rl.feedback=rule", "rl.steps=1", "rl.inner_epochs=1", "rl.skip_batches=1")
    with pytest.raises(typer.Exit) as end:
        run_stage(warm, "rl-kld", *sets, "rl.eval_every=0", name="hidden")
    assert end.value.exit_code == 4
    lines = read_jsonl(warm.parent / "runs/hidden/rl-kld/skipped.jsonl")
    assert [line["left_out"] for line in lines] == [True, False]
    for line in lines:
        assert set(line["not_finite"]) >= {"loss", "hidden states"}
        assert [row["not_finite"] for row in line["rows"] if "not_finite" in row] == [["hidden states"]]


@pytest.mark.parametrize("part", ["sft/model/config.json", "base/model.safetensors"])
def test_what_a_stage_rests_on_is_verified_when_it_is_opened(warm, part):
    name = part.partition("/")[0]
    run = Path(shutil.copytree(warm.parent / "runs/warm", warm.parent / f"runs/open-{name}"))
    file = run / part
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with start(warm, "sft.max_steps=1", name=run.name) as ctx, pytest.raises(DataError, match=f"{part}: has changed"):
        weights.open_stage(ctx, name)


@pytest.mark.slow
def test_memory_open_files_and_the_time_of_a_step_stay_the_same_over_410_steps(warm, monkeypatch):
    shutil.copytree(warm.parent / "runs/warm", warm.parent / "runs/long")
    process, seen, real = psutil.Process(), list[tuple[float, int, float]](), StageTraining.keep

    def keep(self: StageTraining, *told: Any) -> None:
        real(self, *told)
        seen.append((process.memory_info().rss / 2**20, process.num_fds(), time.process_time()))

    monkeypatch.setattr(StageTraining, "keep", keep)
    sets = ["sft.max_steps=1", "rl.feedback=rule", "rl.steps=410", "rl.prompts_per_step=2", "rl.minibatch=2"]
    sets += ["rl.inner_epochs=1", "rl.max_new_tokens=2", "rl.eval_every=0", "rl.save_every=40", "rl.guard=off"]
    run_stage(warm, "rl-kld", *sets, name="long")
    assert len(seen) == 410
    memory, files, clock = zip(*seen, strict=True)
    took = [b - a for a, b in zip(clock, clock[1:], strict=False)]
    early, late = sorted(took[100:200]), sorted(took[-100:])
    assert max(files[-100:]) <= max(files[10:110])
    assert max(memory[-50:]) - max(memory[100:150]) < 8, "MiB"
    assert late[50] < 1.5 * early[50], "the median"
    assert json.loads((warm.parent / "runs/long/rl-kld/done.json").read_text())["result"]["steps"] == 410
