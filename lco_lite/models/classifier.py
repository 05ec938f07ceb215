"""A sequence-classification model from the hub or a folder: one number for a whole response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from lco_lite.data.chat import Message
from lco_lite.errors import ModelError
from lco_lite.models.loading import base_dtype, load_tokenizer, unloadable
from lco_lite.recipe import Weights


class SequenceClassifier:
    """Scores a response in its conversation, written in the classifier's own chat template where it has one.

    With one label the score is its logit, with two the log-odds of the second. Longer texts lose their beginning.
    Raises ModelError for what is no such model.
    """

    def __init__(self, path: str, device: torch.device, batch: int = 32) -> None:
        weights = Weights(path=path)
        self.batch = batch
        self.tokenizer = load_tokenizer(weights)
        self.tokenizer.truncation_side = "left"
        try:
            config = AutoConfig.from_pretrained(path)
            if not any("SequenceClassification" in name for name in config.architectures or []):
                found = ", ".join(config.architectures or ["no architecture"])
                raise ModelError(f"{path}: is {found}; a reward model is a sequence-classification model")
            self.model = AutoModelForSequenceClassification.from_pretrained(
                path, config=config, dtype=base_dtype(weights, device), use_safetensors=True, device_map={"": device}
            )
        except Exception as e:  # transformers raises many kinds
            raise unloadable("reward model", path, e) from e
        if self.model.config.num_labels > 2:
            raise ModelError(f"{path}: has {self.model.config.num_labels} labels; a reward model has 1 or 2")
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> Tensor:
        """[N] scores, in fp32 on the CPU."""
        texts = [self._text(p, r) for p, r in zip(prompts, responses, strict=True)]
        found = []
        for first in range(0, len(texts), self.batch):
            ids = self.tokenizer(
                texts[first : first + self.batch],
                padding=True,
                truncation=True,
                max_length=self._window,
                add_special_tokens=self.tokenizer.chat_template is None,
                return_tensors="pt",
            ).to(self.model.device)
            logits = self.model(**self._accepted(ids)).logits.float().cpu()
            found.append(logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0])
        return torch.cat(found)

    @property
    def _window(self) -> int:
        return getattr(self.model.config, "max_position_embeddings", None) or 4096

    def _text(self, prompt: Sequence[Message], response: str) -> str:
        if self.tokenizer.chat_template is None:
            return "\n\n".join([*(m["content"] for m in prompt), response])
        turns = [*map(dict, prompt), {"role": "assistant", "content": response}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False))

    def _accepted(self, ids: Any) -> dict[str, Tensor]:
        return {name: ids[name] for name in ("input_ids", "attention_mask")}
