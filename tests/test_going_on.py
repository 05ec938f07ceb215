"""What may go on in a run, and with what: stages that have started, more steps, the best step; what is not believed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from lco_lite import weights
from lco_lite.checkpoint import load_checkpoint
from lco_lite.cli import app
from lco_lite.command import _remedies
from lco_lite.console import Console
from lco_lite.context import Context
from lco_lite.errors import UsageError
from lco_lite.evaluation.evaluate import looked_by
from lco_lite.files import sha256, write_json
from lco_lite.metrics import read_log
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import recipe_and_said
from lco_lite.run import Run, as_started, stage_settings
from lco_lite.train import rl as rl_module
from lco_lite.train.training import StageTraining
from tests.conftest import TINY
from tests.train.test_chain import Killed, run_stage, same, trained

SHORT: dict[str, Any] = TINY | {
    "sft": {"examples": 32, "max_steps": 2, "batch_size": 16, "lr": 1e-3},
    "rl": TINY["rl"] | {"feedback": "rule", "steps": 2, "inner_epochs": 1},
}
SCORES = {1: 0.25, 2: 0.5, 3: 0.5, 4: 0.375}


@pytest.fixture
def short(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(SHORT))
    return file


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: sft, and rl of 2 steps whose held-out scores are SCORES."""
    file = tmp_path_factory.mktemp("once") / "tiny.yaml"
    file.write_text(yaml.safe_dump(SHORT))
    with pytest.MonkeyPatch.context() as patch:
        scored(patch)
        run_stage(file, "rl-kld")
    return file.parent / "runs" / "tiny"


