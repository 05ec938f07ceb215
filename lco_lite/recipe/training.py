"""The recipe's supervised stages, ``sft`` and ``train-rm``, and what they share with ``rl``."""

from __future__ import annotations

from typing import Literal

from lco_lite.recipe.section import Section, setting


class Training(Section):
    """What every training stage shares."""

    lr: float = setting(2e-5, "peak learning rate of AdamW", "TRL 1.16 SFT", gt=0)
    schedule: Literal["constant", "cosine"] = setting("cosine", "learning rate after warm-up", "common practice")
    warmup_steps: int = setting(0, "updates of linear warm-up", "TRL", ge=0)
    adam_betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's betas", "TRL")
    weight_decay: float = setting(0.0, "AdamW's decoupled decay", "TRL", ge=0)
    max_grad_norm: float | None = setting(
        1.0, "clip the gradient's 2-norm here; null: never. Logged before clipping", "TRL", gt=0
    )
    micro_batch_tokens: int = setting(
        8192,
        "padded tokens in one forward pass; smaller needs less memory and gives the same gradient",
        "fits 12 GB with a 3B policy",
        ge=16,
    )
    max_length: int = setting(2048, "prompt and response, tokens; longer ones are skipped and counted", "paper", ge=8)
    save_every: int = setting(50, "updates between checkpoints (in rl: steps)", "minutes of work at risk", ge=1)


class Sft(Training):
    enabled: bool = setting(True, "false: RL starts from the base as it is", "paper: SFT warm-up")
    examples: int | None = setting(1000, "demonstrations used; null: all", "paper", ge=1)
    epochs: float = setting(1.0, "passes over the examples", "paper", gt=0)
    max_steps: int | None = setting(None, "updates; overrides epochs", "none", ge=1)
    batch_size: int = setting(16, "responses an update", "common practice", ge=1)


class TrainRm(Training):
    lr: float = setting(1e-6, "peak learning rate of AdamW", "paper", gt=0)
    epochs: float = setting(1.0, "passes over the pairs", "paper", gt=0)
    max_steps: int | None = setting(None, "updates; overrides epochs", "none", ge=1)
    batch_size: int = setting(16, "pairs an update", "common practice", ge=1)
    beta: float = setting(0.1, "DPO's beta", "paper", gt=0)
    sft_weight: float = setting(
        0.0, "weight of the chosen responses' mean token likelihood beside DPO", "0: plain DPO (paper)", ge=0
    )
    prompts: int | None = setting(None, "sampled pairs: prompts to sample for; null: all that sft left", "all", ge=1)
    samples_per_prompt: int = setting(4, "sampled pairs: responses a prompt", "two of four differ often enough", ge=2)
    pairs_per_prompt: int = setting(1, "sampled pairs: at most so many a prompt", "every prompt counts alike", ge=1)
    temperature: float = setting(1.0, "sampled pairs: temperature", "1: varied mistakes", gt=0)
    top_p: float = setting(1.0, "sampled pairs: nucleus", "1: varied mistakes", gt=0, le=1)
    demonstrations_as_chosen: bool = setting(
        False,
        "sampled pairs: where no sample is right, take the item's demonstration as chosen",
        "off: on-policy pairs",
    )
    cut_rejected: bool = setting(
        True,
        "cut a rejected response after its first wrong token, where the task knows it",
        "prototype: this decides what φ_DPO teaches",
    )
    held_out: float = setting(0.05, "share of pairs kept for measuring accuracy", "common practice", ge=0, lt=1)
    check_items: int = setting(
        200, "held-out items on which φ_DPO is scored as a policy; 0: no check", "std error 0.035", ge=0
    )
