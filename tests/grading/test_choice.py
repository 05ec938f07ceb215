import pytest

from lco_lite.grading.choice import picked

CHOICES = ["True, True", "False, False", "A vector space", r"$\frac{1}{2}$"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{B. False, False}", "B"),
        (r"\boxed{False, False}", "B"),
        (r"\boxed{\dfrac12}", "D"),
        (r"\boxed{A}? No: \boxed{C}", "C"),
        (r"The answer is A. So \boxed{C}", "C"),
        ("The answer is (B).", "B"),
        ("the correct choice is **D**", "D"),
        ("Answer: C", "C"),
        ("Answer: A\nWait.\nAnswer: B", "B"),
        ("B", "B"),
        ("B.", "B"),
        ("(C) A vector space", "C"),
        ("Let me see.\n\nD. because it is half", "D"),
        ("The answer is B because it is false.", "B"),
    ],
)
def test_the_choice_is_found(response, letter):
    assert picked(response, CHOICES) == letter


@pytest.mark.parametrize(
    "response",
    [
        "",
        "I cannot tell.",
        "The answer is a vector space.",
        "The answer is A vector space.",
        r"\boxed{E}",
        r"\boxed{7}",
        r"\boxed{A and B}",
        "E",
        "Both A and B are right",
        "\x00" * 50,
    ],
)
def test_a_response_that_picks_nothing_is_not_guessed_at(response):
    assert picked(response, CHOICES) is None


def test_letters_beyond_the_choices_are_none_of_them():
    assert picked(r"\boxed{C}", ["yes", "no"]) is None
