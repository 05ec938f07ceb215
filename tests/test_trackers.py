"""Trackers: off unless named, told every step once, also over a stop; and no number of the training is another."""

from __future__ import annotations

import glob
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from lco_lite import trackers
from lco_lite.cli import app
from lco_lite.errors import UsageError
from lco_lite.metrics import MetricsLog, read_log
from lco_lite.recipe.file import load_recipe
from lco_lite.run import Run
from lco_lite.trackers import Trackers
from tests.train.test_chain import killed_after, run_stage, same, trained


class Remembering:
    """A tracker in memory; each that was started is in ``made``."""

    made: list[Remembering] = []

    def start(self, run: Run, stage: Any, config: Any, done: int, told: int) -> None:
        self.begun, self.config, self.lines = (run.name, stage.name, done, told), config, {}
        self.ended = False
        self.made.append(self)

    def log(self, step: int, numbers: Any) -> None:
        self.lines[step] = dict(numbers)

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def remembering(monkeypatch) -> list[Remembering]:
    monkeypatch.setattr(Remembering, "made", [])
    monkeypatch.setitem(trackers.TRACKERS, "trackio", Remembering)
    monkeypatch.setattr(trackers, "refuse_missing", lambda names: None)
    return Remembering.made


def opened(tiny, tmp_path, *names: str, done: int = 0, warn: Any = None) -> Trackers:
    run, told = Run.open(tmp_path / "runs", "run"), Trackers()
    recipe = load_recipe(tiny, flags={"trackers": list(names)})
    told.start(recipe, run, run.stage("sft"), done, warn or (lambda text: pytest.fail(text)))
    return told


def test_nobody_is_told_unless_named(tiny, tmp_path, remembering):
    told = opened(tiny, tmp_path)
    told.log(1, {"step": 1, "loss": 2.0})
    told.finish()
    assert not remembering


def test_groups_are_flat_and_what_is_no_number_is_left_out(tiny, tmp_path, remembering):
    told = opened(tiny, tmp_path, "trackio")
    told.log(1, {"step": 1, "loss": 2.0, "eval": None, "kl_to_old": float("nan"), "seconds": {"update": 0.5}})
    told.finish()
    (one,) = remembering
    assert one.lines == {1: {"loss": 2.0, "seconds/update": 0.5}} and one.ended
    assert one.config["sft.lr"] == 1e-3


def test_who_goes_on_is_told_what_is_done_and_what_was_told(tiny, tmp_path, remembering):
    log = MetricsLog(Run.open(tmp_path / "runs", "run").stage("sft").metrics, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    opened(tiny, tmp_path, "trackio", done=2)
    assert remembering[0].begun == ("run", "sft", 2, 3)


def test_one_that_fails_later_is_warned_of_and_the_others_go_on(tiny, tmp_path, remembering, monkeypatch):
    class Away(Remembering):
        def log(self, step: int, numbers: Any) -> None:
            raise ConnectionError("no network")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Away)
    warnings: list[str] = []
    told = opened(tiny, tmp_path, "wandb", "trackio", warn=warnings.append)
    told.log(1, {"loss": 1.0})
    told.log(2, {"loss": 1.0})
    assert warnings == ["tracker wandb is told no more: ConnectionError: no network"]
    assert list(remembering[1].lines) == [1, 2]


def test_one_that_does_not_start_is_one_message_and_ends_the_others(tiny, tmp_path, remembering, monkeypatch):
    class Closed(Remembering):
        def start(self, *args: Any) -> None:
            raise RuntimeError("no key")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Closed)
    with pytest.raises(UsageError, match="wandb does not start: RuntimeError: no key"):
        opened(tiny, tmp_path, "trackio", "wandb")
    assert remembering[0].ended


@pytest.mark.parametrize("command", ["run", "sft", "rl"])
def test_one_that_is_not_installed_is_said_before_anything_is_loaded(tiny, tmp_path, monkeypatch, command):
    absent = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(trackers, "importlib", absent)
    args = [command, str(tiny), "--runs", str(tmp_path / "runs"), "--tracker", "wandb", "--tracker", "trackio"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2 and "pip install wandb trackio" in result.stderr
    assert not list((tmp_path / "runs").glob("*/*/stage.json"))


def test_another_name_is_refused_with_those_there_are(tiny):
    result = CliRunner().invoke(app, ["sft", str(tiny), "--tracker", "mlflow"])
    assert result.exit_code == 2 and "'trackio', 'wandb' or 'tensorboard'" in result.stderr


def tracked(tiny, monkeypatch, *names: str) -> Any:
    """An sft stage that died after step 2 and went on."""
    sets = f"trackers=[{', '.join(names)}]"
    with killed_after(monkeypatch, "sft", 2):
        run_stage(tiny, "sft", sets, name="cut")
    return run_stage(tiny, "sft", sets, name="cut")


def test_tensorboard_shows_every_step_once_over_a_stop_and_the_weights_are_the_same(tiny, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ctx = tracked(tiny, monkeypatch, "tensorboard")
    shown = EventAccumulator(str(ctx.run.stage("sft").path / "tensorboard"))
    shown.Reload()
    rows = read_log(ctx.run.stage("sft").metrics)
    points = [(point.step, point.value) for point in shown.Scalars("loss")]
    assert points == [(row["step"], pytest.approx(row["loss"])) for row in rows] and len(rows) == 4
    assert "seconds/update" in shown.Tags()["scalars"]
    assert b"sft.lr: 0.001" in shown.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    assert same(trained(ctx, "sft"), trained(run_stage(tiny, "sft", name="whole"), "sft"))


def test_tensorboard_named_as_a_stage_goes_on_has_the_recipe_too(tiny, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with killed_after(monkeypatch, "sft", 2):
        run_stage(tiny, "sft", name="cut")
    ctx = run_stage(tiny, "sft", "trackers=[tensorboard]", name="cut")
    shown = EventAccumulator(str(ctx.run.stage("sft").path / "tensorboard"))
    shown.Reload()
    assert b"sft.lr: 0.001" in shown.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    assert [point.step for point in shown.Scalars("loss")][-1] == 4


def test_trackios_local_store_has_every_step_once_over_a_stop(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read as it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    ctx = tracked(tiny, monkeypatch, "trackio")
    (name,) = {run["name"] if isinstance(run, dict) else run for run in SQLiteStorage.get_runs("lco-lite")}
    logs = SQLiteStorage.get_logs("lco-lite", name)
    rows = read_log(ctx.run.stage("sft").metrics)
    assert name == "cut/sft" and [log["step"] for log in logs] == [1, 2, 3, 4]
    assert [log["loss"] for log in logs] == pytest.approx([row["loss"] for row in rows])
    assert SQLiteStorage.get_run_config("lco-lite", name)["sft.lr"] == 1e-3


@pytest.mark.slow
def test_wandb_offline_writes_into_the_run_under_one_id(tiny, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ctx = tracked(tiny, monkeypatch, "wandb")
    made = glob.glob(str(ctx.run.path / "wandb" / "offline-run-*" / "*.wandb"))
    assert len(made) == 2 and len({path.rpartition("run-")[2] for path in made}) == 1
