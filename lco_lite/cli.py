"""The command line: parse, resolve the recipe, call one stage. No logic, no heavy import outside a command's body."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lco_lite import __version__
from lco_lite.recipe.rl import METHOD_DEFAULTS

app = typer.Typer(
    name="lco-lite",
    help="Improve a small language model by reinforcement learning on one GPU, without collapse.",
    epilog="First: lco-lite run quickstart. Then: lco-lite sft math, lco-lite rl --objective lch, lco-lite eval",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

data_app = typer.Typer(help="Look at a recipe's training data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

RecipeArg = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file or a shipped recipe's name. Without it the newest run goes on.",
        show_default=False,
    ),
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of all runs.", envvar="LCO_LITE_RUNS")]
Name = Annotated[
    str | None, typer.Option("--name", help="The run's name; the recipe's unless given.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Set any field of the recipe, e.g. -s rl.lr=1e-5. Repeatable.",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of weights, data order and sampling.", show_default=False)
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.", show_default=False)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete this stage and what was built on it, and start it again.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show the resolved recipe, one rendered example and the step counts; train nothing."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and the last line.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lco-lite {__version__}")
        raise typer.Exit


def _objective(name: str | None) -> str | None:
    """Whether there is such an objective is told before a run is looked for."""
    if name is not None:
        from lco_lite.recipe.rl import known_objective

        try:
            known_objective(name)
        except ValueError as e:
            raise typer.BadParameter(str(e)) from e
    return name


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file or a shipped recipe's name.")],
    sets: Set = None,
    name: Name = None,
    seed: Seed = None,
    device: Device = None,
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """All stages in order, then the score after each. Skips what is done."""
    from lco_lite.command import command

    with command(recipe, runs, name, sets, {"seed": seed, "device": device}, quiet=quiet, dry_run=dry_run) as ctx:
        from lco_lite.train.pipeline import run_all

        run_all(ctx, fresh)


@app.command()
def sft(
    recipe: RecipeArg = None,
    sets: Set = None,
    name: Name = None,
    seed: Seed = None,
    device: Device = None,
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Supervised warm-up on demonstrations."""
    _stage("sft", recipe, runs, name, sets, {"seed": seed, "device": device}, fresh, dry_run, quiet)


@app.command("train-rm")
def train_rm(
    recipe: RecipeArg = None,
    sets: Set = None,
    name: Name = None,
    seed: Seed = None,
    device: Device = None,
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """The reward model, by DPO on preference pairs from data or sampled here."""
    _stage("rm", recipe, runs, name, sets, {"seed": seed, "device": device}, fresh, dry_run, quiet)


@app.command()
def rl(
    recipe: RecipeArg = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help=f"{', '.join(METHOD_DEFAULTS)}, or FILE.py:NAME.",
            show_default=False,
            callback=_objective,
        ),
    ] = None,
    beta: Annotated[
        float | None, typer.Option("--beta", help="Strength of the KL regulariser.", show_default=False)
    ] = None,
    feedback: Annotated[
        str | None,
        typer.Option(
            "--feedback", help="dpo, dpo_sampled, logprob, rule, function or reward_model.", show_default=False
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Rollout phases.", show_default=False)] = None,
    sets: Set = None,
    name: Name = None,
    seed: Seed = None,
    device: Device = None,
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Policy optimisation by LCO, or by what it is compared with; missing stages below it are trained first."""
    flags = {
        "seed": seed,
        "device": device,
        "rl.objective": objective,
        "rl.beta": beta,
        "rl.feedback": feedback,
        "rl.steps": steps,
    }
    _stage("rl", recipe, runs, name, sets, flags, fresh, dry_run, quiet)


@app.command("eval")
def evaluate(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(metavar="TASK…", help="Tasks, e.g. math500; the recipe's unless given.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Score this model or adapter folder, or hub id, instead of a run.", show_default=False
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            help="base, sft, rm, rl-OBJECTIVE, or optimal: decode from π*. The newest policy unless given.",
            show_default=False,
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option("--beta", help="β of --policy optimal; the recipe's unless given.", show_default=False),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="Sampling passes over the items.", show_default=False)
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Decode greedily, one pass.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only the first so many items.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Responses an item and pass: pass@k and maj@k.", show_default=False),
    ] = None,
    scoring: Annotated[
        str | None,
        typer.Option("--scoring", help="generation, or likelihood of the letters of the choices.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="A local JSONL file with the task's items, or a folder of such.", show_default=False
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            metavar="A B",
            help="Two scores that are there, STAGE or RUN/STAGE: difference, p-value, answers that flipped.",
            show_default=False,
        ),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url",
            metavar="URL",
            help="alpaca_eval: chat-completions API that judges, or alpaca-eval for that package.",
            show_default=False,
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="The judge's name there.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Judge, whatever number of requests it takes.")] = False,
    list_tasks: Annotated[bool, typer.Option("--list", help="List the tasks and stop.")] = False,
    sets: Set = None,
    name: Name = None,
    seed: Seed = None,
    device: Device = None,
    runs: Runs = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON on stdout.")] = False,
    quiet: Quiet = False,
) -> None:
    """pass@1 of the newest policy, or of any model folder or hub id, with its spread over seeds."""
    from lco_lite.command import command_for_compare, command_for_eval, tell_tasks

    if list_tasks:
        return tell_tasks()
    if compare:
        return command_for_compare(compare, model or policy, tasks, runs, name, scoring, quiet, json)
    flags: dict[str, Any] = {"seed": seed, "device": device, "eval.seeds": seeds, "eval.items": limit, "rl.beta": beta}
    flags |= {"eval.temperature": 0.0 if greedy else None, "eval.samples": samples, "eval.scoring": scoring}
    flags |= {"eval.judge_url": judge_url, "eval.judge_model": judge_model, "eval.judge_confirmed": yes or None}
    with command_for_eval(model, tasks, runs, name, sets, flags, quiet=quiet, json=json) as ctx:
        from lco_lite.evaluation.evaluate import score

        score(ctx, tasks, policy, model, json, data)


@data_app.command("check")
def data_check(
    recipe: Annotated[str, typer.Argument(help="A recipe file or a shipped recipe's name.")],
    sets: Set = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Rows, lengths, template, duplicates, and evaluation items among the training prompts."""
    from lco_lite.command import command_for_data

    command_for_data(recipe, sets, json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.", show_default=False)] = None,
    copy: Annotated[
        Path | None, typer.Option("--copy", help="Copy it (or all) into this folder.", show_default=False)
    ] = None,
) -> None:
    """List, show or copy the shipped recipes."""
    from lco_lite.command import boundary
    from lco_lite.recipe.file import copy_recipes, show_recipes

    with boundary():
        copy_recipes(name, copy) if copy else show_recipes(name)


@app.command()
def env(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Versions, device and memory, for a bug report."""
    from lco_lite.command import boundary, tell_environment

    with boundary():
        tell_environment(json)


def _stage(
    stage: str,
    recipe: str | None,
    runs: Path,
    name: str | None,
    sets: list[str] | None,
    flags: dict[str, Any],
    fresh: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    from lco_lite.command import command

    with command(recipe, runs, name, sets, flags, quiet=quiet, dry_run=dry_run) as ctx:
        from lco_lite.train.pipeline import announce, train

        stage = ctx.recipe.rl.stage if stage == "rl" else stage
        train(ctx, stage, fresh)
        announce(ctx, stage)
