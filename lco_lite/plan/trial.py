"""A stage on models without numbers: fake tensors, bases cut down to a few layers, a card that is stood in for."""

from __future__ import annotations

import contextlib
import copy
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from lco_lite import weights
from lco_lite.console import Console
from lco_lite.context import Context
from lco_lite.errors import UsageError
from lco_lite.models import language_model, residency
from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.models.loading import base_dtype, language_model_class, load_config
from lco_lite.objectives import chunks, head
from lco_lite.plan.counting import CARD, LiveBytes, Tag, standing_in
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import Training, Weights
from lco_lite.run import Run, StageFolder
from lco_lite.train.training import SMALLEST_PAGED, StageTraining


class Shapes(LanguageModel):
    """A model without numbers, so that there is nothing to prove or to load."""

    def __init__(self, base: Any, tokenizer: Any, checkpointing: Any, frozen: Any = None) -> None:
        self.trial, self.number, self.lora = base.planned
        super().__init__(base, tokenizer, checkpointing, frozen)

    def _prove(self) -> None: ...

    def load_adapter(self, name: str, folder: Path) -> None:
        assert self.lora is not None
        self.add_adapter(name, self.lora, 0)

    def copy_adapter(self, source: str, name: str) -> None:
        self.load_adapter(name, Path())

    def trainable_full(self, freeze_head: bool) -> list[tuple[str, torch.nn.Parameter]]:
        with self.trial.live.tagged(Tag("weights", self.number)):  # each in memory of its own from here on
            return super().trainable_full(freeze_head)

    def _attach(self, name: str, config: Any) -> None:
        stay = standing_in(torch.nn.Module, "to", lambda module, *a, **kw: module)  # fakes cannot be swapped
        with self.trial.live.tagged(Tag("adapters", self.number)), stay, self.trial.device:
            super()._attach(name, config)


@dataclass(frozen=True)
class Moment:
    """A phase's peak, by what makes it up, on the device and, of a card, in host memory."""

    phase: str
    here: dict[Tag, float]
    host: dict[Tag, float]


