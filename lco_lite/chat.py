"""``lco-lite chat``: a conversation with a policy, or with two of them side by side.

A turn is written for the model as in training: the recipe's system message, the chat template, the prompt's tokens.
Answers come token by token from ``LockstepEngine``, of one policy as of π*. At every token both policies draw with the
same random numbers, those of the seed, the turn and the token, so that a conversation comes out the same again.
Without a terminal a line of stdin is a turn, and stdout has the answers alone.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lco_lite import weights
from lco_lite.command import reading
from lco_lite.console import Console
from lco_lite.context import Context, out_of_memory
from lco_lite.data.prompts import recipe_task, system_text
from lco_lite.errors import LcoError, UsageError
from lco_lite.files import is_there, json_line, read_jsonl, write_bytes
from lco_lite.models.chat import ChatFormat, PlainText
from lco_lite.models.language_model import Role
from lco_lite.recipe.sections import greedy_or_warm
from lco_lite.rollout.engine import Sampling, before_stop, open_engine
from lco_lite.rollout.lockstep import LockstepEngine, alone, optimal_policy
from lco_lite.run import Run, no_run
from lco_lite.sequences import seeded

LONGEST = 512  # tokens of an answer where neither recipe nor task says
HELP = """\
/seed N           draws the next answers anew; the same N, the same answers
/temperature X    0: greedy
/max N            longest answer, tokens
/system TEXT      another system message; without TEXT none
/reset            forgets the conversation
/save FILE        appends it to FILE, a JSONL of demonstrations for sft
/help  /quit      Ctrl-C stops an answer; Ctrl-C or Ctrl-D at the prompt ends"""


@dataclass
class Voice:
    """A policy, and the conversation as it has it: ``turns`` without the system message."""

    name: str
    of: str  # run and base model; empty where the name is the model's
    engine: LockstepEngine
    form: ChatFormat
    window: int
    system: str | None
    stop: tuple[str, ...]
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def answer(self, sampling: Sampling, seed: int) -> Generator[str]:
        """The answer to the last turn, longer each time. Raises UsageError where the window has no room for one."""
        prompt = self.form.prompt(self.messages)
        room = min(sampling.max_new_tokens, self.window - len(prompt))
        if room < 1:
            raise UsageError(f"the conversation, {len(prompt)} tokens, fills the window of {self.window}: /reset")
        held_back = max(map(len, self.stop), default=1) - 1  # may be the beginning of a stop string
        ids, text = list[int](), ""
        with contextlib.closing(self.engine.stream(prompt, replace(sampling, max_new_tokens=room))) as tokens:
            while True:
                with seeded(seed, "chat", len(self.turns), len(ids)):
                    token = next(tokens, None)
                if token is None:
                    break
                ids.append(token)
                text = self.form.text(ids)
                if any(stop in text for stop in self.stop):
                    break
                yield text[: max(0, len(text) - held_back)].rstrip("\N{REPLACEMENT CHARACTER}")  # half a character
        yield before_stop(text, self.stop)


def chat(
    which: str | None,
    policy: str | None,
    beside: str | None,
    runs: Path,
    sets: list[str] | None,
    flags: dict[str, Any],
    seed: int | None,
) -> None:
    """``which``: a run's name or folder, a model or adapter folder, a hub id; None: the newest run. Raises UsageError
    where there is no such policy."""
    interactive = sys.stdin.isatty()
    console = Console(json=not interactive)  # then what is said besides goes to stderr
    with contextlib.ExitStack() as opened:
        voices = open_voices(which, policy, beside, runs, sets, flags, console, opened)
        columns = interactive and console.is_wide
        talk = Conversation(voices[0][0], [voice for _, voice in voices], console, columns, seed)
        talk.converse(from_terminal(console) if interactive else from_pipe())


def open_voices(
    which: str | None,
    policy: str | None,
    beside: str | None,
    runs: Path,
    sets: list[str] | None,
    flags: dict[str, Any],
    console: Console,
    opened: contextlib.ExitStack,
) -> list[tuple[Context, Voice]]:
    run = Run.known(which, runs)
    if run is None and which is not None and "/" not in which and not Path(which).exists():
        raise no_run(which, runs, "A model of the hub is named with its owner, e.g. openai-community/gpt2")
    if run is None and policy not in (None, "base"):
        raise UsageError(f"chat --policy {policy}: {which} is no run under {runs}/, and a model has no other policies")
    ctx = opened.enter_context(reading(run or str(which), runs, sets, flags, console))
    if run is None:
        return _of_model(ctx, str(which), beside, runs, sets, flags, console, opened)
    names = [weights.named_policy(run, policy)]
    other = None
    if beside is not None and (beside in weights.policies(run) or not _elsewhere(beside, runs)):
        names.append(weights.named_policy(run, beside))
    elif beside is not None:
        other = open_voices(beside, None, None, runs, sets, flags, console, opened)
    roles = open_roles(ctx, names)
    return [(ctx, open_voice(ctx, name, of)) for name, of in zip(names, roles, strict=True)] + (other or [])


def _of_model(
    ctx: Context,
    path: str,
    beside: str | None,
    runs: Path,
    sets: list[str] | None,
    flags: dict[str, Any],
    console: Console,
    opened: contextlib.ExitStack,
) -> list[tuple[Context, Voice]]:
    role = weights.open_stage(ctx, "base")
    voices = [(ctx, open_voice(ctx, path, [role]))]
    if beside == "base" and role.adapter is not None:
        return [*voices, (ctx, open_voice(ctx, "base", [Role(role.model)]))]
    if beside == "base":
        raise UsageError(f"chat --beside base: {path} is no adapter, and so a base itself")
    return voices + (open_voices(beside, None, None, runs, sets, flags, console, opened) if beside else [])


def _elsewhere(name: str, runs: Path) -> bool:
    """Whether it names another run, or a folder or hub id."""
    return Run.known(name, runs) is not None or "/" in name or is_there(Path(name))


def open_roles(ctx: Context, names: Sequence[str]) -> list[list[Role]]:
    """Of each policy the one role, of π* its three. Those that are adapters share one base in memory."""
    adapts = ctx.recipe.model.lora is not None and set(names) != {"base"}
    start = weights.open_start(ctx) if adapts or {"sft", "rm", "optimal"} & set(names) else None
    reward: tuple[Role, ...] = ()
    roles = []
    for i, name in enumerate(names):
        if name in ("rm", "optimal"):
            assert start is not None
            reward = reward or weights.open_reward_model(ctx, start)
            roles.append([start, *reward] if name == "optimal" else [reward[0]])
        else:
            roles.append([weights.open_stage(ctx, name, start, f"{weights.POLICY}{i}")])
    return roles


def open_voice(ctx: Context, name: str, roles: list[Role]) -> Voice:
    recipe, model = ctx.recipe, roles[0].model
    plain = recipe.eval.format == "text" and name == "base"  # what is trained knows the template alone
    form = (PlainText if plain else ChatFormat)(model.tokenizer, recipe.chat.template_args, ctx.console.warn)
    combine = alone if len(roles) == 1 else optimal_policy(recipe.rl.beta)
    engine = open_engine(roles, form.end, combine, say=ctx.console.note)
    assert isinstance(engine, LockstepEngine)
    title = f"π* (β {recipe.rl.beta:g})" if len(roles) > 1 else name
    system = system_text(recipe, recipe_task(recipe))
    base = recipe.model.path or "from scratch"
    of = f"{ctx.run.name} ({base})" if ctx.run.has_recipe() else "" if name == base else base
    return Voice(title, of, engine, form, model.max_length, system, tuple(recipe.eval.stop))


class Quit(Exception):
    """``/quit``."""


class Conversation:
    """What the commands change, and who is spoken with."""

    def __init__(
        self, ctx: Context, voices: list[Voice], console: Console, columns: bool, seed: int | None = None
    ) -> None:
        settings, task = ctx.recipe.eval, recipe_task(ctx.recipe)
        self.voices, self.console, self.columns = voices, console, columns
        self.seed = ctx.recipe.seed if seed is None else seed
        self.temperature, self.top_p = settings.temperature, settings.top_p
        self.longest = settings.max_new_tokens or (task.max_new_tokens if task else LONGEST)

    def converse(self, lines: Iterator[str]) -> None:
        names = " | ".join(f"{voice.name} of {voice.of}" if voice.of else voice.name for voice in self.voices)
        sampled = f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"
        self.console.note(f"{names}  {sampled}, at most {self.longest} tokens; /help")
        for line in lines:
            text = line.strip()
            try:
                if text.startswith("/"):
                    self.command(text)
                elif text:
                    self.turn(text)
            except (Quit, KeyboardInterrupt):
                return
            except LcoError as e:
                self.tell(e)

    def tell(self, e: Exception) -> None:
        self.console.note(" ".join(str(e).split()), style="yellow")

    # a turn

    def turn(self, text: str) -> None:
        """All answer, each in its own conversation; in columns they write in turns, else one after another."""
        sampling = Sampling(self.temperature, self.top_p, self.longest, 1)
        answers = list[Generator[str]]()
        for voice in self.voices:
            voice.turns.append({"role": "user", "content": text})
            answers.append(voice.answer(sampling, self.seed))
        said, failed = [""] * len(self.voices), list[Exception]()

        def grow(i: int) -> bool:
            """Whether voice ``i`` has more to say."""
            try:
                text = next(answers[i], None)
            except Exception as e:
                if not (isinstance(e, LcoError) or out_of_memory(e)):
                    raise
                failed.append(e if isinstance(e, LcoError) else UsageError("out of memory: /reset, or a lower /max"))
                return False
            said[i] = said[i] if text is None else text
            return text is not None

        try:
            with stoppable() as asked:
                (self._in_columns if self.columns and len(self.voices) > 1 else self._in_a_row)(grow, said, asked)
        finally:
            for voice, answer, one in zip(self.voices, answers, said, strict=True):
                answer.close()
                if one:
                    voice.turns.append({"role": "assistant", "content": one})
                else:
                    voice.turns.pop()
        for e in failed:
            self.tell(e)

    def _in_a_row(self, grow: Callable[[int], bool], said: list[str], asked: threading.Event) -> None:
        for i, voice in enumerate(self.voices):
            if len(self.voices) > 1:
                self.console.write(f"[{voice.name}]\n")
            shown = 0
            while not asked.is_set() and grow(i):
                self.console.write(said[i][shown:])
                shown = max(shown, len(said[i]))
            self.console.write("\n")

    def _in_columns(self, grow: Callable[[int], bool], said: list[str], asked: threading.Event) -> None:
        with self.console.beside([voice.name for voice in self.voices]) as draw:
            writing = list(range(len(self.voices)))
            while writing and not asked.is_set():
                writing = [i for i in writing if grow(i)]
                draw(said)

    # commands

    def command(self, line: str) -> None:
        """Raises UsageError, in one line, for one that is not known or has no sense."""
        name, _, rest = line[1:].partition(" ")
        known: dict[str, Callable[[str], None]] = {
            "seed": self._seed,
            "temperature": self._temperature,
            "max": self._max,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
            "help": lambda rest: self.console.note(HELP),
            "quit": self._quit,
        }
        if name not in known:
            raise UsageError(f"no command /{name}: /help lists them")
        known[name](rest.strip())

    def _number(self, text: str, kind: type, least: float, most: float, what: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise UsageError(f"{what}, found {text!r}")
        return value

    def _seed(self, rest: str) -> None:
        self.seed = self._number(rest, int, 0, 2**31 - 1, "/seed takes a whole number from 0")

    def _temperature(self, rest: str) -> None:
        value = self._number(rest, float, 0, 1e6, "/temperature takes a number from 0, which is greedy")
        try:
            self.temperature = greedy_or_warm(value)
        except ValueError as e:
            raise UsageError(f"/temperature: {e}") from e

    def _max(self, rest: str) -> None:
        self.longest = self._number(rest, int, 1, 2**31, "/max takes a number of tokens from 1")

    def _system(self, rest: str) -> None:
        for voice in self.voices:
            voice.system = rest or None

    def _reset(self, rest: str) -> None:
        for voice in self.voices:
            voice.turns.clear()

    def _quit(self, rest: str) -> None:
        raise Quit

    def _save(self, rest: str) -> None:
        """A line a policy; with two of them each says whose it is. What the file has already stays."""
        try:
            (name,) = shlex.split(rest)
            file = Path(name).expanduser()
        except (ValueError, RuntimeError):  # RuntimeError: the home of nobody
            raise UsageError(f"/save takes one file, found {rest!r:.200}") from None
        if "\0" in name:
            raise UsageError(f"/save: {name!r:.200} is no name for a file")
        rows = [voice for voice in self.voices if voice.turns]
        if not rows:
            raise UsageError("/save: nothing is said yet")
        if is_there(file) and file.is_dir():
            raise UsageError(f"/save: {file} is a folder; name a file")
        before = b""
        if is_there(file) and file.stat().st_size:
            read_jsonl(file)  # raises for a file that is something else
            before = file.read_bytes().rstrip() + b"\n"
        many = len(self.voices) > 1
        lines = [json_line({"messages": v.messages} | ({"policy": v.name} if many else {})) for v in rows]
        write_bytes(file, before + b"".join(lines))
        self.console.note(f"{'appended to' if before else 'saved in'} {file}")


# where turns come from, and what stops an answer


def from_terminal(console: Console) -> Iterator[str]:
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # input() then edits its line and knows the ones before
    while True:
        try:
            yield input("> ")
        except UnicodeDecodeError:
            console.note("that is no text in this terminal's encoding", style="yellow")
        except (EOFError, KeyboardInterrupt):
            console.write("\n")
            return


def from_pipe() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "replace")


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Inside, Ctrl-C sets the event; once more it raises KeyboardInterrupt."""
    asked = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, on_signal) if main else None
    try:
        yield asked
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
