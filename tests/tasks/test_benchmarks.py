"""Each benchmark on a few rows of its schema: what becomes prompt, gold and demonstration, and what is refused."""

import json
from dataclasses import replace

import pytest

from lco_lite.errors import DataError, UsageError
from lco_lite.tasks import load_task

ADD = {"question": "What is 1,000 + 234?", "answer": "1,000 + 234 = <<1000+234=1234>>1,234.\n#### 1,234"}
HALF = {"problem": "Halve $x$.", "solution": r"It is $\boxed{\frac{x}{2}}$.", "level": "Level 1", "type": "Algebra"}
CHOICES = {"question": "Which is a prime?", "choices": ["4", "6", "7", "9"], "answer": 2, "subject": "numbers"}


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task over rows given by file name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(name: str, **files: list[dict]):
        for file, rows in files.items():
            (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_task(name, tmp_path)

    return make


def test_gsm8k_takes_the_number_after_the_marks_and_boxes_it_in_the_demonstration(task):
    (item,) = task("gsm8k", gsm8k_train=[ADD]).items("train")
    assert item.prompt.startswith("What is 1,000 + 234?\n") and r"\boxed{}" in item.prompt
    assert item.gold == "1234"
    assert item.demonstration == "1,000 + 234 = 1,234.\nThe answer is $\\boxed{1234}$."


def test_a_demonstration_of_gsm8k_is_right(task):
    gsm8k = task("gsm8k", gsm8k_train=[ADD])
    (item,) = gsm8k.items("train")
    assert gsm8k.grade(item.demonstration, item).right
    assert not gsm8k.grade(r"\boxed{1235}", item).right


def test_items_held_out_have_no_demonstration(task):
    (item,) = task("gsm8k", gsm8k_test=[ADD]).items("test")
    assert item.demonstration is None and item.id == "gsm8k/test/0"


def test_math_trains_on_both_files_and_takes_gold_from_the_box(task):
    other = HALF | {"solution": r"\boxed{5}"}
    items = task("math500", math_train=[HALF], math_test_minus_math500=[other]).items("train")
    assert [item.gold for item in items] == [r"\frac{x}{2}", "5"]
    assert items[0].demonstration == HALF["solution"]


def test_math_leaves_out_a_row_that_boxes_nothing(task):
    empty = HALF | {"solution": r"so the answer is $\boxed{}$."}
    items = task("math500", math_train=[empty, HALF], math_test_minus_math500=[HALF]).items("train")
    assert [item.id for item in items] == ["math500/train/1", "math500/train/2"]


def test_math500_prefers_the_answer_field(task):
    (item,) = task("math500", math500_test=[HALF | {"answer": "x/2"}]).items("test")
    assert item.gold == "x/2"


@pytest.mark.parametrize(
    ("name", "answer", "gold"), [("amc23", 27.0, "27"), ("aime24", "073", "073"), ("aime25", 70, "70")]
)
def test_contest_answers_are_whole_numbers_however_they_are_stored(task, name, answer, gold):
    contest = task(name, **{f"{name}_test": [{"problem": "How many?", "answer": answer}]})
    (item,) = contest.items("test")
    assert item.gold == gold
    assert contest.grade(rf"\boxed{{{int(gold)}}}", item).right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (r"\boxed{4.5e33}", True),
        (r"\boxed{4.49 \times 10^{33} \text{ erg/s}}", True),
        (r"\boxed{4.52 \cdot 10^{33}}", True),
        (r"\boxed{L = 4.5 \times 10^{33}}", True),
        (r"\boxed{4.6e33}", False),
        (r"\boxed{4.5e32}", False),
        (r"\boxed{-4.5e33}", False),
        (r"\boxed{\frac{9}{2} \cdot \sqrt{10^{66}}}", True),
        (r"\boxed{x}", False),
    ],
)
def test_minerva_numbers_are_right_within_one_percent(task, answer, right):
    row = {"problem": "How bright?", "solution": r"\boxed{4.5e33} \mathrm{~erg} / \mathrm{s}"}
    minerva = task("minervamath", minerva_math_test=[row])
    (item,) = minerva.items("test")
    assert minerva.grade(answer, item).right == right


def test_minerva_formulas_are_compared_as_formulas_and_with_their_value(task):
    row = {"problem": "Which angle?", "solution": r"\boxed{np.arcsin(10/13)}$."}
    minerva = task("minervamath", minerva_math_test=[row])
    (item,) = minerva.items("test")
    assert minerva.grade(r"\boxed{\arcsin(10/13)}", item).right
    assert minerva.grade(r"\boxed{0.878}", item).right
    assert not minerva.grade(r"\boxed{0.778}", item).right


def test_mmlu_letters_its_choices_and_keeps_them_for_scoring(task):
    mmlu = task("mmlu", mmlu_test=[CHOICES], mmlu_dev=[CHOICES])
    (item,), (shown,) = mmlu.items("test"), mmlu.items("dev")
    assert "A. 4\nB. 6\nC. 7\nD. 9" in item.prompt
    assert item.gold == "C" and item.row["choices"][item.row["answer"]] == "7"
    assert shown.demonstration == r"\boxed{C}"
    assert mmlu.grade("It is (C).\n(C)", item).right
    assert mmlu.grade("I cannot tell", item).extracted is None


