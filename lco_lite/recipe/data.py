"""The recipe's data: where rows come from and how prompts are written."""

from __future__ import annotations

from typing import Any

from lco_lite.recipe.section import Section, setting


class Chat(Section):
    system: str | None = setting(None, "system message; null: the task's own", "the task")
    template_args: dict[str, Any] = setting(
        {}, "arguments for the chat template, e.g. {enable_thinking: false}", "none"
    )


class Data(Section):
    """Each is a file (.jsonl, .json, .parquet, .csv) or ``hub-id[:split]``; null takes the task's training items."""

    demonstrations: str | None = setting(
        None, "prompts with responses to imitate, for sft", "the task's demonstrations"
    )
    preferences: str = setting(
        "sampled",
        "prompt/chosen/rejected for train-rm; `sampled`: made from the policy's own responses",
        "paper: sampled and graded",
    )
    prompts: str | None = setting(None, "prompts for rl", "the task's training items")
    task: str | None = setting(None, "file with the task's items instead of its hub set", "the task's own")
