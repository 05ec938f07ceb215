import json

import pytest

from lco_lite.errors import DataError, UsageError
from lco_lite.tasks import Own, load_task
from lco_lite.tasks.base import asked, lettered
from lco_lite.tasks.custom import prompt_of

ROWS = [
    {"prompt": "1 + 1?", "answer": 2},
    {"prompt": "A colour?", "answer": "red", "split": "test"},
    {"prompt": "2 + 2?", "answer": "4", "split": "train", "response": "It is 4."},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_rows_are_held_out_unless_they_say_train(data):
    task = load_task("custom", data)
    assert [item.prompt for item in task.items("test")] == ["1 + 1?", "A colour?"]
    (item,) = task.items("train")
    assert (item.gold, item.demonstration) == ("4", "It is 4.")


def test_the_grader_is_mathematics_unless_another_is_named(data):
    item = load_task("custom", data).items("test")[0]
    assert load_task("custom", data).grade(r"so \boxed{2.0}", item).right
    assert not load_task("custom:exact", data).grade("It is 2", item).right
    assert load_task("custom:exact", data).grade(" 2\n", item).right


def test_a_function_of_the_users_grades(data, tmp_path):
    (tmp_path / "my.py").write_text("def even(response, item):\n    return len(response) % 2 == 0\n")
    task = load_task(f"custom:{tmp_path}/my.py:even", data)
    item = task.items("test")[0]
    assert task.grade("ab", item).right and not task.grade("abc", item).right


def test_a_users_function_may_return_a_whole_grade(data, tmp_path):
    code = "from lco_lite.tasks import Grade\ndef f(response, item):\n    return Grade(True, response, 'because')\n"
    (tmp_path / "g.py").write_text(code)
    task = load_task(f"custom:{tmp_path}/g.py:f", data)
    assert task.grade("x", task.items("test")[0]).why == "because"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(response, item):\n    return response.nothing\n", "f failed on item custom/test/0: AttributeError"),
        ("def f(response, item):\n    return 1.0\n", "f returned 1.0 on item custom/test/0; a bool or a Grade"),
        ("f = 3\n", "has no function 'f'"),
        ("import absent_module\n", "cannot be imported: ModuleNotFoundError"),
        ("def f(:\n", "cannot be imported: SyntaxError"),
    ],
)
def test_a_fault_in_the_users_function_is_shown_not_graded(data, tmp_path, code, message):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(UsageError, match=message):
        task = load_task(f"custom:{tmp_path}/bad.py:f", data)
        task.grade("x", task.items("test")[0])


@pytest.mark.parametrize("grader", ["maths", "absent.py:f", "my.py"])
def test_an_unknown_grader_is_refused(data, grader):
    with pytest.raises(UsageError, match="unknown grader|no such file"):
        load_task(f"custom:{grader}", data)


def test_without_a_file_it_says_what_the_file_must_have():
    with pytest.raises(DataError, match="file with the columns prompt and answer.*data.task"):
        load_task("custom").items("test")


def test_a_file_without_training_rows_says_how_they_are_marked(tmp_path):
    path = tmp_path / "test_only.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match='no train items.*"split": "train"'):
        load_task("custom", path).items("train")


