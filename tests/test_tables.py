"""CSV and Parquet files as rows: what stands in the file, and nothing else."""

import csv
import json
import os
import threading
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.errors import DataError, RecipeError
from lco_lite.files import read_bytes
from lco_lite.recipe.file import load_recipe, recipe_and_said
from lco_lite.tables import load_rows
from lco_lite.tasks import load_task


@pytest.fixture
def rows_of(tmp_path):
    """content -> the rows of a CSV file with it."""

    def read(content, name="a.csv"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_rows(str(tmp_path / name))

    return read


@pytest.mark.parametrize(
    "cell",
    ["007", "1.10", "9007199254740993", "1e5", "NA", "None", "null", "nan", "", "true", " a ", "2020-01-02", '5" x'],
)
def test_a_cell_is_the_text_that_stands_there(rows_of, cell):
    assert rows_of(f"prompt,answer\nq,{cell}\n") == [{"prompt": "q", "answer": cell}]


def test_a_gold_answer_is_the_text_of_the_file(rows_of, tmp_path):
    rows_of("prompt,answer\na,007\nb,1.10\nc,9007199254740993\nd,NA\n")
    items = load_task("custom", tmp_path / "a.csv").items("test")
    assert [item.gold for item in items] == ["007", "1.10", "9007199254740993", "NA"]


def test_quoted_cells_hold_commas_quotes_line_ends_and_long_texts(rows_of, tmp_path):
    rows = [{"prompt": 'a, "b"\r\nc\n\nd', "answer": "x" * 200_000}, {"prompt": "\u2028\x85", "answer": ""}]
    limit = csv.field_size_limit()
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    assert load_rows(str(tmp_path / "a.csv")) == rows and csv.field_size_limit() == limit


@pytest.mark.parametrize("content", ["a,b\n1,2", "a,b\r\n1,2\r\n\r\n\r\n", "a,b\r1,2\r", "\ufeffa,b\n1,2\n\n"])
def test_line_ends_of_every_kind_a_byte_order_mark_and_empty_lines_at_the_end(rows_of, content):
    assert rows_of(content) == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "prompt,response\nHello, world,hi\n",
            r"a.csv, line 2: has 3 cells, \['Hello', ' world', 'hi'\]; 2 are expected",
        ),
        ('a,b\n"1\n",2\n3\n', r"line 4: has 1 cells, \['3'\]; 2 are expected"),
        ("a,b\n1,2\n\n3,4\n", "line 3: is empty; 2 are expected"),
        ("prompt,prompt\n1,2\n", "line 1: columns 1 and 2 are both named 'prompt'"),
        (",prompt\n0,a\n", "line 1: column 1 of 2 has no name"),
        ("\na,b\n1,2\n", "line 1: is empty; a line with the names"),
        ("", "line 1: is empty; a line with the names"),
        ("a,b\n", "has no rows"),
        ('a,b\n1,2\n"3,4\n5,6\n', "line 3: a double quote is opened in this row and never closed"),
        ('a,b\n1,2\n3,"4" 5\n', "line 3: is not CSV: .*double quote stands in double quotes"),
        (b"a,b\n1,2\n3,\xe4\n", "line 3: has byte 0xe4, which is not UTF-8; a .csv file is text in UTF-8"),
        ("a,b\n1,\0\n", "line 2: has a NUL character"),
        ("a,b\n1,2\n".encode("utf-16"), "line 1: has byte 0xff"),
        (b"\x1f\x8b\x08\x00rest", "line 1: has byte 0x8b"),
    ],
)
def test_what_is_no_table_is_told_by_its_line(rows_of, content, told):
    with pytest.raises(DataError, match=told):
        rows_of(content)


