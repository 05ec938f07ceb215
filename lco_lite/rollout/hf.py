"""The engine that needs nothing else: transformers' ``generate`` with the active adapter.

A batch shrinks as its responses end: ``generate`` stops where at most half of its rows still run, and goes on with the
cache of those. Legend: B rows, L tokens of prompt and response.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList
from transformers.cache_utils import CacheLayerMixin

from lco_lite.models.language_model import Role
from lco_lite.rollout.engine import Engine, Response, Sampling, StopStrings, finished, left_padded


class HFEngine(Engine):
    """See ``engine.open_engine``. A batch of fewer than ``shrinks_from`` rows does not shrink: a pass over half of them
    takes about as long."""

    shrinks_from = 8

    def __init__(self, role: Role, end: int, rows: int) -> None:
        self.role, self.model = role, role.model
        self.stop_ids = {end, *role.model.eos_ids}
        self.padding = list(range(rows, role.model.head.weight.shape[0]))

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        ids, mask = left_padded(prompts, self.model.pad_id)
        width, strings = ids.shape[1], StopStrings(self.model.tokenizer, sampling.stop)
        model: Any = self.model.base
        responses: dict[int, Response] = {}
        running, cache = list(range(len(prompts))), None
        with self.model.use(self.role.adapter):
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            while running:
                left = width + sampling.max_new_tokens - ids.shape[1]
                least = len(ids) // 2 if len(ids) >= self.shrinks_from else 0

                def tell(tokens: int, ran: int = len(running)) -> None:
                    sampling.tell(1 - ran / len(prompts) * (1 - tokens / sampling.max_new_tokens))

                stops = Stops(width, torch.tensor(sorted(self.stop_ids), device=ids.device), strings, least, tell)
                config = self._config(replace(sampling, max_new_tokens=left))
                config.return_dict_in_generate = True
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([stops]),
                    past_key_values=cache,
                )
                made = out.sequences[:, width:].tolist()
                whole = len(made[0]) == sampling.max_new_tokens
                for place, row in zip(running, made, strict=True):
                    responses[place] = finished(prompts[place], row, self.stop_ids, strings)
                rows = [row for row, place in enumerate(running) if responses[place].truncated and not whole]
                running = [running[row] for row in rows]
                kept = torch.tensor(rows, dtype=torch.long, device=ids.device)
                ids = out.sequences[kept]
                mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)[kept]
                cache = only(out.past_key_values, kept) if rows else None
        return [responses[place] for place in range(len(prompts))]

    def _config(self, sampling: Sampling) -> GenerationConfig:
        drawn = (
            {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
        )
        return GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=self.model.pad_id,
            suppress_tokens=self.padding or None,
            **drawn,
        )


class Stops:
    """A stopping criterion: a row stops with a stop token or string, and all of them where at most ``least`` run on.
    ``tell`` hears how many tokens a row has by then."""

    def __init__(
        self, width: int, stop_ids: Tensor, strings: StopStrings, least: int, tell: Callable[[int], object]
    ) -> None:
        self.width, self.stop_ids, self.strings, self.least, self.tell = width, stop_ids, strings, least, tell
        self.ended: Tensor | None = None  # [B]

    def __call__(self, ids: Tensor, scores: Any, **kw: Any) -> Tensor:
        """[B, L] -> [B]; without waiting for a GPU, unless there are strings."""
        self.tell(ids.shape[1] - self.width)
        ended = torch.isin(ids[:, -1], self.stop_ids)
        if self.strings.strings:
            ended |= self.strings.reached(ids[:, self.width :])
        self.ended = ended if self.ended is None else self.ended | ended
        return self.ended | ((~self.ended).sum() <= self.least)


def only(cache: Any, rows: Tensor) -> DynamicCache | None:
    """These rows of the cache, whose other ones are gone; None for a kind of which none are taken (a static one, states
    of the model's own): ``generate`` then reads the tokens again."""
    if not isinstance(cache, DynamicCache) or not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return None
    cache.reorder_cache(rows)  # type: ignore[arg-type]  # of every kind of layer, states of linear attention too
    return cache
