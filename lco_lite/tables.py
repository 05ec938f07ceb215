"""Tables of any kind that is read, local or on the hub, as rows: what data, evaluation items and ``init`` come from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lco_lite.errors import DataError
from lco_lite.files import is_there, json_value, not_there, read_bytes, read_jsonl

FILE_KINDS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_OTHER_KINDS = {
    ".txt",
    ".tsv",
    ".xlsx",
    ".arrow",
    ".feather",
    ".pkl",
    ".pickle",
    ".gz",
    ".zst",
    ".zip",
    ".yaml",
    ".yml",
}
MOST_COLUMNS = 1000  # of a table; datasets takes the square of their number in time
_NO_SET = f"is a folder; name a file ({', '.join(FILE_KINDS)}) or a hub set"


def load_rows(source: str) -> list[dict[str, Any]]:
    """All rows of a local file, or of a hub set ``id[:split]`` (split ``train`` unless named). Raises DataError."""
    path = Path(source)
    there = is_there(path)
    kind = FILE_KINDS.get(path.suffix.lower())
    if there and path.is_dir():
        raise DataError(f"{path}: {_NO_SET}")
    if kind == "jsonl":
        return read_jsonl(path)
    if not kind and ((there and path.is_file()) or any(s.lower() in _OTHER_KINDS for s in path.suffixes)):
        raise DataError(f"{path}: a file of a kind that is not read; one of {', '.join(FILE_KINDS)} is, or a hub set")
    if not (there and path.is_file()) and (kind or source.startswith((".", "/", "~"))):
        raise DataError(f"{path!s:.200}: {not_there(path)}")
    if kind == "json":
        return _read_json(path)
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its builders log what they raise, as it is
    name, _, split = source.partition(":")
    if not kind:
        refuse_local(name)
    try:
        if kind and (columns := _columns(path)) > MOST_COLUMNS:
            raise DataError(f"{source}: has {columns:,} columns; at most {MOST_COLUMNS:,} are read")
        given = {"path": kind, "data_files": str(path)} if kind else {"path": name}
        table = datasets.load_dataset(**given, split="train" if kind else split or "train")
    except DataError:
        raise
    except Exception as e:  # datasets raises many kinds, and all of them mean that there are no rows
        what, why = f"a {kind} file" if kind else "a hub set", (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(f"{source:.200}: cannot be loaded as {what}: {why:.400}") from e
    if not len(table):
        raise DataError(f"{source}: has no rows")
    return list(table)


def refuse_local(hub: str) -> None:
    """Raises DataError for the name of a hub set that is none to ``datasets``: it would read a folder of that name, or
    whatever files of the kind that it names lie in the working folder, pickles too."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if is_there(Path(hub)):
        raise DataError(f"{hub}: {_NO_SET}")
    if hub in _PACKAGED_DATASETS_MODULES:
        raise DataError(f"{hub}: is the name of a kind of file; name a file ({', '.join(FILE_KINDS)}) or a hub set")


def _columns(path: Path) -> int:
    """How many a CSV or Parquet file has, by its header."""
    if path.suffix.lower() == ".csv":
        with path.open("rb") as file:
            return file.readline(2**20).count(b",") + 1
    from pyarrow import parquet

    return len(parquet.read_schema(path).names)


def names_in(row: Mapping[str, Any]) -> str:
    """Its columns, for a message: not all of very many, nor the whole of a long name."""
    more = f" and {len(row) - 30:,} more" if len(row) > 30 else ""
    return ", ".join(f"{name:.60}" for name in list(row)[:30]) + more or "no fields"


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
            raise DataError(f"{at}: has no column {theirs!r}, which the recipe names as {ours}; found {names_in(row)}")
    return {ours: row[theirs] for ours, theirs in names.items()}
