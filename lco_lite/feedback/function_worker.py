"""The process behind ``function``: ``[prompts, responses, rows]`` in, the user's rewards or their mistake out."""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from lco_lite.line_worker import serve
from lco_lite.user_code import load_function

Function = Callable[[list[str], list[str], list[dict[str, Any]]], Any]


def answer(function: Function, line: str) -> str:
    """``{"rewards": [...]}``, or ``{"error": text, "row": index or null}``."""
    if not line:
        return "ready"
    prompts, responses, rows = json.loads(line)
    try:
        given = function(prompts, responses, rows)
    except Exception as e:
        return json.dumps({"error": f"{type(e).__name__}: {e}", "row": _culprit(function, prompts, responses, rows)})
    try:
        values = list(given)
    except TypeError:
        return json.dumps({"error": f"a list of numbers is needed, not {given!r:.80}", "row": None})
    if len(values) != len(responses):
        return json.dumps({"error": f"{len(values)} rewards for {len(responses)} responses", "row": None})
    for i, value in enumerate(values):
        try:
            values[i] = float(value)
        except (TypeError, ValueError):
            return json.dumps({"error": f"the reward is {value!r:.80}, not a number", "row": i})
        if not math.isfinite(values[i]):
            return json.dumps({"error": f"the reward is {value!r}; it must be finite", "row": i})
    return json.dumps({"rewards": values})


def _culprit(function: Function, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> int | None:
    """The first row on which the function fails alone as well."""
    for i in range(len(responses)):
        try:
            function(prompts[i : i + 1], responses[i : i + 1], rows[i : i + 1])
        except Exception:
            return i
    return None


if __name__ == "__main__":
    serve(lambda: partial(answer, load_function(sys.argv[1])))
