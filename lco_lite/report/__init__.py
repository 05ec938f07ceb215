"""``lco-lite report``: one HTML file that opens from disk, with all that is known of runs or of a study.

The page is ``page.html`` and its data, JSON in a script element. Text of a model, a recipe or a file reaches it as data
alone: the page puts it in as text, and characters that cannot be seen are written out.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from lco_lite import __version__
from lco_lite.console import Console
from lco_lite.errors import UsageError
from lco_lite.files import is_there, read_bytes, write_text
from lco_lite.metrics import finite
from lco_lite.report.figures import draw, study_pictures
from lco_lite.report.runs import gather
from lco_lite.report.study import gather_study
from lco_lite.run import Run, no_run
from lco_lite.visible import visible as written_out

visible = partial(written_out, keep="\u200c\u200d", form="⟨U+{:04X}⟩")  # joiners make letters and emoji
_OURS = b'<script type="application/json" id="data">'  # of every version's page
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def report(
    names: Sequence[str], runs: Path, out: Path | None, figures: Path | None, every: bool, console: Console
) -> Path:
    """Writes the page of these runs (names in ``runs``, or folders; none: the newest) or of one study's folder, and
    their figures as SVG and PNG where a folder for them is given: those that the page shows first, or every one.
    Returns the page's path. UsageError where there is nothing to show, or ``every`` without a folder."""
    if every and figures is None:
        raise UsageError("--all-figures: says which figures --figures DIR writes; give it too")
    folders = [_folder(name, runs) for name in dict.fromkeys(names)] or [Run.newest(runs).path]
    if twice := [name for name, n in Counter(folder.resolve().name for folder in folders).items() if n > 1]:
        raise UsageError(
            f"report: several runs are called {', '.join(twice)}, which are told apart by name: rename one"
        )
    studies = [folder for folder in folders if (folder / "study.json").is_file()]
    if studies and len(folders) > 1:
        raise UsageError(f"report: {studies[0]} is a study, which has a page of its own; name it alone, or runs only")
    if studies:
        data = gather_study(folders[0])
    else:
        data = gather([Run(folder) for folder in folders], console.note if len(folders) > 1 else lambda text: None)
    data = {"version": __version__} | data  # a study has that of its runs
    default = folders[0] if len(folders) == 1 else runs
    page = out or default / "report.html"
    _refuse_other(page)
    write_text(page, as_html(data))
    if figures is not None:
        made = study_pictures(folders[0], figures) if studies else draw(data, figures, every)
        more = 0 if every or studies else sum(not figure["first"] for figure in data["figures"])
        console.note(f"{made} figures as SVG and PNG in {figures}{f'; --all-figures writes {more} more' * bool(more)}")
    for text in data.get("left_out", []):
        console.note(f"left out: {text}")
    console.done(page)
    return page


def _refuse_other(page: Path) -> None:
    """Raises UsageError where something is there that is no page of ours, which alone is written over."""
    if not is_there(page):
        return
    if page.is_dir():
        raise UsageError(f"--out {page}: is a folder; name a file in it")
    if not page.is_file() or ((found := read_bytes(page)) and _OURS not in found):
        raise UsageError(f"--out {page}: is there already, and is no page of a report: name another file")


def _folder(name: str, runs: Path) -> Path:
    """A folder that exists, else a run's name."""
    for folder in (runs / name, Path(name), runs / "studies" / name):
        if folder.is_dir():
            return folder
    raise no_run(name, runs)


def as_html(data: dict[str, Any]) -> str:
    """The page around its data."""
    text = json.dumps(shown(finite(data)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escaped in _UNSAFE.items():  # of JSON, in whose strings alone they stand
        text = text.replace(character, escaped)
    template = (files("lco_lite.report") / "page.html").read_text(encoding="utf-8")
    head, _, rest = template.partition("{{title}}")
    body, _, end = rest.partition("{{data}}")
    return "".join((head, html.escape(visible(data["title"])), body, text, end))


def shown(value: Any) -> Any:
    """JSON with every text in it, keys too, made ``visible``."""
    if isinstance(value, dict):
        return {visible(str(key)): shown(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float)) else visible(str(value))
