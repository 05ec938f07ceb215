import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lco_lite.checkpoint import save_checkpoint
from lco_lite.errors import DataError, UsageError
from lco_lite.files import JsonLines, write_json
from lco_lite.recipe import Recipe
from lco_lite.run import Run, stage_settings

ROOT = Path(__file__).parent.parent


def recipe(**changes) -> Recipe:
    return Recipe.model_validate({"model": {"init": {}}, "task": "arithmetic", **changes})


def started(run: Run, stage: str, upstream: dict[str, str] | None = None):
    folder = run.stage(stage)
    folder.begin(stage_settings(recipe(), stage), upstream or {})
    return folder


def under_way(run: Run, stage: str, *steps: int, **given: dict[str, str]):
    """A stage that has these checkpoints, as far as their names go."""
    folder = started(run, stage, **given)
    for step in steps or (1,):
        write_json(folder.checkpoints / f"step-{step:08d}" / "state.json", {})
    return folder


def finished(run: Run, *stages: str) -> None:
    """These, each built on those of sft and rm that stand before it."""
    for i, stage in enumerate(stages):
        upstream = {name: run.stage(name).id() for name in stages[:i] if name in ("sft", "rm")}
        write_json(started(run, stage, upstream).adapter / "adapter_config.json", {})
        run.stage(stage).finish({})
        write_json(run.eval_path("math500", stage), {})
        write_json(run.eval_path("math500", stage).with_suffix(".jsonl"), {})


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.open(tmp_path / "runs", "math")


# --- what a stage made is what is opened


def made(run: Run) -> Path:
    stage = started(run, "sft")
    (stage.path / "adapter").mkdir()
    (stage.path / "adapter" / "weights").write_bytes(b"0123")
    (stage.path / "adapter" / "README.md").write_text("of the user's")
    (stage.path / "checkpoints").mkdir()
    (stage.path / "checkpoints" / "x").write_text("goes")
    stage.finish({})
    stage.verify("adapter")
    return stage.path


def test_a_file_that_a_stage_made_and_that_changed_is_named_with_both_sums_and_the_remedy(run):
    path = made(run)
    (path / "checkpoints" / "x").unlink()
    (path / "adapter" / "README.md").write_text("rewritten")
    run.stage("sft").verify("adapter", "checkpoints")
    (path / "adapter" / "weights").write_bytes(b"0124")
    os.utime(path / "adapter" / "weights", (1, 1))  # a clock may be coarser than a test is long
    sums = [hashlib.sha256(content).hexdigest()[:12] for content in (b"0124", b"0123")]
    with pytest.raises(DataError, match=f"adapter/weights: has changed .*{sums[0]}…, it was {sums[1]}.*sft .*--fresh"):
        run.stage("sft").verify("adapter")
    (path / "adapter" / "weights").unlink()
    with pytest.raises(DataError, match="adapter/weights: is missing"):
        run.stage("sft").verify("adapter")


def test_what_a_stage_that_is_done_was_started_with_is_as_it_was(run):
    file = made(run) / "stage.json"
    begun = json.loads(file.read_text())
    assert run.stage("sft").settings() == begun["settings"]
    write_json(file, begun | {"started": begun["started"].replace("2", "3")})
    for read in (run.stage("sft").settings, run.stage("sft").upstream):
        with pytest.raises(DataError, match=r"stage\.json: has changed since .* Put it back .* `lco-lite sft --fresh`"):
            read()


def test_a_stage_of_an_earlier_version_has_no_sums_and_opens(run):
    path = made(run)
    done = json.loads((path / "done.json").read_text())
    assert set(done.pop("files")) >= {"adapter/weights", "stage.json"}
    write_json(path / "done.json", done)
    (path / "adapter" / "weights").write_bytes(b"")
    run.stage("sft").verify("adapter")


def test_a_large_file_that_has_not_changed_is_read_once(run, monkeypatch):
    path, read = made(run), []
    monkeypatch.setattr("lco_lite.files.sha256", lambda file: read.append(file))
    run.stage("sft").verify("adapter")
    assert not read
    os.utime(path / "adapter" / "weights", (1, 1))
    with pytest.raises((DataError, TypeError)):
        run.stage("sft").verify("adapter")
    assert read == [path / "adapter" / "weights"]


# --- the folder


