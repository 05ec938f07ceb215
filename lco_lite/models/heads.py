"""The LM head of a model as a ``Head``, found by structure and proved by a forward pass; whether two share tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lco_lite.errors import ModelError
from lco_lite.objectives.head import Head

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
