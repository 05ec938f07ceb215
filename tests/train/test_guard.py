import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lco_lite.train.guard import Guard, ends_in_loop, reward_model_stands, sft_stands

# eight steps of the quickstart with KLD, as it wrote them
QUICKSTART = {
    "entropy": [0.3422, 0.2644, 0.2347, 0.2177, 0.2098, 0.2126, 0.2039, 0.202],
    "grad_norm": [0.2931, 0.2869, 0.3129, 0.2139, 0.2177, 0.2178, 0.191, 0.1811],
    "kl_to_old": [0.0774, 0.0449, 0.0313, 0.0313, 0.0216, 0.0363, 0.0234, 0.0195],
    "mean_response_tokens": [21.5875, 21.6547, 21.4844, 21.6469, 21.5703, 21.5797, 21.4266, 21.5594],
    "truncated": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0016, 0.0, 0.0],
    "repeated": [0.0] * 8,
    "reward": [-0.6406, -0.3875, -0.0469, 0.0906, 0.1375, 0.1031, 0.1719, 0.2469],
    "accuracy": [0.1797, 0.3063, 0.4766, 0.5453, 0.5688, 0.5516, 0.5859, 0.6234],
    "eval": [0.5664, 0.7812, 0.8086, 0.8828, 0.8398, 0.9219, 0.9414, 0.8867],
}
SFT_LOSS = [5.609, 1.715, 0.984, 0.743, 0.546, 0.396, 0.273, 0.146, 0.109, 0.105]  # every 14th of its 140
MARGIN = [0.0, -0.047, 0.082, 0.222, 0.288, 0.384, 0.489, 0.471, 0.426]  # every 10th of its 87


def course(**series):
    """(step from 0, text, whether it ends a run under ``stop``) of what is said over several metrics together."""
    guard = Guard(1000, compares=True)
    steps = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
    return [(i, warned.text, warned.stops) for i, metrics in enumerate(steps) for warned in guard.check(metrics)]


def says(name: str, values, vocab_size=None) -> list[int]:
    """At which steps (from 0) a series of one metric is warned about."""
    guard = Guard(vocab_size)
    return [i for i, value in enumerate(values) if guard.check({name: value})]


@pytest.mark.parametrize(
    ("name", "healthy"),
    [
        ("entropy", [0.8, 0.5, 0.2, 0.1, 0.05]),
        ("accuracy", [0.3, 0.25, 0.2, 0.5, 0.8]),
        ("reward", [-0.4, -0.5, -0.3, -0.45, 0.2, 0.6]),
        ("mean_response_tokens", [40, 30, 20, 15, 80]),
        ("truncated", [0.0, 0.1, 0.5]),
        ("grad_norm", [3.0, 12.0, 2.0, 15.0, 11.0, 1.0]),
        ("repeated", [0.3, 0.35, 0.2, 0.4]),
        ("kl_to_old", [1e-7, 1e-7, 1e-5, 1e-9, 1e-9, 1e-9]),
        ("dead_groups", [1.0, 1.0]),
        ("eval", [0.8, 0.6, 0.4]),
    ],
)
def test_a_healthy_course_is_passed_in_silence(name, healthy):
    assert says(name, healthy, vocab_size=1000) == []


@pytest.mark.parametrize(
    ("name", "course", "at"),
    [
        ("entropy", [0.8, 0.1, 0.009], [2]),
        ("entropy", [5.0, 0.1, 0.04], [2]),
        ("entropy", [0.8, 5.0, 5.6], [2]),
        ("accuracy", [0.4, 0.25, 0.19], [2]),
        ("reward", [0.10, 0.12, 0.11, 0.09, 0.04], [4]),
        ("reward", [0.01, -0.01, 0.0, -0.02, -0.1], [4]),
        ("mean_response_tokens", [40, 20, 9], [2]),
        ("truncated", [0.1, 0.6], [1]),
        ("grad_norm", [11.0, 12.0, 13.0], [2]),
        ("repeated", [0.0, 0.05, 0.15, 0.4], [2]),
        ("kl_to_old", [0.0, 1e-7, 9e-7, 0.0], [2]),
    ],
)
def test_a_collapse_is_said_at_the_step_where_it_shows(name, course, at):
    assert says(name, course, vocab_size=1000) == at


def test_each_is_said_once_until_it_recovered():
    assert says("truncated", [0.6, 0.7, 0.9, 0.2, 0.8, 0.9]) == [0, 4]


def test_the_warning_says_what_was_what_is_and_what_to_do():
    guard = Guard()
    guard.check({"accuracy": 0.4})
    (warning,) = guard.check({"accuracy": 0.1})
    for part in ("accuracy", "0.100", "0.400", "rl.lr"):
        assert part in warning.text


def test_several_collapses_are_said_together():
    guard = Guard(vocab_size=100)
    guard.check({"entropy": 1.0, "mean_response_tokens": 100.0, "accuracy": 0.5})
    warnings = guard.check({"entropy": 4.5, "mean_response_tokens": 3.0, "accuracy": 0.0, "truncated": 1.0})
    assert len(warnings) == 4


def test_a_reward_on_a_scale_of_its_own_is_not_judged_where_the_accuracy_is_known():
    guard = Guard()
    for reward in (1.0, 1.0, 1.0, -9.0):
        assert guard.check({"reward": reward, "accuracy": 0.5}) == []


def test_what_is_missing_or_not_finite_is_no_evidence():
    guard = Guard(vocab_size=100)
    guard.check({"entropy": 1.0})
    for value in (None, math.nan, math.inf):
        assert guard.check({"entropy": value, "grad_norm": value}) == []
    assert guard.check({}) == []


