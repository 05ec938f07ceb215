"""Tables of any kind that is read, local or on the hub, as rows: what data, evaluation items and ``init`` come from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lco_lite.errors import DataError
from lco_lite.files import is_there, json_value, not_there, read_bytes, read_jsonl

FILE_KINDS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_OTHER_KINDS = {
    f".{end}" for end in ["txt", "tsv", "xlsx", "arrow", "feather", "pkl", "pickle", "gz", "zst", "zip", "yaml", "yml"]
}


def load_rows(source: str) -> list[dict[str, Any]]:
    """All rows of a local file, or of a hub set ``id[:split]`` (split ``train`` unless named). Raises DataError."""
    path = Path(source)
    there = is_there(path)
    kind = FILE_KINDS.get(path.suffix.lower())
    if there and path.is_dir():
        raise DataError(f"{path}: is a folder; name a file ({', '.join(FILE_KINDS)}) or a hub set")
    if kind == "jsonl":
        return read_jsonl(path)
    if not kind and ((there and path.is_file()) or any(s.lower() in _OTHER_KINDS for s in path.suffixes)):
        raise DataError(f"{path}: a file of a kind that is not read; one of {', '.join(FILE_KINDS)} is, or a hub set")
    if not (there and path.is_file()) and (kind or source.startswith((".", "/", "~"))):
        raise DataError(f"{path}: {not_there(path)}")
    if kind == "json":
        return _read_json(path)
    import datasets

    try:
        if kind:
            table = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            name, _, split = source.partition(":")
            table = datasets.load_dataset(name, split=split or "train")
    except Exception as e:  # datasets raises many kinds, and all of them mean that there are no rows
        what, why = f"a {kind} file" if kind else "a hub set", (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(f"{source}: cannot be loaded as {what}: {why}") from e
    if not len(table):
        raise DataError(f"{source}: has no rows")
    return list(table)


def _read_json(path: Path) -> list[dict[str, Any]]:
    """A list of objects; a file of one object a line is JSON Lines, whatever its name."""
    content = read_bytes(path)
    rows = json_value(content, str(path)) if content.lstrip().startswith(b"[") else read_jsonl(path)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {i}: is not an object with named fields, found {row!r:.80}")
    if not rows:
        raise DataError(f"{path}: has no rows")
    return rows


def named_columns(row: dict[str, Any], names: Mapping[str, str], at: str) -> dict[str, Any]:
    """Our name -> the value in the column that the recipe names so (``names``: ours -> theirs). Raises DataError."""
    for ours, theirs in names.items():
        if theirs not in row:
            raise DataError(f"{at}: has no column {theirs!r}, which the recipe names as {ours}; found {', '.join(row)}")
    return {ours: row[theirs] for ours, theirs in names.items()}
