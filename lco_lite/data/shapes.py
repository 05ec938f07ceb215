"""One row to a demonstration, preference pairs or a prompt, whatever of the common shapes it has.

=================  ==============================================================================================
demonstrations     ``prompt`` + ``completion`` | ``response`` | ``output``; ``instruction`` (+ ``input``) + ``output``;
                   ``messages`` ending with an assistant turn; sharegpt ``conversations``; preferences: their ``chosen``
preferences        ``chosen`` + ``rejected``, with ``prompt`` | ``question`` | ``instruction`` or ``conversations``;
                   chosen and rejected are text, one message, whole conversations that share the prompt, or transcripts
                   as HH-RLHF has them; FG-RLHF's ``question``, ``passages``, ``prediction 1…``, ``preference``
prompts            ``prompt`` | ``question`` | ``problem`` | ``instruction``; ``messages`` or ``conversations``
=================  ==============================================================================================

A row's own system message stands in its turns or in ``system``, and goes before the recipe's. What a row lacks is a
DataError that begins with ``at``, its file and line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

from lco_lite.errors import DataError
from lco_lite.models.chat import Message, conversation
from lco_lite.tasks.qa_feedback import qa_prompt

PROMPTS = ("prompt", "question", "problem", "instruction")
RESPONSES = ("completion", "response", "output")
CONVERSATIONS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Demonstration:
    messages: Sequence[Message]
    response: str


@dataclass(frozen=True)
class Preference:
    messages: Sequence[Message]
    chosen: str
    rejected: str


def demonstration(row: Row, system: str | None, at: str) -> Demonstration:
    for key in RESPONSES:
        if key in row:
            return Demonstration(prompt(row, system, at), _response(row[key], f"{at}, field {key}"))
    if "chosen" in row:
        pair = _pair(row, system, at)
        return Demonstration(pair.messages, pair.chosen)
    turns = _turns(row, at)
    if turns is None:
        raise DataError(
            f"{at}: no response: one of {', '.join(RESPONSES)}, chosen or messages is needed, found {_keys(row)}"
        )
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"{at}: a demonstration ends with an assistant turn after a user's, found roles {roles}")
    return Demonstration(_with_system(turns[:-1], row, system, at), turns[-1]["content"])


def preferences(row: Row, system: str | None, at: str) -> list[Preference]:
    """The pairs of one row: one, or one a comparison where a row compares several answers."""
    if "preference" in row and "prediction 1" in row:
        return _compared(row, system, at)
    return [_pair(row, system, at)]


def _pair(row: Row, system: str | None, at: str) -> Preference:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(f"{at}: field {key} is missing, found {_keys(row)}")
    if is_transcript(row["chosen"]):
        return _of_transcripts(row, system, at)
    chosen = _response(row["chosen"], f"{at}, field chosen")
    rejected = _response(row["rejected"], f"{at}, field rejected")
    if any(row.get(key) for key in (*PROMPTS, *CONVERSATIONS)):
        return Preference(prompt(row, system, at), chosen, rejected)
    if isinstance(row["chosen"], list) and len(row["chosen"]) > 1:
        shared = _as_turns(row["chosen"][:-1], f"{at}, field chosen")
        return Preference(_with_system(shared, row, system, at), chosen, rejected)
    raise DataError(f"{at}: no prompt: one of {', '.join(PROMPTS)}, conversations, or whole conversations in chosen")


def prompt(row: Row, system: str | None, at: str) -> list[Message]:
    """The conversation up to the response."""
    turns = _turns(row, at)
    if turns is not None:
        return _with_system(turns[:-1] if turns[-1]["role"] == "assistant" else turns, row, system, at)
    for key in PROMPTS:
        value = row.get(key)
        if isinstance(value, list):
            return _with_system(_as_turns(value, f"{at}, field {key}"), row, system, at)
        if isinstance(value, str) and value.strip():
            more = row.get("input") if key == "instruction" else None
            text = f"{value}\n\n{more}" if more else value
            return _with_system(list(conversation(text)), row, system, at)
    raise DataError(f"{at}: no prompt: one of {', '.join(PROMPTS)} or messages is needed, found {_keys(row)}")


def _of_transcripts(row: Row, system: str | None, at: str) -> Preference:
    if not is_transcript(row["rejected"]):
        raise DataError(f"{at}, field rejected: a transcript is needed, as chosen is, found {row['rejected']!r:.80}")
    try:
        shared, chosen, rejected = parted(transcript(row["chosen"]), transcript(row["rejected"]))
    except ValueError as e:
        raise DataError(f"{at}: {e}") from e
    return Preference(_with_system(shared, row, system, at), chosen, rejected)


def _compared(row: Row, system: str | None, at: str) -> list[Preference]:
    """FG-RLHF: ``preference`` has, for each two of the predictions, 1 or 2 for the better one and 0 for neither."""
    names = sorted((key for key in row if key.startswith("prediction ")), key=lambda key: (len(key), key))
    answers = [_response(row[name], f"{at}, field {name}") for name in names]
    labels, pairs = row["preference"], list(combinations(answers, 2))
    if not isinstance(labels, list) or len(labels) != len(pairs) or any(label not in (0, 1, 2) for label in labels):
        raise DataError(
            f"{at}, field preference: {len(pairs)} labels, 0, 1 or 2, are needed for {len(names)} predictions, "
            f"found {labels!r:.80}"
        )
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{at}, field question: a text is needed, found {question!r:.80}")
    try:
        messages = _with_system(list(conversation(qa_prompt(question, row.get("passages") or []))), row, system, at)
    except ValueError as e:
        raise DataError(f"{at}: {e}") from e
    judged = zip(pairs, labels, strict=True)
    return [Preference(messages, *(pair if label == 1 else pair[::-1])) for pair, label in judged if label]


def _response(value: Any, at: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    turns = _as_turns([value] if isinstance(value, Mapping) else value, at)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{at}: ends with a turn of {turns[-1]['role']}; the assistant's is needed")
    return turns[-1]["content"]


def _turns(row: Row, at: str) -> list[Message] | None:
    for key in CONVERSATIONS:
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


def _with_system(turns: list[Message], row: Row, system: str | None, at: str) -> list[Message]:
    own = row.get("system")
    if own is not None and not isinstance(own, str):
        raise DataError(f"{at}, field system: a text is needed, found {own!r:.80}")
    text = own or system
    return [{"role": "system", "content": text}, *turns] if text and turns[0]["role"] != "system" else turns


def _keys(row: Row) -> str:
    return ", ".join(row) or "no fields"


_SPEAKER = re.compile(r"\n\n(Human|Assistant):[ \t]?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    return isinstance(value, str) and _SPEAKER.match(value) is not None


def transcript(text: str) -> list[Message]:
    """Its turns. Of several in a row by one speaker the texts are joined; a turn may be empty."""
    parts = _SPEAKER.split(text)[1:]
    turns: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = _SPEAKERS[speaker], said.strip()
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
