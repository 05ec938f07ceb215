"""A study's folder as a page: its claims, tables and figures, as ``lco-lite study`` left them."""

from __future__ import annotations

import base64
import csv
import json
import re
from pathlib import Path
from typing import Any

from lco_lite.errors import DataError

CLAIM = ("verdict", "name", "says", "why", "threshold")


def gather_study(folder: Path) -> dict[str, Any]:
    """Raises DataError for a ``study.json`` that is none."""
    file = folder / "study.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        claims = [{name: str(claim[name]) for name in CLAIM} for claim in about["claims"]]
        head = {name: about[name] for name in ("asks", "command", "version", "cells", "done")}
        title = str(about["study"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{file}: is no study's file ({e!r}): `lco-lite study NAME` writes it again") from e
    page = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").exists() else ""
    titles = {name: title for title, name in re.findall(r"^!\[(.*)\]\((.*)\)$", page, re.M)}
    tables = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as lines:
            columns, *rows = [*csv.reader(lines)] or [[]]
        tables.append({"title": path.stem, "columns": columns, "rows": rows})
    figures = []
    for path in sorted(folder.glob("*.svg")):
        picture = "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
        figures.append({"id": path.stem, "title": titles.get(path.name, path.stem), "picture": picture})
    # past the head, paragraphs that are no table, picture or heading
    said = [part.strip() for part in page.split("\n\n")[4:]]
    notes = [part for part in said if part and not part.startswith(("#", "|", "![", "    "))]
    about = {"environment": about.get("environment", {}), "notes": notes}
    return {"kind": "study", "title": title, **head, **about, "claims": claims, "tables": tables, "figures": figures}
