"""Functions of users that are wrong, late or hostile, by the kind of function that they are given as. ``good_`` ones
are accepted; every other ends the command with one message that names the file, and ends nothing else."""

from __future__ import annotations

from pathlib import Path

_ANYWHERE = {
    "raises": "def f(*a, **k): raise ValueError('no')",
    "raises_without_text": "class E(Exception):\n    def __str__(self): raise RuntimeError\ndef f(*a, **k): raise E",
    "exits": "import sys\ndef f(*a, **k): sys.exit(0)",
    "exits_at_once": "import os\ndef f(*a, **k): os._exit(0)",
    "recurses": "def f(*a, **k): return f(*a, **k)",
    "gives_nothing": "def f(*a, **k): pass",
    "gives_text": "def f(*a, **k): return 'right'",
    "gives_an_object_without_text": "class O:\n    def __repr__(self): raise RuntimeError\ndef f(*a, **k): return O()",
    "has_no_such_name": "def g(*a, **k): return 1",
    "is_no_function": "f = 3",
    "is_no_python": "def f(:",
    "is_empty": "",
    "has_nul": "def f(*a): return 1\0",
    "fails_on_import": "1 / 0",
    "exits_on_import": "import sys\nsys.exit(0)",
    "exits_at_once_on_import": "import os\nos._exit(0)",
    "imports_what_is_not_there": "import no_such_module_at_all",
    "writes_much_in_its_error": "def f(*a, **k): raise ValueError('x' * 10**6)",
    "raises_what_nobody_catches": "class B(BaseException): pass\ndef f(*a, **k): raise B",
    "raises_an_exit_of_typer": "import typer\ndef f(*a, **k): raise typer.Exit(0)",
    "raises_our_own": "from lco_lite.errors import WeightsLost\ndef f(*a, **k): raise WeightsLost('x')",
    "leaves_a_thread": "import threading, time\n"
    "def f(*a, **k): threading.Thread(target=time.sleep, args=(999,)).start()",
    "waits_at_the_end": "import atexit, time\natexit.register(time.sleep, 999)\ndef f(*a, **k): pass",
    "steers_the_terminal": "def f(*a, **k): raise ValueError('\\x1b[2J\\x1b]0;owned\\x07')",
}
REWARDS = {
    **_ANYWHERE,
    "good_constant": "def f(p, r, rows): return [0.5 * (i % 2) for i in range(len(r))]",
    "good_numpy": "import numpy as np\ndef f(p, r, rows): return np.arange(len(r)) / 7",
    "good_torch": "import torch\ndef f(p, r, rows): return torch.arange(len(r)) / 7",
    "good_generator": "def f(p, r, rows): return (len(x) / 9 for x in r)",
    "good_prints": "def f(p, r, rows):\n    print('1 {\"rewards\": [9]}')\n    return [i / 9 for i in range(len(r))]",
    "good_changes_its_folder": "import os\nos.chdir('/')\ndef f(p, r, rows): return [0.1 * i for i in range(len(r))]",
    "too_few": "def f(p, r, rows): return [1.0] * (len(r) - 1)",
    "too_many": "def f(p, r, rows): return [1.0] * (len(r) + 1)",
    "without_end": "import itertools\ndef f(p, r, rows): return itertools.count()",
    "not_a_number": "def f(p, r, rows): return [float('nan')] * len(r)",
    "infinite": "def f(p, r, rows): return [float('-inf')] * len(r)",
    "beyond_float32": "def f(p, r, rows): return [1e300] * len(r)",
    "texts": "def f(p, r, rows): return ['1'] * len(r)",
    "nested": "def f(p, r, rows): return [[1.0]] * len(r)",
    "a_mapping": "def f(p, r, rows): return {x: 1.0 for x in r}",
    "a_coroutine": "async def f(p, r, rows): return [1.0] * len(r)",
    "complex": "def f(p, r, rows): return [1j] * len(r)",
    "wrong_signature": "def f(): return [1.0]",
    "hangs": "import time\ndef f(p, r, rows): time.sleep(10_000)",
    "hangs_on_import": "import time\ntime.sleep(10_000)\ndef f(p, r, rows): return [1.0] * len(r)",
    "spins": "def f(p, r, rows):\n    while True: pass",
    "stops_itself": "import os, signal\ndef f(p, r, rows): os.kill(os.getpid(), signal.SIGSTOP)",
    "kills_itself": "import os, signal\ndef f(p, r, rows): os.kill(os.getpid(), signal.SIGKILL)",
    "segfaults": "import ctypes\ndef f(p, r, rows): ctypes.string_at(0)",
    "aborts": "import os\ndef f(p, r, rows): os.abort()",
    "ignores_signals_and_hangs": "import signal, time\nfor s in (2, 15, 1): signal.signal(s, signal.SIG_IGN)\n"
    "def f(p, r, rows): time.sleep(10_000)",
    "leaves_a_child": "import subprocess, sys, os, time\ndef f(p, r, rows):\n"
    "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(10_000)', __file__])\n    time.sleep(10_000)",
    "closes_its_pipes": "import os, time\ndef f(p, r, rows):\n    os.closerange(0, 64)\n    time.sleep(10_000)",
    "takes_memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
    "def f(p, r, rows): return [len(bytearray(2**33))] * len(r)",
    "breaks_json": "import json\njson.dumps = None\ndef f(p, r, rows): return [1.0] * (len(r) + 1)",
    "is_interrupted_on_import": "raise KeyboardInterrupt",
    "interrupts": "def f(p, r, rows): raise KeyboardInterrupt",
    "deletes_itself_and_fails": "import os\ndef f(p, r, rows):\n    os.unlink(__file__)\n    return None",
}
_GRADES = {
    "good_bool": "def f(response, item): return len(response) % 2 == 0",
    "good_forks": "import os\nos.fork()\ndef f(response, item): return bool(os.fork() + 1)",
    "good_moves": "import os\ndef f(response, item):\n    os.chdir('/')\n    return True",
    "gives_a_number": "def f(response, item): return 1",
    "gives_nan": "def f(response, item): return float('nan')",
    "wrong_signature": "def f(): return True",
}
GRADERS = {**_ANYWHERE, **_GRADES}
OBJECTIVES = {
    **_ANYWHERE,
    "good_reinforce": "def f(batch, clip): return -(batch.logprobs * batch.advantages).sum() / batch.tokens, {}",
    "good_forks": "import os\ndef f(batch, clip):\n    os.fork()\n"
    "    return -(batch.logprobs * batch.advantages).sum() / batch.tokens, {}",
    "good_sets_what_is_not_its_own": "import signal, sys, warnings\nimport torch\n"
    "torch.set_default_dtype(torch.float64)\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "def f(batch, clip):\n    warnings.simplefilter('error')\n    sys.stdout.close()\n    batch.advantages.mul_(2)\n"
    "    return -(batch.logprobs * batch.advantages).sum() / batch.tokens, {}",
    "interrupts": "def f(batch, clip): raise KeyboardInterrupt",
    "gives_no_diagnostics": "def f(batch, clip): return -(batch.logprobs * batch.advantages).sum() / batch.tokens",
    "gives_nan": "def f(batch, clip): return batch.logprobs.sum() * float('nan'), {}",
    "has_no_gradient": "def f(batch, clip): return batch.logprobs.detach().sum(), {}",
    "is_a_vector": "def f(batch, clip): return batch.logprobs, {}",
    "is_a_number": "def f(batch, clip): return 1.0, {}",
    "unknown_diagnostic": "def f(batch, clip): return batch.logprobs.mean(), {'not known': batch.logprobs.detach()}",
    "short_diagnostic": "def f(batch, clip): return batch.logprobs.mean(), {'clipped': batch.logprobs.detach()[:1]}",
    "wrong_signature": "def f(): return 1",
}
TARGETS = {
    **_ANYWHERE,
    "good_same": "def f(target, head, batch): return target",
    "gives_a_tensor": "def f(target, head, batch): return batch.advantages",
    "wrong_signature": "def f(): return 1",
}
KINDS = {"reward": REWARDS, "grader": GRADERS, "objective": OBJECTIVES, "target": TARGETS}


def command(kind: str, spec: str, recipe: str, runs: Path) -> list[str]:
    where = ["--runs", str(runs), "--quiet"]
    if kind == "grader":
        return ["eval", "arithmetic", "--name", "tiny", "--grader", spec, *where]
    rl = ["rl", recipe, *where, "-s", "rl.responses_per_prompt=2", "-s", "rl.baseline=group"]
    if kind == "objective":
        return [*rl, "--objective", spec]
    if kind == "target":
        return [*rl, "--objective", "lch", "--feedback", "rule", "-s", f"rl.target={spec}"]
    timeout = "rl.reward_timeout=4"
    return [*rl, "--objective", "grpo", "--feedback", "function", "-s", f"rl.reward_function={spec}", "-s", timeout]
