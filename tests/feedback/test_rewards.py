"""The rule's rewards."""

import torch

from lco_lite.feedback.rewards import reward_source
from lco_lite.recipe import Rl


def test_by_rule_the_reward_is_the_tasks_grade_and_feedback_on_tokens_has_none():
    rule = reward_source(Rl(objective="grpo", feedback="rule"), torch.device("cpu"))
    assert rule is not None and rule([], [], [], torch.tensor([1.0, -1.0, 1.0])).tolist() == [1, -1, 1]
    assert reward_source(Rl(objective="kld", feedback="dpo"), torch.device("cpu")) is None
