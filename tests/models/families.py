"""A tiny random model of each family, with the byte tokenizer beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from lco_lite.models.language_model import LanguageModel
from lco_lite.models.loading import byte_tokenizer, load_base, load_tokenizer
from lco_lite.recipe import Model

COMMON: dict[str, Any] = {
    "vocab_size": 264,  # four rows of padding behind the tokenizer's 260
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
WRAPPED = {"mistral3": "mistral", "ministral3": "ministral3", "gemma3-vision": "gemma3_text"}


def config(family: str) -> Any:
    if family == "gemma3-vision":
        text = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, **COMMON}
        return tf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    if family in WRAPPED:
        text = {"model_type": WRAPPED[family], "head_dim": 8, **COMMON}
        return tf.Mistral3Config(text_config=text, vision_config={"model_type": "pixtral", **VISION})
    kinds = {
        "llama": (tf.LlamaConfig, {"tie_word_embeddings": False}),
        "llama3.2": (tf.LlamaConfig, {"tie_word_embeddings": True, "head_dim": 8, "rope_parameters": LLAMA3_ROPE}),
        "qwen2": (tf.Qwen2Config, {"tie_word_embeddings": True}),
        "qwen3": (tf.Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
        "gemma2": (tf.Gemma2Config, {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
        "gemma3": (tf.Gemma3TextConfig, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
        "granite": (tf.GraniteConfig, {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
        "cohere": (tf.CohereConfig, {"logit_scale": 0.25}),
        "opt": (tf.OPTConfig, {"word_embed_proj_dim": 32, "ffn_dim": 48}),
        "gpt_neox": (tf.GPTNeoXConfig, {}),
        "phi": (tf.PhiConfig, {}),
        "ministral": (tf.MistralConfig, {"head_dim": 8, "tie_word_embeddings": False}),
    }
    kind, more = kinds[family]
    return kind(**{**COMMON, **more})


DROPOUT = {  # families whose blocks drop activations in train mode, and where they have that written
    "opt": {"dropout": 0.2, "attention_dropout": 0.2, "layerdrop": 0.2},
    "gpt_neox": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "phi": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attention_dropout": 0.2},
}
FAMILIES = ("llama", "llama3.2", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "cohere", "ministral", *WRAPPED)


def save(family: str, folder: Path, **changes: Any) -> Path:
    """An ordinary model folder with random weights, large enough that a wrong scale shows."""
    made = config(family)
    for key, value in changes.items():
        setattr(made.get_text_config(), key, value)
    torch.manual_seed(0)
    kind = tf.AutoModelForImageTextToText if family in WRAPPED else tf.AutoModelForCausalLM
    model = kind.from_config(made)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.2)
    model.save_pretrained(folder)
    byte_tokenizer(128).save_pretrained(folder)
    return folder


def load(folder: Path, checkpointing: bool = False, **weights: Any) -> LanguageModel:
    settings = Model(path=str(folder), **weights)
    return LanguageModel(load_base(settings, torch.device("cpu")), load_tokenizer(settings), checkpointing)
