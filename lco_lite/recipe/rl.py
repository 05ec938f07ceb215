"""The ``rl`` section: what each objective brings along, and which settings go together.

Numbers are those of TRL 1.16 (PPO and MiniLLM: TRL 1.10, the last release that had them) unless the paper states one.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from lco_lite.recipe.sections import LEAST, WITH_LORA, Section, Temperature, Training, setting
from lco_lite.user_code import names_function

TRL, TRL_PPO, PAPER = "TRL 1.16", "TRL 1.10, its last PPO", "arXiv 2603.00963"

_GRADIENT: dict[str, tuple[Any, str]] = {"feedback": ("rule", "its reward is a response's"), "lr": (1e-6, TRL)}
_GROUPED = {**_GRADIENT, "baseline": ("group", "Shao et al. 2024"), "responses_per_prompt": (4, PAPER)}
_REGRESSION = {"beta": (1.0, "as LCO's; public code differs: docs/methods.md")}
_COMPARES = (True, "its loss compares the responses to a prompt")
_TAUGHT: dict[str, tuple[Any, str]] = {
    "feedback": ("dpo", "the reward model is the teacher: " + PAPER),
    "scale_rewards": (False, "a teacher gives no reward"),
    "overlong_buffer": (0.0, "a teacher gives no reward"),
}

# objective -> field of the recipe's rl section -> (value, source); lr is that of full fine-tuning: ×10 with LoRA
METHOD_DEFAULTS: dict[str, dict[str, tuple[Any, str]]] = {
    "kld": {},
    "lch": {},
    "mse": {},
    "reinforce": {**_GRADIENT, "responses_per_prompt": (1, PAPER)},
    "ppo": {
        "feedback": ("rule", "its reward is a response's, with the KL to the reference taken off token by token"),
        "baseline": ("none", "the critic is the baseline"),
        "scale_rewards": (False, "its advantages are whitened over the phase"),
        "lr": (3e-6, TRL_PPO),
        "inner_epochs": (4, TRL_PPO + ": num_ppo_epochs"),
        "clip_low": (0.2, TRL_PPO),
        "clip_high": (0.2, TRL_PPO),
        "kl_coef": (0.05, TRL_PPO),
    },
    "rloo": {
        **_GRADIENT,
        "baseline": ("leave_one_out", "Ahmadian et al. 2024"),
        "responses_per_prompt": (2, TRL + ": num_generations"),
        "kl_coef": (0.05, TRL + ": beta, taken off the reward"),
    },
    "grpo": {**_GROUPED, "scale_rewards": (True, TRL + ": scale_rewards group")},
    "dapo": {
        **_GROUPED,
        "scale_rewards": (True, "Yu et al. 2025, eq 9"),
        "clip_high": (0.28, "Yu et al. 2025"),
        "overlong_buffer": (0.2, "Yu et al. 2025: 4,096 of 20,480 tokens"),
        "dynamic_sampling": (True, "Yu et al. 2025, eq 11"),
    },
    "gspo": {
        **_GROUPED,
        "scale_rewards": (True, "Zheng et al. 2025, eq 6"),
        "clip_low": (3e-4, "Zheng et al. 2025, section 5.1"),
        "clip_high": (4e-4, "Zheng et al. 2025, section 5.1"),
    },
    "dr_grpo": {**_GROUPED, "scale_rewards": (False, "Liu et al. 2025")},
    "cispo": {
        **_GROUPED,
        "scale_rewards": (True, "MiniMax-M1 2025, as GRPO"),
        "clip_high": (4.0, "weights up to 5: Khatri et al. 2025, recommended by TRL 1.16"),
    },
    "dppo": {
        **_GROUPED,
        "scale_rewards": (False, "Qi et al. 2026, as Dr. GRPO"),
        "clip_low": (0.15, "Qi et al. 2026, their script in verl: of a probability, not of its ratio"),
        "clip_high": (0.15, "Qi et al. 2026, their script in verl"),
    },
    "raft": {
        **_GRADIENT,
        "baseline": ("none", "right is a reward above 0; with the group's mean, above that"),
        "responses_per_prompt": (4, "Xiong et al. 2025"),
    },
    "dro": {**_GROUPED, **_REGRESSION, "baseline": ("group", "in place of V(x), which Richemond et al. 2024 learn")},
    "pmd": {**_GROUPED, **_REGRESSION, "baseline": ("group", "Kimi k1.5 2025: r̄ in place of β log Z")},
    "rebel": {
        **_GROUPED,
        **_REGRESSION,
        "baseline": ("group", "takes no part: it cancels in a difference"),
        "responses_per_prompt": (2, "Gao et al. 2024"),
        "whole_groups": _COMPARES,
    },
    "tpo": {
        **_GROUPED,
        "scale_rewards": (True, "Kaddour 2026, appendix A"),
        "beta": (1.0, "Kaddour 2026: η"),
        "whole_groups": _COMPARES,
    },
    "opd": {
        **_TAUGHT,
        "lr": (1e-6, TRL + ": DistillationConfig"),
        "jsd_beta": (1.0, TRL + ": DistillationConfig's beta"),
        "on_policy": (1.0, "by definition"),
    },
    "gkd": {**_TAUGHT, "lr": (2e-5, TRL), "on_policy": (0.5, TRL + ": lmbda")},
    "minillm": {
        **_TAUGHT,
        "lr": (1e-6, "TRL 1.10, its last"),
        "teacher_mix": (0.2, "Gu et al. 2024, 2.2"),
    },
}

MOST_A_PHASE = 1_000_000  # responses, which are held in memory with their advantages
DENSE = ("dpo", "logprob")  # an advantage for every token of the vocabulary
REWARDS = ("rule", "function", "reward_model")  # a number a response
FEEDBACK = (*DENSE, "dpo_sampled", *REWARDS)
OF_TOKENS = ("none", "batch")  # baselines with which a token of dpo_sampled keeps an advantage of its own
# what a reward starts with beside dense feedback: the prototype's; docs/methods.md has what was measured since
MIXED: dict[str, dict[str, Any]] = {name: {"sign": "positive"} for name in REWARDS}
MIXED["rule"]["weight"] = 4.0
LCO = ("kld", "lch", "mse")
DISTILLATION = ("opd", "gkd", "minillm")
REGRESSIONS = ("dro", "pmd", "rebel", "tpo")  # of log-ratios to A/β, as LCO's of logits
COMPARISONS = ("rebel", "tpo")  # of the responses to a prompt
WHOLE = ("ppo", "rloo", "gspo", "pmd", "rebel", "tpo")  # of a response's one number


def defaults_of(objective: str) -> dict[str, tuple[Any, str]]:
    """The row of ``METHOD_DEFAULTS``; an objective of the user's own starts as a policy gradient."""
    return METHOD_DEFAULTS.get(objective, {"feedback": _GRADIENT["feedback"]})


