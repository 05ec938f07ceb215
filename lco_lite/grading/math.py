"""Is a mathematical answer right? The grader of every mathematics task, and their reward.

The final answer is found, written in one spelling, and compared as text, as numbers or item by item (``equality``);
what is left needs algebra and goes to math-verify in a process of its own (``symbolic``).
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from lco_lite.grading import Grade, Item, equality, symbolic

_DEEPEST = 12
_LONGEST = 500  # characters; the longest gold answer of MATH has 159


@dataclass(frozen=True)
class MathGrader:
    """``grade_answer`` with an item's gold answer, as the grader of a task. Fields as there."""

    tolerance: float = 0.0
    evaluated: bool = False

    def __call__(self, response: str, item: Item) -> Grade:
        return grade_answer(response, item.gold, self.tolerance, self.evaluated)

    def same(self, answer: str, other: str) -> bool:
        """Whether two answers, as they were extracted, are one: votes for it add up."""
        return compare(answer, other)[0]


def grade_answer(response: str, gold: str, tolerance: float = 0.0, evaluated: bool = False) -> Grade:
    r"""Is the final answer of ``response`` equal to ``gold`` (LaTeX or plain text, or a text that boxes the answer)?

    Numbers may differ by ``tolerance``, a part of gold's. With ``evaluated``, where gold is a number, an expression
    that is still to be worked out is wrong: ``513^2-487^2`` can be copied from the question. Takes at most
    ``symbolic.SECONDS`` a comparison and never raises, whatever the model wrote.
    """
    answer = final_answer(response)
    if answer is None:
        return Grade(False, None, "no answer found")
    wanted = boxed(gold) or gold
    if _SEQUENCE.fullmatch(response) and _SEQUENCE.fullmatch(gold):
        answer, wanted = f"({answer})", f"({wanted})"
    right, why = compare(answer, wanted, tolerance, evaluated)
    if not right and "," in wanted:
        several = final_answer(response, several=True) or answer
        if several != answer and compare(several, wanted, tolerance, evaluated)[0]:
            return Grade(True, several, "equal")
    return Grade(right, answer, why)


def compare(answer: str, gold: str, tolerance: float = 0.0, evaluated: bool = False) -> tuple[bool, str]:
    """Are two answers equal, or numbers within ``tolerance``, and how that was told. ``evaluated``: see above."""
    if len(answer) > _LONGEST:
        return False, f"longer than {_LONGEST} characters"
    spelled, wanted = equality.spell(answer), equality.spell(gold)
    right, why = _equal(spelled, wanted, tolerance)
    if right and evaluated and not equality.worked_out(spelled, wanted):
        return False, "equal, but not worked out"
    return right, why


def _equal(spelled: str, wanted: str, tolerance: float) -> tuple[bool, str]:
    verdict = equality.equal(spelled, wanted)
    if not verdict and tolerance and (near := _near(spelled, wanted, tolerance)) is not None:
        return near, f"within {tolerance:.0%}" if near else "not equal"
    if verdict is not None:
        return verdict, "equal" if verdict else "not equal"
    if not _well_formed(spelled):
        return False, "malformed"
    verdict = symbolic.equal(spelled, wanted, tolerance)
    if verdict is None:
        return False, "too long or too large to compare"
    return verdict, "equal by algebra" if verdict else "not equal by algebra"


def _near(answer: str, gold: str, tolerance: float) -> bool | None:
    """Whether two plain numbers, perhaps after ``=``, are near each other; None where one of them is something else."""
    a, g = (equality.number(re.split(r"=|\\approx|\\simeq", text)[-1].strip()) for text in (answer, gold))
    return None if a is None or g is None else abs(a.value - g.value) <= Fraction(tolerance) * abs(g.value)


