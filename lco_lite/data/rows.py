"""Rows of a file or a hub set become demonstrations, preference pairs or prompts, whichever common shape they have.

=================  ==============================================================================================
demonstrations     ``prompt`` + ``completion`` | ``response`` | ``output``; ``instruction`` (+ ``input``) + ``output``;
                   ``messages`` ending with an assistant turn; sharegpt ``conversations``; preferences: their ``chosen``
preferences        ``chosen`` + ``rejected``, with ``prompt`` | ``question`` | ``instruction`` or ``conversations``;
                   chosen and rejected are text, one message, whole conversations that differ in the last turn alone,
                   or transcripts as HH-RLHF has them; FG-RLHF's ``question``, ``passages``, ``prediction 1…``,
                   ``preference``
prompts            ``prompt`` | ``question`` | ``problem`` | ``instruction``; ``messages`` or ``conversations``; that
                   of preferences
=================  ==============================================================================================

What a row lacks is a DataError that begins with ``at``, its file and line.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, takewhile
from typing import Any, TypeAlias, TypeVar

from lco_lite.errors import DataError
from lco_lite.messages import Message, conversation, turns_of
from lco_lite.recipe.sections import Columns
from lco_lite.tables import load_rows, named_columns, names_in
from lco_lite.tasks.base import Item, normalised
from lco_lite.tasks.qa_feedback import qa_prompt

PROMPTS = ("prompt", "question", "problem", "instruction")
RESPONSES = ("completion", "response", "output")
CONVERSATIONS = ("messages", "conversations")

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


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the response; ``item`` where a task can grade the response; the data row it came from."""

    messages: Sequence[Message]
    item: Item | None = None
    row: Row = field(default_factory=dict)


Made = TypeVar("Made", Demonstration, Preference, Prompt)


def read_demonstrations(source: str, system: str | None = None, columns: Columns | None = None) -> list[Demonstration]:
    named = columns is not None and columns.model_dump(exclude_none=True)
    whole = (*RESPONSES, "chosen", "rejected") if named and "messages" in named and "response" not in named else ()

    def made(row: Row, at: str) -> list[Demonstration]:
        """Of conversations that the recipe names nothing else is trained on."""
        return [_demonstration({key: value for key, value in row.items() if key not in whole}, at)]

    return _read(source, system, columns, made)


def read_preferences(source: str, system: str | None = None, columns: Columns | None = None) -> list[Preference]:
    """The pairs of all rows. Raises DataError where there is none."""
    pairs = _read(source, system, columns, _preferences)
    if not pairs:
        raise DataError(f"{source}: has no pairs: in no row is one answer better than another")
    return pairs


def read_prompts(source: str, system: str | None = None, columns: Columns | None = None) -> list[Prompt]:
    return _read(source, system, columns, lambda row, at: [_prompt(row, at)])


def _read(
    source: str, system: str | None, columns: Columns | None, make: Callable[[Row, str], list[Made]]
) -> list[Made]:
    renamed = {} if columns is None else columns.model_dump(exclude_none=True)
    place = "line" if source.endswith(".jsonl") else "row"
    made: list[Made] = []
    for i, row in enumerate(load_rows(source), 1):
        at = f"{source}, {place} {i}"
        row = _with_our_names(row, renamed, at)
        made += [replace(one, messages=_with_system(one.messages, row, system, at)) for one in make(row, at)]
    return made


def _with_our_names(row: dict[str, Any], renamed: dict[str, str], at: str) -> dict[str, Any]:
    """The row with the columns that the recipe names (our name -> theirs) in place of those that would be used."""
    named = named_columns(row, renamed, at)
    hidden: tuple[str, ...] = RESPONSES if "response" in renamed else ()
    if "messages" in renamed or "prompt" in renamed:
        hidden += CONVERSATIONS
    kept = {name: value for name, value in row.items() if name not in hidden}
    return kept | named


def _demonstration(row: Row, at: str) -> Demonstration:
    for key in RESPONSES:
        if key in row:
            response = _response(row[key], f"{at}, field {key}")
            before = turns_of(row[key], at)[:-1] if isinstance(row[key], list) else []
            return Demonstration(_joined(_prompt(row, at).messages, before, at), response)
    if "chosen" in row:
        preference = _preference(row, at)
        return Demonstration(preference.messages, preference.chosen)
    turns = _conversation(row, at)
    if turns is None:
        raise DataError(f"{at}: no response: one of {', '.join(RESPONSES)}, chosen, messages is needed, {_found(row)}")
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"{at}: a demonstration ends with an assistant turn after a user's, found roles {roles}")
    return Demonstration(turns[:-1], turns[-1]["content"])


def _prompt(row: Row, at: str) -> Prompt:
    """The conversation up to the response; answers that the row ends with are left out."""
    turns = _conversation(row, at)
    if turns is not None:
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise DataError(f"{at}: a prompt ends with a user's turn, found the assistant's alone")
        return Prompt(turns, row=row)
    for key in PROMPTS:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            more = row.get("input") if key == "instruction" else None
            if more is not None and not isinstance(more, str):
                raise DataError(f"{at}, field input: a text is needed, found {more!r:.80}")
            return Prompt(conversation(f"{value}\n\n{more}" if more else value), row=row)
    if "chosen" in row and "rejected" in row and not any(row.get(key) for key in PROMPTS):
        return Prompt(_preference(row, at).messages, row=row)
    raise DataError(f"{at}: no prompt: one of {', '.join(PROMPTS)} or messages is needed, {_found(row)}")


