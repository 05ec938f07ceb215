"""The recipe's data: where rows come from and how prompts are written."""

from __future__ import annotations

from typing import Any

from lco_lite.recipe.section import Section, setting


class Chat(Section):
    system: str | None = setting(None, "system message; null: the task's own", "the task")
    template_args: dict[str, Any] = setting(
        {}, "arguments for the chat template, e.g. {enable_thinking: false}", "none"
    )


class Columns(Section):
    """What a file's columns are called where they have other names."""

    prompt: str | None = setting(None, "column of the prompt: text or turns", "the usual names")
    system: str | None = setting(None, "column of the system message", "system")


class DemonstrationColumns(Columns):
    response: str | None = setting(None, "column of the response", "the usual names")
    messages: str | None = setting(None, "column of whole conversations", "the usual names")


class PreferenceColumns(Columns):
    chosen: str | None = setting(None, "column of the better response", "chosen")
    rejected: str | None = setting(None, "column of the worse response", "rejected")


class PromptColumns(Columns):
    messages: str | None = setting(None, "column of whole conversations", "the usual names")


class AllColumns(Section):
    demonstrations: DemonstrationColumns = setting(DemonstrationColumns(), "names in data.demonstrations", "usual ones")
    preferences: PreferenceColumns = setting(PreferenceColumns(), "names in data.preferences", "usual ones")
    prompts: PromptColumns = setting(PromptColumns(), "names in data.prompts", "usual ones")


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
    columns: AllColumns = setting(AllColumns(), "columns of the files above that have other names", "the usual names")
    allow_overlap: list[str] = setting(
        [],
        "TASK: its items may have near twins among the training prompts; TASK:same: they may be trained on themselves",
        "none: such a score says little",
    )
