"""How a recipe file becomes a recipe: read, override, validate, write; and the recipes that are shipped.

``--set a.b=c`` overrides the YAML file, and named flags override both. Where they name another objective than the file,
it brings its own defaults (``makes_room``), and an adapter in place of all weights, or the other way round, its own
learning rates (``rates_make_room``). Whatever is wrong with it is told at once.
"""

import difflib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lco_lite.console import Console
from lco_lite.errors import RecipeError, UsageError
from lco_lite.files import is_there
from lco_lite.recipe import Recipe, adapts, default_rates
from lco_lite.recipe.peers import answered
from lco_lite.recipe.rl import LCO, defaults_of, feedbacks
from lco_lite.recipe.sections import OF_RUN

KeyPath = tuple[Any, ...]
Say = Callable[[str], object]


def load_recipe(
    path: Path,
    sets: list[str] | None = None,
    flags: dict[str, Any] | None = None,
    say: Say = lambda text: None,
    of_run: bool = False,
) -> Recipe:
    """The recipe in ``path`` under ``--set`` items and then named flags (``{"rl.beta": 1.0}``). Raises RecipeError.
    ``say`` is told which of the file's values another objective replaced; ``of_run``: a run was begun with it."""
    return recipe_and_said(path, sets, flags, say, of_run)[0]


def recipe_and_said(
    path: Path, sets: list[str] | None, flags: dict[str, Any] | None, say: Say, of_run: bool = False
) -> tuple[Recipe, frozenset[str]]:
    """``load_recipe``, and ``said`` of what it read: the file is read once."""
    text = unsealed(_text(path), path) if of_run else _text(path)
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
    recipe = overridden(data, sets, flags, say, str(path), places, of_run)
    if lost := list(_lie_beside(path, recipe)):
        raise RecipeError("\n".join([f"{path}: files are found from the working folder, {Path.cwd()}", *lost]))
    return recipe, said(data, sets, flags)


_FILES: tuple[str, ...] = ("data.demonstrations", "data.preferences", "data.prompts", "data.task")
_FILES += ("rl.objective", "rl.target", "rl.reward_function", "eval.examples", "eval.grader")


def _lie_beside(path: Path, recipe: Recipe) -> Iterator[str]:
    """A line a file that is not in the working folder, and lies beside the recipe."""
    for key, value in flat(recipe.model_dump(mode="json")).items():
        if isinstance(value, str) and key.startswith(_FILES):
            name, colon, rest = value.partition(":")
            if not is_there(Path(name)) and is_there(beside := path.parent / name) and beside.is_file():
                told = f"it lies beside the recipe: `cd {path.parent}` first, or -s {key}={beside}{colon}{rest}"
                yield f"  {key}: {name} is not there; {told}"


def _text(path: Path) -> str:
    """Raises RecipeError."""
    try:
        about = path.stat()
        if stat.S_ISFIFO(about.st_mode):
            return _piped(path, about.st_dev, about.st_ino)
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
            raise RecipeError(f"{path}: is a device; a recipe is a file, or comes through a pipe")
        return path.read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark first
    except FileNotFoundError as e:
        raise RecipeError(f"{path}: no such recipe file; {_near_recipe(path)}") from e
    except (OSError, ValueError) as e:
        raise RecipeError(f"{path!s:.200}: cannot be read: {getattr(e, 'strerror', None) or e}") from e


