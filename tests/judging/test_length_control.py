"""The length-controlled win rate, on pairs whose length effect is known and on a real file of preferences."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import pytest

from lco_lite.judging.alpaca import length_controlled


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def pairs(theta: float, phi: float, mean: float, n: int = 4_000) -> tuple[list[float], list[float]]:
    """Wins drawn from the model itself; answers longer than the reference's by ``mean`` of their deviation."""
    rng = random.Random(0)
    differences = [rng.gauss(mean, 1.0) * 500 for _ in range(n)]
    scores = [float(rng.random() < sigmoid(theta + phi * math.tanh(d / 500))) for d in differences]
    return scores, differences


@pytest.mark.parametrize("theta", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("phi", [0.0, 2.0])
def test_wins_by_length_alone_are_taken_out(theta, phi):
    scores, differences = pairs(theta, phi, mean=1.0)
    raw, controlled = sum(scores) / len(scores), length_controlled(scores, differences)
    assert controlled == pytest.approx(sigmoid(theta), abs=0.04)
    if phi:
        assert raw - controlled > 0.1


def test_answers_as_long_as_the_reference_keep_their_win_rate():
    scores, _ = pairs(0.5, 0.0, 0.0)
    assert length_controlled(scores, [0] * len(scores)) == pytest.approx(sum(scores) / len(scores), abs=1e-6)


def test_the_unit_of_length_and_its_sign_do_not_matter():
    scores, differences = pairs(0.3, 1.0, 0.5, n=400)
    found = length_controlled(scores, differences)
    assert length_controlled(scores, [d / 1_000 for d in differences]) == pytest.approx(found)
    assert length_controlled(scores, [-d for d in differences]) == pytest.approx(found)


def test_scores_between_loss_and_win_count_as_probabilities():
    scores, differences = pairs(0.3, 1.0, 0.5, n=300)
    split = length_controlled(scores + [1 - s for s in scores], differences * 2)
    assert length_controlled([0.5] * 300, differences) == pytest.approx(split, abs=1e-3) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_model_that_always_loses_or_wins_does_so_whatever_its_length(score):
    assert length_controlled([score] * 50, range(50)) == pytest.approx(score, abs=1e-3)


def test_scores_that_length_decides_wholly_are_one_half_at_equal_length():
    differences = [-400, -300, -200, -100, 100, 200, 300, 400]
    assert length_controlled([0, 0, 0, 0, 1, 1, 1, 1], differences) == pytest.approx(0.5, abs=1e-6)


def test_one_pair_is_its_own_score():
    assert length_controlled([1.0], [30]) == pytest.approx(1.0, abs=1e-3)


def test_the_optimum_is_one_the_gradient_of_the_likelihood_is_zero_at():
    """By hand: with two lengths only, the model without a prior fits the mean score of either exactly."""
    scores, differences = [1.0] * 600 + [0.0] * 400 + [1.0] * 200 + [0.0] * 800, [100.0] * 1_000 + [-100.0] * 1_000
    logit = math.log(0.6 / 0.4), math.log(0.2 / 0.8)
    assert length_controlled(scores, differences) == pytest.approx(sigmoid(sum(logit) / 2), abs=2e-3)


def test_difficulty_explains_what_length_does_not():
    """Long answers stand where instructions are easy: without difficulty, length gets the blame."""
    rng = random.Random(1)
    difficulty = [rng.gauss(0, 1.5) for _ in range(4_000)]
    differences = [300 * (z + rng.gauss(0.5, 0.5)) for z in difficulty]
    scores = [float(rng.random() < sigmoid(z)) for z in difficulty]
    raw = sum(scores) / len(scores)
    assert length_controlled(scores, differences, difficulty) == pytest.approx(raw, abs=0.03)
    assert length_controlled(scores, differences) < raw - 0.03


def test_the_real_preferences_have_their_known_win_rate_and_a_length_effect_of_the_known_sign():
    file = Path(os.environ.get("LCO_LITE_DATA", ""), "alpaca_eval_pref_davinci003_vs_gpt4turbo.jsonl")
    if not os.environ.get("LCO_LITE_DATA") or not file.exists():
        pytest.skip(f"LCO_LITE_DATA names no folder with {file.name}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    scores = [row["preference"] - 1 for row in rows]  # 1 where output_2 is better
    differences = [len(row["output_2"]) - len(row["output_1"]) for row in rows]
    raw = 100 * sum(scores) / len(scores)
    controlled = 100 * length_controlled(scores, differences)
    assert raw == pytest.approx(1.962, abs=1e-3)
    assert controlled == pytest.approx(7.84, abs=0.01), "its answers are short, and the judge likes long ones"
