"""Two scores against each other: a bootstrap that finds what is there and nothing else, and answers that flipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lco_lite.evaluation.compare import paired_bootstrap
from tests.evaluation.eval_cases import call

SEEDS = (0, 1)


def grid(items: int, seeds: int, seed: int) -> torch.Tensor:
    """[N, S] of -1, 0 and 1."""
    return torch.randint(-1, 2, (items, seeds), generator=torch.Generator().manual_seed(seed)).double()


# the bootstrap


@settings(max_examples=25, deadline=None)
@given(items=st.integers(1, 40), seeds=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_b_against_a_mirrors_a_against_b(items, seeds, seed):
    there = paired_bootstrap(grid(items, seeds, seed), resamples=400)
    back = paired_bootstrap(-grid(items, seeds, seed), resamples=400)
    assert there.mean == -back.mean and there.p == back.p
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert there.low - 1e-12 <= there.high and 0 < there.p <= 1


@pytest.mark.parametrize("shape", [(1, 1), (30, 4), (500, 1)])
def test_scores_that_are_the_same_have_p_1(shape):
    found = paired_bootstrap(torch.zeros(shape))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_shift_that_is_there_is_found_and_its_size_lies_in_the_interval():
    draw = torch.Generator().manual_seed(0)
    better = (torch.rand(500, 4, generator=draw) < 0.6).double()
    worse = (torch.rand(500, 4, generator=draw) < 0.5).double()
    found = paired_bootstrap(better - worse)
    assert found.low < 0.1 < found.high and found.low > 0 and found.p < 0.01


def test_luck_is_taken_for_a_difference_about_as_often_as_the_level_says():
    draw = torch.Generator().manual_seed(0)
    found = [paired_bootstrap(torch.randn(40, 1, generator=draw), seed=i, resamples=300).p for i in range(300)]
    assert 0.02 <= sum(p < 0.05 for p in found) / 300 <= 0.10


def test_the_interval_is_that_of_the_normal_distribution_for_many_items():
    values = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1)).double()
    found = paired_bootstrap(values)
    error = values.std().item() / 2000**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert (found.low + found.high) / 2 == pytest.approx(found.mean, abs=0.1 * error)


def test_few_seeds_widen_the_interval_where_seeds_differ():
    by_seed = torch.tensor([0.3, -0.1, 0.2, 0.0]).expand(1000, 4)
    found = paired_bootstrap(by_seed)
    assert found.low < 0 < found.high, "many items do not make up for seeds that disagree"


# the command

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Puts a score into a run: ``right`` is a verdict an item and seed."""

    def put(stage: str, right: list[list[bool]], run: str = "run", seeds: tuple[int, ...] = SEEDS, **more: Any) -> None:
        folder = tmp_path / run / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / run / "recipe.yaml").write_text(
            "name: run\ntask: arithmetic\nmodel: {path: x}\nsft: {enabled: false}\n"
        )
        rows = [
            {"seed": s, "sample": 0, "id": f"arithmetic/{i}", "extracted": f"{stage}{i}", "gold": "g", "right": r[k]}
            for k, s in enumerate(seeds)
            for i, r in enumerate(right)
        ]
        result = {
            "task": "arithmetic",
            "stage": stage,
            "mean": sum(map(sum, right)) / len(right) / len(seeds),
            "n": len(right),
            "settings": {"made_by": stage, "sampling": {"temperature": 0.6}, "protocol": {"few_shot": 0}, "items": "d"},
        }
        (folder / f"arithmetic--{stage}.json").write_text(json.dumps(result | more))
        (folder / f"arithmetic--{stage}.rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return put


def compare(folder: Path, *args: object) -> Any:
    return call("eval", *args, "--runs", folder)


def test_wins_losses_ties_and_flips_are_counted_by_item_and_shown(tmp_path, write):
    write("sft", [[True, True], [False, False], [True, False], [False, False]])
    write("rl-lch", [[False, False], [True, True], [True, True], [False, False]])
    made = json.loads(compare(tmp_path, "--compare", "sft", "rl-lch", "--json").stdout)["arithmetic"]
    assert (made["wins"], made["losses"], made["ties"]) == (2, 1, 1)
    assert made["difference"] == pytest.approx(1 / 8) and made["resamples"] == 10_000 and made["seeds"] == 2
    assert made["interval"][0] <= 1 / 8 <= made["interval"][1] and 0 < made["p"] <= 1
    assert [(f["id"], f["seed"], f["right"]) for f in made["flipped"]] == [
        ("arithmetic/0", 0, "a"),
        ("arithmetic/1", 0, "b"),
        ("arithmetic/0", 1, "a"),
        ("arithmetic/1", 1, "b"),
        ("arithmetic/2", 1, "b"),
    ]
    assert made["flipped"][0] | {"id": ""} == {
        "id": "", "seed": 0, "gold": "g", "a": "sft0", "b": "rl-lch0", "right": "a",
    }  # fmt: skip
    shown = compare(tmp_path, "arithmetic", "--compare", "sft", "rl-lch").stdout
    assert "sft 37.5 → rl-lch 50.0" in shown and "difference +12.5" in shown
    assert "2 wins, 1 losses, 1 ties" in shown and "rl-lch0" in shown


def test_the_other_way_round_everything_changes_sign(tmp_path, write):
    write("sft", [[True, True], [False, False], [True, False]])
    write("rl-lch", [[False, False], [True, True], [True, True]])
    one, two = (
        json.loads(compare(tmp_path, "--compare", *pair, "--json").stdout)["arithmetic"]
        for pair in (("sft", "rl-lch"), ("rl-lch", "sft"))
    )
    assert one["difference"] == -two["difference"] and one["p"] == two["p"]
    assert one["interval"] == pytest.approx([-x for x in reversed(two["interval"])])
    assert (one["wins"], one["losses"]) == (two["losses"], two["wins"])


def test_a_score_against_itself_in_another_run_has_p_1(tmp_path, write):
    right = [[True, False], [False, False], [True, True]]
    write("sft", right)
    write("sft", right, run="other")
    made = json.loads(compare(tmp_path, "--compare", "run/sft", "other/sft", "--json").stdout)["arithmetic"]
    assert made["p"] == 1 and made["difference"] == 0 and made["flipped"] == [] and made["ties"] == 3


def test_only_the_first_flips_are_shown_and_how_many_there_are_is_said(tmp_path, write):
    write("sft", [[True, True]] * 30)
    write("rl-kld", [[False, False]] * 30)
    shown = compare(tmp_path, "--compare", "sft", "rl-kld").stdout
    assert "the first 20 of 60" in " ".join(shown.split())
    assert "arithmetic/19" in shown and "arithmetic/20" not in shown


def test_other_seeds_are_averaged_over_and_other_settings_warned_of(tmp_path, write):
    settings = {"made_by": "x", "sampling": {"temperature": 0.0}, "protocol": {"few_shot": 0}, "items": "d"}
    write("sft", [[True, False], [False, False]])
    write("rl-kld", [[True], [True]], seeds=(0,), settings=settings)
    result = compare(tmp_path, "--compare", "sft", "rl-kld", "--json")
    made = json.loads(result.stdout)["arithmetic"]
    assert made["difference"] == pytest.approx(0.75) and made["seeds"] is None
    assert "other seeds" in result.stderr and "sampling.temperature: 0.6 → 0.0" in result.stderr


def test_items_that_fit_no_window_are_ties(tmp_path, write):
    write("sft", [[True, True]], n=4)
    write("rl-kld", [[False, False]], n=4)
    made = json.loads(compare(tmp_path, "--compare", "sft", "rl-kld", "--json").stdout)["arithmetic"]
    assert made["difference"] == -0.25 and made["ties"] == 3 and made["items"] == 4


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (("sft", "rl-lch"), "lco-lite eval arithmetic --policy rl-lch --name run --runs"),
        (("nowhere/sft", "sft"), "no run 'nowhere'"),
        (("sft", "run/"), "a stage of the run, or RUN/STAGE"),
        (("sft", "bare/base"), "lco-lite eval arithmetic --model MODEL --name bare"),
    ],
)
def test_a_score_that_is_missing_comes_with_the_command_that_makes_it(tmp_path, write, pair, told):
    (tmp_path / "bare").mkdir()
    write("sft", [[True, True]])
    result = compare(tmp_path, "--compare", *pair)
    assert result.exit_code == 2 and told in result.stderr


def test_scores_that_cannot_be_set_against_each_other_are_refused(tmp_path, write):
    write("sft", [[True, True]])
    write("rl-kld", [[True, True], [True, True]])
    other_items = compare(tmp_path, "--compare", "sft", "rl-kld")
    assert other_items.exit_code == 2 and "1 items and rl-kld on 2" in other_items.stderr
    write("rl-kld", [[True, True]], own=True)
    assert "not right or wrong" in compare(tmp_path, "--compare", "sft", "rl-kld").stderr
    both = compare(tmp_path, "--compare", "sft", "sft", "--policy", "sft")
    assert both.exit_code == 2 and "leave out" in both.stderr


def test_scores_that_were_really_made_can_be_compared(tiny):
    runs = tiny.parent / "runs"
    assert call("sft", tiny, "--runs", runs, "-q").exit_code == 0
    for policy in ("base", "sft"):
        made = call("eval", "--policy", policy, "--runs", runs, "-q")
        assert made.exit_code == 0, made.output
    result = call("eval", "--compare", "base", "sft", "--runs", runs)
    assert result.exit_code == 0, result.output
    assert "paired bootstrap over 8 items and 2 seeds, 10,000 resamples" in result.stdout
