"""Sampling by vLLM in this process: its own copy of the base; the adapter is handed over as a folder, never merged.

There is one vLLM, whatever the roles: each is an adapter with an id of its own. Outside its batches it sleeps: its
weights wait in the host's memory, its cache is given up. Written against vLLM 0.30.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lco_lite import ranks
from lco_lite.errors import ModelError
from lco_lite.models.language_model import Role
from lco_lite.rollout.engine import Engine, Made, Response, Sampling, StopStrings, finished

MOST_BIASED = 1024  # tokens whose logits one request may change, in vLLM
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
ROOM = 256  # tokens: contexts are opened in multiples of this, so that few are opened twice
_ids = itertools.count(1)  # of adapters: vLLM knows one by its id, and never reads it again


def missing(quantization: str) -> str | None:
    """What to install before ``rollout.engine: vllm`` can be used with a base stored like this; None: nothing."""
    needed = ["vllm"] + ["vllm_bnb_plugin"] * (quantization == "nf4")  # apart from vLLM since 0.28
    absent = [name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None]
    how = "pip install 'lco-lite[vllm]' (Linux, an NVIDIA GPU), or take rollout.engine: auto"
    return f"rollout.engine: vllm needs {' and '.join(absent)}, which is not installed: {how}" if absent else None


class VLLMEngine(Engine):
    """See ``engine.open_engine``. Stop strings end a response where vLLM sees them, and are cut where ``hf`` would."""

    ahead = 4

    def __init__(self, role: Role, end: int, rows: int, gpu_share: float) -> None:
        self.role, self.model, self.gpu_share = role, role.model, gpu_share
        self.stop_ids = {end, *role.model.eos_ids}
        self.padding = range(rows, role.model.head.weight.shape[0])
        self.longest = 0  # tokens of prompt and response
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._adapter: Any = None
        nf4 = getattr(self.model.base, "is_loaded_in_4bit", False)
        if (reason := missing("nf4" if nf4 else "none")) is not None:
            raise ModelError(reason)
        if ranks.world() > 1:  # vLLM opens a group of its own, and ends whatever group there is
            raise ModelError("rollout.engine: vllm runs in one process on one GPU: take paged on several")
        if len(self.padding) > MOST_BIASED:
            padded = f"{len(self.padding)} rows of its head are not to be drawn"
            raise ModelError(f"rollout.engine: vllm: {padded}, and vLLM leaves out {MOST_BIASED} at most: take paged")

    def sync(self) -> None:
        """The adapter as it is now, under a new id; the base stands still."""
        if self.role.adapter is not None:
            self._folder, before = tempfile.TemporaryDirectory(prefix="lco-lite-"), self._folder
            folder, number = Path(self._folder.name) / "adapter", next(_ids)
            self.model.save_adapter(self.role.adapter, folder)
            self._adapter = vllm().lora.request.LoRARequest(f"adapter-{number}", number, str(folder))
            if before is not None:
                before.cleanup()

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[Made]:
        self.longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        return super().generate(prompts, sampling)

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        if self._adapter is None:
            self.sync()
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        with awake(self._needs(sampling), self.gpu_share) as llm:
            made = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [self._params(sampling, seed) for seed in seeds],
                lora_request=self._adapter,
                use_tqdm=False,
            )
        strings = StopStrings(self.model.tokenizer, sampling.stop)
        whole = [one.outputs[0] for one in made]
        return [self._response(prompt, one, strings, sampling) for prompt, one in zip(prompts, whole, strict=True)]

    def _response(self, prompt: list[int], made: Any, strings: StopStrings, sampling: Sampling) -> Response:
        ids, told = list(made.token_ids), None
        if sampling.logprobs:
            told = [by_token[token].logprob for token, by_token in zip(ids, made.logprobs, strict=True)]
        response = finished(prompt, ids, self.stop_ids, strings, told)
        return replace(response, truncated=response.truncated and made.finish_reason == "length")

    def _params(self, sampling: Sampling, seed: int) -> Any:
        return vllm().SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature else 1.0,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            stop_token_ids=sorted(self.stop_ids),
            ignore_eos=True,  # they are among these
            stop=list(sampling.stop) or None,
            detokenize=bool(sampling.stop),
            skip_special_tokens=False,
            logit_bias=dict.fromkeys(self.padding, -torch.inf) or None,
            logprobs=0 if sampling.logprobs else None,  # of the drawn token alone
        )

    def _needs(self, sampling: Sampling) -> Needs:
        base: Any = self.model.base
        path = str(base.name_or_path)
        rank = 0 if self.role.adapter is None else self.model.rank(self.role.adapter)
        return Needs(
            path,
            None if Path(path).is_dir() else getattr(base.config, "_commit_hash", None),
            str(base.dtype).removeprefix("torch."),
            "bitsandbytes" if getattr(base, "is_loaded_in_4bit", False) else None,
            max(self.longest, min(-(-self.longest // ROOM) * ROOM, self.model.max_length)),
            next((most for most in RANKS if most >= rank), rank) if rank else 0,
            sampling.batch,
        )


# the one vLLM of this process


@dataclass(frozen=True)
class Needs:
    """What a vLLM is opened for: a base, and at most so many tokens of context, ranks and sequences at once."""

    path: str
    revision: str | None
    dtype: str
    quantization: str | None
    longest: int
    rank: int
    slots: int

    def within(self, other: Needs) -> bool:
        mine, theirs = ((n.path, n.revision, n.dtype, n.quantization) for n in (self, other))
        return mine == theirs and self.longest <= other.longest and self.rank <= other.rank

    def and_also(self, other: Needs) -> Needs:
        """Of the same base, room for both."""
        same = replace(self, longest=max(self.longest, other.longest), rank=max(self.rank, other.rank))
        return same if other.within(same) else self


_open: list[tuple[Needs, Any]] = []  # one, or none


@contextlib.contextmanager
def awake(need: Needs, gpu_share: float) -> Iterator[Any]:
    """The open ``LLM``, or a new one, awake for the length of the block. One that fails is closed.

    torch's random numbers stay as they were. Raises torch.OutOfMemoryError where memory runs out, ModelError where vLLM
    does not open this model.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # vLLM's share is of what is free
    reason = None
    with torch.random.fork_rng():
        try:
            llm = _opened(need, gpu_share)
            llm.wake_up()
            yield llm
            llm.sleep(level=1)
        except (torch.OutOfMemoryError, RuntimeError) as e:  # waking up raises the latter
            if not isinstance(e, torch.OutOfMemoryError) and "out of memory" not in str(e).lower():
                close()
                raise
            reason = " ".join(str(e).split())
        except BaseException as e:
            close()
            if isinstance(e, ValueError):  # an adapter of modules that it does not adapt, say
                raise ModelError(f"rollout.engine: vllm: {' '.join(str(e).split())[:400]}") from e
            raise
    if reason is not None:  # outside, so that it holds on to nothing of the pass
        close()
        what = f"{need.slots} responses of up to {need.longest} tokens at once"
        raise torch.OutOfMemoryError(f"vllm: {what} do not fit rollout.gpu_share {gpu_share:g}: {reason}")


