"""Recipe files: read, override, validate, write. A file yields to ``--set a.b=c``, and both yield to named flags.

Every problem is reported at once, with file, place, key path and value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lco_lite.errors import RecipeError
from lco_lite.recipe import Recipe
from lco_lite.recipe.problems import describe_problems
from lco_lite.recipe.text import parse_yaml, write_yaml

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
