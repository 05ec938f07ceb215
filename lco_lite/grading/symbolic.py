"""Equality by computer algebra in a process of its own: each comparison ends in time, whatever the LaTeX says."""

import json
import sys
from collections.abc import Callable
from typing import Any

from lco_lite.errors import LcoError
from lco_lite.workers import LineWorker, NoAnswer, serve

SECONDS = 3.0
_MEMORY = 4 * 2**30  # bytes of the process's address space

_worker = LineWorker("lco_lite.grading.symbolic")


def equal(answer: str, gold: str, tolerance: float = 0.0) -> bool | None:
    """Is ``answer`` mathematically equal to ``gold`` (LaTeX without dollar signs)? None if it could not be told.

    With a ``tolerance``, values that differ by no more than that part of gold's count as equal. Threads take turns.
    """
    try:
        _worker.ready()
    except NoAnswer as e:
        raise LcoError(f"the process that compares formulas does not start ({e}); is math-verify installed?") from e
    try:
        return bool(json.loads(_worker.ask(json.dumps([answer, gold, tolerance]), SECONDS)))
    except NoAnswer:
        return None


def _prepare() -> Callable[[str], str]:
    """In the process: answers the empty line with ``ready`` and every other with its verdict."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    same = _comparison()
    same(r"\frac{\sqrt{2} x}{3}", r"1 + x^{2}", 0.0)  # the first comparison builds the tables of the parser

    def verdict(line: str) -> str:
        if not line:
            return "ready"
        try:
            return json.dumps(same(*json.loads(line)))
        except Exception:  # sympy raises whatever it likes on malformed input: not equal
            return json.dumps(False)

    return verdict


def _comparison() -> Callable[[str, str, float], bool]:
    """math-verify on two whole answers: what does not parse is not searched for something inside that does."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # Units are gone already; math-verify would take the letters of 2ab for some.
    plain = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True)
    whole = [LatexExtractionConfig(normalization_config=plain)]

    def parsed(text: str) -> list[Any]:
        return parse(f"${text}$", whole, "no_fallback", "first_match", parsing_timeout=None)

    def same(answer: str, gold: str, tolerance: float) -> bool:
        left, right = parsed(answer), parsed(gold)
        if verify(right, left, float_rounding=12, timeout_seconds=None):
            return not _apart(left[0], right[0])
        return bool(tolerance and left and right) and _near(left[0], right[0], tolerance)

    return same


def _apart(answer: Any, gold: Any) -> bool:
    """Constants that only rounding to digits after the point made equal: 2/2^98 and 1/2^98."""
    try:
        a, g = complex(answer), complex(gold)
    except (TypeError, ValueError, OverflowError):
        return False
    return abs(a - g) > 1e-9 * max(abs(a), abs(g))


def _near(answer: Any, gold: Any, tolerance: float) -> bool:
    """Both are constants, and near each other. Raises whatever sympy raises on what has no numerical value."""
    a, g = (complex(getattr(value, "rhs", value)) for value in (answer, gold))
    return abs(a - g) <= tolerance * abs(g)


if __name__ == "__main__":
    serve(_prepare)
