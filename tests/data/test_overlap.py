"""The same problem is found whatever its case and spacing; near twins by their long runs of words; nothing else is."""

from __future__ import annotations

import json

import pytest

from lco_lite.data.overlap import EvaluationItems, normalised
from lco_lite.data.prompts import demonstrations, file_pairs, rl_prompts
from lco_lite.errors import DataError
from lco_lite.models.chat import ChatFormat
from lco_lite.models.loading import byte_tokenizer
from lco_lite.recipe.file import load_recipe
from lco_lite.tasks import load_task

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
WORDS = LONG.split()


@pytest.fixture
def items(tmp_path):
    file = tmp_path / "items.jsonl"
    rows = [{"prompt": "What is 3 - 4?", "answer": "-1"}, {"prompt": LONG, "answer": "1"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluationItems(load_task("custom", str(file)))


def test_case_spacing_and_unicode_form_do_not_matter_and_signs_do(items):
    assert len(items) == 2
    found = items.same(["what  is\n3 - 4?", "What is 3 + 4?", "What is \uff13 - 4?"])
    assert [(o.row, o.same, o.share) for o in found] == [(0, True, 1.0), (2, True, 1.0)]


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        (LONG + " and more", 1.0),
        ("Before: " + " ".join(WORDS[:13]).upper() + ".", 13 / 16),
        (" ".join(WORDS[1:15]) + " other", 14 / 16),
        (" ".join(WORDS[:12]), None),
        ("What is 3 - 5?", None),
    ],
)
def test_a_near_twin_shares_half_of_the_words_in_runs_of_thirteen(items, prompt, share):
    assert [o.share for o in items.overlaps([prompt])] == ([] if share is None else [share])
    assert not items.same([prompt])


def test_the_likest_of_several_items_is_told(tmp_path):
    file = tmp_path / "items.jsonl"
    rows = [{"prompt": " ".join([*WORDS[:13], *"abcdefgh"]), "answer": "1"}, {"prompt": LONG, "answer": "1"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = EvaluationItems(load_task("custom", str(file))).overlaps([LONG])
    assert found.same and found.item.endswith("/1")


def test_what_a_task_writes_around_every_problem_is_no_overlap(tmp_path):
    file = tmp_path / "items.jsonl"
    row = {
        "problem": "Compute 1+1.",
        "answer": "2",
        "solution": "\\boxed{2}",
        "subject": "x",
        "level": 1,
        "unique_id": "a",
    }
    file.write_text(json.dumps(row) + "\n")
    task = load_task("math500", str(file))
    around = task.items("test")[0].prompt.replace("1+1", "2+2")
    items = EvaluationItems(task)
    assert not items.overlaps([around])
    assert [o.row for o in items.same(["Compute 1+1.", task.items("test")[0].prompt])] == [0, 1]


def test_normalising_keeps_every_sign():
    assert normalised(" A\u00a0b\t+\n-C ") == "a b + -c"


@pytest.mark.parametrize("key", ["demonstrations", "preferences", "prompts"])
def test_training_on_held_out_items_is_refused_unless_allowed_by_name(tiny, tmp_path, key):
    chat = ChatFormat(byte_tokenizer(64))
    read = {
        "demonstrations": demonstrations,
        "preferences": lambda recipe, task: file_pairs(recipe, task, chat),
        "prompts": rl_prompts,
    }[key]
    task = load_task("arithmetic")
    prompt = task.items("test")[3].prompt
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": text, "completion": "c", "chosen": "c", "rejected": "r"} for text in ("free", prompt)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [f"data.{key}={file}"]
    with pytest.raises(DataError, match=r"1 of its 2 prompts are held-out items of arithmetic.*arithmetic:same"):
        read(load_recipe(tiny, sets), task)
    with pytest.raises(DataError, match="held-out items"):
        read(load_recipe(tiny, [*sets, "data.allow_overlap=[arithmetic]"]), task)
    assert len(read(load_recipe(tiny, [*sets, "data.allow_overlap=['arithmetic:same']"]), task)) == 2
