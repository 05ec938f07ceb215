"""Rows of every common shape become the same conversations; malformed ones are named by line."""

import json

import pytest

from lco_lite.data.rows import Prompt, read_demonstrations, read_preferences, read_prompts
from lco_lite.errors import DataError
from lco_lite.recipe.sections import DemonstrationColumns, PreferenceColumns, PromptColumns
from lco_lite.tables import load_rows

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
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    ],
)
def test_demonstrations_of_every_shape_read_alike(tmp_path, row):
    (found,) = read_demonstrations(write(tmp_path / "d.jsonl", [row]))
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
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        {
            "prompt": "2+2?",  # as UltraFeedback has it, messages and scores beside
            "chosen": [USER, {"role": "assistant", "content": "4"}],
            "rejected": [USER, {"role": "assistant", "content": "5"}],
            "messages": [USER, {"role": "assistant", "content": "4"}],
            "score_chosen": 8.0,
        },
    ],
)
def test_preferences_of_every_shape_read_alike(tmp_path, row):
    (found,) = read_preferences(write(tmp_path / "p.jsonl", [row]))
    assert (found.messages, found.chosen, found.rejected) == ([USER], "4", "5")


def test_an_instruction_takes_its_input_along(tmp_path):
    (found,) = read_demonstrations(
        write(tmp_path / "d.jsonl", [{"instruction": "Add.", "input": "2 2", "output": "4"}])
    )
    assert found.messages[0]["content"] == "Add.\n\n2 2"


def test_a_system_text_is_put_before_a_conversation_that_has_none(tmp_path):
    rows = [{"prompt": "a"}, {"messages": [{"role": "system", "content": "own"}, USER]}]
    first, second = read_prompts(write(tmp_path / "p.jsonl", rows), system="be brief")
    assert first.messages[0] == {"role": "system", "content": "be brief"}
    assert second.messages[0]["content"] == "own"


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"conversations": [{"from": "human", "value": "a"}]}])
def test_a_rows_own_system_message_goes_before_the_recipes(tmp_path, row):
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", [{**row, "system": "own"}]), system="be brief")
    assert [m["content"] for m in prompt.messages] == ["own", "a"]


def test_a_prompt_row_drops_the_answer_that_it_carries(tmp_path):
    row = {"messages": [USER, {"role": "assistant", "content": "4"}]}
    assert read_prompts(write(tmp_path / "p.jsonl", [row])) == [Prompt([USER], row=row)]


def test_transcripts_part_where_they_first_differ_and_may_end_in_silence(tmp_path):
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nHuman: Please."
    long = {"chosen": f"{shared}\n\nAssistant: 4", "rejected": f"{shared}\n\nAssistant: 5\n\nHuman: no\n\nAssistant: 4"}
    silent = {"chosen": f"{shared}\n\nAssistant: 4", "rejected": f"{shared}\n\nAssistant:"}
    first, second = read_preferences(write(tmp_path / "p.jsonl", [long, silent]))
    assert [m["content"] for m in first.messages] == ["Hi", "Hello", "2+2?\n\nPlease."]
    assert (first.chosen, first.rejected) == ("4", "5")
    assert (second.chosen, second.rejected) == ("4", "")


@pytest.mark.parametrize("prompt", [{}, {"prompt": "2+2?"}, {"prompt": [USER]}, {"prompt": "Sure?"}])
def test_conversations_that_differ_in_the_last_turn_keep_all_turns_before_it(tmp_path, prompt):
    before = [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]
    answers = [{"role": "assistant", "content": text} for text in ("Yes.", "No.")]
    row = {**prompt, "chosen": [*before, answers[0]], "rejected": [*before, answers[1]]}
    (found,) = read_preferences(write(tmp_path / "p.jsonl", [row]))
    assert (found.messages, found.chosen, found.rejected) == (before, "Yes.", "No.")
    after = {"prompt": "2+2?", "chosen": [*before[1:], answers[0]], "rejected": [*before[1:], answers[1]]}
    assert read_preferences(write(tmp_path / "after.jsonl", [after])) == [found]


