"""The short form of ``python -m tests.faults``: every malformed input, the readers, and a few faults of each kind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from lco_lite.errors import LcoError
from lco_lite.workers import environment
from tests.faults import malformed
from tests.faults.runs import Failed


@pytest.mark.parametrize("kind", ["recipe", "rows", "file", "item", "model", "adapter", "gguf", "judge", "name"])
def test_malformed_input_is_one_message_or_known_to_be_taken(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = [name for name in malformed.names() if name.startswith(f"{kind} ")]
    found, failed = Counter[str](), []
    for name in names:
        try:
            found[malformed.tried(name, tmp_path)] += 1
        except Failed as e:
            failed.append(str(e))
    assert not failed, "\n".join(failed)
    assert found["refused"] >= 5


def test_there_are_enough_of_them_and_no_rule_of_what_is_taken_is_idle():
    names = malformed.names()
    assert len(names) >= 2800
    for pattern, _ in malformed.ACCEPTED:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_a_promise_that_is_not_kept_is_told(tmp_path, monkeypatch):
    def silent(folder):
        raise LcoError("something is wrong")

    for work in (lambda folder: None, silent, lambda folder: 1 / 0):
        monkeypatch.setattr(malformed, "cases", lambda work=work: {"recipe rl.lr nan": work})
        with pytest.raises(Failed):
            malformed.tried("recipe rl.lr nan", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks and signals")
def test_kills_faults_signals_a_full_disk_damage_and_hostile_code_keep_what_is_promised():
    kinds = ["kills", "faults", "signals", "disk-full", "damage", "mistyped", "non-finite", "user-code"]
    command = [sys.executable, "-m", "tests.faults", *(word for kind in kinds for word in ("--only", kind))]
    done = subprocess.run(command, env=environment(), timeout=500, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for kind in kinds:
        assert re.search(rf"^{kind} +[1-9]\d* cases", done.stdout, re.MULTILINE), done.stdout
