"""Every command of the README is run: with a small model and few steps, but by the same words."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.models.loading import build_scratch
from lco_lite.recipe.file import find_recipe, flat, load_recipe
from lco_lite.recipe.sections import Init
from lco_lite.run import Run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S) if not kind]
LINES = [line.partition(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [shlex.split(line.rpartition("&& ")[2]) for line in LINES if "lco-lite " in line]
OWN = (ROOT / "docs/your-own.md").read_text(encoding="utf-8")
FEW = ["sft.max_steps=2", "train_rm.prompts=8", "train_rm.max_steps=2", "train_rm.check_items=4", "rl.steps=1"]
FEW += ["rl.prompts_per_step=8", "rl.eval_items=4", "eval.items=4", "rl.max_new_tokens=8", "eval.max_new_tokens=8"]
SMALL = ["model.quantization=none", "model.lora={r: 2}", "model.gradient_checkpointing=false", "reward_model=self"]


def call(words: list[str], runs: Path, *sets: str) -> None:
    assert words[0] == "lco-lite"
    flags = [flag for item in sets for flag in ("--set", item)]
    result = CliRunner().invoke(app, [*words[1:], "--runs", str(runs), *flags])
    assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}"


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of made-up problems in MATH's schema, where the tasks look for local data."""
    row = {
        "problem": "What is $1+1$?",
        "solution": r"It is $\boxed{2}$.",
        "answer": "2",
        "level": "Level 1",
        "type": "Algebra",
    }
    for name, n in (("math500_test", 6), ("math_train", 40), ("math_test_minus_math500", 10)):
        rows = [
            row | {"problem": f"What is ${i}+1$?", "solution": rf"It is $\boxed{{{i + 1}}}$.", "answer": str(i + 1)}
            for i in range(n)
        ]
        rows = [r | {"unique_id": f"{name}/{i}", "subject": "Algebra"} for i, r in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setenv("LCO_LITE_DATA", str(tmp_path))
    return tmp_path


def test_the_two_set_up_commands_are_there_and_go_through_the_constraints_file():
    assert "pip install -c constraints.txt -e . && lco-lite run recipes/quickstart.yaml" in LINES
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in LINES


def test_the_quickstart_command_goes_through_every_stage_and_shows_a_score_after_each(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = [c for c in COMMANDS if c[1:] == ["run", "recipes/quickstart.yaml"]]
    call(command, tmp_path, *FEW, "model.init.layers=1", "train_rm.demonstrations_as_chosen=true")
    scores = sorted(p.name for p in (tmp_path / "quickstart" / "eval").glob("*.json"))
    assert scores == ["arithmetic--rl-kld.json", "arithmetic--rm.json", "arithmetic--sft.json"]


def test_sft_rl_and_eval_are_one_story_on_a_local_model_folder(tmp_path, problems, monkeypatch):
    monkeypatch.chdir(ROOT)
    build_scratch(Init(hidden_size=32, layers=1, heads=2, max_length=640), tmp_path / "model", seed=0)
    sft, rl, evaluate = [c for c in COMMANDS if c[1] in ("sft", "rl") or c[1:] == ["eval", "math500"]]
    sizes = [
        "sft.examples=20",
        "sft.batch_size=4",
        "rl.max_length=600",
        "sft.max_length=600",
        "train_rm.max_length=600",
    ]
    more = ["train_rm.demonstrations_as_chosen=true", "train_rm.batch_size=4", "rl.minibatch=4"]
    call(sft, tmp_path / "runs", f"model.path={tmp_path / 'model'}", *SMALL, *FEW, *sizes, *more)
    call(rl, tmp_path / "runs")
    call(evaluate, tmp_path / "runs")
    run = Run.newest(tmp_path / "runs")
    assert run.name == "math"
    assert run.stage("rl-lch").is_done()
    assert json.loads(run.eval_path("math500", "rl-lch").read_text())["seeds"] == 4


def test_every_command_of_the_readme_is_covered_here():
    """Those on one's own prompts are the commands of docs/your-own.md, which tests/test_your_own.py runs."""
    own = [line for block in BLOCKS if "init" in block for line in block.strip().splitlines()]
    assert len(own) == 7 and "\n".join(own) in OWN
    others = [
        c for c in COMMANDS if shlex.join(c) not in {shlex.join(shlex.split(line, comments=True)) for line in own}
    ]
    assert [c[1] for c in others] == ["run", "sft", "rl", "eval"]


def test_the_rows_and_the_reward_of_the_readme_are_those_of_the_page_that_is_run():
    (rows,), (reward,) = (re.findall(rf"^```{kind}\n(.*?)^```", README, re.M | re.S) for kind in ("json", "python"))
    things = re.findall(r'things \+?= "(.*)"', OWN)
    made = [{"prompt": f"What is {thing}, in one sentence?"} for thing in "".join(things).split()]
    assert all(json.loads(line) in made for line in rows.splitlines())
    assert reward.partition("\n")[2] and reward.partition("\n")[2] in OWN


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_what_the_page_for_people_from_trl_names_is_there():
    page = (ROOT / "docs/from-trl.md").read_text(encoding="utf-8")
    fields = flat(load_recipe(find_recipe("quickstart")).model_dump())
    known = {".".join(key.split(".")[:n]) for key in fields for n in (1, 2)}
    named = re.findall(r"`((?:rl|model|rollout)\.\w+)`", page)
    assert len(named) > 20 and set(named) <= known
    for line in re.findall(r"^lco-lite \w+.*?(?=\s+#|$)", page, re.M):
        name, *words = shlex.split(line)[1:]
        get_command(app).commands[name].make_context(name, words, resilient_parsing=True)