def turns(*texts):
    """Turns of user and assistant, after a system message where the first text is in brackets."""
    lead = [{"role": "system", "content": texts[0]}] if texts[0].startswith("[") else []
    roles = ("user", "assistant") * len(texts)
    return lead + [{"role": r, "content": t} for r, t in zip(roles, texts[len(lead) :], strict=False)]


@pytest.mark.parametrize(
    ("prompt", "before", "kept"),
    [
        (turns("[s]", "q"), turns("q"), turns("[s]", "q")),
        (turns("q"), turns("[s]", "q"), turns("[s]", "q")),
        (turns("[s]", "q"), turns("[t]", "q"), turns("[s]", "q")),
        ("Q", [{"role": "system", "content": "[s]"}], turns("[s]", "Q")),
        (turns("[s]", "q"), turns("hello", "hi", "q"), turns("[s]", "hello", "hi", "q")),
        ("Q", turns("hello", "hi", "Q "), turns("hello", "hi", "Q ")),
        ("Q\n", turns("Q", "hi", "more"), turns("Q", "hi", "more")),
        (turns("hello", "hi", "q"), turns("q"), turns("hello", "hi", "q")),
        (turns("hello", "hi", "q"), turns("hello", "hi", "q"), turns("hello", "hi", "q")),
        ("Q", turns("In short: Q"), turns("Q")),
    ],
)
def test_of_a_prompt_and_whole_conversations_no_turn_is_lost(tmp_path, prompt, before, kept):
    chosen, rejected = ([*before, {"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    (found,) = read_preferences(write(tmp_path / "p.jsonl", [row]))
    assert (list(found.messages), found.chosen, found.rejected) == (kept, "Yes.", "No.")


def test_a_prompt_ends_before_all_that_the_assistant_says_last(tmp_path):
    row = {"messages": [*turns("q", "a"), {"role": "assistant", "content": "b"}]}
    assert read_prompts(write(tmp_path / "p.jsonl", [row])) == [Prompt(turns("q"), row=row)]


COMPARED = {
    "question": "Who?",
    "passages": [["Title", "First.", "Second."]],
    **{f"prediction {i}": f"answer {i}" for i in (1, 2, 3, 4)},
    "preference": [1, 2, 0, 0, 0, 1],
}


def test_every_comparison_of_a_qa_feedback_row_with_a_winner_is_a_pair(tmp_path):
    found = read_preferences(write(tmp_path / "p.jsonl", [COMPARED]))
    assert [(p.chosen[-1], p.rejected[-1]) for p in found] == [("1", "2"), ("3", "1"), ("3", "4")]
    assert found[0].messages[0]["content"] == "question: Who? context: wikipage: Title text: First. Second."


def test_columns_of_other_names_are_read_where_the_recipe_names_them(tmp_path):
    row = {"q": "2+2?", "a": "4", "b": "5", "prompt": "hidden", "completion": "hidden", "who": "own"}
    row["messages"] = [{"role": "user", "content": "hidden"}, {"role": "assistant", "content": "hidden"}]
    file = write(tmp_path / "d.jsonl", [row])
    (shown,) = read_demonstrations(file, columns=DemonstrationColumns(prompt="q", response="a", system="who"))
    assert shown.messages == [{"role": "system", "content": "own"}, USER] and shown.response == "4"
    (pair,) = read_preferences(file, columns=PreferenceColumns(prompt="q", chosen="a", rejected="b"))
    assert (pair.messages, pair.chosen, pair.rejected) == ([USER], "4", "5")
    (prompt,) = read_prompts(file, columns=PromptColumns(prompt="q"))
    assert prompt.messages == [USER] and prompt.row["a"] == "4"
    with pytest.raises(
        DataError, match=r"d\.jsonl, line 1: has no column 'none', which the recipe names as prompt; found q, a"
    ):
        read_prompts(file, columns=PromptColumns(prompt="none"))


TURN = {"role": "assistant", "content": "b"}
HUMAN = "\n\nHuman: a"


@pytest.mark.parametrize(
    ("read", "row", "named"),
    [
        (read_demonstrations, {"prompt": "a"}, "no response: one of completion"),
        (
            read_demonstrations,
            {"prompt": "a", "completion": None},
            "field completion: text or a list of turns is needed",
        ),
        (read_demonstrations, {"prompt": "a", "completion": "  "}, "field completion"),
        (read_demonstrations, {"prompt": "a", "completion": 7}, "found 7"),
        (read_demonstrations, {"prompt": "a", "completion": [USER]}, "ends with a turn of user"),
        (read_demonstrations, {"prompt": None, "completion": "b"}, "no prompt"),
        (read_demonstrations, {"prompt": "", "completion": "b"}, "no prompt"),
        (read_demonstrations, {"messages": [USER]}, "found roles user"),
        (read_demonstrations, {"messages": [TURN]}, "found roles assistant"),
        (read_demonstrations, {"messages": "a"}, "field messages: text or a list of turns"),
        (read_demonstrations, {"messages": [USER, {"role": "assistant"}]}, "a turn is {role"),
        (read_demonstrations, {"messages": [USER, {"role": "assistant", "content": None}]}, "a turn is {role"),
        (read_demonstrations, {"prompt": "a", "completion": "b", "system": ["c"]}, "field system: a text is needed"),
        (read_demonstrations, {}, "found no fields"),
        (read_preferences, {"prompt": "a", "chosen": "b"}, "field rejected is missing"),
        (read_preferences, {"prompt": "a", "chosen": "b", "rejected": None}, "field rejected"),
        (read_preferences, {"prompt": "a", "chosen": "b", "rejected": ""}, "field rejected"),
        (read_preferences, {"chosen": "b", "rejected": "c"}, "no prompt"),
        (read_preferences, {"chosen": f"{HUMAN}\n\nAssistant: b", "rejected": "c"}, "a transcript is needed"),
        (read_preferences, {"chosen": HUMAN, "rejected": HUMAN}, "does not answer the user"),
        (
            read_preferences,
            {"chosen": f"{HUMAN}\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: c"},
            "does not",
        ),
        (
            read_preferences,
            {"chosen": [USER, TURN, USER, TURN], "rejected": [USER, {**TURN, "content": "c"}, USER, TURN]},
            "found 4 and 4 turns, of which the first 1 are the same",
        ),
        (
            read_preferences,
            {"prompt": "2+2?", "chosen": [USER, TURN], "rejected": [USER, TURN, USER, TURN]},
            "found 2 and 4 turns, of which the first 2 are the same",
        ),
        (
            read_preferences,
            {"chosen": [USER, TURN], "rejected": [{**USER, "content": "3+3?"}, TURN]},
            "found 2 and 2 turns, of which the first 0 are the same",
        ),
        (
            read_preferences,
            {"prompt": "z", "chosen": turns("q", "a", "p", "b"), "rejected": turns("q", "a", "p", "c")},
            "that chosen and rejected begin with, or to hold them; found 1 turns up to 'z', and 3 up to 'p'",
        ),
        (read_preferences, {**COMPARED, "preference": [1, 2]}, "6 labels, 0, 1 or 2, are needed"),
        (read_preferences, {**COMPARED, "preference": [1, 2, 3, 0, 0, 0]}, "6 labels, 0, 1 or 2, are needed"),
        (read_preferences, {**COMPARED, "prediction 2": ""}, "field prediction 2"),
        (read_preferences, {**COMPARED, "passages": ["text"]}, "neither wikipage and content"),
        (read_preferences, {**COMPARED, "question": None}, "field question"),
        (read_prompts, {"text": "a"}, "found text"),
        (read_prompts, {"messages": [{"role": "robot", "content": "a"}]}, "robot"),
        (read_prompts, {"messages": [["user", "a"]]}, "a turn is {role"),
        (read_prompts, {"prompt": 7}, "no prompt"),
        (read_prompts, {"instruction": "sum", "input": [2, 2]}, "field input: a text is needed, found [2, 2]"),
        (read_demonstrations, {"instruction": "sum", "input": {"a": 2}, "output": "4"}, "field input"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(tmp_path, read, row, named):
    good = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2") as e:
        read(write(tmp_path / "bad.jsonl", [good, row]))
    assert named in str(e.value)


def test_a_file_without_a_winner_has_no_pairs(tmp_path):
    with pytest.raises(DataError, match="has no pairs"):
        read_preferences(write(tmp_path / "p.jsonl", [{**COMPARED, "preference": [0] * 6}]))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("x.csv", b"question;answer\na;b\n", "found question;answer"),
        ("x.csv", b"", "x.csv, line 1: is empty"),
        ("x.parquet", b"PAR1 and nothing of it", "cannot be loaded as a parquet file"),
        ("x.json", b"[{", "is not JSON"),
        ("x.json", b'[{"prompt": ' + b"1" * 5000 + b"}]", "x.json: Exceeds the limit"),
        ("x.json", b'[\n{"prompt" "a"}]', "delimiter at line 2, column 11"),
        ("x.json", b'[{"prompt": "\\ud800"}]', "half of a surrogate pair"),
        ("x.json", b"[1]", "row 1: is not an object"),
        ("x.json", b'[{"prompt": "a", "b": {"c; d": 1, "e": 2, "c; d": 1}}]', "x.json: the field 'c; d' stands twice"),
        ("x.jsonl", b'{"prompt": "a", "completion": "b", "prompt": "c"}', "line 1: the field 'prompt' stands twice"),
        ("x.json", b"[]", "has no rows"),
        ("x.json", b'["\xff"]', "is not UTF-8"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.jsonl", b'{"prompt": "a"\n', "line 1: is not JSON"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as e:
        read_demonstrations(str(tmp_path / name))
    assert named in str(e.value) and name in str(e.value) and "\n" not in str(e.value)


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


def test_a_json_file_of_one_object_a_line_is_read_as_such(tmp_path):
    (tmp_path / "x.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [row["prompt"] for row in load_rows(str(tmp_path / "x.json"))] == ["a", "b"]


def test_the_human_preferences_of_qa_feedback_are_those_of_its_pairs(tmp_path):
    """2,616 labels with a winner of 500 questions, as another reading of the same file has them."""
    import os
    from pathlib import Path

    folder = Path(os.environ.get("LCO_LITE_DATA", ""))
    if not (folder / "qa_feedback_dev_feedback.jsonl").is_file():
        pytest.skip("LCO_LITE_DATA names no folder with qa_feedback_dev_feedback.jsonl")
    ours = read_preferences(str(folder / "qa_feedback_dev_feedback.jsonl"))
    theirs = read_preferences(str(folder / "qa_feedback_dev_pairs.jsonl"))
    assert [(p.chosen, p.rejected) for p in ours] == [(p.chosen, p.rejected) for p in theirs]


def test_an_answer_inside_a_list_under_prompt_is_left_out_of_prompts_and_is_a_demonstration(tmp_path):
    row = {"prompt": turns("a", "b")}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = read_prompts(str(tmp_path / "d.jsonl"))
    (shown,) = read_demonstrations(str(tmp_path / "d.jsonl"))
    assert [*prompt.messages] == [*shown.messages] == turns("a") and shown.response == "b"


def test_of_a_completion_of_several_turns_the_last_is_learned_after_the_others(tmp_path):
    more, asked = {"role": "assistant", "content": "Which base?"}, {"role": "user", "content": "Ten."}
    last, system = {"role": "assistant", "content": "4"}, {"role": "system", "content": "Add."}
    rows = [
        {"prompt": [USER], "completion": [more, asked, last]},
        {"prompt": [system], "completion": [USER, last]},
        {"prompt": [USER], "completion": [USER, more, asked, last]},
    ]
    shown = read_demonstrations(write(tmp_path / "rows.jsonl", rows))
    assert [list(d.messages) for d in shown] == [[USER, more, asked], [system, USER], [USER, more, asked]]
    assert {d.response for d in shown} == {"4"}


def test_of_conversations_that_the_recipe_names_nothing_else_is_learned(tmp_path):
    turns = [USER, {"role": "assistant", "content": "4"}]
    rows = [{"talk": turns, "output": "5"}, {"talk": turns, "prompt": "3+3?", "chosen": "6", "rejected": "7"}]
    columns = DemonstrationColumns(messages="talk")
    shown = read_demonstrations(write(tmp_path / "rows.jsonl", rows), None, columns)
    assert {(d.messages[-1]["content"], d.response) for d in shown} == {("2+2?", "4")}
