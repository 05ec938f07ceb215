"""What is wrong with a recipe: one line a problem, with key path, place, what was found and what is accepted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Path = tuple[Any, ...]

_WANTED = {
    "model_type": "a mapping of settings",
    "dict_type": "a mapping of settings",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
}
_LONGEST_VALUE = 60
_NEXT_KEY = re.compile(r"; (?=[a-z_.]+: )")


def describe_problems(error: ValidationError, model: type[BaseModel], places: Mapping[Path, str]) -> list[str]:
    """One line a problem. ``places``: where a key was set (``line 3``, ``--set``); nested keys take their parent's."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for e in error.errors():
        by_path.setdefault(_keys(e["loc"], model), []).append(e)
    problems: list[str] = []
    for path, errors in by_path.items():
        of_type = [e for e in errors if _wanted(e)]
        others = [e for e in errors if not _wanted(e)]
        deeper = any(p[: len(path)] == path and p != path for p in by_path)
        # a value may be several things (`self` or a mapping): where it is plainly one, what the others wanted is noise
        if of_type and not others and not deeper:
            problems.append(_line(path, _should_be(of_type), places))
        for e in others:
            problems += _other(path, e, model, places)
    return list(dict.fromkeys(problems))


def _other(path: Path, error: ErrorDetails, model: type[BaseModel], places: Mapping[Path, str]) -> list[str]:
    if error["type"] == "extra_forbidden":
        return [_line(path, _unknown_key(path, model), places)]
    if error["type"] == "missing":
        return [_line(path, "is needed and missing", places)]
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        if path:
            return [_line(path, text, places)]
        keyed = [part.partition(": ") for part in _NEXT_KEY.split(text)]  # checks across sections name their keys
        return [_line(tuple(key.split(".")), part, places) for key, _, part in keyed]
    message = error["msg"].removeprefix("Input ")
    return [_line(path, f"{message[0].lower()}{message[1:]}, found {_shown(error['input'])}", places)]


def _should_be(errors: list[ErrorDetails]) -> str:
    found = errors[0]["input"]
    if found is None:
        return "is empty: give it a value, or delete the line"
    return f"should be {' or '.join(dict.fromkeys(map(_wanted, errors)))}, found {_shown(found)}"


def _wanted(error: ErrorDetails) -> str:
    """What a complaint about the kind of a value would have accepted; empty for other complaints."""
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"])
    return _WANTED.get(error["type"], "")


def _unknown_key(path: Path, model: type[BaseModel]) -> str:
    names = _fields_at(path[:-1], model)
    near = difflib.get_close_matches(str(path[-1]).lower().replace("-", "_"), names, 1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; accepted: {', '.join(names)}"


def _line(path: Path, text: str, places: Mapping[Path, str]) -> str:
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), None)
    return f"{'.'.join(map(str, path)) or 'recipe'}{f' ({place})' if place else ''}: {text}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _keys(loc: tuple[Any, ...], model: type[BaseModel]) -> Path:
    """``loc`` without the names by which pydantic tells the branches of a union apart; users never wrote those."""
    keys: list[Any] = []
    annotation: Any = model
    for part in loc:
        if len(_alternatives(annotation)) > 1:
            annotation = _section(annotation)
        else:
            keys.append(part)
            annotation = _field(annotation, part)
    return tuple(keys)


def _fields_at(path: Path, model: type[BaseModel]) -> list[str]:
    annotation: Any = model
    for part in path:
        annotation = _field(annotation, part)
    section = _section(annotation)
    return list(section.model_fields) if section else []


def _field(annotation: Any, name: Any) -> Any:
    """The annotation of a section's field; None below anything that is no section."""
    section = _section(annotation)
    return section.model_fields[name].annotation if section and name in section.model_fields else None


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section among what a value may be, if there is one."""
    return next((a for a in _alternatives(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _alternatives(annotation: Any) -> list[Any]:
    """What a value may be: the branches of a union but null, or the annotation itself."""
    if get_origin(annotation) in (None, Literal, list, tuple, dict):
        return [annotation]
    return [a for a in get_args(annotation) if a is not NoneType]