def close() -> None:
    """vLLM leaves the memory; the next batch opens another."""
    if _open:
        _, llm = _open.pop()
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _opened(need: Needs, gpu_share: float) -> Any:
    if _open and need.within(_open[0][0]):
        return _open[0][1]
    need = need.and_also(_open[0][0]) if _open else need
    close()
    try:
        llm = vllm().LLM(
            need.path,
            revision=need.revision,
            tokenizer_revision=need.revision,
            dtype=need.dtype,
            quantization=need.quantization,
            max_model_len=need.longest,
            max_num_seqs=need.slots,
            gpu_memory_utilization=gpu_share,
            enable_lora=need.rank > 0,
            enable_sleep_mode=True,
            logprobs_mode="processed_logprobs",  # at the temperature and within the nucleus, as paged tells them
            **({"max_loras": 1, "max_lora_rank": need.rank} if need.rank else {}),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # of many kinds: an architecture, too little memory, a kernel that is missing
        told = " ".join(str(e).split())[:400]
        raise ModelError(
            f"rollout.engine: vllm does not open {need.path} with rollout.gpu_share {gpu_share:g}: "
            f"{type(e).__name__}: {told}"
        ) from e
    llm.sleep(level=1)
    _open.append((need, llm))
    return llm


def vllm() -> Any:
    """The package, told to stay in this process and to be quiet; and, in the variable that it reads, of the allocator's
    expandable segments, which it turns off around memory of its own that is to sleep."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "PYTORCH_ALLOC_CONF" in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", os.environ["PYTORCH_ALLOC_CONF"])
    import vllm
    import vllm.lora.request

    return vllm
