"""A task that is not trained on, before and after RL on another (the paper's Table 6, C7).

The quickstart's model knows sums and differences from the warm-up; reward model and RL see sums alone. The other tasks
are those of ``eval.tasks`` less the recipe's own, so any recipe will do:

    lco-lite study forgetting smollm2 --set 'eval.tasks=[arithmetic, mmlu]'

A gain is the score after less the score before on the recipe's task, a loss the score before less the score after, the
mean over the other tasks. Who learns nothing forgets nothing: losses stand beside gains, and are divided by them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lco_lite.errors import UsageError
from lco_lite.study.base import Cell, Claim, Findings, Plot, Results, Row, Study, Table, judged
from lco_lite.study.statistics import mean_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

# thresholds, all of paired differences over seeds, baseline less KLD; their 95 % interval must lie above
LESS = 0.0  # of losses
LESS_PER_GAIN = 0.0  # of losses per gain
GAINED = 0.05  # a gain above this can be divided by

KLD, BASELINES = "kld", ("ppo", "grpo")
# label -> fields of rl, and the share of the recipe's learning rate that was best of two or three on the quickstart
METHODS: dict[str, tuple[Mapping[str, Any], float]] = {
    KLD: ({"objective": "kld"}, 1.0),
    "lch": ({"objective": "lch"}, 1.0),
    "mse": ({"objective": "mse"}, 1.0),
    "kld anchored": ({"objective": "kld", "anchor": 0.5}, 1.0),
    "kld mixed anchored": ({"objective": "kld", "feedback": "dpo + rule", "anchor": 0.5}, 1.0),
    "gkd": ({"objective": "gkd"}, 1.0),
    "ppo": ({"objective": "ppo"}, 0.1),
    "grpo": ({"objective": "grpo"}, 0.1),
    "reinforce": ({"objective": "reinforce"}, 1 / 3),
    "raft": ({"objective": "raft"}, 1 / 3),
}


class Forgetting(Study):
    name = "forgetting"
    asks = "What does RL on one task cost on another? (Table 6)"
    labels = tuple(METHODS)
    recipe, usual = "forgetting", ("eval.seeds=2",)

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        """UsageError where the recipe scores no task but its own."""
        if recipe.task is None or recipe.task not in (recipe.eval.tasks or []) or len(set(recipe.eval.tasks or [])) < 2:
            own = recipe.task or "TASK"
            raise UsageError(
                f"study forgetting: eval.tasks is to have the recipe's task and at least one other, found "
                f"task {recipe.task or 'null'} and eval.tasks {recipe.eval.tasks or 'null'}. "
                f"Add --set 'eval.tasks=[{own}, OTHER]' with a task that is not trained on"
            )
        return [Cell(label, seed, sets_of(label, recipe)) for seed in seeds for label in METHODS]

    def report(self, results: Results) -> Findings:
        ran = [label for label in METHODS if results.by_seed(label, gain)]
        claims = [_forgets_less(results, baseline) for baseline in BASELINES]
        claims += [_per_gain(results, baseline) for baseline in BASELINES]
        plots = [Plot("gain-loss", "Gain on the trained task, loss on the others", partial(_draw, results, ran))]
        notes = [
            "A method that does not learn has nothing to forget by: read a loss beside its gain. Loss per gain is of "
            f"the seeds that gained more than {GAINED:g}.",
            "All methods draw as many responses, in the recipe's phases, with its passes over them. Learning rates are "
            "those of an earlier comparison on the quickstart, of other recipes in proportion to their own; they were "
            "chosen by the gain on another warm-up, not by what is lost, and not anew here.",
        ]
        if failed := [f"{row['label']}, seed {row['seed']}" for row in results.rows if row.get("failed")]:
            notes.append(f"Diverged, and without a score: {'; '.join(failed)}.")
        return Findings(claims, [_table(results, ran), _seeds(results, ran)], plots if ran else [], notes)


def sets_of(label: str, recipe: Recipe) -> dict[str, Any]:
    """The fields of a method: the recipe's number of responses a phase, however many a prompt has, its passes over
    them, and the method's share of its learning rate."""
    from lco_lite.recipe import Rl

    rl, share = METHODS[label]
    each = Rl.model_validate(rl).responses_per_prompt
    prompts = max(1, recipe.rl.prompts_per_step * recipe.rl.responses_per_prompt // each)
    equal = {"prompts_per_step": prompts, "responses_per_prompt": each, "inner_epochs": recipe.rl.inner_epochs}
    rate = float(f"{share * recipe.rl.lr:.6g}")
    return {f"rl.{name}": value for name, value in {**rl, **equal, "lr": rate}.items()}


def others(row: Row) -> dict[str, Mapping[str, Any]]:
    """Task -> its results before and after, of all tasks but the one whose results are the row's own."""
    return {name: one for name, one in row["tasks"].items() if one["before"] != row["before"]}


def gain(row: Row) -> float | None:
    """On the recipe's task; None where training failed."""
    return None if row.get("after") is None else float(row["after"]["mean"] - row["before"]["mean"])


def loss(row: Row) -> float | None:
    """The mean over the other tasks; None where training failed."""
    losses = [lost for name in others(row) if (lost := loss_on(row, name)) is not None]
    return fmean(losses) if losses else None


def loss_on(row: Row, task: str) -> float | None:
    one = row["tasks"][task]
    return None if one.get("after") is None else float(one["before"]["mean"] - one["after"]["mean"])


def loss_per_gain(row: Row) -> float | None:
    """None where there is no gain to divide by."""
    gained, lost = gain(row), loss(row)
    return None if gained is None or lost is None or gained <= GAINED else lost / gained


# the claims


def _forgets_less(results: Results, baseline: str) -> Claim:
    found = results.difference(baseline, KLD, loss)
    gains = "; ".join(f"{name} gained {_told(results, name, gain)}" for name in (KLD, baseline))
    return Claim(
        f"C7, loss against {baseline}",
        f"LCO-KLD loses less than {baseline.upper()} on tasks that are not trained on.",
        f"the interval of the paired difference in loss, {baseline} less kld, lies above {LESS:g}.",
        judged(found, LESS),
        f"Difference {found or 'unknown: fewer than two seeds'}. On the trained task {gains}.",
    )


def _per_gain(results: Results, baseline: str) -> Claim:
    found = results.difference(baseline, KLD, loss_per_gain)
    counts = "; ".join(
        f"{name}: {len(results.by_seed(name, loss_per_gain))} of {len(results.by_seed(name, gain))} seeds did"
        for name in (KLD, baseline)
    )
    return Claim(
        f"C7, loss per gain against {baseline}",
        f"LCO-KLD loses less than {baseline.upper()} for what it gains on the trained task.",
        f"over the seeds on which both gained more than {GAINED:g}, the interval of the paired difference in loss / "
        f"gain, {baseline} less kld, lies above {LESS_PER_GAIN:g}.",
        judged(found, LESS_PER_GAIN),
        f"Difference {found or 'unknown: fewer than two such seeds'}. Gained more than {GAINED:g}: {counts}.",
    )


# tables and the picture


def _told(results: Results, label: str, number: Callable[[Row], float | None]) -> str:
    return mean_std(list(results.by_seed(label, number).values()))


def _table(results: Results, labels: Sequence[str]) -> Table:
    tasks = _other_tasks(results, labels)
    rows: list[Sequence[Any]] = []
    for label in labels:
        before, after = (
            mean_std([row[when]["mean"] for row in _ended(results, label)]) for when in ("before", "after")
        )
        lost = [_told(results, label, partial(loss_on, task=task)) for task in tasks]
        ratios = results.by_seed(label, loss_per_gain)
        n = len(results.by_seed(label, gain))
        per_gain = f"{mean_std(list(ratios.values()))} ({len(ratios)} of {n})"
        rows.append([label, n, before, after, _told(results, label, gain), *lost, per_gain])
    columns = ["method", "n", "before", "after", "gain", *(f"loss, {task}" for task in tasks), "loss / gain (seeds)"]
    return Table("forgetting", "Gain on the trained task, loss on the others", columns, rows)


def _seeds(results: Results, labels: Sequence[str]) -> Table:
    rows: list[Sequence[Any]] = []
    for label in labels:
        for row in _ended(results, label):
            scores = [(name, one["before"]["mean"], one["after"]["mean"]) for name, one in row["tasks"].items()]
            rows += [[label, row["seed"], *one] for one in scores]
    return Table("seeds", "Every seed", ["method", "seed", "task", "before", "after"], rows, shown=False)


def _ended(results: Results, label: str) -> list[Row]:
    return [row for row in results.of(label) if row.get("after") is not None]


def _other_tasks(results: Results, labels: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for label in labels for row in _ended(results, label) for name in others(row)))


def _draw(results: Results, labels: Sequence[str], figure: Figure) -> None:
    """A point a method, the mean over seeds, with bars of ± one standard deviation; a small point a seed."""
    axes = figure.subplots()
    for label in labels:
        gains, losses = results.by_seed(label, gain), results.by_seed(label, loss)
        x, y = ([values[seed] for seed in sorted(gains.keys() & losses.keys())] for values in (gains, losses))
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in (x, y)]
        bars = axes.errorbar(fmean(x), fmean(y), spread[1], spread[0], fmt="o", capsize=3, label=label)
        axes.plot(x, y, ".", color=bars[0].get_color(), alpha=0.3, markersize=4)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("gain on the trained task, pass@1")
    axes.set_ylabel("loss on the other tasks")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
