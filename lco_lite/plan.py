"""Does it fit, and what does it take (``lco-lite plan``)? From the recipe and its models' configs, without weights.

The phases' own code runs on tensors that have shapes and no numbers (torch's FakeTensorMode), on models cut down to a
few layers, while ``LiveBytes`` counts what is alive. Memory is linear in the layers: the line through two depths gives
that of the whole model. Batches are the longest that the recipe lets in. A card is stood in for by fake CPU tensors
with the choices of the losses' code for CUDA; what its kernels take inside themselves is not seen.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import getattr_static
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from bitsandbytes.functional import QuantState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lco_lite import weights
from lco_lite.console import Console
from lco_lite.context import Context
from lco_lite.data.prompts import Pair, longest_response, recipe_task
from lco_lite.errors import UsageError
from lco_lite.metrics import read_log
from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.models.loading import base_dtype, language_model_class, load_config
from lco_lite.objectives import chunks, head
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import overridden
from lco_lite.recipe.sections import RewardModel, Training, Weights, size_in_bytes
from lco_lite.rollout.engine import Response, Sampling
from lco_lite.rollout.lockstep import draw
from lco_lite.run import Run, StageFolder
from lco_lite.sequences import Example, micro_batches
from lco_lite.train import reward_model, sft
from lco_lite.train.methods import score
from lco_lite.train.rl import accumulate, kl_to_old, open_models
from lco_lite.train.rollouts import Phase
from lco_lite.train.training import StageTraining

GIB = 2**30
RESERVE = 0.8 * GIB  # CUDA's context and fragmentation; on a CPU the process itself. An estimate
HEADS = {"weights": "base", "adapters": "LoRA", "optimiser": "AdamW", "activations": "acts"}  # 80 columns are narrow
COLUMNS = ("weights", "adapters", "optimiser", "activations", "cache", "loss")


class LiveBytes(TorchDispatchMode):
    """``now``: bytes of the storages that live, of those made inside; ``peak``: the most since ``restart``, ``chunks``
    of them in tensors over the ``vocabulary``. A number read from a fake tensor is 1, a truth False."""

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.now = self.peak = self.chunks = self._wide = 0
        self.vocabulary = vocabulary
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def restart(self) -> None:
        gc.collect()
        self.peak, self.chunks = self.now, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._add(tensor)
        if "gemm_4bit" in str(func):  # the weight in 16 bits, inside the product
            self._reach(self.now + math.prod(args[2]) * out.element_size())
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            size = -(-storage.nbytes() // 512) * 512  # as CUDA's allocator rounds
            wide = size if tensor.dim() == 2 and tensor.shape[1] >= self.vocabulary > 0 else 0
            self._seen.add(storage)
            weakref.finalize(storage, self._change, -size, -wide)
            self._change(size, wide)

    def _change(self, size: int, wide: int) -> None:
        self.now, self._wide = self.now + size, self._wide + wide
        self._reach(self.now)

    def _reach(self, size: int) -> None:
        if size > self.peak:
            self.peak, self.chunks = size, self._wide


@dataclass(frozen=True)
class Part:
    """Bytes in a model cut down to ``layers`` of its ``of``."""

    column: str
    bytes: float
    layers: int
    of: int


@dataclass(frozen=True)
class Moment:
    """A phase's peak: ``parts`` make it up; ``chunks`` of its activations are buffers of the loss at any depth."""

    phase: str
    parts: list[Part]
    chunks: float


