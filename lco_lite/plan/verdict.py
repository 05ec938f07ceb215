"""What the phases add up to, what would make them fit, the work of a run, and how it is told."""

from __future__ import annotations

import math
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
from lco_lite.plan.counting import Part
from lco_lite.plan.phases import STAGES
from lco_lite.plan.sampling import eval_sampling
from lco_lite.plan.trial import Trial
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import overridden
from lco_lite.recipe.sections import RewardModel, Weights, size_in_bytes

GIB = 2**30
RESERVE = 0.8 * GIB  # CUDA's context and fragmentation; on a CPU the process itself. An estimate
HEADS = {"weights": "base", "adapters": "LoRA", "optimiser": "AdamW", "activations": "acts"}  # 80 columns are narrow
COLUMNS = ("weights", "adapters", "optimiser", "activations", "cache", "loss")


def peaks(
    recipe: Recipe, stage: str, on_card: bool, prompt: int | None = None, only: str | None = None
) -> tuple[dict[str, dict[str, float]], float, float]:
    """(phase -> bytes by column at its peak, numbers that the stage trains, bytes a response token on the host)."""
    large = Trial(recipe, on_card, True, prompt=prompt, only=only).run(STAGES[stage])
    whole = all(part.layers == part.of for moment in large.moments for part in moment.parts)
    small = large if whole else Trial(recipe, on_card, False, prompt=prompt, only=only).run(STAGES[stage])
    found: dict[str, dict[str, float]] = {}
    for a, b in zip(small.moments, large.moments, strict=True):
        held = dict.fromkeys(COLUMNS, 0.0)
        for p, q in zip(a.parts, b.parts, strict=True):
            held[p.column] += _line(p, q)
        held["loss"] = min(b.chunks, held["activations"])
        held["activations"] -= held["loss"]
        found[a.phase] = max(found.get(a.phase, held), held, key=lambda columns: sum(columns.values()))
    return found, _line(small.numbers, large.numbers), large.kept


def _line(a: Part, b: Part) -> float:
    """Through both depths, at the whole model's."""
    return b.bytes + (b.bytes - a.bytes) / max(1, b.layers - a.layers) * (b.of - b.layers)


BATCH = {"pair sampling": "rl.rollout_batch", "rl rollout": "rl.rollout_batch"}
BATCH |= dict.fromkeys(("φ check", "rl eval", "eval"), "eval.batch")


