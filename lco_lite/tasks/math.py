r"""Is a mathematical answer right? The grader of every mathematics task, and their reward.

The final answer is found (``final_answer``), written in one spelling (``spelling``), and compared as text, as numbers
or item by item (``forms``); what is left needs algebra and goes to math-verify in a process of its own (``symbolic``).
"""

import re
from fractions import Fraction

from lco_lite.tasks import symbolic
from lco_lite.tasks.base import Grade
from lco_lite.tasks.final_answer import boxed, final_answer
from lco_lite.tasks.forms import same
from lco_lite.tasks.numbers import number
from lco_lite.tasks.spelling import spell

_DEEPEST = 12
_LONGEST = 500  # characters; the longest gold answer of MATH has 159


def grade(response: str, gold: str) -> bool:
    r"""Is the final answer of ``response`` equal to ``gold`` (LaTeX or plain text, or a text that boxes the answer)?

    Takes at most ``symbolic.SECONDS`` and never raises, whatever the model wrote.
    """
    return explain(response, gold).right


def explain(response: str, gold: str, tolerance: float = 0.0) -> Grade:
    """The same with the answer that was found and the reason; numbers may differ by ``tolerance``, a part of gold's."""
    answer = final_answer(response)
    if answer is None:
        return Grade(False, None, "no answer found")
    right, why = compare(answer, boxed(gold) or gold, tolerance)
    return Grade(right, answer, why)


def compare(answer: str, gold: str, tolerance: float = 0.0) -> tuple[bool, str]:
    """Are two answers equal, or numbers within ``tolerance``, and how that was told."""
    if len(answer) > _LONGEST:
        return False, f"longer than {_LONGEST} characters"
    spelled, wanted = spell(answer), spell(gold)
    verdict = same(spelled, wanted)
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
    """Whether two plain numbers are near each other; None where one of them is something else."""
    a, g = number(_after_equals(answer)), number(_after_equals(gold))
    if a is None or g is None:
        return None
    return abs(a.value - g.value) <= Fraction(tolerance) * abs(g.value)


def _after_equals(text: str) -> str:
    return re.split(r"=|\\approx|\\simeq", text)[-1].strip()


def _well_formed(text: str) -> bool:
    """Braces match and nest no deeper than in any answer a person writes: the parser guesses at the rest, or hangs."""
    depth = 0
    for c in text:
        depth += (c == "{") - (c == "}")
        if not 0 <= depth <= _DEEPEST:
            return False
    return depth == 0 and not text.endswith("\\")