def test_without_a_vocabulary_high_entropy_is_not_judged():
    assert says("entropy", [1.0, 11.0]) == []


def test_a_resumed_stage_that_is_shown_the_steps_before_judges_as_if_never_stopped():
    course = [{"accuracy": a} for a in (0.8, 0.7, 0.6)]
    guard = Guard()
    for metrics in course:
        guard.check(metrics)
    assert guard.check({"accuracy": 0.3}) != [] and Guard().check({"accuracy": 0.3}) == []


def test_the_quickstart_is_passed_in_silence():
    assert course(**QUICKSTART) == []
    assert sft_stands(SFT_LOSS) is None and reward_model_stands(MARGIN, 0.975) is None


def test_a_reward_that_rises_while_the_held_out_score_falls_is_named_with_it_and_ends_a_run():
    rewards, scores = [0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.6, 0.57, 0.54, 0.4]
    ((step, text, stops),) = course(reward=rewards, eval=scores)
    assert step == 4 and stops
    for part in ("reward rises from 0.300 to 0.500", "(eval) falls from 0.570 to 0.400"):
        assert part in text


@pytest.mark.parametrize(
    ("rewards", "scores"),
    [
        ([0.1, 0.2, 0.3], [0.6, 0.58, 0.55]),  # within two standard errors, 0.087
        ([0.1, 0.2, 0.3], [0.6, 0.4, 0.45]),
        ([0.3, 0.3, 0.3], [0.6, 0.5, 0.4]),
        ([0.1, 0.3], [0.6, 0.3]),
    ],
)
def test_a_held_out_score_that_does_not_part_from_the_reward_is_no_sign(rewards, scores):
    assert course(reward=rewards, eval=scores) == []


def test_fewer_held_out_items_need_a_deeper_fall():
    def says(items):
        guard = Guard(eval_items=items)
        return [bool(guard.check({"reward": r, "eval": e})) for r, e in ((0.1, 0.6), (0.2, 0.5), (0.3, 0.4))]

    assert says(256) == [False, False, True] and says(16) == [False] * 3


@pytest.mark.parametrize(
    ("metrics", "prompts"), [({"accuracy": 1.0}, "harder"), ({"accuracy": 0.0}, "easier"), ({}, "harder or easier")]
)
def test_a_phase_of_dead_groups_is_said_with_what_to_change_and_ends_no_run(metrics, prompts):
    guard = Guard(compares=True)
    assert guard.check({"dead_groups": 0.99, **metrics}) == []
    (warned,) = guard.check({"dead_groups": 1.0, **metrics})
    assert f"Take {prompts} prompts" in warned.text and not warned.stops
    for change in ("rl.temperature", "rl.responses_per_prompt", "rl.dynamic_sampling"):
        assert change in warned.text
    assert guard.check({"dead_groups": 1.0, **metrics}) == [], "once"


@pytest.mark.parametrize("length", [21, 9])
def test_a_length_that_drifts_is_said_only_where_the_reward_is_no_higher(length):
    lengths = [10.0, 10.0, 10.0, length] if length > 10 else [20.0, 20.0, 20.0, length]
    ((step, text, stops),) = course(mean_response_tokens=lengths, reward=[0.5, 0.6, 0.4, 0.5])
    assert step == 3 and f"{length} tokens" in text and not stops
    assert course(mean_response_tokens=lengths, reward=[0.5, 0.6, 0.4, 0.51]) == []


def test_a_length_that_collapses_is_not_said_twice():
    ((_, text, stops),) = course(mean_response_tokens=[40.0, 40.0, 40.0, 9.0], reward=[0.5] * 4)
    assert "stops answering" in text and stops


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=16),
    st.lists(st.integers(0, 9), max_size=20),
    st.integers(64, 90),
)
def test_whatever_is_repeated_up_to_the_end_is_a_loop(period, before, length):
    assert ends_in_loop(before + (period * length)[:length])


@given(st.permutations(range(64)), st.integers(0, 63))
def test_what_never_repeats_or_is_short_is_no_loop(tokens, short):
    assert not ends_in_loop(tokens) and not ends_in_loop([7] * short)


def test_one_token_out_of_turn_breaks_a_loop():
    assert not ends_in_loop([1, 2, 3] * 15 + [4] + [1, 2, 3] * 15)
    assert not ends_in_loop(list(range(17)) * 9), "a longer period is a refrain"


@given(st.floats(0.1, 10), st.integers(10, 200))
def test_a_loss_that_stays_or_rises_is_said_and_one_that_falls_is_not(start, updates):
    assert sft_stands([start] * updates) and sft_stands([start * (1 + i / updates) for i in range(updates)])
    assert sft_stands([start * (1 - 0.1 * i / updates) for i in range(updates)]) is None


def test_too_few_updates_say_nothing_of_a_loss():
    assert sft_stands([1.0] * 9) is None and "sft.lr" in (sft_stands([1.0] * 10) or "")


@pytest.mark.parametrize(
    ("margins", "accuracy", "said"),
    [
        ([0.0, 0.01, 0.02], 0.9, "its margin is 0.02"),
        ([0.0, 0.5, -0.3], None, "its margin is -0.3"),
        ([0.0, 0.5, 0.6], 0.5, "0.500 of the held-out pairs"),
        ([0.0, 0.5, 0.6], 0.51, None),
        ([0.0, 0.5, 0.6], None, None),
    ],
)
def test_a_reward_model_that_learned_nothing_is_told_by_its_margin_or_its_held_out_pairs(margins, accuracy, said):
    text = reward_model_stands(margins, accuracy)
    assert text is None if said is None else said in text
