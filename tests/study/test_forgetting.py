from pathlib import Path

import pytest

from lco_lite.errors import UsageError
from lco_lite.recipe.file import load_recipe
from lco_lite.study.base import Results
from lco_lite.study.forgetting import METHODS, Forgetting, gain, loss, loss_per_gain, others

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "forgetting.yaml"
STUDY = Forgetting()


def result(task, mean):
    return {"task": task, "mean": mean, "std": 0.0, "n": 500, "metrics": {}}


def row(label, seed, gained, *lost, failed=None):
    """0.3 before on the trained task, 0.5 on each other one."""
    tasks = {"arithmetic": {"before": result("arithmetic", 0.3)}}
    tasks |= {f"other{i}": {"before": result(f"other{i}", 0.5)} for i in range(len(lost))}
    if failed is None:
        tasks["arithmetic"]["after"] = result("arithmetic", 0.3 + gained)
        for i, one in enumerate(lost):
            tasks[f"other{i}"]["after"] = result(f"other{i}", 0.5 - one)
    own = tasks["arithmetic"]
    made = {"label": label, "seed": seed, "tasks": tasks, "failed": failed}
    return made | {"before": own["before"], "after": own.get("after")}


def rows(label, gained, lost):
    return [row(label, seed, gained + 0.01 * (seed % 3), lost + 0.01 * (seed % 2)) for seed in range(1, 9)]


def claims(*made):
    report = STUDY.report(Results([one for group in made for one in group]))
    return {claim.name: claim for claim in report.claims}


def test_every_method_draws_as_many_responses_with_as_many_passes():
    recipe = load_recipe(RECIPE)
    cells = STUDY.cells(recipe, [1, 2], Results())
    assert len(cells) == 2 * len(METHODS)
    for cell in cells:
        assert cell.sets["rl.prompts_per_step"] * cell.sets["rl.responses_per_prompt"] == 640
        load = load_recipe(RECIPE, [f"{name}={value}" for name, value in cell.sets.items()])
        assert load.rl.steps == 3 and load.rl.inner_epochs == 3


def test_learning_rates_are_those_measured_on_the_quickstart_and_in_proportion_elsewhere():
    def rates(recipe):
        return {cell.label: cell.sets["rl.lr"] for cell in STUDY.cells(recipe, [1], Results())}

    here = rates(load_recipe(RECIPE))
    assert (here["kld"], here["gkd"], here["raft"], here["ppo"]) == (3e-3, 3e-3, 1e-3, 3e-4)
    there = rates(load_recipe(RECIPES / "smollm2.yaml", ["eval.tasks=[arithmetic, mmlu]"]))
    assert (there["kld"], there["ppo"]) == (1e-4, 1e-5)


@pytest.mark.parametrize("tasks", ["null", "[arithmetic]", "[mmlu]", "[arithmetic, arithmetic]"])
def test_a_recipe_that_scores_no_other_task_is_refused_with_what_to_add(tasks):
    recipe = load_recipe(RECIPES / "smollm2.yaml", [f"eval.tasks={tasks}"])
    with pytest.raises(UsageError, match=r"Add --set 'eval.tasks=\[arithmetic, OTHER\]'"):
        STUDY.cells(recipe, [1], Results())


def test_a_loss_is_the_mean_over_the_tasks_that_are_not_the_recipes_own():
    one = row("kld", 1, 0.4, 0.1, 0.3)
    assert list(others(one)) == ["other0", "other1"]
    assert gain(one) == pytest.approx(0.4)
    assert loss(one) == pytest.approx(0.2)
    assert loss_per_gain(one) == pytest.approx(0.5)


def test_nothing_is_divided_by_a_gain_that_is_none():
    assert loss_per_gain(row("ppo", 1, 0.05 - 1e-9, 0.1)) is None
    assert loss_per_gain(row("ppo", 1, -0.2, 0.1)) is None


def test_a_run_that_diverged_has_neither_gain_nor_loss_and_is_told():
    lost = row("kld", 1, 0.4, 0.1, failed="the loss is not a number")
    assert gain(lost) is None and loss(lost) is None and loss_per_gain(lost) is None
    report = STUDY.report(Results([lost, *rows("ppo", 0.4, 0.1)]))
    assert any("kld, seed 1" in note for note in report.notes)


def test_kld_that_loses_less_at_the_same_gain_reproduces_both_claims():
    found = claims(rows("kld", 0.4, 0.05), rows("ppo", 0.4, 0.25), rows("grpo", 0.4, 0.25))
    assert len(found) == 4
    assert {claim.verdict for claim in found.values()} == {"reproduced"}


def test_kld_that_loses_more_for_a_larger_gain_is_not_held_against_it_per_gain():
    found = claims(rows("kld", 0.5, 0.10), rows("ppo", 0.1, 0.06))
    assert found["C7, loss against ppo"].verdict == "not reproduced"
    assert found["C7, loss per gain against ppo"].verdict == "reproduced"
    assert "ppo gained 0.1" in found["C7, loss against ppo"].why


def test_a_baseline_that_learns_nothing_leaves_the_claim_per_gain_open():
    found = claims(rows("kld", 0.5, 0.10), rows("grpo", 0.0, 0.0))
    assert found["C7, loss against grpo"].verdict == "not reproduced"
    assert found["C7, loss per gain against grpo"].verdict == "unclear"
    assert "grpo: 0 of 8 seeds did" in found["C7, loss per gain against grpo"].why


def test_claims_are_unclear_before_anything_ran():
    report = STUDY.report(Results())
    assert {claim.verdict for claim in report.claims} == {"unclear"}
    assert not report.plots


def test_the_table_has_gain_and_loss_of_every_method_and_the_csv_every_seed():
    report = STUDY.report(Results([*rows("kld", 0.4, 0.05), *rows("grpo", 0.0, 0.0)]))
    shown, seeds = report.tables
    assert [line[0] for line in shown.rows] == ["kld", "grpo"]
    assert "loss, other0" in shown.columns and "gain" in shown.columns
    assert shown.rows[1][-1] == "– (0 of 8)"
    assert len(seeds.rows) == 2 * 8 * 2


def test_the_picture_has_a_mean_with_its_bars_for_every_method():
    from matplotlib.figure import Figure

    report = STUDY.report(Results([*rows("kld", 0.4, 0.05), row("ppo", 1, 0.1, 0.2)]))
    figure = Figure()
    report.plots[0].draw(figure)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["kld", "ppo"]
    assert len(axes.containers) == 2
