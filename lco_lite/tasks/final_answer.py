r"""Where in a response the final answer stands.

In this order: the last ``\boxed{}`` (boxes joined by a comma or a word count as one list); the last explicit statement
(``the answer is 5``, ``Final Answer: 5``, ``#### 5``); the formula or number that ends the last line. A number in the
middle of a working, or of a response that was cut off there, is no answer.
"""

import re
from collections.abc import Iterator

_TAIL = 20_000  # characters of a response that are looked at, counted from its end; formulas are bounded too, for speed
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")
_JOINT = re.compile(r"(?:[\s$,;&]|\\[()\[\]]|\\q?quad|\\text\s*\{[^{}]*\}|and|or)*")
_STATEMENT = re.compile(
    r"(?i)\banswers?(?:[ \t]+[a-z]+){0,6}?[*\s]*(?::|\bis\b|\bare\b|=)[*:\s]*|^[ \t]*####[ \t]*(?=[^\n]*$)",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z<\[]|\s*$)|\n")
_SPAN = re.compile(
    r"\$\$([^$]{1,600})\$\$|\\\[((?:[^\\]|\\(?!\])){1,600})\\\]|\\\(((?:[^\\]|\\(?!\))){1,600})\\\)"
    r"|(?<!\\)\$((?:[^$\n\\]|\\.){1,600})\$"
)
_NUMBER = re.compile(
    r"(?<![A-Za-z\d_.])(?<!\d,)[-+]?\\?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:[.,]\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?"
    r"(?:\s*(?:\\?%|percent\b|pct\b))?"
)
_MATH_WORDS = "and|or|sqrt|frac|sin|cos|tan|cot|sec|csc|log|exp|inf|infty|infinity|arcsin|arccos|arctan"
_SHORT_WORDS = "[Aa][nst]|[Bb][ey]|[DdGg]o|[Hh]e|[Ii][fnst]|[MmWw][ey]|[Nn]o|[Oo][fn]|[Ss]o|[Tt]o|[Uu][ps]"
_NO_PROSE = re.compile(r"\\(?:text|mbox|math|operatorname)[a-z]*\s*\{[^{}]*\}|\\(?:begin|end)\s*(?:\{[^{}]*\})+")
_PROSE = re.compile(
    rf"(?<![A-Za-z\\])(?!(?:{_MATH_WORDS})(?![a-z]))(?:(?=[A-Z]*[a-z])[A-Za-z]{{3,}}|(?:{_SHORT_WORDS})(?![A-Za-z]))"
)


def final_answer(response: str) -> str | None:
    """The final answer as the response writes it, delimiters of mathematics removed; None where there is none."""
    tail = response[-_TAIL:]
    tail = tail.rpartition("</think>")[2] or tail
    tail = _EMPTY_BOX.sub("", tail)
    return boxed(tail) or _stated(tail) or _last_line(tail)


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{}`` that is not empty, with those that it continues; None without a box."""
    boxes = [box for box in (_box(text, match) for match in list(_BOX.finditer(text))[-16:]) if box[2]]
    if not boxes:
        return None
    run = [boxes.pop()]
    while boxes and boxes[-1][1] <= run[0][0] and _joins(text[boxes[-1][1] : run[0][0]]):
        run.insert(0, boxes.pop())
    contents = list(dict.fromkeys(content for _, _, content in run))
    return ", ".join(contents)


def _box(text: str, match: re.Match[str]) -> tuple[int, int, str]:
    """Start, end and content of one box; without braces it holds one word, unterminated the rest of its line."""
    at = match.end()
    if text[at : at + 1] != "{":
        word = re.compile(r"[^\s$]*").match(text, at)
        end = word.end() if word else at
        return match.start(), end, text[at:end].strip()
    depth, i = 0, at
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return match.start(), i + 1, text[at + 1 : i].strip()
        i += 1
    line = text[at + 1 :].partition("\n")[0]
    return match.start(), at + 1 + len(line), line.strip()


def _joins(gap: str) -> bool:
    return len(gap) <= 80 and "\n" not in gap and _JOINT.fullmatch(gap) is not None


def _stated(text: str) -> str | None:
    """What the last statement of an answer says; a heading of markdown that opens with ``####`` is no statement."""
    for match in reversed(list(_STATEMENT.finditer(text))):
        rest = text[match.end() : match.end() + 1_000].lstrip()
        end = next((m.start() for m in _SENTENCE_END.finditer(rest) if not _inside_span(rest, m.start())), len(rest))
        sentence = rest[:end].strip(" .*\n\t")
        if match[0].lstrip().startswith("####") and _words(rest.partition("\n")[0]):
            continue
        first = _SPAN.match(sentence)
        if first and not _words(_content(first)):
            return _joined_spans(sentence, first)
        found = _bare(sentence) or _last(sentence, 0)
        if found:
            return found
    return None


def _inside_span(text: str, at: int) -> bool:
    return any(span.start() < at < span.end() for span in _SPAN.finditer(text[: at + 400]))


def _joined_spans(sentence: str, first: re.Match[str]) -> str:
    """``$1$, $2$ and $3$`` is one answer."""
    answer, end = _content(first), first.end()
    while (following := _SPAN.search(sentence, end)) and _joins(sentence[end : following.start()]):
        answer, end = f"{answer}, {_content(following)}", following.end()
    return answer + _percent(sentence, end)


def _last_line(text: str) -> str | None:
    text = text.rstrip()
    start = text.rfind("\n") + 1
    return _bare(text[start:].strip().strip("*")) or _last(text, start)


def _bare(line: str) -> str | None:
    """The line itself if it is nothing but an answer: no prose, or at most three words and no formula."""
    if span := _SPAN.fullmatch(line):
        line = _content(span)
    if len(line) > 400 or not any(c.isalnum() for c in line):
        return None
    words = _words(line)
    return line if words == 0 or (words <= 3 and not re.search(r"[\d$\\]", line)) else None


def _words(text: str) -> int:
    """How many words of prose; names of functions and environments, and the content of ``\\text{}``, are none."""
    return len(_PROSE.findall(_NO_PROSE.sub("", text)))


def _last(text: str, start: int) -> str | None:
    """The last formula or number of ``text`` that ends after ``start``."""
    spans = [s for s in _SPAN.finditer(text) if not _words(_content(s))]
    found: list[tuple[int, str]] = [(s.end(), _content(s) + _percent(text, s.end())) for s in spans]
    found += [(n.end(), n[0]) for n in _numbers_outside(text, start, spans)]
    found = [f for f in found if f[0] > start]
    return max(found)[1].strip() if found else None


def _numbers_outside(text: str, start: int, spans: list[re.Match[str]]) -> Iterator[re.Match[str]]:
    for number in _NUMBER.finditer(text, start):
        if not any(s.start() <= number.start() < s.end() for s in spans):
            yield number


def _content(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None).strip()


def _percent(text: str, at: int) -> str:
    return r"\%" if re.compile(r"\s*(?:\\?%|percent\b|pct\b)").match(text, at) else ""