def test_without_a_split_one_is_drawn_by_prompt_and_seed(tmp_path):
    def split(n, seed=0, share=0.2):
        rows = [{"prompt": f"{i % 30} + 1?", "answer": i} for i in range(n)]
        (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = load_task("custom", tmp_path / "plain.jsonl", Own(held_out=share, seed=seed))
        return [{item.prompt for item in task.items(name)} for name in ("train", "test")]

    train, test = split(60)
    assert len(test) == 6 and len(train) == 24 and not train & test
    assert split(60) == [train, test] != split(60, seed=1)
    assert len(split(30, share=None)[1]) == 3


def test_columns_have_the_names_that_the_recipe_gives_and_a_missing_one_is_told(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("q,a,part\n1+1?,2,train\n2+2?,4,dev\n")
    task = load_task("custom", path, Own({"prompt": "q", "answer": "a", "split": "part"}))
    assert [(i.prompt, i.gold) for name in ("train", "test") for i in task.items(name)] == [
        ("1+1?", "2"),
        ("2+2?", "4"),
    ]
    with pytest.raises(DataError, match=r"mine.csv, row 1: has no column 'z', which the recipe names as prompt"):
        load_task("custom", path, Own({"prompt": "z"})).items("test")


def test_a_prompt_may_be_turns_and_an_answer_the_end_of_a_worked_one(tmp_path):
    turns = [
        {"role": r, "content": c} for r, c in (("system", "Short."), ("user", "a"), ("assistant", "b"), ("user", "c?"))
    ]
    row = {"prompt": turns, "answer": "3 + 4 is 7\n#### 7", "split": "train"}
    (tmp_path / "turns.jsonl").write_text(json.dumps(row))
    (item,) = load_task("custom", tmp_path / "turns.jsonl").items("train")
    assert (item.prompt, item.gold, item.demonstration) == ("c?", "7", row["answer"])
    assert asked(item, "Long.") == turns


def test_choices_are_shown_where_the_prompt_does_not_show_them(tmp_path):
    rows = [
        {"prompt": "Sky?", "choices": ["red", "blue"], "answer": 1},
        {"prompt": "Sky? A. red B. blue", "choices": ["red", "blue"], "answer": "B"},
        {"prompt": "Sky? A. red B. blue", "answer": "B"},
    ]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task("custom:choice", tmp_path / "choices.jsonl")
    assert [item.prompt for item in task.items("test")] == ["Sky?\nA. red\nB. blue", *["Sky? A. red B. blue"] * 2]
    assert all(task.grade("The answer is B.", item).right for item in task.items("test"))


@pytest.mark.parametrize(
    ("prompt", "choices", "listed"),
    [
        ("What is 2+3?", ["4", "5", "6", "2"], True),
        ("What is 2+3?", [2, 3], True),
        ("Is the sky red or blue?", ["red", "blue"], True),
        ("Sky? A. reddish B. blue", ["red", "blue"], True),
        ("Sky? A. red B. blue", ["red", "blue", "green"], True),
        ("Sky? A. red B. blue", ["blue", "red"], True),
        ("Sky?\n(a) red\n(b) dark  blue", ["red", "dark blue"], False),
        ("Sum?\n**A.** 4.5\n**B.** -5", [4.5, -5], False),
        ("Sky?\nA) red\nB) blue", ["A) red", "B) blue"], False),
    ],
)
def test_choices_are_left_out_only_where_the_prompt_has_each_of_them_with_its_letter(tmp_path, prompt, choices, listed):
    (tmp_path / "choices.jsonl").write_text(json.dumps({"prompt": prompt, "choices": choices, "answer": "B"}))
    (item,) = load_task("custom:choice", tmp_path / "choices.jsonl").items("test")
    assert item.prompt == (f"{prompt}\n{lettered(choices)}" if listed else prompt)


def test_the_right_answer_of_choices_is_a_letter_also_where_the_row_has_its_index(tmp_path):
    rows = [
        {"prompt": "Sky?", "choices": ["red", "blue"], "answer": answer} for answer in (1, "B", " B ", "Blue.\n#### B")
    ]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task("custom:choice", tmp_path / "choices.jsonl")
    assert [item.gold for item in task.items("test")] == ["B"] * 4
    assert all(task.grade("The answer is B.", item).right for item in task.items("test"))
    assert not any(task.grade("The answer is A.", item).right for item in task.items("test"))


@pytest.mark.parametrize("answer", [2, "C", "Blue", "AB"])
def test_an_answer_that_is_none_of_the_choices_is_refused_before_anything_is_asked(tmp_path, answer):
    rows = [{"prompt": "Sky?", "choices": ["red", "blue"], "answer": answer}]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        DataError, match=r"choices.jsonl, line 1: field answer is .*, not the letter, index or text of one"
    ):
        load_task("custom:choice", tmp_path / "choices.jsonl").items("test")


def test_an_instruction_is_asked_with_its_input(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"instruction": "Which sign?", "input": "3 - 5", "answer": "minus"}))
    assert load_task("custom", path).items("test")[0].prompt == "Which sign?\n\n3 - 5"


@pytest.mark.parametrize("grader", ["custom", "custom:choice"])
def test_what_is_held_out_goes_by_the_prompt_also_where_the_row_has_the_answer_in_its_turns(tmp_path, grader):
    rows = []
    for i in range(20):
        for said in ("first", "second"):
            turns = [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"{said} {i}"}]
            rows.append({"messages": turns, "answer": "A", "choices": ["red", "green"]})
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = load_task(grader, path, Own(held_out=0.3))
    held, trained = ({prompt_of(item.row) for item in task.items(split)} for split in ("test", "train"))
    assert len(held) == 6 and len(trained) == 14 and not held & trained


def test_choices_that_are_letters_alone_are_listed_by_the_prompt_itself(tmp_path):
    asked = "Sky?\nA. red\nB. blue"
    (tmp_path / "items.jsonl").write_text(json.dumps({"prompt": asked, "choices": ["A", "B"], "answer": "B"}) + "\n")
    (item,) = load_task("custom:choice", tmp_path / "items.jsonl").items("test")
    assert item.prompt == asked and item.gold == "B"


@pytest.mark.parametrize(
    ("prompt", "gold", "letters"),
    [
        ("Which?\nA. a\nB. b\nC. c\nD. d\nE. e\nF. f\nG. g\nH. h\nI. i\nJ. j", "A", 10),
        ("Which?\nA. a\nB. b\nC. c\nD. d\nE. e\nF. f\nG. g\nH. h\nI. i\nJ. j", "J", 10),
        ("Yes (a) or no (b)?", "B", 2),
        ("Red, green, blue or grey?", "C", 10),
        ("Q: which of them? A: red. C: blue.", "C", 10),
    ],
)
def test_without_choices_the_prompt_tells_how_many_there_are_and_never_the_answer(tmp_path, prompt, gold, letters):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "answer": gold}))
    (item,) = load_task("custom:choice", tmp_path / "rows.jsonl").items("test")
    assert len(item.row["choices"]) == letters and item.gold == gold


def test_an_answer_that_ends_before_it_begins_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "answer": "9 - 2 = 7\n#### "}))
    with pytest.raises(DataError, match="line 1: field answer has nothing after its last ####"):
        load_task("custom", tmp_path / "rows.jsonl").items("test")
