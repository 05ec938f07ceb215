"""Conversations written as one text, as HH-RLHF has them: ``\\n\\nHuman: … \\n\\nAssistant: …``."""

from __future__ import annotations

import re
from typing import Any

from lco_lite.data.chat import Message

_SPEAKER = re.compile(r"\n\n(Human|Assistant):[ \t]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    return isinstance(value, str) and _SPEAKER.match(value) is not None


def transcript(text: str) -> list[Message]:
    """Its turns. Of several in a row by one speaker the texts are joined; a turn may be empty."""
    parts = _SPEAKER.split(text)[1:]
    turns: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = _ROLES[speaker], said.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said}".strip()
        else:
            turns.append({"role": role, "content": said})
    return list(turns)


def parted(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """(prompt, chosen response, rejected response): what both share, and the two turns in which they first differ.

    Two that are the same part at their last turn. Raises ValueError where that is no turn of the assistant after one
    of the user.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0 or chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise ValueError("chosen and rejected part where the assistant does not answer the user")
    return chosen[:shared], chosen[shared]["content"], rejected[shared]["content"]
