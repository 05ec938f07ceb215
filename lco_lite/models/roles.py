"""Who plays what: a role is a language model with one of its adapters, or with none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lco_lite.models.language_model import LanguageModel
from lco_lite.sequences import Batch


@dataclass(frozen=True)
class Role:
    """``adapter`` None is the base alone. Policy and reward model may be two adapters on one base."""

    model: LanguageModel
    adapter: str | None = None

    def hidden(self, batch: Batch) -> Tensor:
        """[T, d]: final hidden states that predict the batch's response tokens."""
        batch = batch.to(self.model.device)
        with self.model.use(self.adapter):
            return batch.select(self.model.hidden_states(batch.input_ids, batch.attention_mask))