def _with_system(messages: Sequence[Message], row: Row, system: str | None, at: str) -> Sequence[Message]:
    """``messages`` after a system message: their own, else the row's field ``system``, else ``system``."""
    own = row.get("system")
    if own is not None and not isinstance(own, str):
        raise DataError(f"{at}, field system: a text is needed, found {own!r:.80}")
    text = own or system
    return [{"role": "system", "content": text}, *messages] if text and messages[0]["role"] != "system" else messages


def _preference(row: Row, at: str) -> Preference:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(f"{at}: field {key} is missing, {_found(row)}")
    if spoken := _spoken(row["chosen"]):
        if worse := _spoken(row["rejected"]):
            return _of_transcripts(spoken, worse, at)
        raise DataError(f"{at}, field rejected: a transcript is needed, as chosen is, found {row['rejected']!r:.80}")
    chosen = _response(row["chosen"], f"{at}, field chosen")
    rejected = _response(row["rejected"], f"{at}, field rejected")
    shared = _shared_turns(row, at)
    if any(row.get(key) for key in (*PROMPTS, *CONVERSATIONS)):
        return Preference(_joined(_prompt(row, at).messages, shared, at), chosen, rejected)
    if shared:
        return Preference(shared, chosen, rejected)
    raise DataError(f"{at}: no prompt: one of {', '.join(PROMPTS)}, conversations, or whole conversations in chosen")


def _shared_turns(row: Row, at: str) -> list[Message]:
    """What chosen and rejected have before their last turns, where they are conversations. Raises DataError where they
    part earlier: which turn is the better one is then unknown, and users' turns are not to be learned."""
    both = [turns_of(row[key], at) for key in ("chosen", "rejected") if isinstance(row[key], list)]
    if both and any(turns[:-1] != both[0][:-1] for turns in both):
        chosen, rejected = both
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
        raise DataError(
            f"{at}: chosen and rejected are to differ in the last turn alone, an answer each to the same conversation; "
            f"found {len(chosen)} and {len(rejected)} turns, of which the first {same} are the same"
        )
    return both[0][:-1] if both else []


def _joined(prompt: Sequence[Message], shared: Sequence[Message], at: str) -> list[Message]:
    """One conversation of a row's prompt and what chosen and rejected share: the longer of the two, after the prompt's
    system message or else theirs. Raises DataError where turns would be lost. A question worded in two ways is the
    prompt's."""
    (system, asked), (theirs, shared) = _system_apart(prompt), _system_apart(shared)
    system = system or theirs
    if shared and shared[0]["role"] == "assistant":  # the turns after the prompt alone
        return [*system, *asked, *shared]
    if len(shared) <= 1 or _within(shared, asked):
        return [*system, *(asked or shared)]
    if _within(asked, shared):
        return [*system, *shared]
    raise DataError(
        f"{at}: the prompt is to stand among the turns that chosen and rejected begin with, or to hold them; found "
        f"{len(asked)} turns up to {asked[-1]['content']!r:.60}, and {len(shared)} up to {shared[-1]['content']!r:.60}"
    )


def _system_apart(turns: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    lead = list(takewhile(lambda turn: turn["role"] == "system", turns))
    return lead, list(turns[len(lead) :])


def _within(some: Sequence[Message], turns: Sequence[Message]) -> bool:
    """Whether ``turns`` hold ``some`` in a row, but for case and spacing."""
    part, whole = ([(turn["role"], normalised(turn["content"])) for turn in one] for one in (some, turns))
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def _preferences(row: Row, at: str) -> list[Preference]:
    """The pairs of one row. FG-RLHF has several: ``preference`` has, for each two of the predictions, 1 or 2 for the
    better one and 0 for neither."""
    if "preference" not in row or "prediction 1" not in row:
        return [_preference(row, at)]
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
        passages = row.get("passages") or []
        if not isinstance(passages, list):
            raise ValueError(f"field passages is {passages!r:.60}, not a list")
        messages = conversation(qa_prompt(question, passages))
    except ValueError as e:
        raise DataError(f"{at}: {e}") from e
    compared = zip(pairs, labels, strict=True)
    return [Preference(messages, *(pair if label == 1 else pair[::-1])) for pair, label in compared if label]


def _response(value: Any, at: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    turns = turns_of([value] if isinstance(value, Mapping) else value, at)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{at}: ends with a turn of {turns[-1]['role']}; the assistant's is needed")
    return turns[-1]["content"]


def _conversation(row: Row, at: str) -> list[Message] | None:
    """The turns of the first field that has some, a prompt's too."""
    fields = [key for key in CONVERSATIONS if row.get(key)]
    fields += [key for key in PROMPTS if isinstance(row.get(key), list)]
    return turns_of(row[fields[0]], f"{at}, field {fields[0]}") if fields else None


def _found(row: Row) -> str:
    return f"found {names_in(row)}"


# HH-RLHF: the whole conversation in one text, "\n\nHuman: … \n\nAssistant: …"

_SPEAKER = re.compile(r"\n\n(Human|Assistant):[ \t]?")


def _of_transcripts(chosen: list[Message], rejected: list[Message], at: str) -> Preference:
    """The prompt is what both share; the responses are the turns in which they first differ, or the last."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0 or chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise DataError(f"{at}: chosen and rejected part where the assistant does not answer the user")
    return Preference(chosen[:shared], chosen[shared]["content"], rejected[shared]["content"])


def _spoken(value: Any) -> list[Message]:
    """A transcript's turns, which may be empty, those in a row by one speaker joined; of anything else none."""
    parts = _SPEAKER.split(value)[1:] if isinstance(value, str) and _SPEAKER.match(value) else []
    turns: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = "user" if speaker == "Human" else "assistant", said.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said}".strip()
        else:
            turns.append({"role": role, "content": said})
    return list(turns)
