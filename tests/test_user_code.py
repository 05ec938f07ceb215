"""What of the user's runs in this process, objectives, targets and graders, can neither end it nor hang it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import typer

from lco_lite import user_code
from lco_lite.command import boundary
from lco_lite.errors import UsageError
from lco_lite.grading import Item
from lco_lite.tasks.custom import grader_named
from lco_lite.user_code import load_function, users_file


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "exit()", "quit()", "raise SystemExit"])
def test_a_file_that_ends_the_process_as_it_is_imported_is_one_message(spec, end):
    with pytest.raises(UsageError, match=r"own.py: cannot be imported: .*exit.*would end the training"):
        load_function(spec(f"import os, sys\n{end}\ndef f(): return 1"))
    assert os._exit is user_code._exit


def test_an_import_that_hangs_is_one_message_even_where_the_file_catches_everything(spec, monkeypatch):
    monkeypatch.setattr(user_code, "IMPORT_SECONDS", 0.2)
    before, clock = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(UsageError, match=r"own.py: cannot be imported: TimeoutError: it takes more than 0.2 s"):
        load_function(spec("import time\ntry:\n    time.sleep(99)\nexcept Exception: pass\nwhile True: pass"))
    assert signal.getsignal(signal.SIGALRM) is before
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (clock[0] > 0), "a clock that ran before goes on"


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)"])
def test_a_call_that_ends_the_process_is_an_error_like_others(spec, end):
    function = load_function(spec(f"import os, sys\ndef f(): {end}"))
    with pytest.raises(RuntimeError, match="would end the training"):
        function()


@pytest.mark.parametrize(
    "error",
    ["typer.Exit(0)", "BrokenPipeError", "WeightsLost('x')", "Interrupted('x')", "UsageError('x')", "GeneratorExit"]
    + ["asyncio.CancelledError", "type('Own', (BaseException,), {})"],
)
def test_an_exception_that_means_something_here_means_nothing_from_there(spec, error):
    imports = "import asyncio, typer\nfrom lco_lite.errors import *"
    own = spec(f"{imports}\ndef f(*a): raise {error}")
    with pytest.raises(RuntimeError, match="it raises ") as told:
        load_function(own)()
    assert users_file(told.value) == own.rpartition(":")[0]
    with pytest.raises(UsageError, match="own.py:f failed on item 3: RuntimeError: it raises "):
        grader_named(own)("x", Item("3", "p", "g", None, {}))
    load_function.cache_clear()
    with pytest.raises(UsageError, match="own.py: cannot be imported: RuntimeError: it raises "):
        load_function(spec(f"{imports}\nraise {error}"))


def test_of_a_fork_that_comes_back_one_process_goes_on(spec, tmp_path):
    """As it is imported, and in a call that returns, raises or exits."""
    body = """
import os, sys
from pathlib import Path
def note(at): Path(__file__).with_name(f"{at}-{os.getpid()}").touch()
os.fork()
def f(how):
    child = os.fork()
    note(how)
    if child == 0 and how == "raises": raise ValueError
    if child == 0 and how == "exits": sys.exit(5)
    return child and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    function = load_function(spec(body))
    assert [function(how) for how in ("returns", "raises", "exits")] == [0, 0, 5]
    assert sorted(p.name.partition("-")[0] for p in tmp_path.glob("*-*")) == sorted(["returns", "raises", "exits"] * 2)


def test_the_working_folder_is_what_it_was(spec, tmp_path):
    here = os.getcwd()
    load_function(spec(f"import os\nos.chdir({str(tmp_path)!r})\ndef f(): os.chdir('/')"))()
    assert os.getcwd() == here


@pytest.mark.parametrize(
    "left",
    [
        "threading.Thread(target=time.sleep, args=(99,)).start()",
        "atexit.register(time.sleep, 99)",
        "multiprocessing.Process(target=time.sleep, args=(99,)).start()",
        "subprocess.Popen(['sleep', '98.7654321'])",
    ],
)
def test_nothing_that_user_code_leaves_holds_up_the_end_or_outlives_it(spec, left):
    own = spec(f"import atexit, multiprocessing, subprocess, threading, time\ndef f(): {left}")
    program = f"""
import sys
from lco_lite import user_code
user_code.END_SECONDS = 0.5
user_code.load_function({own!r})()
user_code.ends(3)
sys.exit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, start_new_session=True)
    assert ended.returncode == 3
    assert not [p for p in psutil.process_iter(["cmdline"]) if "98.7654321" in (p.info["cmdline"] or [])]


def test_a_call_that_hangs_is_an_error_like_others_and_a_grader_that_does_names_its_item(spec, monkeypatch):
    monkeypatch.setattr(user_code, "CALL_SECONDS", 0.2)
    own = spec(
        "import time\ndef f(*a):\n    try:\n        time.sleep(99)\n    except Exception: pass\n    while True: pass"
    )
    with pytest.raises(TimeoutError, match=r"it takes more than 0.2 s"):
        load_function(own)()
    with pytest.raises(UsageError, match=r"own.py:f failed on item 3: .*more than 0.2 s"):
        grader_named(own)("x", Item("3", "p", "g", None, {}))


def test_a_call_that_is_somebody_elses_to_end_takes_its_time(spec, monkeypatch):
    monkeypatch.setattr(user_code, "CALL_SECONDS", 0.05)
    assert load_function(spec("import time\ndef f(): return time.sleep(0.3)"), in_worker=True)() is None


def test_a_fork_in_such_a_call_ends_as_it_would_elsewhere(spec):
    body = """
import os
def f():
    if (child := os.fork()) == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    assert load_function(spec(body))() == 7


def test_a_grader_that_exits_names_its_item(spec):
    grade = grader_named(spec("import sys\ndef f(response, item): sys.exit(0)"))
    with pytest.raises(UsageError, match=r"own.py:f failed on item 3: .*sys.exit\(0\)"):
        grade("x", Item("3", "p", "g", None, {}))


def test_a_reward_file_is_not_imported_in_this_process(tmp_path, monkeypatch):
    from lco_lite.feedback.rewards import RewardFunction

    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("import os\nprint(os.getpid(), file=open('pid', 'w'))\ndef f(p, r, rows): return [1.0]")
    began = time.monotonic()
    RewardFunction("own.py:f", 60.0)
    assert int(Path("pid").read_text()) != os.getpid() and time.monotonic() - began < 60


def test_an_error_cannot_steer_the_terminal(capsys):
    with pytest.raises(typer.Exit), boundary():
        raise UsageError("own.py:f: ValueError: \x1b]0;mine\x07\nsecond line")
    assert capsys.readouterr().err == "error: own.py:f: ValueError: \\x1b]0;mine\\x07\nsecond line\n"
