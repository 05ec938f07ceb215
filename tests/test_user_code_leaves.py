"""What the user's code changes of the process and of the tensors that it is given changes nothing of the trainer's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lco_lite.context import InterruptGuard
from lco_lite.errors import UsageError
from lco_lite.objectives.head import Head
from lco_lite.objectives.targets import SparseTarget
from lco_lite.recipe import Rl
from lco_lite.sequences import Example, collate
from lco_lite.train.methods import MicroBatch, lco, own_target, policy_gradient
from lco_lite.user_code import load_function, users_file
from lco_lite.workers import environment

SETTINGS = {
    "torch.set_default_dtype(torch.float64)": torch.get_default_dtype,
    "torch.set_default_device('meta')": torch.get_default_device,
    "torch.set_grad_enabled(False)": torch.is_grad_enabled,
    "torch.use_deterministic_algorithms(True, warn_only=True)": torch.get_deterministic_debug_mode,
    "torch.set_num_threads(3)": torch.get_num_threads,
    "np.seterr(all='raise')": np.geterr,
    "warnings.simplefilter('error')": lambda: list(warnings.filters),
    "warnings.filters = []": lambda: list(warnings.filters),
    "signal.signal(signal.SIGINT, signal.SIG_IGN)": lambda: signal.getsignal(signal.SIGINT),
    "signal.signal(signal.SIGTERM, print)": lambda: signal.getsignal(signal.SIGTERM),
    "signal.signal(signal.SIGALRM, print)": lambda: signal.getsignal(signal.SIGALRM),
    "sys.stdout = open(os.devnull, 'w')": lambda: sys.stdout,
    "sys.stderr.close()": lambda: (sys.stderr, sys.stderr.closed),
    "sys.stdout.close()": lambda: (sys.stdout, sys.stdout.closed),
    "sys.stdin = None": lambda: sys.stdin,
}


@pytest.mark.parametrize("change", SETTINGS)
def test_a_setting_is_what_it_was_after_the_import_and_after_a_call_that_returns_or_raises(spec, change):
    read, imports = SETTINGS[change], "import os, signal, sys, warnings\nimport numpy as np\nimport torch"
    before = read()
    function = load_function(spec(f"{imports}\n{change}\ndef f(how):\n    {change}\n    return 1 / how"))
    assert read() == before
    assert function(1) == 1 and read() == before
    with pytest.raises(ZeroDivisionError):
        function(0)
    assert read() == before
    assert "close" not in vars(sys.stdout), "the stream can be closed again"


def test_a_default_device_that_was_there_comes_back(spec):
    torch.set_default_device("meta")
    try:
        load_function(spec("import torch\ndef f(): torch.set_default_device(None)"))()
        assert torch.empty(1).device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_a_call_pays_little_for_it(spec):
    function = load_function(spec("def f(): pass"))
    function()
    began = time.process_time()
    for _ in range(200):
        function()
    assert (time.process_time() - began) / 200 < 2e-3


def micro_batch(target=None):
    torch.manual_seed(0)
    batch = collate([Example([1], [2, 3]), Example([1], [4])], 0)
    old = torch.randn(3, 4)
    target = None if target is None else SparseTarget(old, 1.0, batch.actions, torch.ones(3))
    known = {"old_logprobs": -torch.ones(3), "rewards": torch.ones(3)}
    return MicroBatch(batch, torch.tensor([0, 0, 1]), 3, 2, old, None, torch.ones(3), target, known)


def tensors(micro):
    """All that is kept of it, by name."""
    parts = {"old": micro.old, "advantages": micro.advantages, "responses": micro.responses} | micro.per_token
    more = vars(micro.target) if micro.target is not None else {}
    named = parts | vars(micro.batch) | {f"target.{name}": value for name, value in more.items()}
    return {name: value.clone() for name, value in named.items() if isinstance(value, torch.Tensor)}


SPOILS = """
import torch
def spoil(*given):
    with torch.no_grad():
        for one in given:
            for value in vars(one).values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
