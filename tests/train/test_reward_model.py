"""What train-rm holds out to measure accuracy on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from lco_lite.data.prompts import Pair
from lco_lite.errors import DataError
from lco_lite.sequences import Example
from lco_lite.train.reward_model import hold_out, load_pairs, save_pairs
from tests.train.test_chain import run_stage


def pairs(*prompts: int) -> list[Pair]:
    return [Pair(Example([prompt], [i, 1]), Example([prompt], [i, 2])) for i, prompt in enumerate(prompts)]


def prompts(side: list[Pair]) -> list[int]:
    return [pair.chosen.prompt[0] for pair in side]


@pytest.mark.parametrize(("n", "share"), [(20, 0.05), (30, 0.5), (7, 0.0), (1, 0.9), (5, 0.99)])
def test_with_a_pair_a_prompt_the_first_ones_are_held_out(n, share):
    made = pairs(*range(n))
    first = min(round(n * share), n - 1)
    assert hold_out(made, share) == (made[:first], made[first:])


def test_no_prompt_has_pairs_on_both_sides_and_order_stays():
    made = pairs(7, 8, 7, 9, 5, 8, 7, 6, 4, 3)
    held, trained = hold_out(made, 0.4)
    assert prompts(held) == [7, 7, 9, 7] and prompts(trained) == [8, 5, 8, 6, 4, 3]
    assert sorted(prompts(held + trained)) == sorted(prompts(made))


def test_a_prompt_with_more_pairs_than_the_share_makes_room_for_the_next():
    held, trained = hold_out(pairs(1, 1, 1, 2, 3, 4), 0.34)
    assert prompts(held) == [2, 3] and prompts(trained) == [1, 1, 1, 4]
    assert hold_out(pairs(1, 1, 1, 1), 0.5)[0] == []


def test_a_files_pairs_are_held_out_by_prompt_and_where_none_fit_that_is_said(tiny, capsys):
    data = tiny.parent / "pairs.jsonl"
    rows = [{"prompt": f"{i % 3}+1", "chosen": str(i % 3 + 1), "rejected": f"{i}?"} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [f"data.preferences={data}", "train_rm.max_steps=1", "train_rm.check_items=0"]
    ctx = run_stage(tiny, "rm", *sets, "train_rm.held_out=0.5")
    result = json.loads((ctx.run.stage("rm").path / "done.json").read_text())["result"]
    assert result["held_out_pairs"] == 4 and result["pairs"] == 8
    ctx = run_stage(tiny, "rm", *sets, "train_rm.held_out=0.2", name="none")
    assert "held_out_pairs" not in json.loads((ctx.run.stage("rm").path / "done.json").read_text())["result"]
    assert "every prompt has more pairs than that" in capsys.readouterr().err


def test_sampled_pairs_that_were_changed_or_cut_are_not_trained_on(tmp_path):
    file, made = tmp_path / "pairs.jsonl", pairs(1, 2, 3)
    chat = SimpleNamespace(text=str, tokenizer=SimpleNamespace(decode=str))
    save_pairs(file, made, chat)  # type: ignore[arg-type]
    assert load_pairs(file) == made
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for content, told in {
        whole.replace(b'"rejected_ids": [1, 2]', b'"rejected_ids": [1, 3]'): "damaged: line 2 is not as it was written",
        b"".join(lines[1:]): "damaged: line 1 is not as it was written",
        b"".join(lines[:-1]): "damaged: has 2 of its 3 pairs",
        whole[:-9]: "damaged: line 3: is not JSON",
        b"": "damaged: is empty",
    }.items():
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{told}.*Put it back as it was, or delete the file: the pairs are"):
            load_pairs(file)


def test_pairs_of_earlier_versions_have_no_seals_and_are_trained_on(tmp_path):
    file, ids = tmp_path / "pairs.jsonl", {"prompt_ids": [1], "chosen_ids": [0, 1], "rejected_ids": [0, 2]}
    file.write_text(json.dumps(ids) + "\n")
    assert load_pairs(file) == pairs(1)
    file.write_text(json.dumps({"prompt_ids": [1]}) + "\n")
    with pytest.raises(DataError, match="a line has no field 'chosen_ids'. Put it back"):
        load_pairs(file)
