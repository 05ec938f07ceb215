"""Reward models that read a question, its passages and an answer, in the form that FG-RLHF trains them on.

A token classifier gives each segment of the answer +1 or -1: segments follow a separator token each, whose label says
whether there is an error in it. A sequence classifier gives the whole answer one number, its logit.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import AutoTokenizer

from lco_lite.errors import ModelError
from lco_lite.models.classifier import SEQUENCE, TOKEN, load_classifier
from lco_lite.models.loading import unloadable

NO_ERROR, IGNORED = "O", "Ignore"  # FG-RLHF's labels; whatever else there is marks an error
_EMPTY = -1.0  # an answer without a word
_NO_LIMIT = 1_000_000  # tokenizers without a limit of their own say a huge number

Split: TypeAlias = Callable[[str], list[str]]


@dataclass(frozen=True)
class Text:
    """What a reward model reads: ``question``, ``context`` (passages; may be empty) and ``answer``."""

    question: str
    context: str
    answer: str


@dataclass(frozen=True)
class Reward:
    """``value`` of an answer; ``segments`` it was made of and how many were ``good`` (None: no segments)."""

    value: float
    segments: int = 0
    good: int | None = None


class RewardModel:
    """A token- or sequence-classification model from a folder or hub id; its config says which.

    ``split`` makes the segments of an answer. Raises ModelError for what is no such model, for pickled weights, and
    where weights are missing.
    """

    def __init__(self, path: str, split: Split, device: torch.device, batch: int = 8) -> None:
        self.split, self.batch = split, batch
        self.model, kind = load_classifier(path, (TOKEN, SEQUENCE), None, device)
        self.by_token = kind == TOKEN
        # words tokenised one by one, as in training: byte-level BPE wants a space before each
        spaced = {"add_prefix_space": True} if self.by_token else {}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **spaced)
        except Exception as e:  # each tokenizer class raises its own kinds
            raise unloadable("tokenizer", path, e) from e
        if self.by_token and not self.tokenizer.is_fast:
            raise ModelError(f"{path}: its tokenizer does not tell which token belongs to which word; a fast one does")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.good, self.bad = _labels(path, self.model.config, self.by_token)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Text]) -> list[Reward]:
        """A reward a text."""
        found = []
        for first in range(0, len(texts), self.batch):
            found += self._batch(texts[first : first + self.batch])
        return found

    def _batch(self, texts: Sequence[Text]) -> list[Reward]:
        written = [self._words(text) for text in texts]
        ids = self._tokens([words for words, _ in written], padding=True, return_tensors="pt")
        inputs = {name: ids[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        logits = self.model(**inputs).logits.float().cpu()
        if not self.by_token:
            # the bad label's logit is taken off where there are two
            values = logits[:, self.good] - (0 if self.bad is None else logits[:, self.bad])
            return [Reward(float(value)) for value in values]
        return [self._of_segments(logits[i], ids.word_ids(i), places) for i, (_, places) in enumerate(written)]

    def _of_segments(self, logits: torch.Tensor, word_of: list[int | None], places: Sequence[int]) -> Reward:
        """``logits``: [L, labels]. The mean over segments; those that the window cut off are left out."""
        found = [logits[word_of.index(at)] for at in places if at in word_of]
        if not found:
            return Reward(_EMPTY, 0, 0)
        good = sum(bool(one[self.good] > one[self.bad]) for one in found)
        return Reward((2 * good - len(found)) / len(found), len(found), good)

    def _words(self, text: Text) -> tuple[list[str], list[int]]:
        """The words of the input, and which of them are separators. Passages lose their end where it is too long."""
        answer, places = ["answer:"], []
        for segment in self.split(text.answer) if self.by_token else []:
            places.append(len(answer))
            answer += [self.separator, *segment.split()]
        if not self.by_token:
            answer += text.answer.split()
        head, context = ["question:", *text.question.split()], text.context.split()
        context = ["context:", *context] if context else []
        if context and self._length(head + context + answer) > self.window:
            kept = bisect.bisect_right(
                range(1, len(context) + 1), self.window, key=lambda n: self._length(head + context[:n] + answer)
            )
            context = context[:kept]
        before = len(head) + len(context)
        return head + context + answer, [before + at for at in places]

    def _length(self, words: list[str]) -> int:
        return len(self._tokens([words], truncation=False)["input_ids"][0])

    def _tokens(self, words: list[list[str]], truncation: bool = True, **more: Any) -> Any:
        if truncation:
            more["max_length"] = self.window
        texts = words if self.by_token else [" ".join(some) for some in words]
        return self.tokenizer(texts, is_split_into_words=self.by_token, truncation=truncation, verbose=False, **more)

    @property
    def separator(self) -> str:
        return self.tokenizer.sep_token or self.tokenizer.eos_token

    @property
    def window(self) -> int:
        """Tokens. Position tables may have two entries more than there are positions (RoBERTa, Longformer)."""
        own, positions = self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None)
        limits = [own] if own < _NO_LIMIT else [positions - 2] if positions else [4_096]
        return int(min([*limits, *([positions] if positions else [])]))


def _labels(path: str, config: Any, by_token: bool) -> tuple[int, int | None]:
    """Which label is good, and which is bad. Without names they stand as in FG-RLHF: (error, ignored, none) or
    (error, none); one label is a reward."""
    n = config.num_labels
    if not by_token and n <= 2:
        return (0, None) if n == 1 else (1, 0)
    names = [str(config.id2label[i]) for i in range(n)]
    errors = [i for i, name in enumerate(names) if name not in (NO_ERROR, IGNORED)]
    if by_token and names.count(NO_ERROR) == 1 and len(errors) == 1:
        return names.index(NO_ERROR), errors[0]
    if by_token and n in (2, 3) and all(name.startswith("LABEL_") for name in names):
        return n - 1, 0
    wanted = f"labels {NO_ERROR}, one of errors and perhaps {IGNORED}" if by_token else "one label, or two"
    raise ModelError(f"{path}: has the labels {', '.join(names)}; {wanted} are wanted")
