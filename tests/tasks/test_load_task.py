import subprocess
import sys
from pathlib import Path

import pytest

from lco_lite.errors import UsageError
from lco_lite.tasks import load_task, task_names


def test_every_name_loads_a_task_of_that_name():
    for name in task_names():
        assert load_task(name).name == name


def test_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(UsageError, match="did you mean arithmetic.*Known: .*arithmetic"):
        load_task("aritmetic")


def test_importing_the_tasks_loads_nothing_heavy():
    heavy = {"torch", "datasets", "transformers", "math_verify", "sympy", "numpy"}
    code = "import sys, lco_lite.tasks; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)


def test_every_task_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert [name for name in task_names() if f"`{name}`" not in page] == []