@pytest.fixture
def made(made_once: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of it for a test of its own, beside its recipe."""
    scored(monkeypatch)
    return Run(Path(shutil.copytree(made_once, short.parent / "runs" / "tiny")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Another, of 4 steps at once."""
    file = tmp_path_factory.mktemp("whole") / "tiny.yaml"
    file.write_text(yaml.safe_dump(SHORT))
    with pytest.MonkeyPatch.context() as patch:
        scored(patch)
        return run_stage(file, "rl-kld", "rl.steps=4").run


def scored(patch: pytest.MonkeyPatch) -> None:
    """The held-out scores of rl's steps are SCORES."""
    real, now = StageTraining.steps, list[int]()

    def steps(self: StageTraining) -> Iterator[int]:
        for step in real(self):
            now.append(step + 1)
            yield step

    patch.setattr(StageTraining, "steps", steps)
    patch.setattr(rl_module, "evaluate", lambda *_: SCORES[now[-1]])


def call(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def on(run: Run, *args: object):
    result = call(*args, "--runs", run.path.parent)
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def changed(file: Path, **values: Any) -> None:
    """As if it had been written so: a stage that is done has its sum."""
    write_json(file, json.loads(file.read_text()) | values)
    done = file.parent / "done.json"
    if file.name == "stage.json" and done.exists():
        kept = json.loads(done.read_text())
        write_json(done, kept | {"files": kept["files"] | {file.name: sha256(file)}})


# --- when a stage has started


def test_a_mistyped_file_neither_locks_the_run_nor_makes_it_the_newest(made, short):
    mistyped = on(made, "sft", short, "--name", "other", "-s", "data.demonstrations=demoes.jsonl")
    assert mistyped.exit_code == 2 and "demoes.jsonl" in mistyped.stderr
    assert Run.newest(made.path.parent) == made
    (short.parent / "demos.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n' * 16)
    right = on(made, "sft", short, "--name", "other", "-s", f"data.demonstrations={short.parent / 'demos.jsonl'}")
    assert right.exit_code == 0, right.output
    other = Run(made.path.parent / "other")
    assert other.recipe().data.demonstrations.endswith("demos.jsonl") and Run.newest(made.path.parent) == other


def test_until_a_checkpoint_other_settings_are_taken_and_what_was_sampled_for_the_first_is_told_as_gone(
    made, short, monkeypatch, capsys
):
    def die(*_: Any) -> None:
        raise Killed

    made.discard_from("rl-kld")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(rl_module, "score_in_plan", die)
        run_stage(short, "rl-kld")
    assert list((made.path / "rl-kld/rollouts").iterdir())
    run_stage(short, "rl-kld", "rl.beta=0.5", "rl.steps=1")
    assert "sampled for other settings" in capsys.readouterr().err
    assert made.stage("rl-kld").settings()["rl.beta"] == 0.5 == made.recipe().rl.beta


def test_what_a_recipe_leaves_unset_stays_as_the_stage_was_started_whatever_is_filled_in_now(made, short):
    stage = made.stage("rl-kld")
    settings = stage.settings() | {"rl.lr": 5e-6}  # what an older version filled in
    changed(stage.path / "stage.json", settings=settings)
    short.write_text(yaml.safe_dump(SHORT | {"rl": {k: v for k, v in SHORT["rl"].items() if k != "lr"}}))
    goes_on = on(made, "rl", short)
    assert goes_on.exit_code == 0 and "done already" in goes_on.output
    assert "rl.lr: 5e-05 → 5e-06" in " ".join(goes_on.output.split())
    assert on(made, "rl").exit_code == 0
    refused = on(made, "rl", short, "-s", "rl.lr=5e-5")
    assert refused.exit_code == 2 and "rl.lr: 5e-06 → 5e-05" in refused.stderr
    assert "`lco-lite rl --fresh`" in refused.stderr


def test_unset_sections_come_back_whole_and_newer_settings_keep_their_old_meaning(tmp_path):
    base = {"model": {"path": "some/model", "lora": None}, "task": "arithmetic"}
    stage = Run.open(tmp_path, "r").stage("rl-kld")
    before = stage_settings(Recipe.model_validate(base), "rl-kld")
    stage.begin(before, {})
    write_json(stage.checkpoints / "step-00000001" / "state.json", {})
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"model": {"path": "some/model"}, "task": "arithmetic"}))
    sets = ["rl.whole_groups=true"]  # on no older version's list
    recipe, named = recipe_and_said(file, sets, {}, lambda text: None)
    kept, lines = as_started(recipe, stage, named)
    assert kept.model.lora is None and kept.rl.lr == 5e-6 and any("rl.lr" in line for line in lines)
    with pytest.raises(UsageError) as caught:
        stage.check(stage_settings(kept, "rl-kld"), {})
    assert [line for line in str(caught.value).splitlines() if "→ " in line][1:] == ["  rl.whole_groups: unset → True"]
    recipe, named = recipe_and_said(file, [], {}, lambda text: None)
    kept, _ = as_started(recipe, stage, named)
    assert stage.check(stage_settings(kept, "rl-kld"), {}) == []


def test_what_is_left_of_a_stage_of_another_objective_goes_on_with_its_own_settings(made):
    first = on(made, "rl", "--objective", "lch", "--beta", "0.5", "--steps", "1")
    assert first.exit_code == 0, first.output
    again = on(made, "rl", "--objective", "lch")
    assert again.exit_code == 0 and "rl-lch: done already" in again.output
    assert made.recipe().rl.objective == "kld", "the run's own recipe stays"
    assert made.newest_stage() == "rl-lch"


def test_a_remedy_for_memory_says_where_it_takes_fresh_and_that_command_is_accepted(made):
    ctx = Context(made, made.recipe(), Console(quiet=True), torch.device("cpu"), stage="rl-kld")
    ctx.clock.phase = "update"
    told = {line.split(" ")[0].rstrip(":"): line for line in _remedies(ctx)}
    assert "`lco-lite rl --fresh`" in told["rl.max_length"]
    assert "`lco-lite sft --fresh`" in told["a"], "a smaller model is another sft"
    assert "--fresh" not in told["model.gradient_checkpointing"]
    again = on(made, "rl", "--fresh", "-s", "rl.max_length=64", "--steps", "1")
    assert again.exit_code == 0, again.output
    assert made.recipe().rl.max_length == 64, "what follows takes it from the run"
    assert on(made, "rl").exit_code == 0


# --- more steps


