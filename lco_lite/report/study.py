"""A study's folder as a page: its claims, tables and figures, as ``lco-lite study`` left them."""

from __future__ import annotations

import base64
import csv
import io
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lco_lite.errors import DataError
from lco_lite.files import Count, damage, read_bytes, read_json, read_text

AGAIN = "`lco-lite study NAME` writes it again"


class ClaimKept(BaseModel):
    verdict: str
    name: str
    says: str
    why: str
    threshold: str


class StudyKept(BaseModel):
    """``study.json``, as far as its page shows it."""

    study: str
    asks: str
    command: str
    version: str
    cells: Count
    done: Count
    claims: list[ClaimKept]
    environment: dict[str, Any] = {}


def gather_study(folder: Path) -> dict[str, Any]:
    """Raises DataError for a file that no study writes."""
    about = read_json(folder / "study.json", StudyKept, AGAIN)
    claims = [{name: claim[name] for name in ClaimKept.model_fields} for claim in about["claims"]]
    head = {name: about[name] for name in ("asks", "command", "version", "cells", "done")}
    with damage(folder / "README.md", AGAIN):
        page = read_text(folder / "README.md") if (folder / "README.md").exists() else ""
    titles = {name: title for title, name in re.findall(r"^!\[(.*)\]\((.*)\)$", page, re.M)}
    tables = []
    for path in sorted(folder.glob("*.csv")):
        columns, *rows = _table(path) or [[]]
        tables.append({"title": path.stem, "columns": columns, "rows": rows})
    figures = []
    for path in sorted(folder.glob("*.svg")):
        picture = "data:image/svg+xml;base64," + base64.b64encode(read_bytes(path)).decode()
        figures.append({"id": path.stem, "title": titles.get(path.name, path.stem), "picture": picture})
    # past the head, paragraphs that are no table, picture or heading
    said = [part.strip() for part in page.split("\n\n")[4:]]
    notes = [part for part in said if part and not part.startswith(("#", "|", "![", "    "))]
    head |= {"environment": about.get("environment", {}), "notes": notes}
    return {"kind": "study", "title": about["study"], **head, "claims": claims, "tables": tables, "figures": figures}


def _table(path: Path) -> list[list[str]]:
    with damage(path, AGAIN):
        text = read_text(path)
        try:
            return list(csv.reader(io.StringIO(text, newline="")))
        except csv.Error as e:
            raise DataError(f"{path}: {e}") from e