"""
MODELS = SimpleNamespace(
    policy=SimpleNamespace(model=SimpleNamespace(head=Head(torch.ones(5, 4)), device=torch.device("cpu")))
)


def unchanged(micro, do):
    before = tensors(micro)
    given = do(micro.to("cpu"))
    assert all(torch.equal(value, before[name]) for name, value in tensors(micro).items())
    return given


def test_a_policy_gradient_that_changes_its_batch_in_place_changes_no_later_epoch_and_keeps_its_gradient(spec):
    own = spec(SPOILS + "def f(batch, clip):\n    loss = batch.logprobs.sum()\n    spoil(batch)\n    return loss, {}")
    hidden, rl = torch.randn(3, 4, requires_grad=True), Rl(objective=own, feedback="rule")
    loss, seen = unchanged(micro_batch(), lambda micro: policy_gradient(MODELS, micro, hidden, rl))
    loss.backward()
    assert hidden.grad is not None and (seen["logprob"] < 0).all(), "what is told of the policy is the policy's"


def test_a_loss_on_hidden_states_that_changes_what_it_is_given_in_place_changes_no_later_epoch(spec):
    own = spec(SPOILS + "def f(hidden, head, target, batch):\n    spoil(target, batch)\n    return hidden.sum(), {}")
    hidden, rl = torch.randn(3, 4, requires_grad=True), Rl(objective=own, feedback="rule")
    loss, _ = unchanged(micro_batch(target=True), lambda micro: lco(MODELS, micro, hidden, rl))
    loss.backward()
    assert torch.equal(hidden.grad, torch.ones(3, 4))


def test_a_target_that_changes_what_it_is_given_in_place_changes_only_what_it_gives(spec):
    own = spec(SPOILS + "def f(target, head, batch):\n    spoil(target, batch)\n    return target")
    rl = Rl(objective="lch", feedback="rule", target=own)
    changed = unchanged(micro_batch(target=True), lambda micro: own_target(MODELS, micro, micro.target, rl))
    assert not changed.old.any() and not changed.advantages.any()


def test_a_hanging_call_is_ended_though_it_catches_every_exception(spec, monkeypatch):
    monkeypatch.setattr("lco_lite.user_code.CALL_SECONDS", 0.2)
    body = "import time\ndef f():\n    while True:\n        try: time.sleep(.05)\n        except Exception: pass"
    with pytest.raises(TimeoutError, match=r"it takes more than 0.2 s") as told:
        load_function(spec(body))()
    assert users_file(told.value).endswith("own.py")


def ended(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120
    )


def test_one_that_catches_even_what_ends_it_ends_the_process_with_one_message_and_its_children(spec):
    own = spec("""
import subprocess, time
def f():
    subprocess.Popen(["sleep", "1000"])
    while True:
        try: time.sleep(.05)
        except: pass
""")
    program = f"""
from lco_lite import user_code
user_code.CALL_SECONDS = 0.2
user_code.load_function({own!r})()
"""
    end = ended(program)
    told = f"error: {own[:-2]}: it takes more than 0.2 s, and catches all that would end it\n"
    assert (end.returncode, end.stderr) == (1, told)


@pytest.mark.parametrize("raised", ["raise KeyboardInterrupt", "raise KeyboardInterrupt('x')"])
def test_an_interrupt_that_the_code_raises_itself_is_an_error_of_its_file(spec, raised):
    with InterruptGuard():
        function = load_function(spec(f"def f(): {raised}"))
        with pytest.raises(RuntimeError, match="it raises KeyboardInterrupt") as told:
            function()
        assert users_file(told.value).endswith("own.py")
        load_function.cache_clear()
        with pytest.raises(UsageError, match="cannot be imported: RuntimeError: it raises KeyboardInterrupt"):
            load_function(spec(raised))


def test_ctrl_c_in_a_call_is_ctrl_c(spec):
    function = load_function(spec("import time\ndef f(): time.sleep(60)"))
    with pytest.raises(KeyboardInterrupt), InterruptGuard() as guard:
        guard.requested = True  # once already
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        function()


def test_code_that_closes_what_it_did_not_open_ends_without_a_traceback(tmp_path):
    (tmp_path / "own.py").write_text("def f(p, r, rows): return [1.0]")
    end = ended(f"""
import os
from lco_lite.workers import LineWorker
worker = LineWorker("lco_lite.user_code", {str(tmp_path / "own.py:f")!r})
worker.ready()
os.closerange(3, 256)
""")
    assert (end.returncode, end.stderr) == (0, "")
