"""The typed recipe: every setting once, with unit, default and source.

``sections`` and ``rl`` hold the settings, ``file`` reads and writes them; here they come together, and what makes sense
only across sections is checked. Imports no torch.

"paper" is arXiv 2603.00963; "prototype" the settings that were found to learn in this project's first experiments.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lco_lite.recipe.rl import Rl
from lco_lite.recipe.sections import Chat, Data, Eval, Model, RewardModel, Section, Sft, TrainRm, setting

UNGRADED = ("alpaca_eval", "qa_feedback")  # tasks that compare or score responses by a model, without right and wrong


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = setting(
        "run", "the run's folder under --runs", "the recipe's"
    )
    seed: int = setting(0, "of weights, data order and sampling", "0", ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one", "the machine")
    threads: int | None = setting(None, "CPU threads; null: torch's choice", "the machine", ge=1)
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
    eval: Eval = setting(Eval(), "the score", "see Eval")

    @property
    def stages(self) -> list[str]:
        """The stages that the recipe asks for, in order."""
        sft, rm = ["sft"] * self.sft.enabled, ["rm"] * self.rl.needs_reward_model
        return [*sft, *rm, self.rl.stage]

    def _wrong(self) -> Iterator[str]:
        yield from self._wrong_for_the_task()
        yield from self._wrong_for_the_model()

    def _wrong_for_the_task(self) -> Iterator[str]:
        sampled_pairs = self.rl.needs_reward_model and self.data.preferences == "sampled"
        if self.task is None:
            if self.sft.enabled and self.data.demonstrations is None:
                yield "data.demonstrations: needed where task is null (or set sft.enabled: false)"
            if self.data.prompts is None:
                yield "data.prompts: needed where task is null"
            if sampled_pairs:
                yield "data.preferences: `sampled` pairs are graded by a task, and task is null: name a file or hub set"
            if self.rl.feedback == "rule":
                yield "rl.feedback: rule asks a task's grader, and task is null"
        elif self.task in UNGRADED:
            if self.rl.feedback == "rule":
                yield f"rl.feedback: {self.task} grades no response right or wrong, and rule needs that"
            if sampled_pairs:
                yield (
                    f"data.preferences: {self.task} grades no response right or wrong, and `sampled` pairs need that: "
                    "name a file or hub set"
                )

    def _wrong_for_the_model(self) -> Iterator[str]:
        if self.model.init is not None and not self.sft.enabled:
            yield "sft.enabled: a model from scratch has learnt nothing yet: it needs sft"
        if self.model.train_head and self.rl.variant.is_on:
            yield "rl.variant: needs a frozen head, and model.train_head is true"
        shares_base = self.reward_model == "self" and self.rl.needs_reward_model
        if shares_base and self.model.lora is None and self.model.quantization != "none":
            yield "reward_model: self with lora: null needs unquantized weights"
