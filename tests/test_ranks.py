"""Several processes, over gloo: they do what one does, stop together, and one goes on with what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from lco_lite import ranks
from lco_lite.errors import UsageError
from lco_lite.files import JsonLines
from lco_lite.metrics import read_log
from lco_lite.models.loading import resolve_device
from lco_lite.sequences import micro_batches
from lco_lite.train.rl import Report
from lco_lite.train.training import StageTraining
from tests.conftest import TINY
from tests.ranks_program import gradients, loss_that_is_none, rows, scored
from tests.train.test_chain import Killed, killed_after, run_stage

# the likeliest token always, so that responses are the same whoever makes them
GREEDY = ("train_rm.top_p=1e-9", "rl.top_p=1e-9", "rl.eval_every=0")
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
# a policy gradient with baselines of groups, a critic with whitening over the phase, and a batch's mean of tokens
METHODS = {
    "grpo": "grpo rl.feedback=function rl.responses_per_prompt=2",
    "ppo": "ppo rl.feedback=function",
    "reinforce": "reinforce rl.feedback=dpo_sampled rl.baseline=batch rl.kl_coef=0.1",
    "skips": "rebel rl.feedback=dpo_sampled",
}
REWARD = """
import os
def reward(prompts, responses, rows):
    with open(os.path.join(os.path.dirname(__file__), "asked"), "a") as file:
        file.write("x" * len(responses))
    dead = [sum(map(ord, p)) % 4 > 0 for p in prompts]
    return [0.3 if d else (7 * sum(map(ord, r)) + 1) % 11 / 3 for d, r in zip(dead, responses)]
def fails(prompts, responses, rows):
    raise ValueError("no idea")
"""


def two(folder: Path, *words: str, then: Callable[[str, list[psutil.Process]], Any] = lambda line, ranks: None) -> str:
    """What two processes print; ``then`` is called with each line, and with both."""
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}", "OMP_NUM_THREADS": "1", "LCO_LITE_RUNS": str(folder / "runs")}
    process = subprocess.Popen(
        [*TWO, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, encoding="utf-8"
    )
    said = ""
    assert process.stdout
    for line in process.stdout:
        said += line
        of_rank = {}
        with contextlib.suppress(psutil.Error):
            of_rank = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children()}
        then(line, [of_rank[rank] for rank in ("0", "1") if rank in of_rank])
    process.wait()
    return said


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run whose reward model is trained, by one process."""
    file = tmp_path_factory.mktemp("ranks") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    (file.parent / "reward.py").write_text(REWARD)
    run_stage(file, "rm", *GREEDY, name="base")
    return file


def copied(recipe: Path, name: str, source: str = "base") -> Path:
    return Path(shutil.copytree(recipe.parent / "runs" / source, recipe.parent / "runs" / name))


def norms(stage: Path, log: str = "updates.jsonl") -> list[float]:
    return [row["grad_norm"] for row in read_log(stage / log)]


@pytest.mark.slow
def test_two_processes_go_through_the_chain_as_one_does(base):
    ctx = run_stage(base, "rl-kld", *GREEDY, name="one")
    sets = [word for setting in GREEDY for word in ("-s", setting)]
    said = two(base.parent, "lco_lite", "rl", str(base), "--name", "two", *sets)
    for stage, log in {"sft": "metrics.jsonl", "rm": "metrics.jsonl", "rl-kld": "updates.jsonl"}.items():
        one, both = ctx.run.path / stage, base.parent / "runs" / "two" / stage
        assert norms(one, log) == pytest.approx(norms(both, log), rel=1e-5 if stage == "rl-kld" else 1e-6)
        tokens = [[row.get("response_tokens") for row in read_log(at / "metrics.jsonl")] for at in (one, both)]
        assert tokens[0] == tokens[1]
        made = [sorted(p.relative_to(at) for p in at.rglob("*")) for at in (one, both)]
        assert made[0] == made[1]
    assert said.count("rl-kld 2/2") == 1, "one of them speaks"