def test_more_steps_end_in_the_bits_of_as_many_at_once(made, short, whole):
    more = on(made, "rl", "--steps", "4")
    assert more.exit_code == 0, more.output
    assert "rl.steps: 2 → 4: goes on after step 2" in " ".join(more.output.split())
    assert "another course" not in more.output, "the rate is constant"
    stages = [run.stage("rl-kld") for run in (made, whole)]
    assert same(*(load_file(stage.adapter / "adapter_model.safetensors") for stage in stages))
    assert read_log(stages[0].path / "updates.jsonl") == read_log(stages[1].path / "updates.jsonl")
    assert [row["step"] for row in read_log(stages[0].metrics)] == [1, 2, 3, 4]
    assert stages[0].best_step() == stages[1].best_step() == best(2, 0.5)
    assert made.recipe().rl.steps == 4 and "done already" in on(made, "rl").output
    fewer = on(made, "rl", short, "--steps", "1")
    assert fewer.exit_code == 2 and "rl.steps: 4 → 1 (4 steps are done)" in fewer.stderr
    assert "`lco-lite rl --fresh`" in fewer.stderr and made.stage("rl-kld").is_done()


def test_a_stage_killed_as_it_goes_on_after_its_end_ends_in_the_same_bits(made, short, whole, monkeypatch):
    real = StageTraining.keep

    def keep(self: StageTraining, step: int, *told: Any) -> None:
        if step == 2:
            raise Killed  # step 3 is made, and scored, and in no checkpoint
        real(self, step, *told)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageTraining, "keep", keep)
        patch.setitem(SCORES, 3, 0.75)
        run_stage(short, "rl-kld", "rl.steps=4")
    assert not made.stage("rl-kld").is_done() and made.stage("rl-kld").best_step()["step"] == 3
    monkeypatch.setitem(SCORES, 3, 0.75)
    cut = run_stage(short, "rl-kld", "rl.steps=4")
    assert same(trained(cut, "rl-kld"), load_file(whole.stage("rl-kld").adapter / "adapter_model.safetensors"))
    assert cut.run.stage("rl-kld").best_step() == best(3, 0.75)
    kept = load_file(cut.run.stage("rl-kld").best / "adapter/adapter_model.safetensors")
    third = Path(cut.run.stage("rl-kld").checkpoints / "step-00000003/tensors.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), load_file(third).values(), strict=True))


def test_sft_goes_on_after_its_end_while_nothing_rests_on_it_and_says_that_cosine_is_another_course(made, short):
    refused = on(made, "sft", "-s", "sft.max_steps=3")
    assert refused.exit_code == 2 and "sft.max_steps: 2 → 3 (rl-kld rests on it as it is)" in refused.stderr
    assert "`lco-lite sft --fresh`" in refused.stderr
    shutil.rmtree(made.stage("rl-kld").path)
    more = on(made, "sft", "-s", "sft.max_steps=3")
    assert more.exit_code == 0, more.output
    assert "cosine schedule is now that of the new length: another course" in " ".join(more.output.split())
    assert [row["step"] for row in read_log(made.stage("sft").metrics)] == [1, 2, 3]


def test_without_its_last_checkpoint_a_stage_that_is_done_does_not_start_over_for_more_steps(made):
    shutil.rmtree(made.stage("rl-kld").checkpoints)
    refused = on(made, "rl", "--steps", "3")
    assert refused.exit_code == 2 and "none is left" in refused.stderr and "--fresh" in refused.stderr
    assert made.stage("rl-kld").is_done()


# --- the best step, and steps by name


def best(step: int, score: float) -> dict[str, Any]:
    return {"step": step, "score": score, "items": 8, "scored_by": looked_by(Recipe.model_validate(SHORT).eval)}


def test_a_score_that_was_found_in_another_way_is_no_mark_to_beat(made, monkeypatch):
    for steps, setting in ((3, "eval.temperature=0.5"), (4, "eval.max_new_tokens=9")):
        monkeypatch.setitem(SCORES, steps, 0.1)
        assert on(made, "rl", "--steps", steps, "-s", setting).exit_code == 0
        assert made.stage("rl-kld").best_step()["step"] == steps
    monkeypatch.setitem(SCORES, 5, 0.1)
    assert on(made, "rl", "--steps", 5).exit_code == 0
    assert made.stage("rl-kld").best_step()["step"] == 4, "of scores that are alike the earliest stays"


def test_a_stage_is_deleted_only_where_the_next_can_begin(made, monkeypatch, tmp_path):
    (tmp_path / "reward.py").write_text("def f(completions, **columns):\n    return columns['no_such']\n")
    own = ("-s", "rl.feedback=function", "-s", f"rl.reward_function={tmp_path / 'reward.py'}:f")
    refused = on(made, "rl", "--fresh", *own)
    assert refused.exit_code == 2 and "no_such" in refused.stderr
    assert made.stage("rl-kld").is_done() and "to start again" not in refused.output


def test_the_best_step_is_kept(made_once):
    stage = Run(made_once).stage("rl-kld")
    assert stage.best_step() == best(2, 0.5)
    assert same(*(load_file(f / "adapter_model.safetensors") for f in (stage.best / "adapter", stage.adapter)))


def test_a_step_that_scored_no_higher_than_the_last_is_not_recommended(made, short, monkeypatch):
    monkeypatch.setitem(SCORES, 3, 0.5)
    told = on(made, "run", short, "--steps", "3", "-s", "eval.seeds=1", "-s", "eval.items=2")
    assert told.exit_code == 0 and made.stage("rl-kld").best_step()["step"] == 2
    assert "not of the last" not in told.output and "best: step" not in told.output


def test_where_the_best_step_is_not_the_last_the_end_and_the_table_of_run_name_it(made, short, monkeypatch):
    monkeypatch.setitem(SCORES, 3, 0.1)
    told = on(made, "run", short, "--steps", "3", "-s", "eval.seeds=1", "-s", "eval.items=2")
    assert told.exit_code == 0, told.output
    words = " ".join(told.output.split())
    assert "is that of step 2, not of the last: `lco-lite eval --policy rl-kld@best`" in words
    assert "rl-kld (best: step 2)" in words
    scored = on(made, "eval", "--policy", "rl@best", "--json", "--limit", "2", "--seeds", "1")
    assert json.loads(scored.stdout)["arithmetic"]["stage"] == "rl-kld@best"
    assert made.eval_path("arithmetic", "rl-kld@best").exists()
    folder = Path(on(made, "export", made.name, "--to", "adapter", "--policy", "rl@best").stdout.split()[0])
    assert folder.name == "rl-kld-best-adapter" and "policy `rl-kld@best`" in (folder / "README.md").read_text()
    best, kept = made.stage("rl-kld").best / "adapter/adapter_model.safetensors", folder / "adapter_model.safetensors"
    assert same(load_file(best), load_file(kept))


def test_a_step_whose_weights_are_there_is_a_policy_by_its_number(made):
    ctx = Context(made, made.recipe(), Console(quiet=True), torch.device("cpu"))
    looks_at_the_steps(ctx)


@pytest.mark.slow
def test_a_step_of_full_fine_tuning_is_one_too(short):
    looks_at_the_steps(run_stage(short, "rl-kld", "model.lora=null"))


def looks_at_the_steps(ctx: Context) -> None:
    def logits(name: str) -> torch.Tensor:
        role = weights.open_stage(ctx, weights.named_policy(ctx.run, name))
        with role.model.use(role.adapter), torch.no_grad():
            return role.model.base(torch.tensor([[5, 6, 7]])).logits

    assert {"base", "sft", "rl-kld", "rl-kld@1"} <= set(weights.policies(ctx.run))
    assert torch.equal(logits("rl@2"), logits("rl-kld"))
    assert not torch.equal(logits("rl@1"), logits("rl"))
    first, stage = weights.open_stage(ctx, "rl-kld@1"), ctx.run.stage("rl-kld")
    like = {f"weights.{name}": p for name, p in weights.trainable(ctx, first, "rl-kld")}
    kept = load_checkpoint(stage.checkpoints / "step-00000001", "cpu", stage.owner(), like)
    assert all(torch.equal(p, kept.tensors[name]) for name, p in like.items())
    assert weights.policy_id(ctx.run, "rl-kld@1") != weights.policy_id(ctx.run, "rl-kld")


@pytest.mark.parametrize("name", ["rl-kld@7", "rl@7", "rl-mse", "rl@", "sft@best", "base@1", "optimal", "@2", "../x"])
def test_a_name_without_weights_is_told_those_that_are_there(made, name):
    with pytest.raises(UsageError, match="there are: base, sft, rl-kld, rl-kld@best, rl-kld@1$"):
        weights.named_policy(made, name)


def test_the_policy_is_chosen_by_the_runs_own_record_and_not_by_the_clock_of_the_files(made):
    for name, order in (("rl-mse", 9), ("rl-lch", 4)):
        stage = made.stage(name)
        shutil.copytree(made.stage("rl-kld").path, stage.path)
        changed(stage.path / "done.json", order=order)
    for i, name in enumerate(("rl-mse", "rl-lch", "rl-kld", "sft")):
        os.utime(made.path / name / "done.json", (1000 + i, 1000 + i))
    assert made.newest_stage() == weights.named_policy(made, None) == weights.named_policy(made, "rl") == "rl-mse"


def test_run_takes_what_rl_takes(short):
    told = call("run", short, "--objective", "lch", "--beta", "0.5", "--steps", "7", "--dry-run")
    assert told.exit_code == 0, told.output
    assert all(line in told.output for line in ("objective: lch", "beta: 0.5", "7 steps of"))


# --- what lies there is not believed


def test_a_task_that_a_stage_under_way_cannot_have_begun_with_is_told_by_its_file(made):
    stage = made.stage("rl-kld")
    (stage.path / "done.json").unlink()
    begun = json.loads((stage.path / "stage.json").read_text())
    write_json(stage.path / "stage.json", begun | {"settings": begun["settings"] | {"task": "x"}})
    told = on(made, "rl", "--steps", "3")
    assert told.exit_code == 2 and "rl-kld/stage.json: unknown task 'x'" in " ".join(told.stderr.split())


@pytest.mark.parametrize("file", ["stage.json", "done.json", "best/best.json"])
def test_a_record_that_no_stage_wrote_is_refused_with_what_is_missing(made, file):
    write_json(made.stage("rl-kld").path / file, {})
    told = on(made, *(["rl"] if file == "stage.json" else ["eval", "--policy", "rl@best"]))
    assert told.exit_code == 2
    assert re.search(rf"{file}: damaged: (settings|id|step) is missing", told.stderr)
    assert "--fresh" in told.stderr or "Delete" in told.stderr


def test_what_a_stage_goes_on_from_is_looked_at_before_it_trains(made):
    stage = made.stage("rl-kld")
    best, log = stage.best / "best.json", stage.metrics
    *before, last = log.read_text().splitlines(keepends=True)
    adapter = stage.best / "adapter" / "adapter_config.json"
    for file, damage, told in (
        (best, lambda: changed(best, files=3), "best.json: damaged: files: found 3, it should be a valid dictionary"),
        (adapter, lambda: adapter.write_text("{}"), "adapter_config.json: has changed"),
        (log, lambda: log.write_text("".join(before) + json.dumps(json.loads(last) | {"samples_seen": "x"}) + "\n"),
         "line 2: damaged: samples_seen: found 'x', it should be a valid number"),
        (log, lambda: log.write_text("".join(before) + '{"step": 2}\n'), "line 2: damaged: samples_seen is missing"),
    ):  # fmt: skip
        content = file.read_bytes()
        damage()
        refused = on(made, "rl", "--steps", "3")
        assert refused.exit_code == 2 and told in " ".join(refused.stderr.split())
        assert stage.kept_steps()[-1] == 2
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"result": {"steps": "x"}}, "result.steps: found 'x', it should be a valid integer"),
        ({"result": {"steps": 10**30}}, "result.steps: found 1"),
        ({"order": None}, "order: found None"),
        ({"files": {"adapter": 5}}, "files.adapter: found 5"),
        ({"files": {"x" * 5000: "0"}}, "it should have at most 1000 characters"),
    ],
)
def test_each_field_of_what_a_stage_noted_is_looked_at(made, fields, told):
    changed(made.stage("rl-kld").path / "done.json", **fields)
    refused = on(made, "eval", "--policy", "rl-kld")
    assert refused.exit_code == 2 and "done.json: damaged: " in refused.stderr and told in refused.stderr
    assert len(refused.stderr) < 1000


