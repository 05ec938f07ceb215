"""The engine that needs nothing else: transformers' ``generate`` with the active adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig

from lco_lite.models.roles import Role
from lco_lite.rollout.engine import Response, Sampling
from lco_lite.sequences import Example


class LocalEngine:
    """Samples from ``role``; ``end`` closes a response besides the model's own EOS ids."""

    def __init__(self, role: Role, end: int) -> None:
        self.role, self.model = role, role.model
        self.stop_ids = sorted({end, *role.model.eos_ids})

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, on_batch: Callable[[int], None] = lambda done: None
    ) -> list[Response]:
        responses: dict[int, Response] = {}
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # like lengths together: less padding
        for start in range(0, len(order), sampling.batch):
            chosen = order[start : start + sampling.batch]
            with self.model.use(self.role.adapter):
                made = self._generate_batch([prompts[i] for i in chosen], sampling)
            responses.update(zip(chosen, made, strict=True))
            on_batch(len(responses))
        return [responses[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Response]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.model.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # left padding: every response begins in the same column
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        out = self.model.generation_model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=self._config(sampling)
        )
        return [self._response(prompt, row) for prompt, row in zip(prompts, out[:, width:].tolist(), strict=True)]

    def _config(self, sampling: Sampling) -> GenerationConfig:
        common = {
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.model.pad_id,
        }
        if sampling.temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, **common
        )

    def _response(self, prompt: list[int], ids: list[int]) -> Response:
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        return Response(Example(prompt, ids if stop is None else ids[: stop + 1]), truncated=stop is None)
