"""Which parts of a recipe decide what a stage makes, and how two sets of them differ.

Left out is what may change between two starts of a stage without deciding its result: where and how fast it is computed
(device, threads, batch sizes that only split the work, checkpointing, the attention kernel: the same mathematics up to
rounding and the order of random draws), when it is saved, measured or warned about, and the run's name. These are also
what one changes after running out of memory.
"""

from __future__ import annotations

from typing import Any

from lco_lite.errors import UsageError
from lco_lite.recipe import Recipe

_SFT = ("seed", "task", "model", "chat", "data.demonstrations", "data.columns.demonstrations", "data.task", "sft")
_RM = (*_SFT, "reward_model", "data.preferences", "data.columns.preferences", "train_rm")

# last part of the key, wherever it stands
_NO_MATTER = {
    "gradient_checkpointing",
    "attention",
    "trust_remote_code",
    "micro_batch_tokens",
    "rollout_batch",
    "save_every",
    "eval_every",
    "eval_items",
    "check_items",
    "guard",
    "reward_timeout",
}


def stage_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings, by dotted key, that decide the outcome of ``stage`` (``sft``, ``rm`` or ``rl-OBJECTIVE``).

    RL on a rule's rewards builds on no reward model, so the settings of one do not count there.
    """
    if stage == "sft":
        roots: tuple[str, ...] = _SFT
    elif stage == "rm":
        roots = _RM
    elif stage.startswith("rl-"):
        upstream = _RM if recipe.rl.needs_reward_model else _SFT
        judge = ("reward_model",) if recipe.rl.feedback == "logprob" else ()  # its base is φ
        roots = (*upstream, *judge, "data.prompts", "data.columns.prompts", "rl")
    else:
        raise UsageError(f"no stage {stage!r}: sft, rm or rl-OBJECTIVE")
    values = flat(recipe.model_dump(mode="json"))
    return {
        key: value
        for key, value in values.items()
        if any(key == root or key.startswith(f"{root}.") for root in roots) and key.rpartition(".")[2] not in _NO_MATTER
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line a setting that differs: ``rl.beta: 1.0 → 0.5``."""
    missing = object()
    lines = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, missing), after.get(key, missing)
        if old != new:
            lines.append(f"{key}: {'unset' if old is missing else old} → {'unset' if new is missing else new}")
    return lines


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; an empty mapping stays as a value."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