@contextlib.contextmanager
def standing_in(owner: Any, name: str, value: Any) -> Iterator[None]:
    """What a fake tensor cannot go through, or a card would do otherwise, for the length of the block."""
    own = getattr_static(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


class Shapes(LanguageModel):
    """A model without numbers, so that there is nothing to prove or to load."""

    def __init__(self, trial: Trial, base: Any, settings: Weights, depth: tuple[int, int]) -> None:
        self.trial, self.lora, self.depth, self.parts = trial, settings.lora, depth, list[Part]()
        rows, window = len(base.get_output_embeddings().weight), base.config.get_text_config().max_position_embeddings
        ids = {"pad_token_id": 0, "eos_token_id": 0, "model_max_length": window}
        tokenizer: Any = SimpleNamespace(get_vocab=lambda: {"": rows - 1}, **ids)
        super().__init__(base, tokenizer, settings.gradient_checkpointing)

    def _prove(self) -> None: ...

    def load_adapter(self, name: str, folder: Path) -> None:
        assert self.lora is not None
        self.add_adapter(name, self.lora, 0)

    def copy_adapter(self, source: str, name: str) -> None:
        self.load_adapter(name, Path())

    def _attach(self, name: str, config: Any) -> None:
        stay = standing_in(torch.nn.Module, "to", lambda module, *a, **kw: module)  # fakes cannot be swapped
        with self.trial.part("adapters", self.depth, self.parts), stay:
            super()._attach(name, config)


@dataclass
class Trial:
    """A stage of the recipe at one depth, with the models that its own code opens."""

    recipe: Recipe
    on_card: bool
    deep: bool  # the larger of the two depths
    live: LiveBytes = field(default_factory=LiveBytes)
    prompt: int | None = None  # tokens of the longest; None: what the recipe lets in
    only: str | None = None  # the phase that is looked at
    models: list[weakref.ref[Shapes]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)  # that belong to no model
    moments: list[Moment] = field(default_factory=list)
    trained: tuple[int, int] = (1, 1)
    numbers: Part = Part("trained", 0, 1, 1)
    kept: float = 0.0  # bytes a response token that stay on the host until the phase ends

    def run(self, stage: Callable[[Trial], None]) -> Trial:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.ctx = Context(Run(folder), self.recipe, Console(quiet=True), torch.device("cpu"))
            stack.enter_context(standing_in(weights, "_load", self._load))
            for what in ("converted_gguf", "build_scratch", "check_same_tokenizer"):
                stack.enter_context(standing_in(weights, what, lambda *a, **kw: None))
            stack.enter_context(
                standing_in(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *a, **kw: None)
            )
            if self.on_card:
                stack.enter_context(standing_in(torch.cuda, "get_device_capability", lambda device: (8, 0)))
                stack.enter_context(standing_in(chunks, "chunk_size", _chunk_on_cuda))
                stack.enter_context(standing_in(head, "_unblocked_product", _product_on_cuda))
                stack.enter_context(standing_in(head.Head, "operand_dtype", torch.bfloat16))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(self.live)
            gc.collect()
            gc.freeze()  # what is there already is not looked through again
            stack.callback(gc.unfreeze)
            stage(self)
        return self

    def _load(self, ctx: Context, settings: Weights, folder: Path | None) -> Shapes:
        if settings.quantization == "int8":
            raise UsageError("plan: what LLM.int8 takes depends on the numbers: it is not planned. nf4 and none are")
        config = copy.deepcopy(load_config(settings))
        text, period = config.get_text_config(), 2
        of = text.num_hidden_layers
        if types := getattr(text, "layer_types", None):
            period = next((p for p in range(2, of) if all(a == b for a, b in zip(types, types[p:]))), of)  # noqa: B905
        layers = min(of, 2 * period if self.deep else period)
        text.num_hidden_layers = layers
        if types:
            text.layer_types = types[:layers]
        dtype = base_dtype(settings, torch.device("cuda" if self.on_card else "cpu"))
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
        if settings.attention in ("sdpa", "eager"):  # flash attention's memory is sdpa's
            options["attn_implementation"] = settings.attention
        made: list[Part] = []
        with self.part("weights", (layers, of), made):
            base = language_model_class(config).from_config(config, **options).requires_grad_(False).eval()
            if settings.quantization == "nf4":
                _quantise(base, dtype)
        self.live.vocabulary = min(self.live.vocabulary or of * 10**9, len(base.get_output_embeddings().weight))
        model = Shapes(self, base, settings, (layers, of))
        model.parts += made
        self.models.append(weakref.ref(model))
        return model

    @contextlib.contextmanager
    def part(self, column: str, depth: tuple[int, int], parts: list[Part]) -> Iterator[None]:
        gc.collect()
        before = self.live.now
        yield
        gc.collect()
        parts.append(Part(column, self.live.now - before, *depth))

    @contextlib.contextmanager
    def moment(self, phase: str, depth: tuple[int, int]) -> Iterator[list[Part]]:
        """What the block takes at most beyond the parts; it may tell parts of that."""
        more: list[Part] = []
        self.live.restart()
        yield more
        parts = [part for model in map(weakref.ref.__call__, self.models) if model for part in model.parts]
        parts += [*self.parts, *more]
        rest = self.live.peak - sum(part.bytes for part in parts)
        self.moments.append(Moment(phase, [*parts, Part("activations", rest, *depth)], self.live.chunks))

    def train(self, phase: str, training: StageTraining, accumulate: Callable[[], Any]) -> None:
        """An update after the first: forward and backward, then the optimiser's step."""
        if self.only not in (None, phase):
            return
        with self.moment(phase, self.trained) as more:
            before = self.live.now
            accumulate()
            gc.collect()
            more.append(Part("optimiser", self.live.now - before, *self.trained))  # the gradients
        with self.moment(phase, self.trained):
            training.update()

    def training(self, role: Role, parameters: Any, settings: Training) -> StageTraining:
        assert isinstance(role.model, Shapes)
        self.trained = role.model.depth
        self.numbers = Part("trained", sum(p.numel() for _, p in parameters), *self.trained)
        with self.part("optimiser", self.trained, self.parts):  # masters of 16-bit weights
            training = StageTraining(self.ctx, StageFolder(self.ctx.run.path / "none"), parameters, settings, 1, 1)
        for group in training.adamw.param_groups:
            group["foreach"] = self.on_card
        return training

    def settle(self, training: StageTraining, accumulate: Callable[[], Any]) -> None:
        """The first update, which makes the optimiser's states."""
        with self.part("optimiser", self.trained, self.parts):
            accumulate()
            training.update()

    def sample(self, phase: str, role: Role, sampling: Sampling, max_length: int) -> None:
        """The prompts' forward pass, and that of the last token with all keys and values in the cache."""
        if self.only not in (None, phase):
            return
        model: Any = role.model
        prompt = self.prompt or max(1, min(max_length, model.max_length) - sampling.max_new_tokens)

        def forward(new: int, cache: Any = None, past: int = 0) -> Any:
            ids, mask = torch.zeros(sampling.batch, new, dtype=torch.long), torch.ones(sampling.batch, past + new)
            options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            return model.base(input_ids=ids, attention_mask=mask.long(), **options)

        with torch.no_grad(), model.use(role.adapter):
            for first in (prompt, 0):
                gc.collect()
                before, past = self.live.now, prompt + sampling.max_new_tokens - 1
                cache = None if first else forward(past).past_key_values
                with self.moment(phase, model.depth) as more:
                    out = forward(prompt) if first else forward(1, cache, past)
                    draw(out.logits[:, -1].float() / (sampling.temperature or 1), sampling)
                    cache = out.past_key_values
                    del out
                    gc.collect()
                    more.append(Part("cache", self.live.now - before, *model.depth))
                del cache


def _quantise(base: Any, dtype: torch.dtype) -> None:
    """NF4 with double quantisation as ``load_base`` asks for: 4 bits a weight, 8 for the largest of each 64."""
    for parent in list(base.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear) and linear is not base.get_output_embeddings():
                rows, columns = linear.weight.shape
                with unset_fake_temporarily():
                    layer: Any = bnb.nn.Linear4bit(columns, rows, compute_dtype=dtype, quant_type="nf4", device="meta")
                blocks = -(-rows * columns // 64)
                nested = {"blocksize": 256, "code": torch.empty(256), "dtype": torch.float32}
                how = {"blocksize": 64, "quant_type": "nf4", "dtype": dtype, "shape": linear.weight.shape}
                how |= {"code": torch.empty(16), "offset": torch.empty(())}
                how |= {"state2": QuantState(torch.empty(-(-blocks // 256)), **nested)}
                packed: Any = torch.nn.Parameter(torch.empty(-(-rows * columns // 2), 1, dtype=torch.uint8), False)
                packed.quant_state = QuantState(torch.empty(blocks, dtype=torch.uint8), **how)
                packed.compress_statistics, packed.quant_type = True, "nf4"
                layer.weight, layer.bias, layer.support_avx512bf16_for_cpu = packed, linear.bias, False
                setattr(parent, name, layer.eval())
    base.is_loaded_in_4bit = base.is_quantized = True


def _chunk_on_cuda(columns: int, device: torch.device) -> int:
    return chunks.chunk_on_cuda(columns, 4 * chunks.CUDA_BYTES)  # as long as there is room for it


def _product_on_cuda(x: Tensor, matrix: Tensor) -> Tensor | None:
    """``head._unblocked_product`` as a card makes it: 16-bit operands into fp32."""
    if matrix.dtype == head.wide(x, matrix):
        return x.to(matrix.dtype) @ matrix
    if torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad):
        return None
    return x.to(matrix.dtype).new_empty(x.shape[0], matrix.shape[1], dtype=torch.float32)


# the stages


def _eval_sampling(recipe: Recipe, rows: int) -> Sampling:
    task = recipe_task(recipe)
    longest = recipe.eval.max_new_tokens or (task.max_new_tokens if task else longest_response(recipe))
    return Sampling(recipe.eval.temperature, recipe.eval.top_p, longest, rows)


SHORT = [Example([0], [0, 0])]


def _longest_examples(settings: Training, window: int, most: int, response: int, size: int = 1) -> list[Example]:
    """Two of the largest micro-batches, or ``most`` examples: of units of ``size`` sequences of at most ``max_length``
    tokens, whichever number of them leaves the least room."""
    limit = min(settings.max_length, window)
    fits = max(1, settings.micro_batch_tokens // (size * limit))
    more = settings.micro_batch_tokens // (size * (fits + 1))
    rows, length = max((fits, limit), (fits + 1, more), key=lambda shape: math.prod(shape))
    made = min(response, length - 1)
    return [Example([0] * (length - made), [0] * made)] * min(2 * rows, most)


def _sft(trial: Trial) -> None:
    settings, policy = trial.recipe.sft, weights.open_sft(trial.ctx)
    training = trial.training(policy, weights.trainable(trial.ctx, policy, "sft"), settings)
    examples = _longest_examples(settings, policy.model.max_length, settings.batch_size, settings.max_length)

    def accumulate(examples: Any) -> Any:
        return sft.accumulate(policy, examples, settings.micro_batch_tokens)

    with policy.model.training_mode(dropout=True):
        trial.settle(training, lambda: accumulate(SHORT))
        trial.train("sft", training, lambda: accumulate(examples))


def _rm(trial: Trial) -> None:
    recipe, rm, longest = trial.recipe, trial.recipe.train_rm, longest_response(trial.recipe)
    start = weights.open_start(trial.ctx)
    phi, reference = weights.open_untrained_reward_model(trial.ctx, start)
    if recipe.data.preferences == "sampled":
        drawn = Sampling(rm.temperature, rm.top_p, longest, recipe.rl.rollout_batch)
        trial.sample("pair sampling", start, drawn, rm.max_length)
    training = trial.training(phi, weights.trainable(trial.ctx, phi, "rm"), rm)
    examples = _longest_examples(rm, start.model.max_length, rm.batch_size, longest, size=2)

    def accumulate(examples: Any) -> Any:
        return reward_model.accumulate(phi, reference, rm, [Pair(e, e) for e in examples], rm.micro_batch_tokens)

    with phi.model.training_mode():
        trial.settle(training, lambda: accumulate(SHORT))
        trial.train("train-rm", training, lambda: accumulate(examples))
    if rm.check_items and (task := recipe_task(recipe)) is not None and task.graded:
        drawn = _eval_sampling(recipe, min(recipe.eval.batch, rm.check_items))
        trial.sample("φ check", phi, drawn, recipe.rl.max_length)


def _rl(trial: Trial) -> None:
    recipe, rl, longest = trial.recipe, trial.recipe.rl, longest_response(trial.recipe)
    if rl.objective in ("ppo", "minillm") or rl.is_own or rl.target:
        raise UsageError(f"plan: rl.objective {rl.objective} or rl.target looks at numbers; the others can be planned")
    models, parameters = open_models(trial.ctx)
    policy = models.policy
    training = trial.training(policy, parameters, rl)
    examples = _longest_examples(rl, policy.model.max_length, rl.minibatch, longest)
    plain = rl.model_copy(update={"baseline": "none", "scale_rewards": False, "overlong_buffer": 0.0})

    def scored(examples: list[Example]) -> Any:
        n, split = len(examples), [micro_batches([len(e) for e in examples], rl.micro_batch_tokens, rl.unit)]
        rewards = {name: [0.0] * n for name in rl.reward_parts}
        phase = Phase([], longest, [Response(e, True) for e in examples], None, rewards, [False] * n, n)
        return score(models, phase, split, plain)[0]

    def update(minibatch: Any) -> None:
        accumulate(models, plain, None, minibatch, rl.micro_batch_tokens)

    with policy.model.training_mode():
        trial.settle(training, lambda: update(scored(SHORT)))
    trial.sample("rl rollout", policy, Sampling(rl.temperature, rl.top_p, longest, rl.rollout_batch), rl.max_length)
    before = trial.live.now
    with trial.moment("rl score", trial.trained):
        minibatch = scored(examples)
    gc.collect()
    trial.kept = (trial.live.now - before) / sum(len(e.response) for e in examples)
    minibatch = minibatch[:1] * len(minibatch)  # they come from the host one by one
    with policy.model.training_mode():
        trial.train("rl update", training, lambda: update(minibatch))
    with trial.moment("rl score", trial.trained):
        kl_to_old(models, rl, minibatch, rl.micro_batch_tokens)
    minibatch.clear()
    if rl.eval_every and (task := recipe_task(recipe)) is not None and task.graded:
        drawn = _eval_sampling(recipe, min(recipe.eval.batch, rl.eval_items))
        trial.sample("rl eval", policy, drawn, rl.max_length)


def _eval(trial: Trial) -> None:
    """The reward model decoded as a policy where there is one on a base of its own: it is the larger."""
    recipe = trial.recipe
    own = recipe.rl.needs_reward_model and isinstance(recipe.reward_model, RewardModel)
    role = weights.open_stage(trial.ctx, "rm" if own else recipe.rl.stage)
    length = min(recipe.rl.max_length, role.model.max_length)
    width = length if trial.prompt is None else trial.prompt + _eval_sampling(recipe, 1).max_new_tokens
    rows = max(1, min(recipe.eval.batch, recipe.eval.batch_tokens // width))
    trial.sample("eval", role, _eval_sampling(recipe, rows), length)


STAGES = {"sft": _sft, "rm": _rm, "rl": _rl, "eval": _eval}


# what they add up to


def peaks(
    recipe: Recipe, stage: str, on_card: bool, prompt: int | None = None, only: str | None = None
) -> tuple[dict[str, dict[str, float]], float, float]:
    """(phase -> bytes by column at its peak, numbers that the stage trains, bytes a response token on the host)."""
    large = Trial(recipe, on_card, True, prompt=prompt, only=only).run(STAGES[stage])
    whole = all(part.layers == part.of for moment in large.moments for part in moment.parts)
    small = large if whole else Trial(recipe, on_card, False, prompt=prompt, only=only).run(STAGES[stage])
    found: dict[str, dict[str, float]] = {}
    for a, b in zip(small.moments, large.moments, strict=True):
        held = dict.fromkeys(COLUMNS, 0.0)
        for p, q in zip(a.parts, b.parts, strict=True):
            held[p.column] += _line(p, q)
        held["loss"] = min(b.chunks, held["activations"])
        held["activations"] -= held["loss"]
        found[a.phase] = max(found.get(a.phase, held), held, key=lambda columns: sum(columns.values()))
    return found, _line(small.numbers, large.numbers), large.kept


def _line(a: Part, b: Part) -> float:
    """Through both depths, at the whole model's."""
    return b.bytes + (b.bytes - a.bytes) / max(1, b.layers - a.layers) * (b.of - b.layers)


BATCH = {"pair sampling": "rl.rollout_batch", "rl rollout": "rl.rollout_batch"}
BATCH |= dict.fromkeys(("φ check", "rl eval", "eval"), "eval.batch")


def _changes(recipe: Recipe, phase: str) -> Iterator[tuple[dict[str, Any], float]]:
    """What could make a phase fit, the cheapest first, and the share of the batch that is left: a smaller batch; then
    activations made again, weights in 4 bits; all of it; at last half the length."""
    stage = {"sft": "sft", "train-rm": "train_rm"}.get(phase, "rl")
    key = BATCH.get(phase, f"{stage}.micro_batch_tokens")
    now: int = getattr(getattr(recipe, key.partition(".")[0]), key.partition(".")[2])
    least = 1 if phase in BATCH else min(now, getattr(recipe, stage).max_length)
    value, more = now, dict[str, Any]()
    while value > least:
        value = max(value // 2, least)
        yield {key: value}, value / now
    own = "reward_model" if phase == "train-rm" and isinstance(recipe.reward_model, RewardModel) else "model"
    if phase not in BATCH and not getattr(recipe, own).gradient_checkpointing:
        more[f"{own}.gradient_checkpointing"] = True
        yield dict(more), 1.0
    for name, base in (("model", recipe.model), ("reward_model", recipe.reward_model)):
        plain = isinstance(base, Weights) and base.quantization == "none" and base.lora is not None
        if plain and recipe.model.init is None:
            more[f"{name}.quantization"] = "nf4"
            yield dict(more), 1.0
    yield {key: least} | more, least / now
    half = {"rl.max_new_tokens": longest_response(recipe) // 2, "rl.max_length": recipe.rl.max_length // 2}
    half |= {} if stage == "rl" else {f"{stage}.max_length": getattr(recipe, stage).max_length // 2}
    yield {key: least} | more | half, least / now / 2


def cheapest(
    recipe: Recipe, stage: str, phase: str, held: dict[str, float], room: float, on_card: bool, prompt: int | None
) -> str | None:
    """The first of ``_changes`` with which the phase fits, as --set."""
    fixed = sum(held[column] for column in ("weights", "adapters", "optimiser"))
    for change, share in _changes(recipe, phase):
        if "quantization" not in str(change) and fixed + (sum(held.values()) - fixed) * share > room:
            continue  # not even if all else shrank with the batch
        sets = [f"{key}={str(value).lower()}" for key, value in change.items()]
        other = overridden(recipe.model_dump(mode="json"), sets, None, lambda text: None, "plan")
        if sum(peaks(other, stage, on_card, prompt, phase)[0][phase].values()) <= room:
            return "--set " + " --set ".join(sets)
    return None


def work(recipe: Recipe) -> dict[str, dict[str, int | None]]:
    """By stage: ``updates``, ``responses`` to sample and the ``tokens`` of these at most; None: as many as the data."""
    rm, rl, longest, ev = recipe.train_rm, recipe.rl, longest_response(recipe), recipe.eval
    checked, drawn = _eval_sampling(recipe, 1).max_new_tokens, rl.prompts_per_step * rl.responses_per_prompt

    def updates(settings: Any, n: int | None) -> int | None:
        most = settings.max_steps or n and settings.epochs * n / settings.batch_size
        return most and math.ceil(most)

    def row(updates: int | None, responses: int | None, longest: int, also: int = 0) -> dict[str, int | None]:
        tokens = None if responses is None else responses * longest + also * checked
        return {"updates": updates, "responses": None if responses is None else responses + also, "tokens": tokens}

    pairs = rm.prompts if recipe.data.preferences == "sampled" else None
    most = pairs and math.floor(pairs * rm.pairs_per_prompt * (1 - rm.held_out))
    asked = 0 if recipe.data.preferences != "sampled" else pairs and pairs * rm.samples_per_prompt
    looks = rl.steps // rl.eval_every if rl.eval_every else 0
    passes = (ev.seeds if ev.temperature else 1) * ev.samples * (len(recipe.stages) + (recipe.model.init is None))
    known = {
        "sft": row(updates(recipe.sft, recipe.sft.examples), 0, 0),
        "rm": row(updates(rm, most), asked, longest, 2 * rm.check_items),
        "rl": row(rl.steps * rl.inner_epochs * -(-drawn // rl.minibatch), rl.steps * drawn, longest,
                  looks * rl.eval_items),
        "eval": row(0, ev.items and ev.items * passes, checked),
    }  # fmt: skip
    return {name: known[name] for name in _stages(recipe)}


def _stages(recipe: Recipe) -> list[str]:
    return ["rl" if stage == recipe.rl.stage else stage for stage in recipe.stages] + ["eval"]


def measured(runs: Path, name: str) -> dict[str, float] | None:
    """Of an earlier run's rl stages: tokens sampled a second (``rate``), tokens of a ``response``, seconds of score and
    update a response token (``learning``)."""
    logs = [row for file in sorted((runs / name).glob("rl-*/metrics.jsonl")) for row in read_log(file)]
    logs = [row for row in logs if row.get("seconds", {}).get("rollout") and row.get("mean_response_tokens")]
    if not logs:
        return None
    tokens = sum(row["response_tokens"] for row in logs)
    learning = sum(row["seconds"].get(phase, 0.0) for row in logs for phase in ("score", "update"))
    rate = tokens / sum(row["seconds"]["rollout"] for row in logs)
    return {"rate": rate, "response": fmean(row["mean_response_tokens"] for row in logs), "learning": learning / tokens}


def plan(
    recipe: Recipe, gpu: str | None, rate: float | None, prompt: int | None, runs: Path, console: Console, as_json: bool
) -> None:
    """Prints it, or for machines one JSON object with bytes, hours and what does not fit."""
    on_card = gpu is not None or recipe.device != "cpu"
    if gpu is not None:
        try:
            memory, what = float(size_in_bytes(gpu)), f"--gpu {gpu}"
        except ValueError as e:
            raise UsageError(f"--gpu: {e}") from e
    elif not on_card:
        memory, what = float(psutil.virtual_memory().total), "device: cpu, this machine's memory"
    elif torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory, what = float(properties.total_memory), properties.name
    else:
        memory, what = 12.0 * GIB, "no card here: 12 GiB unless --gpu says otherwise"
    room = memory - RESERVE
    phases, trained, changes = dict[str, Any](), dict[str, float](), dict[str, str | None]()
    kept, tasks = 0.0, dict[str, dict[str, Any]](work(recipe))
    drawn = recipe.rl.prompts_per_step * recipe.rl.responses_per_prompt * longest_response(recipe)
    for stage in tasks:
        console.note(f"looking at {stage}") if not as_json else None
        found, numbers, a_token = peaks(recipe, stage, on_card, prompt)
        if stage != "eval":
            trained[stage], kept = numbers, kept or a_token * drawn
        for phase, held in found.items():
            held["kept"] = kept if stage == "rl" and not on_card else 0.0  # there the host is the device
            phases[phase] = held
            if sum(held.values()) > room:
                changes[phase] = cheapest(recipe, stage, phase, held, room, on_card, prompt)
    once = measured(runs, recipe.name)
    rate = rate or (once["rate"] if once else None)
    for stage, row in tasks.items():
        tokens = row["tokens"]
        likely = once["response"] * row["responses"] if once and row["responses"] else tokens
        learning = (
            once["learning"] * recipe.rl.steps * drawn / longest_response(recipe) * once["response"] if once else 0
        )
        seconds = None if likely is None or not rate else likely / rate + (learning if stage == "rl" else 0)
        tasks[stage] = row | {"hours": None if seconds is None else seconds / 3600}
    digits = 2 + len(str(recipe.model.init and 260 or load_config(recipe.model).get_text_config().vocab_size))
    disk = {stage: 4.0 * n * (1 + 3 * 3) for stage, n in trained.items()}  # adapter; of three checkpoints: AdamW's too
    disk["responses"] = digits * (3.0 * drawn + ((tasks.get("rm") or {}).get("tokens") or 0))
    host = kept + max(12.0 * n for n in trained.values())
    facts = {"memory": memory, "reserve": RESERVE, "on": what, "phases": phases, "changes": changes, "host": host}
    facts |= {"disk": disk, "work": tasks, "rate": rate, "fits": not changes}
    if as_json:
        return console.emit(facts)
    show(facts, console, once)


def show(facts: dict[str, Any], console: Console, once: dict[str, float] | None) -> None:
    room, phases = facts["memory"] - facts["reserve"], facts["phases"]
    columns = [*COLUMNS, *(["kept"] if any(held["kept"] for held in phases.values()) else [])]
    lines = []
    for phase, held in phases.items():
        total = sum(held.values())
        verdict = "yes" if total <= room else "no"
        lines.append([phase, *(f"{held[column] / GIB:.2f}" for column in columns), f"{total / GIB:.2f}", verdict])
    title = f"GiB at each phase's peak; room {room / GIB:.2f} = {facts['memory'] / GIB:.2f} ({facts['on']}) less "
    console.table(
        f"{title}{facts['reserve'] / GIB:.1f} reserved",
        ["phase", *(HEADS.get(column, column) for column in columns), "sum", "fits"],
        lines,
    )
    for phase, change in facts["changes"].items():
        console.note(f"{phase}: {change or 'no change of the recipe was found that makes it fit: a smaller model'}")
    disk = ", ".join(f"{name} {size / GIB:.2f}" for name, size in facts["disk"].items())
    console.note(f"host memory besides the process: {facts['host'] / GIB:.2f} GiB. Disk at most, GiB: {disk}")
    rows = []
    for stage, row in facts["work"].items():
        cells = ("as the data" if row[key] is None else str(row[key]) for key in ("updates", "responses", "tokens"))
        rows.append([stage, *cells, "" if row["hours"] is None else f"{row['hours']:.2f}"])
    console.table("work", ["stage", "updates", "responses", "tokens sampled, at most", "hours"], rows)
    if once is not None:
        at = f"hours at {facts['rate']:.0f} tokens/s and {once['response']:.0f} tokens a response"
        console.note(f"{at}, as in an earlier run; score and update as there; other updates are not in it")
    elif facts["rate"]:
        console.note(f"hours of sampling alone, at {facts['rate']:.0f} tokens/s, every response at its longest")
    else:
        console.note("no rate known: give --rate, tokens sampled a second")
