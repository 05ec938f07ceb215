"""Tables of any kind that is read, local or on the hub, as rows: what data, evaluation items and ``init`` come from."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lco_lite.errors import DataError
from lco_lite.files import is_there, json_value, not_there, read_bytes, read_jsonl

FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv")
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
MOST_COLUMNS = 1000  # of a table
_NO_SET = f"is a folder; name a file ({', '.join(FILE_KINDS)}) or a hub set"


def load_rows(source: str) -> list[dict[str, Any]]:
    """All rows of a local file, or of a hub set ``id[:split]`` (split ``train`` unless named). Raises DataError."""
    path = Path(source)
    there = is_there(path)
    readers = {".jsonl": read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
    read = readers.get(path.suffix.lower())
    if there and path.is_dir():
        raise DataError(f"{path}: {_NO_SET}")
    if read is not None:
        return read(path)
    if there or any(s.lower() in _OTHER_KINDS for s in path.suffixes):
        raise DataError(f"{path}: a file of a kind that is not read; one of {', '.join(FILE_KINDS)} is, or a hub set")
    if source.startswith((".", "/", "~")):
        raise DataError(f"{path!s:.200}: {not_there(path)}")
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its builders log what they raise, as it is
    name, _, split = source.partition(":")
    refuse_local(name)
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as e:  # datasets raises many kinds, and all of them mean that there are no rows
        raise DataError(f"{source:.200}: cannot be loaded as a hub set: {_first_line(e)}") from e
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


def names_in(row: Mapping[str, Any]) -> str:
    """Its columns, for a message: not all of very many, nor the whole of a long name."""
    more = f" and {len(row) - 30:,} more" if len(row) > 30 else ""
    return ", ".join(f"{name:.60}" for name in list(row)[:30]) + more or "no fields"


def _first_line(error: Exception) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.400}"


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


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Every cell as the text that stands there, under the names in the first line. Raises DataError with the line."""
    table = _cells(path, _utf8(path))
    while table and not table[-1][1]:
        table.pop()
    if not table or not table[0][1]:
        raise DataError(f"{path}, line 1: is empty; a line with the names of the columns is expected")
    (_, names), *rows = table
    _check_names(f"{path}, line 1", names)
    for line, cells in rows:
        if len(cells) != len(names):
            found = f"has {len(cells)} cells, {cells!r:.80}" if cells else "is empty"
            raise DataError(f"{path}, line {line}: {found}; {len(names)} are expected, as in line 1. {_QUOTES}")
    if not rows:
        raise DataError(f"{path}: has no rows")
    return [dict(zip(names, cells, strict=True)) for _, cells in rows]


def _utf8(path: Path) -> str:
    """The text of a CSV file."""
    content = read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        found, at = f"byte 0x{content[e.start]:02x}, which is not UTF-8", e.start
    else:
        if "\0" not in text:
            return text
        found, at = "a NUL character", content.index(b"\0")
    line = content.count(b"\n", 0, at) + 1
    raise DataError(f"{path}, line {line}: has {found}; a .csv file is text in UTF-8")


_QUOTES = "A cell with a comma, a line end or a double quote stands in double quotes, and those within it are doubled"


def _cells(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """(the line that it begins in, its cells) of each row; an empty line has no cells."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, line = [], 1
    limit = csv.field_size_limit(len(text) + 1)  # a setting of the whole process
    try:
        for cells in reader:
            rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as e:
        open_ended = "end of data" in str(e)
        found = "a double quote is opened in this row and never closed" if open_ended else f"is not CSV: {e}"
        raise DataError(f"{path}, line {line if open_ended else reader.line_num}: {found}. {_QUOTES}") from e
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    """The values as they are stored, JSON where a column is of that type. What the file says of how another library
    shows them, which may name files to open, is not followed."""
    from pyarrow import BufferReader, parquet

    content = read_bytes(path)
    try:
        file = parquet.ParquetFile(BufferReader(content))
        names = file.schema_arrow.names
        _check_names(str(path), names)
        in_json = [field.name for field in file.schema_arrow if str(field.type) == "extension<arrow.json>"]
        rows: list[dict[str, Any]] = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except DataError:
        raise
    except Exception as e:  # pyarrow raises many kinds, and all of them mean that there are no rows
        raise DataError(f"{path}: cannot be loaded as a parquet file: {_first_line(e)}") from e
    if not rows:
        raise DataError(f"{path}: has no rows")
    for i, row in enumerate(rows, 1):
        for name in in_json:
            if row[name] is not None:
                row[name] = json_value(row[name].encode(), f"{path}, row {i}, column {name:.60}")
    return rows


def _check_names(at: str, names: Sequence[str]) -> None:
    """DataError unless each column has a name of its own."""
    if len(names) > MOST_COLUMNS:
        raise DataError(f"{at}: has {len(names):,} columns; at most {MOST_COLUMNS:,} are read")
    seen: dict[str, int] = {}
    for i, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(f"{at}: column {i} of {len(names)} has no name; each needs one (pandas: index=False)")
        if (first := seen.setdefault(name, i)) != i:
            raise DataError(f"{at}: columns {first} and {i} are both named {name!r:.80}; each needs a name of its own")


def named_columns(row: dict[str, Any], names: Mapping[str, str], at: str) -> dict[str, Any]:
    """Our name -> the value in the column that the recipe names so (``names``: ours -> theirs). Raises DataError."""
    for ours, theirs in names.items():
        if theirs not in row:
            raise DataError(f"{at}: has no column {theirs!r}, which the recipe names as {ours}; found {names_in(row)}")
    return {ours: row[theirs] for ours, theirs in names.items()}
