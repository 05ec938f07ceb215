"""What stands around every command: from flags to a locked run with its recipe, from exceptions to an exit status."""

from __future__ import annotations

import contextlib
import json as json_format
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from lco_lite import ranks
from lco_lite.console import Console
from lco_lite.errors import Interrupted, LcoError, MemoryExhausted, UsageError
from lco_lite.files import still_there, write_text
from lco_lite.metrics import peak_mib
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import find_recipe, overridden, recipe_and_said, said
from lco_lite.recipe.sections import RewardModel
from lco_lite.run import Run, decides, named_base, section, verb
from lco_lite.user_code import told, users_file
from lco_lite.visible import visible

if TYPE_CHECKING:
    from lco_lite.context import Context


@contextlib.contextmanager
def boundary() -> Iterator[None]:
    """The one place where an exception becomes a message on stderr and an exit status (see errors.py). What is nobody's
    message is a mistake in here: it keeps its traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns as it is imported, of nothing one can mend
    try:
        yield
    except LcoError as e:
        _say(str(e) if e.exit_code == Interrupted.exit_code else f"error: {e}")
        raise typer.Exit(e.exit_code) from None
    except KeyboardInterrupt:
        _say("stopped at once; the same command goes on at the last checkpoint")
        raise typer.Exit(Interrupted.exit_code) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more can be said
        raise typer.Exit(1) from None
    except OSError as e:  # of the disk, outside of a stage
        _say(f"error: {f'{str(e.filename):.200}: ' if e.filename else ''}{e.strerror or e}")
        raise typer.Exit(LcoError.exit_code) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception:
        _say(traceback.format_exc().rstrip())
        raise typer.Exit(1) from None


def _say(why: str) -> None:
    if stderr := ranks.stderr_of_the_first():
        Console(stderr=stderr).error(why)


class DryRun(NamedTuple):
    """What ``--dry-run`` is about: the command's last stage, or ``run``; ``full`` shows the whole recipe too."""

    upto: str
    fresh: bool
    full: bool


@contextlib.contextmanager
def command(
    recipe: str | None,
    runs: Path,
    name: str | None,
    sets: list[str] | None,
    flags: dict[str, Any],
    quiet: bool = False,
    json: bool = False,
    dry_run: DryRun | None = None,
    model: str | None = None,
    tasks: list[str] | None = None,
) -> Iterator[Context]:
    """A locked run with its resolved recipe. Without a recipe file the newest or the named run goes on with its own.

    ``model``: any model or adapter folder or hub id, for ``tasks``; its scores lie in a run of their own, eval-MODEL.
    """
    with boundary():
        adapter, console, named = None, Console(quiet, json), said({}, sets, flags)
        if model is not None:
            if not tasks:
                raise UsageError("eval --model: name at least one task, e.g. `lco-lite eval math500 --model PATH`")
            resolved, adapter = _of_model(model, tasks[0], sets, flags, console, "eval --model")
            name = name or _name_of(model)
        elif recipe is not None:
            resolved, named = recipe_and_said(find_recipe(recipe), sets, flags, console.note)
            name = name or resolved.name
        else:
            run = Run.newest(runs) if name is None else Run.named(runs, name)
            kept, name = run.recipe().model_dump(mode="json"), run.name
            resolved = overridden(kept, sets, flags, console.note, "the run's recipe with your flags", of_run=True)
        if dry_run is not None:
            from lco_lite.dry_run import preview

            preview(resolved, Run.named(runs, name), named, *dry_run, console)
            raise typer.Exit
        run = Run.open(runs, name)
        if not all(ranks.gather(run.path.is_dir())):
            raise UsageError(
                f"{run.path} is not there for every process: name a folder that all machines share by --runs"
            )
        with _locked(run), _context(run, resolved, console, adapter) as ctx:
            ctx.said = named
            yield ctx


@contextlib.contextmanager
def reading(
    source: Run | str, runs: Path, sets: list[str] | None, flags: dict[str, Any], console: Console
) -> Iterator[Context]:
    """A run that is only read, or any model or adapter folder or hub id. It takes no lock: what is done in a run stands
    whole, whoever works there."""
    adapter = None
    if isinstance(source, Run):
        kept = source.recipe().model_dump(mode="json")
        run, origin = source, "the run's recipe with your flags"
        resolved = overridden(kept, sets, flags, console.note, origin, of_run=True)
    else:
        resolved, adapter = _of_model(source, None, sets, flags, console, source)
        run = Run(runs / _name_of(source))
    with _context(run, resolved, console, adapter) as ctx:
        yield ctx


def _of_model(
    model: str, task: str | None, sets: list[str] | None, flags: dict[str, Any], console: Console, origin: str
) -> tuple[Recipe, Path | None]:
    """A recipe around a model, with which nothing is trained: no demonstrations are needed and no pairs are sampled;
    and the adapter, where the model is one."""
    base, adapter = _base_and_adapter(model)
    data = {"preferences": "-"} | ({} if task else {"prompts": "-"})
    bare = {"model": {"path": base}, "task": task, "sft": {"enabled": False}, "data": data}
    return overridden(bare, sets, flags, console.note, origin), adapter


def _name_of(model: str) -> str:
    return "eval-" + re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[-100:]


