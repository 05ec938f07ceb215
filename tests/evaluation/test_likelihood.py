"""Choices by log-likelihood: equal to a computation by hand on whole logits, one pass, refused where there are none."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch

from lco_lite.evaluation.likelihood import choice_logprobs, likeliest_letter
from lco_lite.evaluation.prompts import eval_prompts
from lco_lite.grading.choice import answer_index
from lco_lite.models.chat import ChatFormat, PlainText
from lco_lite.models.language_model import Role
from lco_lite.models.loading import build_scratch, byte_tokenizer
from lco_lite.recipe import Recipe
from lco_lite.recipe.sections import Init
from lco_lite.tasks import Item, load_task
from tests.evaluation.eval_cases import call, result_of, rows_of, score
from tests.models import families

QUESTIONS = [
    {"question": f"Which is {i}?", "subject": "counting", "choices": ["0", "1", "2", "3"], "answer": i % 4}
    for i in range(6)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "model"
    build_scratch(Init(hidden_size=32, layers=1, heads=2, intermediate_size=64, max_length=512), folder, seed=0)
    return folder


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    for name, rows in (("mmlu_test", QUESTIONS), ("mmlu_dev", QUESTIONS[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def scored(**settings: Any) -> Recipe:
    """A recipe with these settings of ``eval``."""
    bare = {"model": {"path": "x"}, "task": "mmlu", "sft": {"enabled": False}}
    return Recipe.model_validate(bare | {"eval": settings})


def by_hand(role: Role, prompt: list[int], choice: list[int]) -> float:
    """The sum of log-softmax over whole logits, one unpadded sequence at a time."""
    with torch.no_grad(), role.model.use(role.adapter):
        logits = role.model.base(input_ids=torch.tensor([prompt + choice])).logits[0].double()
    rows = role.model.head.rows  # what pads the head is no token
    logprobs = logits[len(prompt) - 1 : -1, :rows].log_softmax(-1)
    return sum(logprobs[i, token].item() for i, token in enumerate(choice))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "cohere"])
@pytest.mark.parametrize("choices", [[[34], [35], [36]], [[34, 40], [34, 41, 42], [35]]], ids=["letters", "words"])
def test_log_likelihoods_are_those_of_whole_logits(tmp_path, family, choices):
    role = Role(families.load(families.save(family, tmp_path)))
    prompts = [[5, 6, 7], [8] * 11, [9]]
    asked = [choices, choices[:2], choices]
    found = choice_logprobs(role, prompts, asked)
    for prompt, some, values in zip(prompts, asked, found, strict=True):
        assert values == pytest.approx([by_hand(role, prompt, choice) for choice in some], abs=2e-4)
    assert len({round(v, 3) for values in found for v in values}) == 8, "nothing is equal by accident"


def test_the_score_of_a_task_is_that_of_the_computation_by_hand(model, mmlu):
    result = score(model, mmlu, "mmlu", mmlu, "--scoring", "likelihood", "-s", "eval.few_shot=2")
    assert result.exit_code == 0, result.output
    made, rows = result_of(mmlu, "mmlu-likelihood"), rows_of(mmlu, "mmlu-likelihood")
    role = Role(families.load(model))
    chat = ChatFormat(role.model.tokenizer)
    prompts = eval_prompts(scored(scoring="likelihood", few_shot=2), load_task("mmlu", mmlu))
    rights = []
    for prompt, row in zip(prompts, rows, strict=True):
        letters = [chat.response(letter, closed=False) for letter in "ABCD"]
        values = [by_hand(role, chat.prompt(prompt.messages), ids) for ids in letters]
        assert list(row["logprobs"].values()) == pytest.approx(values, abs=2e-4)
        assert row["extracted"] == "ABCD"[values.index(max(values))]
        rights.append(row["extracted"] == row["gold"])
    assert made["metric"] == "accuracy" and made["mean"] == pytest.approx(sum(rights) / 6)
    assert made["seeds"] == 1 and made["std"] is None
    assert "mmlu accuracy" in result.stdout


def test_the_prompt_asks_for_a_letter_and_examples_answer_with_one(mmlu):
    task = load_task("mmlu", mmlu)
    first = eval_prompts(scored(scoring="likelihood", few_shot=1), task)[0].messages
    assert first[-1]["content"].endswith("D. 3\n\nAnswer with the letter of the right choice.")
    assert first[1] == {"role": "assistant", "content": "A"}
    generated = eval_prompts(scored(few_shot=1), task)[0].messages
    assert "boxed" in generated[-1]["content"] and generated[1]["content"] == r"\boxed{A}"


def test_examples_of_a_task_of_ones_own_answer_with_the_letter_too(tmp_path):
    row = {"prompt": "which?", "choices": ["a", "b"], "answer": 1, "response": "b"}
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row | {"split": s}) + "\n" for s in ("train", "test")))
    task = load_task("custom", tmp_path / "items.jsonl")
    (prompt,) = eval_prompts(scored(scoring="likelihood", few_shot=1), task)
    assert prompt.messages[1]["content"] == "B"


# lm-eval 0.4.12: lm_eval/tasks/mmlu/default/_default_template_yaml, and the description in each subject's file
DESCRIPTION = "The following are multiple choice questions (with answers) about %s.\n\n"
DOC_TO_TEXT = (
    "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
)
TARGET_DELIMITER, FEWSHOT_DELIMITER = " ", "\n\n"
AS_LM_EVAL = {
    "scoring": "likelihood",
    "format": "text",
    "system": "The following are multiple choice questions (with answers) about {subject}.",
    "template": "{question}\n{choices}\nAnswer:",
    "few_shot": 5,
}


def as_lm_eval(row: dict[str, Any], dev: list[dict[str, Any]]) -> str:
    """What lm-eval gives to the model, by its own templates."""
    doc_to_text = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(DOC_TO_TEXT).render
    shown = [doc for doc in dev if doc["subject"] == row["subject"]][:5]  # fewshot_config: first_n
    examples = [f"{doc_to_text(d)}{TARGET_DELIMITER}{'ABCD'[d['answer']]}{FEWSHOT_DELIMITER}" for d in shown]
    return DESCRIPTION % " ".join(row["subject"].split("_")) + "".join(examples) + doc_to_text(row)


def stock_mmlu(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(test, dev) rows of two subjects: questions with spaces around them, with LaTeX braces, with empty lines."""
    questions = [
        "  What is {choices}?\n",
        "In \\boxed{question}, or $\\frac{1}{2}$?",
        "Statement 1.\n\nStatement 2.",
        "x",
        "y",
    ]
    test, dev = (
        [
            {
                "question": q,
                "subject": subject,
                "choices": [f"{split} ", "{problem}", "", str(i)],
                "answer": (i + k) % 4,
            }
            for k, subject in enumerate(["abstract_algebra", "high_school_us_history"])
            for i, q in enumerate(questions)
        ]
        for split in ("test", "dev")
    )
    for name, rows in (("mmlu_test", test), ("mmlu_dev", dev)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return test, dev


def test_the_stock_format_of_lm_eval_is_written_to_the_letter(tmp_path):
    test, dev = stock_mmlu(tmp_path)
    plain = PlainText(byte_tokenizer(512))
    prompts = eval_prompts(scored(**AS_LM_EVAL), load_task("mmlu", tmp_path))
    assert [plain.prompt_text(p.messages) for p in prompts] == [as_lm_eval(row, dev) for row in test]


def test_every_question_of_mmlu_reads_as_in_lm_eval():
    folder = Path(os.environ.get("LCO_LITE_DATA", "."))
    if not (folder / "mmlu_test.jsonl").exists():
        pytest.skip("LCO_LITE_DATA names no folder with MMLU")
    test, dev = ([json.loads(line) for line in (folder / f"mmlu_{s}.jsonl").open()] for s in ("test", "dev"))
    plain = PlainText(byte_tokenizer(512))
    prompts = eval_prompts(scored(**AS_LM_EVAL), load_task("mmlu", folder))
    assert len(prompts) == len(test) == 14_042
    wrong = [
        row
        for p, row in list(zip(prompts, test, strict=True))[::29]
        if plain.prompt_text(p.messages) != as_lm_eval(row, dev)
    ]
    assert wrong == []


def test_a_score_in_lm_evals_format_is_that_of_its_text_and_tokens(model, tmp_path):
    test, dev = stock_mmlu(tmp_path)
    long = tmp_path / "long"
    build_scratch(Init(hidden_size=32, layers=1, heads=2, intermediate_size=64, max_length=2048), long, seed=0)
    sets = [f"eval.{key}={json.dumps(value)}" for key, value in AS_LM_EVAL.items()]
    result = score(long, tmp_path, "mmlu", tmp_path, *itertools.chain(*(("-s", s) for s in sets)))
    assert result.exit_code == 0, result.output
    made, role = result_of(tmp_path, "mmlu-likelihood"), Role(families.load(long))
    protocol = made["settings"]["protocol"]
    assert {key: protocol[key] for key in AS_LM_EVAL} == AS_LM_EVAL
    for row, doc in zip(rows_of(tmp_path, "mmlu-likelihood"), test, strict=True):
        context = role.model.tokenizer(as_lm_eval(doc, dev))["input_ids"]
        whole = [role.model.tokenizer(as_lm_eval(doc, dev) + f" {letter}")["input_ids"] for letter in "ABCD"]
        values = [by_hand(role, context, ids[len(context) :]) for ids in whole]
        assert list(row["logprobs"].values()) == pytest.approx(values, abs=2e-4)
        assert len(whole[0]) == len(context) + 2, "a space and a letter: two bytes"


def test_examples_of_the_users_choices_answer_with_their_letter(mmlu, tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {"question": "Which?", "choices": ["p", "q"], "answer": 1},
        {"question": "And?", "choices": ["r", "s"], "answer": "A"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = AS_LM_EVAL | {"examples": str(file), "few_shot": 0, "system": ""}
    (prompt, *_) = eval_prompts(scored(**settings), load_task("mmlu", mmlu))
    text = PlainText(byte_tokenizer(512)).prompt_text(prompt.messages)
    asked = "Which is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    assert text == f"Which?\nA. p\nB. q\nAnswer: B\n\nAnd?\nA. r\nB. s\nAnswer: A\n\n{asked}"


def test_the_corrected_answer_is_the_right_one_by_likelihood_too(tmp_path):
    marked = QUESTIONS[0] | {"error_type": "Wrong Groundtruth", "correct_answer": "C"}
    (tmp_path / "mmlu_redux.jsonl").write_text(json.dumps(marked) + "\n")
    (item,) = load_task("mmlu_redux_corrected", tmp_path).items("test")
    assert item.gold == "C" and likeliest_letter(item, [-3.0, -3.0, -1.0, -2.0])["right"]


def test_nothing_is_sampled(model, mmlu, monkeypatch):
    from lco_lite.rollout.hf import HFEngine

    monkeypatch.setattr(HFEngine, "generate", lambda *_: pytest.fail("sampled"))
    assert score(model, mmlu, "mmlu", mmlu, "--scoring", "likelihood").exit_code == 0


def test_a_score_by_likelihood_stands_beside_that_by_generation_and_is_compared_with_its_like(model, mmlu):
    for more in (["--scoring", "likelihood"], ["--limit", "2", "--greedy"]):
        assert score(model, mmlu, "mmlu", mmlu, *more).exit_code == 0
    assert result_of(mmlu, "mmlu")["n"] == 2 and result_of(mmlu, "mmlu-likelihood")["n"] == 6
    flags = ["eval", "mmlu", "--runs", mmlu, "--name", "run", "--compare", "base", "base", "--json"]
    assert json.loads(call(*flags).stdout)["mmlu"]["items"] == 2
    assert json.loads(call(*flags, "--scoring", "likelihood").stdout)["mmlu"]["items"] == 6


def test_your_own_questions_need_choices_and_a_letter_or_index(model, tmp_path):
    data = tmp_path / "own.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"Pick {c}.", "answer": c, "choices": ["x", "y"]} for c in "AB"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score(model, tmp_path, "custom:choice", data, "--scoring", "likelihood").exit_code == 0
    assert [list(row["logprobs"]) for row in rows_of(tmp_path, "custom-likelihood")] == [["A", "B"]] * 2


@pytest.mark.parametrize(
    ("row", "index"),
    [
        ({"choices": ["x", "y"], "answer": 1}, 1),
        ({"choices": ["x", "y"], "answer": "B"}, 1),
        ({"choices": ["x", "y"], "answer": "C"}, None),
        ({"choices": ["x", "y"], "answer": -1}, None),
        ({"choices": ["x", "y"], "answer": True}, None),
        ({"choices": ["x", "y"], "answer": " y "}, 1),
        ({"choices": ["x", "y"], "answer": "1"}, 1),
        ({"choices": ["x", "y"], "answer": "2"}, None),
        ({"choices": ["x", "y"], "answer": "z"}, None),
        ({"choices": ["y", "y"], "answer": "y"}, None),
        ({"choices": ["B", "A"], "answer": "A"}, 0),
        ({"choices": [4, 5, 6], "answer": "5"}, 1),
        ({"choices": [2, 3, 1], "answer": "2"}, None),
        ({"choices": [0, 1, 2], "answer": "2"}, 2),
        ({"choices": ["x"], "answer": 0}, None),
        ({"answer": 0}, None),
    ],
)
def test_the_right_choice_is_known_by_letter_index_or_text(row, index):
    assert answer_index(Item("i", "p", "g", None, row)) == index


def test_the_first_of_equally_likely_letters_is_picked():
    row = likeliest_letter(Item("i", "p", "B", None, {"choices": ["x", "y"], "answer": 1}), [-1.0, -1.0])
    assert row["extracted"] == "A" and not row["right"] and row["why"] == "the answer is B"


def test_a_letter_comes_after_what_the_template_writes_before_an_answer(model):
    role = Role(families.load(model))
    role.model.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}\n{% endfor %}"
    )
    chat, asked = ChatFormat(role.model.tokenizer), [{"role": "user", "content": "Which?"}]
    prompt, letters = chat.choices(asked, "AB")
    assert prompt == [*chat.prompt(asked), *chat.ids("<think></think>")] and letters == [chat.ids("A"), chat.ids("B")]
    (values,) = choice_logprobs(role, [prompt], [letters])
    assert values == pytest.approx([by_hand(role, prompt, chat.ids(c)) for c in "AB"], abs=2e-4)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["arithmetic", "--scoring", "likelihood"], "has no `choices`"),
        (["arithmetic", "--scoring", "likelyhood"], "eval.scoring"),
        (["arithmetic", "--scoring", "likelihood", "--samples", "2"], "likelihood makes no responses"),
    ],
)
def test_what_cannot_be_scored_by_likelihood_is_refused(model, tmp_path, args, told):
    result = call("eval", *args, "--model", model, "--runs", tmp_path)
    assert result.exit_code == 2 and told in result.stderr


def test_the_optimal_policy_is_only_decoded_from(tiny, mmlu):
    runs = tiny.parent / "runs"
    assert call("train-rm", tiny, "--runs", runs, "-q", "-s", "model.init.max_length=512").exit_code == 0
    flags = ["mmlu", "--data", mmlu, "--runs", runs, "--scoring", "likelihood"]
    refused = call("eval", *flags, "--policy", "optimal")
    assert refused.exit_code == 2 and "only decoded from" in refused.stderr
    assert call("eval", *flags, "--policy", "rm").exit_code == 0
