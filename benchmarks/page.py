"""page.md of what ``benchmarks/gpu.sh`` measured: card, driver, versions, goals beside figures.

    python benchmarks/page.py OUT

A figure that was not measured says so. Goals are those of docs/benchmarks.md.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lco_lite.environment import environment

GIB = 2**30
PHASES = ("sft", "pair sampling", "train-rm", "rl rollout", "rl score", "rl update")
NONE = "not measured"
MEMORY = {"memory": "all on the card", "memory-residency": "residency: phase", "memory-streamed": "φ streamed"}


def read(folder: Path, name: str) -> Any:
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "no NVIDIA driver: a CPU"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def largest(report: Any, *phases: str) -> float | None:
    """GiB allocated, the most of these phases; None where one of them is missing."""
    rows = [report["results"].get(phase) for phase in phases] if report else [None]
    return None if None in rows else max(row["allocated"] for row in rows) / GIB


def goals(folder: Path) -> Iterator[list[str]]:
    """What is wanted, the goal, the figure."""
    rollout, step, longest = (read(folder, name) for name in ("rollout", "phases", "longest"))
    rates = {name: row["tokens_per_second"] for name, row in rollout["results"].items()} if rollout else {}

    def row(what: str, goal: str, value: float | None, form: str, met: bool) -> list[str]:
        return [what, goal, NONE, ""] if value is None else [what, goal, form.format(value), "yes" if met else "no"]

    def ratio(a: str, b: str) -> float | None:
        return rates[a] / rates[b] if a in rates and b in rates else None

    best = ratio("paged", "generate")
    yield row("rollout, tokens/s ÷ generate", "≥ 8", best, "{:.2f}", (best or 0) >= 8)
    best = ratio("paged", "vllm")
    yield row("rollout, tokens/s ÷ vLLM", "≥ 0.50", best, "{:.2f}", (best or 0) >= 0.5)
    reports = {name: read(folder, name) for name in MEMORY}
    rl = ("rl rollout", "rl score", "rl update")
    for name, most in (("memory", 11.5), ("memory-residency", 7.5), ("memory-streamed", 5.7)):
        value = largest(reports[name], *rl)
        yield row(f"rl, {MEMORY[name]}, GiB", f"< {most}", value, "{:.2f}", (value or most) < most)
    for name, most in (("memory-residency", 7.5), ("memory-streamed", 4.0)):
        value = largest(reports[name], "train-rm")
        yield row(f"train-rm, {MEMORY[name]}, GiB", f"< {most}", value, "{:.2f}", (value or most) < most)
    slower = None
    if reports["memory-residency"] and reports["memory-streamed"]:
        whole, streamed = (reports[name]["results"] for name in ("memory-residency", "memory-streamed"))
        shared = [p for p in PHASES if p in whole and p in streamed]
        slower = max((streamed[p]["seconds"] / whole[p]["seconds"] for p in shared), default=None)
    yield row("a streamed phase, time ÷ resident, the most", "≤ 1.10", slower, "{:.2f}", (slower or 2) <= 1.1)
    tokens = longest["results"]["lco kld"]["tokens"] if longest else None
    yield row("longest KLD sequence, tokens", "≥ 114,688", tokens, "{:,}", (tokens or 0) >= 114_688)
    seconds = step["seconds"] if step else {}
    share = seconds["rollout"] / sum(seconds[p] for p in ("rollout", "score", "update")) if seconds else None
    yield row("rollout's share of a step", "≤ 60 %", share, "{:.0%}", (share or 1) <= 0.6)


def page(folder: Path) -> str:
    facts = environment()
    versions = ", ".join(
        f"{name} {facts['packages'][name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    where = f"{driver()} · CUDA {facts['device'].get('cuda')} · Python {facts['python']} · {versions}"
    git = facts["git"]
    parts = [f"# GPU figures\n\n{where}" + (f" · commit {git['commit'][:10]}" if git else "")]
    parts.append("## Goals\n\n" + markdown(["figure", "goal", "measured", "met"], list(goals(folder))))
    for report in (read(folder, name) for name in ("rollout", "rollout-others")):
        if report is not None:
            rows = [
                [name, f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}", f"{row.get('peak_gib', 0):.2f}"]
                for name, row in report["results"].items()
            ]
            heads = ["", "tokens/s", "÷ the first", "GiB allocated (0: not seen)"]
            parts.append(f"## Rollouts\n\n{report['title']}\n\n" + markdown(heads, rows))
    for name, what in MEMORY.items():
        if (report := read(folder, name)) is not None:
            rows = [
                [
                    phase,
                    f"{row['allocated'] / GIB:.3f}",
                    f"{row['reserved'] / GIB:.3f}" if "reserved" in row else "",
                    f"{row['planned'] / GIB:.3f}",
                    str(row["micro_batch_tokens"]),
                    f"{row['seconds']:.1f}",
                ]
                for phase, row in report["results"].items()
            ]
            heads = ["phase", "GiB allocated", "reserved", "planned", "micro-batch, tokens", "s"]
            parts.append(f"## Memory: {what}\n\n{report['title']}\n\n" + markdown(heads, rows))
    if (report := read(folder, "longest")) is not None:
        rows = [
            [name, f"{row['tokens']:,}", f"{row.get('bytes', 0) / GIB:.2f}"] for name, row in report["results"].items()
        ]
        parts.append(f"## Longest sequence\n\n{report['title']}\n\n" + markdown(["", "tokens", "GiB"], rows))
    for report in read(folder, "loss") or []:
        keys = ("ms", "mib", "error", "time_to_naive", "memory_to_naive", "time_to_floor")
        rows = [
            [name, *(f"{row[key]:.3g}" if key in row else "" for key in keys)]
            for name, row in report["results"].items()
        ]
        shape = "T {:,} · d {:,} · V {:,}".format(*report["shape"])
        heads = ["", "ms", "MiB", "gradient error", "time ÷ naive", "memory ÷ naive", "time ÷ floor"]
        parts.append(f"## Loss: {shape} · {report['dtype']}\n\n" + markdown(heads, rows))
    if (step := read(folder, "phases")) is not None:
        rows = [[phase, f"{seconds:.2f}"] for phase, seconds in step["seconds"].items()]
        told = f"{step['tokens_per_second']:,.0f} response tokens/s, peak {step['peak_mib']:,.0f} MiB"
        parts.append(f"## A step of RL\n\n{told}\n\n" + markdown(["phase", "s a step"], rows))
    ended = {0: "whole", 124: "time limit", 137: "time limit"}
    statuses = [json.loads(file.read_text()) for file in sorted(folder.glob("*.status.json"))]
    rows = [
        [s["name"], ended.get(s["status"], f"exit {s['status']}"), str(s["seconds"]), str(s["limit"])] for s in statuses
    ]
    parts.append("## Parts\n\n" + markdown(["part", "ended", "s", "limit, s"], rows))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    folder = Path(sys.argv[1])
    text = page(folder)
    (folder / "page.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
