from dataclasses import replace

import pytest

from lco_lite.tasks.arithmetic import Arithmetic
from lco_lite.tasks.base import conversation

TASK = Arithmetic()
ITEM = TASK.items("test")[0]


def test_a_conversation_is_the_prompt_alone_without_system_text_or_examples():
    assert conversation(TASK, ITEM) == [{"role": "user", "content": ITEM.prompt}]


def test_system_text_is_overridden_by_replacing_the_field():
    task = replace(TASK, system="Add.")
    assert conversation(task, ITEM)[0] == {"role": "system", "content": "Add."}


def test_examples_come_answered_before_the_prompt():
    shots = TASK.items("train")[:2]
    turns = conversation(TASK, ITEM, shots)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[1]["content"] == shots[0].demonstration


def test_an_example_without_a_demonstration_is_refused():
    with pytest.raises(ValueError, match="no demonstration"):
        conversation(TASK, ITEM, [ITEM])
