"""Two scores against each other: a bootstrap that finds what is there and nothing else, and answers that flipped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lco_lite.evaluation.compare import paired_bootstrap, welch
from lco_lite.files import sha256
from lco_lite.run import Run
from tests.evaluation.eval_cases import call

SEEDS = (0, 1)


def differences(items: int, seed: int) -> torch.Tensor:
    """[N] of -1, 0 and 1."""
    return torch.randint(-1, 2, (items,), generator=torch.Generator().manual_seed(seed)).double()


# the bootstrap over items


@settings(max_examples=25, deadline=None)
@given(items=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_b_against_a_mirrors_a_against_b(items, seed):
    there = paired_bootstrap(differences(items, seed), resamples=400)
    back = paired_bootstrap(-differences(items, seed), resamples=400)
    assert there.mean == -back.mean and there.p == back.p
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert there.low - 1e-12 <= there.high and 0 < there.p <= 1


@pytest.mark.parametrize("items", [1, 30, 500])
def test_scores_that_are_the_same_have_p_1(items):
    found = paired_bootstrap(torch.zeros(items))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_the_interval_is_that_of_the_normal_distribution_for_many_items():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1)).double()
    found = paired_bootstrap(values)
    error = values.std().item() / 2000**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert (found.low + found.high) / 2 == pytest.approx(found.mean, abs=0.1 * error)


EXPERIMENTS, ITEMS, PASSES = 400, 500, 4


def experiments(gain: float) -> list[torch.Tensor]:
    """Item differences, experiment by experiment: items of unequal difficulty Beta(0.7, 0.7), answered in every pass by
    A and by B, who is better by ``gain`` on average, and most on items that are neither sure nor hopeless."""
    rng, draw, made = random.Random(0), torch.Generator().manual_seed(0), []
    for _ in range(EXPERIMENTS):
        of_a = torch.tensor([rng.betavariate(0.7, 0.7) for _ in range(ITEMS)])
        of_b = of_a + gain * of_a * (1 - of_a) / (0.49 / (1.4 * 2.4))  # E[p(1 - p)]
        right = [(torch.rand(ITEMS, PASSES, generator=draw) < p[:, None]).double().mean(1) for p in (of_a, of_b)]
        made.append(right[1] - right[0])
    return made


def found_by_bootstrap(made: list[torch.Tensor]) -> float:
    return sum(paired_bootstrap(d, seed=i, resamples=400).p < 0.05 for i, d in enumerate(made)) / len(made)


def found_by_t_test(made: list[torch.Tensor]) -> float:
    """By items; 1.965 is the quantile of t with 499 degrees of freedom."""
    return sum(abs(d.mean() / d.std()).item() * ITEMS**0.5 > 1.965 for d in made) / len(made)


def test_two_equal_models_differ_as_often_as_the_level_says():
    made = experiments(0.0)
    # 400 experiments of which 5 % reject: 99.8 % of the counts lie between 9 and 35
    found = found_by_bootstrap(made)
    assert 9 <= EXPERIMENTS * found <= 35 and found == pytest.approx(found_by_t_test(made), abs=0.015)


def test_a_gain_of_3_4_points_is_found_as_often_as_by_a_t_test_over_items():
    made = experiments(0.034)
    found = found_by_bootstrap(made)
    assert found == pytest.approx(0.80, abs=0.06)  # three standard errors
    assert found == pytest.approx(found_by_t_test(made), abs=0.03)


# the t-test over training runs


def test_welch_is_that_of_r():
    """t.test(b, a) of R on these numbers; to more digits, scipy's ttest_ind(equal_var=False)."""
    found = welch([0.30, 0.34, 0.33], [0.40, 0.38, 0.45])
    assert (found["n_a"], found["n_b"]) == (3, 3) and found["difference"] == pytest.approx(0.0866666667)
    assert found["degrees"] == pytest.approx(3.2) and found["p"] == pytest.approx(0.03293284525581)
    assert found["interval"] == pytest.approx([0.0128050515546004, 0.1605282817787329])
    fewer = welch([0.3, 0.31], [0.3, 0.5, 0.4, 0.45])
    assert fewer["degrees"] == pytest.approx(3.0811114577635865) and fewer["p"] == pytest.approx(0.08543154627017417)
    assert fewer["interval"] == pytest.approx([-0.02729007772625, 0.24229007772625])


