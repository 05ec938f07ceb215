"""Rows of every common shape become the same conversations; malformed ones are named by line."""

import json

import pytest

from lco_lite.data.rows import demonstrations, load_rows, preferences, prompts
from lco_lite.errors import DataError

USER = {"role": "user", "content": "2+2?"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "4"}]},
        {"instruction": "2+2?", "output": "4"},
        {"question": "2+2?", "response": "4"},
        {"messages": [USER, {"role": "assistant", "content": "4"}]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_demonstrations_of_every_shape_read_alike(tmp_path, row):
    (found,) = demonstrations(write(tmp_path / "d.jsonl", [row]))
    assert found.messages == [USER]
    assert found.response == "4"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": "4"}], "rejected": "5"},
        {
            "chosen": [USER, {"role": "assistant", "content": "4"}],
            "rejected": [USER, {"role": "assistant", "content": "5"}],
        },
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ],
)
def test_preferences_of_every_shape_read_alike(tmp_path, row):
    (found,) = preferences(write(tmp_path / "p.jsonl", [row]))
    assert (found.messages, found.chosen, found.rejected) == ([USER], "4", "5")


def test_an_instruction_takes_its_input_along(tmp_path):
    (found,) = demonstrations(write(tmp_path / "d.jsonl", [{"instruction": "Add.", "input": "2 2", "output": "4"}]))
    assert found.messages[0]["content"] == "Add.\n\n2 2"


def test_a_system_text_is_put_before_a_conversation_that_has_none(tmp_path):
    rows = [{"prompt": "a"}, {"messages": [{"role": "system", "content": "own"}, USER]}]
    first, second = prompts(write(tmp_path / "p.jsonl", rows), system="be brief")
    assert first[0] == {"role": "system", "content": "be brief"}
    assert second[0]["content"] == "own"


def test_a_prompt_row_drops_the_answer_that_it_carries(tmp_path):
    row = {"messages": [USER, {"role": "assistant", "content": "4"}]}
    assert prompts(write(tmp_path / "p.jsonl", [row])) == [[USER]]


@pytest.mark.parametrize(
    ("read", "row", "named"),
    [
        (demonstrations, {"prompt": "a"}, "completion"),
        (demonstrations, {"messages": [USER]}, "assistant"),
        (preferences, {"prompt": "a", "chosen": "b"}, "rejected"),
        (preferences, {"chosen": "b", "rejected": "c"}, "no prompt"),
        (prompts, {"text": "a"}, "found text"),
        (prompts, {"messages": [{"role": "robot", "content": "a"}]}, "robot"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(tmp_path, read, row, named):
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2") as e:
        read(write(tmp_path / "bad.jsonl", [good, row]))
    assert named in str(e.value)


def test_json_csv_and_parquet_files_are_read_too(tmp_path):
    import pandas

    frame = pandas.DataFrame([{"prompt": "a", "completion": "b"}])
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text('[{"prompt": "a", "completion": "b"}]')
    for name in ("x.csv", "x.parquet", "x.json"):
        assert load_rows(str(tmp_path / name)) == [{"prompt": "a", "completion": "b"}]


def test_a_missing_file_and_a_hub_set_out_of_reach_are_told_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file"):
        load_rows(str(tmp_path / "none.csv"))
    with pytest.raises(DataError, match="is a folder"):
        load_rows(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="cannot be loaded as a hub set"):
        load_rows("no-such-org/no-such-set")
