"""Numbers as answers write them: exact values, and when two of them count as the same."""

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Number:
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
_DECIMAL_COMMA = re.compile(r"[-+]?(?:0|\d{4,}),\d{1,300}")


def number(text: str) -> Number | None:
    """The number that ``text`` writes (spelled by ``spell``), or None. Powers of ten are bounded, so this is quick."""
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    while text.startswith("(") and text.endswith(")") and "(" not in text[1:]:
        text = text[1:-1]
    if _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    if m := _SIMPLE.fullmatch(text):
        value = _value(m[2])
        exponent = int(m[3] or 0)
        return value and Number(_signed(m[1], value.value * Fraction(10) ** exponent), value.decimal, bool(m[4]))
    if m := _POWER.fullmatch(text):
        value = _value(m[2]) if m[2] else Number(Fraction(1))
        exponent = int(m[3] or m[4])
        return value and Number(_signed(m[1], value.value * Fraction(10) ** exponent), value.decimal)
    if m := _FRACTION.fullmatch(text):
        return _quotient(m[1], int(m[2] or 0), m[3], m[4], bool(m[5]))
    if m := _RATIO.fullmatch(text):
        return _quotient(m[1], 0, m[2], m[3], bool(m[4]))
    if m := _REPEATING.fullmatch(text):
        head, period = Fraction(f"{m[2] or 0}.{m[3] or 0}"), Fraction(int(m[4]), 10 ** len(m[4]) - 1)
        return Number(_signed(m[1], head + period / 10 ** len(m[3])))
    return None


def _value(digits: str) -> Number | None:
    digits = digits.replace(",", "")
    if not any(c.isdigit() for c in digits):
        return None
    return Number(Fraction(digits.rstrip(".")), "." in digits)


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _quotient(sign: str, whole: int, top: str, bottom: str, percent: bool) -> Number | None:
    a, b = _value(top.lstrip("+-")), _value(bottom.lstrip("+-"))
    if a is None or b is None or b.value == 0:
        return None
    value = _signed(top[0], a.value) / _signed(bottom[0], b.value)
    return Number(_signed(sign, whole + value), a.decimal or b.decimal, percent)


def same_number(a: Number, b: Number) -> bool:
    """Equal; a decimal need only agree to 12 digits, so that 0.0833333333333333 is 1/12 and 0.3333 is not 1/3.

    The percent sign is a unit, as in the grader of the MATH paper: 50% is 50, and 0.5, but does not answer 1/2.
    """
    if a.percent != b.percent:
        share, plain = (a, b) if a.percent else (b, a)
        return share.value == plain.value or (plain.decimal and share.value == 100 * plain.value)
    if a.decimal or b.decimal:
        return abs(a.value - b.value) <= Fraction(1, 10**12) * max(abs(a.value), abs(b.value))
    return a.value == b.value
