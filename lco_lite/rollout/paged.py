"""Continuous batching by transformers, over a cache in pages: a response that ends makes room for the next prompt.

Its loop runs in a thread, and ends with every batch: between batches nothing of it is in memory. Attention is that of
flash-attn where it is installed, torch's own variable-length kernel, else the model's own, over all keys at once.
The first of these whose log-probabilities are those of a plain forward pass is taken.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from lco_lite.models.language_model import TOLERANCE, LanguageModel
from lco_lite.rollout.engine import Response, Sampling, StopStrings, finished
from lco_lite.rollout.hf import HFEngine

PAGE = 256  # tokens; what flash-attn's kernels read
PASS_TOKENS = 2048  # of prompts and responses in one forward pass
TORCH_FLASH = "flash_torch"  # "flash" in the name: continuous batching makes no mask then

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # its errors are raised here


@dataclass(frozen=True)
class Way:
    """An attention, None: the model's own; and whether its passes are captured as CUDA graphs."""

    attention: str | None = None
    graphs: bool = False

    def __str__(self) -> str:
        return f"{self.attention or 'own attention'}{' in CUDA graphs' if self.graphs else ''}"


class PagedEngine(HFEngine):
    """See ``engine.open_engine``. Stop strings cut a response when it is complete: it ran to its end of turn."""

    ahead = 4  # with the random numbers of one batch, so that what is kept is no matter of which responses end first

    def __init__(self, *args: Any, way: Way) -> None:
        super().__init__(*args)
        self.way = way

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        seed, slots = int(torch.randint(2**31, (1,))), min(sampling.batch, len(prompts))
        with self.model.use(self.role.adapter):
            config = self._config(sampling)
            made = run(
                self.model, prompts, config, slots, seed, self.way, logprobs=sampling.logprobs, tell=sampling.tell
            )
        strings = StopStrings(self.model.tokenizer, sampling.stop)
        return [
            finished(prompt, ids, self.stop_ids, strings, logprobs if sampling.logprobs else None)
            for prompt, (ids, logprobs) in zip(prompts, made, strict=True)
        ]


def run(
    model: LanguageModel,
    prompts: list[list[int]],
    sampled: GenerationConfig,
    slots: int,
    seed: int,
    way: Way,
    pages: int | None = None,
    logprobs: bool = False,
    tell: Callable[[float], object] = lambda share: None,
) -> list[tuple[list[int], list[float]]]:
    """New tokens of each prompt and, where asked for, their log-probabilities; ``slots`` of them are made at once.

    torch's random numbers stay as they were. Where ``pages`` are fewer than all can need, some are read again.
    Raises torch.OutOfMemoryError where the cache does not fit, or a pass.
    """
    new_tokens = int(sampled.max_new_tokens or 0)
    longest = max(map(len, prompts)) + new_tokens
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # the cache's share is of what is free
    paging = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages or slots * -(-longest // PAGE),
        max_batch_tokens=max(PASS_TOKENS, slots),
        max_requests_per_batch=slots,
        safety_margin=0.0,  # there are pages for all
        use_cuda_graph=way.graphs,
        auto_switch_to_flash=False,
        return_logprobs=logprobs,
        seed=seed,
    )
    hints = WorkloadHints(longest - new_tokens, new_tokens, len(prompts))
    base: Any = model.base
    with torch.random.fork_rng(), _attention(base, way.attention):
        try:
            manager = base.init_continuous_batching(sampled, paging, hints)
            try:
                names = manager.add_requests(prompts)  # all of them before it starts: the same passes every time
                manager.start()
                made = _results(manager, len(prompts), new_tokens, tell)
            finally:
                if manager.is_running():
                    manager.stop(hard_stop=True)
                manager.destroy()
        except (MemoryError, torch.OutOfMemoryError) as e:
            short = f"{slots} responses of up to {longest} tokens at once, in pages of {PAGE}, do not fit"
            reason = " ".join(str(e).split())
        else:
            return [made[name] for name in names]
    raise torch.OutOfMemoryError(f"{short}: {reason}")  # outside, so that it holds on to nothing of the pass


def _results(
    manager: Any, n: int, new_tokens: int, tell: Callable[[float], object]
) -> dict[str, tuple[list[int], list[float]]]:
    """By the name of the request; what went wrong in the manager's thread is raised in this one. ``tell`` hears with
    every response, and every half second, what share of the tokens there is."""
    made: dict[str, tuple[list[int], list[float]]] = {}
    share = 0.0
    while len(made) < n:
        result, failed = manager.get_result(timeout=0.5), manager.background_thread_status.fatal_error
        processor = manager.batch_processor  # None until its thread has begun
        running = list(processor.scheduler.active_requests.values()) if processor else []
        tokens = sum(one.generated_len() for one in running if one.request_id not in made)
        share = max(share, (len(made) + tokens / new_tokens) / n)  # responses that have ended are not here at once
        tell(share)
        if result is not None and not result.error:
            made[result.request_id] = (list(result.generated_tokens), list(result.logprobs))
        elif result is not None or failed or not manager.is_running():
            manager.stop(hard_stop=True)  # waits for it, so that it has said why
            failed = manager.background_thread_status.fatal_error
            raise failed or RuntimeError(f"continuous batching stopped: {result and result.error}")
    return made


