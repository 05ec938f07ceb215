r"""The comparisons that need no algebra: text, numbers, lists, tuples, intervals, sets.

``same`` answers yes, no, or None for "ask a computer algebra system". Most comparisons of a benchmark end here.
"""

import re
from dataclasses import dataclass

from lco_lite.tasks.numbers import number, same_number

_NAME = r"[A-Za-z]{1,3}(?:_(?:\w|\{\w+\}))?(?:\([a-z]\))?"
_ASSIGNED = re.compile(rf"(?:{_NAME}|\({_NAME}(?:,{_NAME})*\))(?:=|\\in)")
_FUNCTION = re.compile(r"([A-Za-z])\(([a-z])\)")
_WORD = re.compile(r"\(?[A-Za-z](?:[A-Za-z' -]*[A-Za-z])?\)?")
_OPTION = re.compile(r"\(?([A-Z])(?:\)|[.:](?=.)|(?= ))|\(?([A-Z])\)?$")
_UNORDERED = ("", r"\{")


@dataclass(frozen=True)
class Collection:
    r"""``opening`` and ``closing`` are the brackets: ``(``, ``[``, ``\{``, or nothing for a bare list."""

    opening: str
    items: tuple[str, ...]
    closing: str


def same(answer: str, gold: str) -> bool | None:
    """Do two answers, spelled by ``spell``, agree? None where it takes algebra to tell."""
    a, g = _tight(answer), _tight(gold)
    if not a or not g:
        return False
    a = _with_argument_of(a, g)
    if a == g:
        return True
    if (assigned := _assignment_undone(a, g)) is not None:
        return same(*assigned)
    if _equation_for_zero(a, g):
        return False
    x, y = number(a), number(g)
    if x is not None and y is not None:
        return same_number(x, y)
    if _WORD.fullmatch(gold):
        return _same_words(answer, gold)
    c, d = _collection(a), _collection(g)
    if c is not None and d is not None:
        return _same_items(c, d)
    if c is not None and not c.opening and all(same(item, g) for item in c.items):
        return True  # one answer in two forms: 3/2 or 1.5
    listed, single = (c, y) if c is not None else (d, x)
    return False if listed is not None and single is not None and r"\pm" not in a + g else None


def _tight(text: str) -> str:
    """Without spaces, but for those between digits, and without braces around the whole."""
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    return text[1:-1] if re.fullmatch(r"\{[^{},;]*\}", text) else text


def _with_argument_of(a: str, g: str) -> str:
    """f(x) = 2x is f(t) = 2t: the argument of a named function takes the name that the gold answer gives it."""
    f, h = _FUNCTION.match(a), _FUNCTION.match(g)
    if f is None or h is None or f[1] != h[1] or f[2] == h[2] or re.search(rf"(?<![A-Za-z\\]){h[2]}(?![A-Za-z])", a):
        return a
    return re.sub(rf"(?<![A-Za-z\\]){f[2]}(?![A-Za-z])", h[2], a)


def _assignment_undone(a: str, g: str) -> tuple[str, str] | None:
    """Both without the ``x=`` or ``x \\in`` that one of them has and the other has not."""
    m, n = _ASSIGNED.match(a), _ASSIGNED.match(g)
    if m and not n and not re.search(r"[=<>]|\\[lg]e|\\ne|\\in(?![a-z])", g) and _single_relation(a):
        return a[m.end() :], g
    if n and not m and not re.search(r"[=<>]|\\[lg]e|\\ne|\\in(?![a-z])", a) and _single_relation(g):
        return a, g[n.end() :]
    return None


def _equation_for_zero(a: str, g: str) -> bool:
    """``x^2-4=0`` states an equation; it does not answer 0, although its right side is 0."""
    left, _, right = a.rpartition("=")
    return number(g) == number("0") == number(right) and re.search(r"[A-Za-z]", left) is not None


def _single_relation(text: str) -> bool:
    return len(re.findall(r"=|\\in(?![a-z])", text)) == 1


def _same_words(answer: str, gold: str) -> bool | None:
    """Names, words and letters of options. A single letter may be a variable, so a formula is left to algebra."""
    letter, word = gold.strip("()"), answer.strip("() ")
    if max(len(letter), len(word)) > 1 and word.casefold() == letter.casefold():
        return True
    if len(letter) == 1 and letter.isupper():
        option = _OPTION.match(answer)
        return bool(option and letter == (option[1] or option[2])) or (None if len(answer) <= 3 else False)
    return False if len(letter) > 1 and _WORD.fullmatch(answer) else None


def _collection(text: str) -> Collection | None:
    opening = next((o for o in (r"\{", "{", "(", "[") if text.startswith(o)), "")
    closing = next((c for c in (r"\}", "}", ")", "]") if text.endswith(c)), "")
    if opening and closing:
        inner = _split(text[len(opening) : -len(closing)])
        if inner is not None and len(_split(text) or []) == 1:
            curly = opening in ("{", r"\{") and closing in ("}", r"\}")
            if curly or (opening in "([" and closing in ")]" and len(inner) > 1):
                return Collection(r"\{" if curly else opening, tuple(inner), r"\}" if curly else closing)
    items = _split(text)
    return Collection("", tuple(items), "") if items is not None and len(items) > 1 else None


def _split(text: str) -> list[str] | None:
    """The parts between commas and semicolons that stand in no bracket; None if the brackets do not match."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif c in ",;" and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p for p in parts if p] if depth == 0 else None


def _same_items(c: Collection, d: Collection) -> bool | None:
    if len(c.items) != len(d.items):
        return False if all(number(i) for i in (*c.items, *d.items)) else None
    if c.opening in _UNORDERED and d.opening in _UNORDERED:
        return _same_unordered(list(c.items), list(d.items))
    each = [same(i, j) for i, j in zip(c.items, d.items, strict=True)]
    if False in each:
        return False
    if None in each:
        return None
    return (c.opening, c.closing) == (d.opening, d.closing) or {c.opening, d.opening} == {"", "("}


def _same_unordered(left: list[str], right: list[str]) -> bool | None:
    """Each item finds a partner of its own. Items that only algebra can match leave the question open."""
    open_question = False
    for item in left:
        verdicts = [same(item, other) for other in right]
        if True in verdicts:
            right.pop(verdicts.index(True))
        elif None in verdicts:
            open_question = True
        else:
            return False
    return None if open_question else True