@settings(max_examples=50, deadline=None)
@given(a=st.lists(st.floats(0, 1), min_size=2, max_size=6), b=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_interval_of_runs_leaves_0_out_exactly_where_p_is_below_5_percent(a, b):
    found = welch(a, b)
    if found["p"] is None:
        assert max(a) - min(a) < 1e-11 > max(b) - min(b)
        return
    low, high = found["interval"]
    assert found["p"] == pytest.approx(0.05) or (low <= 0 <= high) == (found["p"] > 0.05)
    back = welch(b, a)
    assert back["p"] == found["p"] and back["interval"] == pytest.approx([-high, -low])


def test_runs_of_unequal_number_and_spread_differ_as_often_as_the_level_says():
    rng = random.Random(0)
    found = [welch([rng.gauss(0, 1) for _ in range(3)], [rng.gauss(0, 3) for _ in range(5)])["p"] for _ in range(400)]
    assert 9 <= sum(p < 0.05 for p in found) <= 35


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
            {"seed": s, "sample": 0, "id": f"arithmetic/{i}", "response": "", "extracted": f"{stage}{i}", "gold": "g"}
            | {"right": r[k]}
            for k, s in enumerate(seeds)
            for i, r in enumerate(right)
        ]
        told = {"mean": sum(map(sum, right)) / len(right) / len(seeds), "std": None, "stderr": None}
        result = {
            "task": "arithmetic",
            "stage": stage,
            "metric": "pass@1",
            **told,
            "metrics": {"pass@1": told},
            "n": len(right),
            "seeds": len(seeds),
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
    assert made["difference"] == pytest.approx(1 / 8) and made["resamples"] == 10_000 and "runs" not in made
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


def test_responses_that_are_not_those_of_the_score_are_refused(tmp_path, write):
    right = [[True, True], [False, False]]
    write("sft", right)
    write("rl-lch", right)
    score = tmp_path / "run/eval/arithmetic--sft.json"
    rows = tmp_path / "run/eval/arithmetic--sft.rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    score.write_text(json.dumps(json.loads(score.read_text()) | {"rows_sha256": sha256(rows)}))
    assert compare(tmp_path, "--compare", "sft", "rl-lch").exit_code == 0
    rows.write_text("".join(lines[:-1]))  # of another size
    told = compare(tmp_path, "--compare", "sft", "rl-lch")
    assert told.exit_code == 2 and "sft.rows.jsonl: has changed" in told.stderr
    write("sft", right)
    rows.write_text(lines[0] + '{"seed": 0}\n' + "".join(lines[2:]))
    told = compare(tmp_path, "--compare", "sft", "rl-lch")
    assert told.exit_code == 2 and "sft.rows.jsonl, line 2: damaged: id is missing" in told.stderr
    score.write_text("{")
    told = compare(tmp_path, "--compare", "sft", "rl-lch")
    assert told.exit_code == 2 and "sft.json: damaged: is not JSON" in told.stderr


def test_other_seeds_are_averaged_over_and_other_settings_warned_of(tmp_path, write):
    settings = {"made_by": "x", "sampling": {"temperature": 0.0}, "protocol": {"few_shot": 0}, "items": "d"}
    write("sft", [[True, False], [False, False]])
    write("rl-kld", [[True], [True]], seeds=(0,), settings=settings)
    result = compare(tmp_path, "--compare", "sft", "rl-kld", "--json")
    made = json.loads(result.stdout)["arithmetic"]
    assert made["difference"] == pytest.approx(0.75)
    assert "sampling.temperature: 0.6 → 0.0" in result.stderr


RUNS = {  # by run, a verdict an item and seed
    "a1": [[True, False], [False, False], [False, False], [True, True]],
    "a2": [[True, True], [False, False], [False, False], [False, False]],
    "b1": [[True, True], [True, True], [False, False], [True, True]],
    "b2": [[True, True], [True, False], [True, False], [True, True]],
    "b3": [[True, True], [False, False], [False, True], [True, True]],
}


def put_runs(write: Write) -> tuple[str, str]:
    for run, right in RUNS.items():
        same = {"sampling": {"temperature": 0.6}, "protocol": {"few_shot": 0}, "items": "d"}
        write("rl-lch", right, run=run, settings={"made_by": run, **same})
    return tuple(",".join(f"{run}/rl-lch" for run in RUNS if run[0] == side) for side in "ab")


def test_training_runs_are_averaged_over_item_by_item_and_tested_apart(tmp_path, write):
    pair = put_runs(write)
    made = json.loads(compare(tmp_path, "arithmetic", "--compare", *pair, "--json").stdout)["arithmetic"]
    by_run = {run: sum(map(sum, right)) / 8 for run, right in RUNS.items()}
    a, b = ([score for run, score in by_run.items() if run[0] == side] for side in "ab")
    assert made["runs"] == welch(a, b) and made["runs"]["n_b"] == 3
    assert made["runs"]["difference"] == pytest.approx(sum(b) / 3 - sum(a) / 2) == pytest.approx(made["difference"])
    of_items = [
        sum(sum(RUNS[run][i]) for run in ("b1", "b2", "b3")) / 6 - sum(sum(RUNS[run][i]) for run in ("a1", "a2")) / 4
        for i in range(4)
    ]
    found = paired_bootstrap(torch.tensor(of_items, dtype=torch.float64))
    assert made["interval"] == pytest.approx([found.low, found.high]) and made["p"] == found.p
    assert (made["wins"], made["losses"], made["flipped"]) == (4, 0, [])
    shown = " ".join(compare(tmp_path, "arithmetic", "--compare", *pair).stdout.split())
    assert "over training runs: 70.8 ± 7.2 (3) against 31.2 ± 8.8 (2), Welch 95 % interval" in shown


def test_one_run_against_several_has_no_test_of_runs(tmp_path, write):
    _, several = put_runs(write)
    result = compare(tmp_path, "arithmetic", "--compare", "a1/rl-lch", several, "--json")
    made = json.loads(result.stdout)["arithmetic"]
    assert "runs" not in made and made["difference"] == pytest.approx(17 / 24 - 3 / 8) and result.stderr == ""


def test_runs_that_do_not_vary_have_no_test(tmp_path, write):
    for run in ("c", "d", "e", "f"):
        write(
            "sft",
            [[run < "e", True]],
            run=run,
            settings={"made_by": run, "sampling": {"temperature": 0.6}, "protocol": {}, "items": "d"},
        )
    shown = compare(tmp_path, "arithmetic", "--compare", "c/sft,d/sft", "e/sft,f/sft").stdout
    assert "(2), no spread to test with" in " ".join(shown.split())


def test_the_same_weights_are_not_several_training_runs(tmp_path, write):
    put_runs(write)
    twice = compare(tmp_path, "arithmetic", "--compare", "a1/rl-lch", "b1/rl-lch,b1/rl-lch")
    assert twice.exit_code == 2 and "b1/rl-lch is named twice" in twice.stderr
    write("base", [[True, True]], run="a1")
    write("base", [[True, True]], run="a2")
    copied = compare(tmp_path, "arithmetic", "--compare", "a1/base", "a1/base,a2/base")
    assert copied.exit_code == 0 and "a1/base and a2/base are the same weights" in " ".join(copied.stderr.split())


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
        (("sft", "run/sft,nowhere/sft"), "no run 'nowhere'"),
        (("sft", "run/sft,"), "a stage of the run, or RUN/STAGE"),
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
    write("rl-kld", [[True, True]], own=True, metric="mean_length")
    own = " ".join(compare(tmp_path, "--compare", "rl-kld", "rl-kld").stderr.split())
    assert "not right or wrong, and its mean_length is not there item by item" in own
    both = compare(tmp_path, "--compare", "sft", "sft", "--policy", "sft")
    assert both.exit_code == 2 and "leave out" in both.stderr


def test_a_score_of_weights_that_are_no_more_is_told(tmp_path, write):
    write("sft", [[True, True]])
    write("rl-kld", [[True, True]])
    stage = Run(tmp_path / "run").stage("rl-kld")
    stage.begin({"seed": 1}, {})
    stage.finish({})
    assert "a score of other weights than rl-kld has now" in compare(tmp_path, "--compare", "sft", "rl-kld").stderr
    settings = {"made_by": stage.id(), "sampling": {"temperature": 0.6}, "protocol": {"few_shot": 0}, "items": "d"}
    write("rl-kld", [[True, True]], settings=settings)
    assert "other weights" not in compare(tmp_path, "--compare", "sft", "rl-kld").stderr


def test_scores_of_other_prompts_are_refused_where_no_gold_answer_tells_them_apart(tmp_path, write):
    settings = {"made_by": "x", "sampling": {"temperature": 0.6}, "items": "d", "protocol": {"template": "{problem}"}}
    for stage, digest, prompt in (("sft", "d", "a"), ("rl-kld", "e", "b"), ("rl-lch", "f", "a")):
        write(stage, [[True, True]], settings=settings | {"items": digest, "made_by": stage})
        file = tmp_path / "run" / "eval" / f"arithmetic--{stage}.rows.jsonl"
        rows = [json.loads(line) | {"prompt": prompt, "gold": ""} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(tmp_path, "--compare", "sft", "rl-lch").exit_code == 0
    told = compare(tmp_path, "--compare", "sft", "rl-kld")
    assert told.exit_code == 2 and "they are not the same" in told.stderr


def test_scores_that_were_really_made_can_be_compared(tiny):
    runs = tiny.parent / "runs"
    assert call("sft", tiny, "--runs", runs, "-q").exit_code == 0
    for policy in ("base", "sft"):
        made = call("eval", "--policy", policy, "--runs", runs, "-q")
        assert made.exit_code == 0, made.output
    result = call("eval", "--compare", "base", "sft", "--runs", runs)
    assert result.exit_code == 0, result.output
    assert "paired bootstrap over 8 items, 10,000 resamples" in result.stdout
    assert "8 items are few" in result.stdout