@cache  # a pipe gives what it has once, and a command reads its recipe more than once
def _piped(path: Path, *which: int) -> str:
    """What is written to a pipe, as ``<(command)`` is one; ``which`` tells it from a later one of its name. Raises
    RecipeError where nobody writes to it, or more than is read."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:  # does not wait for a writer to come
        os.set_blocking(pipe.fileno(), True)
        content = pipe.read(4 * MOST_CHARACTERS + 1)
    if not content:
        raise RecipeError(f"{path}: is a pipe that nothing is written to; a recipe is a mapping of settings")
    if len(content) > 4 * MOST_CHARACTERS:
        raise RecipeError(
            f"{path}: is a pipe with more to it than {MOST_CHARACTERS:,} characters, the most that is read"
        )
    return content.decode("utf-8-sig")


def overridden(
    data: dict[str, Any],
    sets: list[str] | None,
    flags: dict[str, Any] | None,
    say: Say,
    origin: str,
    places: Mapping[KeyPath, str] | None = None,
    of_run: bool = False,
) -> Recipe:
    """``data`` under ``--set`` items and flags as a recipe; for the rest see ``load_recipe`` and ``validate``."""
    recipe, before = validate(override(data, sets, flags), origin, places, of_run), makes_room(data, sets, flags)
    now = flat(recipe.rl.model_dump(mode="json"))
    changed = [f"{field} {old} → {now.get(field)}" for field, old in flat(before).items() if old != now.get(field)]
    if changed:
        who = f"{recipe.rl.objective} of {recipe.rl.feedback}" if "rewards" in before else recipe.rl.objective
        say(f"{who} brings its own defaults in place of the recipe's, unless set: {', '.join(changed)}")
    if rates := rates_make_room(data, sets, flags):
        told = ", ".join(f"{stage}.lr {old:g} → {getattr(recipe, stage).lr:g}" for stage, old in rates.items())
        say(f"what is trained brings its own default rates in place of the recipe's, unless set: {told}")
    return recipe


def said(data: dict[str, Any], sets: list[str] | None, flags: dict[str, Any] | None) -> frozenset[str]:
    """The settings, by dotted key, that a recipe file's ``data``, ``--set`` and flags name. Those of the file that make
    room for another objective's are not among them."""
    return frozenset(key for key, value in flat(override(data, sets, flags)).items() if value != {})


def override(data: dict[str, Any], sets: list[str] | None, flags: dict[str, Any] | None) -> dict[str, Any]:
    """``data`` with ``a.b=c`` items and then flags laid over it. Flags that are None were not given."""
    if gone := makes_room(data, sets, flags):
        data = {**data, "rl": {field: value for field, value in data["rl"].items() if field not in gone}}
    for stage in rates_make_room(data, sets, flags):
        data = {**data, stage: {field: value for field, value in data[stage].items() if field != "lr"}}
    return _laid_over(data, _overrides(sets, flags))


