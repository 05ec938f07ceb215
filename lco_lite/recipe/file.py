"""How a recipe file becomes a recipe: read, override, validate, write; and the recipes that are shipped.

A recipe is a YAML file; ``--set a.b=c`` overrides it, and named flags override both. Unknown keys, wrong types and
combinations that make no sense are refused, all at once, each with its place, key path and value.
"""

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

KeyPath = tuple[Any, ...]


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
        kind = "nothing" if data is None else f"a {type(data).__name__}"
        raise RecipeError(f"{path}: a recipe is a mapping of settings, found {kind}")
    places = {key: f"line {line}" for key, line in lines.items()}
    for key, _, place in _overrides(sets, flags):
        places = {p: where for p, where in places.items() if p[: len(key)] != key} | {key: place}
    return validate(override(data, sets, flags), str(path), places)


def override(data: dict[str, Any], sets: list[str] | None, flags: dict[str, Any] | None) -> dict[str, Any]:
    """``data`` with ``a.b=c`` items and then flags laid over it. Flags that are None were not given."""
    for path, value, _ in _overrides(sets, flags):
        data = _with(data, path, value)
    return data


def validate(data: dict[str, Any], origin: str, places: Mapping[KeyPath, str] | None = None) -> Recipe:
    """The typed recipe, or one RecipeError that lists every problem. ``places``: where a key was set (``line 3``)."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        problems = _problems(e, places or {})
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise RecipeError(f"{origin}: {count} in the recipe\n" + "\n".join(f"  {p}" for p in problems)) from e


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; reads back to the same recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def _overrides(sets: list[str] | None, flags: dict[str, Any] | None) -> list[tuple[KeyPath, Any, str]]:
    """(key path, value, where it was given) of every override, in the order in which they are laid over the file."""
    overrides: list[tuple[KeyPath, Any, str]] = []
    for item in sets or []:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {item}: write --set key.path=value, for example --set rl.lr=1e-5")
        try:
            overrides.append((tuple(key.split(".")), parse_yaml(text)[0], "--set"))
        except ValueError as e:
            raise RecipeError(f"--set {item}: the value is not valid YAML: {e}") from e
    return overrides + [(tuple(key.split(".")), v, "flag") for key, v in (flags or {}).items() if v is not None]


def _with(data: dict[str, Any], path: KeyPath, value: Any) -> dict[str, Any]:
    head, *rest = path
    if rest:
        inner = data.get(head)
        value = _with(inner if isinstance(inner, dict) else {}, tuple(rest), value)
    return {**data, head: value}


# --- problems in words

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


def _problems(error: ValidationError, places: Mapping[KeyPath, str]) -> list[str]:
    """One line a problem. A key whose place is not known takes that of the section it stands in."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for e in error.errors():
        by_path.setdefault(_keys_and_section(e["loc"])[0], []).append(e)
    texts: list[tuple[KeyPath, str]] = []
    for path, errors in by_path.items():
        of_type = [e for e in errors if _wanted(e)]
        others = [e for e in errors if not _wanted(e)]
        deeper = any(p[: len(path)] == path and p != path for p in by_path)
        # a value may be several things (`self` or a mapping): where it is plainly one, what the others wanted is noise
        if of_type and not others and not deeper:
            texts.append((path, _should_be(of_type)))
        for e in others:
            texts += _in_words(path, e)
    return list(dict.fromkeys(_line(path, text, places) for path, text in texts))


def _in_words(path: KeyPath, error: ErrorDetails) -> list[tuple[KeyPath, str]]:
    if error["type"] == "extra_forbidden":
        section = _keys_and_section(error["loc"])[1]
        names = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(path[-1]).lower().replace("-", "_"), names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(names)}"
        return [(path, f"unknown key; {hint}")]
    if error["type"] == "missing":
        return [(path, "is needed and missing")]
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        if path:
            return [(path, text)]
        keyed = [part.partition(": ") for part in _NEXT_KEY.split(text)]  # checks across sections name their keys
        return [(tuple(key.split(".")), part) for key, _, part in keyed]
    message = error["msg"].removeprefix("Input ")
    return [(path, f"{message[0].lower()}{message[1:]}, found {_shown(error['input'])}")]


def _should_be(errors: list[ErrorDetails]) -> str:
    value = errors[0]["input"]
    if value is None:
        return "is empty: give it a value, or delete the line"
    return f"should be {' or '.join(dict.fromkeys(map(_wanted, errors)))}, found {_shown(value)}"


def _wanted(error: ErrorDetails) -> str:
    """What a complaint about the kind of a value would have accepted; empty for other complaints."""
    return str(error["ctx"]["expected"]) if error["type"] == "literal_error" else _WANTED.get(error["type"], "")


def _line(path: KeyPath, text: str, places: Mapping[KeyPath, str]) -> str:
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), None)
    return f"{'.'.join(map(str, path)) or 'recipe'}{f' ({place})' if place else ''}: {text}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _keys_and_section(loc: tuple[Any, ...]) -> tuple[KeyPath, type[BaseModel] | None]:
    """The keys as users write them, and the section that the last one stands in (None: in a list or a free mapping).

    pydantic also names the branch of a union (`self` or a mapping) that it tried; no recipe has such a key.
    """
    keys: list[Any] = []
    holder: type[BaseModel] | None = None
    may_be: list[Any] = [Recipe]
    for part in loc:
        section = next((a for a in may_be if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if len(may_be) > 1:
            may_be = [section]
            continue
        keys.append(part)
        holder = section
        field = section.model_fields.get(part) if section else None
        may_be = _alternatives(field.annotation) if field else []
    return tuple(keys), holder


def _alternatives(annotation: Any) -> list[Any]:
    """What a value may be: the branches of a union but null, or the annotation itself."""
    if get_origin(annotation) in (None, Literal, list, tuple, dict):
        return [annotation]
    return [a for a in get_args(annotation) if a is not NoneType]


# --- YAML as one expects it (1.2): 1e-5 is a number; `no`, `on` and dates are text

_CHANGED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?|\.inf|\.nan)$")
_RARE_BREAK = re.compile("[\x85\u2028\u2029]")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CHANGED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what this loader or a plain YAML 1.1 loader would not read as the same text."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if _RARE_BREAK.search(data) else None  # PyYAML writes these raw as keys and reads them as spaces
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(str, _Dumper.represent_str)


def parse_yaml(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """The value in ``text``, and the line (from 1) of each key by its path. ValueError says what is wrong and where."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = _line_numbers(node)
        return (None if node is None else loader.construct_document(node)), lines
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


def _line_numbers(node: yaml.Node | None, path: KeyPath = ()) -> dict[KeyPath, int]:
    """The line (from 1) of each key in ``node``. ValueError for a key that stands twice in one mapping."""
    lines: dict[KeyPath, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here, line = (*path, str(key.value)), key.start_mark.line + 1
            if here in lines:
                raise ValueError(f"line {line}: the key {key.value!r} stands twice")
            lines |= {here: line} | _line_numbers(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines |= _line_numbers(item, (*path, i))
    return lines


# --- shipped recipes


def shipped() -> dict[str, Path]:
    """By name: ``recipes/`` of a checkout, else the copies inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "recipes"
    folder = checkout if checkout.is_dir() else package / "shipped_recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A file, or a shipped recipe by name. Raises RecipeError with the nearest names."""
    path, known = Path(name), shipped()
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
