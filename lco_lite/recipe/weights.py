"""The recipe's models: where weights come from, how they are stored, what is trained of them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lco_lite.recipe.section import Section, setting


class Lora(Section):
    r: int = setting(32, "rank of the update", "QLoRA practice; 16 to 64 are alike", ge=1)
    alpha: float = setting(64, "scale: the update is multiplied by alpha / r", "twice the rank, QLoRA practice", gt=0)
    dropout: float = setting(
        0.0, "share of adapter inputs dropped", "0: h_old and h must come from the same numerics", ge=0, lt=1
    )
    targets: Literal["all-linear"] | list[str] = setting(
        "all-linear", "modules that get an adapter; never the LM head", "QLoRA: all linear layers"
    )


class Init(Section):
    """A Llama-shaped model from scratch with a byte-level tokenizer (256 bytes and 4 specials)."""

    hidden_size: int = setting(128, "width d", "prototype", ge=8)
    layers: int = setting(4, "transformer blocks", "prototype", ge=1)
    heads: int = setting(4, "attention heads", "prototype", ge=1)
    intermediate_size: int = setting(384, "width of the feed-forward layer", "3 x hidden_size", ge=8)
    max_length: int = setting(256, "longest sequence, tokens", "ample for the arithmetic task", ge=16)
    std: float = setting(0.05, "standard deviation of the first weights", "prototype", gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Init:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of heads {self.heads}")
        return self


class Weights(Section):
    """Base weights and the adapter on them."""

    path: str | None = setting(None, "hub id or local folder", "yours")
    revision: str | None = setting(None, "branch, tag or commit on the hub", "the hub's main")
    gguf_file: str | None = setting(None, "name of a GGUF file under path; converted once into the run", "none")
    quantization: Literal["none", "nf4", "int8"] = setting(
        "none", "storage of the frozen base (bitsandbytes)", "nf4 with double quantisation is what fits 12 GB"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "weights and compute; auto: bfloat16 on a GPU, float32 on a CPU", "bfloat16 where it is fast"
    )
    lora: Lora | None = setting(
        Lora(), "the adapter; null trains all weights but the LM head", "LoRA keeps the head frozen"
    )
    gradient_checkpointing: bool = setting(
        False,
        "recompute activations in the backward pass: about a third more time, far less memory",
        "off on small models",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting(
        "auto", "attention kernel", "the model's own default"
    )
    trust_remote_code: bool = setting(False, "run Python that comes with the weights", "off: safe by default")


class Model(Weights):
    train_head: bool = setting(
        False,
        "full fine-tuning trains the LM head too: a slower loss path",
        "off: a frozen linear head is what makes LCO cheap",
    )
    init: Init | None = setting(
        None, "build a small model instead of loading one; sft then trains all its weights", "none"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.path is None) == (self.init is None):
            raise ValueError("give either path (hub id or folder) or init (a model from scratch)")
        if self.init is not None and (self.gguf_file or self.quantization != "none"):
            raise ValueError("init builds a small model in plain precision: no gguf_file, no quantization")
        if self.lora is None and self.quantization != "none":
            raise ValueError("quantized weights cannot be trained: keep lora, or set quantization: none")
        return self


class RewardModel(Weights):
    """φ_DPO on a base of its own; ``reward_model: self`` shares the policy's base instead."""

    @model_validator(mode="after")
    def _has_path(self) -> RewardModel:
        if self.path is None:
            raise ValueError("needs path (hub id or folder); write `reward_model: self` to share the policy's base")
        if self.lora is None:
            raise ValueError("a reward model of its own is an adapter on its base: lora cannot be null")
        return self
