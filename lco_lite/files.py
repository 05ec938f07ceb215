"""Files and folders written whole: under a temporary name, flushed to the disk, then renamed.

A process killed at any instant leaves the old content or the new, never half of one; what it leaves under temporary
names is dealt with by ``recover`` when the run is opened again. Failures of the disk become one message with the path.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from lco_lite import ranks
from lco_lite.errors import DataError, LcoError, UsageError
from lco_lite.visible import CONTROLS

# .NAME.TOKEN.new is being written, .old stepped aside to be replaced, .gone is on its way out
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{12}\.(?P<kind>new|old|gone)$")
_CONTROL = re.compile(f"[{CONTROLS}]")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
# a file where a folder should be or the other way round, a name too long, or a folder where none can be made
_NO_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT)
MOST_NESTED = 100  # levels of a JSON value
# the types of fields in files that this package writes
Count = Annotated[int, Field(ge=0, lt=2**31)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Sums = dict[Annotated[str, Field(max_length=1000)], Sha256]  # by path in a folder
_held: dict[Path, tuple[Path, os.stat_result]] = {}  # folder -> what lies in it while it is held


@contextmanager
def held(folder: Path, witness: Path) -> Iterator[None]:
    """While it is open, nothing is written below ``folder`` once it was deleted or moved: ``witness``, a file in it
    that is kept open, is then no longer there. See ``still_there``."""
    _held[folder] = witness, witness.stat()
    try:
        yield
    finally:
        del _held[folder]


def still_there(path: Path) -> None:
    """LcoError where the held folder that ``path`` is in, or is, was deleted or moved since."""
    for folder, (witness, was) in _held.items():
        if folder == path or folder in path.parents:
            try:
                there = os.path.samestat(witness.stat(), was)
            except OSError:
                there = False
            if not there:
                gone = f"{folder} was deleted or moved while this process worked in it: nothing more is written"
                raise LcoError(f"{gone}. The same command starts again, or goes on once the folder is back.")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """A full disk or one that fails (LcoError), or a place that cannot be written (UsageError), becomes a message that
    names ``path``; so does a device or a pipe, which is not replaced, and a path that leads back out of a folder which
    is not there: what it names is looked for before the folder is made, and would be replaced unseen."""
    still_there(path)
    if any(part == ".." and not is_there(Path(*path.parts[:i])) for i, part in enumerate(path.parts)):
        raise UsageError(f"{path} leads through a folder that is not there, and back by ..: name the place itself")
    if is_there(path) and not (path.is_file() or path.is_dir()):
        raise UsageError(f"{path} is a device or a pipe, and would be replaced: name another file")
    try:
        yield
    except Exception as e:
        still_there(path)
        number = e.errno if isinstance(e, OSError) else None
        # safetensors writes from Rust and raises an error type of its own, without a number
        if number in _DISK_FULL or (number is None and "No space left on device" in str(e)):
            place = next(p for p in (path, *path.resolve().parents) if p.exists())
            raise LcoError(
                f"disk is full: {shutil.disk_usage(place).free / 2**20:.0f} MiB free under {path.parent}; nothing was "
                "lost. Make room and start again."
            ) from e
        if isinstance(e, OSError) and number in (*_NO_PERMISSION, *_NO_PLACE) and _concerns(e, path):
            why = "permission denied" if number in (errno.EACCES, errno.EPERM) else e.strerror
            what = "no permission to write" if number in _NO_PERMISSION else "cannot write"
            raise UsageError(f"{what} {path}: {why}. Choose another place with --runs DIR.") from e
        if (isinstance(e, OSError) and number and _concerns(e, path)) or re.search("I/O error|IoError", str(e)):
            raise LcoError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; nothing was lost") from e
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data``, whole or not at all; of a link, what it leads to. Who may read it stays. Raises
    LcoError or UsageError as ``write_errors`` does."""
    with write_errors(path):
        path = path.resolve() if path.is_symlink() else path
        temporary = _temporary(path, "new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_through(temporary, "wb", data)
            if path.is_file():
                temporary.chmod(path.stat().st_mode & 0o777)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in UTF-8 with ``\\n`` line ends, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replaces ``path`` by ``value`` as indented JSON, whole or not at all. NaN and infinities raise ValueError."""
    write_text(path, json_text(value, indent=2) + "\n")


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path``. When the block ends well it replaces ``path``, else it is removed."""
    temporary, old = _temporary(path, "new"), _temporary(path, "old")
    with write_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _sync_tree(temporary)
            if path.exists():  # a full folder cannot be renamed onto: it steps aside, and ``recover`` knows why
                os.replace(path, old)
            os.replace(temporary, path)
            _sync_folder(path.parent)
            _delete(old)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@ranks.by_main
def remove(path: Path) -> None:
    """Deletes a file or folder so that a kill half-way leaves no half of it under its name. Absent: nothing to do."""
    if not path.exists():
        return
    gone = _temporary(path, "gone")
    with write_errors(path):
        os.replace(path, gone)
        _delete(gone)


def recover(root: Path) -> None:
    """Cleans up after killed writers below ``root``; call it only while no one else writes there.

    A folder that was moved aside and never replaced comes back; everything else under a temporary name is deleted.
    """
    for folder, names, files in os.walk(root, topdown=False):
        for name in sorted(names + files):
            if match := _TEMPORARY.match(name):
                left_over, original = Path(folder, name), Path(folder, match["name"])
                with write_errors(original):
                    if match["kind"] == "old" and not original.exists():
                        os.replace(left_over, original)
                    else:
                        _delete(left_over)


def sha256(file: Path) -> str:
    """Of the file's bytes, which are never in memory as a whole."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def checksums(folder: Path, *left_out: str) -> dict[str, str]:
    """sha256 of every file below ``folder`` by its path there, without what lies in the folders ``left_out``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in files}
    sums = {name.as_posix(): sha256(path) for path, name in names.items() if name.parts[0] not in left_out}
    _VERIFIED.update(_state(folder / name, found) for name, found in sums.items())
    return sums


