"""The comparisons that need no algebra: text, numbers, lists, tuples, intervals, sets.

``spell`` writes an answer in one spelling; ``equal`` answers yes, no, or None for "ask a computer algebra system". Most
comparisons of a benchmark end here.
"""

import re
from fractions import Fraction
from math import gcd
from typing import NamedTuple

_NAME = r"[A-Za-z]{1,3}(?:_(?:\w|\{\w+\}))?(?:\([a-z]\))?"
_ASSIGNED = re.compile(rf"(?:{_NAME}|\({_NAME}(?:,{_NAME})*\))(?:=|\\in)")
_FUNCTION = re.compile(r"([A-Za-z])\(([a-z])\)")
_WORD = re.compile(r"\(?[A-Za-z](?:[A-Za-z' -]*[A-Za-z])?\)?")
_OPTION = re.compile(r"\(?([A-Z])(?:\)|[.:](?=.)|(?= ))|\(?([A-Z])\)?$")
_RELATION = re.compile(r"[=<>]|\\[lg]e|\\ne|\\in(?![a-z])")
_UNORDERED = ("", r"\{")
_IN_BASE = re.compile(r"\(?(\d[\dA-F]*|[A-F][\dA-F]+)\)?_\{?(\d{1,2})\}?")


class Collection(NamedTuple):
    r"""``opening`` and ``closing`` are the brackets: ``(``, ``[``, ``\{``, or nothing for a bare list."""

    opening: str
    items: tuple[str, ...]
    closing: str


def equal(answer: str, gold: str) -> bool | None:
    """Do two answers, spelled by ``spell``, agree? None where it takes algebra to tell."""
    a, g = _tight(answer), _tight(gold)
    if not a or not g:
        return False
    a = _with_argument_of(a, g)
    if a.replace(";", ",") == g.replace(";", ","):
        return True
    if (based := _equal_in_base(a, g)) is not None:
        return based
    if (value := _assigned(a, g)) is not None:
        return equal(value, g)
    if (value := _assigned(g, a)) is not None:
        return equal(a, value)
    if _equation_for_zero(a, g):
        return False
    x, y = number(a), number(g)
    x = x or (y and _quantity(a))
    if y and _DECIMAL_COMMA.fullmatch(a) and (decimal := number(a.replace(",", "."))) and equal_numbers(decimal, y):
        return True
    if x is not None and y is not None:
        return equal_numbers(x, y)
    if _WORD.fullmatch(gold):
        return _equal_words(answer, gold)
    c, d = _collection(a), _collection(g)
    if c is not None and d is not None:
        return _equal_items(c, d)
    if c is not None and not c.opening and all(equal(item, g) for item in c.items):
        return True  # one answer in two forms: 3/2 or 1.5
    listed, single = (c, y) if c is not None else (d, x)
    return False if listed is not None and single is not None and r"\pm" not in a + g else None


def _tight(text: str) -> str:
    """Without spaces, but for those between digits, and without braces around the whole. A comma before a space parts a
    list, so that ``32, 349`` are two numbers."""
    text = re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"(?<=\d), (?=\d)", ";", text))
    return text[1:-1] if re.fullmatch(r"\{[^{},;]*\}", text) else text


def _with_argument_of(a: str, g: str) -> str:
    """f(x) = 2x is f(t) = 2t: the argument of a named function takes the name that the gold answer gives it."""
    f, h = _FUNCTION.match(a), _FUNCTION.match(g)
    if f is None or h is None or f[1] != h[1] or f[2] == h[2] or re.search(rf"(?<![A-Za-z\\]){h[2]}(?![A-Za-z])", a):
        return a
    return re.sub(rf"(?<![A-Za-z\\]){f[2]}(?![A-Za-z])", h[2], a)


def _assigned(text: str, other: str) -> str | None:
    """``text`` without its ``x=`` or ``x \\in``; None where it has none, ``other`` has one too, or more is related."""
    match = _ASSIGNED.match(text)
    if match is None or _ASSIGNED.match(other) or _RELATION.search(other):
        return None
    return text[match.end() :] if len(re.findall(r"=|\\in(?![a-z])", text)) == 1 else None


def _equation_for_zero(a: str, g: str) -> bool:
    """``x^2-4=0`` states an equation; it does not answer 0, although its right side is 0."""
    left, _, right = a.rpartition("=")
    return number(g) == number("0") == number(right) and re.search(r"[A-Za-z]", left) is not None


def _equal_in_base(a: str, g: str) -> bool | None:
    """``52_7`` is not ``52_8``; ``52`` alone is in the base that was asked for. None where neither names a base."""
    x, y = _IN_BASE.fullmatch(a), _IN_BASE.fullmatch(g)
    if x and y:
        return (x[1].lstrip("0"), int(x[2])) == (y[1].lstrip("0"), int(y[2]))
    based, other = (x, g) if x else (y, a)
    return based[1] == other if based and number(other) else None


