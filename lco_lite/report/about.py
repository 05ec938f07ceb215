"""What runs are, in few words: the head of the page with its result in a sentence, and the chosen settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lco_lite.errors import RecipeError
from lco_lite.recipe.file import needed, validate

RESULTS = 4  # sentences at the head of the page
NAMED = 4  # different values of a fact

Row = dict[str, Any]


def headline(about: Sequence[Row], scores: Sequence[Row], tests: Sequence[Row]) -> Row:
    """``facts``: [name, text] of model, data, objective, stages, seeds and date. ``results``: a sentence a task and
    policy that reinforcement learning made. ``more``: how many of these are left out."""
    settings, stages = [one["settings"] for one in about], [stage for one in about for stage in one["stages"]]
    facts = {
        "Model": [_model(of) for of in settings],
        "Data": [_data(of) for of in settings],
        "Objective": [stage["objective"] for stage in stages if stage["objective"]],
        "Stages": [", ".join(map(_progress, one["stages"])) for one in about],
        "Seed": [str(of["seed"]) for of in settings if of.get("seed") is not None],
        "Finished": sorted(stage["finished"][:10] for stage in stages if stage["finished"]),
    }
    told = [[name, _several(values)] for name, values in facts.items() if any(values)]
    sentences = results(scores, tests)
    return {"facts": told, "results": sentences[:RESULTS], "more": max(0, len(sentences) - RESULTS)}


def _several(values: Sequence[str]) -> str:
    kept = [value for value in dict.fromkeys(values) if value]
    return " · ".join(kept[:NAMED]) + (f" and {len(kept) - NAMED} more" if len(kept) > NAMED else "")


def _model(settings: Mapping[str, Any]) -> str:
    path, file = settings.get("model.path"), settings.get("model.gguf_file")
    if path is None:
        layers, width = settings.get("model.init.layers"), settings.get("model.init.hidden_size")
        return f"from scratch, layers: {layers}, width: {width}" if layers else ""
    return str(file or (Path(path).name if Path(path).is_absolute() else path))


def _data(settings: Mapping[str, Any]) -> str:
    files = [settings.get(f"data.{kind}") for kind in ("prompts", "demonstrations", "preferences")]
    named = [Path(file).name for file in files if isinstance(file, str) and file != "sampled"]
    return ", ".join(dict.fromkeys(filter(None, [settings.get("task"), *named])))


def _progress(stage: Row) -> str:
    unit = "step" if stage["name"].startswith("rl-") else "update"
    done = f"{stage['steps']} {unit}{'' if stage['steps'] == 1 else 's'}"
    return f"{stage['name']} {done}" + ("" if stage["done"] else ", not done")


def results(scores: Sequence[Row], tests: Sequence[Row]) -> list[str]:
    """Of each task and policy of reinforcement learning, what it scored and what the one before it in the same runs
    (sft, else base). What was scored in another way is not told as a change."""
    sentences, main = [], [row for row in scores if row["main"]]
    for row in (row for row in main if row["stage"].startswith("rl-")):
        task, own, label = row["task"], row["own"], row["label"]
        of_task = [one for one in main if one["task"] == task and {*row["of"]} & {*one["of"]}]
        known = [one for stage in ("sft", "base") for one in of_task if one["stage"] == stage]
        # of several the first, of those that were scored in the same way
        earlier = min(
            known, key=lambda one: (one["stage"] != known[0]["stage"], one["way"] != row["way"]), default=None
        )
        seeds = f"{len(row['runs'])} training seeds" if len(row["runs"]) > 1 else "one training seed"
        if earlier is None or earlier["way"] != row["way"]:
            within = f", 95 % interval {_interval(row['interval'], own)}" if row["interval"] else ""
            scored = f"{row['metric']} {_points(row['mean'], own)}{within}"
            told = f"; {earlier['label']} was scored in another way: not tested" if earlier else ""
            sentences.append(f"{task}: {label} has {scored} ({row['n']} items, {seeds}){told}.")
            continue
        before, pair = earlier["label"], [earlier["place"], row["place"]]
        change = f"{row['metric']} {_points(earlier['mean'], own)} → {_points(row['mean'], own)}"
        mean, interval, over = _tested(next((t for t in tests if t["places"] == pair), None))
        if interval is None:
            sentences.append(f"{task}: {change} from {before} to {label} ({row['n']} items, {seeds}); not tested.")
            continue
        verdict = "is above" if interval[0] > 0 else "is below" if interval[1] < 0 else "cannot be told from"
        how = f"{_points(mean, own, '+')}, 95 % interval {_interval(interval, own, '+')}"
        sentences.append(f"{task}: {label} {verdict} {before}. {change}, {how} (paired over {over}; {seeds}).")
    return sentences


def _tested(test: Row | None) -> tuple[float, list[float] | None, str]:
    """(difference, its interval, what it is over): seeds where there are several, else items."""
    if test and (seeds := test["seeds"]):
        return seeds["mean"], [seeds["low"], seeds["high"]], f"{seeds['n']} seeds"
    if test and (items := test["items"]):
        return items["difference"], items["interval"], f"{items['items']} items"
    return 0.0, None, ""


def _points(value: float, own: bool, sign: str = "") -> str:
    """A metric of the task's own in its unit; a share in percent, and a difference of shares (``sign`` +) in points."""
    unit = "" if own else " points" if sign else " %"
    return (f"{value if own else 100 * value:{sign}.{3 if own else 1}f}{unit}").replace("-", "−")


def _interval(bounds: Sequence[float], own: bool, sign: str = "") -> str:
    low, high = (_points(bound, own, sign) for bound in bounds)
    return f"{low.partition(' ')[0]} to {high}"


def chosen(data: Mapping[str, Any], origin: str) -> list[Row] | None:
    """The settings (``key``, ``value``) without which the recipe would be another, and what each would be (``default``:
    null where there would be no recipe at all). None for a recipe that this version does not read."""
    try:
        recipe = validate(dict(data), origin, of_run=True)
    except RecipeError:
        return None
    rows = [{"key": ".".join(one.key), "value": one.value, "default": one.default} for one in needed(recipe)]
    return [row for row in rows if row["key"] != "name"]
