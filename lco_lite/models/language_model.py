"""A causal language model with its tokenizer, its head, and named LoRA adapters on one base.

What the losses rest on is proved when a model is opened: that its logits are those of ``Head``, and that padding on the
left changes nothing.
"""

import contextlib
import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.nn import Linear, Module, Parameter
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from lco_lite.errors import ModelError
from lco_lite.files import write_folder
from lco_lite.finite import not_finite_in, rows_not_finite
from lco_lite.models.residency import FrozenWeights
from lco_lite.objectives.head import Head
from lco_lite.recipe.sections import Lora
from lco_lite.run import base_name
from lco_lite.sequences import Batch
from lco_lite.user_code import bounded

MOST_RANK = 2**16  # of an adapter: no weight is as wide
PATTERN_SECONDS = 5  # for all modules; the longest took milliseconds


class LanguageModel:
    """One base in memory, any number of adapters on it, one or none of them active.

    ``head`` is the LM head as the losses see it; ``eos_ids`` end a response; ``max_length`` is the context window in
    tokens. ``checkpointing`` recomputes activations during updates, and only there: rollouts keep a KV cache;
    "offload": what they are recomputed from waits on the host. ``frozen``: the base's weights come and go.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        checkpointing: bool | str = False,
        frozen: Callable[[PreTrainedModel, Module, list[Module]], FrozenWeights] | None = None,
    ) -> None:
        self.base, self.tokenizer, self.checkpointing = base, tokenizer, checkpointing
        self.config = base.config.get_text_config()
        self.decoder = decoder_of(base)
        self.frozen = None if frozen is None else frozen(base, self.decoder, self._blocks())
        self.head = head_of(base, known_tokens(tokenizer))
        with self.on_device():
            self._prove()
        self._linear = linear_layers(base)  # asked before any adapter wraps them
        # bitsandbytes rounds these otherwise in train mode, and scores would not be those of the first update
        self._int8 = [m for m in base.modules() if type(m).__name__ == "Linear8bitLt"]
        self.active: str | None = None
        self._peft: Any = None  # a PeftModel around the base, once there is an adapter
        self._trained: str | None = None

    def _prove(self) -> None:
        prove_head(self.base, self.head)
        prove_padding(self)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def eos_ids(self) -> set[int]:
        ids = self.base.generation_config.eos_token_id
        listed = ids if isinstance(ids, list) else [ids]
        return {i for i in [*listed, self.tokenizer.eos_token_id] if i is not None}

    @property
    def max_length(self) -> int:
        return int(getattr(self.config, "max_position_embeddings", 0) or self.tokenizer.model_max_length)

    @property
    def is_streamed(self) -> bool:
        return self.frozen is not None and self.frozen.streamed

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L], [B, L] -> [B, L, d]: what the LM head receives. Positions count from each row's first real token."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        out = self.decoder(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        return out.last_hidden_state

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """All that computes with the base does so in here, or in ``use``; several models may be there together."""
        with contextlib.nullcontext() if self.frozen is None else self.frozen.held():
            yield

    def add_adapter(self, name: str, lora: Lora, seed: int) -> None:
        """A new adapter, equal to the base until it is trained; its weights depend on ``seed`` alone."""
        targets, exclude = adapted_layers(self._linear, lora)
        options: dict[str, Any] = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
        config = LoraConfig(target_modules=targets, exclude_modules=exclude, task_type="CAUSAL_LM", **options)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._attach(name, config)

    def load_adapter(self, name: str, folder: Path) -> None:
        """A PEFT adapter folder, frozen. Raises ModelError if it is damaged, no adapter, one of another base, or one
        with an LM head of its own."""
        file = folder / "adapter_model.safetensors"
        if not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: no adapter_config.json: a PEFT adapter folder is needed")
        if not file.is_file():
            raise ModelError(f"{file}: missing; an adapter is read from safetensors only")
        try:
            state = load_file(file)
            if (wrong := not_finite_in(state)) is not None:
                raise ModelError(f"{file}: {wrong} is not finite: the adapter is damaged")
            config = self._config_of_adapter(folder)
            config.base_model_name_or_path = None  # PEFT warns where the base has another name
            plain = self.base.get_output_embeddings()
            self._attach(name, config)
            if (own := self.base.get_output_embeddings()) is not plain:  # what samples would have it, losses not
                fields = (field for kind, field in _WRAPS.items() if isinstance(own, kind))
                raise ModelError(
                    f"{folder / 'adapter_config.json'}: {next(fields, 'it')} changes the LM head: adapters of other "
                    "layers are accepted, for losses and scores have the base's head"
                )
            result: Any = set_peft_model_state_dict(self._peft, state, adapter_name=name)
        except SafetensorError as e:
            raise ModelError(f"{file}: damaged: {e}") from e
        except (RuntimeError, ValueError, TypeError) as e:
            raise ModelError(f"{folder}: this adapter is of another base: {' '.join(str(e).split())[:400]}") from e
        missing = [key for key in result.missing_keys if f".{name}." in key]
        homeless = list(result.unexpected_keys)
        if missing or homeless:
            raise ModelError(
                f"{folder}: this adapter is of another base: {len(missing)} of its weights are missing and "
                f"{len(homeless)} find no place, e.g. {(missing or homeless)[0]}"
            )

    def _config_of_adapter(self, folder: Path) -> LoraConfig:
        """Raises ModelError for one that is not LoRA's, and for a pattern of modules that takes for ever."""
        file = folder / "adapter_config.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise ModelError(f"{file}: damaged: {e}") from e
        kind = found.get("peft_type") if isinstance(found, dict) else found
        if kind != "LORA":
            raise ModelError(f"{file}: peft_type LORA is needed, found {kind!r:.80}")
        try:
            if wrong := _wrong_in_adapter(found):
                raise ModelError(f"{file}: {wrong}")
            config = LoraConfig.from_pretrained(str(folder))
            patterns = [config.target_modules, config.exclude_modules, *(config.rank_pattern or {})]
            patterns += config.alpha_pattern or {}
            with bounded(PATTERN_SECONDS):
                for pattern in patterns:
                    for name, _ in self._peft.named_modules() if isinstance(pattern, str) else ():
                        re.fullmatch(pattern, name)
        except TimeoutError as e:
            raise ModelError(
                f"{file}: a pattern of module names takes over {PATTERN_SECONDS} s: name the modules"
            ) from e
        except (re.error, TypeError, ValueError, AttributeError) as e:
            raise ModelError(f"{file}: damaged: {' '.join(str(e).split())[:400]}") from e
        return config

    def copy_adapter(self, source: str, name: str) -> None:
        """A second adapter with the weights of the first."""
        self._attach(name, copy.deepcopy(self._peft.peft_config[source]))
        set_peft_model_state_dict(self._peft, self.adapter_state(source), adapter_name=name)

    def activate(self, name: str | None) -> None:
        """Switches exactly this adapter on, or none; which weights are trained stays as it was."""
        self.active = name
        if self._peft is None:
            return
        tuner = self._peft.base_model
        if name is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(name, inference_mode=True)
        for key, parameter in self._adapter_parameters():
            parameter.requires_grad_(self._trained is not None and f".{self._trained}." in key)

    @contextlib.contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """``on_device`` with this adapter, or none, active."""
        before = self.active
        if name != before:
            self.activate(name)
        try:
            with self.on_device():
                yield
        finally:
            if name != before:
                self.activate(before)

    def trainable(self, name: str) -> list[tuple[str, Parameter]]:
        """Marks this adapter's weights, and nothing else, as trained; returns them by name."""
        self._trained = name
        self.base.requires_grad_(False)
        self.activate(name)
        return [(key, p) for key, p in self._adapter_parameters() if p.requires_grad]

    def trainable_full(self, freeze_head: bool) -> list[tuple[str, Parameter]]:
        """Marks the base's weights as trained; ``freeze_head``: all but the LM head and the embeddings tied to it."""
        self.base.requires_grad_(True)
        if freeze_head:
            self.base.get_output_embeddings().requires_grad_(False)
        trained = [(key, p) for key, p in self.base.named_parameters() if p.requires_grad]
        if self.frozen is not None:
            self.frozen.exclude(p for _, p in trained)
        return trained

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Weights by PEFT's portable names, copied."""
        state = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        return {key: value.detach().clone() for key, value in state.items()}

    def rank(self, name: str) -> int:
        """Of an adapter's update; the largest where modules have different ones."""
        config = self._peft.peft_config[name]
        return max(config.r, *(config.rank_pattern or {"": 0}).values())

    def save_adapter(self, name: str, folder: Path, run: Path | None = None) -> None:
        """A plain PEFT folder, whole or not at all: ``PeftModel.from_pretrained(base, folder)`` loads it. Its README.md
        says so where the base was quantised. In a ``run`` tokenizer and template lie beside it, and a base of the same
        run is named by its path from here, so that the run can be moved."""
        state = {key: value.cpu().contiguous() for key, value in self.adapter_state(name).items()}
        config = copy.deepcopy(self._peft.peft_config[name])
        config.inference_mode = True
        config.base_model_name_or_path = base_name(self.base.config._name_or_path, folder, run)
        with write_folder(folder) as new:
            if run is not None:
                self.tokenizer.save_pretrained(new)
            save_file(state, new / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(str(new))
            if getattr(self.base, "is_quantized", False):
                stored = "NF4" if getattr(self.base, "is_loaded_in_4bit", False) else "LLM.int8"
                (new / "README.md").write_text(_OF_QUANTISED_BASE.format(stored=stored), encoding="utf-8")

    def merge(self, name: str, each: Callable[[int, int], object] = lambda done, total: None) -> PreTrainedModel:
        """The base with this adapter in its weights, of which no other use is left: computed in fp32, rounded once to
        the base's dtype. ``each`` is told how many layers are done, of how many. Raises ModelError where an adapter's
        weights are not finite."""
        layers = [layer for layer in self.base.modules() if isinstance(layer, LoraLayer)]
        for done, layer in enumerate(layers, 1):
            weight = layer.get_base_layer().weight
            assert isinstance(weight, Tensor)
            dtype = weight.dtype
            layer.float()
            try:
                layer.merge(safe_merge=True, adapter_names=[name])
            except ValueError as e:
                raise ModelError(f"adapter {name}: its weights are not finite: it cannot be merged") from e
            layer.get_base_layer().to(dtype)
            each(done, len(layers))
        return self._peft.base_model.unload()

    def save_full(self, folder: Path, masters: Mapping[str, Tensor]) -> None:
        """Model and tokenizer as an ordinary folder, whole or not at all; a weight with a master is saved as that."""
        wide = {id(p): masters[name] for name, p in self.base.named_parameters() if name in masters}
        state = {key: wide.get(id(p), p).detach() for key, p in self.base.state_dict(keep_vars=True).items()}
        with self.on_device(), write_folder(folder) as new:
            self.base.save_pretrained(new, state_dict=state)
            self.tokenizer.save_pretrained(new)

    @contextlib.contextmanager
    def training_mode(self, dropout: bool = False) -> Iterator[None]:
        """With ``checkpointing``, activations are recomputed. ``dropout``: as configured, the base's own too; without,
        an update sees the very function that scores. Both end with the block."""
        if dropout:
            self.base.train()
            for frozen in self._int8:
                frozen.eval()
        with self.on_device(), contextlib.ExitStack() as recomputed:
            for block in self._blocks() if self.checkpointing else []:
                recomputed.enter_context(_recomputed(block, self._kept))
            try:
                yield
            finally:
                self.base.eval()

    def _kept(self) -> contextlib.AbstractContextManager[Any]:
        """Where a block's input waits for the backward pass."""
        if self.checkpointing != "offload":
            return contextlib.nullcontext()
        return save_on_cpu(pin_memory=self.device.type == "cuda")

    def _blocks(self) -> list[torch.nn.Module]:
        """The decoder's transformer blocks; of code that came with the weights its largest list of modules."""
        blocks: list[torch.nn.Module] = [m for m in self.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        lists = [list(m) for m in self.decoder.modules() if isinstance(m, torch.nn.ModuleList)]
        # by weights: experts may be more than blocks, and lie inside of them
        return blocks or max(lists, key=lambda each: sum(p.numel() for m in each for p in m.parameters()), default=[])

    def _attach(self, name: str, config: LoraConfig) -> None:
        if self._peft is None:
            self._peft = get_peft_model(self.base, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)
        self.base.eval()  # a new adapter comes in train mode, with its dropout on
        self.activate(self.active)

    def _adapter_parameters(self) -> list[tuple[str, Parameter]]:
        return [(key, p) for key, p in self._peft.named_parameters() if ".lora_" in key]


def linear_layers(base: PreTrainedModel) -> dict[str, bool]:
    """Name of each linear layer -> is it part of the language model, and not its head."""
    inside = set(decoder_of(base).modules()) - {base.get_output_embeddings()}
    return {name: m in inside for name, m in base.named_modules() if isinstance(m, Linear)}


def adapted_layers(linear: Mapping[str, bool], lora: Lora) -> tuple[list[str], list[str]]:
    """(ends of the names of the ``linear`` layers to adapt, whole names outside the decoder that end so too). Raises
    ModelError for a target that the decoder has not, as PEFT takes it: whole parts of a name."""
    known = sorted({name.rpartition(".")[2] for name, within in linear.items() if within})
    targets = known if lora.targets == "all-linear" else list(lora.targets)
    inside = [f".{name}" for name, within in linear.items() if within]
    unknown = [target for target in targets if not any(name.endswith(f".{target}") for name in inside)]
    if unknown or not targets:
        named = ", ".join(f"{target:.80}" for target in unknown[:9])
        raise ModelError(f"lora.targets: no linear layer named {named}; there are: {', '.join(known)}")
    ends = tuple(f".{target}" for target in targets)
    return targets, [n for n, within in linear.items() if not within and f".{n}".endswith(ends)]


@dataclass(frozen=True)
class Role:
    """``adapter`` None is the base alone. Policy and reward model may be two adapters on one base."""

    model: LanguageModel
    adapter: str | None = None

    def hidden(self, batch: Batch) -> Tensor:
        """[T, d]: final hidden states that predict the batch's response tokens."""
        batch = batch.to(self.model.device)
        with self.model.use(self.adapter):
            return batch.select(self.model.hidden_states(batch.input_ids, batch.attention_mask))


@contextlib.contextmanager
def together(*roles: Role | None) -> Iterator[None]:
    """Their bases are all on the device, for what asks them in turn."""
    with contextlib.ExitStack() as stack:
        for role in roles:
            if role is not None:
                stack.enter_context(role.model.on_device())
        yield


@contextlib.contextmanager
def _recomputed(block: torch.nn.Module, kept: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """The block's activations are made again in the backward pass, from its input in ``kept``. Transformers' own way
    does that in train mode only, which brings dropout along."""
    own = vars(block).pop("forward", None)  # a hook's
    run = own or block.forward

    def forward(*args: Any, **kw: Any) -> Any:
        with kept():
            return checkpoint(run, *args, use_reentrant=False, **kw)

    vars(block)["forward"] = forward
    try:
        yield
    finally:
        del vars(block)["forward"]
        if own is not None:
            vars(block)["forward"] = own


def decoder_of(base: PreTrainedModel) -> torch.nn.Module:
    """The module from token ids to final hidden states; inside a multimodal wrapper its language model."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if decoder is None or decoder is base:
        raise ModelError(f"{type(base).__name__} has no decoder to take hidden states from: it is not supported")
    return decoder


# what PEFT puts around a module, and by which field of adapter_config.json
_WRAPS = {LoraLayer: "target_modules", ModulesToSaveWrapper: "modules_to_save"}
_WRAPS |= {TrainableTokensWrapper: "trainable_token_indices"}

_OF_QUANTISED_BASE = """\
This adapter was trained on its base in {stored} (bitsandbytes). On the full-precision base it answers otherwise: \
load the base in {stored}, or score the adapter again where it will run.
"""

# relative, of logits; bfloat16's rounding may differ by some percent from one shape of batch to another
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def known_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows of a head are tokens; those behind them pad it."""
    return max(tokenizer.get_vocab().values()) + 1


def head_of(base: PreTrainedModel, vocabulary: int | None = None) -> Head:
    """The head as weight, bias, scale and soft-cap, as its config has them: ``prove_head`` says whether that is all.
    Rows past ``vocabulary`` tokens pad the matrix and are left out. Raises ModelError where there is none."""
    name, module = type(base).__name__, base.get_output_embeddings()
    if module is None or getattr(module, "weight", None) is None:
        raise ModelError(f"{name} has no LM head: a causal language model is needed")
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    if scale is None:
        scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    bias, softcap = getattr(module, "bias", None), getattr(config, "final_logit_softcapping", None)
    rows = min(vocabulary or len(module.weight), len(module.weight))
    return Head(module.weight, bias, scale=float(scale), softcap=softcap, rows=rows)


def _wrong_in_adapter(config: Mapping[str, Any]) -> str | None:
    """The first field of an ``adapter_config.json`` that PEFT takes and cannot use, with what is accepted."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    def rank(value: Any) -> bool:
        return number(value) and value == int(value) and 1 <= value <= MOST_RANK

    def names(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))

    def each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))

    accepted = {
        "r": (rank, f"a whole number from 1 to {MOST_RANK:,}"),
        "lora_alpha": (number, "a finite number"),
        "target_modules": (names, "a pattern or a list of names"),
        "exclude_modules": (lambda value: value is None or names(value), "a pattern or a list of names"),
        "rank_pattern": (each(rank), "whole numbers by pattern"),
        "alpha_pattern": (each(number), "finite numbers by pattern"),
    }
    for name, (fits, wanted) in accepted.items():
        if name in config and not fits(config[name]):
            return f"{name}: {wanted} is needed, found {config[name]!r:.80}"
    return None


@torch.no_grad()
def prove_head(base: PreTrainedModel, head: Head) -> None:
    """Raises ModelError naming the architecture where the head does anything else to its hidden states: what is not
    proved by a forward pass is not used."""
    name = type(base).__name__
    ids = torch.tensor([[1, 2, 3]], device=head.weight.device)
    try:
        logits = base(input_ids=ids, use_cache=False).logits[0].float()  # [3, >= V]
        hidden = decoder_of(base)(input_ids=ids, use_cache=False).last_hidden_state[0]  # [3, d]
    except (TypeError, ValueError, AttributeError) as e:
        raise ModelError(f"{name}: does not take token ids alone to logits ({e}): it is not supported") from e
    if rows_not_finite(hidden) is not None:
        raise ModelError(f"{base.name_or_path or name}: its hidden states are not finite: a weight of it is damaged")
    error = _difference(head.logits(hidden).float(), logits[:, : head.rows])
    if not error < TOLERANCE.get(hidden.dtype, 3e-2):
        raise ModelError(
            f"{name}: its logits are not scale · (W·h + b), soft-capped or not (relative error "
            f"{error:.1e}): this architecture's head is not supported"
        )


@torch.no_grad()
def prove_padding(model: LanguageModel) -> None:
    """Raises ModelError naming the architecture where padding on the left, which rollouts need, changes its hidden
    states."""
    ids, mask = torch.tensor([[[0, 0, 1, 2, 3]], [[0, 0, 1, 1, 1]]], device=model.device)
    plain, padded = model.hidden_states(ids[:, 2:], mask[:, 2:])[0], model.hidden_states(ids, mask)[0, 2:]  # [3, d]
    error = _difference(padded.float(), plain.float())
    if not error < 10 * TOLERANCE.get(plain.dtype, 3e-2):
        raise ModelError(
            f"{type(model.base).__name__}: padding on the left changes its hidden states (relative error {error:.1e}): "
            "this architecture is not supported"
        )


def _difference(tensor: Tensor, expected: Tensor) -> float:
    return ((tensor - expected).norm() / expected.norm()).item()
