"""Classification models as reward models: how they are loaded, and one number for a whole response."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from lco_lite.data.chat import Message
from lco_lite.errors import ModelError
from lco_lite.models.loading import base_dtype, load_tokenizer, refuse_unusable_folder, unloadable
from lco_lite.recipe import Weights

SEQUENCE, TOKEN = "sequence", "token"
_KINDS: dict[str, Any] = {SEQUENCE: AutoModelForSequenceClassification, TOKEN: AutoModelForTokenClassification}


class SequenceClassifier:
    """Scores a response in its conversation, written in the classifier's own chat template where it has one.

    With one label the score is its logit, with two the log-odds of the second. Longer texts lose their beginning.
    Raises ModelError for what is no such model.
    """

    def __init__(self, path: str, device: torch.device, batch: int = 32) -> None:
        weights = Weights(path=path)
        self.batch = batch
        self.model, _ = load_classifier(path, (SEQUENCE,), base_dtype(weights, device), device)
        self.tokenizer = load_tokenizer(weights)
        self.tokenizer.truncation_side = "left"
        if self.model.config.num_labels > 2:
            raise ModelError(f"{path}: has {self.model.config.num_labels} labels; a reward model has 1 or 2")
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

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


def load_classifier(
    path: str, kinds: Sequence[str], dtype: torch.dtype | None, device: torch.device
) -> tuple[Any, str]:
    """(model, kind): frozen, in eval mode; its config says which of ``kinds`` it is.

    Raises ModelError for what is no such model, for pickled weights, and where weights are missing.
    """
    refuse_unusable_folder(Path(path))
    options = {} if dtype is None else {"dtype": dtype}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = _kind(path, config, kinds)
        model, loaded = _KINDS[kind].from_pretrained(
            path, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as e:  # transformers raises many kinds
        raise unloadable("reward model", path, e) from e
    if loaded["missing_keys"]:  # transformers draws them at random
        raise ModelError(f"{path}: weights are missing, e.g. {sorted(loaded['missing_keys'])[0]}")
    return model.requires_grad_(False).eval().to(device), kind


def _kind(path: str, config: Any, kinds: Sequence[str]) -> str:
    named = config.architectures or ["no architecture"]
    for kind in kinds:
        if any(f"{kind.capitalize()}Classification" in name for name in named):
            return kind
    raise ModelError(f"{path}: is {', '.join(named)}; a reward model is a {'- or '.join(kinds)}-classification model")
