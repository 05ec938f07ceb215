"""A stage on models without numbers: fake tensors, bases cut down to a few layers, a card that is stood in for."""

from __future__ import annotations

import contextlib
import copy
import gc
import tempfile
import weakref
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
from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.models.loading import base_dtype, language_model_class, load_config
from lco_lite.objectives import chunks, head
from lco_lite.plan.counting import CARD, LiveBytes, Moment, Part, standing_in
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import Training, Weights
from lco_lite.run import Run, StageFolder
from lco_lite.train.training import StageTraining

PAGED_FROM = 100_000  # numbers of a weight whose moments bitsandbytes pages out; smaller ones stay on the card


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
        with self.trial.part("adapters", self.depth, self.parts), stay, self.trial.device:
            super()._attach(name, config)


@dataclass
class Trial:
    """A stage of the recipe at one depth, with the models that its own code opens."""

    recipe: Recipe
    on_card: bool
    deep: bool  # the larger of the two depths
    prompt: int | None = None  # tokens of the longest; None: what the recipe lets in
    only: str | None = None  # the phase that is looked at
    models: list[weakref.ref[Shapes]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)  # that belong to no model
    moments: list[Moment] = field(default_factory=list)
    trained: tuple[int, int] = (1, 1)
    numbers: Part = Part("trained", 0, 1, 1)
    paged: Part = Part("paged", 0, 1, 1)  # of the optimiser, in host memory
    kept: float = 0.0  # bytes a response token that stay on the host until the phase ends

    def __post_init__(self) -> None:
        self.device = torch.device(CARD if self.on_card else "cpu")
        self.live = LiveBytes(self.device.type)

    def run(self, stage: Callable[[Trial], None]) -> Trial:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.ctx = Context(Run(folder), self.recipe, Console(quiet=True), self.device)
            stack.enter_context(standing_in(weights, "_load", self._load))
            for what in ("converted_gguf", "build_scratch", "check_same_tokenizer"):
                stack.enter_context(standing_in(weights, what, lambda *a, **kw: None))
            stack.enter_context(
                standing_in(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *a, **kw: None)
            )
            if self.on_card:
                stack.enter_context(standing_in(torch.cuda, "get_device_capability", lambda device: (8, 0)))
                stack.enter_context(standing_in(torch, "autocast", lambda *a, **kw: contextlib.nullcontext()))
                stack.enter_context(standing_in(torch.nn.functional, "scaled_dot_product_attention", _attention_on_cuda))
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
        with self.part("weights", (layers, of), made), self.device:
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

    def looks_at(self, *phases: str) -> bool:
        return self.only is None or self.only in phases

    def training(self, role: Role, parameters: Any, settings: Training) -> StageTraining:
        """Its optimiser as it is after the first update, and 32-bit masters of 16-bit weights."""
        assert isinstance(role.model, Shapes)
        self.trained = role.model.depth
        self.numbers = Part("trained", sum(p.numel() for _, p in parameters), *self.trained)
        with self.part("optimiser", self.trained, self.parts):
            training = StageTraining(self.ctx, StageFolder(self.ctx.run.path / "none"), parameters, settings, 1, 1)
            masters = list(training.masters.values())
            if settings.optimizer == "adamw":
                moments = iter(training.states_to_come())
                for p in masters:
                    state = {"step": torch.zeros((), device="cpu"), "exp_avg": next(moments)}
                    training.adamw.state[p] = state | {"exp_avg_sq": next(moments)}
                for group in training.adamw.param_groups:
                    group["foreach"] = self.on_card
            else:  # its kernels work in place
                pages = self.on_card and settings.optimizer.startswith("paged")
                host = [p for p in masters if pages and p.numel() >= PAGED_FROM]
                self.paged = Part("paged", 2.0 * sum(p.numel() for p in host), *self.trained)
                there = [p for p in masters if not pages or p.numel() < PAGED_FROM]
                self.moments_in_8_bits = [torch.empty_like(p, dtype=torch.uint8) for p in there for _ in range(2)]
                training.adamw.step = lambda *a, **kw: None  # type: ignore[method-assign]
        return training

    def train(self, phase: str, training: StageTraining, accumulate: Callable[[], Any]) -> None:
        """An update after the first: forward and backward, then the optimiser's step."""
        if not self.looks_at(phase):
            return
        with self.moment(phase, self.trained) as more:
            accumulate()
            weights = {id(p): p for p in (*training.parameters.values(), *training.masters.values())}
            gradients = sum(p.grad.nbytes for p in weights.values() if p.grad is not None)
            more.append(Part("optimiser", gradients, *self.trained))
        with self.moment(phase, self.trained):
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
