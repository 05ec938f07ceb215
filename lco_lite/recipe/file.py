"""Recipe files: read, override, validate, write. A file yields to ``--set a.b=c``, and both yield to named flags.

Every problem is reported at once, with file, place, key path and value.
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lco_lite.errors import RecipeError, UsageError
from lco_lite.recipe import Recipe

Places = dict[tuple[str, ...], str]


def load_recipe(path: Path, sets: list[str] | None = None, flags: dict[str, Any] | None = None) -> Recipe:
    """The recipe in ``path`` under ``--set`` items and then named flags (``{"rl.beta": 1.0}``). Raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark first
    except FileNotFoundError as e:
        raise RecipeError(f"{path}: no such recipe file. `lco-lite recipes` lists the shipped ones.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: cannot be read: {e}") from e
    try:
        data, lines = parse_yaml(text)
    except ValueError as e:
        raise RecipeError(f"{path}: not valid YAML: {e}") from e
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"{path}: a recipe is a mapping of settings, found {found}")
    places = {key: f"line {line}" for key, line in lines.items()}
    for key, _, place in _given(sets, flags):
        places = {p: where for p, where in places.items() if p[: len(key)] != key} | {key: place}
    return validate(override(data, sets, flags), str(path), places)


def override(data: dict[str, Any], sets: list[str] | None, flags: dict[str, Any] | None) -> dict[str, Any]:
    """``data`` with ``a.b=c`` items and then flags laid over it. Flags that are None were not given."""
    for path, value, _ in _given(sets, flags):
        data = _with(data, path, value)
    return data


def validate(data: dict[str, Any], origin: str, places: Places | None = None) -> Recipe:
    """The typed recipe, or one RecipeError that lists every problem."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        problems = describe_problems(e, Recipe, places or {})
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise RecipeError(f"{origin}: {count} in the recipe\n" + "\n".join(f"  {p}" for p in problems)) from e


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; reads back to the same recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def _given(sets: list[str] | None, flags: dict[str, Any] | None) -> list[tuple[tuple[str, ...], Any, str]]:
    """(key path, value, where it was given) of every override, in the order in which they are laid over the file."""
    given = [(*_parse_set(item), "--set") for item in sets or []]
    return given + [(tuple(key.split(".")), value, "flag") for key, value in (flags or {}).items() if value is not None]


def _parse_set(item: str) -> tuple[tuple[str, ...], Any]:
    """(key path, value) of ``key.path=value``, the value by the YAML rules of a file."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {item}: write --set key.path=value, for example --set rl.lr=1e-5")
    try:
        return tuple(key.split(".")), parse_yaml(text)[0]
    except ValueError as e:
        raise RecipeError(f"--set {item}: the value is not valid YAML: {e}") from e


def _with(data: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**data, head: value}
    inner = data.get(head)
    return {**data, head: _with(inner if isinstance(inner, dict) else {}, tuple(rest), value)}


KeyPath = tuple[Any, ...]

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


def describe_problems(error: ValidationError, model: type[BaseModel], places: Mapping[KeyPath, str]) -> list[str]:
    """One line a problem. ``places``: where a key was set (``line 3``, ``--set``); nested keys take their parent's."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for e in error.errors():
        by_path.setdefault(_keys(e["loc"], model), []).append(e)
    problems: list[str] = []
    for path, errors in by_path.items():
        of_type = [e for e in errors if _wanted(e)]
        others = [e for e in errors if not _wanted(e)]
        deeper = any(p[: len(path)] == path and p != path for p in by_path)
        # a value may be several things (`self` or a mapping): where it is plainly one, what the others wanted is noise
        if of_type and not others and not deeper:
            problems.append(_problem_line(path, _should_be(of_type), places))
        for e in others:
            problems += _other(path, e, model, places)
    return list(dict.fromkeys(problems))


def _other(path: KeyPath, error: ErrorDetails, model: type[BaseModel], places: Mapping[KeyPath, str]) -> list[str]:
    if error["type"] == "extra_forbidden":
        return [_problem_line(path, _unknown_key(path, model), places)]
    if error["type"] == "missing":
        return [_problem_line(path, "is needed and missing", places)]
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        if path:
            return [_problem_line(path, text, places)]
        keyed = [part.partition(": ") for part in _NEXT_KEY.split(text)]  # checks across sections name their keys
        return [_problem_line(tuple(key.split(".")), part, places) for key, _, part in keyed]
    message = error["msg"].removeprefix("Input ")
    return [_problem_line(path, f"{message[0].lower()}{message[1:]}, found {_shown(error['input'])}", places)]


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


def _unknown_key(path: KeyPath, model: type[BaseModel]) -> str:
    names = _fields_at(path[:-1], model)
    near = difflib.get_close_matches(str(path[-1]).lower().replace("-", "_"), names, 1)
    return f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; accepted: {', '.join(names)}"


def _problem_line(path: KeyPath, text: str, places: Mapping[KeyPath, str]) -> str:
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), None)
    return f"{'.'.join(map(str, path)) or 'recipe'}{f' ({place})' if place else ''}: {text}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _keys(loc: tuple[Any, ...], model: type[BaseModel]) -> KeyPath:
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


def _fields_at(path: KeyPath, model: type[BaseModel]) -> list[str]:
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


_CHANGED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(
    r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf|\.nan)$"
)

_RARE_BREAK = re.compile("[\x85\u2028\u2029]")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what this loader or a plain YAML 1.1 loader would not read as the same text."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if _RARE_BREAK.search(data) else None  # PyYAML writes these raw as keys and reads them as spaces
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CHANGED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The value in ``text``, and the line (from 1) of each key by its path. ValueError says what is wrong and where."""
    try:
        value = yaml.load(text, _Loader)  # a subclass of SafeLoader
        return value, _line_numbers(yaml.compose(text, _Loader))
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise ValueError(f"{f'line {mark.line + 1}: ' if mark else ''}{e.problem or e.context}") from e
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())) from e
    except RecursionError as e:
        raise ValueError("nested without end") from e


def write_yaml(value: Any) -> str:
    """Reads back to the same value by ``parse_yaml``; keys stay in order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _line_numbers(node: yaml.Node | None, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            lines[here] = key.start_mark.line + 1
            lines |= _line_numbers(value, here)
    return lines


def folder() -> Path:
    """``recipes/`` of a checkout, else the copy inside the installed package."""
    checkout = Path(__file__).resolve().parents[2] / "recipes"
    return checkout if checkout.is_dir() else Path(__file__).resolve().parents[1] / "shipped_recipes"


def shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A file, or a shipped recipe by name. Raises RecipeError with the nearest names."""
    path = Path(name)
    known = shipped()
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else "shipped recipes: " + ", ".join(known)
    raise RecipeError(f"{name}: no such recipe file, and no shipped recipe of that name; {hint}")


def show_recipes(name: str | None) -> None:
    if name is not None:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    for known, path in shipped().items():
        first = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        typer.echo(f"{known:14} {first.lstrip('# ')}")


def copy_recipes(name: str | None, target: Path) -> None:
    """Raises UsageError rather than write over a file."""
    target.mkdir(parents=True, exist_ok=True)
    for path in [find_recipe(name)] if name else shipped().values():
        if (target / path.name).exists():
            raise UsageError(f"{target / path.name} is there already; nothing was overwritten")
        shutil.copy(path, target / path.name)
        typer.echo(str(target / path.name))
