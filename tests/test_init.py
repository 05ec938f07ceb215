"""``lco-lite init``: what it takes for what, and that the recipe it writes is one, commented, and goes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lco_lite import init
from lco_lite.cli import app
from lco_lite.data.prompts import held_out_prompts, recipe_task, rl_prompts
from lco_lite.models.chat import ChatFormat
from lco_lite.models.loading import build_scratch, open_tokenizer
from lco_lite.recipe.file import load_recipe
from lco_lite.recipe.sections import Init

REWARDS = """
def _helper(x):
    return x

def short(completions, **columns):
    return [-float(len(c)) for c in completions]

def named(prompts, responses, rows):
    return [len(row) for row in rows]

def text(word):
    return word
"""
N = 40
TURNS = [*["user", "assistant"] * 30, "user"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init") / "model"
    build_scratch(Init(hidden_size=16, layers=1, heads=2, intermediate_size=32, max_length=4096), folder, seed=0)
    return str(folder)


@pytest.fixture
def made(model, tmp_path, monkeypatch):
    """(the recipe that is written for these rows, what the command said)."""
    monkeypatch.chdir(tmp_path)

    def make(row, *flags, n=N):
        Path("rows.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(n)))
        result = CliRunner().invoke(app, ["init", "rows.jsonl", "--model", model, *flags])
        assert result.exit_code == 0, result.output
        return load_recipe(Path("rows.yaml")), result.output

    return make


def test_answers_that_are_numbers_are_graded_as_mathematics_and_the_columns_are_named(made):
    recipe, said = made(lambda i: {"question": f"{i} + 1?", "solution": i + 1})
    assert (recipe.task, recipe.rl.feedback, recipe.data.task) == ("custom", "rule", "rows.jsonl")
    assert recipe.data.columns.task.model_dump(exclude_none=True) == {"answer": "solution"}
    task = recipe_task(recipe)
    assert (len(task.items("train")), len(task.items("test"))) == (32, 8)
    item = task.items("test")[0]
    assert task.grade(f"The answer is {item.gold}.", item).right
    assert "column solution" in said and said.splitlines()[-1].endswith("next: lco-lite run rows.yaml")


def test_labels_are_compared_whole_and_the_model_is_told_which_there_are(made):
    recipe, _ = made(lambda i: {"text": f"Film {i}", "label": ["good", "bad"][i % 2]})
    assert recipe.task == "custom:exact" and recipe.chat.system.endswith("good, bad.")
    assert recipe.data.columns.task.prompt == "text"


def test_letters_and_indices_of_choices_are_choices(made):
    recipe, _ = made(lambda i: {"question": f"{i}?", "options": ["red", "blue", "green"], "answer": i % 3})
    assert recipe.task == "custom:choice"
    item = recipe_task(recipe).items("train")[0]
    assert "A. red\nB. blue\nC. green" in item.prompt


@pytest.mark.parametrize("answers", [["red", "blue", "green"], ["0", "1", "2"], ["It is red.\n#### red", "B", 2]])
def test_choices_are_shown_also_where_the_answer_is_the_text_of_one(made, answers):
    recipe, _ = made(lambda i: {"question": f"{i}?", "choices": ["red", "blue", "green"], "answer": answers[i % 3]})
    assert recipe.task == "custom:choice"
    task = recipe_task(recipe)
    assert all("A. red\nB. blue\nC. green" in item.prompt for item in task.items("train"))
    assert {item.gold for item in task.items("train")} == set("ABC")


@pytest.mark.parametrize(
    "row",
    [
        lambda i: {"prompt": f"{i}?", "choices": [f"{k} " + "word " * 60 for k in range(4)], "answer": "ABCD"[i % 4]},
        lambda i: {"prompt": f"{i}?", "answer": f"{'no' * 99} {i % 9}"},
        lambda i: {"prompt": [{"role": r, "content": f"{i}"} for r in TURNS], "answer": i},
    ],
    ids=["choices", "system", "turns"],
)
def test_the_room_for_a_prompt_is_that_of_all_that_is_asked(made, row):
    recipe, _ = made(row)
    chat = ChatFormat(open_tokenizer(recipe.model, 0))
    longest = max(len(chat.prompt(prompt.messages)) for prompt in rl_prompts(recipe, recipe_task(recipe)))
    assert longest + recipe.rl.max_new_tokens <= recipe.rl.max_length <= longest + recipe.rl.max_new_tokens + 128
    told = CliRunner().invoke(app, ["run", "rows.yaml", "--dry-run"])
    assert told.exit_code == 0 and "too long" not in told.output, told.output


def test_a_response_has_room_for_the_longest_answer_that_it_is_to_equal(made):
    cities = ["Llanfairpwllgwyngyllgogerychwyrndrobwll", "Rome"]
    recipe, _ = made(lambda i: {"prompt": f"{i}?", "answer": cities[i % 2]})
    assert recipe.task == "custom:exact" and recipe.rl.max_new_tokens == recipe.eval.max_new_tokens == 48
    made(lambda i: {"prompt": f"{i}?", "answer": "Rome"}, "--out", "short.yaml")
    assert load_recipe(Path("short.yaml")).rl.max_new_tokens == 16


def test_pairs_become_a_reward_model_and_their_better_half_is_imitated(made):
    def row(i):
        ask = {"role": "user", "content": f"Hi {i}"}
        return {k: [ask, {"role": "assistant", "content": k}] for k in ("chosen", "rejected")}

    recipe, _ = made(row)
    assert recipe.stages == ["sft", "rm", "rl-kld"] and recipe.rl.feedback == "dpo" and recipe.rl.anchor == 0.5
    assert len(held_out_prompts(recipe, None)) == 8


def test_a_reward_alone_is_tried_and_every_field_has_its_comment(made, tmp_path):
    (tmp_path / "r.py").write_text(REWARDS)
    recipe, said = made(lambda i: {"prompt": f"Say {i}."}, "--reward", "r.py")
    assert recipe.rl.reward_function == {"short": "r.py:short", "named": "r.py:named"}
    assert recipe.stages == ["rl-kld"] and recipe.rl.scale_rewards
    assert "r.py:short, called by TRL's signature" in said and "-11" in said
    fields = [line for line in Path("rows.yaml").read_text().splitlines() if ": " in line and line.strip()[0] != "#"]
    assert len(fields) > 20 and all("  # " in line for line in fields)


def test_on_a_gpu_answers_make_a_reward_model_and_the_model_is_one_that_fits(made, monkeypatch):
    monkeypatch.setattr(init, "this_machine", lambda: init.Machine(12.0, "a card, 12 GiB"))
    recipe, _ = made(lambda i: {"prompt": f"{i} + 1?", "answer": str(i + 1)}, n=200)
    assert recipe.rl.feedback == "dpo + rule" and recipe.stages == ["rm", "rl-kld"]
    card = init.Machine(12.0, "")
    assert init.chosen_model(None, card).path == "Qwen/Qwen2.5-3B-Instruct"
    assert init.chosen_model(None, init.Machine(None, "")).path == init.SMALL


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"prompt": "Say it."}, [], "--reward FILE.py with a function"),
        ({"prompt": "Say it.", "response": "It."}, [], "responses to imitate, and nothing that tells a good response"),
        ({"a": 1}, [], "no column for the prompt: one of prompt"),
        (
            {"prompt": "p", "choices": ["x", "y"], "answer": "z"},
            [],
            "row 1: answer is 'z', with choices .*the text of one",
        ),
        ({"prompt": "p", "choices": "x, y", "answer": "y"}, [], "column choices is text, from which answer picks"),
        ({"prompt": "p", "answer": 1}, ["--reward", "none.py"], "--reward none.py: no such file in "),
        ({"prompt": "p", "answer": 1}, ["--reward", "."], "a Python file with a reward function"),
        ({"prompt": "p", "answer": 1}, ["--reward", "bad.py"], "no reward function, f.prompts.*found odd"),
        ({"prompt": "p", "answer": 1}, ["--reward", "wrong.py"], "wrong.py:f: came back 1.0; a list with a number"),
        ({"prompt": "p", "answer": 1}, ["--out", "taken.yaml"], "taken.yaml is there already"),
        ({"prompt": "p", "answer": 1}, ["--model", "/no/such"], "no such folder or file, and no hub id"),
        ({"prompt": "p", "answer": 1}, ["--model", "-"], "no such folder or file, and no hub id"),
        ({"prompt": "p", "answer": 1}, ["--model", "x" * 300], "no such folder or file, and no hub id"),
        ({"prompt": "p", "answer": 1}, ["--model", "a\x1b[2Jb"], "no such folder or file, and no hub id"),
        ({"prompt": "p", "answer": 1}, ["--model", "taken.yaml"], "taken.yaml: is no folder"),
        ({"prompt": "p", "answer": 1}, ["--reward", "deep.py"], "deep.py: is not Python: "),
        ({"k" * 100_000: 1}, [], r"no column for the prompt: one of prompt.*found k{60} *$"),
        ({f"c{i}": i for i in range(20_000)}, [], "found c0, .* and 19,970 more"),
    ],
)
def test_what_it_cannot_go_by_is_one_message_and_no_recipe(model, tmp_path, monkeypatch, row, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(
        "".join(json.dumps({n: f"{v}{i}" if n == "prompt" else v for n, v in row.items()}) + "\n" for i in range(10))
    )
    Path("bad.py").write_text("def odd(x):\n    return 1\n")
    Path("wrong.py").write_text("def f(completions, **columns):\n    return 1.0\n")
    Path("deep.py").write_text("x = " + "-" * 200_000 + "1")
    Path("taken.yaml").write_text("mine")
    result = CliRunner().invoke(app, ["init", "rows.jsonl", "--model", model, *flags])
    assert result.exit_code == 2
    assert re.search(message, result.stderr.replace("\n", " ")), result.stderr
    assert not Path("rows.yaml").exists() and Path("taken.yaml").read_text() == "mine"


@pytest.mark.parametrize("name", ["", ".", "..", "/", "x" * 300 + ".jsonl"])
def test_what_is_no_file_is_one_message(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, ["init", name])
    assert told.exit_code == 2 and re.search("is a folder|no such file|too long", told.stderr), told.output


def test_csv_and_parquet_are_read_too(model, tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list([{"prompt": f"{i} + 1?", "answer": i + 1} for i in range(N)])
    rows.to_csv("a.csv")
    rows.to_parquet("b.parquet")
    for name in ("a.csv", "b.parquet"):
        assert CliRunner().invoke(app, ["init", name, "--model", model]).exit_code == 0
        recipe = load_recipe(Path(name).with_suffix(".yaml"))
        assert len(recipe_task(recipe).items("test")) == 8


def test_functions_of_one_name_in_two_files_are_not_one(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a"}\n')
    for name in ("a.py", "b.py"):
        Path(name).write_text("def score(completions, **columns):\n    return [0.0 for _ in completions]\n")
    words = ["init", "rows.jsonl", "--model", model, "--reward", "a.py", "--reward", "b.py:score"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 2 and "a.py:score and b.py:score have one name" in " ".join(told.stderr.split())


def test_a_helper_of_three_parameters_is_no_reward(made, tmp_path):
    (tmp_path / "own.py").write_text(
        "def clamp(x, low, high):\n    return max(low, min(x, high))\n"
        "def score(completions, **columns):\n    return [clamp(len(c), 0, 9) for c in completions]\n"
    )
    recipe, _ = made(lambda i: {"prompt": f"Say {i}."}, "--reward", "own.py")
    assert [*recipe.rl.reward_functions.values()] == ["own.py:score"]


def test_one_prompt_that_says_answer_does_not_speak_for_the_others(made):
    recipe, _ = made(lambda i: {"prompt": "Bob answered?" if i == 3 else f"{i} + 1?", "answer": str(i + 1)})
    assert recipe.chat.system and "The answer is" in recipe.chat.system


def test_gsm8ks_working_is_a_demonstration_and_rows_with_a_split_hold_out_their_own(made):
    def row(i):
        return {"question": f"{i} + 1?", "answer": f"Add one.\n#### {i + 1}", "split": "train" if i < 35 else "test"}

    recipe, said = made(row)
    assert recipe.sft.enabled and "5 items of them held out" in said and recipe.data.held_out is None


def test_an_empty_answer_is_told_by_its_row_and_not_taken_for_a_missing_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("question,answer\n1 + 1?,2\n2 + 2?,\n3 + 3?,6\n")
    told = CliRunner().invoke(app, ["init", "a.csv"])
    assert told.exit_code == 2 and "answer is empty or missing in row 2 of 3: fill it in" in told.stderr
    Path("b.csv").write_text("question,answer\n1 + 1?,2\n,4\n,6\n")
    told = CliRunner().invoke(app, ["init", "b.csv"])
    assert "question is empty or missing in row 2 of 3, as in 1 more" in told.stderr


def test_one_row_is_enough_for_a_reward_but_holds_no_score_out_and_graded_it_takes_two(made, model, tmp_path):
    (tmp_path / "r.py").write_text(REWARDS)
    _, said = made(lambda i: {"prompt": "Say it."}, "--reward", "r.py", n=1)
    assert "of 1 row none can be held out: there will be no held-out score" in " ".join(said.split())
    (tmp_path / "one.csv").write_text("question,answer\n1 + 1?,2\n")
    told = CliRunner().invoke(app, ["init", "one.csv", "--model", model])
    assert told.exit_code == 2 and "has 1 row; answers that are graded need 2" in told.stderr
    recipe, _ = made(lambda i: {"question": f"{i} + 1?", "answer": i + 1}, "--out", "two.yaml", "--reward", "r.py", n=2)
    assert len(recipe_task(load_recipe(Path("two.yaml"))).items("test")) == 1


def test_the_recipe_begins_with_the_command_as_it_was_typed(made, model, tmp_path):
    (tmp_path / "my r.py").write_text(REWARDS)
    made(lambda i: {"prompt": f"Say {i}."}, "--reward", "my r.py:short")
    line = Path("rows.yaml").read_text().splitlines()[0]
    assert f"`lco-lite init rows.jsonl --reward 'my r.py:short' --model {model}` from 40 rows" in line


def test_a_recipe_that_is_there_is_told_before_torch_is_loaded(tmp_path):
    (tmp_path / "a.yaml").write_text("mine")
    code = "import sys\nfrom lco_lite.cli import app\nfrom typer.testing import CliRunner\n"
    code += "told = CliRunner().invoke(app, ['init', 'a.jsonl'])\n"
    code += "assert told.exit_code == 2 and 'is there already' in told.stderr and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)


def test_an_apple_gpu_is_mentioned_and_not_taken_unasked(made, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    recipe, said = made(lambda i: {"prompt": f"{i} + 1?", "answer": i + 1})
    assert recipe.device == "auto" and "an Apple GPU, which is used where the recipe says `device: mps`" in said
    assert "# device: mps " in Path("rows.yaml").read_text()


def test_the_name_of_a_file_is_no_line_of_the_recipe(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "a\ntrackers: [wandb]\n#.jsonl"
    Path(name).write_text("".join(json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(N)))
    result = CliRunner().invoke(app, ["init", name, "--model", model, "--out", "own.yaml"])
    assert result.exit_code == 0, result.output
    assert load_recipe(Path("own.yaml")).trackers == []
