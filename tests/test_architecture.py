"""The house as CONTRIBUTING.md draws it: an import points down the list of rooms, and nothing goes in circles."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lco_lite"
MAP = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = [name.removesuffix(".py").rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", MAP, re.M)]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") or "__init__"


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str, inside_functions: bool) -> set[str]:
    """Modules of this package that ``module`` imports."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lco_lite":
            source = (node.module or "").removeprefix("lco_lite").lstrip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".lstrip(".")
                found.add(inner if inner in MODULES else source or "__init__")
    return found - {module}


def test_the_map_names_every_room_and_every_file_beside_them():
    present = {module.partition(".")[0] for module in MODULES} - {"__init__", "__main__"}
    assert sorted(ROOMS) == sorted(present)


def test_every_import_points_down_the_map():
    place = {room: i for i, room in enumerate(ROOMS)} | {"__init__": len(ROOMS), "__main__": -1}
    upward = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imports(module, inside_functions=True)
        if place[other.partition(".")[0]] < place[module.partition(".")[0]]
    ]
    assert not upward, upward


def test_no_import_goes_in_a_circle():
    try:
        TopologicalSorter({module: imports(module, inside_functions=False) for module in MODULES}).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_no_two_classes_share_a_name():
    places: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


@pytest.mark.parametrize("module", sorted(m for m, f in MODULES.items() if f.stat().st_size))
def test_every_file_says_what_it_is(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))
