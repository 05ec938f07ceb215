"""The typed recipe: every setting once, with unit, default and source. Imports no torch.

"paper" is arXiv 2603.00963; "prototype" the settings that were found to learn in this project's first experiments.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lco_lite.recipe.rl import Rl, defaults_of
from lco_lite.recipe.sections import (
    Chat,
    Data,
    Eval,
    Model,
    RewardModel,
    Rollout,
    Section,
    Sft,
    TaskColumns,
    TrainRm,
    Weights,
    known_size,
    setting,
)

RUN_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
UNGRADED = ("alpaca_eval", "qa_feedback")  # tasks that compare or score responses by a model, without right and wrong
# adapters take about ten times the rate of full fine-tuning: TRL's lora_without_regret.md; docs/methods.md
LORA_RATE = 10


def _part(section: Any, name: str, unset: Any = None) -> Any:
    return section.get(name, unset) if isinstance(section, Mapping) else getattr(section, name, unset)


def _has_lora(weights: Any) -> bool:
    return _part(weights, "lora", unset="default") is not None


def adapts(given: Mapping[str, Any]) -> dict[str, bool]:
    """By stage, of a recipe as it is read: whether it trains an adapter. sft of a model from scratch trains all
    weights; ``reward_model: self`` is an adapter where the policy is one."""
    model, own = given.get("model"), given.get("reward_model", "self")
    policy = _has_lora(model)
    return {
        "sft": policy and _part(model, "init") is None,
        "train_rm": policy if own == "self" else _has_lora(own),
        "rl": policy,
    }


def default_rates(given: Mapping[str, Any]) -> dict[str, float]:
    """By stage, its learning rate where none is set: that of full fine-tuning, ``LORA_RATE`` times that for an
    adapter."""
    rates = {name: section.model_fields["lr"].default for name, section in (("sft", Sft), ("train_rm", TrainRm))}
    rl = given.get("rl", {})
    of_objective = defaults_of(str(rl.get("objective", "kld"))) if isinstance(rl, dict) else {}
    rates["rl"] = of_objective["lr"][0] if "lr" in of_objective else Rl.model_fields["lr"].default
    times = {name: LORA_RATE if adapted else 1 for name, adapted in adapts(given).items()}
    # 1e-05, not 9.999999999999999e-06
    return {name: float(f"{times[name] * full:.6g}") for name, full in rates.items()}


class Recipe(Section):
    name: Annotated[str, Field(pattern=f"^{RUN_NAME}$")] = setting("run", "folder in --runs", "yours")
    seed: int = setting(0, "of weights, data order and sampling", "0", ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto",
        "auto: cuda where there is one, else cpu; mps: an Apple GPU, only if named: float32, not tested by us",
        "the machine",
    )
    threads: int | None = setting(None, "CPU threads; null: torch's choice", "the machine", ge=1, le=1024)
    memory_limit: Annotated[str, AfterValidator(known_size)] | None = setting(
        None, "most that is allocated on the GPU, e.g. 11.5GiB; the driver's own share comes on top", "all of it"
    )
    residency: Literal["auto", "phase", "all"] = setting(
        "auto",
        "bases on the GPU: those of the phase, while the others lie in the host's memory; or all. auto: phase on a GPU",
        "the machine",
    )
    trackers: list[Literal["trackio", "wandb", "tensorboard"]] = setting(
        [], "who else is told each step's metrics: trackio, wandb, tensorboard", "none: nothing leaves the run"
    )
    task: str | None = setting(None, "prompts, grader and held-out items; null: your data only", "none")
    model: Model
    reward_model: Literal["self"] | RewardModel = setting(
        "self", "`self`: an adapter on the policy's base", "one base fits small cards"
    )
    chat: Chat = setting(Chat(), "how prompts are written", "see Chat")
    data: Data = setting(Data(), "where rows come from", "see Data")
    sft: Sft = setting(Sft(), "supervised warm-up", "see Sft")
    train_rm: TrainRm = setting(TrainRm(), "the reward model φ_DPO", "see TrainRm")
    rl: Rl = setting(Rl(), "the policy", "see Rl")
    rollout: Rollout = setting(Rollout(), "where responses come from", "see Rollout")
    eval: Eval = setting(Eval(), "the score", "see Eval")

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_the_data_allow(cls, given: Any) -> Any:
        """An objective that starts from a rule starts from the reward model where there are pairs and no rule; gkd
        starts without demonstrations where prompts come from a file, which has none."""
        rl, data = (given.get(key) or {} if isinstance(given, dict) else None for key in ("rl", "data"))
        if not isinstance(rl, dict) or not isinstance(data, dict):
            return given
        usual, allowed = defaults_of(str(rl.get("objective", "kld"))), dict[str, Any]()
        has_pairs, graded = data.get("preferences", "sampled") != "sampled", given.get("task") not in (None, *UNGRADED)
        if usual.get("feedback", ("",))[0] == "rule" and has_pairs and not graded:
            allowed["feedback"] = "dpo_sampled"
        if "on_policy" in usual and data.get("prompts") is not None:
            allowed["on_policy"] = 1.0
        return {**given, "rl": {**allowed, **rl}} if allowed else given

    @model_validator(mode="before")
    @classmethod
    def _rates_of_what_is_trained(cls, given: Any) -> Any:
        """A learning rate that is not set is the stage's default (``default_rates``)."""
        if not isinstance(given, dict):
            return given
        adapted, filled = adapts(given), dict[str, Any]()
        for name, rate in default_rates(given).items():
            stage = given.get(name, {})
            if adapted[name] and isinstance(stage, dict) and "lr" not in stage:
                filled[name] = {**stage, "lr": rate}
        return {**given, **filled}

    @property
    def stages(self) -> list[str]:
        """The stages that the recipe asks for, in order."""
        return ["sft"] * self.sft.enabled + ["rm"] * self.rl.needs_reward_model + [self.rl.stage]

    def _wrong(self) -> Iterator[str]:
        if self.task is None:
            if self.sft.enabled and self.data.demonstrations is None:
                yield "data.demonstrations: needed where task is null (or set sft.enabled: false)"
            if self.data.prompts is None:
                yield "data.prompts: needed where task is null"
        elif self.task.partition(":")[0] != "custom":
            if self.data.held_out is not None:
                yield f"data.held_out: {self.task} holds items of its own out: leave it empty"
            if self.data.columns.task != TaskColumns():
                yield f"data.columns.task: names columns of task custom's file, and the task is {self.task}"
        if self.rl.on_policy < 1 and self.data.prompts is not None:
            share = f"{self.rl.on_policy:g} asks for demonstrations of the other prompts"
            yield f"rl.on_policy: {share}, and those of data.prompts have none: set rl.on_policy: 1"
        if self.task is None or self.task in UNGRADED:
            why = f"{self.task} grades no response right or wrong" if self.task else "task is null"
            if "rule" in self.rl.reward_parts:
                yield f"rl.feedback: rule needs a task that grades, and {why}"
            if self.rl.needs_reward_model and self.data.preferences == "sampled":
                yield f"data.preferences: `sampled` needs a task that grades, and {why}: name a file or hub set"
        mixed = [name for name in (self.task, *self.sft.more_tasks) if name is not None]
        if twice := next((name for name in mixed if mixed.count(name) > 1), None):
            yield f"sft.more_tasks: {twice} is there already; name each other task once"
        if self.model.init is not None and not self.sft.enabled:
            yield "sft.enabled: a model from scratch has learnt nothing yet: it needs sft"
        if self.device == "mps" and (needs_cuda := list(self._only_on_cuda())):
            yield f"device: mps computes in float32, without what is made for CUDA. Change {', '.join(needs_cuda)}"
        if self.rollout.engine == "vllm":
            yield from self._wrong_for_vllm()
        if self.model.train_head and self.rl.variant.is_on:
            yield "rl.variant: needs a frozen head, and model.train_head is true"

    def _only_on_cuda(self) -> Iterator[str]:
        """What is set that an Apple GPU does not do, and to what to change it."""
        sections: dict[str, Weights] = {"model": self.model}
        if isinstance(self.reward_model, RewardModel):
            sections["reward_model"] = self.reward_model
            if self.reward_model.streaming:
                yield "reward_model.streaming to false"
            if (self.reward_model.device or "cpu") != "cpu":
                yield "reward_model.device to null"
        for name, weights in sections.items():
            if weights.quantization != "none":
                yield f"{name}.quantization to none"
            if weights.dtype not in ("auto", "float32"):
                yield f"{name}.dtype to float32"
            if weights.gradient_checkpointing == "offload":
                yield f"{name}.gradient_checkpointing to true"
            if weights.attention == "flash_attention_2":
                yield f"{name}.attention to sdpa"
        for name in ("sft", "train_rm", "rl"):
            if getattr(self, name).optimizer != "adamw":
                yield f"{name}.optimizer to adamw"
        if self.rollout.engine not in ("auto", "hf"):
            yield "rollout.engine to hf"
        if self.residency == "phase":
            yield "residency to all"
        if self.memory_limit is not None:
            yield "memory_limit to null"

    def _wrong_for_vllm(self) -> Iterator[str]:
        if self.model.lora is None:
            yield "rollout.engine: vllm samples from an adapter on a base that stands still, and model.lora is null"
        if self.model.quantization == "int8":
            yield "rollout.engine: vllm does not quantise to int8 (bitsandbytes) as it loads: take nf4, none, or paged"
        for name in ("rl", "train_rm", "eval"):
            if (temperature := getattr(self, name).temperature) > 2:
                yield f"rollout.engine: vllm takes temperatures up to 2, and {name}.temperature is {temperature:g}"
