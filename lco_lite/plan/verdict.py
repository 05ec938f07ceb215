"""What the phases add up to, what would make them fit, the work of a run, and how it is told."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import psutil
import torch

from lco_lite.console import Console
from lco_lite.data.prompts import longest_response
from lco_lite.errors import UsageError
from lco_lite.metrics import read_log
from lco_lite.models.loading import load_config
from lco_lite.plan.counting import Tag
from lco_lite.plan.phases import STAGES
from lco_lite.plan.sampling import checked_response
from lco_lite.plan.trial import Trial
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import overridden
from lco_lite.recipe.sections import RewardModel, size_in_bytes
from lco_lite.train.before import written
from lco_lite.train.rollouts import DYNAMIC_ROUNDS

GIB = 2**30
RESERVE = 0.8 * GIB  # CUDA's context and fragmentation; on a CPU the process itself. An estimate
COLUMNS = ("weights", "adapters", "optimiser", "activations", "cache", "loss", "kept")
HEADS = {"weights": "base", "adapters": "LoRA", "optimiser": "AdamW", "activations": "acts", "cache": "cache"}


class Planned(NamedTuple):
    """``phases``: of each its bytes by column at its peak, and those in ``host`` memory; ``trained``: numbers that the
    stage trains; ``kept``: bytes a response token that stay on the host until the phase ends."""

    phases: dict[str, dict[str, float]]
    trained: float
    kept: float


def peaks(recipe: Recipe, stage: str, on_card: bool, prompt: int | None = None, only: str | None = None) -> Planned:
    """The line through both depths, at the whole models'."""
    large = Trial(recipe, on_card, True, prompt, only).run(STAGES[stage])
    whole = all(layers == of for layers, of in large.depths)
    small = large if whole else Trial(recipe, on_card, False, prompt, only).run(STAGES[stage])

    def line(a: float, b: float, model: int | None) -> float:
        layers, of = (0, 0) if model is None else large.depths[model]
        return b + (b - a) / max(1, layers - (0 if model is None else small.depths[model][0])) * (of - layers)

    def by_column(a: dict[Tag, float], b: dict[Tag, float]) -> dict[str, float]:
        columns = defaultdict[str, float](float)
        for tag in a | b:
            columns[tag.column] += line(a.get(tag, 0), b.get(tag, 0), tag.model)
        return columns

    found: dict[str, dict[str, float]] = {}
    for a, b in zip(small.moments, large.moments, strict=True):
        held = dict.fromkeys(COLUMNS, 0.0) | by_column(a.here, b.here)
        before = found.get(a.phase, held)
        host = max(before.get("host", 0.0), sum(by_column(a.host, b.host).values()))
        larger = max(before, held, key=on_device)
        found[a.phase] = larger | {"host": host if on_card else 0.0}
    return Planned(found, line(small.numbers, large.numbers, large.trained), large.kept)


def on_device(held: dict[str, float]) -> float:
    return sum(size for column, size in held.items() if column != "host")


BATCH = {"pair sampling": "rl.rollout_batch", "rl rollout": "rl.rollout_batch"}
BATCH |= dict.fromkeys(("φ check", "rl eval", "eval"), "eval.batch")


