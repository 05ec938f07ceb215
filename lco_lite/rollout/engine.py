"""Where responses come from: what every engine does, and ``open_engine``, the one place that knows them.

Legend: B prompts of a batch, L their padded length, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lco_lite.errors import ModelError
from lco_lite.models.language_model import Role
from lco_lite.recipe.sections import Rollout
from lco_lite.sequences import Example

Combine = Callable[[list[Tensor]], Tensor]
"""Logits of several models at one position, [B, V] each -> the logits to sample from, [B, V]."""


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``max_new_tokens`` counts the end of turn; ``batch`` responses are made at once. The
    first of the strings ``stop`` ends a response too. ``logprobs``: those of the sampler are asked for. ``tell`` hears,
    while a batch is made, what share of its tokens there is, 0 to 1, as if no response ended before its limit."""

    temperature: float
    top_p: float
    max_new_tokens: int
    batch: int
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    tell: Callable[[float], object] = field(default=lambda share: None, compare=False, repr=False)


@dataclass(frozen=True)
class Response:
    """``example``: prompt and response ids, with the end of turn or the stop string that closed it.

    ``truncated``: the length limit came first. ``logprobs``: with what log-probability the engine drew each token, at
    the temperature and within the nucleus that it drew from; None where it was not asked or does not tell.
    """

    example: Example
    truncated: bool
    logprobs: list[float] | None = field(default=None, compare=False)


Made = tuple[list[int], list[Response]]
"""Places among the prompts, and the response to each."""

OTHER_NUMBERS = "; in smaller batches the random numbers, and with them the responses, are others"


class Engine:
    """What all engines share: one of them makes its own batches, and ``sync`` where it keeps a copy of the weights.

    ``ahead``: how many times ``Sampling.batch`` prompts it takes for one batch, where a response that ends makes room.
    """

    ahead = 1

    def sync(self) -> None:
        """The weights have changed: what is sampled from now on comes from them as they are now."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[Made]:
        """One response a prompt, batch by batch as they are made. Whoever stops asking stops the sampling."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # like lengths together
        size = self.ahead * sampling.batch
        for start in range(0, len(order), size):
            places = order[start : start + size]
            yield places, self._generate_batch([prompts[i] for i in places], sampling)

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        raise NotImplementedError


def open_engine(
    roles: Sequence[Role],
    end: int,
    combine: Combine | None = None,
    rows: int | None = None,
    settings: Rollout = Rollout(),  # noqa: B008, nobody changes it
    say: Callable[[str], object] = lambda text: None,
) -> Engine:
    """Samples from one role, or from the distribution that ``combine`` makes of several.

    ``end`` closes a response besides the model's own EOS ids. Only the first ``rows`` tokens are drawn, where a model
    with fewer of them will read the responses; rows that only pad a head are never drawn. ``settings`` are heeded for
    one role, whose weights stand still: not for one that is streamed. ``say`` is told where it falls back. Raises
    ModelError where it cannot.
    """
    from lco_lite.rollout.hf import HFEngine
    from lco_lite.rollout.lockstep import LockstepEngine

    rows = min([role.model.head.rows for role in roles] + ([] if rows is None else [rows]))
    if any(role.model.is_streamed for role in roles):
        say("sampling from a streamed model is slow: all its blocks are copied for every token")
    if combine is not None:
        return LockstepEngine(roles, combine, end, rows)
    (role,) = roles
    if settings.engine == "vllm":
        from lco_lite.rollout.vllm import VLLMEngine

        return VLLMEngine(role, end, rows, settings.gpu_share)
    if not role.model.is_streamed and engine_for(settings.engine, role.model.device) == "paged":
        from lco_lite.rollout.paged import PagedEngine, way_of

        with role.model.on_device():
            way = way_of(role.model, say)
        if way is not None:
            return PagedEngine(role, end, rows, way=way)
        if settings.engine == "paged":
            raise ModelError(f"rollout.engine: paged does not run {type(role.model.base).__name__}: use hf")
    return HFEngine(role, end, rows)


def engine_for(asked: str, device: torch.device) -> str:
    """``auto`` is ``paged`` on a GPU with bfloat16 in hardware (capability 8.0), ``hf`` elsewhere."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return asked if asked != "auto" else "paged" if able else "hf"


def in_order(made: Iterable[Made]) -> list[Response]:
    """All that an engine generates, in the order of the prompts."""
    responses = {place: response for places, batch in made for place, response in zip(places, batch, strict=True)}
    return [responses[place] for place in sorted(responses)]


def left_padded(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), each [B, L]: every response begins in the same column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@dataclass(frozen=True)
class StopStrings:
    """Where a text ends besides its stop tokens, however its tokens spell the strings."""

    tokenizer: Any
    strings: tuple[str, ...]

    def reached(self, ids: Tensor) -> Tensor:
        """[B, n], what is made of each response -> [B]: does its newest token complete one of the strings?"""
        most = max((len(string.encode()) for string in self.strings), default=0)  # tokens that one can take
        return torch.tensor([self.inside(row) for row in ids[:, -most - 1 :].tolist()], device=ids.device)

    def inside(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids) if self.strings else ""
        return any(string in text for string in self.strings)


def before_stop(text: str, strings: Iterable[str]) -> str:
    """``text`` up to the first of the strings in it."""
    return text[: min([text.find(string) for string in strings if string in text], default=None)]


def finished(
    prompt: list[int],
    ids: list[int],
    stop_ids: set[int],
    strings: StopStrings | None = None,
    logprobs: list[float] | None = None,
) -> Response:
    """A response ends with its first stop token or string; without one the length limit cut it."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), None)
    if strings is not None and strings.inside(ids[:end]):
        end = bisect_left(range(len(ids)), True, key=lambda n: strings.inside(ids[:n]))
    return Response(Example(prompt, ids[:end]), end is None, None if logprobs is None else logprobs[:end])
