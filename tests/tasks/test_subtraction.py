from hypothesis import given
from hypothesis import strategies as st

from lco_lite.tasks import load_task
from lco_lite.tasks.arithmetic import borrowing

TASK = load_task("subtraction")
ITEM = next(item for item in TASK.items("train") if item.row["a"] % 10 < item.row["b"] % 10)
FIRST = {"train": ["87-16", "89-16", "43-30"], "test": ["99-24", "92-69", "89-56"]}

pairs = st.tuples(st.integers(10, 99), st.integers(10, 99)).map(lambda pair: tuple(sorted(pair, reverse=True)))


def test_working_writes_columns_from_the_right_with_the_borrow():
    assert borrowing(82, 45) == "12-5-0=7 8-4-1=3 #37"
    assert borrowing(47, 36) == "7-6-0=1 4-3-0=1 #11"
    assert borrowing(50, 49) == "10-9-0=1 5-4-1=0 #1"
    assert borrowing(10, 10) == "0-0-0=0 1-1-0=0 #0"


@given(pairs)
def test_every_column_is_right_and_the_columns_make_the_answer(pair):
    a, b = pair
    *columns, answer = borrowing(a, b).split(" ")
    digits = []
    for column in columns:
        left, result = column.split("=")
        first, second, third = map(int, left.split("-"))
        assert first - second - third == int(result)
        digits.append(int(result))
    assert all(0 <= digit <= 9 for digit in digits)
    assert answer == f"#{digits[0] + 10 * digits[1]}" == f"#{a - b}"


@given(pairs)
def test_ten_is_borrowed_in_the_units_exactly_where_the_tens_give_one(pair):
    a, b = pair
    units, tens, _ = borrowing(a, b).split(" ")
    borrowed = int(units.split("-")[0]) - a % 10
    assert borrowed == 10 * int(tens.split("=")[0].split("-")[2])
    assert (borrowed == 10) == (a % 10 < b % 10)


def test_splits_are_disjoint_and_have_every_difference_that_is_not_negative_once():
    train, test = ({(i.row["a"], i.row["b"]) for i in TASK.items(split)} for split in ("train", "test"))
    assert (len(train), len(test)) == (3_095, 1_000) == (len(TASK.items("train")), len(TASK.items("test")))
    assert not train & test
    assert train | test == {(a, b) for a in range(10, 100) for b in range(10, a + 1)}


def test_splits_are_the_same_in_every_process_and_release():
    assert [item.prompt for item in TASK.items("train")[:3]] == FIRST["train"]
    assert [item.prompt for item in TASK.items("test")[:3]] == FIRST["test"]


def test_demonstrations_are_right_fit_the_limit_and_only_train_has_them():
    for item in TASK.items("train"):
        assert item.demonstration is not None and len(item.demonstration.encode()) + 1 <= TASK.max_new_tokens
        assert TASK.grade(item.demonstration, item).right
        assert TASK.first_error(item.demonstration, item) is None
    assert all(item.demonstration is None for item in TASK.items("test"))


def test_first_error_is_where_the_response_leaves_the_working():
    right = ITEM.demonstration or ""
    for i in range(len(right)):
        assert TASK.first_error(right[:i] + "x" + right[i + 1 :], ITEM) == i
        assert TASK.first_error(right[:i].rstrip(), ITEM) == len(right[:i].rstrip())
    assert TASK.first_error(right + "0", ITEM) == len(right)


def test_the_working_of_the_sum_of_the_same_numbers_is_wrong():
    a, b = ITEM.row["a"], ITEM.row["b"]
    assert not TASK.grade(f"#{a + b}", ITEM).right
    assert TASK.grade(f"#{a - b}", ITEM).right