@pytest.mark.slow
def test_on_the_same_rollouts_every_kind_of_method_has_the_gradient_of_one_process(base, monkeypatch):
    """One process samples and judges the first step; both go on from there. Rank 1 runs out of memory, and at the end
    the user's function fails, which rank 0 alone asks."""
    for name, words in METHODS.items():
        objective, *sets = words.split()
        sets += [f"rl.reward_function={base.parent / 'reward.py'}:reward"] if "function" in words else []
        sets += ["rl.eval_every=0", "rl.temperature=1", *GREEDY[:1]]
        (base.parent / f"{name}.sets").write_text(" ".join([objective, *sets]))
        copied(base, f"one-{name}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(StageTraining, "update", lambda *_: (_ for _ in ()).throw(Killed))
            run_stage(base, f"rl-{objective}", f"rl.objective={objective}", *sets, name=f"one-{name}")
        copied(base, f"two-{name}", f"one-{name}")
        with monkeypatch.context() as patch:
            patch.setattr(Report, "add", Report.add)
            if name == "skips":
                loss_that_is_none(rank=0)
            run_stage(base, f"rl-{objective}", f"rl.objective={objective}", *sets, name=f"one-{name}")
    (base.parent / "asked").unlink()
    copied(base, "fails")
    said = two(base.parent, "tests.ranks_program", str(base), *METHODS)
    for name, words in METHODS.items():
        stage = f"rl-{words.split()[0]}"
        both = base.parent / "runs" / f"two-{name}" / stage
        assert (both / "done.json").exists(), said
        first = len([r for r in read_log(both / "updates.jsonl") if r["step"] == 1])
        one = norms(base.parent / "runs" / f"one-{name}" / stage)[:first]
        assert all(one) and norms(both)[0] == pytest.approx(one[0], rel=1e-5), name
        # Adam divides small gradients by themselves, and the rounding of their sums with them
        assert norms(both)[:first] == pytest.approx(one, rel=1e-3), name
        if name == "grpo":
            logs = [read_log(base.parent / "runs" / f"{n}-grpo" / stage / "metrics.jsonl") for n in ("one", "two")]
            skipped = [log[0]["skipped_updates"] for log in logs]
            assert skipped[0] == skipped[1] > 0, "they agree which updates have no signal"
        if name == "skips":
            (left_out,) = JsonLines(both / "skipped.jsonl").rows
            assert [left_out] == JsonLines(base.parent / "runs" / "one-skips" / stage / "skipped.jsonl").rows
            assert left_out["update"] == 1 and left_out["not_finite"] == ["loss"] and left_out["left_out"]
    assert (base.parent / "asked").read_text() == "x" * (16 + 8 + 2), (
        "of the second steps, each response once, and one each before them, where the function is tried"
    )
    rows_of_both = base.parent / "runs" / "two-grpo" / "eval" / "arithmetic--sft.rows.jsonl"
    assert rows_of_both.read_text() == scored(base, "one-grpo"), "a score is the same"
    alone = gradients(rows())
    for summed in json.loads((base.parent / "gradients.json").read_text()):
        assert summed[0] == pytest.approx(alone[0], rel=1e-14)
        assert summed[1:] == alone[1:] and alone[2] is None, "what no rank has a gradient for stays without"
    assert said.count("rank 1: warning: rollout: out of memory with rl.rollout_batch") == 1, said
    assert said.count("rank 1: warning: update: out of memory with rl.micro_batch_tokens") == 1, said
    assert said.count("error: ") == said.count("ValueError: no idea") == 1, said
    assert json.loads((base.parent / "statuses.json").read_text()) == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.long)])
def test_where_one_of_two_is_stopped_or_killed_both_leave_and_one_process_goes_on(base, monkeypatch, how):
    """The two go on at a checkpoint of one."""
    sets, path = (*GREEDY, "rl.steps=8", "rl.save_every=1"), copied(base, how)
    with killed_after(monkeypatch, "rl-kld", 1):
        run_stage(base, "rl-kld", *sets, name=how)

    def end_rank_1(line: str, processes: list[psutil.Process]) -> None:
        if "  rl-kld 3/8  " in line:
            processes[1].send_signal(signal.SIGTERM if how == "stopped" else signal.SIGKILL)

    words = [word for setting in sets for word in ("-s", setting)]
    said = two(base.parent, "lco_lite", "rl", str(base), "--name", how, *words, then=end_rank_1)
    message = "and the same command goes on from there" if how == "stopped" else "one of the 2 processes has ended"
    assert said.count(message) == 1 and "rl-kld 8/8" not in said, said
    assert not list(path.rglob(".*.new")) and (path / "rl-kld" / "checkpoints").is_dir()
    ctx = run_stage(base, "rl-kld", *sets, name=how)
    assert [row["step"] for row in read_log(ctx.run.stage("rl-kld").metrics)] == list(range(1, 9))


def test_shares_are_all_of_the_sequences_once_and_alike_in_length():
    lengths = torch.randint(5, 60, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    plan = micro_batches(lengths, 128, group=2, shares=3)
    assert sorted(i for places in plan for i in places) == list(range(40))
    shares = [[i for places in plan[rank::3] for i in places] for rank in range(3)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 2
    assert all(len(places) * max((lengths[i] for i in places), default=0) <= 128 for places in plan)


def test_one_process_gets_back_what_it_gives():
    value = {"loss": 0.1}
    assert ranks.total(value) is value and ranks.gather(value) == [value] and ranks.share([1, 2]) == [1, 2]
    assert ranks.world() == 1 and ranks.local_rank() is None


def test_each_process_has_a_gpu_of_its_own_or_is_refused(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(ranks, "_world", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda:1") and chosen == [1]
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes or more on this machine, and torch finds 1 CUDA devices"):
        resolve_device("cuda")
