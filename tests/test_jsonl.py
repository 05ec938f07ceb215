import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis.strategies import data, integers, sampled_from

from lco_lite.errors import DataError, LcoError
from lco_lite.files import JsonLines, json_line, read_jsonl, sealed_line


@pytest.fixture
def write(tmp_path):
    def write(content: bytes):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        return path

    return write


def test_rows_come_in_the_order_of_the_file(write):
    assert read_jsonl(write(b'{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("content", [b'\xef\xbb\xbf{"a": 1}', b'{"a": 1}\r\n', b'{"a": 1}\n\n \n'])
def test_marks_and_line_ends_of_other_systems_are_no_content(write, content):
    assert read_jsonl(write(content)) == [{"a": 1}]


def test_separators_of_unicode_do_not_end_a_line(write):
    row = {"text": "one\u2028two\u0085three\x0bfour"}
    assert read_jsonl(write(json.dumps(row, ensure_ascii=False).encode())) == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 1,}\n', "line 2: is not JSON: .* column 9"),
        (b'{"a": 1}\n{"a"', "line 2: is not JSON"),
        (b'{"a": 1}\n\n{"a": 2}', "line 2: is empty"),
        (b"[1, 2]", "line 1: is a list, not an object"),
        (b'{"a": 1}\n"text"', "line 2: is a string"),
        (b"null", "line 1: is null"),
        (b"true", "line 1: is a boolean"),
        (b"1.5", "line 1: is a number"),
        (b'{"a": "\xff"}', "line 1: is not UTF-8"),
        (b"[" * 100_000, "line 1: is not JSON"),
        (b'{"a": ' * 150 + b"1" + b"}" * 150, "line 1: is not JSON: nested too deeply"),
        (b"", "rows.jsonl: is empty"),
        (b" \n\n", "rows.jsonl: is empty"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(write, content, message):
    with pytest.raises(DataError, match=f"rows.jsonl.*{message}" if "rows" not in message else message):
        read_jsonl(write(content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="absent.jsonl: no such file"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path)


def test_lines_that_were_appended_are_there_when_the_file_is_opened_again(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows = [{"text": "one\u2028two\n\u0085"}, {"n": [1, None]}]
    for row in rows:
        JsonLines(path).append(row)
    assert JsonLines(path).rows == rows == [{k: v for k, v in row.items() if k != "seal"} for row in read_jsonl(path)]


@pytest.mark.parametrize("whole", [[], [{"a": 1}], [{"a": 1}, {"a": 2}]])
@pytest.mark.parametrize("cut", [b'{"a"', b'{"a": 3}', b"\xc3"])
def test_a_last_line_that_a_kill_cut_short_is_removed_and_the_next_one_follows_the_whole_ones(write, whole, cut):
    path = write(_sealed(whole) + cut)
    lines = JsonLines(path)
    assert lines.rows == whole
    lines.append({"a": 9})
    assert path.read_bytes() == _sealed([*whole, {"a": 9}]) and JsonLines(path).rows == lines.rows == [*whole, {"a": 9}]


def _sealed(rows):
    lines, seal = b"", ""
    for row in rows:
        line, seal = sealed_line(row, seal)
        lines += line
    return lines


ROWS = [{"a": [1, 0.1], "t": "é\u2028"}, {"a": 2}, {"a": None}]


@given(data())
def test_any_change_of_any_line_is_found_and_what_is_cut_at_the_end_is_made_again(tmp_path_factory, data):
    path, content = tmp_path_factory.mktemp("seals") / "rows.jsonl", _sealed(ROWS)
    at = data.draw(integers(0, len(content) - 1), "at")
    how = data.draw(sampled_from(["cut", "flip", "drop"]), "how")
    if how == "cut":
        path.write_bytes(content[:at])
        assert JsonLines(path).rows == ROWS[: content[:at].count(b"\n")]
        return
    lines = content.splitlines(keepends=True)
    changed = bytearray(content)
    changed[at] ^= 1 << data.draw(integers(0, 7), "bit")
    path.write_bytes(b"".join(lines[1:]) if how == "drop" else changed)
    try:
        assert JsonLines(path).rows in (ROWS, ROWS[:2])  # a space in place of another, or the last line's end
    except DataError as e:
        assert "damaged: line" in str(e) and str(e).endswith("they are made again")


@pytest.mark.parametrize("value", [True, "1", 2, None, float("nan"), float("inf"), 10**30, [1], {}])
def test_a_field_of_another_value_or_type_is_named_by_its_line(write, value):
    first, second = _sealed([{"a": 1}, {"b": 1}]).splitlines(keepends=True)
    changed = json.dumps(json.loads(second) | {"b": value}).encode() + b"\n"
    with pytest.raises(DataError, match="damaged: line 2 is not as it was written. Put it back as it was, or delete"):
        JsonLines(write(first + changed))
    path = write(first)
    assert JsonLines(path).rows == [{"a": 1}]  # as it is said


def test_lines_of_earlier_versions_have_no_seals_and_go_on_without(write):
    path = write(json_line({"a": 1}) + json_line({"a": 2}))
    lines = JsonLines(path)
    lines.append({"a": 3})
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 3}\n' and JsonLines(path).rows == lines.rows
    with pytest.raises(DataError, match="line 2 is not as"):
        JsonLines(write(json_line({"a": 1}) + _sealed([{"a": 2}])))


def test_each_line_is_on_the_disk_before_append_returns(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), sync(handle)))
    lines = JsonLines(tmp_path / "rows.jsonl")
    for _ in range(2):
        lines.append({"a": 1})
    assert synced == [37, 74]


def test_a_file_of_something_else_is_refused_and_a_full_disk_is_said(write, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="line 1: is not JSON"):
        JsonLines(write(b"no json\n"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="folder.jsonl: cannot be read"):
        JsonLines(tmp_path / "folder.jsonl")
    lines = JsonLines(tmp_path / "other.jsonl")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LcoError, match="disk is full"):
        lines.append({"a": 1})
    assert lines.rows == []
