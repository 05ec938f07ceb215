"""A small Llama-shaped model with a byte-level tokenizer, from nothing: an ordinary folder that transformers loads.

The vocabulary is 4 specials and the 256 bytes, with no merges: every text round-trips.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lco_lite.files import write_folder
from lco_lite.recipe import Init

PAD, USER, ASSISTANT, END = SPECIALS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>"
    "{% elif m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_scratch(init: Init, folder: Path, seed: int) -> None:
    """Writes model and tokenizer to ``folder``, whole or not at all. The weights depend on ``seed`` alone."""
    tokenizer = byte_tokenizer(init.max_length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=init.hidden_size,
        intermediate_size=init.intermediate_size,
        num_hidden_layers=init.layers,
        num_attention_heads=init.heads,
        num_key_value_heads=init.heads,
        max_position_embeddings=init.max_length,
        initializer_range=init.std,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with write_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token a byte, a chat template, and a padding token that is not EOS."""
    bytes_as_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *bytes_as_text])}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
