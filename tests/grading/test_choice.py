import pytest

from lco_lite.errors import UsageError
from lco_lite.grading import Item
from lco_lite.grading.choice import grade_choice, picked

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
        ("The answer is option B.", "B"),
        ("The correct answer is $B$.", "B"),
        ("$B$", "B"),
        ("B (London)", "B"),
        ("The answer is B (London).", "B"),
        ("The answer is **B** (False, False)", "B"),
        ("Answer: (b)", "B"),
        (r"the answer is \(\text{B}\)", "B"),
        (r"\boxed{Option B}", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{(b)}", "B"),
        (r"\boxed{B (False, False)}", "B"),
        ("Therefore, B is correct.", "B"),
        ("So option C is the best answer.", "C"),
        ("(D) is right, for 1/2 is half.", "D"),
        ("A. True, True\nB. False, False\nC. A vector space\nD. 1/2\n\nThe answer is C.", "C"),
        ("A. True, True\nB. False, False\nC. A vector space\nD. 1/2\n\nC", "C"),
        ("B\n\nA. is wrong since it is not true.\nC. is no vector space.", "B"),
        ("The correct answer is (B) False, False.", "B"),
        ("Answer: C) A vector space\n\nExplanation: it has a basis.", "C"),
        ("The answer is **B) False, False**.", "B"),
        ("The correct answer would be D.", "D"),
        ("The correct answer is A. True, True.\n\nB. False, False is wrong, as is C.", "A"),
        ("The answer is B (A is wrong).", "B"),
        ("The answer is D (I, II and IV).", "D"),
        (r"<think>\boxed{A}</think>The answer is B.", "B"),
        (r"\boxed{B. 500 B.C.}", "B"),
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
        "A. True, True\nB. False, False\nC. A vector space\nD. 1/2",
        "A. True, True B. False, False C. A vector space D. 1/2",
        "A) True, True\n\nB) False, False",
        "**A.** True\n**B.** False",
        "A\nB\nC\nD",
        "A is not correct.",
        "The answer is not A.",
        "A vector space is the answer",
        "Answer choices:\nA. Yes\nB. No",
        "Answer: A. True, True\nB. False, False\nC. A vector space\nD. $\\frac{1}{2}$",
        "The answer is one of these: (A) True, True; (B) False, False",
        "The answer is A, B or C.",
        "The answer is (A)(B)(C)(D)",
        "The answer is A (or B).",
        r"\boxed{A. True, True B. False, False}",
        "The answer should not be A.",
        "<think>The answer is A.</think>It cannot be told.",
        "\x00" * 50,
    ],
)
def test_a_response_that_picks_nothing_is_not_guessed_at(response):
    assert picked(response, CHOICES) is None


def test_a_letter_that_is_also_the_text_of_a_choice_is_that_text_in_a_box():
    assert picked(r"\boxed{a}", ["b", "a"]) == "B"
    assert picked(r"\boxed{A}", ["b", "a"]) == "A"


def test_a_name_in_a_box_is_no_letter():
    assert picked(r"\boxed{B. F. Skinner}", ["Freud", "Money", "B. F. Skinner", "Ellis"]) == "C"


def test_letters_beyond_the_choices_are_none_of_them():
    assert picked(r"\boxed{C}", ["yes", "no"]) is None


def test_the_answer_is_a_letter_or_an_index_and_an_item_without_choices_is_named():
    for answer in ("B", 1):
        item = Item("q", "", str(answer), None, {"choices": ["yes", "no"], "answer": answer})
        assert grade_choice("The answer is B.", item).right and not grade_choice("A", item).right
    with pytest.raises(UsageError, match="item q has no `choices`"):
        grade_choice("B", Item("q", "", "18", None, {"answer": "18"}))


def test_choices_that_are_numbers_are_graded_as_their_texts():
    item = Item("q", "", "B", None, {"choices": [100, 200, 2.5, 400], "answer": "B"})
    for response in ("The answer is B.", r"\boxed{200}", "Answer: B. 200", "A. 100\nB. 200\nC. 2.5\nD. 400\n\nB"):
        assert grade_choice(response, item).right, response
    for response in (r"\boxed{100}", "The answer is C.", "Answer: A. 100\nB. 200\nC. 2.5\nD. 400"):
        assert not grade_choice(response, item).right, response
