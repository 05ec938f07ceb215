"""The collapse guard: looks at each step's metrics and says in words when training goes wrong.

Pure: metrics in, warnings out. Each is said once and again only after it recovered.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any

# Under this share of its start or this many nats, at T = 0.6, the policy repeats one response: it explores nothing.
ENTROPY_SHARE, ENTROPY_LEAST = 0.01, 0.01
# Over this share of log V, close to uniform over the vocabulary, the policy is noise.
ENTROPY_NOISE = 0.8
# A fall to half is more than chance: twice the sampling error of the smallest usual step (64 at 0.3) is a third.
ACCURACY_SHARE = 0.5
# A reward's scale is its own: it has to fall by three deviations of its first three steps and by half their mean.
REWARD_STEPS, REWARD_DEVIATIONS, REWARD_SHARE = 3, 3.0, 0.5
# Under a quarter of the length at the start the policy has found that saying nothing costs nothing.
LENGTH_SHARE = 0.25
# Where more responses than this are cut their rewards say little, and the next ones grow longer.
TRUNCATED_MOST = 0.5
# One step over this is a hard batch, three running are a policy that leaves where the loss is smooth.
GRAD_NORM_MOST, GRAD_NORM_STEPS = 10.0, 3

WATCHED = ("entropy", "accuracy", "reward", "mean_response_tokens", "truncated", "grad_norm")
_WORSE = "the policy gets worse. Lower rl.lr or raise rl.beta."


class Guard:
    """Feed it every step in order (a resumed stage: those of ``read_log`` first, dropping what it says)."""

    def __init__(self, vocab_size: int | None = None) -> None:
        self.vocab_size = vocab_size
        self._history: dict[str, list[float]] = defaultdict(list)
        self._said: set[str] = set()

    def check(self, metrics: Mapping[str, Any]) -> list[str]:
        """Takes in one step's metrics and returns the warnings that are new with it."""
        for name in WATCHED:
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                self._history[name].append(float(value))
        signs = _signs(self._history, self.vocab_size)
        new = [warning for name, warning in signs.items() if name not in self._said]
        self._said = set(signs)
        return new


def _signs(history: Mapping[str, list[float]], vocab_size: int | None) -> dict[str, str]:
    signs = {}  # what is wrong now, by the name of the sign
    if values := history["entropy"]:
        start, now = values[0], values[-1]
        if now < ENTROPY_LEAST or now < ENTROPY_SHARE * start:
            signs["entropy low"] = (
                f"entropy {now:.2g} nats, {start:.2g} at the start: the policy repeats itself and explores nothing. "
                "Raise rl.beta or rl.anchor, or lower rl.lr."
            )
        if vocab_size is not None and now >= ENTROPY_NOISE * math.log(vocab_size):
            signs["entropy high"] = (
                f"entropy {now:.2f} nats is near that of random tokens ({math.log(vocab_size):.2f}): "
                "the policy has come apart. Go back to the last good checkpoint with a lower rl.lr."
            )
    if values := history["accuracy"]:
        if values[-1] < ACCURACY_SHARE * values[0]:
            signs["accuracy low"] = f"accuracy {values[-1]:.3f}, {values[0]:.3f} at the start: {_WORSE}"
    elif len(values := history["reward"]) > REWARD_STEPS:
        start, spread = fmean(values[:REWARD_STEPS]), pstdev(values[:REWARD_STEPS])
        if start - values[-1] > max(REWARD_DEVIATIONS * spread, REWARD_SHARE * abs(start)):
            signs["reward low"] = f"reward {values[-1]:.3f}, {start:.3f} at the start: {_WORSE}"
    if (values := history["mean_response_tokens"]) and values[-1] < LENGTH_SHARE * values[0]:
        signs["length low"] = (
            f"responses of {values[-1]:.0f} tokens, {values[0]:.0f} at the start: the policy stops answering. "
            "Look at samples.jsonl; lower rl.lr or raise rl.beta."
        )
    if (values := history["truncated"]) and values[-1] > TRUNCATED_MOST:
        signs["length high"] = (
            f"{values[-1]:.0%} of the responses hit the length limit: their rewards say little. "
            "Raise rl.max_new_tokens, or see in samples.jsonl whether they ramble."
        )
    latest = history["grad_norm"][-GRAD_NORM_STEPS:]
    if len(latest) == GRAD_NORM_STEPS and min(latest) > GRAD_NORM_MOST:
        signs["gradient high"] = (
            f"gradient norm over {GRAD_NORM_MOST:.0f} for {GRAD_NORM_STEPS} steps ({latest[-1]:.3g} now): lower rl.lr."
        )
    return signs
