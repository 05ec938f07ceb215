"""An answer in sentences, or in the clauses of sentences: what a fine-grained reward model gives one reward each.

Clauses are cut as FG-RLHF cuts them (Wu et al. 2023): after a word that ends in ``, ; ! ?``, where at least five words
stand before it and more than five follow; a shorter piece joins the one before, the first joins the one after.
Sentences are cut by a rule here, where FG-RLHF asks spaCy.
"""

from __future__ import annotations

import re

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
    return [clause for sentence in sentences(text) for clause in _clauses(sentence.split())]


def _clauses(words: list[str]) -> list[str]:
    starts = [0]
    for i in range(1, len(words)):
        if words[i - 1][-1] not in ",;!?" or len(words) - i <= _WORDS:
            continue
        if i - starts[-1] >= _WORDS:
            starts.append(i)
        elif len(starts) > 1:
            starts[-1] = i
    return [" ".join(words[a:b]) for a, b in zip(starts, [*starts[1:], len(words)], strict=True)]
