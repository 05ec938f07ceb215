"""Which of several processes is this one, and what do they tell each other?

``torchrun -m lco_lite …`` or ``accelerate launch -m lco_lite …`` starts them; a process's number is its rank. All do
the same in the same order, each with whole models in memory, but for three things: of prompts, sequences and batches
each takes its share; gradients are summed before the optimiser's step; rank 0 alone speaks and writes. So the weights
are the same everywhere, and what lies in a run folder knows nothing of how many there were.

With one process every function here hands back what it is given. Where one of several ends, the others end as soon as
they wait for it. Nothing that may be done again for lack of memory (``Room.do``) waits for others inside.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TextIO, TypeVar

from lco_lite.errors import LcoError, RankLost
from lco_lite.visible import uncaught, visible

P = ParamSpec("P")
Made = TypeVar("Made")

PATIENCE = datetime.timedelta(days=7)  # rank 0 may grade or judge for hours; a process that ended is noticed at once
BUCKET = 2**23  # numbers that are summed at once

_rank, _world = 0, 1
_alone = False  # rank 0 does what the others wait for, or do not do
_store: Any = None


def join() -> None:
    """Becomes one of the processes that were started together, if there are several."""
    global _rank, _world, _store
    told = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if not told or int(os.environ["WORLD_SIZE"]) < 2:
        return
    import torch
    from accelerate.utils import check_cuda_p2p_ib_support
    from torch import distributed

    if not check_cuda_p2p_ib_support():  # these cards hang otherwise; accelerate launch does the same
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    _store, _rank, _world = next(distributed.rendezvous("env://", timeout=datetime.timedelta(minutes=10)))
    on_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    distributed.init_process_group(backend, store=_store, rank=_rank, world_size=_world, timeout=PATIENCE)
    if _rank > 0:
        sys.excepthook = uncaught
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def leave(well: bool) -> None:
    """The end of this process. As soon as one ends ill torchrun ends all; so rank 0, which may have to say what is
    wrong with the command, goes first."""
    if _world == 1:
        return
    if well:
        from torch import distributed

        return distributed.destroy_process_group()
    with contextlib.suppress(RuntimeError):  # whoever holds the store has ended
        if _rank == 0:
            _store.set("rank 0 leaves", "")
        else:
            _store.wait(["rank 0 leaves"], datetime.timedelta(seconds=5))


def world() -> int:
    """How many processes share the work."""
    return 1 if _alone else _world


def rank() -> int:
    return 0 if _alone else _rank


def local_rank() -> int | None:
    """Which of this machine's processes this one is; None where there is one process."""
    return int(os.environ.get("LOCAL_RANK", _rank)) if _world > 1 else None


def share(items: Sequence[Made]) -> list[Made]:
    """Every N-th of them."""
    return list(items[rank() :: world()])


def gather(value: Made) -> list[Made]:
    """What each rank has, in their order. Raises RankLost where one has ended."""
    if world() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * _world
    with _others():
        distributed.all_gather_object(values, value)
    return values


def total(value: Made) -> Made:
    """The sum over ranks of a number or a tensor, or of dictionaries of them by name."""
    if world() == 1:
        return value
    values: list[Any] = gather(value)
    if isinstance(values[0], dict):
        return {name: sum(one[name] for one in values) for name in values[0]}  # type: ignore[return-value]
    return sum(values[1:], values[0])


def any_of(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return any(gather(flag))


def from_main(value: Made) -> Made:
    """What rank 0 has."""
    return gather(value)[0]


def once(work: Callable[P, Made]) -> Callable[P, Made]:
    """Rank 0 does it alone; the others wait and get what it made, or fail as it does."""

    @functools.wraps(work)
    def call(*args: P.args, **kw: P.kwargs) -> Made:
        if world() == 1:
            return work(*args, **kw)
        made: Any = None
        failed: Exception | None = None
        if _rank == 0:
            with apart():
                try:
                    made = work(*args, **kw)
                except Exception as e:
                    failed = e
        told = failed if failed is None or isinstance(failed, LcoError) else LcoError(str(failed))
        made, told = from_main((made, told))
        if (error := failed or told) is not None:
            raise error
        return made

    return call


def by_main(work: Callable[P, None]) -> Callable[P, None]:
    """Rank 0 does it; the others go on."""

    @functools.wraps(work)
    def call(*args: P.args, **kw: P.kwargs) -> None:
        if _rank == 0:
            with apart():
                work(*args, **kw)

    return call


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, this process is the only one: it shares nothing and waits for nobody."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def sum_gradients(weights: Sequence[Any]) -> None:
    """Gradients become their sums over ranks. One that is there on any rank is there on all."""
    if world() == 1:
        return
    import torch
    from torch import distributed

    there = gather([weight.grad is not None for weight in weights])
    trained = [weight for weight, *has in zip(weights, *there, strict=True) if any(has)]
    for weight in trained:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    for bucket in _buckets([weight.grad for weight in trained]):
        flat = torch.cat([grad.flatten() for grad in bucket])
        with _others():
            distributed.all_reduce(flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def aside(text: str) -> None:
    """What the user should know of another rank than 0, whose screen is."""
    if _rank > 0:
        print(visible(f"rank {_rank}: {text}"), file=sys.__stderr__)


def stderr_of_the_first() -> TextIO | None:
    """Where to say why this process ends; None where another has said it: what follows from that is no news."""
    if _world > 1:
        with contextlib.suppress(RuntimeError):
            if _store.add("said why", 1) > 1:
                return None
    return sys.__stderr__ if _rank > 0 else sys.stderr


def _buckets(grads: Sequence[Any]) -> Iterator[list[Any]]:
    bucket, size = list[Any](), 0
    for grad in grads:
        if bucket and size + grad.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel()
    if bucket:
        yield bucket


@contextlib.contextmanager
def _others() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:  # gloo has no kind of its own
        reason = str(e).partition(". ")[0]
        raise RankLost(
            f"one of the {_world} processes has ended, and so do the others; the same command goes on at the last "
            f"checkpoint ({reason})"
        ) from e