def test_checkpoints_of_another_run_and_of_unknown_settings_are_refused(made, short):
    stage = made.stage("rl-kld")
    other = Run(Path(shutil.copytree(made.path, made.path.parent / "other"))).stage("rl-kld")
    changed(other.path / "stage.json", id="other/rl-kld 000000000000")
    refused = on(made, "rl", "--name", "other", "--steps", "3")
    assert refused.exit_code == 2 and other.is_done()
    assert f"found that of {stage.owner()}, accepted is that of other/rl-kld 000000000000" in refused.stderr
    with pytest.raises(UsageError, match="found that of tiny/rl-kld"):
        at = other.checkpoints / "step-00000002"
        load_checkpoint(at, "cpu", other.owner(), {})
    with pytest.raises(UsageError, match=r"found nothing for weights.x, \[2\] is accepted"):
        load_checkpoint(at, "cpu", stage.owner(), {"weights.x": torch.zeros(2)})
    (stage.path / "stage.json").unlink()
    refused = on(made, "rl", "--name", "tiny")
    assert refused.exit_code == 2 and "no stage.json" in refused.stderr and "`lco-lite rl --fresh`" in refused.stderr


def test_a_stage_that_is_done_and_has_lost_what_it_made_is_told(made):
    shutil.rmtree(made.stage("rl-kld").adapter)
    for verb in ("rl", "eval"):
        told = on(made, verb)
        assert told.exit_code == 2 and "neither adapter/ nor model/ is there" in told.stderr
    assert "`lco-lite rl --fresh`" in told.stderr


