"""Which cells the tuned studies ask for, and what they say of rows that are known."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from lco_lite.recipe.file import find_recipe, load_recipe
from lco_lite.study.base import FEWEST, TUNING_SEED, Results
from lco_lite.study.efficiency import Efficiency
from lco_lite.study.methods import GKD, GKD_TWICE, HALVED_FROM, METHODS, MIXED, TIERS, MethodsStudy
from lco_lite.study.refresh import BASE, Refresh
from lco_lite.study.training import WholeRun
from lco_lite.study.tuned import equal, taught_by
from lco_lite.study.variants import AGAINST, Variants
from lco_lite.study.verb import STUDIES, load_study


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(find_recipe("quickstart"), list(MethodsStudy.usual))


def row(label, seed, score, samples=5120, curve=None, **more):
    steps = [{"samples_seen": x, "eval": y} for x, y in curve or [(samples, score)]]
    updates = {"step": [1, 1, 1], "grad_norm": [0.5, None, 0.3]}
    made = {"label": label, "seed": seed, "id": f"{label}-{seed}", "version": "0", "seconds": 1.0, "failed": None}
    made |= {"before": {"mean": 0.3}, "after": {"mean": score, "metrics": {"pass@8": {"mean": 0.99}}}}
    return made | {"steps": steps, "updates": updates, "samples": samples, "lr": 1e-3, "feedback": "rule"} | more


def tuned(recipe, study=None):
    """Rows of all tuning cells of a study, the second rate the best."""
    study, known = study or MethodsStudy(), dict[str, dict]()
    while True:
        cells = study.cells(recipe, [1], Results(known.values()))
        new = [c.label for c in cells if c.seed == TUNING_SEED and c.label not in known]
        if not new:
            return list(known.values())
        known |= {label: row(label, TUNING_SEED, 0.5 + 0.1 * (i % 4 == 1)) for i, label in enumerate(new)}


def test_nothing_is_scored_before_its_rate_is_known(recipe):
    cells = MethodsStudy().cells(recipe, [1, 2], Results())
    assert {cell.seed for cell in cells} == {TUNING_SEED}
    assert {cell.label.partition(",")[0] for cell in cells} == {m.tuned_as or name for name, m in TIERS[0].items()}


def test_all_methods_have_the_best_rate_that_was_tried_and_the_same_samples(recipe):
    cells = [c for c in MethodsStudy().cells(recipe, [1, 2], Results(tuned(recipe))) if c.seed != TUNING_SEED]
    assert [c.label for c in cells if c.seed == 2 and c.label in TIERS[0]] == list(TIERS[0])
    assert {c.label for c in cells} == set(METHODS)
    assert {c.label for c in cells if c.seed == 2} == {name for tier in TIERS[:HALVED_FROM] for name in tier}
    for cell in cells:
        each = {"dapo": 4, "grpo": 4, "raft": 4, "rebel": 2, "rloo": 2}.get(cell.sets["rl.objective"])
        if each is not None:
            assert cell.sets["rl.prompts_per_step"] * each == 640
        method = METHODS[cell.label]
        rates = METHODS[method.tuned_as or cell.label].rates
        assert cell.sets["rl.lr"] == rates[1]
        assert cell.sets["rl.steps"] == 8 * method.phases


def test_samples_are_equal_where_the_recipe_says_how_many_responses_a_prompt_has():
    recipe = load_recipe(find_recipe("quickstart"), ["rl.prompts_per_step=80", "rl.responses_per_prompt=8"])
    for method in METHODS.values():
        sets = equal(method.sets, recipe)
        rl = load_recipe(find_recipe("quickstart"), [], {**sets, "rl.lr": 1e-3}).rl
        assert rl.prompts_per_step * rl.responses_per_prompt == 640, sets


def test_of_several_tasks_phi_is_told_by_the_recipes_own():
    tasks = {"arithmetic": {"before": {"mean": 0.3}}, "subtraction": {"before": {"mean": 0.2}}}
    start = {"rm": {"arithmetic": {"mean": 0.9}, "subtraction": {"mean": 0.1}}}
    assert taught_by(Results([row("kld", 1, 0.5, tasks=tasks, start=start)])) == {1: 0.9}


def test_a_method_that_never_gets_there_on_some_seeds_is_not_told_by_the_others():
    rows = [row("ppo", s, 0.4, curve=[(640, 0.3), (5120, 0.4)]) for s in (1, 2, 3, 4)]
    rows += [row("kld", s, 0.5, curve=[(640, 0.3 if s == 4 else 0.5), (5120, 0.35)]) for s in (1, 2, 3, 4)]
    claim = next(c for c in Efficiency().report(Results(rows)).claims if c.name == "C3, KLD")
    assert claim.verdict == "unclear" and "and 1 that never reach it" in claim.why
    claims = Efficiency().report(Results([r for r in rows if r["seed"] < 4])).claims
    assert next(c for c in claims if c.name == "C3, KLD").verdict == "reproduced"


@pytest.mark.parametrize("n", [2, 3])
def test_fewer_than_three_seeds_are_no_verdict_of_any_claim(n):
    seeds = range(1, n + 1)
    found = {"step": [1, 1, 1], "entropy": [1.0, 1.0, 1.0]}
    of_kld = Results([row("kld", s, 0.5, updates=found) for s in seeds])
    entropy = next(c for c in WholeRun().report(of_kld).claims if c.name == "C2, entropy of kld")
    pair = next(iter(AGAINST.items()))
    alike = [row(name, s, 0.5 + 0.001 * s, tasks={}, start={}) for name in pair for s in seeds]
    verdicts = {claim.verdict for claim in Variants().report(Results(alike)).claims}
    assert (entropy.verdict != "unclear") == ("not reproduced" in verdicts) == (n >= FEWEST)


def test_a_rate_that_diverged_is_not_chosen(recipe):
    rows = [r | {"after": None, "failed": "nan"} if r["label"].endswith("lr 0.006") else r for r in tuned(recipe)]
    cells = [c for c in MethodsStudy().cells(recipe, [1], Results(rows)) if c.label == "kld"]
    assert [c.sets["rl.lr"] for c in cells] == [3e-3]


def test_what_clipping_does_is_told_by_the_seeds_that_ran_with_it_and_without():
    rows = [row("ppo", s, 0.5) for s in (1, 2, 3, 4)] + [row("ppo, unclipped", s, 0.4 + 0.01 * s) for s in (1, 2, 3)]
    (table,) = (t for t in MethodsStudy().report(Results(rows)).tables if t.name == "clipping")
    ((method, told),) = table.rows
    assert method == "ppo" and told.startswith("-0.080 [-0.105, -0.055]") and told.endswith("n = 3")
    assert all(t.name != "clipping" for t in MethodsStudy().report(Results(rows[:4])).tables)


def test_every_cell_of_every_study_is_a_recipe():
    for name in STUDIES:
        study = load_study(name)
        base = load_recipe(find_recipe(study.recipe), list(study.usual))
        cells = study.cells(base, [1], Results(tuned(base, study)))
        assert {cell.label for cell in cells if cell.seed == 1} == set(study.labels)
        for cell in cells:
            load_recipe(find_recipe(study.recipe), list(study.usual), {"seed": cell.seed, **cell.sets})


def test_a_difference_that_every_seed_has_is_reproduced_and_its_mirror_image_is_not():
    rows = [row(MIXED, s, 0.95 + 0.001 * s) for s in (1, 2, 3)] + [row(GKD, s, 0.9) for s in (1, 2, 3)]
    rows += [row(GKD_TWICE, s, 0.99) for s in (1, 2, 3)]
    claims = {claim.name: claim.verdict for claim in MethodsStudy().report(Results(rows)).claims}
    assert claims[f"mixed against {GKD}"] == "reproduced"
    assert claims[f"mixed against {GKD_TWICE}"] == "not reproduced"
    assert claims["mixed against raft"] == "unclear"


def test_the_paper_is_not_reproduced_where_one_baseline_is_ahead():
    rows = [row("kld", s, 0.8 + 0.001 * s) for s in (1, 2, 3)] + [row("gkd", s, 0.9) for s in (1, 2, 3)]
    rows += [row("ppo", s, 0.3) for s in (1, 2, 3)]
    (claim,) = (c for c in MethodsStudy().report(Results(rows)).claims if c.name.startswith("C4"))
    assert claim.verdict == "not reproduced"
    assert "gkd -0.098" in claim.why and "grpo not measured yet" in claim.why


def test_samples_are_set_against_those_that_ppo_takes():
    def curves(label, points):
        return [row(label, s, points[-1][1] + 1e-4 * s, curve=[(x + s, y) for x, y in points]) for s in (1, 2, 3)]

    rows = curves("ppo", [(640, 0.3), (1280, 0.4)]) + curves("kld", [(640, 0.7), (1280, 0.8)])
    rows += curves("lch", [(640, 0.6), (1280, 0.7)])
    claims = {claim.name: claim for claim in Efficiency().report(Results(rows)).claims}
    assert claims["C3, KLD"].verdict == "reproduced"
    assert claims["C3, LCH"].verdict == "unclear" and claims["C3, LCH"].why == "Ratio –, and 3 that never reach it."


def test_a_report_of_nothing_leaves_every_claim_unclear():
    for name in STUDIES:
        assert {claim.verdict for claim in load_study(name).report(Results()).claims} == {"unclear"}


@pytest.mark.parametrize(("study", "label"), [(WholeRun(), "kld"), (Refresh(), BASE)])
def test_a_page_has_its_pictures_also_where_a_run_diverged(study, label):
    whole, short = [(x, 0.5) for x in (100, 200, 300)], [(100, 0.9)]
    rows = [row(label, seed, 0.5, curve=whole) for seed in (1, 2)]
    rows.append(row(label, 3, 0.0, curve=short) | {"after": None, "failed": "loss is not finite"})
    found = study.report(Results(rows))
    assert found.plots and any("loss is not finite" in note for note in found.notes)
    for plot in found.plots:
        figure = Figure(figsize=plot.size, layout="constrained")
        plot.draw(figure)
    if isinstance(study, Refresh):
        assert "0.9" not in str(found.tables[0].rows[0][3])


def test_refreshing_is_at_equal_samples_however_many_responses_a_prompt_has():
    many = load_recipe(find_recipe("quickstart"), [*Refresh.usual, "rl.responses_per_prompt=4"])
    cells = Refresh().cells(many, [1], Results(tuned(many, Refresh())))
    sizes = [
        c.sets["rl.steps"] * c.sets["rl.prompts_per_step"] * c.sets["rl.responses_per_prompt"]
        for c in cells
        if c.seed == 1
    ]
    assert min(sizes) == max(sizes)


def test_a_rate_that_diverged_is_not_chosen_where_scores_are_below_0_either(recipe):
    rows = [
        r
        | {"after": {"mean": -3.0, "metrics": {}}}
        | ({"after": None, "failed": "nan"} if "0.006" in r["label"] else {})
        for r in tuned(recipe)
    ]
    cells = [c for c in MethodsStudy().cells(recipe, [1], Results(rows)) if c.label == "kld"]
    assert all(c.sets["rl.lr"] != 6e-3 for c in cells) and cells
