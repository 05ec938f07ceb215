"""Sampling from a distribution that several models make together, token by token: π* of eq 6, or a teacher's mixture.

Each role keeps its own key-value cache; at every position all of them read the same tokens, and ``combine`` makes one
distribution of their logits. Legend: B sequences, V vocabulary.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TopPLogitsWarper

from lco_lite.models.language_model import Role, together
from lco_lite.rollout.engine import Combine, Engine, Response, Sampling, StopStrings, finished, left_padded


def optimal_policy(beta: float) -> Combine:
    """(z_old, z_dpo, z_ref), each [B, V] -> logits of π* (eq 6): z_old + (log φ_DPO - log φ_ref)/β."""

    def combine(logits: list[Tensor]) -> Tensor:
        policy, reward_model, reference = logits
        return policy + (reward_model.log_softmax(-1) - reference.log_softmax(-1)) / beta

    return combine


def alone(logits: list[Tensor]) -> Tensor:
    """(z,) -> z: one policy by itself, for ``LockstepEngine.stream``."""
    return logits[0]


def mixture(share: float) -> Combine:
    """(z, z_teacher) -> log of ``share`` · teacher + (1 - ``share``) · policy (MiniLLM's teacher-mixed sampling)."""

    def combine(logits: list[Tensor]) -> Tensor:
        policy, teacher = (z.softmax(-1) for z in logits)
        return (share * teacher + (1 - share) * policy).log()

    return combine


class LockstepEngine(Engine):
    """Over several roles whose models share a tokenizer; see ``engine.open_engine``.

    ``look_every``: after how many tokens the host looks whether all have ended, since it waits for the GPU then.
    """

    def __init__(self, roles: Sequence[Role], combine: Combine, end: int, rows: int) -> None:
        self.roles, self.combine, self.rows = roles, combine, rows
        self.pad_id, self.tokenizer = roles[0].model.pad_id, roles[0].model.tokenizer
        self.stop_ids = {end, *roles[0].model.eos_ids}
        self.look_every = 1 if roles[0].model.device.type == "cpu" else 16

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        with together(*self.roles):
            return self._in_step(prompts, sampling)

    @torch.no_grad()
    def stream(self, prompt: list[int], sampling: Sampling) -> Generator[int]:
        """One response, token by token as they are drawn; what closes it comes last. Close what is left early."""
        with together(*self.roles):
            for chosen in self._columns([prompt], sampling):
                yield (token := int(chosen))
                if token in self.stop_ids:
                    return

    def _in_step(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        strings, columns = StopStrings(self.tokenizer, sampling.stop), list[Tensor]()
        for column in self._columns(prompts, sampling):
            columns.append(column)
            sampling.tell(len(columns) / sampling.max_new_tokens)
        rows = torch.stack(columns, 1).tolist()
        return [finished(prompt, row, self.stop_ids, strings) for prompt, row in zip(prompts, rows, strict=True)]

    def _columns(self, prompts: list[list[int]], sampling: Sampling) -> Iterator[Tensor]:
        """[B] after [B]: the next token of each response, until all have ended or are as long as they may be."""
        device, strings = self.roles[0].model.device, StopStrings(self.tokenizer, sampling.stop)
        tokens, mask = (padded.to(device) for padded in left_padded(prompts, self.pad_id))
        stops, running = torch.tensor(sorted(self.stop_ids), device=device), mask.any(-1)
        caches: list[Any] = [DynamicCache() for _ in self.roles]
        made: list[Tensor] = []
        while len(made) < sampling.max_new_tokens:
            logits = [self._next_logits(r, c, tokens, mask) for r, c in zip(self.roles, caches, strict=True)]
            # each at the temperature, before they are combined: a mixture is of what each of them would sample
            logits = [z / (sampling.temperature or 1.0) for z in logits]
            chosen = draw(self.combine(logits), sampling).where(running, self.pad_id)
            made.append(chosen)
            yield chosen
            running = running & ~torch.isin(chosen, stops)
            if sampling.stop:
                running = running & ~strings.reached(torch.stack(made, 1))
            if len(made) % self.look_every == 0 and not running.any():
                break
            tokens, mask = chosen.unsqueeze(1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)

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
        return model.head.prefix(self.rows).logits(hidden).to(tokens.device)


def draw(logits: Tensor, sampling: Sampling) -> Tensor:
    """[B, V], divided by the temperature -> [B]: the likeliest at temperature 0, else one of the smallest set of tokens
    whose probability reaches ``top_p``."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if sampling.top_p < 1:
        no_ids = torch.empty(0, dtype=torch.long)  # it looks at the scores alone
        logits = TopPLogitsWarper(sampling.top_p)(no_ids, logits)  # type: ignore[arg-type]
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
