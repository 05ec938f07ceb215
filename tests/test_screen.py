"""The screen on real terminals of 80 and 120 columns; what of others' text gets there; the picture of it in the docs.

``python -m tests.test_screen`` draws the picture anew.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console as RichConsole
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lco_lite.progress
from lco_lite.cli import app
from lco_lite.console import Console
from lco_lite.files import shown_bytes
from lco_lite.models.loading import _from_gguf, quiet_libraries
from lco_lite.recipe.sections import Model
from lco_lite.runs import _part_rows, _rows
from tests.conftest import TINY
from tests.models.test_loading import empty_gguf
from tests.terminal import Drawn, on_terminal

ROOT = Path(__file__).resolve().parent.parent
PICTURE, RECORD = ROOT / "docs" / "screen.svg", Path(__file__).with_name("screen.json")

STEPS = """
import time
from lco_lite.console import Console

console = Console()
console.stage("rl-kld", "3 steps of 256 prompts")
numbers = {"loss": -0.1234, "grad_norm": 0.83, "kl_to_old": 0.0123, "entropy": 0.512, "dead_groups": 0.25}
numbers |= {"tokens_per_second": 1234.5}
with console.progress(3, "rl-kld", every={"eval": 2}) as line:
    for step in (1, 2):
        with console.progress(256, "rollout") as phase:
            for done in (64, 128, 192):
                phase.update(done)
                time.sleep(0.15)
        console.sample("What is 12+34?", "\\x1b[2J" + "so many words " * 200 + "#46", step > 1, 1.0)
        console.phase("score")
        time.sleep(0.1)
        console.warn("words that are too many for one line of this terminal and are wrapped " * 2)
        line.step(step, {"rollout": 0.45}, numbers | {"reward": 0.25 * step} | ({"eval": 0.5} if step > 1 else {}))
    time.sleep(0.4)
console.done("runs/quickstart", "lco-lite eval")
"""
LABELS = ["left", "rl-kld 2/3", "reward 0.500", "held-out 0.500 ▄", "loss", "grad", "KL", "entropy", "dead groups"]
LABELS += ["tok/s overall", "memory", "GiB, peak"]


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_everything_is_there_and_nothing_is_cut(columns):
    written, status = on_terminal(["-c", STEPS], columns, rows=30)
    end = Drawn(written)
    assert status == 0 and end.cursor and end.widest <= columns
    assert "…" not in written.replace("… left", "")
    rows = [line for line in str(end).splitlines() if not line.startswith("warning") and "wrapped" not in line]
    assert [row.split()[0] for row in rows] == ["rl-kld", "step", "1/3", "step", "2/3", "runs/quickstart"]
    assert rows[2].split()[:-1] == ["1/3", "0.250", "-0.123", "0.830", "0.0123", "0.512", "0.25", "1234"]
    alive = str(Drawn(written[: written.rindex(" GiB, peak") + 14]))  # while the third step begins
    for label in LABELS:
        assert label in alive, label
    lines = alive.splitlines()
    below = lines[next(i for i, line in enumerate(lines) if re.search(" left +rl-kld", line)) :]
    assert below[0].index("left") < 8 and len(below) <= (4 if columns < 100 else 3)
    assert ("╭─ ✓ right  reward 1 " in alive) == (columns >= 100)
    if columns >= 100:
        assert "\\x1b[2J so" not in alive and "\\x1b[2Jso many" in alive and "#46" in alive and "⋯" in alive
    assert re.search(r"rl-kld [01]/3 ━+  rollout (64|128|192)/256 +━+", re.sub(r"\x1b\[[\d;]*m", "", written))


NARROWER = """
    import fcntl, os, struct, termios
    time.sleep(0.4)
    with console._live._lock:  # between two frames
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
        os.write(1, bytes(1))
    time.sleep(0.6)