def _changes(
    recipe: Recipe, phase: str, held: dict[str, float], on_card: bool
) -> Iterator[tuple[dict[str, Any], float]]:
    """What could make a phase fit, the cheapest first, and the least that it could then hold: a smaller batch; what
    costs time, one at a time, then one more each time; the smallest batch too; at last half the length."""
    stage = {"sft": "sft", "train-rm": "train_rm"}.get(phase, "rl")
    key = BATCH.get(phase, f"{stage}.micro_batch_tokens")
    now: int = getattr(getattr(recipe, key.partition(".")[0]), key.partition(".")[2])
    least = 1 if phase in BATCH else min(now, getattr(recipe, stage).max_length)
    own = recipe.reward_model if isinstance(recipe.reward_model, RewardModel) else None
    part, weights = ("reward_model", own) if phase == "train-rm" and own is not None else ("model", recipe.model)
    grows, section = phase in ("sft", "train-rm", "rl update"), getattr(recipe, stage)
    states = phase not in BATCH
    assert weights is not None
    left = {column: 1.0 for column in held if column != "host"}  # the share of each that could be left
    more = dict[str, Any]()

    def reached(left: dict[str, float], batch: float = 1.0) -> float:
        of_batch = ("activations", "cache", "loss", "kept")
        return sum(held[column] * share * (batch if column in of_batch else 1) for column, share in left.items())

    if recipe.residency == "all" and own is not None and on_card and phase not in ("sft", "eval"):
        more["residency"], left["weights"] = "phase", 0.0
        yield dict(more), reached(left)
    value = now
    while value > least:
        value = max(value // 2, least)
        yield {key: value} | more, reached(left, value / now)
    ways: list[tuple[bool, str, Any, str, float]] = [
        (grows and not weights.gradient_checkpointing, f"{part}.gradient_checkpointing", True, "activations", 0.0),
        (states and section.optimizer == "adamw", f"{stage}.optimizer", "adamw_8bit", "optimiser", 0.25),
    ]
    for name, base in (("model", recipe.model), ("reward_model", own)):
        plain = base is not None and base.quantization == "none" and base.lora is not None
        ways.append((plain and recipe.model.init is None, f"{name}.quantization", "nf4", "weights", 0.25))
    if on_card:
        offloads = grows and weights.gradient_checkpointing != "offload"
        pages = states and not section.optimizer.startswith("paged")
        streams = own is not None and not own.streaming and phase in ("train-rm", "rl score")
        ways.append((offloads, f"{part}.gradient_checkpointing", "offload", "activations", 0.0))
        ways.append((pages, f"{stage}.optimizer", "paged_adamw_8bit", "optimiser", 0.0))
        ways.append((streams, "reward_model.streaming", True, "weights", 0.0))
    open_ways = [way for is_one, *way in ways if is_one]
    for name, setting, column, share in open_ways:
        yield more | {name: setting}, reached(left | {column: min(left[column], share)})
    for name, setting, column, share in open_ways:
        more[name], left[column] = setting, min(left[column], share)
        yield dict(more), reached(left)
    yield {key: least} | more, reached(left, least / now)
    half = {"rl.max_new_tokens": longest_response(recipe) // 2, "rl.max_length": recipe.rl.max_length // 2}
    half |= {} if stage == "rl" else {f"{stage}.max_length": section.max_length // 2}
    yield {key: least} | more | half, reached(left, least / now / 2)


def cheapest(
    recipe: Recipe, stage: str, phase: str, held: dict[str, float], room: float, on_card: bool, prompt: int | None
) -> str | None:
    """The first of ``_changes`` with which the phase fits, as --set."""
    for change, least in _changes(recipe, phase, held, on_card):
        if least > room:
            continue
        sets = [f"{key}={str(value).lower()}" for key, value in change.items()]
        other = overridden(recipe.model_dump(mode="json"), sets, None, lambda text: None, "plan")
        if on_device(peaks(other, stage, on_card, prompt, phase).phases[phase]) <= room:
            return "--set " + " --set ".join(sets)
    return None


def work(recipe: Recipe) -> dict[str, dict[str, int | None]]:
    """By stage: ``updates``, ``responses`` to sample and the ``tokens`` of these, at most; None: as the data."""
    rm, rl, longest, ev = recipe.train_rm, recipe.rl, longest_response(recipe), recipe.eval
    checked, drawn = checked_response(recipe), rl.prompts_per_step * rl.responses_per_prompt
    rounds = 1 + DYNAMIC_ROUNDS if rl.dynamic_sampling else 1  # at most: those of groups without signal come again

    def updates(settings: Any, n: int | None) -> int | None:
        most = settings.max_steps or n and settings.epochs * n / settings.batch_size
        return most and math.ceil(most)

    def row(updates: int | None, responses: int | None, longest: int, also: int = 0) -> dict[str, int | None]:
        tokens = None if responses is None else responses * longest + also * checked
        return {"updates": updates, "responses": None if responses is None else responses + also, "tokens": tokens}

    pairs = rm.prompts if recipe.data.preferences == "sampled" else None
    most = pairs and math.floor(pairs * rm.pairs_per_prompt * (1 - rm.held_out))
    asked = 0 if recipe.data.preferences != "sampled" else pairs and pairs * rm.samples_per_prompt
    looks = rl.steps // rl.eval_every if rl.eval_every else 0
    passes = (ev.seeds if ev.temperature else 1) * ev.samples * (len(recipe.stages) + (recipe.model.init is None))
    known = {
        "sft": row(updates(recipe.sft, recipe.sft.examples), 0, 0),
        "rm": row(updates(rm, most), asked, longest, 2 * rm.check_items),
        "rl": row(rl.steps * rl.inner_epochs * -(-drawn // rl.minibatch), rl.steps * drawn * rounds, longest,
                  looks * rl.eval_items),
        "eval": row(0, ev.items and ev.items * passes, checked),
    }  # fmt: skip
    return {name: known[name] for name in _stages(recipe)}


def _stages(recipe: Recipe) -> list[str]:
    return ["rl" if stage == recipe.rl.stage else stage for stage in recipe.stages] + ["eval"]


def measured(runs: Path, name: str) -> dict[str, float] | None:
    """Of an earlier run's rl stages: tokens sampled a second (``rate``), tokens of a ``response``, seconds of score and
    update a response token (``learning``)."""
    logs = [row for file in sorted((runs / name).glob("rl-*/metrics.jsonl")) for row in read_log(file)]
    logs = [row for row in logs if row.get("seconds", {}).get("rollout")]
    logs = [row for row in logs if row.get("mean_response_tokens") and row.get("response_tokens")]
    if not logs:
        return None
    tokens = sum(row["response_tokens"] for row in logs)
    learning = sum(row["seconds"].get(phase) or 0.0 for row in logs for phase in ("score", "update"))
    rate = tokens / sum(row["seconds"]["rollout"] for row in logs)
    return {"rate": rate, "response": fmean(row["mean_response_tokens"] for row in logs), "learning": learning / tokens}


def memory_of(recipe: Recipe, gpu: str | None) -> tuple[float, str]:
    """Bytes, and of what: the card to plan for, the one that is here, or a CPU's; never more than ``memory_limit``."""
    if gpu is not None:
        try:
            return float(size_in_bytes(gpu)), f"--gpu {gpu}"
        except ValueError as e:
            raise UsageError(f"--gpu: {e}") from e
    if recipe.device in ("cpu", "mps"):
        return float(psutil.virtual_memory().total), f"device: {recipe.device}, this machine's memory"
    if recipe.memory_limit is not None:
        limit, what = float(size_in_bytes(recipe.memory_limit)), f"memory_limit {recipe.memory_limit}"
        if not torch.cuda.is_available():
            return limit, what
    if not torch.cuda.is_available():
        return 12.0 * GIB, "no card here: 12 GiB unless --gpu says otherwise"
    properties = torch.cuda.get_device_properties(0)
    there = float(properties.total_memory)
    return (limit, what) if recipe.memory_limit is not None and limit < there else (there, properties.name)


def not_planned(recipe: Recipe) -> str | None:
    """What lies on the card besides, in words."""
    if recipe.rollout.engine != "vllm":
        return None
    share = f"{recipe.rollout.gpu_share:.0%} of the card (rollout.gpu_share) beside the models"
    return f"rollout.engine: vllm: its phases are planned as hf samples; while it samples, it takes {share}"


def plan(
    recipe: Recipe, gpu: str | None, rate: float | None, prompt: int | None, runs: Path, console: Console, as_json: bool
) -> None:
    """Prints it, or for machines one JSON object with bytes, hours and what does not fit."""
    on_card = gpu is not None or recipe.device not in ("cpu", "mps")
    memory, what = memory_of(recipe, gpu)
    room = memory - RESERVE
    phases, trained, changes = dict[str, Any](), dict[str, float](), dict[str, str | None]()
    kept, tasks = 0.0, dict[str, dict[str, Any]](work(recipe))
    drawn = recipe.rl.prompts_per_step * recipe.rl.responses_per_prompt * longest_response(recipe)
    for stage in tasks:
        console.note(f"looking at {stage}") if not as_json else None
        found, numbers, a_token = peaks(recipe, stage, on_card, prompt)
        if stage != "eval":
            trained[stage], kept = numbers, kept or a_token * drawn
        for phase, held in found.items():
            if stage == "rl":
                held["host" if on_card else "kept"] += kept
            phases[phase] = held
            if on_device(held) > room:
                changes[phase] = cheapest(recipe, stage, phase, held, room, on_card, prompt)
    once = measured(runs, recipe.name)
    rate = rate or (once["rate"] if once else None)
    for stage, row in tasks.items():
        tokens = row["tokens"]
        likely = once["response"] * row["responses"] if once and row["responses"] else tokens
        learning = (
            once["learning"] * recipe.rl.steps * drawn / longest_response(recipe) * once["response"] if once else 0
        )
        seconds = None if likely is None or not rate else likely / rate + (learning if stage == "rl" else 0)
        tasks[stage] = row | {"hours": None if seconds is None else seconds / 3600}
    digits = 2 + len(str(recipe.model.init and 260 or load_config(recipe.model).get_text_config().vocab_size))
    disk = written(recipe, trained)
    disk["responses"] = digits * (3.0 * drawn + ((tasks.get("rm") or {}).get("tokens") or 0))
    host = max(12.0 * n for n in trained.values()) + max(held["host"] + held["kept"] for held in phases.values())
    facts = {"memory": memory, "reserve": RESERVE, "on": what, "phases": phases, "changes": changes, "host": host}
    facts |= {"disk": disk, "work": tasks, "rate": rate, "fits": not changes}
    facts["not_planned"] = not_planned(recipe)
    if as_json:
        return console.emit(facts)
    show(facts, console, once)


def show(facts: dict[str, Any], console: Console, once: dict[str, float] | None) -> None:
    room, phases = facts["memory"] - facts["reserve"], facts["phases"]
    more = [name for name in ("kept", "host") if any(held[name] for held in phases.values())]
    lines = []
    for phase, held in phases.items():
        total, shown = on_device(held), held | {"activations": held["activations"] + held["loss"]}
        numbers = [*(shown[column] for column in HEADS), total, *(held[name] for name in more)]
        lines.append([phase, *(f"{number / GIB:.2f}" for number in numbers), "yes" if total <= room else "no"])
    title = f"planned: GiB at each phase's peak; room {room / GIB:.2f} = {facts['memory'] / GIB:.2f} ({facts['on']})"
    console.table(
        f"{title} less {facts['reserve'] / GIB:.1f} reserved", ["phase", *HEADS.values(), "sum", *more, "fits"], lines
    )
    for phase, change in facts["changes"].items():
        console.note(f"{phase}: {change or 'no change of the recipe was found that makes it fit: a smaller model'}")
    if facts["not_planned"]:
        console.warn(f"not planned: {facts['not_planned']}")
    disk = ", ".join(f"{name} {size / GIB:.2f}" for name, size in facts["disk"].items())
    console.note(f"planned: host memory besides the process {facts['host'] / GIB:.2f} GiB. Disk at most, GiB: {disk}")
    rows = []
    for stage, row in facts["work"].items():
        cells = ("as the data" if row[key] is None else str(row[key]) for key in ("updates", "responses", "tokens"))
        rows.append([stage, *cells, "" if row["hours"] is None else f"{row['hours']:.2f}"])
    console.table("planned work", ["stage", "updates", "responses", "tokens sampled, at most", "hours"], rows)
    if once is not None:
        at = f"hours at {facts['rate']:.0f} tokens/s and {once['response']:.0f} tokens a response"
        console.note(f"{at}, measured in an earlier run, as are score and update; other updates are not in it")
    elif facts["rate"]:
        console.note(f"hours of sampling alone, at {facts['rate']:.0f} tokens/s, every response at its longest")
    else:
        console.note("no rate known: give --rate, tokens sampled a second")
