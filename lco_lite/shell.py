"""What a shell shows before anything runs: help in groups, and what Tab completes. No heavy import."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup

from lco_lite.export import FORMS
from lco_lite.recipe.file import shipped
from lco_lite.recipe.peers import NOTHING, answered, called_here
from lco_lite.recipe.rl import METHOD_DEFAULTS

GROUPS = {
    "Train": ("run", "sft", "train-rm", "rl"),
    "Score": ("eval", "study"),
    "Use": ("chat", "export"),
    "Look": ("init", "plan", "report", "runs", "data", "recipes", "env"),
}
# options by the group they are shown in; those of a command itself come first
_SHARED = {
    "Run": ("set", "name", "runs", "seed", "device", "fresh", "dry_run", "full"),
    "Output": ("quiet", "json", "out", "h"),
}
EXAMPLES = {
    "run": "lco-lite run quickstart",
    "sft": "lco-lite sft recipes/math.yaml",
    "train-rm": "lco-lite train-rm recipes/math.yaml --set train_rm.epochs=2",
    "rl": "lco-lite rl --objective lch --beta 1.0",
    "eval": "lco-lite eval math500 --policy rl-kld --seeds 4",
    "study": "lco-lite study methods --seeds 3 --only 'kld mixed' --only gkd",
    "chat": "lco-lite chat --beside base",
    "export": "lco-lite export --to merged",
    "init": "lco-lite init prompts.jsonl --reward reward.py",
    "plan": "lco-lite plan math --gpu 12GiB",
    "report": "lco-lite report runs/quickstart",
    "runs": "lco-lite runs quickstart --clean",
    "check": "lco-lite data check recipes/math.yaml",
    "recipes": "lco-lite recipes math --copy .",
    "env": "lco-lite env",
}


_WrongUsage: Any = BadParameter.__mro__[1]  # click's UsageError, or that of typer's own copy of click


class Command(TyperCommand):
    """Its options in groups, and an example of it. An option that is a setting of the recipe is answered as one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _WrongUsage as e:
            name = getattr(e, "option_name", "").lstrip("-").replace("-", "_")
            sets = any(parameter.name == "sets" for parameter in self.params)
            if sets and (name in NOTHING or called_here(name)):
                told = answered(name, {"train-rm": "train_rm"}.get(str(self.name), str(self.name)))
                e.message += f". The recipe's settings are given by -s KEY=VALUE; {told}"
                e.possibilities = None
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], **{name: [] for name in _SHARED}}
        for parameter in self.get_params(ctx):
            told = parameter.get_help_record(ctx)
            if told is None:
                continue
            of = next((group for group, names in _SHARED.items() if _name(parameter) in names), "Options")
            groups["Arguments" if parameter.param_type_name == "argument" else of].append(told)
        for title, rows in groups.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.name in EXAMPLES:
            with formatter.section("Example"):
                formatter.write_text(EXAMPLES[self.name])


def _name(parameter: Any) -> str:
    return str(parameter.opts[0].lstrip("-").replace("-", "_"))


class Group(TyperGroup):
    """Its commands by what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        left = dict(self.commands)
        for title, names in GROUPS.items():
            commands = {name: left.pop(name) for name in names if name in left}
            _section(formatter, title, commands)
        _section(formatter, "Commands", left)


def _section(formatter: Any, title: str, commands: dict[str, Any]) -> None:
    width = max(map(len, (name for names in GROUPS.values() for name in names)))
    if commands:
        with formatter.section(title):
            limit = formatter.width - width - 6
            formatter.write_dl([(name.ljust(width), c.get_short_help_str(limit)) for name, c in commands.items()])


# what Tab offers; typer calls these with what is typed so far


def of(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def recipe_names() -> list[str]:
    """Shipped ones and the files here."""
    return [*shipped(), *sorted(str(p) for p in (*Path().glob("*.yaml"), *Path("recipes").glob("*.yaml")))]


def objectives() -> list[str]:
    return list(METHOD_DEFAULTS)


def tasks() -> list[str]:
    from lco_lite.tasks import task_names

    return task_names()


def run_names() -> list[str]:
    root = Path(os.environ.get("LCO_LITE_RUNS", "runs"))
    return sorted(recipe.parent.name for recipe in root.glob("*/recipe.yaml"))


def _stages() -> list[str]:
    """RUN/STAGE of all that are done, and RUN/STAGE@best."""
    root = Path(os.environ.get("LCO_LITE_RUNS", "runs"))
    done = [file.parent.relative_to(root).as_posix() for file in root.glob("*/*/done.json")]
    best = [file.parents[1].relative_to(root).as_posix() for file in root.glob("*/*/best/best.json")]
    return sorted([*done, *(f"{stage}@best" for stage in best)])


def policies() -> list[str]:
    """The stages of all runs."""
    return ["base", "optimal", "rl", *sorted({stage.partition("/")[2] for stage in _stages()})]


def compared() -> list[str]:
    """Stages by themselves, then with their run."""
    return [*policies(), *_stages()]


def forms() -> list[str]:
    return list(FORMS)
