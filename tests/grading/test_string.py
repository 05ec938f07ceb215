"""The public code's comparison, whose verdicts on these answers are known from running its class."""

import pytest

from lco_lite.grading import Item
from lco_lite.grading.string import grade_string


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("0", "0", False),
        (r"\text{Evelyn}", r"\text{Evelyn}", False),
        ("0.50", "0.5", False),
        ("0.5", r"\frac{1}{2}", False),
        (r"\frac12", r"\frac{1}{2}", False),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        ("1,000", "1000", True),
        ("x=5", "5", True),
        (r"5\text{ cm}", "5", True),
        ("12.0", "12", True),
        (r"90^\circ", "90", True),
        (r"50\%", "50", True),
        (r"\$32", "32", True),
        ("007", "7", True),
        (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2}\right)", True),
        ("1.5e6", "1500000", False),
    ],
)
def test_it_says_what_the_public_code_says(answer, gold, right):
    item = Item("i", "p", gold, None, {})
    assert grade_string(rf"\boxed{{1}} no, \boxed{{{answer}}}.", item).right is right
    assert not grade_string(f"The answer is {answer}.", item).right, "no box, no answer"


@pytest.mark.parametrize(("response", "extracted"), [(r"\boxed{5", "5"), (r"$\boxed 5$", "5"), ("5", None)])
def test_boxes_that_do_not_close(response, extracted):
    assert grade_string(response, Item("i", "p", "5", None, {})).extracted == extracted