def known_objective(name: str) -> str:
    """``name`` itself. Raises ValueError with all names where there is no such objective."""
    if name in METHOD_DEFAULTS or names_function(name):
        return name
    near = get_close_matches(name, METHOD_DEFAULTS, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ValueError(f"unknown objective {name!r}{hint} Accepted: {', '.join(METHOD_DEFAULTS)}, or FILE.py:NAME")


def feedbacks(text: str) -> list[str]:
    """``rule+dpo`` -> dpo, rule: dense feedback first, then rewards in the order of ``REWARDS``."""
    names = [name.strip() for name in text.split("+")]
    return sorted(names, key=lambda name: FEEDBACK.index(name) if name in FEEDBACK else len(FEEDBACK))


def known_feedback(text: str) -> str:
    """``rule+dpo`` -> ``dpo + rule``. Raises ValueError for unknown names and those that do not go together."""
    names, several = feedbacks(text), "one of dpo, logprob and any rewards go together: dpo + rule"
    named = "; `function` stands for all functions that reward_function names"
    for name in names:
        if name not in FEEDBACK:
            near = get_close_matches(name, FEEDBACK, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"unknown feedback {name!r}{hint} Accepted: {', '.join(FEEDBACK)}; {several}{named}")
        if names.count(name) > 1:
            raise ValueError(f"{name} stands twice in {text!r}")
    if set(DENSE) <= set(names):
        raise ValueError(f"{' and '.join(DENSE)} are both advantages over the whole vocabulary; {several}")
    if len(names) > 1 and "dpo_sampled" in names:
        raise ValueError(
            f"dpo_sampled stands alone: its baseline is that of tokens, a reward's that of responses; {several}"
        )
    return " + ".join(names)


class RewardPart(Section):
    weight: float = setting(
        1.0,
        "A is this times reward less baseline; in A's own unit, so nats at β 1",
        "1: paper; of rule beside dpo or logprob 4: prototype",
        gt=0,
    )
    sign: Literal["both", "positive"] = setting(
        "both",
        "positive: only what is above the baseline counts",
        "both: paper; beside dpo or logprob positive: prototype",
    )
    credit: Literal["response", "first_error"] = setting(
        "response",
        "rule: whose the word is; first_error: of a wrong response tokens before the first wrong one count as right, "
        "those after it not at all, where the task knows it",
        "paper: all tokens of the response",
    )


class Rewards(Section):
    """What each reward of ``feedback`` counts; reward functions with names under their own."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, RewardPart] = Field(init=False)

    rule: RewardPart = setting(RewardPart(), "+1 right, -1 wrong", "see RewardPart")
    function: RewardPart = setting(RewardPart(), "what reward_function gives", "see RewardPart")
    reward_model: RewardPart = setting(RewardPart(), "what reward_classifier gives", "see RewardPart")

    @property
    def parts(self) -> dict[str, RewardPart]:
        return {name: getattr(self, name) for name in REWARDS} | (self.model_extra or {})


class Variant(Section):
    """What the authors' public code does where it departs from the paper. All off."""

    top_k: int | None = setting(None, "only the k likeliest tokens of π_old, A standardised; sparse 1", "5 there", ge=1)
    target: Literal["old", "current"] = setting(
        "old", "lch, mse: current starts z* from the logits of each update instead of π_old's", "current there"
    )
    negative_beta: float | None = setting(None, "sparse: β times this where A ≤ 0", "100 there", ge=LEAST)
    agreement: float | None = setting(None, "logprob: β times 100 where log π_old and log φ exceed this", "-0.02", lt=0)

    @property
    def is_on(self) -> bool:
        return self != Variant()


class Rl(Training):
    objective: Annotated[str, AfterValidator(known_objective)] = setting(
        "kld",
        f"the loss, which brings its own defaults: {', '.join(METHOD_DEFAULTS)}; or FILE.py:NAME",
        "paper eqs 8 to 10; KLD is the steadiest",
    )
    target: str | None = setting(None, "kld, lch, mse: FILE.py:NAME that changes z* (docs/extending.md)", "paper: eq 7")
    settings: dict[str, Any] = setting({}, "of your own objective or target, in its `batch.settings`", "yours")
    beta: float = setting(1.0, "strength of the KL regulariser, in units of the advantage", "paper", ge=LEAST)
    feedback: Annotated[str, AfterValidator(known_feedback)] = setting(
        "dpo",
        "dpo: dense, eq 13; dpo_sampled: that of the sampled token; logprob: dense, eq 12; rule: +1 right, -1 wrong; "
        "function: yours; reward_model: a sequence classifier. Of opd, gkd, minillm φ (dpo, logprob) is the teacher. "
        "Several: `dpo + rule`, one of dpo and logprob for kld, lch, mse, and rewards",
        "paper",
    )
    rewards: Rewards = setting(
        Rewards(), "weight and sign of each reward: {rule: {weight: 4, sign: positive}}", "see RewardPart"
    )
    evaluated: bool = setting(
        True, "rule, sampled pairs: as eval.evaluated", "36 of MATH500's 500 answers can be copied from the question"
    )
    reward_function: str | dict[str, str] | None = setting(
        None, "feedback function: FILE.py:NAME; of several {short: FILE.py:NAME, …}, each a reward by itself", "yours"
    )
    reward_timeout: float = setting(
        60.0, "seconds that a reward function may take for 32 responses; at most a day", "a minute", gt=0, le=86_400
    )
    reward_classifier: str | None = setting(None, "reward_model: hub id or folder of a sequence classifier", "yours")
    baseline: Literal["none", "batch", "group", "leave_one_out"] = setting(
        "batch", "mean taken off: of the phase, of the prompt's responses, of its others", "prototype: none collapses"
    )
    scale_rewards: bool = setting(False, "divide by the deviation of the prompt's rewards", "off: paper; on: GRPO")
    kl_coef: float = setting(0.0, "policy gradients: weight of log π/π_ref, taken off the reward", "paper: none", ge=0)
    clip_low: float = setting(
        0.2, "policy gradients: the ratio's lower clip, 1 less this; dppo: most that π may fall", "TRL 1.16", gt=0, lt=1
    )
    clip_high: float = setting(
        0.2, "policy gradients: the ratio's upper clip, 1 plus this; dppo: most that π may rise", "TRL 1.16", gt=0
    )
    gamma: float = setting(1.0, "ppo: discount per token", "TRL 1.10", gt=0, le=1)
    gae_lambda: float = setting(0.95, "ppo: GAE's λ", "TRL 1.10", ge=0, le=1)
    value_coef: float = setting(0.1, "ppo: weight of the value loss", "TRL 1.10", gt=0)
    value_clip: float = setting(0.2, "ppo: values move at most this far from the old ones", "TRL 1.10", gt=0)
    overlong_buffer: float = setting(0.0, "last share of max_new_tokens: reward loses 1", "off; DAPO 0.2", ge=0, lt=1)
    dynamic_sampling: bool = setting(False, "other prompts for groups without signal, at most 3 times", "off; DAPO on")
    mismatch: Literal["none", "truncate", "mask"] = setting(
        "none",
        "policy gradients: weights w = π_old/π_sampler for an engine of other numerics; truncate: min(w, cap); "
        "mask: w from low to high, else 0",
        "none: paper; truncate: TIS, Yao et al. 2025; mask: IcePop, Ling team 2025",
    )
    mismatch_cap: float = setting(3.0, "mismatch truncate: C, the largest weight", "TRL 1.16", ge=1)
    mismatch_low: float = setting(0.5, "mismatch mask: α, the smallest weight that counts", "IcePop", gt=0, le=1)
    mismatch_high: float = setting(5.0, "mismatch mask: β, the largest weight that counts", "IcePop", ge=1)
    jsd_beta: float = setting(
        0.5, "gkd, opd: β of the divergence; 0: KL(φ ‖ π_θ), 1: KL(π_θ ‖ φ)", "TRL 1.16", ge=0, le=1
    )
    on_policy: float = setting(1.0, "gkd: share answered by the policy, not a demonstration", "GKD 0.5", ge=0, le=1)
    logprob_temperature: Temperature | None = setting(
        None, "policy gradients, minillm: logits are divided by this; null: temperature, 1 if greedy", "TRL 1.16", gt=0
    )
    teacher_mix: float = setting(0.0, "minillm: the teacher's share in what is sampled", "MiniLLM 0.2", ge=0, lt=1)
    variant: Variant = setting(Variant(), "the public code's choices", "see Variant")
    weighting: Literal["mean", "sum", "policy"] = setting(
        "mean", "mse, lch: weights over the vocabulary; policy: by π_old", "mean: paper eqs 8 and 9"
    )
    anchor: float = setting(
        0.0, "λ in z* = (1-λ) z_old + λ z_ref + A/β", "0: paper; 0.5 stops compounding (docs/methods.md)", ge=0, le=1
    )
    standardise: bool = setting(False, "dpo: divide A by its deviation over the vocabulary, per token", "off: paper")
    lr: float = setting(5e-6, "peak learning rate of AdamW; not set with LoRA: 5e-5", f"paper; {WITH_LORA}", gt=0)
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate after warm-up", "paper's public code")
    warmup_steps: int = setting(10, "updates of linear warm-up", "prototype: Adam's first steps are sign-like", ge=0)
    steps: int = setting(4, "rollout phases; π_old and the target are fixed within one", "prototype", ge=1)
    prompts_per_step: int = setting(512, "prompts per phase", "prototype: hundreds; paper's public code: 3,072", ge=1)
    responses_per_prompt: int = setting(1, "responses per prompt", "paper: 1 for LCO", ge=1)
    minibatch: int = setting(64, "responses per update", "prototype", ge=1)
    whole_groups: bool = setting(False, "a prompt's responses in one minibatch and micro-batch", "off: less variance")
    inner_epochs: int = setting(1, "passes over a phase's responses", "paper's public code", ge=1)
    temperature: Temperature = setting(0.6, "of rollouts; 0 is greedy", "paper", ge=0)
    top_p: float = setting(0.95, "of rollouts", "paper", gt=0, le=1)
    max_new_tokens: int | None = setting(None, "longest response, tokens; null: the task's", "the task", ge=1)
    rollout_batch: int = setting(128, "responses generated at once", "fits 12 GB with a 3B policy", ge=1)
    save_every: int = setting(1, "steps between checkpoints", "a phase is minutes of work", ge=1)
    eval_every: int = setting(1, "steps between held-out evaluations; 0: none", "one a phase", ge=0)
    eval_items: int = setting(256, "held-out items of such an evaluation", "std error 0.03", ge=1)
    keep_best: bool = setting(
        True, "keep the best step by held-out score beside the last", "the last is not always best"
    )
    samples: int = setting(
        4, "responses a step that samples.jsonl keeps with A and the likeliest tokens of each", "1 % of a step", ge=0
    )
    guard: Literal["warn", "stop", "off"] = setting(
        "warn", "on a collapse, and where nothing is learned", "stop: exit 4 on a collapse"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        usual = {field: value for field, (value, _) in defaults_of(str(given.get("objective", "kld"))).items()}
        if given.get("feedback") == "dpo_sampled":
            usual.pop("dynamic_sampling", None)  # sums of log-ratios never tie: every group has a signal
            if given.get("baseline") in OF_TOKENS:
                usual.pop("scale_rewards", None)
        names, rewards = feedbacks(str(given.get("feedback", "dpo"))), given.get("rewards", {})
        functions = given.get("reward_function")
        named = [n for n in functions if isinstance(n, str)] if isinstance(functions, dict) else []
        if (names[0] in DENSE or named) and isinstance(rewards, dict):
            parts = [
                n for name in names if name in REWARDS for n in (named if name == "function" and named else [name])
            ]
            start = {n: MIXED.get(n, MIXED["function"]) if names[0] in DENSE else {} for n in parts}
            beside = {n: rewards.get(n, {}) for n in parts}
            usual["rewards"] = rewards | {n: start[n] | own for n, own in beside.items() if isinstance(own, dict)}
            given = {field: value for field, value in given.items() if field != "rewards"}
        return {**usual, **given}

    @property
    def stage(self) -> str:
        """The name of the stage that trains with this objective."""
        return f"rl-{self.objective.rpartition(':')[2]}"

    @property
    def unit(self) -> int:
        """How many responses stay together in a micro-batch."""
        return self.responses_per_prompt if self.whole_groups else 1

    @property
    def is_lco(self) -> bool:
        return self.objective in LCO

    @property
    def has_beta(self) -> bool:
        """Whether the loss has a β: it pulls towards π_old exp(A/β)."""
        return self.is_lco or self.objective in REGRESSIONS

    @property
    def is_own(self) -> bool:
        """Whether the objective is the user's; under dense feedback it is then one over the vocabulary."""
        return self.objective not in METHOD_DEFAULTS

    @property
    def is_policy_gradient(self) -> bool:
        """Whether the loss is one of the sampled tokens' log-probabilities."""
        return self.objective not in LCO + DISTILLATION and not (self.is_own and self.is_dense)

    @property
    def compared_at(self) -> float:
        """What logits are divided by before policies are compared: 1 for losses of the logits themselves."""
        if not self.is_policy_gradient and self.objective != "minillm":
            return 1.0
        return (self.temperature or 1.0) if self.logprob_temperature is None else self.logprob_temperature

    @property
    def dense(self) -> str | None:
        """The part of the feedback that is an advantage for every token of the vocabulary."""
        return next((name for name in feedbacks(self.feedback) if name in DENSE), None)

    @property
    def reward_functions(self) -> dict[str, str]:
        """FILE.py:NAME of each reward function by its reward's name, which is ``function`` where it was given none."""
        given = self.reward_function
        return given if isinstance(given, dict) else {} if given is None else {"function": given}

    @property
    def reward_parts(self) -> dict[str, RewardPart]:
        """The parts of the feedback that are a number a response, and what each counts."""
        rewards, counts = [name for name in feedbacks(self.feedback) if name in REWARDS], self.rewards.parts
        names = [n for name in rewards for n in (self.reward_functions if name == "function" else [name])]
        return {name: counts.get(name, RewardPart()) for name in names}

    @property
    def tells_rewards(self) -> bool:
        """Whether the metrics have each reward by itself: where there are several feedbacks, or names."""
        return "+" in self.feedback or isinstance(self.reward_function, dict)

    @property
    def places_rule(self) -> bool:
        """Whether the rule speaks of tokens: of a wrong response up to the first wrong one."""
        return "rule" in self.reward_parts and self.rewards.rule.credit == "first_error"

    @property
    def is_dense(self) -> bool:
        """Whether the feedback, or a part of it, is an advantage for every token of the vocabulary."""
        return self.dense is not None

    @property
    def is_mixed(self) -> bool:
        return self.is_dense and bool(self.reward_parts)

    @property
    def compares_groups(self) -> bool:
        """Whether a reward counts only by how it differs from those of the other responses to its prompt."""
        grouped = self.baseline in ("group", "leave_one_out") or self.objective in COMPARISONS
        return grouped and bool(self.reward_parts) and not self.is_dense and self.objective != "ppo"

    @property
    def eps(self) -> float:
        """AdamW's ε. One advantage among V, averaged over V, gives gradients of 1e-9, and a step of g / (|g| + ε)."""
        thin = self.objective in ("mse", "lch") and not self.is_dense and self.weighting == "mean"
        return 1e-14 if self.adam_eps is None and thin and not self.variant.top_k else super().eps

    @property
    def needs_reward_model(self) -> bool:
        """Whether the feedback is the φ_DPO that train-rm makes."""
        return self.dense == "dpo" or self.feedback == "dpo_sampled"

    def _wrong(self) -> Iterator[str]:
        name = self.objective
        if self.is_policy_gradient and self.is_dense:
            sparse = "that of sampled tokens: dpo_sampled, rule, function or reward_model"
            yield f"feedback {self.dense} is an advantage over the whole vocabulary, and {name} takes {sparse}"
        if name in DISTILLATION and self.feedback not in DENSE:
            yield f"{name} follows a teacher: feedback dpo (φ_DPO) or logprob, not {self.feedback}"
        if not self.is_lco and (self.weighting != "mean" or self.anchor):
            yield f"weighting and anchor belong to kld, lch and mse, not to {name}"
        if not self.is_policy_gradient and self.kl_coef:
            yield f"kl_coef is for policy gradients: {name} stays near another model by itself"
        if self.mismatch != "none" and (not self.is_policy_gradient or name in REGRESSIONS):
            why = "has a weight of its own" if name == "minillm" else "needs none: its responses only supply states"
            yield f"mismatch corrects policy gradients for another sampler: {name} {why}"
        if self.weighting != "mean" and name == "kld":
            yield f"weighting {self.weighting!r} has no meaning for kld: it is an expectation already (use mse or lch)"
        if self.on_policy < 1 and name != "gkd":
            yield f"on_policy belongs to gkd: {name} learns from the policy's own responses"
        if self.logprob_temperature is not None and (self.is_lco or name in ("opd", "gkd")):
            yield f"logprob_temperature is for policy gradients and minillm: {name} compares logits, not samples"
        if self.teacher_mix and name != "minillm":
            yield f"teacher_mix belongs to minillm: {name} does not correct for another sampler"
        specs = [("reward_function", spec) for spec in self.reward_functions.values()]
        for field, spec in [*specs, ("target", self.target)]:
            if spec is not None and not names_function(spec):
                yield f"{field} {spec!r} is not FILE.py:NAME"
        if self.target is not None and not self.is_lco:
            yield f"target belongs to kld, lch and mse, not to {name}"
        if self.settings and not self.is_own and self.target is None:
            yield f"settings are for an objective or target of your own (FILE.py:NAME): {name} takes none"
        yield from self._wrong_for_the_feedback()
        yield from self._wrong_variant()

    def _wrong_for_the_feedback(self) -> Iterator[str]:
        size = self.responses_per_prompt
        if (phase := self.prompts_per_step * size) > MOST_A_PHASE:
            made = f"prompts_per_step × responses_per_prompt is {phase:,}"
            yield f"{made}; at most {MOST_A_PHASE:,} responses are made in a phase"
        grouped = self.baseline in ("group", "leave_one_out") or self.scale_rewards or self.dynamic_sampling
        if (self.reward_parts or not self.is_dense) and grouped and size < 2:
            yield f"baseline {self.baseline}, scale_rewards, dynamic_sampling need responses_per_prompt of at least 2"
        if self.whole_groups and self.minibatch % size:
            yield f"whole_groups: minibatch {self.minibatch} is not a multiple of responses_per_prompt {size}"
        if self.objective in COMPARISONS and not (self.whole_groups and size > 1):
            yield f"{self.objective} compares a prompt's responses: responses_per_prompt at least 2, whole_groups: true"
        if self.dynamic_sampling and not self.reward_parts:
            yield f"dynamic_sampling looks at rewards of whole responses, and feedback {self.feedback} has none"
        if self.standardise and (not self.is_dense or not self.is_lco):
            yield "standardise needs kld, lch or mse with the dense advantages of feedback dpo or logprob"
        for feedback, field in (("function", "reward_function"), ("reward_model", "reward_classifier")):
            if (feedback in feedbacks(self.feedback)) != (getattr(self, field) is not None):
                yield f"feedback {feedback} and {field} go together"
        named = self.reward_function if isinstance(self.reward_function, dict) else {}
        if isinstance(self.reward_function, dict) and not named:
            yield "reward_function has no function in it: {NAME: FILE.py:FUNCTION}"
        for name in named:
            if name in FEEDBACK:
                yield f"reward_function: {name} is the name of a feedback; give your function another"
            elif not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                yield f"reward_function: {name!r} is no name for a reward: letters, digits and _, no digit first"
        for reward, given in self.rewards.parts.items():
            if reward in self.reward_parts:
                pass
            elif reward not in REWARDS or (named and reward == "function" and given != RewardPart()):
                near = get_close_matches(reward, self.reward_parts, 1)
                hint = f"did you mean {near[0]}?" if near else f"feedback has {', '.join(self.reward_parts) or 'none'}"
                yield f"rewards.{reward}: no reward has this name; {hint}"
            elif given != RewardPart():
                yield f"rewards.{reward} is set, and feedback has no {reward}: {self.feedback} + {reward}"
            if given.sign != "both" and self.objective == "ppo":
                yield f"rewards.{reward}.sign is both for ppo, whose critic learns what is below the baseline too"
            if given.credit != "response" and reward != "rule":
                yield f"rewards.{reward}.credit is response: only rule can tell by the task which token is wrong"
        if self.places_rule:
            yield from self._wrong_for_placed_credit()

    def _idle(self) -> Iterator[str]:
        """Baselines, scales, penalties and choices of the public code that would not act."""
        for field in ("top_k", "negative_beta", "agreement"):
            if self.target is not None and getattr(self.variant, field) is not None:
                yield f"variant.{field} and target both change z*, and target alone would: set one of them"
        if self.objective == "ppo":
            if self.baseline != "none":
                yield f"baseline is none for ppo, whose critic is the baseline, not {self.baseline}"
            if self.scale_rewards:
                yield "scale_rewards is false for ppo, whose advantages are whitened over the phase"
        elif self.is_dense and not self.reward_parts:
            for field, neutral in (("scale_rewards", "false"), ("overlong_buffer", "0")):
                if getattr(self, field):
                    why = f"changes the reward of a whole response, and feedback {self.feedback} has no such reward"
                    yield f"{field} {why}: set {field}: {neutral}"
        elif self.feedback == "dpo_sampled" and self.baseline in OF_TOKENS and self.scale_rewards:
            why = f"a prompt's responses are compared, and baseline {self.baseline} of dpo_sampled is that of tokens"
            yield f"scale_rewards: {why}: set scale_rewards: false, or baseline group or leave_one_out"

    def _wrong_for_placed_credit(self) -> Iterator[str]:
        name, credit = self.objective, "rewards.rule.credit first_error"
        if name in WHOLE:
            yield f"{credit} gives a token its own advantage, and {name} takes one of the whole response"
        elif self.baseline in ("group", "leave_one_out"):
            yield f"{credit} takes baseline batch (of all tokens that count) or none, not {self.baseline}"
        elif self.scale_rewards or self.dynamic_sampling:
            field = "scale_rewards" if self.scale_rewards else "dynamic_sampling"
            yield f"{credit} does not go with {field}, which looks at rewards of whole responses: set {field}: false"

    def _wrong_variant(self) -> Iterator[str]:
        v = self.variant
        if v.is_on and self.is_mixed:
            yield f"variant is of the public code, which takes one feedback, not {self.feedback}"
        if v.is_on and not self.is_lco:
            yield f"variant belongs to kld, lch and mse, not to {self.objective}"
        if v.top_k and (self.anchor or self.weighting != "mean" or self.standardise):
            yield "variant.top_k standardises by itself and sums over its tokens: no anchor, weighting or standardise"
        if v.top_k and not self.is_dense and (v.top_k > 1 or self.objective == "kld"):
            yield "variant.top_k with sparse feedback is 1, the sampled token, and for lch and mse"
        if v.target == "current" and self.objective == "kld":
            yield "variant.target current is for lch and mse"
        if v.negative_beta and self.is_dense:
            yield "variant.negative_beta looks at the sign of a sampled token's advantage: feedback must be sparse"
        if v.agreement and self.feedback != "logprob":
            yield "variant.agreement compares π_old with φ of feedback logprob"
