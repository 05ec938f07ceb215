"""Is a base on this machine what it was? A sum over the files that decide what a model says."""

import hashlib
import json
from pathlib import Path

from lco_lite.errors import DataError
from lco_lite.files import is_there, sha256
from lco_lite.recipe.sections import Weights

# in a model's folder; a GGUF file that counts is named by itself
_DECIDES: tuple[str, ...] = (
    "*config.json",
    "*token*.json",
    "tekken.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
)
_DECIDES += ("*.jinja", "additional_chat_templates/*.jinja", "*.safetensors", "*.safetensors.index.json")
_BLOCKS, _BLOCK = 64, 2**16


def fingerprint(model: Path) -> str:
    """sha256 over all that decides what a model says: of a folder the configs, tokenizer, chat templates, code, weights
    or adapter, by name and content; or of one file. Where it lies and when it was written does not count.

    Weights of more than 4 MiB count by their size and 64 blocks of 64 KiB, spread evenly from the first byte to the
    last, which takes no time with many GB: other training is seen, a few numbers that differ between the blocks are
    not. DataError where a file cannot be read.
    """
    folder = model.is_dir()
    files = {file for pattern in _DECIDES for file in model.glob(pattern) if file.is_file()} if folder else {model}
    sums = {file.relative_to(model).as_posix() if folder else "": _content(file) for file in files}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def known_by(path: str) -> str:
    """A model of others by its name and, where it lies on this machine, by what is in it too."""
    return f"{path} {fingerprint(Path(path))[:16]}" if is_there(Path(path)) else path


def _content(file: Path) -> str:
    """sha256 of a file, or of a sample of it where it is weights and large."""
    try:
        size = file.stat().st_size
        if size <= _BLOCKS * _BLOCK or file.suffix not in (".safetensors", ".gguf"):
            return sha256(file)
        digest = hashlib.sha256(str(size).encode())
        with file.open("rb") as content:
            for i in range(_BLOCKS):
                content.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(content.read(_BLOCK))
        return digest.hexdigest()
    except OSError as e:
        raise DataError(f"{file}: cannot be read: {e.strerror or e}") from e


def local_base(weights: Weights) -> Path | None:
    """The folder or GGUF file on this machine that a base is read from; None of another, and of one that is gone."""
    if weights.path is None:
        return None
    place = Path(weights.path) / (weights.gguf_file or "")
    return place if is_there(place) else None