def worked_out(answer: str, gold: str) -> bool:
    """Whether ``answer``, equal to ``gold``, is written as a number where gold is one: digits, a fraction in lowest
    terms, a power of ten with its factor; or just as gold is. It may be a side of an equality: ``m+n=116``."""
    a, g = _tight(answer), _tight(gold)
    g = _assigned(g, "") or g
    if a == g or _IN_BASE.fullmatch(a) or not (number(g) or _IN_BASE.fullmatch(g)):
        return True
    if len(sides := re.split(r"=|\\(?:approx|simeq)", a)) > 1:
        solved = not re.search(r"[A-Za-z]\^\{?[2-9]", a)  # \omega^3=1 is an equation of the question
        return solved and any(equal(side, g) and worked_out(side, g) for side in sides)
    if m := _POWER.fullmatch(a):
        return bool(m[2])
    if m := _FRACTION.fullmatch(a) or _RATIO.fullmatch(a):
        *_, top, bottom, _ = m.groups()
        top = top.replace(",", "")
        return top.lstrip("+-").isdigit() and bottom.isdigit() and int(bottom) > 1 == gcd(int(top), int(bottom))
    if (c := _collection(a)) is not None:
        return all(worked_out(item, gold) for item in c.items)
    return (number(a) or _quantity(a)) is not None


def _quantity(text: str) -> "Number | None":
    """The number that a text gives where the other answer is a number: without the letter of a unit, and without the
    computation before it (``16-7=9;9*2=18``)."""
    left, _, value = text.rpartition("=")
    if re.search(r"[A-Za-z]", re.sub(r"\\(?:times|cdot|div|d?frac)|(?<=\d)x(?=\d)", "", left)):
        return None
    return number(re.sub(r"(?<=\d) ?[mgshLl]$", "", value))


def _equal_words(answer: str, gold: str) -> bool | None:
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


def _equal_items(c: Collection, d: Collection) -> bool | None:
    if len(c.items) != len(d.items):
        return False if all(number(i) for i in (*c.items, *d.items)) else None
    if c.opening in _UNORDERED and d.opening in _UNORDERED:
        return _equal_unordered(list(c.items), list(d.items))
    each = [equal(i, j) for i, j in zip(c.items, d.items, strict=True)]
    if False in each:
        return False
    if None in each:
        return None
    return (c.opening, c.closing) == (d.opening, d.closing) or {c.opening, d.opening} == {"", "("}


def _equal_unordered(left: list[str], right: list[str]) -> bool | None:
    """Each item finds a partner of its own. Items that only algebra can match leave the question open."""
    open_question = False
    for item in left:
        verdicts = [equal(item, other) for other in right]
        if True in verdicts:
            right.pop(verdicts.index(True))
        elif None in verdicts:
            open_question = True
        else:
            return False
    return None if open_question else True


class Number(NamedTuple):
    """An exact value and how it was written: ``decimal`` may be rounded, ``percent`` keeps its numeral as the value."""

    value: Fraction
    decimal: bool = False
    percent: bool = False


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,300})?(?:\.\d{0,300})?"
_SIMPLE = re.compile(rf"([-+]?)\(?({_DIGITS})(?:[eE]([-+]?\d{{1,3}}))?\)?(%?)")
_POWER = re.compile(rf"([-+]?)(?:({_DIGITS})(?:\\times|\\cdot|\*|x))?10\^(?:\{{([-+]?\d{{1,3}})\}}|(\d))")
_FRACTION = re.compile(r"([-+]?)(\d*)\\frac\{([-+]?[\d.]{1,300})\}\{([-+]?[\d.]{1,300})\}(%?)")
_RATIO = re.compile(r"([-+]?)\(?([-+]?[\d.]{1,300}|\d{1,3}(?:,\d{3})+)\)?/\(?([-+]?[\d.]{1,300})\)?(%?)")
_REPEATING = re.compile(r"([-+]?)(\d{0,99})\.(\d{0,99})\\(?:overline|bar)\{(\d{1,99})\}")
_DECIMAL_COMMA = re.compile(r"(?!\d{1,3},\d{3}$)\d{1,300},\d{1,300}")  # 1,234 is a thousand


def number(text: str) -> Number | None:
    """The number that ``text`` writes (spelled by ``spell``), or None. Powers of ten are bounded, so this is quick."""
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    while text.startswith("(") and text.endswith(")") and "(" not in text[1:]:
        text = text[1:-1]
    if re.fullmatch(r"[-+]?(?:0|\d{4,}),\d{1,300}", text):
        text = text.replace(",", ".")
    if m := _SIMPLE.fullmatch(text):
        return _scaled(m[1], m[2], m[3] or "0", bool(m[4]))
    if m := _POWER.fullmatch(text):
        return _scaled(m[1], m[2] or "1", m[3] or m[4])
    if m := _FRACTION.fullmatch(text):
        return _quotient(m[1], m[2] or "0", m[3], m[4], bool(m[5]))
    if m := _RATIO.fullmatch(text):
        return _quotient(m[1], "0", m[2], m[3], bool(m[4]))
    if m := _REPEATING.fullmatch(text):
        head, period = Fraction(f"{m[2] or 0}.{m[3] or 0}"), Fraction(int(m[4]), 10 ** len(m[4]) - 1)
        return Number(int(f"{m[1]}1") * (head + period / 10 ** len(m[3])))
    return None


