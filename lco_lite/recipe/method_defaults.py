"""What each objective brings along: the settings it is known with, and where they come from. A recipe overrides them.

Numbers are those of TRL 1.16 (PPO and MiniLLM: TRL 1.10, the last release that had them) unless the paper states one.
Imports no torch: the recipe reads it.
"""

from __future__ import annotations

from typing import Any

TRL, TRL_PPO, PAPER = "TRL 1.16", "TRL 1.10, its last PPO", "arXiv 2603.00963"
MINILLM = "Gu et al. 2024, section 2.2"

# objective -> field of the recipe's rl section -> (value, source)
METHOD_DEFAULTS: dict[str, dict[str, tuple[Any, str]]] = {
    "kld": {},
    "lch": {},
    "mse": {},
    "reinforce": {
        "feedback": ("rule", "its reward is a response's"),
        "lr": (1e-6, TRL),
        "responses_per_prompt": (1, PAPER),
    },
    "ppo": {
        "feedback": ("rule", "its reward is a response's, with the KL to the reference taken off token by token"),
        "baseline": ("none", "the critic is the baseline"),
        "lr": (3e-6, TRL_PPO),
        "inner_epochs": (4, TRL_PPO + ": num_ppo_epochs"),
        "clip_low": (0.2, TRL_PPO),
        "clip_high": (0.2, TRL_PPO),
        "kl_coef": (0.05, TRL_PPO),
    },
    "rloo": {
        "feedback": ("rule", "its reward is a response's"),
        "baseline": ("leave_one_out", "Ahmadian et al. 2024"),
        "lr": (1e-6, TRL),
        "responses_per_prompt": (2, TRL + ": num_generations"),
        "kl_coef": (0.05, TRL + ": beta, taken off the reward"),
    },
    "grpo": {
        "feedback": ("rule", "its reward is a response's"),
        "baseline": ("group", "Shao et al. 2024"),
        "scale_rewards": (True, TRL + ": scale_rewards group"),
        "lr": (1e-6, TRL),
        "responses_per_prompt": (4, PAPER),
    },
    "dapo": {
        "feedback": ("rule", "its reward is a response's"),
        "baseline": ("group", "Yu et al. 2025"),
        "scale_rewards": (True, "Yu et al. 2025, eq 9"),
        "lr": (1e-6, TRL),
        "responses_per_prompt": (4, PAPER),
        "clip_high": (0.28, "Yu et al. 2025"),
        "overlong_buffer": (0.2, "Yu et al. 2025: 4,096 of 20,480 tokens"),
        "dynamic_sampling": (True, "Yu et al. 2025, eq 11"),
    },
    "gspo": {
        "feedback": ("rule", "its reward is a response's"),
        "baseline": ("group", "Zheng et al. 2025"),
        "scale_rewards": (True, "Zheng et al. 2025, eq 6"),
        "lr": (1e-6, TRL),
        "responses_per_prompt": (4, PAPER),
        "clip_low": (3e-4, "Zheng et al. 2025, section 5.1"),
        "clip_high": (4e-4, "Zheng et al. 2025, section 5.1"),
    },
    "gkd": {
        "feedback": ("dpo", "the reward model is the teacher: " + PAPER),
        "lr": (2e-5, TRL),
        "on_policy": (0.5, TRL + ": lmbda"),
    },
    "minillm": {
        "feedback": ("dpo", "the reward model is the teacher: " + PAPER),
        "lr": (1e-6, "TRL 1.10, its last MiniLLM"),
        "teacher_mix": (0.2, MINILLM),
    },
}

LCO = ("kld", "lch", "mse")
DISTILLATION = ("gkd", "minillm")

# an objective of the user's own is a policy gradient
_OWN: dict[str, tuple[Any, str]] = {"feedback": ("rule", "its reward is a response's")}


def method_defaults(objective: str) -> dict[str, Any]:
    """The values alone, by field."""
    return {field: value for field, (value, _) in METHOD_DEFAULTS.get(objective, _OWN).items()}
