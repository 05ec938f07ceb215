"""The numbers of a stage: one JSON object a step in ``metrics.jsonl``, under names that are listed here and only here.

``docs/metrics.md`` is the same list for readers.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from lco_lite.files import write_bytes, write_errors

METRICS: dict[str, str] = {
    "step": "updates done (sft, rm) or rollout phases done (rl), this one included",
    "loss": "the objective, mean over the step's updates",
    "lr": "learning rate of the step's last update",
    "grad_norm": "2-norm of the gradient before clipping, mean over the step's updates",
    "reward": "mean reward a response, in the feedback's own unit (rule: +1 right, -1 wrong)",
    "accuracy": "share of responses that are right (rl), of pairs whose chosen response is the likelier (rm), 0 to 1",
    "margin": "mean implicit reward of chosen minus rejected, nats times beta (rm)",
    "dead_groups": "share of groups whose responses all have the same reward and so teach nothing, 0 to 1",
    "kl_to_old": "KL(pi || pi_old) a token after the step's updates, nats",
    "entropy": "entropy of the policy a token, nats",
    "sampled_prob": "mean probability of the sampled tokens, 0 to 1",
    "clipped": "share of tokens, or of sequences (gspo, rloo), whose ratio the clip holds, 0 to 1",
    "logit_grad_norm_pos": "2-norm of the gradient in the logits, tokens with positive advantage",
    "logit_grad_norm_neg": "2-norm of the gradient in the logits, tokens with negative advantage",
    "response_tokens": "response tokens trained on in this step",
    "mean_response_tokens": "mean length of a response, tokens",
    "truncated": "share of responses that hit the length limit, 0 to 1",
    "samples_seen": "responses drawn (rl), demonstrations or pairs trained on so far",
    "tokens_per_second": "response tokens made or trained on, a second of the whole step",
    "eval": "held-out score of the task after the step, 0 to 1",
    "seconds.loading": "time spent loading models and data, s",
    "seconds.rollout": "time spent generating, s",
    "seconds.score": "time spent on advantages and old hidden states, s",
    "seconds.update": "time spent on forward, backward and optimizer, s",
    "seconds.eval": "time spent on the held-out score, s",
    "peak_mib": "most memory in use so far: of the GPU where there is one, else of the process, MiB",
}


class JsonLog:
    """Appends JSON objects to ``path``, one a line, each at once. Every object carries its ``step``.

    ``resume_after`` is the step of the checkpoint that the stage goes on from: later lines belong to work that is done
    again and are dropped, and so is a last line that was cut short. None: the stage starts anew, with an empty file.
    NaN and infinities are written as null. Raises LcoError on a full disk, UsageError without permission.
    """

    def __init__(self, path: Path, resume_after: int | None) -> None:
        self.path = path
        kept = [] if resume_after is None else [row for row in read_log(path) if row["step"] <= resume_after]
        write_bytes(path, b"".join(map(_line, kept)))
        with write_errors(path):
            # unbuffered: a line is on its way at once, and nothing is left over to fail again when the log is closed
            self._file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        if "step" not in row:
            raise ValueError(f"{self.path.name}: a line needs its step")
        line = memoryview(_line(row))
        with write_errors(self.path):
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsLog(JsonLog):
    """A JsonLog that takes only the names in METRICS; another raises ValueError."""

    def write(self, row: dict[str, Any]) -> None:
        unknown = sorted(name for name in _names(row) if name not in METRICS)
        if unknown:
            raise ValueError(f"no such metric: {', '.join(unknown)} (telemetry.metrics.METRICS lists them)")
        super().write(row)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics or samples file; none where there is no file. Lines that are not whole are passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a kill or a full disk; the step is in no checkpoint
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names(row: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in row.items():
        names += _names(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return names


def peak_mib() -> float:
    """Most memory allocated on the GPU since the last reset; without one, the largest resident size of the process."""
    torch = sys.modules.get("torch")  # not imported: then nothing is on a GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return _peak_resident_mib()


if sys.platform == "win32":

    def _peak_resident_mib() -> float:
        import psutil  # comes with accelerate

        return float(psutil.Process().memory_info().peak_wset) / 2**20
elif sys.platform == "linux":

    def _peak_resident_mib() -> float:
        # not getrusage: its peak is passed on from the parent process, however small the child
        with open("/proc/self/status", encoding="ascii") as status:
            return next(float(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
else:

    def _peak_resident_mib() -> float:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on other systems
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
