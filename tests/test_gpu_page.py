"""The GPU page's script and benchmarks, with tiny shapes on a CPU: what they write, and that goals are judged right."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_the_script_parses_knows_its_parts_and_its_time_limits_are_25_minutes_together(tmp_path):
    script = BENCHMARKS / "gpu.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    limits = [int(line.split()[1]) for line in script.read_text().splitlines() if line.strip().startswith("run ")]
    assert len(limits) > 6 and sum(limits) <= 25 * 60
    asked = subprocess.run(["bash", script, "nothing"], env={"OUT": str(tmp_path), "PATH": "/usr/bin:/bin"}, text=True,
                           capture_output=True)  # fmt: skip
    assert asked.returncode == 2 and "no part 'nothing': rollout, memory" in asked.stderr


def test_the_page_says_of_each_goal_whether_it_is_met_or_was_not_measured(tmp_path):
    page = benchmark("page")
    rates = {"generate": 500.0, "paged": 4500.0, "vllm": 10000.0}
    rows = {name: {"tokens_per_second": rate, "ratio": rate / 500} for name, rate in rates.items()}
    (tmp_path / "rollout.json").write_text(json.dumps({"title": "a 3B", "results": rows}))
    held = {"planned": 6 * 2**30, "micro_batch_tokens": 4096, "seconds": 2.0}
    peaks = {phase: held | {"allocated": 7 * 2**30} for phase in page.PHASES}
    (tmp_path / "memory-residency.json").write_text(json.dumps({"title": "3B + 7B", "results": peaks}))
    streamed = {phase: row | {"allocated": 6 * 2**30, "seconds": 2.5} for phase, row in peaks.items()}
    (tmp_path / "memory-streamed.json").write_text(json.dumps({"title": "3B + 7B", "results": streamed}))
    seconds = {"rollout": 5.0, "score": 2.0, "update": 3.0, "eval": 100.0}
    step = {"seconds": seconds, "tokens_per_second": 9.0, "peak_mib": 1.0}
    (tmp_path / "phases.json").write_text(json.dumps(step))
    found = {what: (figure, met) for what, _, figure, met in page.goals(tmp_path)}
    assert found["rollout, tokens/s ÷ generate"] == ("9.00", "yes")
    assert found["rollout, tokens/s ÷ vLLM"] == ("0.45", "no")
    assert found["rl, all on the card, GiB"] == (page.NONE, "")
    assert found["rl, residency: phase, GiB"] == ("7.00", "yes")
    assert found["rl, φ streamed, GiB"] == ("6.00", "no")
    assert found["a streamed phase, time ÷ resident, the most"] == ("1.25", "no")
    assert found["rollout's share of a step"] == ("50%", "yes")
    assert "| rl update | 7.000 |" in page.page(tmp_path)


@pytest.mark.slow
def test_a_phase_is_measured_beside_the_plan_and_the_longest_sequence_is_within_the_limit(tmp_path, monkeypatch):
    memory, file = benchmark("memory"), tmp_path / "figures.json"

    def measured(*words: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["memory.py", "--device", "cpu", "--json", str(file), *words])
        memory.main()
        return json.loads(file.read_text())["results"]

    found = measured("--phase", "sft", "--policy", "tiny", "--reward-model", "self")["sft"]
    assert 0.7 < found["allocated"] / found["planned"] < 1.3
    found = measured("longest", "--shape", "tiny-gemma", "--limit", "5MiB", "--grain", "64")["lco kld"]
    assert found["tokens"] >= 64 and found["bytes"] <= 5 * 2**20
