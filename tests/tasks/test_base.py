import json
import sys
from types import SimpleNamespace

import datasets.packaged_modules  # noqa: F401  # looked up while a stand-in has the package's name
import pytest

from lco_lite.errors import DataError
from lco_lite.tasks import load_task
from lco_lite.tasks.base import EVERY_CONFIG, FOLDER, Problem, Source, Task

SOURCE = Source(("one.jsonl", "two.jsonl"), "some/set", "test", "main")


def values(data=None, split="test"):
    """What the rows of a task over ``SOURCE`` hold."""
    task = Task("made", {"train": SOURCE, "test": SOURCE}, lambda row: Problem("p", str(row["v"])), data)
    return [item.row["v"] for item in task.items(split)]


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)


@pytest.fixture
def folder(tmp_path):
    for name, values in {"one.jsonl": [1, 2], "two.jsonl": [3]}.items():
        (tmp_path / name).write_text("\n".join(json.dumps({"v": v}) for v in values))
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers with what it was asked; ``hub.fail`` makes it fail."""
    asked = SimpleNamespace(calls=[], fail=None)

    def load_dataset(name, config, split):
        asked.calls.append((name, config, split))
        if asked.fail:
            raise asked.fail
        return [{"v": config}]

    fake = SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=lambda name: ["art", "law"])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked


def test_the_files_of_the_folder_are_read_one_after_the_other(folder, monkeypatch):
    monkeypatch.setenv(FOLDER, str(folder))
    assert values() == [1, 2, 3]
    assert SOURCE(folder)[2][0] == f"{folder / 'two.jsonl'}, line 1"


def test_a_folder_that_is_named_goes_before_that_of_the_environment(folder, monkeypatch, tmp_path_factory):
    monkeypatch.setenv(FOLDER, str(tmp_path_factory.mktemp("empty")))
    assert len(values(folder)) == 3


def test_the_hub_is_asked_where_no_folder_is_named(hub):
    assert SOURCE(None) == [("some/set, row 1", {"v": "main"})]
    assert hub.calls == [("some/set", "main", "test")]


def test_the_hub_is_asked_where_the_folder_lacks_a_file(hub, folder, monkeypatch):
    (folder / "two.jsonl").unlink()
    monkeypatch.setenv(FOLDER, str(folder))
    assert values() == ["main"]


def test_every_config_of_a_hub_set_is_read_and_named(hub):
    every = Source(("x.jsonl",), "some/set", "test", EVERY_CONFIG)
    assert [row for _, row in every(None)] == [{"subject": "art", "v": "art"}, {"subject": "law", "v": "law"}]


def test_offline_says_which_files_and_set_are_wanted_and_how_to_point_to_them(hub):
    hub.fail = ConnectionError("Couldn't reach the hub\nand more")
    with pytest.raises(
        DataError, match=r"some/set .*Couldn't reach the hub.*LCO_LITE_DATA=DIR.*one.jsonl and two.jsonl"
    ):
        values()


def test_offline_says_that_the_folder_lacks_the_file(hub, tmp_path, monkeypatch):
    hub.fail = ConnectionError()
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(DataError, match=f"the folder {tmp_path} has no one.jsonl.*ConnectionError"):
        values()


def test_one_file_holds_the_test_items_and_no_others(hub, folder):
    assert values(folder / "two.jsonl") == [3]
    assert values(folder / "two.jsonl", "train") == ["main"]


def test_a_task_without_a_grader_says_so_and_calls_no_response_right():
    task = Task("made", {}, lambda row: None, grader=None)
    assert not task.graded and not task.grade("x", None).right
    assert load_task("gsm8k").graded and not load_task("alpaca_eval").graded
