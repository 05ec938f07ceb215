"""A worker's answers are those that were asked for, and it ends with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lco_lite.errors import UsageError
from lco_lite.feedback.rewards import Answers, RewardFunction
from lco_lite.workers import LineWorker, environment, python

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups")
POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
pool = ProcessPoolExecutor(2, get_context("fork"))
def score(prompts, responses, rows):
    hung = [pool.submit(time.sleep, 10_000) for _ in range(4)]
    with open("pids", "a") as file:
        print(os.getpid(), *pool._processes, file=file)
    if responses[0] == "hang":
        time.sleep(10_000)
    return [len(r) for r in responses]
"""
FORKS = """
import os
def score(prompts, responses, rows):
    os.fork()
    return [os.getpid() * 0 + len(r) for r in responses]
"""
TRAINER = """
from lco_lite.workers import LineWorker
worker = LineWorker("lco_lite.user_code", "rewards.py:score")
worker.ask('[["p"], ["go"], [{"row": {}, "lacks": [], "turns": null, "ids": []}]]', 600.0)
print("the last line", flush=True)
"""
NATIVE = """
import os, re, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10_000)"], start_new_session=False)
print(os.getpid(), child.pid, file=open("pids", "w"))
def score(prompts, responses, rows):
    return [float(bool(re.match("(a+)+$", "a" * 60 + "b")))]  # holds the interpreter's lock for years
"""


def asked(response):
    return Answers([[{"role": "user", "content": "p"}]], [{}], [response], [])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gone(pids: list[int], seconds: float = 20.0) -> bool:
    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


def pids() -> list[int]:
    return [int(pid) for pid in Path("pids").read_text().split()]


def test_a_trainer_ends_with_its_last_line_whatever_the_reward_has_started(folder):
    Path("rewards.py").write_text(POOL)
    done = subprocess.run(
        [sys.executable, "-c", TRAINER], env=environment(), timeout=120, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "the last line\n"), done.stderr
    assert len(pids()) > 2 and gone(pids())


def test_children_of_a_reward_that_is_late_end_with_it(folder):
    Path("rewards.py").write_text(POOL)
    score = RewardFunction("rewards.py:score", 2.0)
    began = time.monotonic()
    with pytest.raises(UsageError, match="no answer within 2 s"):
        score(asked("hang"))
    assert time.monotonic() - began < 60
    assert len(pids()) > 2 and gone(pids())


def test_a_child_that_left_the_group_ends_too(folder):
    body = "import os, subprocess\nchild = subprocess.Popen(['sleep', '10000'], start_new_session=True)\n"
    Path("rewards.py").write_text(
        body + "def score(p, r, rows):\n    print(child.pid, file=open('pids', 'w'))\n    return [1.0]"
    )
    score = RewardFunction("rewards.py:score", 60.0)
    score(asked("x"))
    score._worker.close()
    assert gone(pids())


def test_a_fork_that_comes_back_answers_nothing(folder):
    Path("rewards.py").write_text(FORKS)
    score = RewardFunction("rewards.py:score", 60.0)
    for n in range(1, 9):
        assert score(asked("x" * n)).tolist() == [n]


def test_an_answer_to_another_question_does_not_count(folder):
    Path("shifted.py").write_text(
        "import sys\nn = 0\nfor line in sys.stdin:\n    number, _, text = line.rstrip('\\n').split(' ', 2)\n"
        "    print('0 stale', flush=True)\n    print(number, text or 'ready', flush=True)\n"
    )
    worker = LineWorker("shifted")
    worker._command = [sys.executable, "shifted.py"]
    assert worker.ready() == "ready"
    assert [worker.ask(text, 60.0) for text in ("a", "b")] == ["a", "b"]
    worker.close()


def test_input_and_print_of_the_users_do_not_touch_the_answers(folder):
    Path("rewards.py").write_text(
        "import os, sys\ndef score(p, r, rows):\n    print('1 {\"rewards\": [7]}', flush=True)\n"
        "    os.write(1, b'2 x\\n')\n    return [float(len(sys.stdin.read()))]"
    )
    score = RewardFunction("rewards.py:score", 60.0)
    assert [score(asked("x")).item() for _ in range(2)] == [0.0, 0.0]


def test_when_the_trainer_is_killed_its_worker_goes_and_all_that_it_started_even_out_of_native_code(folder):
    Path("rewards.py").write_text(NATIVE)
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], env=environment(), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not Path("pids").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert len(pids()) == 2 and gone(pids())


@pytest.mark.parametrize("path", [None, ":/nowhere"])
def test_a_module_in_the_working_folder_is_not_run_by_a_worker(folder, monkeypatch, path):
    for name in ("json", "contextlib", "runpy", "lco_lite"):
        Path(f"{name}.py").write_text(f"open('{name} was run', 'w')\nraise SystemExit\n")
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    Path("rewards.py").write_text("import json\ndef score(p, r, rows): return [float(json.loads('1'))]")
    assert RewardFunction("rewards.py:score", 60.0)(asked("x")).item() == 1.0
    assert not list(folder.glob("*was run"))


def test_the_command_line_looks_for_no_module_in_the_working_folder_either(folder):
    for name in ("typer", "torch", "json"):
        Path(f"{name}.py").write_text(f"open('{name} was run', 'w')\nraise SystemExit\n")
    done = subprocess.run(
        [sys.executable, "-m", "lco_lite", "--version"], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("lco-lite ") and not list(folder.glob("*was run")), done.stderr


def test_every_process_of_ours_is_started_without_the_working_folder():
    sources = sorted((Path(__file__).resolve().parent.parent / "lco_lite").rglob("*.py"))
    started = {p.name for p in sources if "sys.executable" in p.read_text(encoding="utf-8")}
    started.discard("forms.py")  # llama.cpp's converter, which finds its modules in its own folder, not in this one
    assert started == {"workers.py"}, "a process of Python is started by workers.python"
    assert python("a.b", "c")[-2:] == ["a.b", "c"]