"""


def test_a_window_that_becomes_narrower_leaves_nothing_behind_and_takes_nothing_away():
    written, status = on_terminal(["-c", STEPS.replace("    time.sleep(0.4)\n", NARROWER.lstrip("\n"))], 120, rows=30)
    before, after = written.split("\0")
    assert "╭" in str(Drawn(before)), "the panel stands there, and is wider than the window will be"
    end = str(Drawn(before + after, (len(before), 80)))
    assert status == 0 and " left" not in end and "╭" not in end and "│" not in end
    assert [row.split()[0] for row in end.splitlines() if "/3 " in row] == ["1/3", "2/3"]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_below_80_columns_nothing_breaks_and_terminals_without_colours_are_heeded(environment):
    written, status = on_terminal(["-c", STEPS], 30, rows=6, **environment)
    assert status == 0 and Drawn(written).cursor and "runs/quickstart" in written
    if "NO_COLOR" in environment:  # rich takes one that is dumb for one of 80 columns
        lines = [line.rstrip() for line in Drawn(written).lines]
        assert max(len(line) for line in lines if "next: " not in line) <= 30, "but for a command, which is copied"
    assert not re.search(r"\x1b\[[\d;]*3[0-9][;\d]*m", written)
    assert ("\x1b" in written) == ("NO_COLOR" in environment)


def test_the_live_lines_take_less_than_a_percent_of_a_processor():
    measured = STEPS.replace(
        "    time.sleep(0.4)\n",
        "    began, cpu = time.monotonic(), time.process_time()\n"
        "    time.sleep(2.5)\n"
        "    share = (time.process_time() - cpu) / (time.monotonic() - began)\n",
    )
    written, _ = on_terminal(["-c", f"{measured}\nprint('share', share)"], 120, 30)
    assert 0 < float(written.rpartition("share ")[2].split()[0]) < 0.0075, "rich's thread and its clock are in it, too"


@pytest.mark.slow
def test_ctrl_c_leaves_a_clean_terminal_and_says_how_to_go_on(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY | {"sft": TINY["sft"] | {"max_steps": 5000, "save_every": 1000}}))
    pressed = []

    def press(written: bytes, terminal: int) -> None:
        if not pressed and b" 3/5000 " in written:
            pressed.append(os.write(terminal, b"\x03"))

    written, status = on_terminal(["-m", "lco_lite", "sft", str(recipe), "--runs", str(tmp_path / "runs")], then=press)
    end = Drawn(written)
    assert status == 130 and end.cursor
    said = " ".join(str(end).split())
    assert "and the same command goes on from there" in said and "━" not in said and "stopped after step" in said


# nothing raw reaches a terminal or a log

HOSTILE = "a\x1b[2Jb\x07c\x9bd\x7fe\u202ef\u200bg"
SHOWN = "a\\x1b[2Jb\\x07c\\x9bd\\x7fe\\u202ef\\u200bg"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def call(*words: Any) -> str:
    """All that a command writes, on both streams; nothing in it is raw."""
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert not RAW.search(result.output), repr(RAW.search(result.output))
    return result.output


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{HOSTILE} {i}", "response": f"{HOSTILE} {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = "def reward(prompts, responses, rows):\n    raise ValueError('a\\x1b[2Jb\\u202e')\n"
    (tmp_path / "reward.py").write_text(reward)
    data = {"demonstrations": str(tmp_path / "rows.jsonl"), "prompts": str(tmp_path / "rows.jsonl")}
    rl = TINY["rl"] | {
        "feedback": "function",
        "reward_function": f"{tmp_path / 'reward.py'}:reward",
        "objective": "grpo",
    }
    recipe = {k: v for k, v in TINY.items() if k not in ("task", "train_rm")} | {"data": data, "rl": rl}
    recipe["model"] = TINY["model"] | {"init": TINY["model"]["init"] | {"max_length": 512}}
    recipe["sft"] = TINY["sft"] | {"max_steps": 1}
    recipe["rl"] |= {"responses_per_prompt": 2, "prompts_per_step": 4, "inner_epochs": 1}
    (tmp_path / "hostile.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "hostile.yaml"


def test_a_dry_run_writes_out_the_control_characters_of_data(hostile):
    assert SHOWN in call("rl", hostile, "--dry-run")


def test_errors_write_out_what_a_recipe_holds(tmp_path):
    (tmp_path / "bad.yaml").write_text('name: x\n"a\\e[2J\\u202e": 1\n')
    said = call("run", tmp_path / "bad.yaml")
    assert "\\x1b[2J" in said and "\\u202e" in said
    assert "\\x1b[2J" in call("run", "bad\x1b[2J.yaml")
    assert "\\x1b[2J" in call("eval", "x", "--runs", tmp_path / "a\x1b[2J")


@pytest.mark.parametrize("when", ["tried", "in training"])
def test_what_a_reward_function_raises_reaches_neither_screen_nor_log_raw(hostile, when):
    if when == "in training":  # a function is tried on one response
        code = (
            (hostile.parent / "reward.py")
            .read_text()
            .replace("raise", "if len(responses) == 1: return [0.0]\n    raise")
        )
        (hostile.parent / "reward.py").write_text(code)
    assert "\\x1b[2J" in call("rl", hostile, "--runs", hostile.parent / "runs")
    logs = [p for p in (hostile.parent / "runs").rglob("*") if p.suffix in (".log", ".jsonl")]
    assert bool(logs) == (when == "in training")
    assert not [p for p in logs if RAW.search(p.read_text(encoding="utf-8"))]


def test_an_unexpected_exception_is_told_with_a_clean_traceback(monkeypatch):
    def broken() -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("lco_lite.cli.environment", broken)
    said = call("env")
    assert "Traceback" in said and SHOWN in said


def test_words_of_the_command_line_are_written_out_too(monkeypatch, capsys):
    from lco_lite.__main__ import main

    monkeypatch.setattr(sys, "argv", ["lco-lite", "env", f"--{HOSTILE}"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and not RAW.search(said) and "\\x1b[2J" in said


def test_nothing_prints_past_the_console():
    """Not one of the ways by which text reaches a terminal, but where it is made visible."""
    allowed = {"console.py", "visible.py", "ranks.py"}
    found = []
    for file in sorted((ROOT / "lco_lite").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and file.name not in allowed:
                name = ast.unparse(node.func)
                if name in ("print", "typer.echo", "typer.secho") or name.endswith(("stdout.write", "stderr.write")):
                    found.append(f"{file.name}:{node.lineno}: {name}")
    assert not found


def test_libraries_do_not_print_past_the_console_either(tmp_path, capfd):
    """transformers' conversion of a GGUF has a plain bar; huggingface_hub's logger tells every retry."""
    quiet_libraries()
    empty_gguf(tmp_path / "m.gguf")
    _from_gguf(AutoModelForCausalLM, Model(path=str(tmp_path), gguf_file="m.gguf"))
    logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s")
    assert capfd.readouterr() == ("", "")


def test_a_stage_takes_a_row_at_80_columns_and_what_can_go_comes_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    score = {"arithmetic": {"metric": "pass@1", "mean": 0.7, "std": 0.01, "n": 500, "seeds": 4}}
    stages = [{"name": n, "state": "done", "step": 8, "steps": 8, "scores": score} for n in ("sft", "rm", "rl-kld")]
    told = {"name": "quickstart", "bytes": 2**30, "changed": "2026-01-02T03:04:05+01:00", "stages": stages}
    out = io.StringIO()
    Console(stdout=out).table("", ["run", "stage", "state", "score", "size", "changed"], _rows(told))
    assert len(out.getvalue().splitlines()) == 3 + 3 + 1 and "0.700±0.010" in out.getvalue()

    parts = [{"path": f"small-{i}", "bytes": 600, "can_go": None} for i in range(20)]
    parts += [{"path": "adapter", "bytes": 2**20, "can_go": None}, {"path": "rollouts", "bytes": 900, "can_go": "made"}]
    parts.append({"path": "checkpoints", "bytes": 2**21, "can_go": "done"})
    rows = list(_part_rows(parts))
    assert [row[0] for row in rows] == ["checkpoints", "rollouts", "adapter", "20 smaller ones"]
    assert rows[-1][1] == shown_bytes(20 * 600)


# the picture


def picture() -> str:
    """The screen in the middle of a step, from the numbers of a real one (``screen.json``)."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    now = [0.0]
    console = Console(stdout=io.StringIO(), clock=lambda: now[0])
    shown = RichConsole(
        record=True, width=100, height=30, force_terminal=True, color_system="truecolor", file=io.StringIO(),
        markup=False, emoji=False, highlight=False, _environ={},
    )  # fmt: skip
    console._screen, console.draws = shown, True
    console._put = lambda screen, what: shown.print(what, soft_wrap=True)  # type: ignore[method-assign]
    with contextlib.ExitStack() as closing:
        before, lco_lite.progress.memory = lco_lite.progress.memory, lambda: record["memory"]
        closing.callback(setattr, lco_lite.progress, "memory", before)
        console.stage("rl-kld", record["detail"])
        outer = lco_lite.progress.Progress(
            "rl-kld", record["total"], 0, console.clock, console.note, lambda: 100, True, {"eval": 1}
        )
        for metrics in record["steps"]:
            now[0] += metrics["took"]
            outer.step(metrics["step"], metrics["seconds"], metrics)
        now[0] += record["since"]
        outer.update(outer.done, metrics=record["update"])
        inner = lco_lite.progress.Progress("update", record["updates"], 0, console.clock, console.note, outermost=False)
        inner.update(record["update"]["update"])
        console._open = [outer, inner]
        console.sample(*record["sample"])
        shown.print()
        shown.print(console._area())
    return shown.export_svg(title='lco-lite rl quickstart --feedback "dpo + rule" --steps 8', unique_id="screen")


def test_the_picture_in_the_docs_is_what_the_screen_draws():
    assert PICTURE.read_text(encoding="utf-8") == picture()


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
