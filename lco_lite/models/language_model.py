"""A causal language model with its tokenizer, its head, and named LoRA adapters on one base."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Linear, Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lco_lite.errors import ModelError
from lco_lite.files import write_folder
from lco_lite.objectives.head import Head
from lco_lite.recipe.sections import Lora
from lco_lite.sequences import Batch


class LanguageModel:
    """One base in memory, any number of adapters on it, one or none of them active.

    ``head`` is the LM head as the losses see it; ``eos_ids`` end a response; ``max_length`` is the context window in
    tokens. ``checkpointing`` recomputes activations during updates, and only there: it would switch off the KV cache.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpointing: bool = False) -> None:
        self.base, self.tokenizer, self.checkpointing = base, tokenizer, checkpointing
        self.config = base.config.get_text_config()
        self.decoder = decoder_of(base)
        self.head = inspect_head(base, max(tokenizer.get_vocab().values()) + 1)
        prove_padding(base, self.hidden_states)
        inside = set(self.decoder.modules()) - {base.get_output_embeddings()}
        # asked before any adapter wraps them: name -> is it part of the language model
        self._linear = {name: m in inside for name, m in base.named_modules() if isinstance(m, Linear)}
        # bitsandbytes rounds these otherwise in train mode, and scores would not be those of the first update
        self._int8 = [m for m in base.modules() if type(m).__name__ == "Linear8bitLt"]
        self.active: str | None = None
        self._peft: Any = None  # a PeftModel around the base, once there is an adapter
        self._trained: str | None = None

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

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L], [B, L] -> [B, L, d]: what the LM head receives. Positions count from each row's first real token."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        out = self.decoder(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        return out.last_hidden_state

    # adapters

    def add_adapter(self, name: str, lora: Lora, seed: int) -> None:
        """A new adapter, equal to the base until it is trained; its weights depend on ``seed`` alone."""
        targets, exclude = self._targets(lora)
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float is as good
            lora_dropout=lora.dropout,
            target_modules=targets,
            exclude_modules=exclude,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._attach(name, config)
        self.activate(self.active)

    def load_adapter(self, name: str, folder: Path) -> None:
        """A PEFT adapter folder, frozen. Raises ModelError where it is none, or one of another base."""
        if not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: no adapter_config.json: a PEFT adapter folder is needed")
        try:
            self._attach(name, LoraConfig.from_pretrained(str(folder)))
            state = _read_adapter(folder)
            result: Any = set_peft_model_state_dict(self._peft, state, adapter_name=name)
        except (RuntimeError, ValueError, TypeError) as e:
            raise ModelError(f"{folder}: this adapter is of another base: {' '.join(str(e).split())[:400]}") from e
        missing = [key for key in result.missing_keys if f".{name}." in key]
        homeless = list(result.unexpected_keys)
        if missing or homeless:
            raise ModelError(
                f"{folder}: this adapter is of another base: {len(missing)} of its weights are missing and "
                f"{len(homeless)} find no place, e.g. {(missing or homeless)[0]}"
            )
        self.activate(self.active)

    def copy_adapter(self, source: str, name: str) -> None:
        """A second adapter with the weights of the first."""
        assert self._peft is not None, f"there is no adapter {source!r} to copy"
        self._attach(name, copy.deepcopy(self._peft.peft_config[source]))
        self.load_adapter_state(name, self.adapter_state(source))
        self.activate(self.active)

    def activate(self, name: str | None) -> None:
        """Makes exactly this adapter work, or none; which weights are trained stays as it was."""
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
        """``activate`` for as long as the block takes."""
        before = self.active
        if name != before:
            self.activate(name)
        try:
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
        """Marks the base's weights as trained, without the LM head (and the embeddings tied to it) if so asked."""
        self.base.requires_grad_(True)
        if freeze_head:
            self.head.weight.requires_grad_(False)
            if self.head.bias is not None:
                self.head.bias.requires_grad_(False)
        return [(key, p) for key, p in self.base.named_parameters() if p.requires_grad]

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Weights by PEFT's portable names, copied."""
        assert self._peft is not None, f"there is no adapter {name!r}"
        state = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        return {key: value.detach().clone() for key, value in state.items()}

    def load_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        set_peft_model_state_dict(self._peft, state, adapter_name=name)

    def save_adapter(self, name: str, folder: Path) -> None:
        """A plain PEFT folder, whole or not at all: ``PeftModel.from_pretrained(base, folder)`` loads it."""
        state = {key: value.cpu().contiguous() for key, value in self.adapter_state(name).items()}
        assert self._peft is not None
        config = copy.deepcopy(self._peft.peft_config[name])
        config.inference_mode = True
        config.base_model_name_or_path = self.base.config._name_or_path
        with write_folder(folder) as new:
            save_file(state, new / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(str(new))

    def save_full(self, folder: Path) -> None:
        """Model and tokenizer as an ordinary folder, whole or not at all."""
        with write_folder(folder) as new:
            self.base.save_pretrained(new)
            self.tokenizer.save_pretrained(new)

    @contextlib.contextmanager
    def training_mode(self) -> Iterator[None]:
        """Dropout as configured and, where asked for, activations recomputed; both end with the block."""
        self.base.train()
        for frozen in self._int8:
            frozen.eval()
        if self.checkpointing:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            if self.checkpointing:
                self.base.gradient_checkpointing_disable()
            self.base.eval()

    def _attach(self, name: str, config: LoraConfig) -> None:
        if self._peft is None:
            self._peft = get_peft_model(self.base, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)

    def _adapter_parameters(self) -> list[tuple[str, Parameter]]:
        assert self._peft is not None
        return [(key, p) for key, p in self._peft.named_parameters() if ".lora_" in key]

    def _targets(self, lora: Lora) -> tuple[list[str], list[str]]:
        """(last parts of the names of the linear layers to adapt, whole names outside the decoder that share them)."""
        linear = self._linear
        known = sorted({name.rpartition(".")[2] for name, within in linear.items() if within})
        targets = known if lora.targets == "all-linear" else list(lora.targets)
        unknown = [target for target in targets if not any(name.endswith(target) for name in linear)]
        if unknown:
            raise ModelError(f"lora.targets: no linear layer named {', '.join(unknown)}; there are: {', '.join(known)}")
        return targets, [n for n, within in linear.items() if not within and n.rpartition(".")[2] in targets]


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{file}: missing; an adapter is read from safetensors only")
    try:
        return load_file(file)
    except SafetensorError as e:
        raise ModelError(f"{file}: damaged: {e}") from e


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


# relative, of logits; bfloat16's rounding may differ by some percent from one shape of batch to another
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def decoder_of(base: PreTrainedModel) -> torch.nn.Module:
    """The module from token ids to final hidden states; inside a multimodal wrapper its language model."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if decoder is None or decoder is base:
        raise ModelError(f"{type(base).__name__} has no decoder to take hidden states from: it is not supported")
    return decoder


def inspect_head(base: PreTrainedModel, vocabulary: int | None = None) -> Head:
    """The head as weight, bias, scale and soft-cap. Rows past ``vocabulary`` tokens pad the matrix and are left out.

    Raises ModelError naming the architecture where the head does anything else to its hidden states: what is not
    proved by a forward pass is not used.
    """
    module = base.get_output_embeddings()
    if module is None or getattr(module, "weight", None) is None:
        raise ModelError(f"{type(base).__name__} has no LM head: a causal language model is needed")
    config = base.config.get_text_config()
    head = Head(
        module.weight,
        getattr(module, "bias", None),
        scale=_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
        rows=min(vocabulary or module.weight.shape[0], module.weight.shape[0]),
    )
    _prove(base, head)
    return head


def check_same_tokenizer(policy: PreTrainedTokenizerBase, reward_model: PreTrainedTokenizerBase) -> None:
    """Raises ModelError unless the same ids mean the same tokens; one may have more of them at the end."""
    ours, theirs = ({i: t for t, i in tok.get_vocab().items()} for tok in (policy, reward_model))
    common = min(max(ours), max(theirs)) + 1
    differing = [i for i in range(common) if ours.get(i) != theirs.get(i)]
    if differing:
        i = differing[0]
        raise ModelError(
            f"policy and reward model have different tokenizers ({len(ours)} and {len(theirs)} tokens): "
            f"{len(differing)} ids differ, the first is {i}: {ours.get(i)!r} and {theirs.get(i)!r}. "
            "A reward model of the policy's family is needed."
        )


def _scale(config: Any) -> float:
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        return 1.0 / float(config.logits_scaling)
    return 1.0


@torch.no_grad()
def _prove(base: PreTrainedModel, head: Head) -> None:
    name, ids = type(base).__name__, torch.tensor([[1, 2, 3]], device=head.weight.device)
    try:
        logits = base(input_ids=ids, use_cache=False).logits[0].float()
        hidden = decoder_of(base)(input_ids=ids, use_cache=False).last_hidden_state[0]
    except (TypeError, ValueError, AttributeError) as e:
        raise ModelError(f"{name}: does not take token ids alone to logits ({e}): it is not supported") from e
    error = _difference(head.logits(hidden).float(), logits[:, : head.rows])
    if not error < _TOLERANCE.get(hidden.dtype, 3e-2):
        raise ModelError(
            f"{name}: its logits are not scale · (W·h + b), soft-capped or not (relative error "
            f"{error:.1e}): this architecture's head is not supported"
        )


@torch.no_grad()
def prove_padding(base: PreTrainedModel, hidden_states: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Raises ModelError naming the architecture where padding on the left, which rollouts need, changes
    ``hidden_states`` of (ids, mask)."""
    padded, mask = torch.tensor([[[0, 0, 1, 2, 3]], [[0, 0, 1, 1, 1]]], device=base.device)
    plain, left = hidden_states(padded[:, 2:], mask[:, 2:])[0], hidden_states(padded, mask)[0, 2:]
    error = _difference(left.float(), plain.float())
    if not error < 10 * _TOLERANCE.get(plain.dtype, 3e-2):
        raise ModelError(
            f"{type(base).__name__}: padding on the left changes its hidden states (relative error {error:.1e}): "
            "this architecture is not supported"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