@contextlib.contextmanager
def _attention(base: PreTrainedModel, name: str | None) -> Iterator[None]:
    """``name`` in every part of the model; at the end each has its own again."""
    configs = [m.config for m in base.modules() if isinstance(m, PreTrainedModel)]
    before = [(config, config._attn_implementation) for config in configs]
    try:
        if name == TORCH_FLASH:  # transformers looks for a package of any name with "flash" in it
            for config in configs:
                config._attn_implementation = name
        elif name is not None:
            base.set_attn_implementation(name)
        yield
    finally:
        for config, attention in before:
            config._attn_implementation = attention


# which attention

_FOUND: weakref.WeakKeyDictionary[LanguageModel, Way | None] = weakref.WeakKeyDictionary()


def way_of(model: LanguageModel, say: Callable[[str], object]) -> Way | None:
    """The fastest way that is right for this model, looked for once; None where no way is. ``say`` is told of the
    others."""
    if model not in _FOUND:
        found = None
        for way in _ways(model):
            if (reason := wrong(model, way)) is None:
                found = way
                break
            say(f"paged rollouts: {way} is of no use here: {reason}")
        _FOUND[model] = found
        if model.device.type == "cuda" and found == Way():
            say("paged rollouts: without a flash kernel every response reads the keys of all: pip install flash-attn")
    return _FOUND[model]


def _ways(model: LanguageModel) -> Iterator[Way]:
    """The fastest first."""
    half = model.base.dtype in (torch.bfloat16, torch.float16)
    if model.device.type == "cuda" and half:
        if importlib.util.find_spec("flash_attn"):
            yield from (Way("flash_attention_2", graphs) for graphs in (True, False))
        if importlib.util.find_spec("torch.nn.attention.varlen"):
            yield from (Way(TORCH_FLASH, graphs) for graphs in (True, False))
    yield Way()


def wrong(model: LanguageModel, way: Way) -> str | None:
    """Why this way's log-probabilities are not those of a plain forward pass, over prompts of unlike lengths and what
    follows them; None where they are."""
    prompts = [list(range(first, first + length)) for first, length in ((1, 7), (5, 3), (2, 19))]
    greedy = GenerationConfig(do_sample=False, max_new_tokens=4, eos_token_id=-1, pad_token_id=model.pad_id)
    try:
        made = run(model, prompts, greedy, len(prompts), 0, way, logprobs=True)
        errors = [
            abs(logprob - told)
            for prompt, (ids, logprobs) in zip(prompts, made, strict=True)
            for logprob, told in zip(_logprobs(model, prompt, ids), logprobs, strict=True)
        ]
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # of many kinds: what the architecture, the kernel or the capture of a graph lacks
        return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    error, bound = sum(errors) / len(errors), 10 * max(TOLERANCE.get(model.base.dtype, 3e-2), 1e-4)
    return None if error < bound else f"its log-probabilities are off by {error:.1e}"


@torch.no_grad()
def _logprobs(model: LanguageModel, prompt: list[int], ids: list[int]) -> list[float]:
    whole: Any = model.base(input_ids=torch.tensor([prompt + ids], device=model.device), use_cache=False)
    logprobs = whole.logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids, device=model.device).unsqueeze(1)).squeeze(1).tolist()


def torch_flash(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **kw: Any,
) -> tuple[Tensor, None]:
    """torch's variable-length kernel over sequences in a row, each [1, heads, tokens, d] -> [1, tokens, heads, d]."""
    from torch.nn.attention.varlen import varlen_attn

    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kw.get(name) is not None]:
        raise ValueError(f"{TORCH_FLASH} has no {', '.join(unknown)}")
    key, value = kw.pop("cache").update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kw)
    window = kw.get("sliding_window")
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    made = varlen_attn(
        q,
        k,
        v,
        kw["cu_seq_lens_q"].to(torch.int32),
        kw["cu_seq_lens_k"],
        kw["max_length_q"],
        kw["max_length_k"],
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    return made.unsqueeze(0), None  # type: ignore[union-attr]


AttentionInterface.register(TORCH_FLASH, torch_flash)
AttentionMaskInterface.register(TORCH_FLASH, lambda *args, **kw: None)
