"""A reward function of the user's runs in its own process, in bounded time, and its mistakes are named by row."""

import pytest
import torch

from lco_lite.errors import UsageError
from lco_lite.feedback.rewards import BATCH, Answers, RewardFunction
from lco_lite.user_code import as_number

GOOD = """
calls = []
def length(prompts, responses, rows):
    calls.append(len(responses))
    print("noise on stdout")
    return [len(r) + len(calls) / 1000 + rows[i].get("bonus", 0) for i, r in enumerate(responses)]
"""


@pytest.fixture
def function(tmp_path):
    def make(body, name="score", seconds=30.0):
        file = tmp_path / "rewards.py"
        file.write_text(body)
        rate = RewardFunction(f"{file}:{name}", seconds)
        return lambda prompts, texts, rows, **more: rate(Answers([turn(p) for p in prompts], rows, texts, [], **more))

    return make


def turn(text):
    return [{"role": "user", "content": text}]


def test_it_gets_prompts_responses_and_rows_in_batches_of_one_process(function):
    rate = function(GOOD, "length")
    n = BATCH + 3
    found = rate(["p"] * n, ["x" * i for i in range(n)], [{"bonus": 100} if i == 1 else {} for i in range(n)])
    expected = torch.tensor([i + (0.001 if i < BATCH else 0.002) + (100 if i == 1 else 0) for i in range(n)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def score(p, r, rows): return [1.0 if 'b' not in x else 1 / 0 for x in r]", "response 2 .*ZeroDivisionError"),
        ("def score(p, r, rows): return [1.0] * (len(r) - 1)", "2 rewards for 3 responses"),
        ("def score(p, r, rows): return [1.0, 'good', 1.0]", "response 2 .*not a number"),
        ("def score(p, r, rows): return [1.0, 1.0, float('nan')]", "response 3 .*finite"),
        ("def score(p, r, rows): return 7", "rewards.py:score: came back 7; a list with a number for each"),
        ("def score(p, r, rows): return '123'", "came back '123'"),
        ("def score(p, r, rows): return ['1', '2', '3']", "response 1 .*'1', not a number"),
        ("def score(p, r, rows): return dict(zip(r, [1.0, 2.0, 3.0]))", "came back {"),
        ("def score(p, r, rows): return [[1.0], [2.0], [3.0]]", r"response 1 .*\[1.0\], not a number"),
        ("def score(p, r, rows): return [1.0, -1e39, 1.0]", "response 2 .*finite in float32"),
        ("def score(p, r, rows): return [1.0, 10**9999, 1.0]", "response 2 .*finite in float32"),
        ("def score(p, r, rows): return iter(int, 1)", "more than 3 rewards for 3 responses"),
        (
            "import sys\ndef score(p, r, rows): return [sys.exit(0) if x == 'b' else 1.0 for x in r]",
            "response 2 .*exit",
        ),
        ("def score(p, r, rows): raise KeyboardInterrupt", "response 1 .*KeyboardInterrupt"),
        ("import os\ndef score(p, r, rows): os._exit(0)", "response 1 .*os._exit"),
        ("import os\ndef score(p, r, rows): os.kill(os.getpid(), 9)", "responses 1 to 3.*died by signal 9"),
    ],
)
def test_its_mistakes_are_named_by_row(function, body, message):
    with pytest.raises(UsageError, match=message):
        function(body)(["p"] * 3, ["a", "b", "c"], [{}] * 3)


def test_its_error_is_told_where_the_response_it_is_for_is_not_found_in_time(function):
    body = "import time\ndef score(p, r, rows):\n    time.sleep(0.6)\n    return [1 / (x != 'late') for x in r]"
    with pytest.raises(UsageError, match="rewards.py:score: ZeroDivisionError"):
        function(body, seconds=6.0)(["p"] * 12, ["a"] * 11 + ["late"], [{}] * 12)


def test_what_hangs_is_stopped_and_the_next_batch_gets_a_new_process(function):
    rate = function("def score(p, r, rows):\n    while r[0] == 'hang': pass\n    return [1.0] * len(r)", seconds=3.0)
    with pytest.raises(UsageError, match="within 3 s"):
        rate(["p"], ["hang"], [{}])
    assert rate(["p"], ["go"], [{}]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        ("x = 1", "score", "no function"),
        ("import nowhere", "score", "cannot be imported"),
        ("score = 3", "score", "no f"),
        ("import sys; sys.exit(0)", "score", r"cannot be imported: .*sys.exit\(0\)"),
        ("import os; os._exit(0)", "score", r"cannot be imported: .*os._exit\(0\)"),
        ("raise KeyboardInterrupt", "score", "cannot be imported: KeyboardInterrupt"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_before_any_rollout(function, body, name, message):
    with pytest.raises(UsageError, match=message):
        function(body, name)


def test_a_name_that_is_no_file_and_function_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"FILE\.py:NAME"):
        RewardFunction(str(tmp_path), 1.0)
    with pytest.raises(UsageError, match="no such file"):
        RewardFunction(f"{tmp_path}/absent.py:score", 1.0)


def test_an_import_that_hangs_is_stopped_by_the_same_limit(function):
    with pytest.raises(UsageError, match="cannot be imported: no answer within 0.5 s; rl.reward_timeout"):
        function("while True: pass\ndef score(p, r, rows): return [1.0] * len(r)", seconds=0.5)


def test_numbers_of_numpy_and_torch_and_truth_values_are_rewards(function):
    body = "import numpy as np\ndef score(p, r, rows): return [np.float32(0.5), np.array(2), True]"
    assert function(body)(["p"] * 3, ["a", "b", "c"], [{}] * 3).tolist() == [0.5, 2.0, 1.0]
    assert as_number(torch.tensor(0.25)) == 0.25
    with pytest.raises(ValueError, match="not a number"):
        as_number(torch.tensor([0.25]))


SIBLING = """
from dataclasses import dataclass
from words import wanted

@dataclass
class Found:
    n: "int"

def count(completions, **kwargs):
    from later import times
    return [times * Found(c.count(wanted)).n for c in completions]
"""


def test_a_function_of_trls_signature_imports_the_files_beside_its_own(function, tmp_path):
    (tmp_path / "words.py").write_text("wanted = 'yes'\n")
    (tmp_path / "later.py").write_text("times = 10\n")
    assert function(SIBLING, "count")(["p"] * 2, ["yes, yes", "no"], [{}] * 2).tolist() == [20.0, 0.0]


def test_none_is_a_reward_that_does_not_apply(function):
    body = "def score(completions, answer): return [None if a is None else a in c for c, a in zip(completions, answer)]"
    found = function(body)(["p"] * 3, ["4", "5", "6"], [{"answer": "4"}, {}, {"answer": "4"}], columns=["answer"])
    assert found[0] == 1 and found[1].isnan() and found[2] == 0


def test_a_function_that_takes_neither_signature_is_told_both(function):
    with pytest.raises(UsageError, match=r"rewards.py:score: takes \(text\); accepted: .*rows.* or TRL's f\(prompts"):
        function("def score(text): return 1.0")
