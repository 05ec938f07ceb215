"""``lco-lite study`` as it is typed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.models.loading import build_scratch
from lco_lite.recipe.sections import Init
from lco_lite.study.grid import Grid
from lco_lite.study.verb import STUDIES

ROOT = Path(__file__).resolve().parents[2]


def typed(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["study", *words])
    assert result.exit_code == code, result.output
    return result.output


def test_without_a_name_every_study_is_listed_with_its_question():
    lines = typed().splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert all("?" in line for line in lines)


def test_a_mistyped_name_says_which_there_are():
    assert "did you mean methods?" in typed("method", code=2)


def test_a_recipe_without_another_task_is_no_recipe_for_forgetting(tiny):
    assert "eval.tasks" in typed("forgetting", str(tiny), "--dry-run", code=2)


def test_a_dry_run_names_the_grid_and_trains_nothing(tmp_path):
    said = typed("methods", "--dry-run", "--seeds", "2", "--runs", str(tmp_path))
    assert "gkd, lr 0.003: seeds 0; 0 of 1 done" in said and "0 done" in said
    assert not (tmp_path / "studies").exists()


def test_only_some_of_its_runs_take_their_own_rates_alone(tmp_path):
    words = ["methods", "--dry-run", "--seeds", "2", "--runs", str(tmp_path)]
    labels = {line.partition(": seeds")[0] for line in typed(*words, "--only", "gkd, twice").splitlines()[:-1]}
    assert labels == {f"gkd, lr {rate}" for rate in ("0.003", "0.006", "0.012", "0.024")}
    assert "nothing is called mixed; there are: kld mixed; gkd" in typed(*words, "--only", "mixed", code=2)


def test_the_page_of_some_runs_tells_of_those_that_are_known_too(tmp_path):
    shutil.copytree(ROOT / "docs/studies/rows", tmp_path / "rows")
    typed("methods", "--only", "gkd", "--seeds", "3", "--out", str(tmp_path / "methods"), "--runs", str(tmp_path))
    page = (tmp_path / "methods" / "README.md").read_text()
    assert re.search(r"^\| gkd \|.*\| 3 \|", page, re.M) and re.search(r"^\| kld mixed \|.*\| 3 \|", page, re.M)
    assert not (tmp_path / "studies").exists(), "nothing had to run"


def test_a_recipe_without_a_task_and_one_without_a_stage_before_rl(tmp_path, tiny):
    build_scratch(Init(hidden_size=32, layers=1, heads=2, intermediate_size=64), tmp_path / "m", 0)
    sets = ["-s", "sft.enabled=false", "-s", "model.init=null", "-s", f"model.path={tmp_path / 'm'}"]
    said = typed("methods", str(tiny), *sets, "--only", "grpo", "--dry-run")
    assert "grpo, lr 0.0001: seeds 0; 0 of 1 done" in said
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    sets += ["-s", "task=null", "-s", f"data.prompts={rows}", "-s", "rl.feedback=function", "-s", "rl.objective=grpo"]
    said = typed("methods", str(tiny), *sets, "-s", "rl.reward_function=r.py:f", "--dry-run", code=2)
    assert "tiny.yaml: names no task" in " ".join(said.split())


def test_the_page_says_all_that_was_given_beside_a_recipe(tmp_path, monkeypatch):
    """What is usual for a study counts where no recipe is named, and is said where one is."""
    monkeypatch.setattr(Grid, "work_off", lambda *_: None)
    words = ["convexity", "quickstart", "-s", "eval.samples=8", "--seeds", "1"]
    typed(*words, "--out", str(tmp_path / "page"), "--runs", str(tmp_path))
    made = json.loads((tmp_path / "page" / "study.json").read_text())
    assert made["command"] == "lco-lite study convexity quickstart -s eval.samples=8 --seeds 1"