def verify(folder: Path, sums: Mapping[str, str], remedy: str) -> None:
    """Raises DataError with the first file below ``folder`` that is missing, or not what ``sums`` say was written. A
    file that was read by this process and has not changed since is not read again."""
    for name, expected in sums.items():
        file = folder / name
        if not os.path.isfile(file):  # a name that is too long is no file's
            raise DataError(f"{file}: is missing, which this run has made. {remedy}")
        if _state(file, expected) in _VERIFIED:
            continue
        if (found := sha256(file)) != expected:
            raise DataError(
                f"{file}: has changed since this run made it: sha256 {found[:12]}…, it was {expected[:12]}…. {remedy}"
            )
        _VERIFIED.add(_state(file, expected))


def _state(file: Path, digest: str) -> tuple[str, int, int, int, str]:
    about = file.stat()
    return str(file.absolute()), about.st_size, about.st_mtime_ns, about.st_ino, digest


def seal(folder: Path) -> None:
    """Notes the checksums of what is in ``folder`` now, beside it, for ``verify_sealed``."""
    write_json(folder / _SEAL, checksums(folder))


def verify_sealed(folder: Path, remedy: str) -> None:
    """``verify`` by what ``seal`` noted; a folder without a seal passes."""
    if not (noted := folder / _SEAL).exists():
        return
    verify(folder, read_json(noted, Sums, remedy), remedy)


_SEAL = "sha256.json"
_VERIFIED: set[tuple[str, int, int, int, str]] = set()