def _scaled(sign: str, numeral: str, exponent: str, percent: bool = False) -> Number | None:
    value = _value(numeral)
    if value is None:
        return None
    return Number(int(f"{sign}1") * value * Fraction(10) ** int(exponent), "." in numeral, percent)


def _quotient(sign: str, whole: str, top: str, bottom: str, percent: bool) -> Number | None:
    a, b = _value(top), _value(bottom)
    if a is None or not b:
        return None
    return Number(int(f"{sign}1") * (int(whole) + a / b), "." in top + bottom, percent)


def _value(numeral: str) -> Fraction | None:
    """None for what has no digit, or two points."""
    numeral = numeral.replace(",", "").rstrip(".")
    return Fraction(numeral) if re.fullmatch(r"[-+]?(?:\d+|\d*\.\d+)", numeral) else None


def equal_numbers(a: Number, b: Number) -> bool:
    """Equal; a decimal need only agree to 12 digits, so that 0.0833333333333333 is 1/12 and 0.3333 is not 1/3.

    The percent sign is a unit, as in the grader of the MATH paper: 50% is 50, and 0.5, but does not answer 1/2.
    """
    if a.percent != b.percent:
        share, plain = (a, b) if a.percent else (b, a)
        return share.value == plain.value or (plain.decimal and share.value == 100 * plain.value)
    if a.decimal or b.decimal:
        return abs(a.value - b.value) <= Fraction(1, 10**12) * max(abs(a.value), abs(b.value))
    return a.value == b.value


_SYMBOLS = r"×\times ·\cdot π\pi ∞\infty ≤\le ≥\ge ≠\ne ±\pm ∪\cup ∈\in ∅\emptyset °^\circ"
_UNICODE = str.maketrans("−–\u00a0\u202f", "--  ") | {ord(s[0]): f"{s[1:]} " for s in _SYMBOLS.split()}
_REWRITES = [
    (r"\{\s*,\s*\}\s*(?=\d{3})|(?<=\d),\s*\\!\s*(?=\d{3})", ""),  # thousands as LaTeX writes them
    (r"(?<=\d)(?:\\[,;: ]|\s)\s*(?=\d{3}(?!\d))", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
    (r"(?<!\\)\\[!,;:>\s]|~|\$|\\[()\[\]]|\*\*", " "),
    (r"^\s*(?:\\approx|≈|=)", ""),
    (r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm)\s*\{)?\s*(?:th|st|nd|rd)[\s}]*$", ""),  # ordinals
    (r"(?:√|(?<![A-Za-z\\])sqrt)\s*(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty "),
    (r"(?<![\d.^_])(\d+) (\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
    (r"(?<=[\d.])[eE]([-+]?\d{1,3})(?![\w.])", r" \\times 10^{\1}"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|(?<=[\d}])\s*\\?(?:text|mathrm)?\{?\s*degrees?\s*\}?", ""),
    (r"\\?%|(?<=[\d}\s])(?:percent(?:age)?|pct)\b", "%"),
]
_UNIT_LETTERS = "AaCFghJKLmNsVW"
_CONJUNCTION = re.compile(r"(?<![A-Za-z\\])(?:,\s*)?(?:and|or)(?![a-z])")
_UNIT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|hbox|math(?:rm|bf|it|sf)|operatorname|bf)\s*\{([^{}]*)\}"
    r"(?:\s*\^\s*\{?\s*-?\d+\s*\}?)?"
)
_PLAIN_UNIT = re.compile(
    r"(?<=[\d})])(?:\s+(?!sqrt|pi\b|sin|cos|tan|log|ln|mod)(?:[A-Za-z]{2,})(?:[\s./]+[A-Za-z]+)*"
    r"|(?:cm|mm|km|kg|mg|ml|mph|ft|hrs?|min|cents?|units?)|\s+[mgs])(?:\s*\^\s*\{?\d\}?|[²³])?\s*$"
)


def spell(answer: str) -> str:
    """One spelling: layout, units, degree and currency signs go; fractions and relations are written alike."""
    text = re.sub(r"\\\$|[€£¥₹]", "", answer.translate(_UNICODE))
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    text = _unwrap(text.strip())
    text = _CONJUNCTION.sub(",", text)
    text = _PLAIN_UNIT.sub("", text.rstrip(" .,;"))
    return re.sub(r"\s+", " ", text).rstrip(" .,;").lstrip(" ,;")


def _unwrap(text: str) -> str:
    r"""``\text{...}`` becomes its content where it is an answer or a joint, and goes where it names a unit."""

    def replace(match: re.Match[str]) -> str:
        content = match[1].strip(" ~")
        named_before = text[: match.start()].strip()
        joint = _CONJUNCTION.fullmatch(content)
        letter = len(content) == 1 and content not in _UNIT_LETTERS
        if joint or not named_before or letter or not re.match(r"[A-Za-z°]", content):
            return f" {content} "
        return " "

    return _UNIT.sub(replace, text)
