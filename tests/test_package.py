"""The package as it is built: nothing is left out, nothing unsafe comes in."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "lco_lite").rglob("*.py"))


def test_every_subpackage_is_listed_in_pyproject():
    listed = set(re.findall(r'^  "(lco_lite[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M))
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in SOURCES if p.name == "__init__.py"}
    assert listed == found | {"lco_lite.shipped_recipes"}


def test_every_dependency_is_pinned_by_the_constraints_file():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|test) = \[\n(.*?)^\]", project, re.M | re.S)
    wanted = {re.split(r"[\[>=<]", name)[0].lower() for block in lists for name in re.findall(r'"([^"]+)"', block)}
    assert wanted <= pinned, wanted - pinned


def test_nothing_is_unpickled_and_no_yaml_is_loaded_unsafely():
    unsafe = re.compile(
        r"torch\.load\(|\bpickle\b|yaml\.(full_|unsafe_)?load\(|yaml\.(Full|Unsafe)?Loader|trust_remote_code=True"
    )
    found = [f"{p.name}: {line.strip()}" for p in SOURCES for line in p.read_text().splitlines() if unsafe.search(line)]
    assert not [line for line in found if not line.split(": ", 1)[1].startswith(("#", '"', "*", "raise"))], found