def test_a_file_written_anew_is_read_anew_and_its_name_is_no_pattern(rows_of, tmp_path):
    rows_of("a\n2\n", "st2.csv")
    rows_of("a\n1\n", "st*.csv")
    before = (tmp_path / "st*.csv").stat()
    assert rows_of("a\n9\n", "a[1].csv") == [{"a": "9"}]
    (tmp_path / "st*.csv").write_text("a\n3\n")
    os.utime(tmp_path / "st*.csv", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_rows(str(tmp_path / "st*.csv")) == [{"a": "3"}]


def test_choices_that_are_one_text_are_told_before_a_recipe_is_written(rows_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows_of("prompt,choices,answer\nSky?,red|blue,1\nGrass?,green|blue,0\n")
    told = CliRunner().invoke(app, ["init", "a.csv"])
    assert told.exit_code == 2 and "column choices is text, from which answer picks" in " ".join(told.stderr.split())


# parquet


SHOWN = {"prompt": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}


def stored(path, columns, features=None):
    table = pyarrow.table(columns)
    if features:
        said = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": said})
    parquet.write_table(table, path)
    return load_rows(str(path))


def test_what_a_parquet_file_says_of_images_opens_nothing(tmp_path):
    image = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    column = pyarrow.array(image, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    rows = stored(tmp_path / "a.parquet", {"prompt": ["a"], "image": column}, SHOWN)
    assert rows == [{"prompt": "a", "image": image[0]}]


def test_a_parquet_file_keeps_its_values_and_a_folders_name_adds_none(tmp_path):
    (tmp_path / "k=1").mkdir()
    turns = [[{"role": "user", "content": "a"}]]
    columns = {"messages": turns, "n": [7], "x": [0.5], "b": [b"\xff"], "none": pyarrow.array([None], pyarrow.string())}
    rows = stored(tmp_path / "k=1" / "a.parquet", columns)
    assert rows == [{"messages": turns[0], "n": 7, "x": 0.5, "b": b"\xff", "none": None}]


def test_json_in_a_parquet_file_is_what_it_says(tmp_path):
    column = pyarrow.array(['{"a": [1]}', '"x"', None]).cast(pyarrow.json_())
    assert [row["a"] for row in stored(tmp_path / "a.parquet", {"a": column})] == [{"a": [1]}, "x", None]
    with pytest.raises(DataError, match=r"b.parquet, row 1, column a: is not JSON"):
        stored(tmp_path / "b.parquet", {"a": pyarrow.array(["{"]).cast(pyarrow.json_())})


def test_columns_of_one_name_no_rows_and_text_that_is_none_are_told(tmp_path):
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["p", "p"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: columns 1 and 2 are both named 'p'"):
        load_rows(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match="has no rows"):
        stored(tmp_path / "b.parquet", {"a": pyarrow.array([], pyarrow.string())})
    bad = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xe4")
    )
    with pytest.raises(DataError, match="c.parquet: cannot be loaded as a parquet file: 'utf-8' codec"):
        stored(tmp_path / "c.parquet", {"a": bad})


# pipes and devices


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json", "p.parquet"])
def test_a_pipe_or_a_device_is_no_data_file_and_is_told_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / f"zero-{name}").symlink_to("/dev/zero")
    for one in (name, f"zero-{name}"):
        with pytest.raises(DataError, match=f"{one}: is a pipe or a device"):
            load_rows(str(tmp_path / one))
    with pytest.raises(DataError, match="is a pipe or a device"):
        read_bytes("/dev/zero")


@pytest.mark.timeout(60)
def test_a_recipe_may_come_through_a_pipe_that_somebody_writes_to(tmp_path):
    with pytest.raises(RecipeError, match="/dev/zero: is a device"):
        load_recipe(Path("/dev/zero"))
    os.mkfifo(tmp_path / "nobody.yaml")
    with pytest.raises(RecipeError, match="is a pipe that nothing is written to"):
        load_recipe(tmp_path / "nobody.yaml")
    for text in ("name: piped\ntask: arithmetic\nmodel: {path: none}\n", "a" * 5_000_000):
        out, into = os.pipe()
        path = Path(f"/dev/fd/{out}")
        writer = threading.Thread(target=_write, args=(into, text.encode()))
        writer.start()
        if len(text) < 100:
            recipe, named = recipe_and_said(path, None, None, lambda text: None)
            assert recipe.name == load_recipe(path).name == "piped" and named == {"name", "task", "model.path"}
        else:
            with pytest.raises(RecipeError, match="is a pipe with more to it than 1,000,000 characters"):
                load_recipe(path)
        os.close(out)
        writer.join()


def _write(into, content):
    try:
        with open(into, "wb") as pipe:
            pipe.write(content)
    except BrokenPipeError:
        pass
