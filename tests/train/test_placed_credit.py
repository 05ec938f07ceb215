"""The rule's word is placed at the first wrong token."""

import pytest
import torch
from pydantic import ValidationError

from lco_lite.recipe import Rl
from lco_lite.rollout.engine import Response
from lco_lite.sequences import Example
from lco_lite.train.methods import placed_rule
from lco_lite.train.rollouts import Phase


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


@pytest.mark.parametrize("objective", ["ppo", "rloo", "gspo", "pmd", "rebel", "tpo", "grpo"])
def test_what_takes_one_number_a_response_refuses_placed_credit(objective):
    with pytest.raises(ValidationError, match=r"rewards\.rule\.credit first_error"):
        Rl(objective=objective, feedback="rule", rewards={"rule": {"credit": "first_error"}})
