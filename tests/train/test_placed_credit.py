"""The rule's word is placed at the first wrong token."""

import pytest
import torch
import typer
import yaml
from pydantic import ValidationError

from lco_lite.recipe import Rl
from lco_lite.rollout.engine import Response
from lco_lite.sequences import Example
from lco_lite.tasks.arithmetic import Arithmetic
from lco_lite.train import methods
from lco_lite.train import rl as rl_stage
from lco_lite.train.methods import placed_rule
from lco_lite.train.pipeline import train
from lco_lite.train.rollouts import Phase, first_wrong_token
from tests.conftest import TINY
from tests.train.test_chain import killed_after, run_stage, same, start, trained


@pytest.mark.parametrize(("baseline", "b"), [("batch", 4 / 6), ("none", 0.0)])
@pytest.mark.parametrize("sign", ["both", "positive"])
def test_tokens_before_the_first_wrong_one_count_as_right_and_those_after_it_not_at_all(baseline, b, sign):
    responses = [Response(Example([1], [5] * n), False) for n in (3, 4)]
    phase = Phase([0, 1], 9, responses, [1.0, -1.0], {"rule": [1.0, -1.0]}, [False] * 2, 2, [None, 2])
    rule = {"weight": 2, "sign": sign, "credit": "first_error"}
    right, wrong = placed_rule(phase, Rl(feedback="rule", baseline=baseline, rewards={"rule": rule}))
    a, z = 2 * (1 - b), 2 * (-1 - b) if sign == "both" else 0.0
    torch.testing.assert_close(right, torch.tensor([a, a, a]))
    torch.testing.assert_close(wrong, torch.tensor([a, a, z, 0.0]))


def test_the_rewards_of_a_phase_are_made_once_however_many_responses_it_has(monkeypatch):
    made, given = [], Phase.given
    monkeypatch.setattr(Phase, "given", lambda self, name: made.append(name) or given(self, name))
    responses = [Response(Example([1], [5, 6]), False)] * 9
    phase = Phase(list(range(9)), 9, responses, [1.0] * 9, {"rule": [1.0] * 9}, [False] * 9, 9, [None] * 9)
    placed_rule(phase, Rl(feedback="rule", rewards={"rule": {"credit": "first_error"}}))
    assert made == ["rule"]


def test_of_several_only_the_groups_that_stay_keep_their_errors():
    responses = [Response(Example([1], [5]), False)] * 2
    phase = Phase([3, 4], 9, responses, [1.0, -1.0], {"rule": [1.0, -1.0]}, [False] * 2, 2, [None, 0])
    assert phase.only([1], 1).errors == [0]
    assert phase.and_also(phase.only([1], 1)).errors == [None, 0, 0]


class Letters:
    """A token a letter."""

    def text(self, ids):
        return "".join(chr(i) for i in ids)


@pytest.mark.parametrize(
    ("response", "truncated", "place"),
    [("5+2=7 #7", False, None), ("5+2=8 #8", False, 4), ("5+2=", False, 3), ("5+2=", True, 4)],
)
def test_the_first_wrong_token_holds_the_first_wrong_character_and_the_end_is_the_place_of_what_is_missing(
    response, truncated, place
):
    class Once:
        def first_error(self, text, item):
            right = "5+2=7 #7"
            same = next((i for i, (a, b) in enumerate(zip(text, right)) if a != b), len(text))  # noqa: B905
            return None if text == right else same

    example = Example([1], [ord(c) for c in response])
    assert first_wrong_token(Letters(), Once(), None, example, truncated) == place  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    file = tmp_path_factory.mktemp("credit") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    run_stage(file, "rm")
    return file


def credited(feedback: str, objective: str = "kld") -> list[str]:
    return [f"rl.objective={objective}", f"rl.feedback={feedback}", "rl.rewards.rule.credit=first_error"]


@pytest.mark.parametrize(("objective", "feedback"), [("kld", "dpo + rule"), ("raft", "rule")])
def test_placed_credit_is_in_the_target_token_by_token_and_a_killed_run_ends_in_the_same_bits(
    warm, monkeypatch, objective, feedback
):
    sets, score, seen = credited(feedback, objective), methods.score, []
    sets += ["rl.responses_per_prompt=1", "rl.baseline=batch"]

    def looking(models, phase, plan, rl, *told):
        scored = score(models, phase, plan, rl)
        assert phase.errors is not None and [e is None for e in phase.errors] == [g > 0 for g in phase.grades]
        placed = placed_rule(phase, rl)
        for micro in sum(scored, []):
            expected = torch.cat([placed[i] for i in micro.responses.unique_consecutive().tolist()])
            told = micro.advantages if objective == "raft" else micro.target.advantages
            torch.testing.assert_close(told, expected)
            seen.append(told)
        return scored

    # random weights are wrong at once: say that they are so at the third character
    monkeypatch.setattr(Arithmetic, "first_error", lambda self, response, item: min(2, len(response)))
    monkeypatch.setattr(rl_stage, "score", looking)
    whole = trained(run_stage(warm, f"rl-{objective}", *sets, fresh=True), f"rl-{objective}")
    assert any(len(one.unique()) > 1 for one in seen)
    with killed_after(monkeypatch, f"rl-{objective}", 1):
        run_stage(warm, f"rl-{objective}", *sets, fresh=True)
    assert same(whole, trained(run_stage(warm, f"rl-{objective}", *sets), f"rl-{objective}"))


def test_a_task_that_knows_no_first_error_is_named(warm, capsys):
    sets = [*credited("rule"), "task=gsm8k", "data.task=nowhere.jsonl"]
    with pytest.raises(typer.Exit) as status, start(warm, *sets) as ctx:
        train(ctx, "rl-kld", fresh=True)
    assert status.value.exit_code == 2


def test_only_the_rule_knows_which_token_is_wrong():
    given = {"function": {"credit": "first_error"}}
    with pytest.raises(ValidationError, match=r"rewards\.function\.credit is response"):
        Rl(objective="grpo", feedback="function", responses_per_prompt=4, reward_function="a.py:f", rewards=given)


@pytest.mark.parametrize("objective", ["ppo", "rloo", "gspo", "pmd", "rebel", "tpo", "grpo"])
def test_what_takes_one_number_a_response_refuses_placed_credit(objective):
    with pytest.raises(ValidationError, match=r"rewards\.rule\.credit first_error"):
        Rl(objective=objective, feedback="rule", rewards={"rule": {"credit": "first_error"}})