@dataclass
class Trial:
    """A stage of the recipe at one depth, with the models that its own code opens."""

    recipe: Recipe
    on_card: bool
    deep: bool  # the larger of the two depths
    prompt: int | None = None  # tokens of the longest; None: what the recipe lets in
    only: str | None = None  # the phase that is looked at
    depths: list[tuple[int, int]] = field(default_factory=list)  # of each model: its layers here, and really
    moments: list[Moment] = field(default_factory=list)
    trained: int = 0  # the model
    numbers: int = 0  # that are trained
    kept: float = 0.0  # bytes a response token that stay on the host until the phase ends

    def __post_init__(self) -> None:
        self.device = torch.device(CARD if self.on_card else "cpu")
        self.live = LiveBytes(self.device.type)

    def run(self, stage: Callable[[Trial], None]) -> Trial:
        recipe = self.recipe
        if self.on_card and recipe.residency == "auto":
            recipe = recipe.model_copy(update={"residency": "phase"})
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.ctx = Context(Run(folder), recipe, Console(quiet=True), self.device)
            for what in ("converted_gguf", "build_scratch", "check_same_tokenizer"):
                stack.enter_context(standing_in(weights, what, lambda *a, **kw: None))
            for owner, name, value in (*self._unloaded(), *(self._card() if self.on_card else ())):
                stack.enter_context(standing_in(owner, name, value))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(self.live)
            gc.collect()
            gc.freeze()  # what is there already is not looked through again
            stack.callback(gc.unfreeze)
            stage(self)
        return self

    def _unloaded(self) -> Iterator[tuple[Any, str, Any]]:
        """What would load weights makes them without numbers; bases that come and go are counted where they are."""
        yield weights, "load_base", self._base
        yield weights, "load_tokenizer", lambda settings, folder: self._tokenizer
        yield weights, "LanguageModel", Shapes
        yield weights, "reward_device", lambda asked, policy: policy  # on any machine; both models on one card
        yield language_model, "known_tokens", lambda tokenizer: 10**9
        yield BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *a, **kw: None
        yield torch.UntypedStorage, "resize_", self.live.resizing()
        yield residency, "PIECE", 2**62
        yield residency, "_look_up_on_host", self._look_up_on_host
        for name in ("leave", "come"):
            yield residency.Bundle, name, self._as_weights(getattr(residency.Bundle, name))

    _tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=0, model_max_length=2**30)

    def _card(self) -> Iterator[tuple[Any, str, Any]]:
        yield torch.cuda, "get_device_capability", lambda device: (8, 0)
        yield torch, "autocast", lambda *a, **kw: contextlib.nullcontext()
        yield torch.nn.functional, "scaled_dot_product_attention", _attention_on_cuda
        yield chunks, "chunk_size", _chunk_on_cuda
        yield head, "_unblocked_product", _product_on_cuda
        yield head.Head, "operand_dtype", torch.bfloat16

    def _base(self, settings: Weights, device: torch.device, folder: Path | None, on_host: bool = False) -> Any:
        if settings.quantization == "int8":
            raise UsageError("plan: what LLM.int8 takes depends on the numbers: it is not planned. nf4 and none are")
        config = copy.deepcopy(load_config(settings))
        text, period = config.get_text_config(), 2
        of = text.num_hidden_layers
        if types := getattr(text, "layer_types", None):
            period = next((p for p in range(2, of) if all(a == b for a, b in zip(types, types[p:]))), of)  # noqa: B905
        period *= 2 if on_host else 1  # what is streamed has its peak between its first blocks and its last
        layers = min(of, 2 * period if self.deep else period)
        text.num_hidden_layers = layers
        if types:
            text.layer_types = types[:layers]
        dtype = base_dtype(settings, torch.device("cuda" if self.on_card else "cpu"))
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": settings.trust_remote_code}
        if settings.attention in ("sdpa", "eager"):  # flash attention's memory is sdpa's
            options["attn_implementation"] = settings.attention
        self.depths.append((layers, of))
        number = len(self.depths) - 1
        with self.live.tagged(Tag("weights", number)), self.device:
            base = language_model_class(config).from_config(config, **options).requires_grad_(False).eval()
            if settings.quantization == "nf4":
                _quantise(base, dtype)
        self.live.vocabulary = min(self.live.vocabulary or 10**9, len(base.get_output_embeddings().weight))
        base.planned = self, number, settings.lora
        return base

    def _as_weights(self, own: Callable[[residency.Bundle], None]) -> Callable[[residency.Bundle], None]:
        """A bundle that moves: what it makes are weights still, of the same model."""

        def moved(bundle: residency.Bundle) -> None:
            with self.live.tagged(self.live.tag_of(bundle.tensors[0])):
                own(bundle)

        return moved

    def _look_up_on_host(self, embedding: Any, device: torch.device) -> None:
        weight = embedding.weight
        with self.live.tagged(self.live.tag_of(weight)):
            rows = torch.empty_like(weight, device="cpu")
            weight.data = torch.empty(0, dtype=rows.dtype, device=device)

        def forward(ids: Tensor) -> Tensor:
            return torch.empty(*ids.shape, rows.shape[1], dtype=rows.dtype, device=device)

        vars(embedding)["forward"] = forward

    @contextlib.contextmanager
    def moment(self, phase: str, model: int) -> Iterator[dict[str, float]]:
        """What lives at most in the block; it may tell how many bytes of the activations are something else."""
        told: dict[str, float] = {}
        with self.live.tagged(Tag("activations", model)):
            self.live.restart()
            yield told
        here: dict[Tag, float] = dict(self.live.here.at_peak)
        for column, size in told.items():
            here[Tag(column, model)] = here.get(Tag(column, model), 0) + size
            here[Tag("activations", model)] = here.get(Tag("activations", model), 0) - size
        self.moments.append(Moment(phase, here, dict(self.live.host.at_peak)))

    def looks_at(self, *phases: str) -> bool:
        return self.only is None or self.only in phases

    def training(self, role: Role, parameters: Any, settings: Training) -> StageTraining:
        """Its optimiser as it is after the first update, and 32-bit masters of 16-bit weights."""
        assert isinstance(role.model, Shapes)
        self.trained, self.numbers = role.model.number, sum(p.numel() for _, p in parameters)
        with self.live.tagged(Tag("optimiser", self.trained)):
            training = StageTraining(self.ctx, StageFolder(self.ctx.run.path / "none"), parameters, settings, 1, 1)
            masters = list(training.masters.values())
            if settings.optimizer == "adamw":
                moments = iter(training.states_to_come())
                for p in masters:
                    state = {"step": torch.zeros((), device="cpu"), "exp_avg": next(moments)}
                    training.adamw.state[p] = state | {"exp_avg_sq": next(moments)}
                for group in training.adamw.param_groups:
                    group["foreach"] = self.on_card
            else:  # in 8 bits, and its kernels work in place
                pages = self.on_card and settings.optimizer.startswith("paged")
                for p in masters:
                    where = "cpu" if pages and p.numel() >= SMALLEST_PAGED else self.device
                    training.adamw.state[p] = {n: torch.empty(p.shape, dtype=torch.uint8, device=where) for n in "mv"}
                training.adamw.step = lambda *a, **kw: None  # type: ignore
        return training

    def train(self, phase: str, training: StageTraining, accumulate: Callable[[], Any]) -> None:
        """An update after the first: forward and backward, then the optimiser's step."""
        if not self.looks_at(phase):
            return
        with self.moment(phase, self.trained) as told:
            accumulate()
            weights = {id(p): p for p in (*training.parameters.values(), *training.masters.values())}
            told["optimiser"] = gradients = sum(p.grad.nbytes for p in weights.values() if p.grad is not None)
        with self.moment(phase, self.trained) as told:
            told["optimiser"] = gradients
            training.update()


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


def _attention_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A kernel that keeps no scores; a mask of truths becomes one of numbers before it."""
    mask = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask is not None else None
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    made: Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
    return made
