"""The rule's rewards."""

from lco_lite.feedback.rewards import rule_rewards


def test_right_is_plus_one_and_wrong_is_minus_one():
    assert rule_rewards([True, False, True]).tolist() == [1, -1, 1]
