"""Two signatures of a reward function, told apart by the names of their parameters; and what TRL's is given."""

import json

import pytest

from lco_lite.calling import adapted
from lco_lite.errors import UsageError
from lco_lite.user_code import answer

ROWS = [{"prompt": "p", "answer": 1}, {"prompt": "q"}]
LACKS = [[], ["answer"]]


def asked(in_turns=False):
    turns = [[{"role": "user", "content": text}] for text in "pq"] if in_turns else [None, None]
    known = [
        {"row": row, "lacks": lacks, "turns": prompt, "ids": ids}
        for row, lacks, prompt, ids in zip(ROWS, LACKS, turns, [[5], [6, 7]], strict=True)
    ]
    return ["p", "q"], ["a", "bb"], known


def given(function, in_turns=False):
    return adapted(function)(*asked(in_turns))


def told(function):
    return json.loads(answer(adapted(function), json.dumps(asked())))


@pytest.mark.parametrize(
    ("function", "is_trl"),
    [
        (lambda prompts, responses, rows: 0, False),
        (lambda p, r, rows, more=None: 0, False),
        (lambda *args: 0, False),
        (lambda prompts, responses, rows, **more: 0, False),
        (lambda prompts, completions, **columns: 0, True),
        (lambda completions, answer: 0, True),
        (lambda completion_ids, **columns: 0, True),
        (lambda prompts, **columns: 0, True),
    ],
)
def test_the_names_of_the_parameters_say_which_signature_it_is(function, is_trl):
    assert adapted(function).is_trl is is_trl


def test_ours_gets_prompts_responses_and_rows():
    assert given(lambda prompts, responses, rows: (prompts, responses, rows)) == (
        ["p", "q"],
        ["a", "bb"],
        ROWS,
    )


def test_trls_gets_each_column_as_a_list_but_the_prompts_own():
    assert given(lambda completions, **columns: columns) == {
        "prompts": ["p", "q"],
        "completion_ids": [[5], [6, 7]],
        "answer": [1, None],
    }
    assert given(lambda completions, answer: (completions, answer)) == (["a", "bb"], [1, None])


def test_of_data_with_turns_completions_are_lists_of_messages():
    prompts, completions = given(lambda prompts, completions: (prompts, completions), in_turns=True)
    assert prompts == [[{"role": "user", "content": text}] for text in "pq"]
    assert completions == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "bb"}]]


def test_a_coroutine_is_waited_for():
    async def score(completions, **columns):
        return [len(c) for c in completions]

    assert given(score) == [1, 2]


def test_what_it_asks_for_and_the_data_has_not_is_told_with_the_columns():
    with pytest.raises(UsageError, match="asks for solution, and the data has the columns prompt, answer"):
        given(lambda completions, solution: 0)
    with pytest.raises(UsageError, match="trainer_state, which only TRL's trainer has"):
        given(lambda completions, trainer_state: 0)
    assert given(lambda completions, trainer_state=None: [0, trainer_state]) == [0, None]


@pytest.mark.parametrize("returned", [7, "ab", {"a": 1, "b": 2}, None])
def test_what_is_no_list_of_numbers_is_shown_with_what_is_accepted(returned):
    error = told(lambda prompts, responses, rows: returned)["error"]
    assert f"came back {returned!r}" in error and "None where the reward does not apply" in error


def test_the_response_that_it_fails_on_is_found_and_what_it_asks_for_is_no_responses_fault():
    failed = told(lambda completions, answer: [1 / a for a in answer])
    assert failed["response"] == 1 and "TypeError" in failed["error"]
    assert told(lambda completions, gold: 0)["response"] is None


def test_it_says_of_itself_how_it_is_called():
    assert json.loads(answer(adapted(lambda completions: 0), "about")) == {
        "signature": "TRL's signature",
        "takes_ids": False,
    }
    assert adapted(lambda completions, **columns: 0).about()["takes_ids"]
