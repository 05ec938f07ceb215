"""The engine that needs nothing else: transformers' ``generate`` with the active adapter."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lco_lite.models.language_model import Role
from lco_lite.rollout.engine import Made, Response, Sampling, batches, finished, left_padded


class HFEngine:
    """See ``engine.open_engine``."""

    def __init__(self, role: Role, end: int, rows: int) -> None:
        self.role, self.model = role, role.model
        self.stop_ids = {end, *role.model.eos_ids}
        self.tokens_only = LogitsProcessorList([_FirstRows(rows)])

    def sync(self) -> None:
        """Nothing to do: it samples from the very weights that are trained."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[Made]:
        for places in batches(prompts, sampling.batch):
            yield places, self._generate_batch([prompts[i] for i in places], sampling)

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        ids, mask = left_padded(prompts, self.model.pad_id)
        with self.model.use(self.role.adapter):
            model: Any = self.model.base
            out = model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=self._config(sampling),
                logits_processor=self.tokens_only,
            )
        made = out[:, ids.shape[1] :].tolist()
        return [finished(prompt, row, self.stop_ids) for prompt, row in zip(prompts, made, strict=True)]

    def _config(self, sampling: Sampling) -> GenerationConfig:
        common = {
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": sorted(self.stop_ids),
            "pad_token_id": self.model.pad_id,
        }
        if sampling.temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, **common
        )


class _FirstRows(LogitsProcessor):
    """Nothing past the first ``rows`` ids can be drawn."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beyond = torch.arange(scores.shape[1], device=scores.device) >= self.rows
        return scores.masked_fill(beyond, -torch.inf) if scores.shape[1] > self.rows else scores
