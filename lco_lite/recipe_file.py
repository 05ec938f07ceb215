"""Recipe files: read, override, validate, write. Every problem is reported at once, with file, line, key path and value."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lco_lite.errors import RecipeError
from lco_lite.recipe import Recipe


class _Loader(yaml.SafeLoader):
    """SafeLoader in which ``1e-5`` is a number and only true/false are booleans (YAML 1.2)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rx) for tag, rx in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def parse_scalar(text: str) -> Any:
    """The value of ``--set key=text`` by the same YAML rules as a file. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader


def load_recipe(path: Path, sets: list[str] | None = None, flags: dict[str, Any] | None = None) -> Recipe:
    """The recipe in ``path`` under ``--set`` items and then named flags (``{"rl.beta": 1.0}``). Raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise RecipeError(f"{path}: no such recipe file. `lco-lite recipes` lists the shipped ones.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: cannot be read: {e}") from e
    try:
        data = yaml.load(text, _Loader)  # noqa: S506
        lines = _line_numbers(yaml.compose(text, _Loader))
    except yaml.YAMLError as e:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of settings, found {_kind(data)}")
    return validate(override(data, sets, flags), str(path), lines)


def override(data: dict[str, Any], sets: list[str] | None, flags: dict[str, Any] | None) -> dict[str, Any]:
    """``data`` with ``a.b=c`` items and then flags laid over it. Flags that are None were not given."""
    for item in sets or []:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {item}: write --set key.path=value, for example --set rl.lr=1e-5")
        try:
            data = _with(data, key, parse_scalar(text))
        except yaml.YAMLError as e:
            raise RecipeError(f"--set {item}: the value is not valid YAML: {' '.join(str(e).split())}") from e
    for key, value in (flags or {}).items():
        if value is not None:
            data = _with(data, key, value)
    return data


def validate(data: dict[str, Any], origin: str, lines: dict[tuple, int] | None = None) -> Recipe:
    """The typed recipe, or one RecipeError that lists every problem."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        problems = list(dict.fromkeys(_describe(err, data, lines or {}) for err in e.errors()))
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise RecipeError(f"{origin}: {count} in the recipe\n" + "\n".join(f"  {p}" for p in problems)) from e


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _with(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    inner = data.get(head) if isinstance(data, dict) else None
    new = value if not rest else _with(inner if isinstance(inner, dict) else {}, rest, value)
    return {**data, head: new}


def _line_numbers(node: yaml.Node | None, path: tuple = ()) -> dict[tuple, int]:
    lines = {path: node.start_mark.line + 1} if node is not None else {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            lines |= _line_numbers(value, here)
            lines[here] = key.start_mark.line + 1
    return lines


def _describe(error: Any, data: Any, lines: dict[tuple, int]) -> str:
    path = tuple(part for part in error["loc"] if not _is_union_tag(part))
    where = ".".join(map(str, path)) or "recipe"
    line = lines.get(path)
    found = error["input"]
    if error["type"] == "extra_forbidden":
        names = _fields_at(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(names)}"
        text = f"unknown key; {hint}"
    elif error["type"] == "missing":
        text = "is needed and missing"
    elif error["type"] == "value_error":
        text = str(error["ctx"]["error"])
    else:
        text = f"{error['msg'][0].lower()}{error['msg'][1:]}, found {found!r}"
    return f"{where}{f' (line {line})' if line else ''}: {text}"


def _is_union_tag(part: Any) -> bool:
    """pydantic names the branch of a union in an error's location; users never wrote it."""
    return isinstance(part, str) and bool(re.match(r"^(literal\[|list\[|RewardModel$|constrained|function-)", part))


def _fields_at(path: tuple) -> list[str]:
    model: Any = Recipe
    for part in path:
        model = next((m for m in _models_in(model.model_fields[part].annotation)), None) if model else None
    return list(model.model_fields) if model else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models_in(arg)]


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
