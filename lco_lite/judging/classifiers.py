"""Classifiers of responses: how they are loaded, one number for a whole response, a reward for each segment of it."""

import bisect
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from lco_lite.errors import ModelError
from lco_lite.messages import Message
from lco_lite.models.loading import (
    base_dtype,
    load_tokenizer,
    refuse_foreign_kernels,
    refuse_unusable_folder,
    refuse_without_weights,
    tried_tokenizer,
    unloadable,
)
from lco_lite.recipe.sections import Weights

_KINDS: dict[str, Any] = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
_BATCH = 32


class SequenceClassifier:
    """Scores a response in its conversation, written in the classifier's own chat template where it has one.

    With one label the score is its logit, with two the log-odds of the second. Texts longer than the tokenizer's limit
    or the model's positions lose their beginning.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        self.tokenizer = refuse_unscorable(path)
        self.model, _ = load_classifier(path, ("sequence",), base_dtype(Weights(path=path), device), device)
        self.tokenizer.truncation_side = "left"
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> Tensor:
        """[N] scores, in fp32 on the CPU."""
        texts = [self._text(p, r) for p, r in zip(prompts, responses, strict=True)]
        window = _window(self.tokenizer, self.model.config)
        bare = self.tokenizer.chat_template is None
        scores = []
        for first in range(0, len(texts), _BATCH):
            batch = texts[first : first + _BATCH]
            ids = self.tokenizer(
                batch, padding=True, truncation=True, max_length=window, add_special_tokens=bare, return_tensors="pt"
            )
            logits = logits_of(self.model, ids)
            scores.append(logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0])
        return torch.cat(scores)

    def _text(self, prompt: Sequence[Message], response: str) -> str:
        if self.tokenizer.chat_template is None:
            return "\n\n".join([*(m["content"] for m in prompt), response])
        turns = [*map(dict, prompt), {"role": "assistant", "content": response}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False))


def refuse_unscorable(path: str) -> Any:
    """The tokenizer of what may score a response. Raises ModelError, before weights are loaded, for what may not."""
    config, _ = classifier_config(path, ("sequence",))
    if config.num_labels > 2:
        raise ModelError(f"{path}: has {config.num_labels} labels; 1 or 2 are needed")
    return load_tokenizer(Weights(path=path))


def logits_of(model: Any, ids: Any) -> Tensor:
    """[B, labels], or [B, L, labels] of a token classifier, in fp32 on the CPU."""
    inputs = {name: ids[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return model(**inputs).logits.float().cpu()


def classifier_config(path: str, kinds: Sequence[str]) -> tuple[Any, str]:
    """(config, kind): its config says which of ``kinds`` a classifier is. Raises ModelError for what is no such model,
    and for a folder without weights in safetensors."""
    refuse_unusable_folder(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as e:  # transformers raises many kinds
        raise unloadable("classifier", path, e) from e
    refuse_foreign_kernels(config, path)
    named = config.architectures or ["no architecture"]
    kind = next((k for k in kinds if any(f"{k.capitalize()}Classification" in name for name in named)), None)
    if kind is None:
        raise ModelError(f"{path}: is {', '.join(named)}; a {'- or '.join(kinds)}-classification model is needed")
    refuse_without_weights(Path(path))
    return config, kind


def load_classifier(
    path: str, kinds: Sequence[str], dtype: torch.dtype | None, device: torch.device
) -> tuple[Any, str]:
    """(model, kind): frozen, in eval mode; its config says which of ``kinds`` it is. Raises ModelError for what is no
    such model, for pickled weights, and where weights are missing."""
    config, kind = classifier_config(path, kinds)
    options = {} if dtype is None else {"dtype": dtype}
    try:
        model, loaded = _KINDS[kind].from_pretrained(
            path, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as e:  # transformers raises many kinds
        raise unloadable("classifier", path, e) from e
    if loaded["missing_keys"]:  # transformers draws them at random
        raise ModelError(f"{path}: weights are missing, e.g. {sorted(loaded['missing_keys'])[0]}")
    return model.requires_grad_(False).eval().to(device), kind


NO_ERROR, IGNORED = "O", "Ignore"  # FG-RLHF's labels; whatever else there is marks an error
_EMPTY = -1.0  # an answer without a word
_NO_LIMIT = 1_000_000  # tokenizers without a limit of their own say a huge number

Split: TypeAlias = Callable[[str], list[str]]


class Text(NamedTuple):
    """What a classifier reads: ``question``, ``context`` (passages; may be empty) and ``answer``."""

    question: str
    context: str
    answer: str


class Reward(NamedTuple):
    """``value`` of an answer; ``segments`` it was made of and how many were ``good`` (None: no segments)."""

    value: float
    segments: int = 0
    good: int | None = None


class SegmentClassifier:
    """A token- or sequence-classification model from a folder or hub id; ``split`` makes the segments of an answer.
    Raises what ``load_classifier`` raises, and ModelError for labels that say nothing of errors."""

    def __init__(self, path: str, split: Split, device: torch.device, batch: int = 8) -> None:
        self.split, self.batch = split, batch
        self.model, kind = load_classifier(path, ("token", "sequence"), None, device)
        self.by_token = kind == "token"
        # words tokenised one by one, as in training: byte-level BPE wants a space before each
        spaced = {"add_prefix_space": True} if self.by_token else {}
        load = partial(AutoTokenizer.from_pretrained, path, trust_remote_code=False, **spaced)
        self.tokenizer: Any = tried_tokenizer(path, load)
        if self.by_token and not self.tokenizer.is_fast:
            raise ModelError(f"{path}: its tokenizer does not tell which token belongs to which word; a fast one does")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.separator = self.tokenizer.sep_token or self.tokenizer.eos_token
        self.window = _window(self.tokenizer, self.model.config)
        self.good, self.bad = _labels(path, self.model.config, self.by_token)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Text]) -> list[Reward]:
        starts = range(0, len(texts), self.batch)
        return [reward for i in starts for reward in self._batch(texts[i : i + self.batch])]

    def _batch(self, texts: Sequence[Text]) -> list[Reward]:
        written = [self._words(text) for text in texts]
        fitted = {"padding": True, "truncation": True, "max_length": self.window, "return_tensors": "pt"}
        ids = self._tokens([words for words, _ in written], **fitted)
        logits = logits_of(self.model, ids)
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
        if self.by_token:
            for segment in self.split(text.answer):
                places.append(len(answer))
                answer += [self.separator, *segment.split()]
        else:
            answer += text.answer.split()
        head, context = ["question:", *text.question.split()], text.context.split()
        context = ["context:", *context] if context else []
        if context and self._length(head + context + answer) > self.window:
            counts = range(1, len(context) + 1)
            kept = bisect.bisect_right(counts, self.window, key=lambda n: self._length(head + context[:n] + answer))
            context = context[:kept]
        before = len(head) + len(context)
        return head + context + answer, [before + at for at in places]

    def _length(self, words: list[str]) -> int:
        return len(self._tokens([words])["input_ids"][0])

    def _tokens(self, words: list[list[str]], **options: Any) -> Any:
        texts = words if self.by_token else [" ".join(some) for some in words]
        return self.tokenizer(texts, is_split_into_words=self.by_token, verbose=False, **options)


def _window(tokenizer: Any, config: Any) -> int:
    """Tokens. Position tables may have two entries more than there are positions (RoBERTa, Longformer)."""
    own, positions = tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)
    if own >= _NO_LIMIT:
        return positions - 2 if positions else 4_096
    return min(own, positions or own)


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


_WORDS = 5  # that a clause has at least
_END = re.compile(r"""[.!?]+["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9])|\n\s*\n""")
_ABBREVIATED = re.compile(
    r"(?:^|[\s(\[\"'“])(?:[A-Z]|(?:[A-Za-z]\.)+[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|No|Nos|vs|etc|Inc|Ltd|Co|Mt|Ft|Gen|Sen|Rep|Gov"
    r"|Capt|Lt|Col|Sgt|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|approx|ca)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences, without the spaces around them; none of them is empty."""
    found, start = [], 0
    for match in _END.finditer(text):
        end = start + len(text[start : match.end()].rstrip())
        if "\n" not in match[0] and _ABBREVIATED.search(text[start:end]):
            continue
        found.append(text[start:end])
        start = match.end()
    return [s.strip() for s in [*found, text[start:]] if s.strip()]


def clauses(text: str) -> list[str]:
    """The clauses of each sentence, words parted by one space."""
    found = []
    for words in map(str.split, sentences(text)):
        starts = [0]
        for i in range(1, len(words)):
            if words[i - 1][-1] not in ",;!?" or len(words) - i <= _WORDS:
                continue
            if i - starts[-1] >= _WORDS:
                starts.append(i)
            elif len(starts) > 1:
                starts[-1] = i
        found += [" ".join(words[a:b]) for a, b in zip(starts, [*starts[1:], len(words)], strict=True)]
    return found
