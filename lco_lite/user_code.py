"""Functions of the user's own, named ``FILE.py:NAME`` in a recipe or on the command line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lco_lite.errors import UsageError


def names_function(text: str) -> bool:
    """Whether ``text`` has the form FILE.py:NAME."""
    file, colon, name = text.rpartition(":")
    return bool(colon) and file.endswith(".py") and name.isidentifier()


@cache
def load_function(spec: str) -> Callable[..., Any]:
    """The function ``FILE.py:NAME``. Raises UsageError where it cannot be had."""
    if not names_function(spec):
        raise UsageError(f"{spec!r} is no FILE.py:NAME")
    file, _, name = spec.rpartition(":")
    found = importlib.util.spec_from_file_location(Path(file).stem, file)
    if found is None or found.loader is None or not Path(file).is_file():
        raise UsageError(f"{file}: no such file")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as e:
        raise UsageError(f"{file}: cannot be imported: {type(e).__name__}: {e}") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{file}: has no function {name!r}")
    return function
