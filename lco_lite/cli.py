"""What can be typed: each command with its flags, and the one function it calls. No heavy import outside a body."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from lco_lite import __version__
from lco_lite.command import DryRun, boundary, command
from lco_lite.console import Console
from lco_lite.environment import environment
from lco_lite.errors import UsageError
from lco_lite.recipe.file import copy_recipes, find_recipe, load_recipe, show_recipes, unwritten
from lco_lite.recipe.rl import METHOD_DEFAULTS, known_objective
from lco_lite.shell import Command, Group, compared, forms, objectives, of, policies, recipe_names, run_names
from lco_lite.shell import tasks as known_tasks

app = typer.Typer(
    name="lco-lite",
    cls=Group,
    help="Improve a small language model by reinforcement learning on one GPU, without collapse.",
    epilog="First: lco-lite run quickstart. Then: lco-lite sft math, lco-lite rl --objective lch, lco-lite eval",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Look at a recipe's training data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

_GRADER = "math, rounded, string (the public code's), choice, exact or FILE.py:NAME; else the task's."
_COMPARE = "Two earlier scores, STAGE or RUN/STAGE (or several, joined by commas: training runs): difference, p-value."
_JUDGE = "alpaca_eval: chat-completions API that judges, or alpaca-eval for that package."
_JUDGE_KEY = "Send the key in this environment variable to this host; known hosts get their own without it."
_OBJECTIVES = f"{', '.join(METHOD_DEFAULTS)}, or FILE.py:NAME."
_POLICY = "base, sft, rm, rl (the newest) or rl-OBJECTIVE; STAGE@best, STAGE@STEP; optimal (π*); else the newest."
_SET = "Set any field of the recipe, e.g. -s rl.lr=1e-5. Repeatable."
_WHICH = "A recipe file or a shipped recipe's name."

_RECIPES = of(recipe_names)
Recipe = Annotated[str, Argument(help=_WHICH, autocompletion=_RECIPES)]
RecipeOrNewest = Annotated[
    str | None,
    Argument(metavar="RECIPE", help=f"{_WHICH} Without it the newest run goes on.", autocompletion=_RECIPES),
]
Sets = Annotated[list[str] | None, Option("--set", "-s", metavar="KEY=VALUE", help=_SET)]
Runs = Annotated[Path, Option(help="Folder of all runs.", envvar="LCO_LITE_RUNS")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]


@dataclass
class RunFlags:
    """The flags of every command on a run. ``Annotated`` holds what typer shows of them."""

    sets: Sets = None
    name: Annotated[
        str | None, Option(help="The run's name; the recipe's unless given.", autocompletion=of(run_names))
    ] = None
    seed: Annotated[int | None, Option(help="Seed of weights, data order and sampling.")] = None
    device: Annotated[str | None, Option(help="auto, cpu, cuda or mps.")] = None
    runs: Runs = Path("runs")
    quiet: Annotated[bool, Option("--quiet", "-q", help="Only warnings, scores and the last line.")] = False

    def arguments(self, flags: dict[str, Any] | None = None) -> dict[str, Any]:
        """For ``command``; ``flags`` are the command's own, by the recipe's field."""
        fields = {"seed": self.seed, "device": self.device, **(flags or {})}
        return {"runs": self.runs, "name": self.name, "sets": self.sets, "flags": fields, "quiet": self.quiet}


@dataclass
class TrainFlags(RunFlags):
    fresh: Annotated[bool, Option("--fresh", help="Delete this stage and what was built on it; start anew.")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Look at all files, tell what would be done.")] = False
    full: Annotated[bool, Option("--full", help="With --dry-run: the resolved recipe and whole example too.")] = False
    tracker: Annotated[list[str] | None, Option(help="trackio, wandb, tensorboard: told each step. Repeatable.")] = None

    def arguments(self, flags: dict[str, Any] | None = None) -> dict[str, Any]:
        return super().arguments({"trackers": self.tracker or None, **(flags or {})})

    def preview(self, upto: str) -> DryRun | None:
        if self.full and not self.dry_run:
            raise typer.BadParameter("it belongs to --dry-run", param_hint="--full")
        return DryRun(upto, self.fresh, self.full) if self.dry_run else None


def spread(kind: type[RunFlags]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the flags of ``kind`` beside its own; it gets them as one argument, ``on``."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "on"]

        @functools.wraps(function)
        def call(**given: Any) -> None:
            function(**{p.name: given.pop(p.name) for p in own}, on=kind(**given))

        parameters = [*own, *inspect.signature(kind).parameters.values()]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def _version(wanted: bool) -> None:
    if wanted:
        Console().say(f"lco-lite {__version__}")
        raise typer.Exit


def _objective(name: str | None) -> str | None:
    """Whether there is such an objective is told before a run is looked for."""
    try:
        return name and known_objective(name)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e


Objective = Annotated[str | None, Option(help=_OBJECTIVES, callback=_objective, autocompletion=of(objectives))]
Beta = Annotated[float | None, Option(help="Strength of the KL regulariser.")]
Steps = Annotated[int | None, Option(help="Rollout phases; more than are done go on from the last.")]


@app.callback()
def _main(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None: ...


@app.command()
def init(
    file: Annotated[str, Argument(help="Your prompts, with answers or pairs: .jsonl, .json, .csv or .parquet.")],
    reward: Annotated[list[str] | None, Option(metavar="FILE.py", help="Your reward function. Repeatable.")] = None,
    model: Annotated[str | None, Option(help="A model folder, GGUF file or hub id; else one that fits.")] = None,
    out: Annotated[Path | None, Option(help="The recipe; beside the data unless given.")] = None,
) -> None:
    """A commented recipe that fits your data and this machine."""
    with boundary():
        unwritten(file, out)  # said before torch is loaded
        from lco_lite.models.loading import quiet_libraries

        quiet_libraries()
        from lco_lite.init import write_recipe

        write_recipe(file, reward or [], model, out, Console())


@app.command()
@spread(TrainFlags)
def run(recipe: Recipe, on: TrainFlags, objective: Objective = None, beta: Beta = None, steps: Steps = None) -> None:
    """All stages in order, then the score after each. Skips what is done."""
    flags = {"rl.objective": objective, "rl.beta": beta, "rl.steps": steps}
    with command(recipe, **on.arguments(flags), dry_run=on.preview("run")) as ctx:
        from lco_lite.train.pipeline import run_all

        run_all(ctx, on.fresh)


@app.command()
@spread(TrainFlags)
def sft(on: TrainFlags, recipe: RecipeOrNewest = None) -> None:
    """Supervised warm-up on demonstrations."""
    _train("sft", recipe, on)


@app.command()
@spread(TrainFlags)
def train_rm(on: TrainFlags, recipe: RecipeOrNewest = None) -> None:
    """The reward model, by DPO on pairs from data or sampled here."""
    _train("rm", recipe, on)


@app.command()
@spread(TrainFlags)
def rl(
    on: TrainFlags,
    recipe: RecipeOrNewest = None,
    objective: Objective = None,
    beta: Beta = None,
    feedback: Annotated[
        str | None, Option(help="dpo, logprob, dpo_sampled, rule, function, reward_model; 'dpo + rule'.")
    ] = None,
    steps: Steps = None,
) -> None:
    """Policy optimisation by LCO or another objective.

    Stages that it needs are trained first if they are missing.
    """
    flags = {"rl.objective": objective, "rl.beta": beta, "rl.feedback": feedback, "rl.steps": steps}
    _train("rl", recipe, on, flags)


def _train(stage: str, recipe: str | None, on: TrainFlags, flags: dict[str, Any] | None = None) -> None:
    with command(recipe, **on.arguments(flags), dry_run=on.preview(stage)) as ctx:
        from lco_lite.train.pipeline import announce, train

        stage = ctx.recipe.rl.stage if stage == "rl" else stage
        train(ctx, stage, on.fresh)
        announce(ctx, stage)


@app.command("eval")
@spread(RunFlags)
def evaluate(
    on: RunFlags,
    tasks: Annotated[
        list[str] | None,
        Argument(metavar="TASK…", help="e.g. math500; else the recipe's.", autocompletion=of(known_tasks)),
    ] = None,
    model: Annotated[str | None, Option(help="Score a model or adapter folder or hub id, not a run.")] = None,
    policy: Annotated[str | None, Option(help=_POLICY, autocompletion=of(policies))] = None,
    beta: Annotated[float | None, Option(help="β of --policy optimal; the recipe's unless given.")] = None,
    seeds: Annotated[int | None, Option(help="Sampling passes over the items.")] = None,
    greedy: Annotated[bool, Option("--greedy", help="Decode greedily, one pass.")] = False,
    limit: Annotated[int | None, Option(help="Only the first N items.")] = None,
    samples: Annotated[int | None, Option(help="Responses per item and pass, for pass@k and maj@k.")] = None,
    scoring: Annotated[str | None, Option(help="generation, or likelihood of the letters of the choices.")] = None,
    grader: Annotated[str | None, Option(help=_GRADER)] = None,
    data: Annotated[Path | None, Option(help="A local JSONL file with the task's items, or a folder of such.")] = None,
    compare: Annotated[
        tuple[str, str] | None, Option(metavar="A B", help=_COMPARE, autocompletion=of(compared))
    ] = None,
    judge_url: Annotated[str | None, Option(metavar="URL", help=_JUDGE)] = None,
    judge_model: Annotated[str | None, Option(help="The judge's name there.")] = None,
    judge_key: Annotated[str | None, Option(metavar="VARIABLE@HOST", help=_JUDGE_KEY)] = None,
    yes: Annotated[bool, Option("--yes", help="Judge, however many requests it takes.")] = False,
    list_tasks: Annotated[bool, Option("--list", help="List the tasks and stop.")] = False,
    json: Json = False,
) -> None:
    """The score of a run's policy, or of any model.

    pass@1 with its spread over seeds; without --policy of the newest policy.
    """
    if list_tasks:
        from lco_lite.tasks import task_names

        return Console().say("\n".join(task_names()))
    if compare:
        with boundary():
            from lco_lite.evaluation.compare import compare_scores

            if model or policy:
                raise UsageError("eval --compare reads two earlier scores: leave out --model and --policy")
            screen = Console(quiet=on.quiet, json=json)
            return compare_scores(on.runs, on.name, tasks, compare, scoring or "generation", grader, screen, json)
    flags: dict[str, Any] = {"eval.seeds": seeds, "eval.items": limit, "rl.beta": beta}
    flags |= {"eval.temperature": 0.0 if greedy else None, "eval.samples": samples, "eval.scoring": scoring}
    flags |= {"eval.grader": grader}
    flags |= {"eval.judge_url": judge_url, "eval.judge_model": judge_model, "eval.judge_confirmed": yes or None}
    with command(None, **on.arguments(flags), json=json, model=model, tasks=tasks) as ctx:
        from lco_lite.evaluation.evaluate import score

        ctx.recipe.eval.confirm_key(judge_key)
        score(ctx, tasks, policy, model, json, data)


@app.command()
def chat(
    which: Annotated[
        str | None,
        Argument(
            metavar="RUN|PATH", help="A run, model or adapter; else the newest run.", autocompletion=of(run_names)
        ),
    ] = None,
    policy: Annotated[
        str | None,
        Option(help="As eval names it: base, sft, rl-OBJECTIVE, optimal (π*) …", autocompletion=of(policies)),
    ] = None,
    beside: Annotated[
        str | None, Option(metavar="NAME", help="A second one: of the same run, or a run or path.")
    ] = None,
    temperature: Annotated[float | None, Option(help="0 is greedy; else eval's of the recipe.")] = None,
    max_tokens: Annotated[int | None, Option("--max", help="Longest answer, tokens.")] = None,
    system: Annotated[str | None, Option(help="System message; the recipe's unless given.")] = None,
    seed: Annotated[int | None, Option(help="Of sampling.")] = None,
    device: Annotated[str | None, Option(help="auto, cpu, cuda or mps.")] = None,
    sets: Sets = None,
    runs: Runs = Path("runs"),
) -> None:
    """Talk to a policy, or to two side by side.

    /help there lists the commands.
    """
    flags = {"eval.temperature": temperature, "eval.max_new_tokens": max_tokens, "chat.system": system}
    with boundary():
        from lco_lite.chat import chat

        chat(which, policy, beside, runs, sets, flags | {"device": device}, seed)


@app.command("runs")
def list_runs(
    name: Annotated[
        str | None, Argument(help="One run in detail; without it all are listed.", autocompletion=of(run_names))
    ] = None,
    clean: Annotated[bool, Option("--clean", help="Delete what nothing needs any more; it is shown first.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    runs: Runs = Path("runs"),
    json: Json = False,
) -> None:
    """Stages, scores and sizes of the runs, and what of them can go."""
    with boundary():
        from lco_lite.runs import clean_runs, show_runs

        screen = Console(json=json)
        clean_runs(runs, name, screen, yes, json) if clean else show_runs(runs, name, screen, json)


@app.command()
def export(
    run: Annotated[
        str | None,
        Argument(metavar="RUN", help="A run's name or folder; else the newest.", autocompletion=of(run_names)),
    ] = None,
    to: Annotated[str, Option(help="adapter, merged, gguf, gguf-lora or ollama.", autocompletion=of(forms))] = "merged",
    policy: Annotated[
        str | None, Option(help="As eval names it, of what is trained; STAGE@best.", autocompletion=of(policies))
    ] = None,
    out: Annotated[Path | None, Option(help="Folder to write; in the run unless given.")] = None,
    dtype: Annotated[str, Option(help="float32, bfloat16, float16, of a GGUF q8_0; auto: the run's.")] = "auto",
    converter: Annotated[Path | None, Option(help="llama.cpp, or its convert_hf_to_gguf.py; else $LLAMA_CPP.")] = None,
    push: Annotated[str | None, Option(metavar="OWNER/NAME", help="Upload it to this repository of the hub.")] = None,
    runs: Runs = Path("runs"),
    fresh: Annotated[bool, Option("--fresh", help="Replace an earlier export.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Only warnings and the last line.")] = False,
) -> None:
    """What a stage made, for other programs.

    An adapter, a merged model, a GGUF or an Ollama model.
    """
    with boundary():
        from lco_lite.models.loading import quiet_libraries

        quiet_libraries()
        from lco_lite.export.forms import export

        export(run, runs, to, policy, out, dtype, converter, push, fresh, Console(quiet))


@app.command()
def study(
    name: Annotated[str | None, Argument(help="Which study; without it they are listed.")] = None,
    recipe: Annotated[str | None, Argument(help=f"{_WHICH} The study's own unless given.")] = None,
    seeds: Annotated[int | None, Option(min=1, max=1000, help="Training seeds; else the study's own number.")] = None,
    sets: Sets = None,
    only: Annotated[list[str] | None, Option(metavar="LABEL", help="Run these of its runs alone. Repeatable.")] = None,
    jobs: Annotated[int | None, Option(min=1, max=1000, help="Runs at a time; two where cores allow.")] = None,
    runs: Runs = Path("runs"),
    out: Annotated[Path | None, Option(help="Folder of its page; in --runs unless given. Known rows count.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the grid and what of it is done.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Only warnings, scores and the last line.")] = False,
    json: Json = False,
) -> None:
    """A grid of runs that answers a question.

    A page with verdicts, tables and plots. Started again, it goes on.
    """
    with boundary():
        from lco_lite.study.verb import list_studies, run_study

        if name is None:
            return list_studies(Console())
        run_study(name, recipe, sets or [], seeds, runs, out, jobs, only or [], dry_run, Console(quiet, json), json)


@app.command()
def report(
    names: Annotated[
        list[str] | None, Argument(metavar="[RUN…|STUDY]", help="Runs by name or folder, or a study's folder.")
    ] = None,
    out: Annotated[
        Path | None, Option(metavar="FILE", help="The page; report.html in the run, or of several in --runs.")
    ] = None,
    figures: Annotated[Path | None, Option(metavar="DIR", help="Write the main figures there, as SVG and PNG.")] = None,
    every: Annotated[bool, Option("--all-figures", help="With --figures: those of all metrics.")] = False,
    runs: Runs = Path("runs"),
    quiet: Annotated[bool, Option("--quiet", "-q", help="Only warnings and the last line.")] = False,
) -> None:
    """One HTML page of runs or of a study.

    Scores, curves, recipe, and samples token by token.
    """
    with boundary():
        from lco_lite.report import report

        report(names or [], runs, out, figures, every, Console(quiet))


@data_app.command("check")
def data_check(recipe: Recipe, sets: Sets = None, json: Json = False) -> None:
    """Rows, lengths, template, duplicates, and evaluation items among the training prompts."""
    with boundary():
        from lco_lite.data.check import check_data
        from lco_lite.models.loading import quiet_libraries

        quiet_libraries()
        check_data(load_recipe(find_recipe(recipe), sets), Console(json=json), json)


@app.command()
def plan(
    recipe: Recipe,
    sets: Sets = None,
    gpu: Annotated[
        str | None, Option(metavar="SIZE", help="The card's memory, e.g. 12GiB; else the card here.")
    ] = None,
    rate: Annotated[float | None, Option(min=0.001, max=1e9, help="Tokens sampled a second; else a run's.")] = None,
    prompt: Annotated[int | None, Option(min=1, max=2**24, help="Tokens of the longest prompt.")] = None,
    runs: Runs = Path("runs"),
    json: Json = False,
) -> None:
    """Memory of each phase, disk and hours, from configs alone."""
    with boundary():
        from lco_lite.models.loading import quiet_libraries

        quiet_libraries()
        from lco_lite.plan import plan

        plan(load_recipe(find_recipe(recipe), sets), gpu, rate, prompt, runs, Console(json=json), json)


@app.command()
def recipes(
    name: Annotated[str | None, Argument(help="Print this one.")] = None,
    copy: Annotated[Path | None, Option(help="Copy it (or all) into this folder.")] = None,
) -> None:
    """List, show or copy the shipped recipes."""
    with boundary():
        copy_recipes(name, copy, Console()) if copy else show_recipes(name, Console())


@app.command()
def env(json: Json = False) -> None:
    """Versions, device and memory, for a bug report."""
    with boundary():
        facts = environment()
        if json:
            return Console(json=True).emit(facts)
        for topic, value in facts.items():
            for name, text in (value if isinstance(value, dict) else {"": value}).items():
                Console().say(f"{topic:10} {name:14} {text if text is not None else 'not installed'}")


for _made in (*app.registered_commands, *data_app.registered_commands):
    _made.cls = Command
