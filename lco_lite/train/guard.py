"""The guard: looks at each step's metrics and says in words when training goes wrong, or goes nowhere.

Pure: metrics in, warnings out. Each is said once and again only after it recovered. A collapse ends the run where
``rl.guard`` is ``stop``; what only costs time never does.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
# Twice or half the first three steps' length is what a longer chain of thought may take, if it pays: only where the
# reward is no higher than in those steps is it drift.
LENGTH_STEPS, LENGTH_FACTOR = 3, 2.0
# Where more responses than this are cut their rewards say little, and the next ones grow longer.
TRUNCATED_MOST = 0.5
# One step over this is a hard batch, three running are a policy that leaves where the loss is smooth.
GRAD_NORM_MOST, GRAD_NORM_STEPS = 10.0, 3
# Two falls running are one chance in six without a trend; two standard errors of the difference of two scores besides.
EVALS, EVAL_DEVIATIONS = 3, 2.0
# A loop is 64 tokens of a period of 16 or less, four turns at least: lists and tables do not repeat to the token.
LOOP_TOKENS, LOOP_PERIOD = 64, 16
# What loops at the start is the model's own; a tenth more is two standard errors of 64 responses at 0.1.
REPEATED_MORE = 0.1
# Nats a token. Over 500 tokens that is 5e-4: the policy finds its own responses some 3 % likelier or less likely.
KL_LEAST, KL_STEPS = 1e-6, 3
# φ's odds for the chosen response are then under 1.05: log σ, DPO's loss, stands within 4 % of where it starts.
MARGIN_LEAST = 0.05
# Batches differ, so tenths of the updates are compared; under ten updates there is none.
LOSS_FALL, LOSS_PARTS = 0.01, 10

WATCHED = ("entropy", "accuracy", "reward", "mean_response_tokens", "truncated", "repeated", "grad_norm", "kl_to_old")
_WORSE = "the policy gets worse. Lower rl.lr or raise rl.beta."
_ADAPTER = "an adapter bears ten times the learning rate of full fine-tuning: TRL's guide, LoRA Without Regret"


@dataclass(frozen=True)
class Warned:
    """What to tell the user; with ``stops``, what ends a run under ``rl.guard: stop``."""

    text: str
    stops: bool


class Guard:
    """Feed it every step in order (a resumed stage: those of ``read_log`` first, dropping what it says).

    ``eval_items``: how many a held-out score is a mean of. ``compares``: advantages compare a prompt's responses alone.
    """

    def __init__(self, vocab_size: int | None = None, eval_items: int = 256, compares: bool = False) -> None:
        self.vocab_size, self.eval_items, self.compares = vocab_size, eval_items, compares
        self._history: dict[str, list[float]] = defaultdict(list)
        self._evals: list[tuple[float, float]] = []
        self._said: set[str] = set()

    def check(self, metrics: Mapping[str, Any]) -> list[Warned]:
        """Takes in one step's metrics and returns the warnings that are new with it."""
        now = {name: float(x) for name in (*WATCHED, "eval", "dead_groups") if (x := metrics.get(name)) is not None}
        now = {name: value for name, value in now.items() if math.isfinite(value)}
        for name, value in now.items():
            self._history[name].append(value)
        if "eval" in now and "reward" in now:
            self._evals.append((now["reward"], now["eval"]))
        signs = {name: Warned(text, True) for name, text in _collapse(self._history, self.vocab_size).items()}
        if text := _overfit(self._evals[-EVALS:], self.eval_items):
            signs["held-out low"] = Warned(text, True)
        idle = _idle(self._history, self.compares and now.get("dead_groups") == 1)
        signs |= {name: Warned(text, False) for name, text in idle.items()}
        new = [warned for name, warned in signs.items() if name not in self._said]
        self._said = set(signs)
        return new


def _collapse(history: Mapping[str, list[float]], vocab_size: int | None) -> dict[str, str]:
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
                "the policy has come apart. Start again with a lower rl.lr."
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
    if (values := history["repeated"]) and values[-1] > values[0] + REPEATED_MORE:
        signs["repeated high"] = (
            f"{values[-1]:.0%} of the responses end in a loop, {values[0]:.0%} at the start: the policy comes apart. "
            "Look at samples.jsonl; lower rl.lr, or raise rl.beta or rl.anchor."
        )
    latest = history["grad_norm"][-GRAD_NORM_STEPS:]
    if len(latest) == GRAD_NORM_STEPS and min(latest) > GRAD_NORM_MOST:
        signs["gradient high"] = (
            f"gradient norm over {GRAD_NORM_MOST:.0f} for {GRAD_NORM_STEPS} steps ({latest[-1]:.3g} now): lower rl.lr."
        )
    return signs