def test_mmlu_redux_keeps_the_faultless_questions_however_they_are_marked(task):
    marks = ["ok", "OK ", "Ok", "Wrong Groundtruth", "bad_question_clarity"]
    rows = [CHOICES | {"error_type": mark} for mark in marks]
    assert len(task("mmlu_redux", mmlu_redux=rows).items("test")) == 3
    assert len(task("mmlu_redux_all", mmlu_redux=rows).items("test")) == 5


@pytest.mark.parametrize(
    ("verdict", "named", "gold"),
    [
        ("Wrong Groundtruth", "A", "A"),
        ("wrong_groundtruth ", "0", "A"),
        ("wrong groundtruth", "3", "D"),
        ("Wrong groundtruth", "", None),  # which it is, they do not say
        ("Wrong groundtruth", "C", None),  # MMLU's own answer
        ("Wrong groundtruth", "2", None),
        ("Wrong groundtruth", "4", None),
        ("Wrong groundtruth", "A or B", None),
        ("no correct answer", "A", None),
        ("ok", "A", "C"),
    ],
)
def test_mmlu_redux_corrected_takes_the_annotators_choice_for_a_wrong_answer(task, verdict, named, gold):
    row = CHOICES | {"error_type": verdict, "correct_answer": named}
    items = task("mmlu_redux_corrected", mmlu_redux=[row], mmlu_dev=[CHOICES]).items("test")
    assert [item.gold for item in items] == ([] if gold is None else [gold])
    assert all("ABCD"[item.row["answer"]] == gold for item in items), "by likelihood the row's answer counts"


@pytest.mark.parametrize(
    ("name", "file", "row", "message"),
    [
        ("gsm8k", "gsm8k_test", {"question": "q"}, "line 2: has no field 'answer'; found question"),
        ("gsm8k", "gsm8k_test", ADD | {"answer": "72"}, "line 2: field answer has no '#### '"),
        ("gsm8k", "gsm8k_test", ADD | {"question": 5}, "line 2: field question is 5, not a text"),
        ("math500", "math500_test", {"problem": "p", "answer": "1"}, "line 2: has no field 'solution'"),
        ("amc23", "amc23_test", {"problem": "p", "answer": None}, "line 2: field answer is None"),
        ("amc23", "amc23_test", {"answer": 1}, "line 2: has no field 'problem or question'"),
        ("minervamath", "minerva_math_test", {"problem": "p", "solution": "no box"}, "line 2: .*no .boxed answer"),
        ("mmlu", "mmlu_test", CHOICES | {"answer": 4}, "line 2: field answer is 4, not the index of one of 4"),
        ("mmlu", "mmlu_test", CHOICES | {"answer": True}, "line 2: field answer is True"),
        ("mmlu", "mmlu_test", CHOICES | {"choices": "ABCD"}, "line 2: field choices is 'ABCD', not a list"),
        (
            "mmlu_redux_corrected",
            "mmlu_redux",
            CHOICES | {"error_type": "wrong groundtruth"},
            "line 2: .*correct_answer",
        ),
        ("mmlu_redux", "mmlu_redux", CHOICES, "line [12]: has no field 'error_type'"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(task, name, file, row, message):
    good = {"gsm8k": ADD, "math500": HALF, "mmlu": CHOICES}
    good |= dict.fromkeys(["mmlu_redux", "mmlu_redux_corrected"], CHOICES | {"error_type": "ok"})
    first = good.get(name, {"problem": "p", "answer": 1, "solution": r"\boxed{1}"})
    with pytest.raises(DataError, match=f"{file}.jsonl, {message}"):
        task(name, **{file: [first, row]}).items("test")


def test_an_unknown_split_names_those_there_are(task):
    with pytest.raises(UsageError, match="train, test"):
        task("gsm8k", gsm8k_test=[ADD]).items("dev")


def test_a_template_is_overridden_by_replacing_the_field(task):
    brief = replace(task("gsm8k", gsm8k_test=[ADD]), template="Q: {problem}\nA:", system="Be brief.")
    (item,) = brief.items("test")
    assert item.prompt == "Q: What is 1,000 + 234?\nA:" and brief.system == "Be brief."


def test_a_template_takes_question_choices_and_subject_from_the_row_and_leaves_other_braces_alone(task):
    row = CHOICES | {"question": " Is {choices} in \\boxed{subject}? ", "subject": "number_theory"}
    template = "{subject}: {question}\n{choices}\n\\boxed{} {answer} {problem}"
    (item,) = replace(task("mmlu", mmlu_test=[row]), template=template).items("test")
    question, choices = "Is {choices} in \\boxed{subject}?", "A. 4\nB. 6\nC. 7\nD. 9"
    whole = f"number theory: {question}\n{choices}\n\\boxed{{}} {{answer}} {question}\n\n{choices}"
    assert item.prompt == whole, "once, and never the answer"


def test_a_template_that_names_what_a_row_does_not_have_is_told_with_the_line(task):
    with pytest.raises(DataError, match=r"gsm8k_test.jsonl, line 1: has no field 'subject'; found question, answer"):
        replace(task("gsm8k", gsm8k_test=[ADD]), template="{subject}: {problem}").items("test")


def test_rows_are_read_once(task, tmp_path):
    gsm8k = task("gsm8k", gsm8k_test=[ADD])
    first = gsm8k.items("test")
    (tmp_path / "gsm8k_test.jsonl").unlink()
    assert gsm8k.items("test") is first


def test_data_that_is_not_there_is_named():
    with pytest.raises(DataError, match="absent.jsonl: no such file or folder"):
        load_task("gsm8k", "absent.jsonl")
