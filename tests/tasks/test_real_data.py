"""The tasks on their real files, where ``LCO_LITE_DATA`` names a folder that has them."""

import os
from pathlib import Path

import pytest

from lco_lite.tasks import load_task

SIZES = [
    ("gsm8k", "gsm8k", "train", 7_473),
    ("gsm8k", "gsm8k", "test", 1_319),
    ("math500", "math_train", "train", 11_998),  # 12,000 but two with an empty box
    ("math500", "math500", "test", 500),
    ("amc23", "amc23", "test", 40),
    ("aime24", "aime24", "test", 30),
    ("aime25", "aime25", "test", 30),
    ("minervamath", "minerva_math", "test", 272),
    ("mmlu", "mmlu", "dev", 285),
    ("mmlu", "mmlu", "test", 14_042),
    ("mmlu_redux", "mmlu_redux", "test", 5_330),
    ("mmlu_redux_corrected", "mmlu_redux", "test", 5_431),  # 101 of the 107 with a wrong answer name another one
    ("mmlu_redux_all", "mmlu_redux", "test", 5_700),
]


def _task(name: str, file: str):
    folder = os.environ.get("LCO_LITE_DATA")
    if not folder or not list(Path(folder).glob(f"{file}*.jsonl")):
        pytest.skip(f"LCO_LITE_DATA names no folder with {file}*.jsonl")
    return load_task(name)


@pytest.mark.parametrize(("name", "file", "split", "size"), SIZES)
def test_every_item_is_read_and_its_gold_answer_is_right(name, file, split, size):
    task = _task(name, file)
    items = task.items(split)
    assert len(items) == size == len({item.id for item in items})
    sample = items[:: max(1, size // 300)]
    wrong = [item.id for item in sample if not task.grade(rf"Hence \boxed{{{item.gold}}}.", item).right]
    assert wrong == []


@pytest.mark.parametrize(("name", "file"), [("gsm8k", "gsm8k"), ("math500", "math_train")])
def test_demonstrations_are_graded_right(name, file):
    task = _task(name, file)
    sample = task.items("train")[::20]
    assert [item.id for item in sample if not task.grade(item.demonstration, item).right] == []


def test_no_problem_of_math500_is_trained_on():
    task = _task("math500", "math_train")
    held_out = {"".join(item.row["problem"].split()) for item in task.items("test")}
    assert not [item.id for item in task.items("train") if "".join(item.row["problem"].split()) in held_out]


def test_the_answers_that_the_public_grader_always_marks_wrong_are_right():
    task = _task("math500", "math500")
    special = [item for item in task.items("test") if item.gold == "0" or r"\text" in item.gold]
    assert len(special) > 5
    assert all(task.grade(rf"\boxed{{{item.gold}}}", item).right for item in special)


def test_a_wrong_gold_answer_of_another_item_is_not_accepted():
    task = _task("math500", "math500")
    items = task.items("test")[:120]
    accepted = [
        (one.gold, other.gold)
        for one, other in zip(items, items[1:], strict=False)
        if task.grade(rf"\boxed{{{one.gold}}}", other).right
    ]
    assert [pair for pair in accepted if pair[0] != pair[1].removeprefix("x=")] == []
