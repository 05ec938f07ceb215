"""Rows of a file or hub set to demonstrations, preference pairs and prompts, whatever of the common shapes they have.

=================  ==============================================================================================
demonstrations     ``prompt`` + ``completion`` | ``response`` | ``output``; ``instruction`` (+ ``input``) + ``output``;
                   ``messages`` ending with an assistant turn; sharegpt ``conversations``
preferences        ``chosen`` + ``rejected``, with ``prompt`` | ``question`` | ``instruction`` or ``conversations``;
                   chosen and rejected are text, one message, or whole conversations that share the prompt
prompts            ``prompt`` | ``question`` | ``problem`` | ``instruction``; ``messages`` or ``conversations``
=================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lco_lite.data.chat import Message, conversation
from lco_lite.data.jsonl import read_jsonl
from lco_lite.errors import DataError

FILE_KINDS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_PROMPTS = ("prompt", "question", "problem", "instruction")
_RESPONSES = ("completion", "response", "output")


@dataclass(frozen=True)
class Demonstration:
    messages: list[Message]
    response: str


@dataclass(frozen=True)
class Preference:
    messages: list[Message]
    chosen: str
    rejected: str


def load_rows(source: str) -> list[dict[str, Any]]:
    """All rows of a local file, or of a hub set ``id[:split]`` (split ``train`` unless named). Raises DataError."""
    path = Path(source)
    kind = FILE_KINDS.get(path.suffix.lower())
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file ({', '.join(FILE_KINDS)}) or a hub set")
    if kind == "jsonl":
        return read_jsonl(path)
    if kind and not path.is_file():
        raise DataError(f"{path}: no such file")
    import datasets

    try:
        if kind:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            name, _, split = source.partition(":")
            rows = datasets.load_dataset(name, split=split or "train")
    except Exception as e:  # datasets raises many kinds, all of them meaning: not to be had
        raise DataError(
            f"{source}: cannot be loaded as {'a ' + kind + ' file' if kind else 'a hub set'}: {_first_line(e)}"
        ) from e
    if not len(rows):
        raise DataError(f"{source}: has no rows")
    return list(rows)


def demonstrations(source: str, system: str | None = None) -> list[Demonstration]:
    return [_demonstration(row, system, _at(source, i)) for i, row in enumerate(load_rows(source))]


def preferences(source: str, system: str | None = None) -> list[Preference]:
    return [_preference(row, system, _at(source, i)) for i, row in enumerate(load_rows(source))]


def prompts(source: str, system: str | None = None) -> list[list[Message]]:
    return [_prompt(row, system, _at(source, i)) for i, row in enumerate(load_rows(source))]


def _demonstration(row: Mapping[str, Any], system: str | None, at: str) -> Demonstration:
    turns = _turns(row, at)
    if turns is not None:
        if turns[-1]["role"] != "assistant" or len(turns) < 2:
            raise DataError(
                f"{at}: a demonstration ends with an assistant turn after a user's, found roles {_roles(turns)}"
            )
        return Demonstration(_with_system(turns[:-1], system), turns[-1]["content"])
    for key in _RESPONSES:
        if key in row:
            return Demonstration(_prompt(row, system, at), _response(row[key], f"{at}, field {key}"))
    raise DataError(f"{at}: no response: one of {', '.join(_RESPONSES)} or messages is needed, found {_keys(row)}")


def _preference(row: Mapping[str, Any], system: str | None, at: str) -> Preference:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(f"{at}: field {key} is missing, found {_keys(row)}")
    chosen = _response(row["chosen"], f"{at}, field chosen")
    rejected = _response(row["rejected"], f"{at}, field rejected")
    if any(row.get(key) for key in (*_PROMPTS, "messages", "conversations")):
        messages = _prompt(row, system, at)
    elif isinstance(row["chosen"], list) and len(row["chosen"]) > 1:
        messages = _with_system(_as_turns(row["chosen"][:-1], f"{at}, field chosen"), system)
    else:
        raise DataError(
            f"{at}: no prompt: one of {', '.join(_PROMPTS)}, conversations, or whole conversations in chosen"
        )
    return Preference(messages, chosen, rejected)


def _prompt(row: Mapping[str, Any], system: str | None, at: str) -> list[Message]:
    turns = _turns(row, at)
    if turns is not None:
        return _with_system(turns[:-1] if turns[-1]["role"] == "assistant" else turns, system)
    for key in _PROMPTS:
        value = row.get(key)
        if isinstance(value, list):
            return _with_system(_as_turns(value, f"{at}, field {key}"), system)
        if isinstance(value, str) and value.strip():
            more = row.get("input") if key == "instruction" else None
            return list(conversation(f"{value}\n\n{more}" if more else value, system))
    raise DataError(f"{at}: no prompt: one of {', '.join(_PROMPTS)} or messages is needed, found {_keys(row)}")


def _response(value: Any, at: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    turns = _as_turns([value] if isinstance(value, Mapping) else value, at)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{at}: ends with a turn of {turns[-1]['role']}; the assistant's is needed")
    return turns[-1]["content"]


def _turns(row: Mapping[str, Any], at: str) -> list[Message] | None:
    for key in ("messages", "conversations"):
        if row.get(key):
            return _as_turns(row[key], f"{at}, field {key}")
    return None


def _as_turns(value: Any, at: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{at}: text or a list of turns is needed, found {value!r:.80}")
    turns: list[Message] = []
    for turn in value:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(f"{at}: a turn is {{role: user | assistant | system, content: text}}, found {turn!r:.80}")
        turns.append({"role": _ROLES[role], "content": content})
    return turns


def _with_system(turns: list[Message], system: str | None) -> list[Message]:
    if system and turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    return turns


def _at(source: str, i: int) -> str:
    return f"{source}, {'line' if source.endswith('.jsonl') else 'row'} {i + 1}"


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(row) or "no fields"


def _roles(turns: Sequence[Message]) -> str:
    return ", ".join(t["role"] for t in turns)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