@contextlib.contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Rank 0 has the lock for all."""
    with contextlib.ExitStack() as held:
        ranks.once(lambda: held.enter_context(run.lock()))()
        yield


@contextlib.contextmanager
def _context(run: Run, recipe: Recipe, console: Console, adapter: Path | None) -> Iterator[Context]:
    with console.waiting("loading libraries"):
        import torch

        from lco_lite.context import Context, out_of_memory
        from lco_lite.models.loading import limit_memory, quiet_libraries, resolve_device, reward_device

        quiet_libraries()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = resolve_device(recipe.device)
    if isinstance(recipe.reward_model, RewardModel):
        reward_device(recipe.reward_model.device, device)  # one that is not there is said before any stage
    limit_memory(device, recipe.memory_limit, console)
    ctx = Context(run, recipe, console, device, adapter)
    try:
        yield ctx
    except (LcoError, BrokenPipeError, typer.Exit):
        raise
    except Exception as e:
        still_there(run.path)
        if out_of_memory(e):
            listed = "\n".join(f"  {i}. {text}" for i, text in enumerate(_remedies(ctx), 1))
            where = f"phase {ctx.clock.phase}" + (f" of {ctx.stage}" if ctx.stage else "")
            head = f"out of memory in {where}, peak {peak_mib():.0f} MiB. Change, in this order:"
            raise MemoryExhausted(f"{head}\n{listed}\n({(str(e) or type(e).__name__).splitlines()[0]})") from e
        log = run.path / "error.log"
        try:
            write_text(log, visible(traceback.format_exc()))
            where = f"The traceback is in {log}"
        except LcoError as unwritten:
            where = f"Its traceback is lost: {unwritten}"
        file = users_file(e)
        raise LcoError(f"failed while {ctx.clock.phase}{f', in {file}' if file else ''}: {told(e)}\n{where}") from e


def _remedies(ctx: Context) -> list[str]:
    """What to change where memory runs out, the cheapest first. Batches are as small as they get by then: what is left
    is one sequence, what is kept beside it, and the weights."""
    recipe, phase = ctx.recipe, ctx.clock.phase
    name, trains = section(ctx.stage), phase in ("update", "preflight")
    own_settings = getattr(recipe, name)
    samples, weights = phase in ("rollout", "eval"), recipe.model
    own = recipe.reward_model if isinstance(recipe.reward_model, RewardModel) else None
    trained = own if own is not None and name == "train_rm" else weights
    part, on_gpu = "reward_model" if trained is own else "model", ctx.device.type == "cuda"
    whole = own is not None and not own.streaming and on_gpu
    new_tokens = {"eval": "eval.max_new_tokens", "rollout": "rl.max_new_tokens"}.get(phase, "rl.max_new_tokens")
    remedies = {
        f"memory_limit (now {recipe.memory_limit}): a higher one": recipe.memory_limit is not None,
        f"{new_tokens}: shorter responses": samples or (name == "rl" and phase != "loading"),
        f"{name}.max_length (now {own_settings.max_length}): longer sequences are left out": phase
        not in ("loading", "eval"),
        "eval.few_shot: fewer worked examples": phase == "eval" and recipe.eval.few_shot > 0,
        "residency: phase": recipe.residency == "all" and own is not None and name != "sft" and on_gpu,
        f"{part}.gradient_checkpointing: true": trains and not trained.gradient_checkpointing,
        f"{part}.gradient_checkpointing: offload": trains and trained.gradient_checkpointing is True,
        f"rl.prompts_per_step (now {recipe.rl.prompts_per_step}): fewer hidden states lie in the host's memory": (
            phase == "score" and name == "rl"
        ),
        f"{name}.optimizer: adamw_8bit, or paged_adamw_8bit": trains and own_settings.optimizer == "adamw",
        "model.quantization: nf4": weights.quantization == "none" and weights.lora is not None and weights.init is None,
        "reward_model.quantization: nf4": own is not None and own.quantization == "none" and name != "sft",
        "reward_model.streaming: true": whole and (name == "train_rm" or phase in ("loading", "score")),
        "close what else uses the device": True,
        "a smaller model": True,
    }
    return [text + _with_fresh(ctx, text) for text, fits in remedies.items() if fits]


def _with_fresh(ctx: Context, remedy: str) -> str:
    """What else it takes where the setting that a remedy names decides a stage that has started."""
    key = "model.path" if remedy == "a smaller model" else re.split(r"[:, ]", remedy)[0]
    stages = ctx.recipe.stages if ctx.stage in ctx.recipe.stages else []
    with ranks.apart():  # the others may have memory left
        for stage in stages[: stages.index(ctx.stage) + 1] if stages else []:
            if "." in key and decides(ctx.recipe, stage, key) and ctx.run.stage(stage).started():
                return f" (with `{verb(stage)} --fresh`: it decides {stage}, which has started)"
    return ""


def _base_and_adapter(model: str) -> tuple[str, Path | None]:
    """A PEFT folder names the base it belongs to; anything else is a base itself."""
    config = Path(model) / "adapter_config.json"
    if not config.is_file():
        return model, None
    try:
        adapter = json_format.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{config}: damaged: {e}") from e
    if not isinstance(adapter, dict):
        raise UsageError(f"{config}: damaged: an object with named fields is needed, found {adapter!r:.80}")
    base = adapter.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UsageError(f"{config}: names no base_model_name_or_path, so its base is unknown; found {base!r:.80}")
    return named_base(base, config.parent), config.parent
