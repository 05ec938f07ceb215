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
from lco_lite.objectives.head import Head
from lco_lite.objectives.policy_gradient import POLICY_GRADIENTS, Clip, PolicyBatch
from lco_lite.objectives.reference import optimal_logits
from lco_lite.objectives.targets import DenseTarget
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
    (command,) = [c for c in COMMANDS if "sapo.py:sapo" in c]
    assert len(FILES["sapo.py"].splitlines()) <= 40
    call(*command, "-s", "rl.prompts_per_step=4", "-s", "rl.minibatch=8")
    rows = read_log(Run.newest(Path("runs")).stage("rl-sapo").metrics)
    assert len(rows) == 2 and all(row["grad_norm"] is not None and "clipped" in row for row in rows)
    call("eval", "arithmetic", "--policy", "rl-sapo")


def test_the_loss_over_the_vocabulary_of_the_page_trains_a_policy(folder):
    (command,) = [c for c in COMMANDS if "reverse.py:reverse" in c]
    call(*command)
    stage = Run.newest(Path("runs")).stage("rl-reverse")
    rows = read_log(stage.metrics)
    assert len(rows) == 2 and all(row["loss"] >= 0 and row["entropy"] > 0 for row in rows)
    assert stage.is_done()


def test_the_loss_of_the_page_is_the_reverse_divergence_from_the_target(folder):
    torch.manual_seed(0)
    weight, old, shift = torch.randn(11, 4).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    hidden = torch.randn(3, 4).double().requires_grad_()
    batch = PolicyBatch(None, None, torch.zeros(3), torch.zeros(3, dtype=torch.long), 3, 1)
    loss, _ = load_function("reverse.py:reverse")(hidden, Head(weight), DenseTarget(old, 2.0, shift), batch)
    log_p = (hidden @ weight.T).log_softmax(-1)
    log_target = optimal_logits(old @ weight.T, shift @ weight.T, 2.0).log_softmax(-1)
    torch.testing.assert_close(loss, (log_p.exp() * (log_p - log_target)).sum(-1).mean())


def test_the_target_of_the_page_halves_the_advice_in_right_responses_and_trains_a_policy(folder):
    (command,) = [c for c in COMMANDS if "rl.target=heed.py:heed" in c]
    call(*command)
    assert len(read_log(Run.newest(Path("runs")).stage("rl-lch").metrics)) == 2
    target, places = DenseTarget(torch.randn(2, 4), 1.0, torch.ones(2, 4)), torch.zeros(2, dtype=torch.long)
    right_and_wrong, settings = torch.tensor([1.0, -1.0]), {"right": 0.5}
    batch = PolicyBatch(None, None, torch.zeros(2), places, 2, 1, rewards=right_and_wrong, settings=settings)
    changed = load_function("heed.py:heed")(target, Head(torch.randn(5, 4)), batch)
    assert changed.shift.tolist() == [[0.5] * 4, [1.0] * 4]


GIVEN = """
def told(batch, clip):
    assert batch.settings == {"share": 0.5}
    for name in ("old_logprobs", "reference_logprobs", "reward_model_logprobs", "rewards"):
        assert getattr(batch, name).shape == batch.logprobs.shape, name
    assert (batch.groups == batch.responses // 2).all() and batch.actions.dtype == batch.rows.dtype
    together = [set(batch.responses[batch.groups == g].tolist()) for g in batch.groups.unique()]
    assert all(len(responses) == 2 for responses in together), "a group is whole in a micro-batch"
    return -(batch.settings["share"] * batch.logprobs * batch.advantages).sum() / batch.tokens, {}
"""


def test_an_objective_of_the_users_is_told_what_ours_are(folder):
    Path("told.py").write_text(GIVEN)
    sets = ["rl.settings={share: 0.5}", "rl.whole_groups=true", "rl.responses_per_prompt=2", "rl.micro_batch_tokens=40"]
    call("rl", "--objective", "told.py:told", "--feedback", "dpo_sampled", *(w for s in sets for w in ("-s", s)))
    assert len(read_log(Run.newest(Path("runs")).stage("rl-told").metrics)) == 2


def test_a_policy_gradient_of_the_users_refuses_dense_feedback_before_anything_is_trained(folder):
    result = CliRunner().invoke(app, ["rl", "--objective", "sapo.py:sapo", "--feedback", "dpo"])
    assert result.exit_code == 2 and "first parameter" in result.stderr
    assert not Run.newest(Path("runs")).stage("rm").path.exists()


def test_the_reward_of_the_page_is_what_the_run_is_rewarded_with(folder):
    (command,) = [c for c in COMMANDS if "function" in c]
    call(*command, "-s", "rl.prompts_per_step=4")
    rows = read_log(Run.newest(Path("runs")).stage("rl-grpo").metrics)
    assert all(-1 < row["reward"] <= 0 for row in rows)


def test_on_policy_the_objective_of_the_page_has_the_gradient_of_reinforce(folder):
    logprobs = (-torch.rand(6)).requires_grad_()
    batch = PolicyBatch(logprobs, logprobs.detach(), torch.randn(6), torch.tensor([0, 0, 0, 1, 1, 1]), 6, 2)
    losses = load_function("sapo.py:sapo"), POLICY_GRADIENTS["reinforce"]
    ours, plain = (torch.autograd.grad(loss(batch, Clip(0.2, 0.2))[0], logprobs)[0] for loss in losses)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("objective", "message"),
    [("absent.py:f", "no such file"), ("sapo.py:f", "has no function"), ("sapo.txt:f", "unknown objective")],
)
def test_a_file_or_name_that_is_not_there_is_said_in_one_message(folder, objective, message):
    result = CliRunner().invoke(app, ["rl", "--objective", objective])
    assert result.exit_code == 2 and message in result.stderr
