"""The rule's rewards."""

import torch

from lco_lite.feedback.rewards import Answers, reward_sources
from lco_lite.recipe import Rl


def test_by_rule_the_reward_is_the_tasks_grade_and_feedback_on_tokens_has_none():
    for rl in (Rl(objective="grpo", feedback="rule"), Rl(feedback="dpo + rule")):
        (rule,) = reward_sources(rl, torch.device("cpu")).values()
        assert rule(Answers([], [], [], [], torch.tensor([1.0, -1.0, 1.0]))).tolist() == [1, -1, 1]
    assert not reward_sources(Rl(objective="kld", feedback="dpo"), torch.device("cpu"))