def test_opening_makes_the_folder_and_opening_again_finds_it(tmp_path):
    run = Run.open(tmp_path / "runs", "math")
    (run.path / "x").write_text("kept")
    again = Run.open(tmp_path / "runs", "math")
    assert again.path == tmp_path / "runs" / "math" and again.name == "math"
    assert (again.path / "x").read_text() == "kept"


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "-x", "x" * 300])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(UsageError):
        Run.open(tmp_path, name)


def test_a_file_in_the_place_of_the_run_or_of_its_root_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        Run.open(tmp_path, "file")
    with pytest.raises(UsageError, match="cannot write"):
        Run.open(tmp_path / "file", "run")


def test_the_newest_run_is_the_one_used_last(tmp_path):
    older, newer = Run.open(tmp_path, "a"), Run.open(tmp_path, "b")
    for run in (older, newer):
        with run.lock():
            run.write_recipe(recipe())
    Run.open(tmp_path, "c-without-recipe")
    times = [(older, 1000), (newer, 2000)]
    for run, time in times:
        os.utime(run.path / ".lock", (time, time))
    assert Run.newest(tmp_path) == newer
    with older.lock():
        pass
    assert Run.newest(tmp_path) == older


def test_a_run_that_ends_after_another_began_is_the_newer_one(tmp_path):
    long, short = Run.open(tmp_path, "long"), Run.open(tmp_path, "short")
    with long.lock():
        long.write_recipe(recipe())
        with short.lock():
            short.write_recipe(recipe())
        for run in (long, short):
            os.utime(run.path / ".lock", (1000, 1000))
    assert Run.newest(tmp_path) == long


def test_without_a_run_the_message_says_what_to_type(tmp_path):
    with pytest.raises(UsageError) as caught:
        Run.newest(tmp_path / "runs")
    assert caught.value.exit_code == 2
    assert "no run under" in str(caught.value)
    assert "`lco-lite run recipes/quickstart.yaml` or `lco-lite sft RECIPE`" in str(caught.value)


# --- the lock


