"""docs/extending.md does what it says: its files are written, its commands are run, on a run that takes seconds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.metrics import read_log
from lco_lite.objectives.policy_gradient import POLICY_GRADIENTS, Clip, PolicyBatch
from lco_lite.run import Run
from lco_lite.user_code import load_function

TEXT = (Path(__file__).resolve().parent.parent / "docs/extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.S))
COMMANDS = [shlex.split(line) for line in re.findall(r"^    lco-lite (rl .*)$", TEXT, re.M)]


@pytest.fixture
def folder(tiny, monkeypatch):
    """A run with its warm-up, and the files of the page."""
    monkeypatch.chdir(tiny.parent)
    for name, body in FILES.items():
        Path(name).write_text(body)
    call("sft", str(tiny))
    return tiny.parent


def call(*words: str):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result


def test_the_objective_of_the_page_is_one_short_file_and_trains_a_policy(folder):
    (command,) = [c for c in COMMANDS if "cispo.py:cispo" in c]
    assert len(FILES["cispo.py"].splitlines()) <= 40
    call(*command, "-s", "rl.prompts_per_step=4", "-s", "rl.minibatch=8")
    rows = read_log(Run.newest(Path("runs")).stage("rl-cispo").metrics)
    assert len(rows) == 2 and all(row["grad_norm"] is not None and "clipped" in row for row in rows)
    call("eval", "arithmetic", "--policy", "rl-cispo")


def test_the_reward_of_the_page_is_what_the_run_is_rewarded_with(folder):
    (command,) = [c for c in COMMANDS if "function" in c]
    call(*command, "-s", "rl.prompts_per_step=4")
    rows = read_log(Run.newest(Path("runs")).stage("rl-grpo").metrics)
    assert all(-1 < row["reward"] <= 0 for row in rows)


def test_on_policy_the_objective_of_the_page_has_the_gradient_of_reinforce(folder):
    logprobs = (-torch.rand(6)).requires_grad_()
    batch = PolicyBatch(logprobs, logprobs.detach(), torch.randn(6), torch.tensor([0, 0, 0, 1, 1, 1]), 6, 2)
    losses = load_function("cispo.py:cispo"), POLICY_GRADIENTS["reinforce"]
    ours, plain = (torch.autograd.grad(loss(batch, Clip(0.2, 0.2))[0], logprobs)[0] for loss in losses)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("objective", "message"),
    [("absent.py:f", "no such file"), ("cispo.py:f", "has no function"), ("cispo.txt:f", "unknown objective")],
)
def test_a_file_or_name_that_is_not_there_is_said_in_one_message(folder, objective, message):
    result = CliRunner().invoke(app, ["rl", "--objective", objective])
    assert result.exit_code == 2 and message in result.stderr
