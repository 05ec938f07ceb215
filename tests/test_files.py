import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lco_lite.errors import LcoError, UsageError
from lco_lite.files import (
    JsonLines,
    recover,
    remove,
    write_bytes,
    write_errors,
    write_folder,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def failing(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_text_replaces_what_was_there_and_leaves_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "old")
    write_text(tmp_path / "a" / "b.txt", "größer\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "größer\n".encode()
    assert names(tmp_path / "a") == ["b.txt"]


def test_json_reads_back_to_the_same_value_and_refuses_nan(tmp_path):
    value = {"β": [1, 2.5, None], "nested": {"a": True}}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", float("nan"))
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_says_how_much_is_free(tmp_path, monkeypatch, number):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(LcoError, match=r"disk is full: \d+ MiB free under .*; nothing was lost") as caught:
        write_text(tmp_path / "a.txt", "new")
    assert caught.value.exit_code == 1
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_missing_permission_names_the_path(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(UsageError, match="no permission to write") as caught:
        write_text(tmp_path / "a.txt", "new")
    assert str(tmp_path / "a.txt") in str(caught.value)
    assert names(tmp_path) == []


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (lambda: write_text(pipe, "x"), lambda: write_folder(pipe).__enter__()):
        with pytest.raises(UsageError, match="pipe is a device or a pipe"):
            write()
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UsageError, match="cannot write .*Not a directory"):
        write_text(tmp_path / "runs" / "a" / "b.txt", "new")


def test_a_full_disk_is_recognised_in_the_error_of_safetensors(tmp_path):
    with pytest.raises(LcoError, match="disk is full"), write_errors(tmp_path):
        raise SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')


@pytest.mark.parametrize("number", [errno.EIO, errno.EFBIG, errno.ENOTCONN])
def test_a_disk_that_fails_leaves_the_old_file_and_names_the_path(tmp_path, monkeypatch, number):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(LcoError, match="cannot write .*a.txt: .*; nothing was lost") as caught:
        write_text(tmp_path / "a.txt", "new")
    assert caught.value.exit_code == 1 and (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("text", ["I/O error: Input/output error (os error 5)", "IoError(Os { code: 5 })"])
def test_a_disk_that_fails_is_recognised_in_the_error_of_safetensors(tmp_path, text):
    with pytest.raises(LcoError, match=f"cannot write {tmp_path}"), write_errors(tmp_path):
        raise SafetensorError(text)


def test_errors_about_files_elsewhere_are_not_blamed_on_the_path_written(tmp_path):
    with pytest.raises(PermissionError), write_errors(tmp_path / "runs" / "a"):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else/model.safetensors")


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    with write_folder(tmp_path / "adapter") as new:
        (new / "inner").mkdir()
        (new / "inner" / "a").write_text("1")
        assert not (tmp_path / "adapter").exists()
    assert (tmp_path / "adapter" / "inner" / "a").read_text() == "1"
    assert names(tmp_path) == ["adapter"]


def test_a_folder_replaces_the_one_before_entirely(tmp_path):
    for name in ("old", "new"):
        with write_folder(tmp_path / "adapter") as folder:
            (folder / name).write_text(name)
    assert names(tmp_path / "adapter") == ["new"]
    assert names(tmp_path) == ["adapter"]


def test_an_error_inside_leaves_the_folder_before_as_it_was(tmp_path):
    with write_folder(tmp_path / "adapter") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), write_folder(tmp_path / "adapter") as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (tmp_path / "adapter" / "a").read_text() == "1"
    assert names(tmp_path) == ["adapter"]


def test_everything_in_a_folder_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed, sync = [], os.fsync

    def record(handle):
        flushed.append((os.readlink(f"/proc/self/fd/{handle}"), (tmp_path / "adapter").exists()))
        sync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is flushed")
    monkeypatch.setattr(os, "fsync", record)
    with write_folder(tmp_path / "adapter") as new:
        (new / "a").write_text("1")
    assert [(Path(name).name, there) for name, there in flushed if name.endswith("/a")] == [("a", False)]
    assert flushed[-1] == (str(tmp_path), True)


def test_removing_takes_files_and_folders_and_minds_no_absence(tmp_path):
    write_text(tmp_path / "folder" / "a", "1")
    write_text(tmp_path / "file", "1")
    for name in ("folder", "file", "absent"):
        remove(tmp_path / name)
    assert names(tmp_path) == []


def killed_between(monkeypatch, step: int, action) -> None:
    """Runs ``action`` and stops it dead before its ``step``-th rename or deletion, as SIGKILL would."""

    class Killed(BaseException):
        pass

    calls, rename = [], os.replace

    def count(*arguments):
        calls.append(arguments)
        if len(calls) == step:
            raise Killed
        rename(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", count)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            action()


def test_recovery_brings_back_a_folder_that_was_moved_aside_and_never_replaced(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "step-1"
    with write_folder(path) as folder:
        (folder / "a").write_text("old")

    def replace():
        with write_folder(path) as folder:
            (folder / "a").write_text("new")

    killed_between(monkeypatch, 2, replace)
    assert not path.exists()
    recover(tmp_path)
    assert (path / "a").read_text() == "old"
    assert names(path.parent) == ["step-1"]


def test_recovery_deletes_what_killed_writers_left_and_nothing_else(tmp_path, monkeypatch):
    write_bytes(tmp_path / "kept", b"1")
    write_text(tmp_path / ".hidden", "kept too")
    killed_between(monkeypatch, 1, lambda: write_folder(tmp_path / "adapter").__enter__().joinpath("a").replace("b"))
    assert len(names(tmp_path)) == 3
    recover(tmp_path)
    assert names(tmp_path) == [".hidden", "kept"]


def test_a_path_that_leads_back_out_of_a_folder_that_is_not_there_replaces_nothing(tmp_path, monkeypatch):
    """``new/../kept`` is not there for who looks, and is for who makes ``new`` first."""
    monkeypatch.chdir(tmp_path)
    Path("kept.txt").write_text("mine")
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "weights").write_text("mine")
    with pytest.raises(UsageError, match="leads through a folder that is not there"):
        write_text(Path("new/../kept.txt"), "theirs")
    with pytest.raises(UsageError, match="leads through"), write_folder(Path("new/../stage")):
        pass
    assert Path("kept.txt").read_text() == "mine" and Path("stage/weights").read_text() == "mine"
    assert sorted(os.listdir()) == ["kept.txt", "stage"]
    write_text(Path("stage/../made/deep/new.txt"), "a")
    write_text(Path(f"../{tmp_path.name}/other/new.txt"), "b")
    assert Path("made/deep/new.txt").read_text() == "a" and Path("other/new.txt").read_text() == "b"


def test_a_link_stays_one_and_what_only_its_owner_may_read_stays_so(tmp_path):
    private, link = tmp_path / "private.txt", tmp_path / "link.txt"
    private.write_text("old")
    private.chmod(0o600)
    link.symlink_to(private.name)
    write_text(link, "new")
    assert link.is_symlink() and private.read_text() == "new" and private.stat().st_mode & 0o777 == 0o600


def test_lines_that_two_runs_share_by_a_hard_link_are_gone_on_with_by_each(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    JsonLines(one).append({"a": 1})
    os.link(one, other)
    lines = JsonLines(one), JsonLines(other)
    for i, each in enumerate(lines):
        each.append({"b": i})
    assert [JsonLines(path).rows for path in (one, other)] == [[{"a": 1}, {"b": 0}], [{"a": 1}, {"b": 1}]]
