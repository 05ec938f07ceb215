"""GSM8K's published solutions, and MATH's questions, as what a model might write: what is read out of plain text."""

import os
import random
import re

import pytest

from lco_lite.files import read_jsonl
from lco_lite.grading import equality
from lco_lite.grading.math import _SPAN, _content, grade_answer

# how models end, {n} the answer
ENDINGS = """#### {n}|####: {n}|A: {n}|A: ${n}|A: **{n}**|Answer: {n}|ANSWER: {n}|Answer: ${n}|**Answer:** {n}
**Answer: {n}**|### {n}|### Answer: {n}|>> {n}|> {n}|- {n}|* {n}|• {n}|– {n}|1. {n}|2) {n}|=> {n}|-> {n}
→ {n}|∴ {n}|= {n}|{n}|{n}.|{n}.0|**{n}**|*{n}*|`{n}`|_{n}_|"{n}"|({n})|≈ {n}|${n}$|$${n}$$|\\({n}\\)
\\[{n}\\]|{n} dollars|${n}|\\${n}|€{n}|£{n}|{n} €|{n}m|{n} m|{n}km|{n} kg|{n}g|{n}h|{n} l|{n}%
{n} apples per day.|So she makes ${n} every day.|Therefore, Jo makes **${n}** a day.
<answer>{n}</answer>|Final Answer: {n}|x = {n}|Total: {n}|Total = {n}|Result: {n}|Ans: {n}
The answer is {n}.|The answer is: {n}|The answer is ${n}$.
The final answer is ${n}$. I hope it is correct.|Thus, the answer is {n} eggs.
The correct answer is **{n}**.|{n} is the answer.|16-7=9; 9*2={n}|9 * 2 = {n}|9*2={n} dollars
9 x 2 = {n}|She makes 9 * 2 = {n} dollars a day.|\\boxed{{{n}}}|$\\boxed{{{n}}}$ dollars
\\boxed{{{n} \\text{{ dollars}}}}|\\boxed{{\\${n}}}|\\boxed{{€{n}}}|\\boxed{{{n}m}}|\\boxed{{x={n}}}
\\boxed{{9*2={n}}}|The answer is \\boxed{{{n}}}.
First \\boxed{{77777}} apples, then \\boxed{{{n}}} in all.
\\boxed{{77777}} was wrong. The final answer is ${n}$|{{"answer": {n}}}"""
STYLES = [style for line in ENDINGS.split("\n") for style in line.split("|")]


def rows(name):
    folder = os.environ.get("LCO_LITE_DATA")
    if not folder or not os.path.exists(f"{folder}/{name}"):
        pytest.skip(f"LCO_LITE_DATA names no folder with {name}")
    return read_jsonl(f"{folder}/{name}")


def test_an_answer_is_read_however_it_ends_and_a_wrong_one_is_wrong():
    random_ = random.Random(0)
    made = right = let_in = 0
    for row in random_.sample(rows("gsm8k_train.jsonl"), 300):
        working, _, gold = row["answer"].rpartition("\n#### ")
        working, value = re.sub(r"<<.*?>>", "", working), int(gold.replace(",", ""))
        for style in random_.sample(STYLES, 8):
            number = f"{value:,}" if random_.random() < 0.5 else str(value)
            right += grade_answer(f"{working}\n{style.format(n=number)}", gold).right
            wrong = random_.choice([value + 1, -value or 1, 10 * value or 1])
            let_in += grade_answer(f"{working}\n{style.format(n=wrong)}", gold).right
            made += 1
    assert right >= 0.995 * made and let_in <= 0.001 * made, (right, let_in, made)


@pytest.mark.slow
def test_the_published_solutions_are_right_in_the_form_in_which_they_are_published():
    """With calculator marks, ended by ``A: 18``."""
    solutions = [(row["answer"].replace("\n#### ", "\nA: "), row["answer"]) for row in rows("gsm8k_train.jsonl")]
    assert sum(grade_answer(text, answer.rpartition("#### ")[2]).right for text, answer in solutions) == len(solutions)


@pytest.mark.slow
def test_what_is_copied_from_the_question_earns_nothing_where_answers_are_to_be_worked_out():
    """Of every other answer of MATH500, those that are plain numbers."""
    copied = {False: 0, True: 0}
    for row in rows("math500_test.jsonl")[::2]:
        if equality.number(equality.spell(row["answer"])) is None:
            continue
        spans = [text for span in _SPAN.finditer(row["problem"]) if re.search(r"\d", text := _content(span))]
        for evaluated in copied:
            copied[evaluated] += any(
                grade_answer(rf"\boxed{{{span}}}", row["answer"], 0.0, evaluated).right for span in spans
            )
        assert grade_answer(rf"\boxed{{{row['answer']}}}", row["answer"], 0.0, True).right
    # what is left is a number in the question that is the answer, or a fraction to be written as a decimal
    assert copied[False] >= 8 and copied[True] <= 4, copied
