"""The collapse guard: looks at each step's metrics and says in words when training goes wrong.

Pure: metrics in, warnings out. Each is said once and again only after it recovered. Thresholds, with their reasons:

- entropy under 1 % of its start or under 0.01 nats: at T = 0.6 such a policy repeats one response, nothing is
  explored any more;
- entropy over 0.8 log V: close to uniform over the vocabulary, the policy is noise;
- accuracy under half its start: twice the sampling error of the smallest usual step (64 responses at 0.3) is a third;
- reward (where no accuracy is known; its scale is the feedback's own) below the mean of the first three steps by both
  three of their standard deviations and half that mean;
- mean response length under a quarter of its start: the policy found that saying nothing costs nothing;
- more than half of the responses cut at the limit: their rewards say little, and the next ones grow longer;
- gradient norm over 10 in three steps running: one is a hard batch, three are a policy that leaves where the loss is
  smooth.
"""

import math
from collections.abc import Callable
from statistics import fmean, pstdev
from typing import Any

ENTROPY_SHARE, ENTROPY_LEAST, ENTROPY_NOISE = 0.01, 0.01, 0.8
ACCURACY_SHARE = 0.5
REWARD_STEPS, REWARD_DEVIATIONS, REWARD_SHARE = 3, 3.0, 0.5
LENGTH_SHARE = 0.25
TRUNCATED_MOST = 0.5
GRAD_NORM_MOST, GRAD_NORM_STEPS = 10.0, 3

_WORSE = "the policy gets worse. Lower rl.lr or raise rl.beta."

Check = Callable[["Guard"], "str | None"]


class Guard:
    """Feed it every step in order (a resumed stage: those of ``read_log`` first, dropping what it says)."""

    def __init__(self, vocab_size: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.history: dict[str, list[float]] = {}
        self._said: set[str] = set()

    def check(self, metrics: dict[str, Any]) -> list[str]:
        """Takes in one step's metrics and returns the warnings that are new with it."""
        for name in ("entropy", "accuracy", "reward", "mean_response_tokens", "truncated", "grad_norm"):
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                self.history.setdefault(name, []).append(float(value))
        new = []
        for name, check in CHECKS.items():
            warning = check(self)
            if warning is None:
                self._said.discard(name)
            elif name not in self._said:
                self._said.add(name)
                new.append(warning)
        return new


def _entropy_low(guard: Guard) -> str | None:
    values = guard.history.get("entropy")
    if not values or not (values[-1] < ENTROPY_LEAST or values[-1] < ENTROPY_SHARE * values[0]):
        return None
    return (
        f"entropy {values[-1]:.2g} nats, {values[0]:.2g} at the start: the policy repeats itself and explores nothing. "
        "Raise rl.beta or rl.anchor, or lower rl.lr."
    )


def _entropy_high(guard: Guard) -> str | None:
    values = guard.history.get("entropy")
    if not values or guard.vocab_size is None or values[-1] < ENTROPY_NOISE * math.log(guard.vocab_size):
        return None
    return (
        f"entropy {values[-1]:.2f} nats is near that of random tokens ({math.log(guard.vocab_size):.2f}): "
        "the policy has come apart. Go back to the last good checkpoint with a lower rl.lr."
    )


def _accuracy_low(guard: Guard) -> str | None:
    values = guard.history.get("accuracy")
    if not values or values[-1] >= ACCURACY_SHARE * values[0]:
        return None
    return f"accuracy {values[-1]:.3f}, {values[0]:.3f} at the start: {_WORSE}"


def _reward_low(guard: Guard) -> str | None:
    values = guard.history.get("reward", [])
    if guard.history.get("accuracy") or len(values) <= REWARD_STEPS:
        return None
    first = values[:REWARD_STEPS]
    fall = fmean(first) - values[-1]
    if fall <= max(REWARD_DEVIATIONS * pstdev(first), REWARD_SHARE * abs(fmean(first))):
        return None
    return f"reward {values[-1]:.3f}, {fmean(first):.3f} at the start: {_WORSE}"


def _length_low(guard: Guard) -> str | None:
    values = guard.history.get("mean_response_tokens")
    if not values or values[-1] >= LENGTH_SHARE * values[0]:
        return None
    return (
        f"responses of {values[-1]:.0f} tokens, {values[0]:.0f} at the start: the policy stops answering. "
        "Look at samples.jsonl; lower rl.lr or raise rl.beta."
    )


def _length_high(guard: Guard) -> str | None:
    values = guard.history.get("truncated")
    if not values or values[-1] <= TRUNCATED_MOST:
        return None
    return (
        f"{values[-1]:.0%} of the responses hit the length limit: their rewards say little. "
        "Raise rl.max_new_tokens, or see in samples.jsonl whether they ramble."
    )


def _gradient_high(guard: Guard) -> str | None:
    values = guard.history.get("grad_norm", [])[-GRAD_NORM_STEPS:]
    if len(values) < GRAD_NORM_STEPS or min(values) <= GRAD_NORM_MOST:
        return None
    return f"gradient norm over {GRAD_NORM_MOST:.0f} for {GRAD_NORM_STEPS} steps ({values[-1]:.3g} now): lower rl.lr."


CHECKS: dict[str, Check] = {
    "entropy_low": _entropy_low,
    "entropy_high": _entropy_high,
    "accuracy_low": _accuracy_low,
    "reward_low": _reward_low,
    "length_low": _length_low,
    "length_high": _length_high,
    "gradient_high": _gradient_high,
}
