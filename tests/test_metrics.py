import errno
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest

from lco_lite.errors import DataError, LcoError
from lco_lite.metrics import METRICS, JsonLog, MetricsLog, read_log

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


def write(path, steps, done=0, log=MetricsLog):
    opened = log(path, done)
    for step in steps:
        opened.write({"step": step, "loss": step / 10})


def steps(path):
    return [row["step"] for row in read_log(path)]


def test_the_page_for_readers_lists_every_metric_with_the_same_words():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.M))
    assert rows == METRICS


def test_each_row_is_a_line_that_can_be_read_while_the_stage_goes_on(tmp_path):
    MetricsLog(tmp_path / "m.jsonl", 0).write({"step": 1, "loss": 0.5, "seconds": {"rollout": 1.0, "update": 2.0}})
    line = (tmp_path / "m.jsonl").read_text()
    assert line.endswith("\n")
    assert json.loads(line) == {"step": 1, "loss": 0.5, "seconds": {"rollout": 1.0, "update": 2.0}}


def test_resuming_drops_what_comes_after_the_checkpoint_and_goes_on(tmp_path):
    write(tmp_path / "m.jsonl", [1, 2, 3, 4])
    write(tmp_path / "m.jsonl", [3, 4, 5], done=2)
    assert steps(tmp_path / "m.jsonl") == [1, 2, 3, 4, 5]


def test_the_updates_of_a_step_share_its_number_and_are_kept_or_dropped_together(tmp_path):
    path = tmp_path / "updates.jsonl"
    log = MetricsLog(path, 0)
    for step, update in [(1, 1), (1, 2), (2, 1), (2, 2)]:
        log.write({"step": step, "update": update, "logit_grad_sampled": 0.1, "logit_grad_others": 0.2})
    MetricsLog(path, 1).write({"step": 2, "update": 1})
    assert [(one["step"], one["update"]) for one in read_log(path)] == [(1, 1), (1, 2), (2, 1)]


@pytest.mark.parametrize("cut", [b'{"step": 3, "lo', b'{"step": 3}\xc3', b"nul", b"\0\0\0"])
def test_resuming_drops_a_line_that_was_cut_short(tmp_path, cut):
    write(tmp_path / "m.jsonl", [1, 2])
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(cut)
    write(tmp_path / "m.jsonl", [3], done=2)
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    "damage", [b"nul", b'{"step": 2, "lo', b"[2]", b'{"loss": 1.0}', b'{"step": true}', b"\xff", b""]
)
def test_a_damaged_line_that_no_kill_leaves_is_named_with_its_file_and_changes_nothing(tmp_path, damage):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2, 3])
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(before := b"\n".join([lines[0], damage, *lines[2:]]))
    for reads in (read_log, lambda path: MetricsLog(path, 3)):
        with pytest.raises(DataError, match="m.jsonl, line 2: .*damaged.*--fresh"):
            reads(path)
    assert path.read_bytes() == before


def test_a_stage_that_starts_anew_starts_with_an_empty_file(tmp_path):
    write(tmp_path / "m.jsonl", [1, 2])
    write(tmp_path / "m.jsonl", [])
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_what_is_not_finite_is_written_as_null(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.write({"step": 1, "loss": math.nan, "reward": -math.inf, "seconds": {"update": math.inf}})
    assert read_log(tmp_path / "m.jsonl") == [{"step": 1, "loss": None, "reward": None, "seconds": {"update": None}}]


@pytest.mark.parametrize("row", [{"los": 1.0}, {"seconds": {"lunch": 1.0}}])
def test_an_unknown_metric_is_an_error_and_nothing_is_written(tmp_path, row):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    with pytest.raises(ValueError, match="no such metric: (los|seconds.lunch) "):
        log.write({"step": 1, **row})
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_a_row_without_a_step_is_an_error(tmp_path):
    log = JsonLog(tmp_path / "s.jsonl", 0)
    with pytest.raises(ValueError, match="step"):
        log.write({"response": "x"})


def test_samples_follow_the_same_rule_and_may_hold_any_text(tmp_path):
    text = 'a "quote"\nüñ \u2028 \ud800 \x1b[2J'
    log = JsonLog(tmp_path / "s.jsonl", 0)
    log.write({"step": 1, "response": text})
    log.write({"step": 2, "response": text})
    write(tmp_path / "s.jsonl", [2], done=1, log=JsonLog)
    rows = read_log(tmp_path / "s.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["response"] == text.replace("\ud800", "?")


def test_a_disk_that_fills_up_is_said_once_and_the_whole_lines_stay(tmp_path):
    resource = pytest.importorskip("resource", reason="limits the size of a file, which is how a disk fills up here")
    path, before = tmp_path / "s.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        log = JsonLog(path, 0)
        with pytest.raises(LcoError, match="too large"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
            for step in range(10):
                log.write({"step": step, "response": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert path.stat().st_size == 2500
    assert steps(path) == [0, 1]
    write(path, [2], done=1, log=JsonLog)
    assert steps(path) == [0, 1, 2] and path.read_bytes().count(b"\n") == 3


def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LcoError, match="disk is full"):
        MetricsLog(tmp_path / "m.jsonl", 0)


def test_a_log_that_was_never_written_has_no_rows(tmp_path):
    assert read_log(tmp_path / "absent.jsonl") == []