def _changes(recipe: Recipe, phase: str) -> Iterator[tuple[dict[str, Any], float]]:
    """What could make a phase fit, the cheapest first, and the share of the batch that is left: a smaller batch; then
    activations made again, weights in 4 bits; all of it; at last half the length."""
    stage = {"sft": "sft", "train-rm": "train_rm"}.get(phase, "rl")
    key = BATCH.get(phase, f"{stage}.micro_batch_tokens")
    now: int = getattr(getattr(recipe, key.partition(".")[0]), key.partition(".")[2])
    least = 1 if phase in BATCH else min(now, getattr(recipe, stage).max_length)
    value, more = now, dict[str, Any]()
    while value > least:
        value = max(value // 2, least)
        yield {key: value}, value / now
    own = "reward_model" if phase == "train-rm" and isinstance(recipe.reward_model, RewardModel) else "model"
    if phase not in BATCH and not getattr(recipe, own).gradient_checkpointing:
        more[f"{own}.gradient_checkpointing"] = True
        yield dict(more), 1.0
    for name, base in (("model", recipe.model), ("reward_model", recipe.reward_model)):
        plain = isinstance(base, Weights) and base.quantization == "none" and base.lora is not None
        if plain and recipe.model.init is None:
            more[f"{name}.quantization"] = "nf4"
            yield dict(more), 1.0
    yield {key: least} | more, least / now
    half = {"rl.max_new_tokens": longest_response(recipe) // 2, "rl.max_length": recipe.rl.max_length // 2}
    half |= {} if stage == "rl" else {f"{stage}.max_length": getattr(recipe, stage).max_length // 2}
    yield {key: least} | more | half, least / now / 2


def cheapest(
    recipe: Recipe, stage: str, phase: str, held: dict[str, float], room: float, on_card: bool, prompt: int | None
) -> str | None:
    """The first of ``_changes`` with which the phase fits, as --set."""
    fixed = sum(held[column] for column in ("weights", "adapters", "optimiser"))
    for change, share in _changes(recipe, phase):
        if "quantization" not in str(change) and fixed + (sum(held.values()) - fixed) * share > room:
            continue  # not even if all else shrank with the batch
        sets = [f"{key}={str(value).lower()}" for key, value in change.items()]
        other = overridden(recipe.model_dump(mode="json"), sets, None, lambda text: None, "plan")
        if sum(peaks(other, stage, on_card, prompt, phase)[0][phase].values()) <= room:
            return "--set " + " --set ".join(sets)
    return None


def work(recipe: Recipe) -> dict[str, dict[str, int | None]]:
    """By stage: ``updates``, ``responses`` to sample and the ``tokens`` of these at most; None: as many as the data."""
    rm, rl, longest, ev = recipe.train_rm, recipe.rl, longest_response(recipe), recipe.eval
    checked, drawn = eval_sampling(recipe, 1).max_new_tokens, rl.prompts_per_step * rl.responses_per_prompt

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
        "rl": row(rl.steps * rl.inner_epochs * -(-drawn // rl.minibatch), rl.steps * drawn, longest,
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
    logs = [row for row in logs if row.get("seconds", {}).get("rollout") and row.get("mean_response_tokens")]
    if not logs:
        return None
    tokens = sum(row["response_tokens"] for row in logs)
    learning = sum(row["seconds"].get(phase, 0.0) for row in logs for phase in ("score", "update"))
    rate = tokens / sum(row["seconds"]["rollout"] for row in logs)
    return {"rate": rate, "response": fmean(row["mean_response_tokens"] for row in logs), "learning": learning / tokens}


def plan(
    recipe: Recipe, gpu: str | None, rate: float | None, prompt: int | None, runs: Path, console: Console, as_json: bool
) -> None:
    """Prints it, or for machines one JSON object with bytes, hours and what does not fit."""
    on_card = gpu is not None or recipe.device != "cpu"
    if gpu is not None:
        try:
            memory, what = float(size_in_bytes(gpu)), f"--gpu {gpu}"
        except ValueError as e:
            raise UsageError(f"--gpu: {e}") from e
    elif not on_card:
        memory, what = float(psutil.virtual_memory().total), "device: cpu, this machine's memory"
    elif torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory, what = float(properties.total_memory), properties.name
    else:
        memory, what = 12.0 * GIB, "no card here: 12 GiB unless --gpu says otherwise"
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
            held["kept"] = kept if stage == "rl" and not on_card else 0.0  # there the host is the device
            phases[phase] = held
            if sum(held.values()) > room:
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
    disk = {stage: 4.0 * n * (1 + 3 * 3) for stage, n in trained.items()}  # adapter; of three checkpoints: AdamW's too
    disk["responses"] = digits * (3.0 * drawn + ((tasks.get("rm") or {}).get("tokens") or 0))
    host = kept + max(12.0 * n for n in trained.values())
    facts = {"memory": memory, "reserve": RESERVE, "on": what, "phases": phases, "changes": changes, "host": host}
    facts |= {"disk": disk, "work": tasks, "rate": rate, "fits": not changes}
    if as_json:
        return console.emit(facts)
    show(facts, console, once)


def show(facts: dict[str, Any], console: Console, once: dict[str, float] | None) -> None:
    room, phases = facts["memory"] - facts["reserve"], facts["phases"]
    columns = [*COLUMNS, *(["kept"] if any(held["kept"] for held in phases.values()) else [])]
    lines = []
    for phase, held in phases.items():
        total = sum(held.values())
        verdict = "yes" if total <= room else "no"
        lines.append([phase, *(f"{held[column] / GIB:.2f}" for column in columns), f"{total / GIB:.2f}", verdict])
    title = f"GiB at each phase's peak; room {room / GIB:.2f} = {facts['memory'] / GIB:.2f} ({facts['on']}) less "
    console.table(
        f"{title}{facts['reserve'] / GIB:.1f} reserved",
        ["phase", *(HEADS.get(column, column) for column in columns), "sum", "fits"],
        lines,
    )
    for phase, change in facts["changes"].items():
        console.note(f"{phase}: {change or 'no change of the recipe was found that makes it fit: a smaller model'}")
    disk = ", ".join(f"{name} {size / GIB:.2f}" for name, size in facts["disk"].items())
    console.note(f"host memory besides the process: {facts['host'] / GIB:.2f} GiB. Disk at most, GiB: {disk}")
    rows = []
    for stage, row in facts["work"].items():
        cells = ("as the data" if row[key] is None else str(row[key]) for key in ("updates", "responses", "tokens"))
        rows.append([stage, *cells, "" if row["hours"] is None else f"{row['hours']:.2f}"])
    console.table("work", ["stage", "updates", "responses", "tokens sampled, at most", "hours"], rows)
    if once is not None:
        at = f"hours at {facts['rate']:.0f} tokens/s and {once['response']:.0f} tokens a response"
        console.note(f"{at}, as in an earlier run; score and update as there; other updates are not in it")
    elif facts["rate"]:
        console.note(f"hours of sampling alone, at {facts['rate']:.0f} tokens/s, every response at its longest")
    else:
        console.note("no rate known: give --rate, tokens sampled a second")
