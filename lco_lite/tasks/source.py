"""Where the rows of a task come from: a file that is named, a folder of such files, or the hub.

The folder is the one named by the environment variable ``LCO_LITE_DATA``, or ``data`` where that is a folder.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from lco_lite.errors import DataError
from lco_lite.files import read_jsonl

FOLDER = "LCO_LITE_DATA"
EVERY_CONFIG = "*"

Rows: TypeAlias = list[tuple[str, dict[str, Any]]]
"""Rows, each with its place for messages: ``FILE, line 3``."""


@dataclass(frozen=True)
class Source:
    """One split: ``files`` of a folder, read one after the other; else ``split`` of the hub set ``hub``."""

    files: tuple[str, ...]
    hub: str
    split: str
    config: str | None = None


def splits(data: Path | None, **sources: Source) -> dict[str, Callable[[], Rows]]:
    """How to load each split; ``data`` is a folder with the files of all, or one file with the ``test`` items."""
    is_file = data is not None and not data.is_dir()
    return {
        split: partial(read_rows, data) if data and is_file and split == "test" else partial(rows, source, data)
        for split, source in sources.items()
    }


def rows(source: Source, data: Path | None = None) -> Rows:
    """All rows of one split. Raises DataError where they are not to be had.

    ``data`` is the folder to look in; where it lacks one of the files, the hub is asked.
    """
    folder = folder_of(data)
    paths = [] if folder is None else [folder / name for name in source.files]
    if paths and all(path.exists() for path in paths):
        return read_rows(*paths)
    return _fetch(source, folder)


def folder_of(data: Path | None) -> Path | None:
    """The folder to look in: ``data`` where it is one, else the one that ``LCO_LITE_DATA`` names, if any."""
    if data is not None and data.is_dir():
        return data
    return Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None


def first_file(data: Path | None, *names: str) -> Path | None:
    """The first of these files that is in the folder to look in."""
    folder = folder_of(data)
    return next((folder / name for name in names if folder and (folder / name).exists()), None)


def read_rows(*paths: Path) -> Rows:
    """The rows of one JSONL file after the other. Raises DataError naming file and line of what is wrong."""
    return [(f"{path}, line {i}", row) for path in paths for i, row in enumerate(read_jsonl(path), 1)]


def _fetch(source: Source, folder: Path | None) -> Rows:
    import datasets

    try:
        found = [
            {"subject": config, **row} if source.config == EVERY_CONFIG else dict(row)
            for config in _configs(source)
            for row in datasets.load_dataset(source.hub, config, split=source.split)
        ]
    except Exception as e:  # offline, renamed, gated, a broken cache: many kinds, one meaning
        first = next(iter(str(e).splitlines()), "") or type(e).__name__
        wanted = " and ".join(source.files)
        where = f"the folder {folder} has no {wanted}, and the" if folder else "the"
        raise DataError(
            f"{where} hub set {source.hub} (split {source.split}) cannot be loaded: {first[:200]}. "
            f"To use local data, set {FOLDER}=DIR to a folder with {wanted}"
        ) from e
    return [(f"{source.hub}, row {i}", row) for i, row in enumerate(found, 1)]


def _configs(source: Source) -> Iterator[str | None]:
    if source.config == EVERY_CONFIG:
        import datasets

        yield from datasets.get_dataset_config_names(source.hub)
    else:
        yield source.config
