r"""The comparison of the paper's public code: the last box, rewritten by rules, equal as text.

What it costs beside ``grading.math`` can be measured (``eval --grader string``): 0 is never right, nor are words; 0.5
is not ``\frac{1}{2}``.
"""

import re

from lco_lite.grading import Grade, Item

# in this order, on the answer and on gold
_REWRITES = [
    (r" |\\mathbf", ""),
    (r"^[a-z]=", ""),
    (r"\\left|\\right|\\!|\\%|\\\$", ""),
    (r"\\text\{.*\}", ""),  # greedy, with its content
    (r"\^\\circ|\^\{\\circ\}", ""),
    (r"\\\\", r"\\"),
    (r"\\$", ""),
    (r"^0+", ""),
    (r",|\.0+$|\s", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\mbox\{\w*\}", ""),
]


def grade_string(response: str, item: Item) -> Grade:
    answer = _in_box(response)
    right = bool(normalised(answer)) and normalised(answer) == normalised(item.gold)
    return Grade(right, answer or None, "the same text" if right else "not the same text")


def normalised(answer: str) -> str:
    text = answer.lower()
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text


def _in_box(response: str) -> str:
    """What follows the last ``boxed``: up to the brace that closes it or, without one, to a dollar sign or the end."""
    _, found, rest = response.rpartition("boxed")
    if not found or not rest.startswith("{"):
        return rest.partition("$")[0].strip() if found else ""
    depth = 0
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return rest[1:i]
    return rest[1:]
