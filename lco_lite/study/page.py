"""What a study leaves: a page of Markdown that says what holds, ``study.json``, CSV files, plots; and beside its folder
``rows/``, with what came out of each cell, which studies share."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lco_lite import __version__
from lco_lite.environment import environment
from lco_lite.files import json_line, write_bytes, write_json, write_text
from lco_lite.metrics import finite
from lco_lite.study.base import Claim, Findings, Results, Row, Study, Table, read_row
from lco_lite.study.figures import save

ROWS = "rows"
_ORDER = ("not reproduced", "unclear", "reproduced")  # refutations first


def write(study: Study, results: Results, total: int, command: str, folder: Path) -> Findings:
    """All files of the study in ``folder``, of whatever is done so far of ``total`` cells."""
    report = study.report(results)
    folder.mkdir(parents=True, exist_ok=True)
    claims = [vars(claim) for claim in ordered(report.claims)]
    about: dict[str, Any] = {"study": study.name, "asks": study.asks, "command": command, "version": __version__}
    about |= {"cells": total, "done": len(results.rows), "claims": claims, "environment": environment()}
    write_json(folder / "study.json", about | {"rows": [row["id"] for row in results.rows]})
    for row in results.rows:
        file = folder.parent / ROWS / f"{row['id']}.json"
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, json_line(finite(row)))
    for table in report.tables:
        write_text(folder / f"{table.name}.csv", as_csv(table))
    for plot in report.plots:
        save(plot, folder)
    write_text(folder / "README.md", as_markdown(study, report, results, total, command))
    return report


def known_rows(folder: Path) -> dict[str, Row]:
    """The rows that studies beside this one have left, by id: cells that need not run again."""
    rows = [read_row(file, file.stem) for file in sorted((folder.parent / ROWS).glob("*.json"))]
    return {row["id"]: row for row in rows}


def ordered(claims: Sequence[Claim]) -> list[Claim]:
    return sorted(claims, key=lambda claim: _ORDER.index(claim.verdict))


def as_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return text.getvalue()


def as_markdown(study: Study, report: Findings, results: Results, total: int, command: str) -> str:
    seeds = sorted({row["seed"] for row in results.rows})
    lines = [f"# {study.name}", "", study.asks, "", f"    {command}", ""]
    state = f"{len(results.rows)} of {total} cells" if len(results.rows) < total else f"{total} cells"
    hours = sum(row["seconds"] for row in results.rows) / 3600
    versions = ", ".join(sorted({row["version"] for row in results.rows}))
    if results.rows:
        lines += [f"{state}, seeds {_spans(seeds)}, version {versions}, {hours:.1f} hours of one process.", ""]
    else:
        lines += [f"Nothing has run yet: 0 of {total} cells.", ""]
    claims = [[claim.verdict, claim.name, claim.says, claim.why, claim.threshold] for claim in ordered(report.claims)]
    columns = ["verdict", "claim", "says", "found", "threshold, set before the runs"]
    lines += [*_rows(Table("claims", "Claims", columns, claims)), ""]
    for plot in report.plots:
        lines += [f"![{plot.title}]({plot.name}.svg)", ""]
    for table in report.tables:
        if table.shown:
            lines += [f"## {table.title}", "", *_rows(table), ""]
    for note in report.notes:
        lines += [note, ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(table: Table) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_told(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(table.columns), "|---" * len(table.columns) + "|", *map(line, table.rows)]


def _told(cell: Any) -> str:
    return "–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _spans(seeds: Sequence[int]) -> str:
    """``0 to 8``, or a list."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))
