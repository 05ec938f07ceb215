"""Whatever bytes a file holds, a reader gives what it says or raises one of our errors, and ends."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.data import rows
from lco_lite.errors import LcoError, UsageError
from lco_lite.files import json_line, read_jsonl
from lco_lite.judging.judge import read_completion, read_verdict, retry_after
from lco_lite.metrics import read_log
from lco_lite.recipe.file import load_recipe, parse_yaml, write_yaml
from lco_lite.tasks import load_task
from tests.faults.damaged import DEEP, WRONG, fields, mistype
from tests.faults.malformed import _ITEMS, _ROWS
from tests.report.made_runs import make_run

few = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=9,
)
pieces = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"null", b"NaN", b"1e999", b"\\ud800", b"\xff"]
)
almost_json = st.lists(pieces | st.binary(max_size=6), max_size=12).map(b"".join)


@few
@given(almost_json)
def test_lines_of_any_bytes(tmp_path, content):
    file = tmp_path / "d.jsonl"
    file.write_bytes(content)
    for read in (read_jsonl, read_log):
        try:
            assert all(isinstance(row, dict) for row in read(file))
        except UsageError as e:
            assert str(file) in str(e)


@few
@given(st.dictionaries(st.text(max_size=8), values, max_size=4))
def test_an_object_that_was_written_is_read_back(tmp_path, row):
    try:
        line = json_line(row)
    except ValueError:  # NaN and infinities are no JSON
        return
    file = tmp_path / "d.jsonl"
    file.write_bytes(line)
    assert read_jsonl(file) == [json.loads(line)]


@pytest.mark.parametrize("shape", _ROWS)
@settings(few, max_examples=15)
@given(st.data())
def test_rows_with_any_values_in_their_fields(tmp_path, shape, data):
    fields = list(_ROWS[shape])
    row = {**_ROWS[shape], **{f: data.draw(values) for f in data.draw(st.lists(st.sampled_from(fields), min_size=1))}}
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(row) + "\n")
    try:
        made: list[Any] = getattr(rows, f"read_{shape.partition('/')[0]}")(str(file))
    except LcoError as e:
        assert str(file) in str(e)
    else:
        assert all(isinstance(turn["content"], str) for one in made for turn in one.messages)


@pytest.mark.parametrize("task", _ITEMS)
@settings(few, max_examples=15)
@given(st.data())
def test_items_with_any_values_in_their_fields(tmp_path, task, data):
    fields = list(_ITEMS[task])
    row = {**_ITEMS[task], **{f: data.draw(values) for f in data.draw(st.lists(st.sampled_from(fields), min_size=1))}}
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(row) + "\n")
    try:
        items = load_task(task, file).items("test")
    except LcoError as e:
        assert str(file) in str(e)
    else:
        assert all(isinstance(item.prompt, str) and item.prompt.strip() for item in items)


@few
@given(almost_json | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_recipes_of_any_bytes(tmp_path, content):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="r.yaml"):
        load_recipe(file)


@few
@given(st.dictionaries(st.text(max_size=8), values, max_size=4))
def test_a_value_that_was_written_as_yaml_is_read_back_or_refused(value):
    try:
        found, _ = parse_yaml(write_yaml(value))
    except ValueError:  # what no file or terminal takes
        return
    assert repr(found) == repr(value)


@few
@given(almost_json | values.map(lambda v: json.dumps({"choices": v}).encode()))
def test_answers_of_a_judge_of_any_bytes(body):
    try:
        reply = read_completion(body)
    except ValueError:
        return
    assert (reply.text is None or isinstance(reply.text, str)) and reply.tokens_in >= 0


@few
@given(st.text(max_size=60), st.none() | st.text(max_size=30))
def test_verdicts_and_waits_of_any_text(text, wait):
    assert read_verdict(text) in ("A", "B", "tie", None)
    seconds = retry_after(wait, 0.0)
    assert seconds is None or seconds >= 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, and the files in it that we write."""
    folder = make_run(tmp_path_factory.mktemp("made"), "one")
    return folder, sorted(p.relative_to(folder) for p in folder.rglob("*.json*"))


LOOKS = {
    "runs": ["runs"],
    "report": ["report", "one", "--quiet"],
    "compare": ["eval", "arithmetic", "--compare", "sft", "rl-kld"],
}


@pytest.mark.parametrize("look", LOOKS)
@settings(few, max_examples=25)
@given(st.data())
def test_runs_with_any_type_in_a_field_of_a_file(tmp_path, made, look, data):
    folder, files = made
    file = data.draw(st.sampled_from(files))
    field = data.draw(st.sampled_from([*fields(folder / file), "deep"]))
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    shutil.copytree(folder, tmp_path / "runs" / "one")
    place = tmp_path / "runs" / "one" / file
    if field == "deep":
        place.write_bytes(DEEP + b"\n")
    else:
        mistype(place, field, data.draw(st.sampled_from([*WRONG, "gone"])))
    told = CliRunner().invoke(app, [*LOOKS[look], "--runs", str(tmp_path / "runs")])
    assert isinstance(told.exception, SystemExit | None) and told.exit_code in (0, 2), told.exception
    assert look != "runs" or told.exit_code == 0
