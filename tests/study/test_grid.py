"""A grid on the smallest recipe: worked off, stopped, gone on with, read again; and its page."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import xml.etree.ElementTree
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.console import Console
from lco_lite.errors import Interrupted, LcoError
from lco_lite.grading.string import grade_string
from lco_lite.study import work
from lco_lite.study.base import Cell, Claim, Findings, Plot, Study, Table
from lco_lite.study.figures import band
from lco_lite.study.grid import Grid, Worker
from lco_lite.study.page import known_rows, write
from tests.conftest import TINY
from tests.train.test_chain import start


class Small(Study):
    name, asks, usual = "small", "Does it go?", ()

    def cells(self, recipe, seeds, done):
        return [Cell(name, seed, {"rl.objective": name}) for seed in seeds for name in ("kld", "reinforce")]

    def report(self, results):
        scores = [[label, len(results.by_seed(label))] for label in results.labels()]
        plot = Plot("curves", "<curves>", lambda figure: band(figure.subplots(), "<x>", [0, 1], [[0, 1], [1, 2]]))
        claims = [Claim("C", "It goes.", "none.", "unclear", "n = 1."), Claim("D", "No.", "-", "not reproduced", "-")]
        return Findings(claims, [Table("scores", "Scores", ["method", "n"], scores)], [plot], ["A note."])


def quiet():
    return Console(quiet=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A recipe and a folder of runs that tests share, and with it a start."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return folder


@pytest.mark.slow
def test_a_grid_is_worked_off_once_and_goes_on_where_it_was_stopped(shared, tmp_path):
    tiny, runs = shared / "tiny.yaml", shared
    grid = Grid(Small(), str(tiny), [], runs, quiet())

    def interrupt():
        while not list(runs.glob("studies/tiny/*/work.log")):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted, match="the same command goes on"):
        grid.work_off([1], at_once=2)
    results = grid.work_off([1], at_once=2)
    assert results.labels() == ["kld", "reinforce"]
    kld = results.of("kld")[0]
    assert kld["samples"] == 16 and len(kld["steps"]) == 2 and kld["updates"]["step"] == [1.0] * 4 + [2.0] * 4
    assert kld["before"]["n"] == 8 and 0 <= kld["after"]["mean"] <= 1
    starts = sorted(runs.glob("studies/tiny/start-*"))
    assert len(starts) == 1  # shared, and trained once
    cell = next(runs.glob("studies/tiny/rl-kld-*"))
    assert os.path.samefile(cell / "sft" / "done.json", starts[0] / "sft" / "done.json")
    assert not list(cell.glob("*/checkpoints"))

    folder = tmp_path / "page"
    write(grid.study, results, 2, "lco-lite study small", folder)
    page = (folder / "README.md").read_text()
    assert (
        page.index("| not reproduced | D |") < page.index("| unclear | C |")
        and "| kld | 1 |" in page
        and "A note." in page
    )
    assert (folder / "scores.csv").read_text().splitlines() == ["method,n", "kld,1", "reinforce,1"]
    assert xml.etree.ElementTree.parse(folder / "curves.svg") and (folder / "curves.png").stat().st_size > 1000
    before = (folder / "curves.svg").read_bytes()
    write(grid.study, results, 2, "lco-lite study small", folder)
    assert (folder / "curves.svg").read_bytes() == before

    elsewhere = Grid(Small(), str(tiny), [], tmp_path / "elsewhere", quiet(), known_rows(folder))
    again = elsewhere.work_off([1], at_once=2)
    assert [r["after"] for r in again.rows] == [r["after"] for r in results.rows]
    assert not (tmp_path / "elsewhere").exists()  # nothing ran
    other = Grid(Small(), str(tiny), ["rl.lr=1e-4"], tmp_path / "elsewhere", quiet(), known_rows(folder))
    assert not other.results(other.settled([1])).rows  # another rate is another cell


@pytest.mark.slow
def test_a_cell_that_fails_is_named_with_its_reason_and_the_others_are_done(tiny, tmp_path, capsys):
    class Wrong(Small):
        def cells(self, recipe, seeds, done):
            return [Cell("lost", 1, {"data.demonstrations": "nowhere.jsonl"})]

    grid = Grid(Wrong(), str(tiny), [], tmp_path, quiet())
    expected = r"1 of 1 cells failed(.|\n)*lost, seed 1: its start failed with exit status 2: error: .*nowhere"
    with pytest.raises(LcoError, match=expected):
        grid.work_off([1], at_once=1)


@pytest.mark.slow
def test_a_study_runs_from_a_recipe_to_its_page_and_the_second_time_from_what_is_there(shared):
    words = ["study", "convexity", str(shared / "tiny.yaml"), "--seeds", "1", "--runs", str(shared)]

    def typed(*more: str) -> str:
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == 0, result.output
        return result.output

    assert "The Hessian of kld is positive semidefinite" in typed()
    folder = shared / "studies" / "convexity"
    left = {path.name for path in folder.iterdir()}
    assert {"README.md", "study.json", "eigenvalues.csv", "spectra.svg", "spectra.png"} <= left
    told = json.loads((folder / "study.json").read_text())
    assert told["cells"] == told["done"] == 1 and told["command"].startswith("lco-lite study convexity")
    again = json.loads(next(line for line in typed("--json").splitlines() if line.startswith("{")))
    assert again["C5, kld"]["verdict"] == "unclear", "of one seed"


def test_a_damaged_row_is_named(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "kld-1.json").write_text('["id"]')
    with pytest.raises(LcoError, match=r"rows/kld-1\.json: damaged"):
        known_rows(tmp_path / "methods")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"id": "x", "label": "y"}'])
def test_a_damaged_row_of_a_cell_is_named(tiny, tmp_path, content):
    grid = Grid(Small(), str(tiny), [], tmp_path, quiet())
    job = grid.settled([1])[0]
    job.folder.mkdir(parents=True)
    job.row_file.write_bytes(content)
    with pytest.raises(LcoError, match=r"row\.json: damaged: (.|\n)*Delete it"):
        grid.settled([1])


def test_a_row_of_another_cell_is_not_taken_for_its_own(tiny, tmp_path):
    grid = Grid(Small(), str(tiny), [], tmp_path, quiet())
    one, other = grid.settled([1])[:2]
    one.folder.mkdir(parents=True)
    row = {"id": other.folder.name, "label": "kld", "seed": 1, "version": "0.5.0", "seconds": 1.0}
    one.row_file.write_text(json.dumps(row))
    with pytest.raises(LcoError, match=rf"row\.json: is that of {other.folder.name}, not of {one.folder.name}. Delete"):
        grid.settled([1])
    one.row_file.write_text(json.dumps(row | {"id": one.folder.name}))
    assert grid.row(one)["label"] == one.cell.label


@pytest.mark.slow
def test_a_recipe_that_changes_while_its_study_runs_is_refused_by_each_cell(tiny, tmp_path, capsys):
    grid = Grid(Small(), str(tiny), [], tmp_path, quiet())
    tiny.write_text(yaml.safe_dump(TINY | {"sft": {**TINY["sft"], "max_steps": 1}}))
    with pytest.raises(LcoError, match="its start failed"):
        grid.work_off([1], at_once=1)
    (log,) = tmp_path.glob("studies/tiny/start-*/work.log")
    assert "tiny.yaml: has changed since the study began" in log.read_text()


def test_a_file_that_a_setting_names_makes_another_cell_when_it_changes(tiny, tmp_path):
    def names():
        return [job.folder.name for job in Grid(Small(), str(tiny), sets, tmp_path, quiet()).settled([1])]

    rewards, prompts, grader = tmp_path / "rewards.py", tmp_path / "prompts.jsonl", tmp_path / "grader.py"
    tasks = tmp_path / "tasks.py"
    sets = [f"data.prompts={prompts}", f"rl.reward_function={rewards}:short", "rl.feedback=function"]
    sets += [f"eval.grader={grader}:right", f"eval.tasks=[arithmetic, custom:{tasks}:right]"]
    grader.write_text("def right(response, item):\n    return True\n")
    tasks.write_text(grader.read_text())
    rewards.write_text("def short(completions, **columns):\n    return [-len(c) for c in completions]\n")
    prompts.write_text('{"prompt": "a"}\n')
    found = [names(), names()]
    for file in (prompts, rewards, grader, tasks):
        file.write_text(file.read_text() + "\n")
        found.append(names())
    assert found[0] == found[1] and len({name for one in found[1:] for name in one}) == 5 * len(found[0])


def test_a_place_for_the_page_that_cannot_be_is_told_before_the_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Grid, "work_off", lambda *_: pytest.fail("hours of work"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "in", "/proc/none"):
        words = ["study", "convexity", str(tiny), "--seeds", "1", "--runs", str(tmp_path), "--out", str(place)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2 and str(place) in result.output and "Traceback" not in result.output


def test_an_unfinished_page_says_how_much_of_it_is_there(tmp_path):
    from lco_lite.study.base import Results

    write(Small(), Results(), 12, "lco-lite study small", tmp_path)
    assert "0 of 12 cells" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "study.json").read_text())["done"] == 0


def test_a_cell_is_scored_by_the_grader_that_the_recipe_names(tiny, monkeypatch):
    monkeypatch.setattr(work, "evaluate_stage", lambda ctx, task, stage: {"settings": {}, "grader": task.grader})
    with start(tiny, "eval.grader=string") as ctx:
        assert work.scores(ctx, "sft") == {"arithmetic": {"grader": grade_string}}


def test_a_cell_that_fails_again_is_told_by_its_last_attempt(tmp_path):
    log = tmp_path / "work.log"
    log.write_text("error: No space left on device\n")
    worker = Worker.__new__(Worker)
    worker.job, worker.said_before = SimpleNamespace(folder=tmp_path), log.stat().st_size
    assert worker.why(-9).startswith("exit status -9:  (all of it")
    with log.open("a") as more:
        more.write("error: loss is not finite\n")
    assert "error: loss is not finite" in worker.why(4) and "No space" not in worker.why(4)
