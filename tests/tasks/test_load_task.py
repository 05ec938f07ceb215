import subprocess
import sys
from pathlib import Path

import pytest

from lco_lite import tasks
from lco_lite.errors import UsageError
from lco_lite.tasks import load_task, task_names


def test_every_name_loads_a_task_of_that_name():
    for name in task_names():
        assert load_task(name).name == name


def test_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(UsageError, match="did you mean arithmetic.*Known: .*arithmetic"):
        load_task("aritmetic")


NEW = """
from lco_lite.tasks.base import Problem, Task

def parity(data=None):
    rows = [("row 1", {"n": 0, "is": "even"}), ("row 2", {"n": 1, "is": "odd"})]
    return Task("parity", {"test": lambda folder: rows}, lambda row: Problem(f"{row['n']} is", row["is"]))

TASKS = {"parity": parity}
"""


def test_a_new_file_in_the_folder_of_tasks_is_a_task(tmp_path, monkeypatch):
    assert "parity" not in task_names()
    (tmp_path / "parity_task.py").write_text(NEW)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    try:
        assert "parity" in task_names()
        task = load_task("parity")
        item = task.items("test")[1]
        assert (item.id, item.gold) == ("parity/test/1", "odd") and task.grade("the answer is odd", item).right
        with pytest.raises(UsageError, match="did you mean parity"):
            load_task("paritty")
    finally:
        sys.modules.pop("lco_lite.tasks.parity_task", None)
        vars(tasks).pop("parity_task", None)
    monkeypatch.undo()
    assert "parity" not in task_names()


def test_importing_the_tasks_loads_nothing_heavy():
    heavy = {"torch", "datasets", "transformers", "math_verify", "sympy", "numpy"}
    code = "import sys, lco_lite.tasks; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)


def test_every_task_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert [name for name in task_names() if f"`{name}`" not in page] == []
