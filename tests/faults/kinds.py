"""The kinds of faults: the cases of each, by a text that says all of a case, and what must hold in one.

A function ``NAME_cases(shop, draw)`` gives the texts, in the order in which they are tried while there is time;
``NAME(shop, text)`` tries one, returns a word for how it went, and raises ``Failed`` where a promise was not kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.faults import children, damaged, hostile, malformed
from tests.faults.children import Ended, Fault
from tests.faults.runs import STAGES, Failed, Workshop, products, same, told_well, whole

Cases = Iterator[str]


def how(ended: Ended) -> str:
    if ended.status < 0:
        return signal.Signals(-ended.status).name
    return {0: "done all the same", 130: "stopped"}.get(ended.status, f"told, status {ended.status}")


# kills: SIGKILL at a random instant of a stage, up to three times in a row


def kills_cases(shop: Workshop, draw: Random) -> Cases:
    while True:
        for stage in STAGES:
            instants = [draw.uniform(0.02, shop.undisturbed[stage].seconds) for _ in range(draw.choice((1, 1, 2, 3)))]
            yield f"{stage} {','.join(f'{t:.3f}' for t in instants)}"


def kills(shop: Workshop, text: str) -> str:
    stage, instants = text.split()
    with shop.bench(stage) as runs:
        ends = [shop.disturbed(stage, runs, signals=[(float(t), signal.SIGKILL)]) for t in instants.split(",")]
        shop.goes_on(stage, runs)
    return "killed" if any(e.status == -signal.SIGKILL for e in ends) else "done before the kill"


# faults: an error, or the end of the process, at the k-th write, sync, rename or unlink


def faults_cases(shop: Workshop, draw: Random) -> Cases:
    ways = {
        "write": ("ENOSPC", "EIO", "die", "ENOSPC:lasting", "EIO:lasting"),
        "sync": ("EIO", "die", "EIO:lasting"),
        "rename": ("EIO", "EACCES", "die", "EIO:lasting"),
        "unlink": ("EIO", "die"),
    }
    cases = [
        f"{stage} {what}:{at}:{way}"
        for stage in STAGES
        for what in ways
        for at in range(1, shop.undisturbed[stage].counts.get(what, 0) + 1)
        for way in ways[what]
    ]
    draw.shuffle(cases)
    yield from cases


def faults(shop: Workshop, text: str) -> str:
    stage, fault = text.split()
    with shop.bench(stage) as runs:
        ended = shop.disturbed(stage, runs, Fault.read(fault))
        shop.goes_on(stage, runs)
    return how(ended)


# signals: Ctrl-C once and twice, SIGTERM, SIGHUP, at random instants; and Ctrl-C while the program is being imported

_SIGNALS = ("INT", "INT", "TERM", "INT+INT", "TERM+INT", "HUP")


def signals_cases(shop: Workshop, draw: Random) -> Cases:
    while True:
        for stage in STAGES:
            t = draw.uniform(0.02, shop.undisturbed[stage].seconds)
            yield f"{stage} {draw.choice(_SIGNALS)} {t:.3f} {draw.uniform(0.001, 0.05):.3f}"
        yield f"start INT {draw.uniform(0.05, 6):.3f} 0"


def signals(shop: Workshop, text: str) -> str:
    stage, names, first, apart = text.split()
    numbers = [signal.Signals[f"SIG{name}"] for name in names.split("+")]
    if stage == "start":
        return _interrupted_start(shop, float(first))
    with shop.bench(stage) as runs:
        sent = [(float(first) + i * float(apart), number) for i, number in enumerate(numbers)]
        ended = shop.disturbed(stage, runs, signals=sent)
        if ended.status not in (0, 130, -signal.SIGTERM, -signal.SIGHUP):
            raise Failed(f"status {ended.status} after {names}: {ended.err.strip()[-600:]}")
        # without a word only where nothing has begun: typer ends then, with the same status
        if ended.status == 130 and ended.err.strip() and "same command goes on" not in ended.err:
            raise Failed(f"it does not say how to go on: {ended.err.strip()[-600:]}")
        shop.goes_on(stage, runs)
    return how(ended)


def _heeds_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # where this runs in the background, a shell had it ignored


def _interrupted_start(shop: Workshop, after: float) -> str:
    """A process of its own, from its first instant on."""
    with shop.bench("sft") as runs:
        command = [sys.executable, "-m", "lco_lite", *shop.command("sft", runs)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heeds_ctrl_c
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=children.LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed("hangs after Ctrl-C") from None
        if process.returncode not in (0, 130, -signal.SIGINT):
            raise Failed(f"status {process.returncode} after Ctrl-C: {err.strip()[-600:]}")
        if "Traceback" in err:
            raise Failed(f"a traceback after Ctrl-C: {err.strip()[-900:]}")
        shop.goes_on("sft", runs)
        return "stopped while it starts" if process.returncode else "done all the same"


# disk-full: a small file system; without the right to mount one, an error after so many bytes; a limit of files' size


def disk_full_cases(shop: Workshop, draw: Random) -> Cases:
    where = "tmpfs" if can_mount(shop.folder) else "room"
    while True:
        for stage in STAGES:
            yield f"{stage} {where} {draw.random():.3f}"
        yield f"{draw.choice(STAGES)} file {draw.random():.3f}"


_NO_ROOM = ("disk is full", "too large", "are free there: make room")


def disk_full(shop: Workshop, text: str) -> str:
    stage, where, share = text.split()
    with shop.bench(stage) as runs, _little_room(shop, stage, where, float(share), runs) as (fault, prepare, more):
        ended = shop.disturbed(stage, runs, fault, prepare=prepare)
        if ended.status < 0:
            raise Failed(f"ended by signal {-ended.status}")
        if ended.status and not any(why in ended.err for why in _NO_ROOM):
            raise Failed(f"it does not say that the disk is full: {ended.err.strip()[-600:]}")
        more()
        shop.goes_on(stage, runs)
    return how(ended)


@contextlib.contextmanager
def _little_room(shop: Workshop, stage: str, where: str, share: float, runs: Path) -> Iterator[Any]:
    if where == "room":
        size = int(share * shop.undisturbed[stage].counts["room"])
        yield Fault("room", size, "ENOSPC"), None, lambda: None
    elif where == "file":
        largest = max(p.stat().st_size for p in (shop.folder / "after" / stage).rglob("*") if p.is_file())
        size = int(512 + share * largest)
        yield None, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)), lambda: None
    else:
        before, after = (_blocks(shop.folder / when / stage) for when in ("before", "after"))
        size = before + 16 + int(share * (after - before) * 1.3)
        shutil.rmtree(runs)
        runs.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(runs)], check=True)
        try:
            shutil.copytree(shop.folder / "before" / stage, runs, dirs_exist_ok=True)
            yield None, None, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(runs)], check=True)
        finally:
            subprocess.run(["umount", str(runs)], check=True)


def _blocks(folder: Path) -> int:
    """KiB in pages of 4."""
    return sum(-(-p.stat().st_size // 4096) * 4 if p.is_file() else 0 for p in folder.rglob("*"))


def can_mount(folder: Path) -> bool:
    place = folder / "mount"
    place.mkdir(exist_ok=True)
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(place)], check=True)
    return True


# damage: each file of a run that stands half-way, and of one whose last stage is done, in each way; then the command


def _halved(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    file.write_bytes(content)


def _other_digit(file: Path) -> None:
    """What a program reads without a complaint, and is not what was written."""
    content = file.read_bytes()
    late = [m.start() for m in re.finditer(rb"[0-9]", content) if m.start() >= len(content) // 3]
    if late:
        at = late[len(late) // 2]
        file.write_bytes(content[:at] + str((content[at] - 47) % 10).encode() + content[at + 1 :])


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "half": _halved,
    "flipped": _flipped,
    "digit": _other_digit,
    "garbage": lambda file: file.write_bytes(b"\x00\xff\xfe{\n" * 9),
    "more": lambda file: file.write_bytes(file.read_bytes() + b"\x00{]"),
    "null": lambda file: file.write_bytes(b"null\n"),
    "list": lambda file: file.write_bytes(b"[]\n"),
    "deep": lambda file: file.write_bytes(damaged.DEEP + b"\n"),
    "gone": lambda file: file.unlink(),
    "folder": _folder,
}
# what a command may not notice: it is read by no later one, or holds free text or numbers that no sum guards
_NOT_NOTICED = ("environment.json", "samples.jsonl", "metrics.jsonl", "updates.jsonl", "README.md", ".lock")


def damage_cases(shop: Workshop, draw: Random) -> Cases:
    cases = []
    for stage in STAGES:
        if not (shop.folder / "half" / stage).exists():
            shop.half(stage)
        for when in ("half", "before"):
            root = shop.folder / when / stage
            files = [p.relative_to(root) for p in root.rglob("*") if p.is_file() and p.name != ".lock.held"]
            cases += [f"{stage} {when} {file} {way}" for file in files for way in DAMAGES]
    draw.shuffle(cases)
    yield from cases


def damage(shop: Workshop, text: str) -> str:
    stage, when, name, way = text.split()
    if when == "half" and not (shop.folder / "half" / stage).exists():
        shop.half(stage)
    with shop.bench(stage, when) as runs:
        file = runs / name
        DAMAGES[way](file)
        ended = children.run(shop.command(stage, runs), runs)
        told_well(ended)
        whole(runs, (file,))
        if ended.status == 0 and stage == "eval" and way == "gone" and name.endswith("rl-kld/done.json"):
            return "not done"  # that is what a stage without it is: eval takes the one before, and says which
        if ended.status == 0:
            sums = ("done.json",) if name.endswith(_NOT_NOTICED) else ()  # of the file itself
            return _damage_was_harmless(shop, stage, runs, file, but=sums)
        told = ended.err.replace(str(runs), "")
        by_folder = way in ("folder", "digit") and Path(name).parent.name in told
        if Path(name).name not in told and not by_folder:
            raise Failed(f"its message does not name the file: {ended.err.strip()[-600:]}")
    return how(ended)


def _damage_was_harmless(shop: Workshop, stage: str, runs: Path, file: Path, but: Sequence[str] = ()) -> str:
    expected, found = products(shop.folder / "after" / stage), products_but(runs, file)
    own = str(file.relative_to(runs))
    differ = [n for n in {*expected, *found} if expected.get(n) != found.get(n) and n != own]
    differ = [n for n in differ if not n.endswith(_NOT_NOTICED) and Path(n).name not in but]
    if differ:
        raise Failed(f"not noticed: status 0, and other than undisturbed are {', '.join(sorted(differ)[:5])}")
    return "mended" if expected.get(own) == found.get(own) else "harmless"


def products_but(runs: Path, file: Path) -> dict[str, str]:
    """Those of ``runs``; the damaged ``file`` may be anything."""
    try:
        return products(runs)
    except (ValueError, RecursionError):
        if file.is_file():
            file.unlink()
        return products(runs)


# mistyped: one field of a file that we wrote is of another type, or gone; then each command that reads it

_READERS = (
    "runs",
    "runs --clean --yes",
    "report tiny --quiet",
    "eval arithmetic --compare rl-kld rl-kld",
    "eval arithmetic --name tiny --policy rl --quiet",
    "export tiny --to merged --quiet",
    "rl --name tiny --steps 3 --quiet",
    "plan RECIPE",
)
_THEIRS = ("adapter", "model", "base", "checkpoints")  # folders whose files libraries write, or sums guard


def mistyped_cases(shop: Workshop, draw: Random) -> Cases:
    root = shop.folder / "after" / "eval"
    files = [p for p in root.rglob("*.json*") if not {*_THEIRS} & {*p.relative_to(root).parts}]
    while True:
        file = draw.choice(files)
        field, wrong = draw.choice(damaged.fields(file)), draw.choice([*damaged.WRONG, "gone"])
        yield f"{file.relative_to(root)} {field} {wrong}"


def mistyped(shop: Workshop, text: str) -> str:
    """It is told, once; what a sum guards is not guarded here, so that what reads the file meets it."""
    name, field, wrong = text.split()
    told = False
    for words in _READERS:
        with shop.bench("eval", "after") as runs:
            damaged.mistype(runs / name, field, wrong)
            _unguard(runs, runs / name)
            command = [str(shop.recipe) if word == "RECIPE" else word for word in words.split()]
            ended = children.run([*command, "--runs", str(runs)], runs)
            told_well(ended)
            if ended.status not in (0, 2):
                raise Failed(f"{words}: status {ended.status}: {ended.err.strip()[-600:]}")
            if ended.status == 2 and Path(name).parts[1] not in ended.err:
                raise Failed(f"{words}: it does not name the file or its folder: {ended.err.strip()[-600:]}")
            told |= ended.status == 2
    return "told" if told else "done all the same"


def _unguard(runs: Path, but: Path) -> None:
    """No other file notes sums any more."""
    for file in {*runs.rglob("done.json"), *runs.glob("*/eval/*.json")} - {but}:
        content = json.loads(file.read_bytes())
        for name in ("files", "rows_sha256"):
            content.pop(name, None)
        file.write_text(json.dumps(content))


# non-finite: NaN and infinities at each place that numbers come from

_NUMBERS = ("nan", "inf", "-inf")


def non_finite_cases(shop: Workshop, draw: Random) -> Cases:
    cases = [
        f"{stage} {place} {at} {number}"
        for stage in STAGES[:3]
        for place in ("gradient", "weights", "hidden")
        for at in ((1, 2) if place != "hidden" else (1, 2, 5, 9, 14, 20))
        for number in _NUMBERS
    ]
    cases += [f"rl {place} 1 {number}" for place in ("advantages", "logprobs", "rewards") for number in _NUMBERS]
    for stage in STAGES[1:]:
        files = sorted(p.relative_to(shop.folder / "before" / stage) for p in _tensors(shop.folder / "before" / stage))
        cases += [f"{stage} {file} 0 {number}" for file in files for number in _NUMBERS]
    draw.shuffle(cases)
    yield from cases


def _tensors(runs: Path) -> list[Path]:
    return [p for p in runs.rglob("*.safetensors") if "checkpoints" not in p.parts]


def non_finite(shop: Workshop, text: str) -> str:
    """It is told, or left out and told; what is trained stays finite; and without it the same command goes on."""
    stage, place, at, number = text.split()
    with shop.bench(stage) as runs:
        poisoned = [runs / place] if "/" in place else []
        for file in poisoned:
            _poison_file(file, float(number))
        prepare = None if poisoned else lambda: _poison(place, int(at), float(number), _reached(runs))
        ended = shop.disturbed(stage, runs, prepare=prepare)
        _all_finite(runs, poisoned)
        skipped = list(runs.rglob("skipped.jsonl"))
        if ended.status not in (0, 1, 2, 4):
            raise Failed(f"status {ended.status}")
        if poisoned:
            if ended.status:
                return how(ended)
            # no later stage reads it
            _damage_was_harmless(shop, stage, runs, poisoned[0], but=("sha256.json", "done.json"))
            return "not used"
        if ended.status == 0 and not skipped:
            same(shop.folder / "after" / stage, runs, but=("metrics.jsonl", "updates.jsonl", "done.json"))
            # in a number that is only measured, and null in the metrics
            return "in no weight" if _reached(runs).exists() else "not reached"
        again = children.run(shop.command(stage, runs), runs)
        told_well(again)
        _all_finite(runs, [])
        if again.status != 0:
            raise Failed(f"it does not go on, status {again.status}: {again.err.strip()[-600:]}")
        if not skipped:
            shop.goes_on(stage, runs)
    return "left out" if ended.status == 0 else how(ended)


def _poison_file(file: Path, number: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    next(t for t in tensors.values() if t.is_floating_point()).view(-1)[0] = number
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    (file.parent / "sha256.json").unlink(missing_ok=True)  # the sums would tell before the numbers do
    if (done := file.parent.parent / "done.json").exists():
        done.write_text(json.dumps({**json.loads(done.read_text()), "files": {}}))


def _all_finite(runs: Path, but: list[Path]) -> None:
    from safetensors.torch import load_file

    for file in runs.rglob("*.safetensors"):
        if file not in but and not file.name.startswith("."):
            for name, tensor in load_file(file).items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise Failed(f"{file.relative_to(runs)} holds {name} that is not finite")


def _reached(runs: Path) -> Path:
    return runs.parent / "reached"


def _poison(place: str, at: int, number: float, reached: Path) -> None:
    """In the child: the ``at``-th time, a number that is none."""
    import torch

    from lco_lite.models.language_model import LanguageModel
    from lco_lite.train import rl, rollouts
    from lco_lite.train.training import StageTraining

    calls = [0]

    def now() -> bool:
        calls[0] += 1
        if calls[0] == at:
            reached.touch()
        return calls[0] == at

    if place == "gradient":
        update = StageTraining.update

        def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
            if now():
                next(p for p in self.masters.values() if p.grad is not None).grad.view(-1)[0] = number
            return update(self, *args, **kwargs)

        StageTraining.update = poisoned  # type: ignore[method-assign]
    elif place == "weights":
        step = torch.optim.AdamW.step

        def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = step(self, *args, **kwargs)
            if now():
                with torch.no_grad():
                    self.param_groups[0]["params"][0].view(-1)[0] = number
            return out

        torch.optim.AdamW.step = stepped  # type: ignore[method-assign]
    elif place == "hidden":
        hidden_states = LanguageModel.hidden_states

        def hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = hidden_states(self, *args, **kwargs)
            return out + number if now() else out

        LanguageModel.hidden_states = hidden  # type: ignore[method-assign]
    elif place in ("logprobs", "rewards"):
        judge = rollouts.Rollouts._judge

        def judged(self: Any, prompts: Any, responses: Any) -> Any:
            if place == "logprobs" and now():
                for response in responses:
                    if response.logprobs:
                        response.logprobs[0] = number
            out = judge(self, prompts, responses)
            if place == "rewards" and now():
                for values in out["rewards"].values():
                    values[0] = number
            return out

        rollouts.Rollouts._judge = judged  # type: ignore[method-assign]
    else:
        score = rl.score

        def scored(*args: Any, **kwargs: Any) -> Any:
            out = score(*args, **kwargs)
            if now():
                out[0][0].advantages[0] = number
            return out

        rl.score = scored  # type: ignore[assignment]


# user-code: functions that are wrong, late, hostile


def user_code_cases(shop: Workshop, draw: Random) -> Cases:
    cases = [f"{kind} {name}" for kind, bodies in hostile.KINDS.items() for name in bodies]
    draw.shuffle(cases)
    yield from sorted(cases, key=lambda case: " good_" in case)  # the hostile ones first


def user_code(shop: Workshop, text: str) -> str:
    kind, name = text.split()
    with shop.bench("eval" if kind == "grader" else "rl") as runs:
        file = runs / f"{kind}_{name}.py"
        file.write_text(hostile.KINDS[kind][name])
        command = hostile.command(kind, f"{file}:f", str(shop.recipe), runs)
        ended = children.run(command, runs, limit=100)
        told_well(ended, own_code=True)
        file.unlink(missing_ok=True)
        whole(runs)
        _nothing_left(str(file))
        if name.startswith("good_") != (ended.status == 0):
            raise Failed(f"status {ended.status}: {ended.err.strip()[-600:]}")
        if ended.status not in (0, 1, 2, 4):
            raise Failed(f"status {ended.status}: it ends the trainer")
        if ended.status in (1, 2) and file.name not in ended.err:
            raise Failed(f"its message does not name the file: {ended.err.strip()[-600:]}")
    return how(ended)


def _nothing_left(file: str) -> None:
    """No process that was started with ``file`` is alive a moment later."""
    import psutil

    until = time.monotonic() + 10
    while left := [p.pid for p in psutil.process_iter() if _names(p, file)]:
        if time.monotonic() > until:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise Failed(f"{len(left)} processes are left behind")
        time.sleep(0.05)


def _names(process: Any, file: str) -> bool:
    import psutil

    try:
        return process.pid != os.getpid() and any(file in part for part in process.cmdline())
    except psutil.Error:
        return False


# malformed: in this process, each at once


def malformed_cases(shop: Workshop, draw: Random) -> Cases:
    yield from malformed.names()


def malformed_(shop: Workshop, text: str) -> str:
    return malformed.tried(text, shop.folder)


KINDS: dict[str, tuple[Callable[[Workshop, Random], Cases], Callable[[Workshop, str], str]]] = {
    "kills": (kills_cases, kills),
    "faults": (faults_cases, faults),
    "signals": (signals_cases, signals),
    "disk-full": (disk_full_cases, disk_full),
    "damage": (damage_cases, damage),
    "mistyped": (mistyped_cases, mistyped),
    "non-finite": (non_finite_cases, non_finite),
    "user-code": (user_code_cases, user_code),
    "malformed": (malformed_cases, malformed_),
}
