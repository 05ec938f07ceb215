"""The engine that needs nothing else: transformers' ``generate`` with the active adapter."""

from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from lco_lite.models.language_model import Role
from lco_lite.rollout.engine import Engine, Response, Sampling, StopStrings, finished, left_padded


class HFEngine(Engine):
    """See ``engine.open_engine``."""

    def __init__(self, role: Role, end: int, rows: int) -> None:
        self.role, self.model = role, role.model
        self.stop_ids = {end, *role.model.eos_ids}
        self.padding = list(range(rows, role.model.head.weight.shape[0]))

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        ids, mask = left_padded(prompts, self.model.pad_id)
        width, strings = ids.shape[1], StopStrings(self.model.tokenizer, sampling.stop)
        stops = [lambda ids, scores, **kw: strings.reached(ids[:, width:])] if sampling.stop else []
        with self.model.use(self.role.adapter):
            model: Any = self.model.base
            out = model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=self._config(sampling),
                stopping_criteria=StoppingCriteriaList(stops),
            )
        made = out[:, width:].tolist()
        return [finished(prompt, row, self.stop_ids, strings) for prompt, row in zip(prompts, made, strict=True)]

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
