from dataclasses import replace

import pytest

from lco_lite.errors import UsageError
from lco_lite.tasks import load_task
from lco_lite.tasks.arithmetic import working

TASK = load_task("arithmetic")
ITEM = next(item for item in TASK.items("train") if item.row["a"] % 10 + item.row["b"] % 10 >= 10)
RIGHT = ITEM.demonstration or ""
FIRST = {"train": ["33+78", "82+84", "17+77"], "test": ["54+69", "48+52", "91+92"]}


def test_working_writes_columns_from_the_right_with_the_carry():
    assert working(47, 38) == "7+8+0=15 4+3+1=8 #85"
    assert working(10, 10) == "0+0+0=0 1+1+0=2 #20"


def test_working_carries_into_the_hundreds():
    assert working(99, 99) == "9+9+0=18 9+9+1=19 #198"


def test_splits_have_their_sizes_and_no_problem_twice():
    train, test = TASK.items("train"), TASK.items("test")
    assert (len(train), len(test)) == (5_000, 1_000)
    assert len({item.id for item in [*train, *test]}) == 6_000


def test_no_test_problem_is_a_train_problem_with_swapped_summands():
    seen = {(item.row["b"], item.row["a"]) for item in TASK.items("train")}
    assert not any((item.row["a"], item.row["b"]) in seen for item in TASK.items("test"))


def test_splits_are_the_same_in_every_process_and_release():
    assert [item.prompt for item in TASK.items("train")[:3]] == FIRST["train"]
    assert [item.prompt for item in TASK.items("test")[:3]] == FIRST["test"]


def test_demonstrations_are_right_and_only_train_has_them():
    for item in TASK.items("train")[:500]:
        assert item.demonstration is not None
        assert TASK.grade(item.demonstration, item).right
        assert TASK.first_error(item.demonstration, item) is None
    assert all(item.demonstration is None for item in TASK.items("test"))


def test_longest_response_and_its_end_fit_max_new_tokens():
    longest = max(len(working(a, b).encode()) for a in range(10, 100) for b in range(10, 100))
    assert longest + 1 <= TASK.max_new_tokens


def test_grade_takes_the_number_after_the_last_mark():
    grade = TASK.grade(f"#1 no, #{ITEM.gold} \n", ITEM)
    assert grade.right and grade.extracted == ITEM.gold
    assert not TASK.grade(f"#{ITEM.gold} #1", ITEM).right


@pytest.mark.parametrize("answer", ["", "0{}", "{}.0", "{}1", "{} is it", "-{}", "\ud800", "{}\x00"])
def test_grade_accepts_nothing_but_the_exact_number(answer):
    assert not TASK.grade("#" + answer.format(ITEM.gold), ITEM).right


def test_grade_without_a_mark_finds_nothing():
    grade = TASK.grade(ITEM.gold, ITEM)
    assert not grade.right and grade.extracted is None


def test_first_error_is_where_the_response_leaves_the_working():
    for i in range(len(RIGHT)):
        wrong = RIGHT[:i] + "x" + RIGHT[i + 1 :]
        assert TASK.first_error(wrong, ITEM) == i


def test_first_error_is_the_end_of_a_response_that_stops_too_early():
    assert TASK.first_error("", ITEM) == 0
    assert TASK.first_error(RIGHT[:-1], ITEM) == len(RIGHT) - 1


def test_first_error_finds_what_goes_on_after_the_answer():
    assert TASK.first_error(RIGHT + " #1", ITEM) == len(RIGHT)


def test_a_template_stands_around_the_problem_and_leaves_ids_and_order_as_they_are():
    asked = replace(TASK, template="What is {problem}?").items("test")
    assert asked[0].prompt == "What is 54+69?"
    assert [item.id for item in asked] == [item.id for item in TASK.items("test")]
    assert asked[0].id == "arithmetic/54+69"


def test_unknown_split_names_those_there_are():
    with pytest.raises(UsageError, match="train, test"):
        TASK.items("validation")


def test_data_for_a_generated_task_is_refused():
    with pytest.raises(UsageError, match="makes its own problems"):
        load_task("arithmetic", data=__file__)
