"""What the project is built from: licences that go with its own, and workflows that run nothing unnamed."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PINNED = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.y*ml"))
# permissive, or weak copyleft of whole files, whose packages are used as they are
ACCEPTED = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0"),
    *("CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib"),
}
# as packages without a licence expression name them
NAMES = dict.fromkeys(("apache", "apache 2.0", "apache 2.0 license", "apache software license"), "Apache-2.0")
NAMES |= {
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
}
NAMES |= {"mit license": "MIT", "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0", "dfsg approved": ""}
NAMES |= {"python software foundation license": "PSF-2.0"}


def licences(package: str) -> set[str]:
    """The SPDX names in the package's metadata: its expression, else its classifiers, else its licence field."""
    data = metadata(package)
    classified = [c.rpartition("::")[2].strip() for c in data.get_all("Classifier") or [] if c.startswith("License ::")]
    said = [data["License-Expression"]] if data["License-Expression"] else classified or [data["License"] or "none"]
    spelled = [NAMES.get(one.lower(), one) for one in said]
    return {part.strip("() ") for one in spelled if one for part in re.split(r" (?:AND|OR) ", one)}


@pytest.mark.parametrize("package", PINNED)
def test_every_pinned_package_has_a_licence_that_is_accepted(package):
    try:
        found = licences(package)
    except PackageNotFoundError:
        pytest.skip("not installed on this Python")
    assert found and found <= ACCEPTED, f"{package}: {found - ACCEPTED}"


def test_a_licence_that_is_not_accepted_or_not_named_would_be_found(tmp_path, monkeypatch):
    for name, line in (("gpled", "License-Expression: MIT AND GPL-3.0-only"), ("unnamed", "Summary: no licence")):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{line}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert licences("gpled") - ACCEPTED == {"GPL-3.0-only"} and licences("unnamed") - ACCEPTED == {"none"}


def test_every_pin_is_exact():
    lines = [line.split(" #")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    loose = [
        line for line in lines if line and not line.startswith("#") and not re.match(r"[\w.-]+==[\w.]+(;|$)", line)
    ]
    assert not loose


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_uses_actions_by_their_whole_hash_and_may_read_only(file):
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step] + [
        j["uses"] for j in workflow["jobs"].values() if "uses" in j
    ]
    assert all(re.search(r"@[0-9a-f]{40}$", action) for action in used), used


def test_the_workflow_runs_the_tests_of_the_readme_and_the_audit():
    (file,) = WORKFLOWS
    scripts = [step["run"] for job in yaml.safe_load(file.read_text())["jobs"].values() for step in job["steps"]]
    named = {path for script in scripts for path in re.findall(r"\.ci/\w+", script)}
    assert named == {".ci/run", ".ci/audit"}
    assert all((ROOT / path).stat().st_mode & 0o100 for path in named)
    assert "pytest" in (ROOT / ".ci/run").read_text() and "constraints.txt" in (ROOT / ".ci/audit").read_text()
