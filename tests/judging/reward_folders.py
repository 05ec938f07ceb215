"""Tiny random reward models of both kinds, as folders, with the byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from lco_lite.models.loading import byte_tokenizer

SIZE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4_096,
    "pad_token_id": 0,
}


def save_reward_model(folder: Path, by_token: bool, labels: list[str] | int = 1, seed: int = 0, **size: Any) -> Path:
    named = labels if isinstance(labels, list) else [f"LABEL_{i}" for i in range(labels)]
    config = tf.LlamaConfig(**{**SIZE, **size}, id2label=dict(enumerate(named)), num_labels=len(named))
    torch.manual_seed(seed)
    kind = tf.LlamaForTokenClassification if by_token else tf.LlamaForSequenceClassification
    kind(config).save_pretrained(folder)
    byte_tokenizer(size.get("max_position_embeddings", 4_096)).save_pretrained(folder)
    return folder