def _temporary(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.{kind}"


def _write_through(path: Path, mode: str, data: bytes) -> None:
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            with open(os.path.join(folder, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut. Windows has no handle to a folder and orders its renames itself."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _concerns(error: OSError, path: Path) -> bool:
    """Whether an error is about ``path`` and not about something that a block only reads."""
    if not isinstance(error.filename, (str, Path)):
        return True
    named, folder = Path(error.filename).absolute(), path.absolute().parent
    return named.is_relative_to(folder) or folder.is_relative_to(named)


def is_there(path: Path) -> bool:
    """Whether there is a file or folder of this name. A name that is too long, or is no text, is none's."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def not_there(path: str | Path) -> str:
    """That there is no such file, and for a path from the working folder which that is."""
    return "no such file" if Path(path).is_absolute() else f"no such file in {Path.cwd()}"


def read_bytes(path: str | Path) -> bytes:
    """All of the file but a mark of its byte order. DataError where it is missing, no file or cannot be read."""
    try:
        mode = Path(path).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # it may never say anything, or never end
            raise DataError(f"{path}: is a pipe or a device; a file is needed")
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        raise DataError(f"{path}: {not_there(path)}") from None
    except (OSError, ValueError) as e:  # ValueError: a name with NUL or half of a surrogate pair
        raise DataError(f"{path!s:.200}: cannot be read: {getattr(e, 'strerror', None) or e}") from e


def read_text(path: str | Path) -> str:
    """The file as UTF-8. DataError where it is missing, cannot be read or is none."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 (byte {e.start + 1})") from e


def read_json(path: str | Path, kind: Any, remedy: str) -> Any:
    """What a JSON file says that this package wrote. DataError with ``remedy`` where it cannot be read, or its fields
    are not of ``kind``, a type that pydantic knows; fields that the type does not name may stand beside them."""
    with damage(path, remedy):
        return checked(json_value(read_bytes(path), str(path)), kind)


def checked(value: Any, kind: Any) -> Any:
    """The value itself, of a type that pydantic knows, and without conversion. ValidationError where it is not."""
    _validator(kind).validate_python(value, strict=True)
    return value


_validator = cache(TypeAdapter)


@contextmanager
def damage(at: str | Path, remedy: str) -> Iterator[None]:
    """A DataError, or a value that is not of its type, becomes one DataError: where, what was found and is accepted,
    and what to do."""
    try:
        yield
    except DataError as e:
        raise DataError(f"{at}: damaged: {str(e).removeprefix(str(at)).lstrip(' :,')}. {remedy}") from e
    except ValidationError as e:
        raise DataError(f"{at}: damaged: {_first(e)}. {remedy}") from e


def _first(error: ValidationError) -> str:
    """The first of what is wrong, in words."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])[:100]
    if first["type"] == "missing":
        return f"{field} is missing"
    wanted = "be an object" if first["type"] == "model_type" else first["msg"].partition(" should ")[2]
    return f"{field}{': ' * bool(field)}found {first['input']!r:.60}, it should {wanted}"


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All objects in the order of the file: object i stands in line i + 1. Only at the end may lines be empty.

    Raises DataError for a file that is missing, unreadable or empty, and for a line that is no JSON object in UTF-8.
    """
    # Only \n ends a line here: str.splitlines would also split at characters that JSON strings may hold.
    lines = read_bytes(path).rstrip().split(b"\n")
    if lines == [b""]:
        raise DataError(f"{path}: is empty; one JSON object a line is expected")
    return [_json_object(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]


def _json_object(line: bytes, at: str) -> dict[str, Any]:
    if not line.strip():
        raise DataError(f"{at}: is empty; one JSON object a line is expected")
    value = json_value(line, at)
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise DataError(f"{at}: is {kind}, not an object with named fields")
    return value


def json_value(content: bytes, at: str) -> Any:
    """What the JSON in UTF-8 says. Raises DataError, which begins with ``at``, for anything else, for text that is
    none, and for an object with a field twice."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_each_once)
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode()
        if content.count(b"[") + content.count(b"{") > MOST_NESTED:
            _refuse_deep(value)
    except UnicodeDecodeError as e:
        raise DataError(f"{at}: is not UTF-8 (byte {e.start + 1})") from e
    except UnicodeEncodeError as e:
        raise DataError(f"{at}: has half of a surrogate pair, \\u{ord(e.object[e.start]):04x}, which is no text") from e
    except RecursionError as e:
        raise DataError(f"{at}: is not JSON: nested too deeply") from e
    except json.JSONDecodeError as e:
        where = f"line {e.lineno}, column {e.colno}" if e.lineno > 1 else f"column {e.colno}"
        raise DataError(f"{at}: is not JSON: {e.msg} at {where}") from e
    except ValueError as e:
        raise DataError(f"{at}: {str(e).partition('; use sys.')[0]}") from e
    return value


def _each_once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields. ValueError where a name stands twice: json would take the last in silence."""
    found = dict(fields)
    if len(found) < len(fields):
        twice = Counter(name for name, _ in fields).most_common(1)[0][0]
        raise ValueError(f"the field {twice[:60]!r} stands twice")
    return found


def _refuse_deep(value: Any) -> None:
    """RecursionError, as of what is deeper yet, for a value that functions which call themselves would fail at."""
    level = [value]
    for _ in range(MOST_NESTED):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [one for values in inner for one in values]
    if level:
        raise RecursionError


class JsonLines:
    """JSON objects in a file, one a line, each sealed. A line is on the disk when ``append`` returns.

    ``rows`` holds them all. Of a file that is there already these are the whole lines: a last one that a kill cut short
    is removed. Raises LcoError on a full disk, UsageError without permission, DataError for a file that holds anything
    else or that was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows, self._seal = self._whole_lines()

    def append(self, row: dict[str, Any]) -> None:
        self._write(row)
        self.rows.append(row)

    @ranks.once
    def _whole_lines(self) -> tuple[list[dict[str, Any]], str | None]:
        content = read_bytes(self.path) if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_bytes(self.path, whole)
        return read_sealed_lines(self.path) if whole else ([], "")

    @ranks.by_main
    def _write(self, row: dict[str, Any]) -> None:
        line, seal = (json_line(row), None) if self._seal is None else sealed_line(row, self._seal)
        with write_errors(self.path):
            if self.path.exists() and self.path.stat().st_nlink > 1:  # another run's, too, which goes on by itself
                write_bytes(self.path, self.path.read_bytes())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write_through(self.path, "ab", line)
        self._seal = seal


def sealed_line(row: Mapping[str, Any], before: str = "") -> tuple[bytes, str]:
    """A line of JSON with ``row`` and its seal, which holds for the lines before as well: (line, seal)."""
    seal = hashlib.sha256(before.encode() + json_line(row)).hexdigest()[:16]
    return json_line({**row, "seal": seal}), seal


def write_sealed_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """In place of what is there."""
    lines, seal = list[bytes](), ""
    for row in rows:
        line, seal = sealed_line(row, seal)
        lines.append(line)
    write_bytes(path, b"".join(lines))


def read_sealed_lines(
    path: Path, remedy: str = "Put it back as it was, or delete this line and all after it, and they are made again"
) -> tuple[list[dict[str, Any]], str | None]:
    """(what the lines hold, the seal of the last). DataError with ``remedy`` for a line that was changed, or before
    which one is gone. Earlier versions wrote none: where the first line has no seal, none has (seal: None)."""
    with damage(path, remedy):
        rows = read_jsonl(path)
        seal = "" if "seal" in rows[0] else None
        for i, row in enumerate(rows, 1):
            found = row.pop("seal", None)
            if seal is not None:
                try:
                    _, seal = sealed_line(row, seal)
                except ValueError:  # NaN or ∞, which are never written
                    found = None
            if found != seal:
                raise DataError(f"{path}: line {i} is not as it was written")
    return rows, seal


def json_line(value: Mapping[str, Any]) -> bytes:
    """``value`` and a line end in UTF-8, lone surrogates as question marks. ValueError for NaN and infinities."""
    return json_text(value).encode("utf-8", "replace") + b"\n"


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON to be read: letters of every script as they are, but escapes for all that would steer a terminal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return _CONTROL.sub(lambda match: json.dumps(match[0])[1:-1].replace("\x7f", "\\u007f"), text)


def shown_bytes(size: float) -> str:
    for unit, name, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1)):
        if size >= unit:
            return f"{size / unit:.{digits}f} {name}"
    return f"{size / 2**10:.1f} KiB"
