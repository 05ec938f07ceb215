"""What two processes do in ``test_ranks.py`` besides the command line: ``-m tests.ranks_program RECIPE NAME…``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import typer
from torch.nn import Parameter

from lco_lite import ranks
from lco_lite.evaluation.evaluate import evaluate_stage
from lco_lite.files import write_json
from lco_lite.rollout.hf import HFEngine
from lco_lite.tasks import load_task
from lco_lite.train import rl
from tests.train.test_chain import run_stage, start


def gradients(rows: list[torch.Tensor]) -> list[list[float] | None]:
    """Summed over ranks, of Σ (w·x)² over this rank's share; one weight has a gradient on rank 1 only, one on none."""
    w, late, idle = (Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(3))
    for row in ranks.share(rows):
        (w @ row).square().backward()
    if ranks.rank() == ranks.world() - 1:
        late.sum().backward()
    ranks.sum_gradients([w, late, idle])
    return [None if weight.grad is None else weight.grad.tolist() for weight in (w, late, idle)]


def rows() -> list[torch.Tensor]:
    return list(torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def out_of_memory_once(owner: object, name: str) -> None:
    """Rank 1 alone runs out of memory, in the first call."""
    real, calls = getattr(owner, name), []

    def call(*args, **kw):
        calls.append(None)
        if len(calls) == 1 and ranks.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **kw)

    setattr(owner, name, call)


def loss_that_is_none(rank: int) -> None:
    """The first loss of this rank, of which the gradient is as it was."""
    real, calls = rl.Report.add, []

    def add(self, micro, loss, seen):
        calls.append(None)
        real(self, micro, loss * float("nan") if len(calls) == 1 and ranks.rank() == rank else loss, seen)

    rl.Report.add = add


def scored(recipe: Path, name: str) -> str:
    """The graded responses of sft, in batches of three, as they are on disk."""
    with start(recipe, "eval.batch=3", name=name) as ctx:
        evaluate_stage(ctx, load_task("arithmetic"), "sft")
    return ctx.run.eval_path("arithmetic", "sft").with_suffix(".rows.jsonl").read_text()


def main(recipe: Path, names: list[str]) -> None:
    ranks.join()
    everywhere = ranks.gather(gradients(rows()))
    if ranks.rank() == 0:
        write_json(recipe.parent / "gradients.json", everywhere)
    for name in names:
        objective, *sets = (recipe.parent / f"{name}.sets").read_text().split()
        if name == "grpo":
            out_of_memory_once(rl, "accumulate")
            out_of_memory_once(HFEngine, "_generate_batch")
        if name == "skips":
            loss_that_is_none(rank=1)
        run_stage(recipe, f"rl-{objective}", f"rl.objective={objective}", *sets, name=f"two-{name}")
    scored(recipe, "two-grpo")
    function = f"rl.reward_function={recipe.parent / 'reward.py'}:fails"
    try:
        run_stage(recipe, "rl-kld", "rl.feedback=function", function, "train_rm.top_p=1e-9", name="fails")
    except typer.Exit as end:
        statuses = ranks.gather(end.exit_code)
        if ranks.rank() == 0:
            write_json(recipe.parent / "statuses.json", statuses)
    ranks.leave(well=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
