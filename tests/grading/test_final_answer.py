import time

import pytest

from lco_lite.grading.math import final_answer

FOUND = [
    # boxes
    (r"so $\boxed{5}$. No, \boxed{6}.", "6"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\fbox{7}", "7"),
    (r"$\boxed 7$", "7"),
    (r"put it in \boxed{5}, not in \boxed{}", "5"),
    (r"$\boxed{-2}$ and $\boxed{1}$", "-2, 1"),
    (r"\boxed{1},\boxed{2},\boxed{3}", "1, 2, 3"),
    (r"\boxed{1} is wrong, so \boxed{2}", "2"),
    ("\\boxed{4}\n\\boxed{5}", "5"),
    (r"\boxed{5} \boxed{5} \boxed{5}", "5"),
    ("\\boxed{12 and then it was cut", "12 and then it was cut"),
    (r"the answer is 3, that is \boxed{4}. The answer is 5.", "4"),
    ("We get \\boxed{4} first. That is wrong.\nThe final answer is $6$", "6"),
    (r"\boxed{4}. I hope the final answer is correct.", "4"),
    ("Final answer: as computed above, \\boxed{4}", "4"),
    ("<think>\\boxed{3}?</think> The answer is 4.", "4"),
    # statements
    ("The answer is 5. I hope it is correct.", "5"),
    ("The final answer is $x = 5$. Check: 5 + 1 = 6.", "x = 5"),
    ("Answer: 3.5 apples", "3.5"),
    ("the answer to the question is: **42**", "42"),
    ("**Final Answer**:\n\n72", "72"),
    ("Final Answer: The volume of $ABCD$ is 120. I hope it is correct.", "120"),
    ("so the answers are $1$, $2$ and $3$.", "1, 2, 3"),
    ("He has 72 clips.\n#### 72", "72"),
    ("#### 2. Compute 5 + 5\nThe answer is 10.\n#### 3. Check it", "10"),
    ("Final answer: Evelyn", "Evelyn"),
    ("The answer is 17 (since 9 * 2 = 18).", "17"),
    ("Final answer: 7 apples. (There were 12 at first.)", "7"),
    ("The answer is 3 1/2 cups.", "3 1/2"),
    # the last line
    ("5 + 5 = 10\nSo she pays $18 a day.", "$18"),
    (r"Thus \( x = 7 \).", "x = 7"),
    ("The total cost: $2 * 9 = $18", "$18"),
    ("The area is 9π square inches.", "9π"),
    ("The side is 2√3 cm.", "2√3"),
    ("Answer \\[ \n 9 \n \\]", "9"),
    (r"So it is \[ \begin{matrix} 1 \\[2pt] 3 \end{matrix} \]", r"\begin{matrix} 1 \\[2pt] 3 \end{matrix}"),
    (r"$\frac{1}{2}$", r"\frac{1}{2}"),
    ("the loss is 28 %.", "28 %"),
    ("the loss is $28$ percent.", r"28\%"),
    ("it is 1,000.99m²", "1,000.99"),
    ("Matrix: $\\begin{pmatrix} 1 & 2 \\end{pmatrix}$", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    ("(14/3, 2/3)", "(14/3, 2/3)"),
    ("east", "east"),
    ("72", "72"),
    ("16 - 7 = 9\nA: 18", "18"),
    ("A: $18", "$18"),
    ("### 18", "18"),
    (">> 18", "18"),
    ("- 18", "18"),
    ("- -18", "-18"),
    ("-18", "-18"),
    ("1. 18", "18"),
    ("=> 18", "18"),
    ("**18**", "18"),
    ("`18`.", "18"),
    ("Therefore, she has *1,018* left.", "1,018"),
    ("####: 18", "18"),
    ("A: $<<9*2=18>>18 per day\nA: 18", "18"),
    ("\\[\n\\begin{aligned}\nx &= 16 - 7 \\\\\n&= 9\n\\end{aligned}\n\\]", "= 9"),
    ("\\begin{align*}\nx &= 9\n\\end{align*}", "x = 9"),
]
ABSENT = [
    "",
    "   \n",
    r"\boxed{}",
    "I do not know how to do this one.",
    "First 5 + 5 = 10.\nThen we look at the rest of the",
    "AZYUK2A is the code word here",
    "$$",
]


@pytest.mark.parametrize(("response", "answer"), FOUND)
def test_the_final_answer_is_found(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize("response", ABSENT)
def test_a_response_without_a_final_answer_has_none(response):
    assert final_answer(response) is None


@pytest.mark.parametrize("part", ["$1$ ", "\\[", "\\(", "$1 2", "a: ", "\\text{", "answer ", "1,", "\\boxed{"])
def test_no_text_takes_long_to_read(part):
    """2 s where each number is held against every formula, 0.8 s where delimiters that open are scanned 600 deep."""
    start = time.process_time()
    final_answer(part * (20_000 // len(part)))
    assert time.process_time() - start < 0.5