def _overfit(evals: Sequence[tuple[float, float]], items: int) -> str | None:
    """Of (reward, held-out score), the last ``EVALS`` of them."""
    if len(evals) < EVALS:
        return None
    rewards, scores = zip(*evals, strict=True)
    falls = all(after < before for before, after in zip(scores, scores[1:], strict=False))
    error = math.sqrt(sum(p * (1 - p) for p in (scores[0], scores[-1])) / items)
    if not falls or scores[0] - scores[-1] <= EVAL_DEVIATIONS * error or rewards[-1] <= rewards[0]:
        return None
    return (
        f"over the last {EVALS} evaluations reward rises from {rewards[0]:.3f} to {rewards[-1]:.3f}, and the held-out "
        f"score (eval) falls from {scores[0]:.3f} to {scores[-1]:.3f}: the policy learns to please the reward, not the "
        "task. Read samples.jsonl; take the best step (--policy rl@best), or mend the reward."
    )


def _idle(history: Mapping[str, list[float]], all_dead: bool) -> dict[str, str]:
    """What costs time and breaks nothing."""
    signs, reward = {}, history["accuracy"] or history["reward"]
    if all_dead:
        known = history["accuracy"]
        prompts = "harder or easier" if not known else "harder" if known[-1] >= 0.5 else "easier"
        signs["groups dead"] = (
            "every group is dead: all responses to a prompt have the same reward, and it teaches nothing. "
            f"Take {prompts} prompts, a higher rl.temperature or more rl.responses_per_prompt; where some groups are "
            "alive now and then, rl.dynamic_sampling: true."
        )
    if len(values := history["mean_response_tokens"]) > LENGTH_STEPS and len(reward) > LENGTH_STEPS:
        start, now = fmean(values[:LENGTH_STEPS]), values[-1]
        drifts = now >= LENGTH_FACTOR * start or LENGTH_SHARE * values[0] <= now <= start / LENGTH_FACTOR
        if drifts and reward[-1] <= fmean(reward[:LENGTH_STEPS]):
            signs["length drifts"] = (
                f"responses of {now:.0f} tokens, {start:.0f} at the start, and the reward is no higher for it. "
                "Look at samples.jsonl; an objective that means over all tokens has less of a bias than one a response."
            )
    first = history["kl_to_old"][:KL_STEPS]
    if len(first) == KL_STEPS and max(first) < KL_LEAST:
        signs["policy stands"] = (
            f"kl_to_old is under {KL_LEAST:g} nats a token in each of the first {KL_STEPS} steps: the policy hardly "
            f"moves. Raise rl.lr ({_ADAPTER}) or rl.inner_epochs, or lower rl.minibatch."
        )
    return signs


def ends_in_loop(response: Sequence[int]) -> bool:
    """Whether its last ``LOOP_TOKENS`` tokens, an end token not counted in, repeat with a period of ``LOOP_PERIOD`` or
    less. A shorter response has no room for a loop worth the name."""
    tail = list(response[-LOOP_TOKENS:])
    return len(tail) == LOOP_TOKENS and any(tail[p:] == tail[:-p] for p in range(1, LOOP_PERIOD + 1))


def sft_stands(losses: Sequence[float]) -> str | None:
    """A warning where the loss, one an update, has not fallen; None where it has, or there is too little to say."""
    part = len(losses) // LOSS_PARTS
    if not part:
        return None
    first, last = fmean(losses[:part]), fmean(losses[-part:])
    if last < (1 - LOSS_FALL) * first:
        return None
    return f"the loss has not fallen: {first:.4g} at the start, {last:.4g} at the end. Raise sft.lr ({_ADAPTER})."


def reward_model_stands(margins: Sequence[float], pair_accuracy: float | None) -> str | None:
    """A warning where φ, by its margin, one an update, or by the order of held-out pairs, has learned nothing."""
    last = fmean(margins[-max(1, len(margins) // LOSS_PARTS) :]) if margins else 0.0
    if last < MARGIN_LEAST:
        return (
            f"φ has learned next to nothing: its margin is {last:.3g}, 0 where it starts. Raise train_rm.lr "
            f"({_ADAPTER}), or train on more pairs."
        )
    if pair_accuracy is not None and pair_accuracy <= 0.5:
        return (
            f"φ has {pair_accuracy:.3f} of the held-out pairs in the right order, a coin 0.500: what it learned does "
            "not carry over. More or cleaner pairs help."
        )
    return None
