"""Sampling from a distribution that several models make together, token by token: π* of eq 6, or a teacher's mixture.

Each role keeps its own key-value cache; at every position all of them read the same tokens, and ``combine`` makes one
distribution of their logits. Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lco_lite.models.roles import Role
from lco_lite.rollout.engine import Response, Sampling, finished, in_batches, left_padded

Combine = Callable[[list[Tensor]], Tensor]


def optimal_policy(beta: float) -> Combine:
    """(z_old, z_dpo, z_ref), each [B, V] -> logits of π* (eq 6): z_old + (log φ_DPO - log φ_ref)/β."""

    def combine(logits: list[Tensor]) -> Tensor:
        policy, reward_model, reference = logits
        return policy + (reward_model.log_softmax(-1) - reference.log_softmax(-1)) / beta

    return combine


def mixture(share: float) -> Combine:
    """(z, z_teacher) -> log of ``share`` · teacher + (1 - ``share``) · policy (MiniLLM, eq 6)."""

    def combine(logits: list[Tensor]) -> Tensor:
        policy, teacher = (z.softmax(-1) for z in logits)
        return (share * teacher + (1 - share) * policy).log()

    return combine


class LockstepEngine:
    """An engine (see engine.py) over several roles whose models share a tokenizer."""

    def __init__(self, roles: Sequence[Role], combine: Combine, end: int) -> None:
        self.roles, self.combine = roles, combine
        self.rows = min(role.model.head.rows for role in roles)
        self.pad_id = roles[0].model.pad_id
        self.stop_ids = {end, *roles[0].model.eos_ids}

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, on_batch: Callable[[int], None] = lambda done: None
    ) -> list[Response]:
        return in_batches(prompts, sampling.batch, lambda some: self._generate_batch(some, sampling), on_batch)

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        ids, mask = left_padded(prompts, self.pad_id)
        caches: list[Any] = [DynamicCache() for _ in self.roles]
        tokens, running = ids, torch.ones(len(prompts), dtype=torch.bool)
        made: list[Tensor] = []
        for _ in range(sampling.max_new_tokens):
            logits = self.combine(
                [self._next_logits(r, c, tokens, mask) for r, c in zip(self.roles, caches, strict=True)]
            )
            chosen = draw(logits, sampling).cpu().where(running, self.pad_id)
            made.append(chosen)
            running = running & ~torch.isin(chosen, torch.tensor(sorted(self.stop_ids)))
            if not running.any():
                break
            tokens, mask = chosen.unsqueeze(1), torch.cat([mask, torch.ones(len(prompts), 1, dtype=torch.long)], 1)
        columns = torch.stack(made, 1).tolist()
        return [finished(prompt, row, self.stop_ids) for prompt, row in zip(prompts, columns, strict=True)]

    def _next_logits(self, role: Role, cache: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, V] for the position after ``tokens``, over the tokens that all roles have."""
        model = role.model
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with model.use(role.adapter):
            hidden = model.decoder(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                position_ids=positions.to(model.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        return model.head.prefix(self.rows).logits(hidden)


def draw(logits: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] -> [B]: the temperature, then the smallest set of tokens whose probability reaches ``top_p``."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    outside = p.cumsum(-1) - p >= sampling.top_p
    kept = p.masked_fill(outside, 0.0)
    return ids.gather(-1, torch.multinomial(kept, 1)).squeeze(-1)
