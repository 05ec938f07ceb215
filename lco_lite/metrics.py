"""The numbers of a stage under names that are listed here and only here: one JSON object a step in ``metrics.jsonl``,
and, of an rl stage, one an update in ``updates.jsonl``.

``docs/metrics.md`` is the same list for readers.
"""

import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import create_model

from lco_lite import ranks
from lco_lite.files import Count, checked, damage, json_line, json_value, read_bytes, write_bytes, write_errors

METRICS: dict[str, str] = {
    "step": "updates done (sft, rm) or rollout phases done (rl), this one included",
    "update": "update within the step, from 1 (updates.jsonl)",
    "loss": "the objective, mean over the step's updates",
    "lr": "learning rate of the step's last update",
    "grad_norm": "2-norm of the gradient before clipping, without a critic's, mean over the step's updates",
    "critic_grad_norm": "the same of PPO's critic, which is clipped by itself",
    "value_loss": "loss of PPO's critic before rl.value_coef, mean over the step's updates",
    "reward": "mean reward a response, in the feedback's own unit (rule: +1 right, -1 wrong); of several by weight",
    "rewards.rule": "where rl.feedback has several parts: mean reward a response by rule, +1 right, -1 wrong",
    "rewards.function": "the same by rl.reward_function, in its own unit",
    "rewards.NAME": "the same by the function of this name, where rl.reward_function has names; in its own unit",
    "rewards.reward_model": "the same by rl.reward_classifier, in its own unit",
    "accuracy": "share of responses that are right (rl), of pairs whose margin is above 0 (rm), 0 to 1",
    "margin": "mean implicit reward of chosen minus rejected, nats times beta (rm)",
    "dead_groups": "share of groups whose responses all have the same reward and so teach nothing, 0 to 1",
    "skipped_updates": "updates of the step that were not made: no advantage in them gives a gradient",
    "not_finite": "batches of the step that were left out: a number of theirs is not finite (skipped.jsonl)",
    "kl_to_old": "KL(pi || pi_old) a token after the step's last update, on that update's responses, nats",
    "entropy": "entropy of the policy at temperature 1 a token, over all response tokens of the step's updates, nats",
    "sampled_prob": "mean probability of the sampled tokens at temperature 1, over all of the step's updates, 0 to 1",
    "clipped": "share of tokens, or of sequences (gspo, rloo), whose ratio the clip holds, 0 to 1",
    "mismatch": "mean absolute difference of log pi_old and the rollout engine's log-probability a token, nats",
    "mismatch_kl": "KL(pi_sampler || pi_old) a token: w - 1 - log w, w = pi_old/pi_sampler, nats",
    "logit_grad_norm_pos": "2-norm of the gradient in the logits, tokens with advantage > 0",
    "logit_grad_norm_neg": "2-norm of the gradient in the logits, tokens with advantage < 0",
    "logit_grad_sampled": "gradient of a token's loss in the logit of the sampled token, absolute value, mean",
    "logit_grad_others": "2-norm of the same gradient over the other tokens of the vocabulary, mean",
    "response_tokens": "response tokens trained on in this step",
    "mean_response_tokens": "mean length of a response, tokens",
    "truncated": "share of responses that hit the length limit, 0 to 1",
    "repeated": "share of responses whose last 64 tokens are a loop of at most 16, 0 to 1",
    "samples_seen": "rl: responses drawn so far",
    "tokens_per_second": "rl: response tokens a second of rollout, scoring and update",
    "eval": "held-out score of the task after the step, 0 to 1",
    "seconds.loading": "time spent loading models and data, s",
    "seconds.preflight": "time spent trying the longest micro-batch before the first update, on a GPU, s",
    "seconds.rollout": "time spent generating, s",
    "seconds.score": "time spent on advantages and old hidden states, s",
    "seconds.update": "time spent on forward, backward and optimizer, s",
    "seconds.samples": "time spent on the tokens of samples.jsonl (rl.samples), s",
    "seconds.eval": "time spent on the held-out score, s",
    "peak_mib": "most memory in use so far: of the GPU where there is one, else of the process, MiB",
}


# a line of any log: its step, and numbers under the names above; of one response it is a yes or no whether it was cut
_FIELDS: dict[str, Any] = {name: (float | None, None) for name in METRICS if "." not in name}
_FIELDS |= dict.fromkeys(("seconds", "rewards"), (dict[str, float | None], {}))
_FIELDS |= {"step": Count, "truncated": (float | bool | None, None)}
_LINE = create_model("LogLine", **_FIELDS)


class JsonLog:
    """Appends JSON objects to ``path``, one a line, each at once. Each has its ``step``, which others may share.

    ``done`` is the step of the checkpoint that the stage goes on from, 0 for a stage that starts: lines of later steps
    belong to work that is done again and are dropped, and so is a last line that was cut short. NaN and infinities are
    written as null. Raises LcoError on a full disk, UsageError without permission.

    A kill loses no line. A power cut may lose the last ones: no weight depends on them, so none waits for the disk.
    """

    @ranks.by_main
    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        write_bytes(path, b"".join(json_line(finite(line)) for line in read_log(path) if line["step"] <= done))

    @ranks.by_main
    def write(self, numbers: dict[str, Any]) -> None:
        if "step" not in numbers:
            raise ValueError(f"{self.path.name}: a line needs its step")
        with write_errors(self.path), self.path.open("ab") as file:
            file.write(json_line(finite(numbers)))


class MetricsLog(JsonLog):
    """A JsonLog that takes only the names in METRICS; another raises ValueError."""

    @ranks.by_main
    def write(self, numbers: dict[str, Any]) -> None:
        inner = {name: value for name, value in numbers.items() if isinstance(value, dict)}
        names = (numbers.keys() - inner.keys()) | {
            f"{name}.{key}"
            for name in inner
            for key in inner[name]
            if name != "rewards"  # functions have any name
        }
        if unknown := sorted(names - METRICS.keys()):
            raise ValueError(f"no such metric: {', '.join(unknown)} (METRICS in lco_lite/metrics.py lists them)")
        super().write(numbers)


@ranks.once
def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics, updates or samples file; none where there is no file. A last line without its end was
    cut short by a kill or a full disk, and is passed over. DataError with file and line for any other that is none, and
    for a metric that is no number."""
    if not path.exists():
        return []
    *lines, _ = read_bytes(path).split(b"\n")
    return [_logged(f"{path}, line {i}", line) for i, line in enumerate(lines, 1)]


def _logged(at: str, line: bytes) -> dict[str, Any]:
    with damage(at, "Put it back, delete the line, or start the stage again with --fresh"):
        return dict(checked(json_value(line, at), _LINE))


def finite(value: Any) -> Any:
    """``value`` as JSON can have it: numbers that are not finite are None."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_mib() -> float:
    """Most memory allocated on the GPU since the last reset; without one, the largest resident size of the process."""
    torch = sys.modules.get("torch")  # not imported: then nothing is on a GPU
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    if sys.platform == "linux":  # not getrusage: its peak is passed on from the parent process, however small the child
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on other systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory_mib() -> tuple[float, float, float]:
    """(in use now, the most so far, all there is) of the GPU, or without one of the process and the host, MiB."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return torch.cuda.memory_allocated() / 2**20, peak_mib(), there / 2**20
    process, there = _host()
    return process.memory_info().rss / 2**20, peak_mib(), there / 2**20


@cache
def _host() -> tuple[Any, int]:
    import psutil

    return psutil.Process(), psutil.virtual_memory().total