def _well_formed(text: str) -> bool:
    """Braces match and nest no deeper than in any answer a person writes: the parser guesses at the rest, or hangs."""
    depth = 0
    for c in text:
        depth += (c == "{") - (c == "}")
        if not 0 <= depth <= _DEEPEST:
            return False
    return depth == 0 and not text.endswith("\\")


# a list of numbers and nothing else, without a word or a box that would make them solutions: their order counts
_SEQUENCE = re.compile(r"\s*[-+]?[\d.]+(?:\s*,\s*[-+]?[\d.]+)+\s*")
_TAIL = 20_000  # characters of a response that are looked at, counted from its end; formulas are bounded too, for speed
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")
_JOINT = re.compile(r"(?:[\s$,;&]|\\[()\[\]]|\\q?quad|\\text\s*\{[^{}]*\}|and|or)*")
_WORDS_BETWEEN = re.compile(
    r"(?i)(?:(?!\b(?:not?|wrong|wait|instead|but|check|actually|incorrect)\b)[^\d\\]|\\[()\[\]])*"
)
_FINAL = re.compile(r"(?i)\bfinal answer\b")
_ANSWERLIKE = re.compile(r"[\d$\\]")
_STATEMENT = re.compile(
    r"(?i)\banswers?(?:[ \t]+[a-z]+){0,6}?[*\s]*(?::|\bis\b|\bare\b|=)[*:\s]*|^[ \t]*####[ \t]*:?(?=[^\n]*$)",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z<\[(]|\s*$)|\s\((?=[a-z]{2,} )|\n")
_SPAN = re.compile(
    r"\$\$([^$]{1,600})\$\$|\\\[((?:[^\\]|\\(?!\]|(?<!\\\\)\[)){1,600})\\\]|\\\(((?:[^\\]|\\(?!\)|(?<!\\\\)\()){1,600})\\\)"
    r"|(?<!\\)\$((?:[^$\n\\]|\\.){1,600})\$(?!\d)"
)
_NUMBER = re.compile(
    r"(?<![A-Za-z\d_.])(?<!\d,)[-+]?\\?\$?(?:\d+ \d+/\d+|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:[.,]\d+)?"
    r"(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?)(?:√\d+|\s?π)?(?:\s*(?:\\?%|percent\b|pct\b))?"
)
_LABEL = re.compile(  # of a last line: marks of lists, quotes and headings, arrows, `A:`
    r"\s*(?:[>#*•∴→⇒~|_`\"“:]+\s*|[-=]+>\s*|[-–—=]\s+|\d{1,2}[.)]\s+(?=\S)|[A-Za-z]{1,12}:\s+)*"
)
_ALIGNED = re.compile(r"\\(?:begin|end)\s*\{(?:align|aligned|gather|gathered|split)\*?\}\s*")
_MATH_WORDS = "and|or|sqrt|frac|sin|cos|tan|cot|sec|csc|log|exp|inf|infty|infinity|arcsin|arccos|arctan"
_SHORT_WORDS = "[Aa][nst]|[Bb][ey]|[DdGg]o|[Hh]e|[Ii][fnst]|[MmWw][ey]|[Nn]o|[Oo][fn]|[Ss]o|[Tt]o|[Uu][ps]"
_NO_PROSE = re.compile(r"\\(?:text|mbox|math|operatorname)[a-z]*\s*\{[^{}]*\}|\\(?:begin|end)\s*(?:\{[^{}]*\})+")
_PROSE = re.compile(
    rf"(?<![A-Za-z\\])(?!(?:{_MATH_WORDS})(?![a-z]))(?:(?=[A-Z]*[a-z])[A-Za-z]{{3,}}|(?:{_SHORT_WORDS})(?![A-Za-z]))"
)


def final_answer(response: str, several: bool = False) -> str | None:
    """The final answer as the response writes it, delimiters of mathematics removed; None where there is none. With
    ``several``, boxes that words connect are one list."""
    tail = response[-_TAIL:]
    tail = tail.rpartition("</think>")[2] or tail
    tail = _EMPTY_BOX.sub("", tail)
    box, end = _last_boxes(tail, several)
    if box and (final := _FINAL.search(tail, end)) and (later := _stated(tail[final.start() :])):
        return later if _ANSWERLIKE.search(later) else box
    return box or _last_line(tail, alone=True) or _stated(tail) or _last_line(tail)


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{}`` that is not empty, with those that it continues; None without a box."""
    return _last_boxes(text)[0]


def _last_boxes(text: str, several: bool = False) -> tuple[str | None, int]:
    """(their content, where they end)."""
    boxes = [box for box in (_box(text, match) for match in list(_BOX.finditer(text))[-16:]) if box[2]]
    if not boxes:
        return None, 0
    run = [boxes.pop()]
    while boxes and boxes[-1][1] <= run[0][0] and _joins(text[boxes[-1][1] : run[0][0]], several):
        run.insert(0, boxes.pop())
    contents = list(dict.fromkeys(content for _, _, content in run))
    return ", ".join(contents), run[-1][1]


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


def _joins(gap: str, by_words: bool = False) -> bool:
    joint = _WORDS_BETWEEN if by_words else _JOINT
    return len(gap) <= 80 and "\n" not in gap and joint.fullmatch(gap) is not None


def _stated(text: str) -> str | None:
    """What the last statement of an answer says; a heading of markdown that opens with ``####`` is no statement."""
    for match in reversed(list(_STATEMENT.finditer(text))):
        rest = text[match.end() : match.end() + 1_000].lstrip()
        end = _SENTENCE_END.search(rest)
        sentence = (rest[: end.start()] if end else rest).replace('\\"', "").strip(" .*\n\t")
        if match[0].lstrip().startswith("####") and _words(rest.partition("\n")[0]):
            continue
        first = _SPAN.match(sentence)
        if first and not _words(_content(first)):
            return _joined_spans(sentence, first)
        found = _bare(sentence) or _last(sentence, 0)
        if found:
            return found
    return None


def _joined_spans(sentence: str, first: re.Match[str]) -> str:
    """``$1$, $2$ and $3$`` is one answer."""
    answer, end = _content(first), first.end()
    while (following := _SPAN.search(sentence, end)) and _joins(sentence[end : following.start()]):
        answer, end = f"{answer}, {_content(following)}", following.end()
    return answer + _percent(sentence, end)


def _last_line(text: str, alone: bool = False) -> str | None:
    """``alone``: only a line that is nothing but a number or a formula, which then comes after any statement."""
    text = _last_row(text.rstrip())
    start = text.rfind("\n") + 1
    label = _LABEL.match(text, start)
    line = _bare(text[label.end() if label else start :].rstrip(' *_`"”.,;∎'))
    return line if line and (not alone or re.search(r"\d", line)) else None if alone else _last(text, start)


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
    ends = []

    def blank(span: re.Match[str]) -> str:
        if _words(content := _content(span)):
            return span[0]
        ends.append((span.end(), content + _percent(text, span.end())))
        return " " * len(span[0])

    ends += [(n.end(), n[0]) for n in _NUMBER.finditer(_SPAN.sub(blank, text), start)]
    ends = [(end, answer) for end, answer in ends if end > start]
    return max(ends)[1].strip() if ends else None


def _content(span: re.Match[str]) -> str:
    return _last_row(next(group for group in span.groups() if group is not None).strip())


def _last_row(text: str) -> str:
    """Of formulas below each other, which end ``text``, the last; else ``text``."""
    if not re.search(r"\\end\s*\{(?:align|gather|split)[a-z]*\*?\}$", text):
        return text
    return re.split(r"\\\\", _ALIGNED.sub("", text).rstrip("\\ \n"))[-1].replace("&", "").strip()


def _percent(text: str, at: int) -> str:
    return r"\%" if re.compile(r"\s*(?:\\?%|percent\b|pct\b)").match(text, at) else ""
