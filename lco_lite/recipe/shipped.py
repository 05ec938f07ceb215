"""The recipes that come with the package: found by name, listed, copied."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import typer

from lco_lite.errors import RecipeError, UsageError


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