def makes_room(data: dict[str, Any], sets: list[str] | None, flags: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of ``data``'s rl section that were written for its objective, where the overrides name another one:
    those with a default of their own in either, unless overridden themselves. A reward that has a source keeps it.
    ``rewards`` were written for the feedback, and go with it; ``anchor`` for LCO."""
    rl, given = data.get("rl", {}), {path: value for path, value, _ in _overrides(sets, flags)}
    if not isinstance(rl, dict) or ("rl",) in given:
        return {}
    theirs, old = set[str](), str(rl.get("objective", "kld"))
    if (new := str(given.get(("rl", "objective"), old))) != old:
        theirs = {*defaults_of(old), *defaults_of(new)} | ({"anchor"} if new not in LCO else set())
    if rl.get("reward_function") or rl.get("reward_classifier"):
        theirs.discard("feedback")
    before = str(rl.get("feedback", "dpo"))
    if "feedback" in theirs or feedbacks(str(given.get(("rl", "feedback"), before))) != feedbacks(before):
        theirs.add("rewards")
    return {field: value for field, value in rl.items() if field in theirs and ("rl", field) not in given}


def rates_make_room(data: dict[str, Any], sets: list[str] | None, flags: dict[str, Any] | None) -> dict[str, float]:
    """By stage, the learning rates of ``data`` that were the default for what it trains, where the overrides have it
    train the other: an adapter, or all weights. Not where they set the rate, or make room for an objective's."""
    overrides = _overrides(sets, flags)
    given, before, after = {path for path, _, _ in overrides}, adapts(data), adapts(_laid_over(data, overrides))
    if "lr" in makes_room(data, sets, flags):
        given.add(("rl", "lr"))
    found = dict[str, float]()
    for stage, rate in default_rates(data).items():
        section, is_set = data.get(stage), (stage,) in given or (stage, "lr") in given
        if before[stage] != after[stage] and not is_set and isinstance(section, dict) and section.get("lr") == rate:
            found[stage] = rate
    return found


def validate(
    data: dict[str, Any], origin: str, places: Mapping[KeyPath, str] | None = None, of_run: bool = False
) -> Recipe:
    """The typed recipe, or one RecipeError that lists every problem. ``places``: where a key was set (``line 3``)."""
    try:
        return Recipe.model_validate(data, context=OF_RUN if of_run else None)
    except ValidationError as e:
        problems, more = _problems(e, data, places or {})
        count = f"{len(problems) + more} problem{'s' if len(problems) + more > 1 else ''}"
        shown = [*problems, *([f"and {more} more"] if more else [])]
        raise RecipeError(f"{origin}: {count} in the recipe\n" + "\n".join(f"  {p}" for p in shown)) from e


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; reads back to the same recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


_RECORD = "# What the run goes by, as a record: to change a setting, give it as a flag.\n"
_SEAL = "# sha256 of all above: "


def seal(text: str) -> str:
    """``text`` with a first line that says that it is a record, and a last one with the sum of what it has to be."""
    return f"{_RECORD}{text}{_SEAL}{_sum(text)}\n"


def unsealed(text: str, path: Path) -> str:
    """What was sealed, or ``text`` without a seal, as earlier versions and people write it. RecipeError where a part
    of it is gone or has changed; line ends are none."""
    text = text.replace("\r\n", "\n")
    head, sealed, digest = text.removeprefix(_RECORD).partition(_SEAL)
    if (sealed or text.startswith(_RECORD)) and digest != f"{_sum(head)}\n":
        raise RecipeError(f"{path}: has changed since the run wrote it, or a part of it is gone: its sum is another")
    return head


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Needed(NamedTuple):
    """A setting without which the recipe would be another. ``default``: what it would be; None where there would be no
    recipe at all."""

    key: KeyPath
    value: Any
    default: Any


def needed(recipe: Recipe) -> list[Needed]:
    """The settings that cannot be left out: all that differ from the defaults, of which an objective has its own. A
    section is one where it makes a difference by being there, with defaults alone (``model.init``)."""
    tree, found = recipe.model_dump(mode="json"), list[Needed]()

    def look(section: dict[str, Any], at: KeyPath) -> None:
        for key, value in list(section.items()):
            path = (*at, key)
            del section[key]
            without = _valid(tree)
            if without == recipe:
                continue
            section[key] = value
            before = len(found)
            if isinstance(value, dict):
                look(value, path)
            if len(found) == before:
                found.append(Needed(path, value, _value_at(path, without)))

    look(tree, ())
    return found


def dump_short(recipe: Recipe) -> str:
    """``needed`` as YAML; reads back to the same recipe."""
    tree: dict[str, Any] = {}
    for (*at, key), value, _ in needed(recipe):
        section = tree
        for name in at:
            section = section.setdefault(name, {})
        section[key] = value
    return write_yaml(tree)


def _valid(tree: dict[str, Any]) -> Recipe | None:
    try:
        return Recipe.model_validate(tree, context=OF_RUN)
    except ValidationError:
        return None


def _value_at(path: KeyPath, recipe: Recipe | None) -> Any:
    value: Any = recipe.model_dump(mode="json") if recipe else None
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; an empty mapping stays as a value."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _overrides(sets: list[str] | None, flags: dict[str, Any] | None) -> list[tuple[KeyPath, Any, str]]:
    """(key path, value, where it was given) of every override, in the order in which they are laid over the file."""
    overrides: list[tuple[KeyPath, Any, str]] = []
    for item in sets or []:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {item:.200}: write --set key.path=value, for example --set rl.lr=1e-5")
        try:
            overrides.append((tuple(key.split(".")), parse_yaml(text)[0], "--set"))
        except ValueError as e:
            raise RecipeError(f"--set {item}: the value is not valid YAML: {e}") from e
    return overrides + [(tuple(key.split(".")), v, "flag") for key, v in (flags or {}).items() if v is not None]


def _laid_over(data: dict[str, Any], overrides: list[tuple[KeyPath, Any, str]]) -> dict[str, Any]:
    for path, value, _ in overrides:
        data = _with(data, path, value)
    return data


def _with(data: dict[str, Any], path: KeyPath, value: Any) -> dict[str, Any]:
    head, *rest = path
    inner = data.get(head)
    return {**data, head: _with(inner if isinstance(inner, dict) else {}, tuple(rest), value) if rest else value}


# --- problems in words

_KINDS = dict.fromkeys(("model", "dict"), "a mapping of settings") | dict.fromkeys(("list", "tuple"), "a list")
_KINDS |= {"string": "text", "bool": "true or false", "int": "a whole number", "float": "a number"}


MOST_PROBLEMS = 20


def _problems(error: ValidationError, data: Any, places: Mapping[KeyPath, str]) -> tuple[list[str], int]:
    """One line a problem, of the first ``MOST_PROBLEMS`` keys that have one, and how many more have. A key whose place
    is not known takes that of the section it stands in."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for e in error.errors():
        by_path.setdefault(_keys(e, data), []).append(e)
    texts: list[tuple[KeyPath, str]] = []
    for path, errors in list(by_path.items())[:MOST_PROBLEMS]:
        wanted = [_wanted(e) for e in errors]
        deeper = any(p[: len(path)] == path and p != path for p in by_path)
        # a value may be several things (`self` or a mapping): where it is plainly one, what the others wanted is noise
        if all(wanted) and not deeper:
            value = errors[0]["input"]
            should = f"should be {' or '.join(wanted)}, found {_shown(value)}"
            texts.append((path, "is empty: give it a value, or delete the line" if value is None else should))
        texts += [text for e in errors if not _wanted(e) for text in _in_words(path, e)]
    return [_line(path, text, places) for path, text in texts], max(0, len(by_path) - MOST_PROBLEMS)


def _keys(error: ErrorDetails, data: Any) -> KeyPath:
    """The keys as users write them: pydantic also names the branch of a union (`self` or a mapping) that it tried."""
    keys: list[Any] = []
    for part in error["loc"]:
        if part in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()):
            keys.append(part)
            data = data[part]
    return (*keys, error["loc"][-1]) if error["type"] == "missing" else tuple(keys)


def _wanted(error: ErrorDetails) -> str:
    """What a complaint about the kind of a value would have accepted; empty for other complaints."""
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"])
    kind, _, complaint = error["type"].partition("_")
    return _KINDS.get(kind, "") if complaint in ("type", "parsing", "from_float") else ""


def _in_words(path: KeyPath, error: ErrorDetails) -> list[tuple[KeyPath, str]]:
    if error["type"] == "extra_forbidden":
        *section, name = map(str, path)
        return [(path, f"unknown key; {answered(name, '.'.join(section))}")]
    if error["type"] == "missing":
        return [(path, "is needed and missing")]
    if error["type"] == "value_error":
        if path:
            return [(path, "; ".join(error["ctx"]["error"].args))]
        keyed = [problem.partition(": ") for problem in error["ctx"]["error"].args]  # those across sections name keys
        return [(tuple(key.split(".")), text) for key, _, text in keyed]
    message = error["msg"].removeprefix("Input ")
    return [(path, f"{message[0].lower()}{message[1:]}, found {_shown(error['input'])}")]


def _line(path: KeyPath, text: str, places: Mapping[KeyPath, str]) -> str:
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), None)
    return f"{'.'.join(map(str, path)) or 'recipe'}{f' ({place})' if place else ''}: {text}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


# --- YAML as one expects it (1.2): 1e-5 is a number; `no`, `on` and dates are text

_CHANGED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?|\.inf|\.nan)$")
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")  # NUL and halves of surrogate pairs
MOST_CHARACTERS, MOST_VALUES, MOST_DIGITS = 1_000_000, 10_000, 1000
_RARE_BREAK = re.compile("[\x85\u2028\u2029]")


class _Loader(yaml.SafeLoader):
    """Values are what they look like: no tag makes them anything else."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CHANGED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            short = tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.MarkedYAMLError(problem=f"the tag {short}: write the plain value", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) <= MOST_DIGITS:
            return super().construct_yaml_int(node)
        told = f"a whole number of {len(node.value)} digits; at most {MOST_DIGITS} are read"
        raise yaml.MarkedYAMLError(problem=told, problem_mark=node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes what this loader or a plain YAML 1.1 loader would not read as the same text."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if _RARE_BREAK.search(data) else None  # PyYAML writes these raw as keys and reads them as spaces
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(str, _Dumper.represent_str)


def parse_yaml(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """The value in ``text``, and the line (from 1) of each key by its path. ValueError says what is wrong and where."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = _line_numbers(node, _Room(MOST_VALUES))
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


@dataclass
class _Room:
    """How many more values may come: an alias counts each time, so that few lines cannot stand for millions."""

    left: int


def _line_numbers(node: yaml.Node | None, room: _Room, path: KeyPath = ()) -> dict[KeyPath, int]:
    """The line (from 1) of each key in ``node``. ValueError for a key that stands twice in one mapping, for text that
    no file or terminal takes, and for too many values."""
    lines: dict[KeyPath, int] = {}
    room.left -= 1
    if room.left < 0:
        raise ValueError(f"more than {MOST_VALUES:,} values, each alias counted as what it stands for")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here, line = (*path, str(key.value)), key.start_mark.line + 1
            if here in lines:
                raise ValueError(f"line {line}: the key {_shown(key.value)} stands twice")
            _line_numbers(key, room)
            lines[here] = line
            lines.update(_line_numbers(value, room, here))
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines.update(_line_numbers(item, room, (*path, i)))
    elif node is not None and (bad := _NO_TEXT.search(node.value)):
        raise ValueError(f"line {node.start_mark.line + 1}: text with the character U+{ord(bad[0]):04X} in it")
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
    if is_there(path) or path.suffix in (".yaml", ".yml"):
        return path
    if name in known:
        return known[name]
    near = _near_recipe(path)
    raise RecipeError(f"{name:.200}: no such recipe file, and no shipped recipe of that name; {near}")


def _near_recipe(path: Path) -> str:
    beside = path.parent.glob("*.yaml") if is_there(path.parent) else ()
    names = {name: name for name in shipped()} | {file.stem: str(file) for file in beside}
    near = difflib.get_close_matches(path.stem, names, 1)
    return f"did you mean {names[near[0]]!r}?" if near else f"shipped recipes: {', '.join(shipped())}"


def show_recipes(name: str | None, console: Console) -> None:
    if name is not None:
        return console.say(_text(find_recipe(name)), end="")
    for known, path in shipped().items():
        console.say(f"{known:14} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


def unwritten(data: str, out: Path | None) -> Path:
    """Where the recipe of a data file goes: beside it, unless ``out`` names another. Raises UsageError where something
    is there."""
    path = out or Path(data).parent / f"{Path(data).stem}.yaml"
    if is_there(path):
        raise UsageError(f"{path} is there already, and is not written over: name another file with --out")
    return path


def copy_recipes(name: str | None, target: Path, console: Console) -> None:
    """Raises UsageError rather than write over a file, and for a folder that cannot be written."""
    wanted = [find_recipe(name)] if name else list(shipped().values())
    target = target.resolve() if ".." in target.parts else target  # looked at where it will be written
    for path in wanted:
        if is_there(target / path.name):
            raise UsageError(f"{target / path.name} is there already; nothing was overwritten")
    for path in wanted:
        try:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.name)
        except OSError as e:
            raise UsageError(f"--copy {target}: {path.name} cannot be written there: {e.strerror or e}") from e
        console.say(str(target / path.name))
