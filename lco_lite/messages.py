"""What is a conversation? Turns, as the stages have them and as data rows write them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lco_lite.errors import DataError

Message = Mapping[str, str]
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def conversation(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """One user turn, after a system message where there is one."""
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]


def turns_of(value: Any, at: str) -> list[Message]:
    """A data row's list of turns, as OpenAI or sharegpt write them. Raises DataError, which begins with ``at``."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{at}: text or a list of turns is needed, found {value!r:.80}")
    turns: list[Message] = []
    for turn in value:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str):
            raise DataError(f"{at}: a turn is {{role: user | assistant | system, content: text}}, found {turn!r:.80}")
        turns.append({"role": _ROLES[role], "content": content})
    return turns
