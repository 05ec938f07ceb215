"""What a rollout phase was like and what it cost, under the names of telemetry/metrics.py."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lco_lite.data.chat import ChatFormat
from lco_lite.data.prepare import Prompt
from lco_lite.feedback.advantages import live_groups
from lco_lite.stages.phase import Phase
from lco_lite.telemetry.memory import peak_mib

SAMPLES_A_STEP = 8  # responses kept in samples.jsonl for people to read


def pooled(diagnostics: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Means over a minibatch's tokens; the norm of the logit gradient apart for tokens whose sampled advantage is
    positive and for the others."""
    found = {name: torch.cat([d[name] for d in diagnostics]) for name in diagnostics[0]}
    advantages, norms = found.pop("advantages"), found.pop("logit_grad_norm", None)
    means = {name: value.mean().item() for name, value in found.items()}
    if norms is not None:
        by_sign = {"pos": norms[advantages > 0], "neg": norms[advantages <= 0]}
        means |= {f"logit_grad_norm_{sign}": part.mean().item() for sign, part in by_sign.items() if len(part)}
    return means


def describe(phase: Phase, group: int) -> dict[str, Any]:
    """What the rollouts were like; ``group`` responses to each prompt."""
    metrics: dict[str, Any] = {"response_tokens": sum(len(r.example.response) for r in phase.responses)}
    own = ~torch.tensor(phase.shown)
    if own.any():
        sampled = [r for r, shown in zip(phase.responses, phase.shown, strict=True) if not shown]
        metrics["mean_response_tokens"] = fmean(len(r.example.response) for r in sampled)
        metrics["truncated"] = fmean(r.truncated for r in sampled)
    rewards = phase.grades if phase.rewards is None else phase.rewards
    if rewards is not None and own.any():
        metrics["reward"] = rewards[own].mean().item()
        if group > 1:
            metrics["dead_groups"] = 1 - live_groups(rewards, group).float().mean().item()
    if phase.grades is not None and own.any():
        metrics["accuracy"] = (phase.grades[own] > 0).float().mean().item()
    return metrics


def with_cost(metrics: dict[str, Any], seconds: dict[str, float], samples: int) -> dict[str, Any]:
    """``metrics`` and what it cost: ``seconds`` of the step by phase, ``samples`` drawn since the first step."""
    spent = sum(seconds.get(phase, 0.0) for phase in ("rollout", "score", "update"))
    return metrics | {
        "samples_seen": samples,
        "tokens_per_second": metrics["response_tokens"] / spent,
        "seconds": {name: seconds[name] for name in ("rollout", "score", "update", "eval") if name in seconds},
        "peak_mib": peak_mib(),
    }


def readable(phase: Phase, prompts: Sequence[Prompt], chat: ChatFormat, group: int, step: int) -> list[dict[str, Any]]:
    """The first responses of a step, as rows for samples.jsonl."""
    rewards = phase.grades if phase.rewards is None else phase.rewards
    return [
        {
            "step": step,
            "prompt": prompts[phase.chosen[i // group]].messages[-1]["content"],
            "response": chat.text(r.example.response),
            "truncated": r.truncated,
            "reward": None if rewards is None else rewards[i].item(),
        }
        for i, r in enumerate(phase.responses[:SAMPLES_A_STEP])
    ]
