"""Scores: resumed to the same bits, batched within a budget, with all on record that they rest on."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import random
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lco_lite.console import Console
from lco_lite.data.prompts import held_out, recipe_task
from lco_lite.errors import DataError, UsageError
from lco_lite.evaluation import evaluate
from lco_lite.evaluation.evaluate import plan_batches
from lco_lite.evaluation.prompts import Question, eval_prompts, grader_of, prompt_settings
from lco_lite.evaluation.summary import majority_right, over_items, pass_at, summarise
from lco_lite.models.chat import ChatFormat, PlainText
from lco_lite.models.loading import build_scratch, byte_tokenizer, open_tokenizer
from lco_lite.recipe import Eval, Recipe
from lco_lite.recipe.sections import Init
from lco_lite.rollout.hf import HFEngine
from lco_lite.tasks import Grade, Item, Task, graded_as, load_task
from tests.evaluation.eval_cases import GRADER, chance_task, result_of, rows_of, score
from tests.train.test_chain import start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "model"
    build_scratch(Init(hidden_size=32, layers=1, heads=2, intermediate_size=64, max_length=160), folder, seed=0)
    return folder


def row(right: bool, extracted: str | None = "1", **more: Any) -> dict[str, Any]:
    return {"right": right, "extracted": extracted, "truncated": False, **more}


# resuming


def stop_in_batch(patch: pytest.MonkeyPatch, number: int, how: str) -> None:
    """Ctrl-C, or death, while batch ``number`` is made."""
    real, calls = HFEngine.generate, itertools.count(1)

    def generate(self, *args):
        if next(calls) == number:
            if how == "killed":
                raise RuntimeError("killed")
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    patch.setattr(HFEngine, "generate", generate)


@pytest.mark.parametrize(("how", "number"), [("ctrl-c", 1), ("ctrl-c", 6), ("killed", 3), ("ctrl-c", 9)])
def test_a_score_that_was_stopped_goes_on_and_ends_in_the_same_bits(model, tmp_path, monkeypatch, how, number):
    task, data = chance_task(tmp_path)
    args = (task, data, "--seeds", 3, "--samples", 1)  # nine batches of four
    assert score(model, tmp_path / "whole", *args).exit_code == 0
    with monkeypatch.context() as patch:
        stop_in_batch(patch, number, how)
        stopped = score(model, tmp_path / "cut", *args)
    partial = tmp_path / "cut/run/eval/custom--base.partial.jsonl"
    if how == "ctrl-c":
        assert stopped.exit_code == 130
        assert f"stopped after {4 * number} of 36 responses" in stopped.stderr
        assert "the same command goes on from there" in stopped.stderr
    else:
        assert stopped.exit_code == 1
        partial.write_bytes(partial.read_bytes()[:-9])  # the write of the last batch was cut short
    assert not (tmp_path / "cut/run/eval/custom--base.json").exists()
    again = score(model, tmp_path / "cut", *args)
    assert again.exit_code == 0, again.output
    assert "goes on after" in again.stdout
    for name in ("custom--base.json", "custom--base.rows.jsonl"):
        files = [(tmp_path / where / "run/eval" / name).read_bytes() for where in ("whole", "cut")]
        assert files[0] == files[1]
    assert not partial.exists()


@pytest.mark.parametrize("change", [("--seed", 1), ("-s", "eval.batch=3"), ("-s", 'eval.template="{problem}?"')])
def test_a_started_score_with_other_settings_starts_anew(model, tmp_path, monkeypatch, change):
    task, data = chance_task(tmp_path)
    with monkeypatch.context() as patch:
        stop_in_batch(patch, 2, "ctrl-c")
        assert score(model, tmp_path / "cut", task, data, "--seeds", 2).exit_code == 130
    result = score(model, tmp_path / "cut", task, data, "--seeds", 2, *change)
    assert result.exit_code == 0 and "starts anew" in result.stdout
    score(model, tmp_path / "whole", task, data, "--seeds", 2, *change)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_rows_are_on_disk_as_soon_as_their_batch_is_graded(model, tmp_path, monkeypatch):
    task, data = chance_task(tmp_path)
    partial, real, seen = tmp_path / "run/eval/custom--base.partial.jsonl", HFEngine.generate, []

    def generate(self, *args):
        seen.append([json.loads(line) for line in partial.read_text().split("\n")[:-1]])
        return real(self, *args)

    monkeypatch.setattr(HFEngine, "generate", generate)
    assert score(model, tmp_path, task, data, "--seeds", 2).exit_code == 0
    assert [len(lines) for lines in seen] == [1, 2, 3, 4, 5, 6], "the settings, then a line a batch"
    assert seen[0][0]["batch"] == 4 and {"made_by", "sampling", "items"} < set(seen[0][0])
    assert [(line["pass"], line["batch"]) for line in seen[-1][1:]] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    kept = {(line["pass"], row["id"]): row["response"] for line in seen[-1][1:] for row in line["rows"]}
    assert len(kept) == 20
    assert kept.items() <= {(row["seed"], row["id"]): row["response"] for row in rows_of(tmp_path)}.items()


# when a score is known


def test_a_score_is_made_once_and_again_when_the_grader_changes(model, tmp_path):
    task, data = chance_task(tmp_path)
    score(model, tmp_path, task, data, "--seeds", 1)
    assert "scored already" in score(model, tmp_path, task, data, "--seeds", 1).stdout
    (tmp_path / "grader.py").write_text(GRADER.replace("% 3", "% 2"))
    from lco_lite.user_code import load_function

    load_function.cache_clear()
    assert "scored already" not in score(model, tmp_path, task, data, "--seeds", 1).stdout
    assert "scored already" in score(model, tmp_path, task, data, "--seeds", 1).stdout


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|>"


@pytest.mark.parametrize("change", ["weights", "chat_template.jinja", "lora_alpha"])
def test_a_score_is_made_anew_where_a_model_folder_changed_whatever_its_times_say(model, tmp_path, change):
    task, data = chance_task(tmp_path)
    folder = shutil.copytree(model, tmp_path / "model")
    scored, file = folder, {"weights": "model.safetensors"}.get(change, change)
    if change == "lora_alpha":
        scored, file = tmp_path / "adapter", "adapter_config.json"
        base = AutoModelForCausalLM.from_pretrained(folder)
        get_peft_model(base, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)).save_pretrained(scored)
    score(scored, tmp_path, task, data, "--seeds", 1)
    os.utime(folder / "model.safetensors")
    (folder / "README.md").write_text("notes\n")
    assert "scored already" in score(scored, tmp_path, task, data, "--seeds", 1).stdout
    changed = scored / file
    before = changed.stat() if changed.exists() else folder.stat()
    if change == "weights":
        save_file({name: tensor + 0.1 for name, tensor in load_file(changed).items()}, changed, {"format": "pt"})
    elif change == "lora_alpha":
        changed.write_text(json.dumps(json.loads(changed.read_text()) | {"lora_alpha": 64}))
    else:
        changed.write_text(TEMPLATE)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = score(scored, tmp_path, task, data, "--seeds", 1)
    assert again.exit_code == 0 and "scored already" not in again.stdout, again.output


def test_a_score_that_an_earlier_version_kept_is_made_anew(model, tmp_path):
    task, data = chance_task(tmp_path)
    score(model, tmp_path, task, data, "--seeds", 1)
    file = tmp_path / "run/eval/custom--base.json"
    kept = json.loads(file.read_text())
    kept["settings"]["made_by"] = f"base {model} main none auto {model} 1764460800000000000"
    file.write_text(json.dumps(kept))
    again = score(model, tmp_path, task, data, "--seeds", 1)
    assert again.exit_code == 0 and "scored already" not in again.stdout


# batches


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    samples=st.integers(1, 3),
    new=st.integers(1, 20),
    batch=st.integers(1, 8),
    tokens=st.integers(16, 200),
    seed=st.integers(0, 99),
)
def test_batches_hold_every_slot_once_within_the_budget_whatever_the_order(lengths, samples, new, batch, tokens, seed):
    s = Eval(batch=batch, batch_tokens=tokens, samples=samples)
    ids = [[k] * n for k, n in enumerate(lengths)]
    groups = plan_batches(ids, s, new)
    assert sorted(slot for g in groups for slot in g) == [(i, j) for i in range(len(ids)) for j in range(samples)]
    for group in groups:
        width = max(len(ids[i]) for i, _ in group) + new
        assert len(group) <= batch and (len(group) == 1 or width * len(group) <= tokens)
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    other = plan_batches([ids[i] for i in order], s, new)
    assert [[(order[i], j) for i, j in g] for g in other] == groups


def test_the_order_of_the_data_decides_no_response(model, tmp_path):
    task, data = chance_task(tmp_path)
    lines = data.read_text().splitlines()
    random.Random(1).shuffle(lines)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(lines) + "\n")
    for name, file in (("one", data), ("two", shuffled)):
        assert score(model, tmp_path / name, task, file, "--seeds", 1).exit_code == 0
    one, two = ({r["prompt"]: r["response"] for r in rows_of(tmp_path / name)} for name in ("one", "two"))
    assert one == two and len(set(one.values())) > 6


# samples


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 7), data=st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_response(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([i < right for i in range(n)], k))
    assert pass_at(k, n, right) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_majority_counts_answers_only_and_takes_the_first_seen_of_equals():
    assert majority_right([row(False, "1"), row(True, "2"), row(True, "2")])
    assert majority_right([row(True, "2"), row(False, "1")])
    assert not majority_right([row(False, "1"), row(True, "2")])
    assert majority_right([row(False, None), row(False, None), row(True, "2")])
    assert not majority_right([row(False, None)])


def test_votes_of_mathematics_add_up_by_value():
    votes = [row(False, "3"), row(False, "3"), row(True, r"\frac{1}{2}"), row(True, "0.5"), row(True, "1/2")]
    assert not majority_right(votes), "as texts, 3 has most"
    same = load_task("math500").grader.same
    assert majority_right(votes, same)
    assert summarise([votes[:4]], 1, 4, same)["metrics"]["maj@4"]["mean"] == 0.0, "two and two: the first seen"
    assert summarise([votes[1:]], 1, 4, same)["metrics"]["maj@4"]["mean"] == 1.0


# graders by name


def test_another_grader_grades_the_same_responses_beside_the_tasks_own_score(model, tmp_path, monkeypatch):
    task, data = chance_task(tmp_path)
    assert score(model, tmp_path, task, data).exit_code == 0
    own, before = result_of(tmp_path), rows_of(tmp_path)

    def refused(*args, **kw):
        raise AssertionError("nothing is sampled again")

    monkeypatch.setattr(evaluate, "respond", refused)
    result = score(model, tmp_path, task, data, "--grader", "string")
    assert result.exit_code == 0 and "answered already" in result.output, result.output
    assert result_of(tmp_path) == own, "the score by the task's own grader stays"
    after = rows_of(tmp_path, "custom-string")
    assert [r["response"] for r in after] == [r["response"] for r in before]
    assert {r["why"] for r in after} <= {"the same text", "not the same text"}
    (tmp_path / "other.py").write_text("def long(response, item):\n    return len(response) > 3\n")
    assert score(model, tmp_path, task, data, "--grader", tmp_path / "other.py:long").exit_code == 0
    assert [r["right"] for r in rows_of(tmp_path, "custom-long")] == [len(r["response"]) > 3 for r in before]


def test_a_grader_or_a_tolerance_that_there_is_not_is_told(model, tmp_path):
    task, data = chance_task(tmp_path)
    result = score(model, tmp_path, task, data, "--grader", "strings")
    assert result.exit_code == 2 and "one of math, rounded, string, choice, exact, or FILE.py:NAME" in result.stderr
    result = score(model, tmp_path, task, data, "-s", "eval.tolerance=0.1")
    assert result.exit_code == 2 and "is not graded as mathematics" in result.stderr


def test_tolerance_and_evaluated_are_settings_of_mathematics_and_on_record():
    task = graded_as(load_task("minervamath"), tolerance=0.05, evaluated=True)
    item = Item("i", "p", "100", None, {})
    assert [task.grade(rf"\boxed{{{x}}}", item).right for x in ("104", "106", "10^2")] == [True, False, False]
    found = grader_of(task)
    assert (found["name"], found["tolerance"], found["evaluated"]) == ("math", 0.05, True)
    assert grader_of(load_task("minervamath"))["tolerance"] == 0.01
    assert graded_as(load_task("arithmetic"), evaluated=True).grader is load_task("arithmetic").grader


def test_several_samples_give_pass_at_k_and_a_majority_that_agree_with_the_rows(model, tmp_path):
    task, data = chance_task(tmp_path, n=8)
    result = score(model, tmp_path, task, data, "--samples", 4, "--seeds", 2)
    assert result.exit_code == 0, result.output
    made, rows = result_of(tmp_path), rows_of(tmp_path)
    assert list(made["metrics"]) == ["pass@1", "pass@2", "pass@4", "maj@4"]
    assert [r["sample"] for r in rows] == list(range(4)) * 16 and len({r["response"] for r in rows}) > 8
    groups = [rows[i : i + 4] for i in range(0, 64, 4)]
    assert all(len({(r["id"], r["seed"]) for r in group}) == 1 for group in groups)
    assert made["mean"] == pytest.approx(sum(r["right"] for r in rows) / 64)
    assert made["metrics"]["pass@4"]["mean"] == pytest.approx(sum(any(r["right"] for r in g) for g in groups) / 16)
    assert made["metrics"]["maj@4"]["mean"] == pytest.approx(sum(majority_right(g) for g in groups) / 16)
    assert made["metrics"]["pass@1"]["mean"] <= made["metrics"]["pass@2"]["mean"] <= made["metrics"]["pass@4"]["mean"]
    assert "custom maj@4" in result.stdout


def test_a_grader_that_takes_no_answer_out_has_no_majority():
    assert "maj@2" not in summarise([[row(True, None), row(False, None)]], 1, 2)["metrics"]


def test_samples_of_greedy_decoding_are_refused(model, tmp_path):
    task, data = chance_task(tmp_path)
    result = score(model, tmp_path, task, data, "--samples", 2, "--greedy")
    assert result.exit_code == 2 and "same response every time" in result.stderr


def test_the_spread_is_over_seeds_and_the_error_over_items():
    passes = [[row(True), row(True)], [row(True), row(False)]]
    made = summarise(passes, n=4)
    assert made["mean"] == pytest.approx(3 / 8) and made["std"] == pytest.approx(0.25 / 2**0.5)
    assert made["stderr"] == pytest.approx(0.4787136 / 2)  # of 1, 1/2, 0, 0
    assert summarise(passes[:1], n=2)["std"] is None


def test_of_a_tasks_own_numbers_an_item_the_error_is_over_items_and_what_is_none_left_out():
    made = over_items([[1.0, 3.0, None, None], [2.0, 5.0, 6.0, None]])
    assert made["mean"] == pytest.approx((2 + 13 / 3) / 2) and made["std"] == pytest.approx((13 / 3 - 2) / 2**0.5)
    assert made["stderr"] == pytest.approx(statistics.stdev([1.5, 4.0, 6.0]) / 3**0.5)
    assert over_items([[1.0]]) == {"mean": 1.0, "std": None, "stderr": None}


# prompts on record


ITEMS = [Item(f"t/test/{i}", f"q{i}", str(i), None, {"subject": "ab"[i % 2]}) for i in range(3)]
SHOWN = [Item(f"t/dev/{i}", f"e{i}", str(i), f"so {i}", {"subject": "ab"[i % 2]}) for i in range(4)]


class Stub(Task):
    """Its sources are items already, in which only the template is missing."""

    def items(self, split: str) -> list[Item]:
        if split not in self.sources:
            raise UsageError(f"no {split}")
        put = self.template.replace
        return [dataclasses.replace(item, prompt=put("{problem}", item.prompt)) for item in self.sources[split]]


class Rewarded(Stub):
    """Not right or wrong: it measures lengths."""

    def aggregate(self, rows, settings, folder, console):
        (folder / "seen.json").write_text(json.dumps(rows))
        return {"length": sum(len(r["response"]) for r in rows) / len(rows), "items": float(len(rows))}


def stub(kind: type[Stub] = Stub, **splits: list[Item]) -> Stub:
    """A task of three items that calls none of their responses right."""
    grader = None if kind is Rewarded else lambda response, item: Grade(False, None, "no verdict")
    return kind("stub", splits, None, None, grader, "{problem}", system="task's own", max_new_tokens=8)


def scored(**settings: Any) -> Recipe:
    """A recipe with these settings of ``eval``."""
    bare = {"model": {"path": "x"}, "task": "arithmetic", "sft": {"enabled": False}}
    return Recipe.model_validate(bare | {"eval": settings})


def test_worked_examples_are_earlier_turns_of_the_items_own_subject():
    prompts = eval_prompts(scored(few_shot=2, system="be brief"), stub(test=ITEMS, dev=SHOWN))
    assert [(m["role"], m["content"]) for m in prompts[1].messages] == [
        ("system", "be brief"),
        ("user", "e1"),
        ("assistant", "so 1"),
        ("user", "e3"),
        ("assistant", "so 3"),
        ("user", "q1"),
    ]


def test_without_a_dev_split_the_first_training_items_are_shown_to_all():
    prompts = eval_prompts(scored(few_shot=1), stub(test=ITEMS, train=SHOWN))
    assert [p.messages[1]["content"] for p in prompts] == ["e0"] * 3
    assert prompts[0].messages[0]["content"] == "task's own"


@pytest.mark.parametrize(
    ("splits", "n", "told"),
    [
        ({"dev": SHOWN}, 3, "2 worked examples of subject a"),
        ({"train": SHOWN}, 5, "has 4 worked examples"),
        ({}, 1, "neither a dev nor a train split"),
    ],
)
def test_too_few_worked_examples_are_refused(splits, n, told):
    with pytest.raises(UsageError, match=told):
        eval_prompts(scored(few_shot=n), stub(test=ITEMS, **splits))


def test_a_template_takes_the_place_of_the_tasks_own_in_examples_too(tmp_path):
    problem = {"question": "1+1?", "answer": "so #### 2"}
    for name in ("gsm8k_train", "gsm8k_test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(problem) + "\n")
    (prompt,) = eval_prompts(scored(template="Q: {problem}", few_shot=1), load_task("gsm8k", tmp_path))
    assert [m["content"] for m in prompt.messages] == ["Q: 1+1?", "so\nThe answer is $\\boxed{2}$.", "Q: 1+1?"]
    (plain,) = eval_prompts(scored(template="Q: {problem}", system=""), stub(test=ITEMS[:1]))
    assert [m["content"] for m in plain.messages] == ["Q: q0"], "also of a task that writes nothing around its problems"


def plain_examples(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "examples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


MINERVA = [  # two of lm-eval's four, shortened
    {
        "prompt": "Find the domain of $x$.",
        "response": "So it is $\\boxed{[2,5)}$.\nFinal Answer: [2,5).",
        "answer": "[2,5)",
    },
    {"prompt": "If $\\det A = 2$?", "answer": 24},
]


def test_examples_of_the_users_own_are_the_same_for_every_item(tmp_path):
    (tmp_path / "math500_test.jsonl").write_text('{"problem": "1+1?", "answer": "2", "solution": "2"}\n')
    file = plain_examples(tmp_path, MINERVA)
    ask = {"format": "text", "template": "Problem:\n{problem}\n\nSolution:", "examples": file}
    task = load_task("math500", tmp_path)
    (prompt,) = eval_prompts(scored(**ask), task)
    shown = [f"Problem:\n{row['prompt']}\n\nSolution: {row.get('response', row['answer'])}\n\n" for row in MINERVA]
    plain = PlainText(byte_tokenizer(64))
    assert plain.prompt_text(prompt.messages) == "".join(shown) + "Problem:\n1+1?\n\nSolution:"
    (first,) = eval_prompts(scored(**ask, few_shot=1), task)
    assert plain.prompt_text(first.messages) == shown[0] + "Problem:\n1+1?\n\nSolution:"
    assert [m["role"] for m in first.messages] == ["user", "assistant", "user"], "in chat format they are turns"
    with pytest.raises(UsageError, match="few_shot: 3, and .*examples.jsonl has 2"):
        eval_prompts(scored(**ask, few_shot=3), task)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer": "1"}, "has no field .*prompt or question or problem"),
        ({"prompt": "p"}, "has no field .*'answer'"),
        ({"prompt": "p", "choices": ["yes", "no"], "answer": 7}, "field answer is 7, not the letter, index or text"),
    ],
)
def test_examples_that_lack_something_are_told_with_their_line(tmp_path, row, told):
    (tmp_path / "math500_test.jsonl").write_text('{"problem": "1+1?", "answer": "2", "solution": "2"}\n')
    ask = {"examples": plain_examples(tmp_path, [*MINERVA, row])}
    with pytest.raises(DataError, match=f"examples.jsonl, line 3: {told}"):
        eval_prompts(scored(**ask), load_task("math500", tmp_path))


def test_a_system_text_may_name_the_subject_and_one_that_names_what_is_not_there_is_refused():
    prompts = eval_prompts(scored(system="About {subject}, in \\boxed{}."), stub(test=ITEMS))
    assert [p.messages[0]["content"] for p in prompts] == [f"About {s}, in \\boxed{{}}." for s in "aba"]
    with pytest.raises(DataError, match=r"eval.system 'Of \{question\}': item t/test/0 has no field 'question'"):
        eval_prompts(scored(system="Of {question}"), stub(test=ITEMS))


def test_a_stop_string_ends_responses_and_is_no_part_of_them(model, tmp_path):
    task, data = chance_task(tmp_path)
    free = ("--seeds", 1, "-s", "eval.format=text", "-s", "eval.max_new_tokens=40")
    assert score(model, tmp_path / "free", task, data, *free).exit_code == 0
    stops = [
        c for c in sorted({c for r in rows_of(tmp_path / "free") for c in r["response"]}) if c.isascii() and c != "\0"
    ][:12]
    result = score(model, tmp_path / "cut", task, data, *free, "-s", f"eval.stop={json.dumps(stops)}")
    assert result.exit_code == 0, result.output
    # one batch, so the same random numbers: what is said is what was said, up to the first of the strings
    whole, cut = rows_of(tmp_path / "free")[0], rows_of(tmp_path / "cut")[0]
    ends = [whole["response"].find(c) for c in stops if c in whole["response"]]
    assert cut["response"] == whole["response"][: min(ends, default=None)]
    ended = [r for r in rows_of(tmp_path / "cut") if not r["truncated"]]
    assert len(ended) > 6 and not any(c in r["response"] for r in rows_of(tmp_path / "cut") for c in stops)
    assert result_of(tmp_path / "cut")["settings"]["sampling"]["stop"] == stops


def test_a_template_without_a_place_for_the_problem_is_refused():
    with pytest.raises(ValueError, match="no {problem}"):
        Eval(template="Answer!")


def test_everything_a_score_rests_on_is_in_its_result(model, tmp_path):
    task, data = chance_task(tmp_path)
    sets = ["-s", 'eval.template="Q: {problem}"', "-s", "eval.system=be brief", "-s", "chat.template_args={x: 1}"]
    score(model, tmp_path, task, data, "--seeds", 1, *sets)
    made = result_of(tmp_path)["settings"]["protocol"]
    assert {k: made[k] for k in ("template", "system", "few_shot", "template_args", "scoring")} == {
        "template": "Q: {problem}",
        "system": "be brief",
        "few_shot": 0,
        "template_args": {"x": 1},
        "scoring": "generation",
    }
    assert made["grader"]["name"] == task.removeprefix("custom:") and len(made["grader"]["file"]) == 16
    from lco_lite import __version__

    assert made["lco_lite"] == __version__
    assert rows_of(tmp_path)[0]["prompt"] == "Q: x"


def test_the_grader_of_mathematics_is_recorded_with_math_verifys_version():
    found = grader_of(load_task("math500"))
    assert (found["name"], found["tolerance"], found["evaluated"]) == ("math", 0.0, False)
    assert found["math_verify"][0].isdigit()
    assert prompt_settings(scored(), load_task("math500"))["template"].endswith("within \\boxed{}.")


def test_system_and_examples_reach_the_model(model, tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i}", "answer": "a", "response": f"r{i}", "split": "train"} for i in range(2)]
    data = tmp_path / "custom.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"prompt": "asked", "answer": "a"}]))
    seen = []
    real = ChatFormat.prompt_text
    monkeypatch.setattr(ChatFormat, "prompt_text", lambda self, m: seen.append(real(self, m)) or seen[-1])
    result = score(
        model, tmp_path, "custom:exact", data, "--greedy", "-s", "eval.few_shot=1", "-s", "eval.system=short"
    )
    assert result.exit_code == 0, result.output
    assert [seen[-1].index(text) for text in ("short", "p0", "r0", "asked")] == sorted(
        seen[-1].index(text) for text in ("short", "p0", "r0", "asked")
    )


# items


def test_what_does_not_fit_the_window_counts_as_wrong(model, tmp_path):
    task, data = chance_task(tmp_path, n=4)
    data.write_text(data.read_text() + json.dumps({"prompt": "y" * 200, "answer": "1"}) + "\n")
    result = score(model, tmp_path, task, data, "--seeds", 2)
    assert "1 of 5 items do not fit the window and count as wrong" in result.stderr
    made, rows = result_of(tmp_path), rows_of(tmp_path)
    assert made["n"] == 5 and len(rows) == 8
    assert made["mean"] == pytest.approx(sum(r["right"] for r in rows) / 10)


def test_one_file_of_items_is_for_one_task(model, tmp_path):
    _, data = chance_task(tmp_path)
    result = score(model, tmp_path, "custom", data, "gsm8k")
    assert result.exit_code == 2 and "one file holds the items of one task" in result.stderr


# a task's own metrics, and the table


def test_a_task_that_is_not_right_or_wrong_shows_its_own_metrics_with_their_spread(model, tmp_path, monkeypatch):
    task = stub(Rewarded, test=ITEMS)
    monkeypatch.setattr(evaluate, "open_task", lambda recipe, name, *given: task)
    data = tmp_path / "none.jsonl"
    data.touch()
    result = score(model, tmp_path, "stub", data, "--seeds", 2, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)["stub"]
    folders = sorted((tmp_path / "run/eval/stub--base.files").iterdir())
    seen = [json.loads((folder / "seen.json").read_text()) for folder in folders]
    assert [f.name for f in folders] == ["seed-0", "seed-1"]
    assert seen[0][0]["row"] == {"subject": "a"} and seen[0][0]["prompt"] == "q0"
    lengths = [sum(len(r["response"]) for r in rows) / 3 for rows in seen]
    assert made["metric"] == "length" and made["mean"] == pytest.approx(sum(lengths) / 2)
    assert made["std"] == pytest.approx(abs(lengths[0] - lengths[1]) / 2**0.5)
    assert made["metrics"]["items"] == {"mean": 3.0, "std": 0.0, "stderr": None}
    assert "pass@1" not in made["metrics"]
    table = score(model, tmp_path, "stub", data, "--seeds", 2).stdout
    assert "stub length" in table and "3.000 ± 0.000" in table
    refused = score(model, tmp_path, "stub", data, "--samples", 2)
    assert refused.exit_code == 2 and "not right or wrong" in refused.stderr


def test_the_table_has_a_row_a_stage_a_column_a_task_and_percent():
    def made(task: str, stage: str, mean: float, std: float | None) -> dict[str, Any]:
        metric = {"mean": mean, "std": std, "stderr": 0.02}
        counts = {"n": 500, "seeds": 4 if std else 1, "truncated": 0.031}
        return {"task": task, "stage": stage, "metric": "pass@1", **metric, "metrics": {"pass@1": metric}, **counts}

    out = io.StringIO()
    results = [made("math500", "sft", 0.4162, 0.0049), made("math500", "rl", 0.5, None), made("gsm8k", "sft", 0.7, 0.1)]
    evaluate.show(Console(stdout=out), results)
    quiet = io.StringIO()
    evaluate.show(Console(stdout=quiet, quiet=True), results)
    assert quiet.getvalue() == out.getvalue(), "a score is what was asked for"
    lines = out.getvalue().splitlines()
    (head,) = [line for line in lines if "math500" in line and "gsm8k" in line]
    assert head.index("math500") < head.index("gsm8k")
    assert any("sft" in x and "41.6 ± 0.5" in x and "70.0 ± 10.0" in x for x in lines)
    assert any("rl" in x and "50.0" in x and "±" not in x for x in lines)
    assert "math500 sft: 500 items, 4 seeds, standard error over items 2.0, 3.1 % cut at the length limit" in lines


def test_what_a_grader_says_takes_the_place_of_a_tasks_own_score(tmp_path):
    task = load_task("arithmetic")
    item = task.items("test")[0]
    rows = tmp_path / "arithmetic--sft.rows.jsonl"
    row = {"id": item.id, "seed": 0, "sample": 0, "response": f"#{item.gold}", "gold": "", "right": False}
    rows.write_text(json.dumps(row | {"extracted": None, "score": 0.25}) + "\n")
    (again,) = evaluate.graded_again(tmp_path / "arithmetic--sft.json", {"n": 1}, task, Eval())
    assert again["right"] and "score" not in again


def test_a_look_at_the_model_counts_what_does_not_fit_its_window_as_wrong(tiny, monkeypatch):
    asked: list[Question] = []

    def all_right(ctx, engine, chat, task, questions, *_, **kw):
        asked.extend(questions)
        return [{"right": True}] * len(questions)

    monkeypatch.setattr(evaluate, "respond", all_right)
    with start(tiny) as ctx:
        task = recipe_task(ctx.recipe)
        chat = ChatFormat(open_tokenizer(ctx.recipe.model, 0))
        prompts = held_out(ctx.recipe, task, 32)
        longer = {"role": "user", "content": f"{prompts[0].messages[-1]['content']} Now."}
        prompts[0] = dataclasses.replace(prompts[0], messages=[*prompts[0].messages[:-1], longer])
        longest = max(len(chat.prompt(prompt.messages)) for prompt in prompts)
        room = ctx.recipe.eval.max_new_tokens
        assert evaluate.held_out_accuracy(ctx, None, longest + room, chat, task, prompts) == 1
        asked.clear()
        share = evaluate.held_out_accuracy(ctx, None, longest + room - 1, chat, task, prompts)
        assert share == len(asked) / 32 == 31 / 32 and all(len(q.prompt) < longest for q in asked)
        with pytest.raises(DataError, match="no item of arithmetic fits the model's window of 9 tokens"):
            evaluate.held_out_accuracy(ctx, None, 9, chat, task, prompts)