@pytest.mark.parametrize("name", [".lock", ".lock.held"])
def test_a_folder_in_the_place_of_a_lock_is_told(made, name):
    (made.path / name).unlink(missing_ok=True)
    (made.path / name).mkdir()
    told = on(made, "rl", "--name", "tiny")
    assert told.exit_code == 2 and f"{made.path / name} is a folder" in told.stderr


def test_a_run_folder_that_is_deleted_while_it_is_trained_is_one_message_and_is_not_made_anew(made, monkeypatch):
    def keep(self: StageTraining, *told: Any) -> None:
        shutil.rmtree(self.stage.path.parent)
        real(self, *told)

    real = StageTraining.keep
    monkeypatch.setattr(StageTraining, "keep", keep)
    told = on(made, "rl", "--steps", "3")
    assert told.exit_code == 1 and not made.path.exists()
    assert f"{made.path} was deleted or moved while this process worked in it" in told.stderr
    assert told.stderr.count("\n") == 1


def test_a_dry_run_of_a_stage_that_is_made_longer_says_so_and_looks_at_what_it_will_open(made, short):
    words = ("rl", short, "--steps", "5", "--dry-run")
    assert "done already" not in on(made, *words).stdout.split("rl-kld", 1)[1]
    assert "5 steps of" in on(made, *words).stdout


def test_a_best_step_that_is_damaged_is_told_while_its_stage_is_not_done(made):
    (made.stage("rl-kld").path / "done.json").unlink()
    file = made.stage("rl-kld").best / "adapter/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    told = on(made, "eval", "--policy", "rl@best", "--limit", "2", "--seeds", "1")
    assert told.exit_code == 2 and "adapter_model.safetensors: has changed" in " ".join(told.stderr.split())


def test_a_kill_between_the_settings_of_a_stage_and_the_runs_recipe_leaves_no_old_recipe(tiny, monkeypatch):
    sets = ["sft.max_steps=1", "sft.schedule=constant"]
    run_stage(tiny, "sft", *sets)
    sets[0] = "sft.max_steps=2"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "write_recipe", lambda *_: (_ for _ in ()).throw(Killed))
        run_stage(tiny, "sft", *sets)
    run = run_stage(tiny, "sft", *sets).run
    assert run.stage("sft").is_done() and run.recipe().sft.max_steps == 2