def test_a_second_process_on_a_run_is_told_which_process_has_it(run):
    code = (
        "import sys; from pathlib import Path; from lco_lite.run import Run\n"
        "with Run(Path(sys.argv[1])).lock():\n    print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=rf"in use by process {holder.pid}\b"), run.lock():
            pass
    finally:
        holder.kill()
        holder.communicate(timeout=30)
    with run.lock():  # a killed holder leaves no lock behind
        assert (run.path / ".lock").read_text().strip() == str(os.getpid())


def test_two_locks_in_one_process_exclude_each_other_too(run):
    with run.lock(), pytest.raises(UsageError, match=str(os.getpid())), run.lock():
        pass


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_told(run, monkeypatch, code):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(UsageError, match=r"this file system has no locks.*--runs DIR"), run.lock():
            pass
    with run.lock():  # what was tried leaves nothing behind
        pass


def test_the_lock_cleans_up_after_killed_writers(run):
    left = run.path / "sft" / ".adapter.0123456789ab.new"
    left.mkdir(parents=True)
    with run.lock():
        assert not left.exists()


# --- recipe and environment


def test_the_recipe_comes_back_as_it_was_written(run):
    written = recipe(name="1e5", rl={"beta": 0.5, "lr": 1e-5})
    run.write_recipe(written)
    assert run.recipe() == written


def test_a_missing_or_damaged_recipe_is_said_in_words(run):
    with pytest.raises(UsageError, match="has no recipe.yaml"):
        run.recipe()
    (run.path / "recipe.yaml").write_text("name: [")
    with pytest.raises(UsageError, match="damaged") as caught:
        run.recipe()
    assert str(run.path / "recipe.yaml") in str(caught.value)


@pytest.mark.parametrize("damage", ["half", "last line", "digit", "twice", "header"])
def test_a_recipe_that_has_changed_or_lost_a_part_is_not_gone_by(run, damage):
    file = run.path / "recipe.yaml"
    run.write_recipe(recipe(rl={"beta": 0.5}))
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    half = next(i for i in range(len(lines) // 2, len(lines)) if not lines[i].startswith(" "))  # valid by itself
    changed = {
        "half": "".join(lines[:half]),
        "last line": "".join(lines[:-1]),
        "digit": whole.replace("beta: 0.5", "beta: 1.5"),
        "twice": whole + whole,
        "header": "".join(lines[1:]).replace("beta: 0.5", "beta: 1.5"),
    }
    file.write_text(changed[damage])
    assert changed[damage] != whole and isinstance(yaml.safe_load("".join(lines[:half])), dict)
    with pytest.raises(UsageError, match="has changed since the run wrote it") as caught:
        run.recipe()
    assert str(file) in str(caught.value)
    file.write_text("".join(lines[1:-1]))  # as earlier versions wrote it
    assert run.recipe() == recipe(rl={"beta": 0.5})


def test_the_environment_names_versions_device_and_commit(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    run.write_recipe(recipe())
    written = json.loads((run.path / "environment.json").read_text())
    assert written["packages"]["torch"].startswith("2.")
    assert written["device"]["kind"] in ("cpu", "cuda")
    assert written["python"].count(".") == 2
    if (ROOT / ".git").exists():
        assert len(written["git"]["commit"]) == 40


def test_outside_a_repository_there_is_no_commit(run, monkeypatch):
    monkeypatch.chdir(run.path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(run.path.parent))
    run.write_recipe(recipe())
    assert json.loads((run.path / "environment.json").read_text())["git"] is None


# --- stages


def test_a_stage_goes_on_with_the_same_settings(run):
    stage = started(run, "sft")
    assert not stage.is_done()
    before = (stage.path / "stage.json").read_text()
    started(run, "sft")
    assert (stage.path / "stage.json").read_text() == before


def test_changed_settings_are_refused_each_with_old_and_new_value(run):
    under_way(run, "rl-kld")
    changed = recipe(rl={"beta": 0.5, "schedule": "cosine"}, seed=3)
    with pytest.raises(UsageError) as caught:
        run.stage("rl-kld").begin(stage_settings(changed, "rl-kld"), {})
    message = str(caught.value)
    for line in ("rl.beta: 1.0 → 0.5", "rl.schedule: constant → cosine", "seed: 0 → 3"):
        assert f"  {line}\n" in message
    assert message.count("→") == 4  # the three, and the legend
    assert "--fresh" in message and "--name" in message


def with_leftovers(stage) -> list[dict]:
    for step in (2, 3, 4):
        JsonLines(stage.path / "rollouts" / f"step-{step:06d}.jsonl").append({"judged": 0})
    (stage.path / "rollouts" / "step-000009 (copy).jsonl").write_text("of the user's")
    skipped = JsonLines(stage.path / "skipped.jsonl")
    lines = [{"step": step, "update": 4 * step, "left_out": True} for step in (1, 2, 3)]
    for line in lines:
        skipped.append(line)
    write_json(stage.best / "best.json", {"step": 3, "score": 0.5, "items": 8})
    return lines


def left(stage) -> set[int]:
    return {int(file.stem[5:]) for file in (stage.path / "rollouts").iterdir() if file.stem[5:].isdigit()}


COSINE = stage_settings(recipe(), "rl-kld") | {"rl.schedule": "cosine"}


@pytest.mark.parametrize("steps", [2, 6])
def test_of_a_course_of_another_length_nothing_after_the_last_checkpoint_is_taken_over(run, steps):
    stage = run.stage("rl-kld")
    stage.begin(COSINE, {})
    for step in (1, 2):
        write_json(stage.checkpoints / f"step-{step:08d}" / "state.json", {})
    lines = with_leftovers(stage)
    assert not stage.begin(COSINE, {}), "the same course: all of it stays"
    assert stage.best_step() and left(stage) == {2, 3, 4}
    assert stage.begin({**COSINE, "rl.steps": steps}, {})
    assert left(stage) == {2, 3}
    assert JsonLines(stage.path / "skipped.jsonl").rows == lines[:2] and stage.best_step() is None
    write_json(stage.best / "best.json", {"step": 2, "score": 0.5, "items": 8})
    assert stage.begin({**COSINE, "rl.steps": 9}, {}) and stage.best_step()["step"] == 2


@pytest.mark.parametrize(("steps", "stays"), [(2, 2), (6, 3)])
def test_at_a_constant_rate_a_longer_course_is_the_same_and_a_shorter_one_up_to_its_end(run, steps, stays):
    stage = under_way(run, "rl-kld", 1, 2)
    lines = with_leftovers(stage)
    assert stage.begin({**stage_settings(recipe(), "rl-kld"), "rl.steps": steps}, {})
    assert JsonLines(stage.path / "skipped.jsonl").rows == lines[:stays]
    assert left(stage) == ({2, 3, 4} if steps == 6 else {2, 3}) and (stage.best_step() is None) == (steps == 2)


def test_where_the_newest_checkpoint_is_damaged_another_course_goes_back_to_the_one_before(run):
    stage = run.stage("rl-kld")
    stage.begin(COSINE, {})
    for step in (1, 3):
        save_checkpoint(stage.checkpoints, step, {"weight": torch.zeros(2)}, None, {})
    with_leftovers(stage)
    (stage.checkpoints / "step-00000003" / "state.json").write_text("{")
    assert stage.begin({**COSINE, "rl.steps": 9}, {})
    assert left(stage) == {2} and stage.best_step() is None


def test_an_upstream_stage_that_was_trained_again_is_refused(run):
    finished(run, "sft")
    old = run.stage("sft").id()
    under_way(run, "rm", upstream={"sft": old})
    finished(run, "sft")
    assert run.stage("sft").id() != old
    with pytest.raises(UsageError, match="sft was trained again since"):
        started(run, "rm", {"sft": run.stage("sft").id()})
    with pytest.raises(UsageError, match="sft is no longer used"):
        started(run, "rm", {})


def test_a_finished_stage_keeps_its_result_and_time(run):
    stage = started(run, "sft")
    write_json(stage.adapter / "adapter_config.json", {})
    stage.finish({"loss": 0.5, "by": {"a": [1]}})
    assert stage.is_done()
    made = json.loads((stage.path / "done.json").read_text())
    assert made["result"] == {"loss": 0.5, "by": {"a": [1]}} and made["seconds"] >= 0
    assert made["id"] == run.stage("sft").id()


def test_a_stage_that_is_not_done_has_no_id(run):
    with pytest.raises(UsageError, match="not done"):
        started(run, "sft").id()


def test_a_damaged_stage_file_is_named(run):
    stage = started(run, "sft")
    (stage.path / "stage.json").write_text("{")
    with pytest.raises(UsageError, match=r"stage\.json: damaged: .*--fresh"):
        started(run, "sft")


@pytest.mark.parametrize(
    ("fresh", "left"),
    [("sft", []), ("rm", ["sft"]), ("rl-kld", ["sft", "rm", "rl-mse"]), ("rl-mse", ["sft", "rm", "rl-kld"])],
)
def test_starting_a_stage_again_discards_it_with_what_was_built_on_it_and_their_scores(run, fresh, left):
    finished(run, "sft", "rm", "rl-kld", "rl-mse")
    write_json(run.eval_path("math500", "base"), {})
    run.discard_from(fresh)
    assert [s.name for s in run.stages()] == left
    assert sorted(p.name for p in (run.path / "eval").glob("*.json")) == sorted(
        f"math500--{stage}.json" for stage in ["base", *left]
    )
    assert len(list((run.path / "eval").glob("*.jsonl"))) == len(left)


def test_a_stage_that_does_not_rest_on_what_starts_again_stays_with_its_scores(run):
    finished(run, "sft", "rl-grpo")
    finished(run, "rm")
    write_json(started(run, "rl-kld", {"sft": "a", "rm": "b"}).adapter / "adapter_config.json", {})
    write_json(run.eval_path("math500", "optimal"), {})
    assert run.discard_from("rm") == ["rm", "rl-kld"]
    assert [s.name for s in run.stages()] == ["sft", "rl-grpo"]
    assert {p.name for p in (run.path / "eval").glob("*.json")} == {"math500--sft.json", "math500--rl-grpo.json"}
    (run.path / "rl-grpo" / "stage.json").write_text("{")
    assert run.discard_from("sft") == ["sft", "rl-grpo"]


def test_a_base_stays_that_another_stage_is_on(run):
    finished(run, "rl-grpo")
    started(run, "sft")
    write_json(run.path / "base" / "config.json", {})
    assert run.discard_from("sft") == ["sft"] and (run.path / "base").exists()


def test_bases_made_into_the_run_go_with_the_first_stage_that_reads_them(run):
    for name in ("base", "base-rm"):
        write_json(run.path / name / "config.json", {})
    run.discard_from("rl-kld")
    assert (run.path / "base").exists() and (run.path / "base-rm").exists()
    run.discard_from("rm")
    assert (run.path / "base").exists() and not (run.path / "base-rm").exists()
    run.discard_from("sft")
    assert not (run.path / "base").exists()


def test_stages_come_in_the_order_they_build_on_each_other(run):
    for name in ("rl-mse", "rm", "rl-kld", "sft"):
        started(run, name)
    assert [s.name for s in run.stages()] == ["sft", "rm", "rl-kld", "rl-mse"]
