"""The studies by name. Nothing heavy is imported before one is asked for."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from lco_lite.errors import UsageError
from lco_lite.study.base import Study

STUDIES = {
    "methods": "MethodsStudy",
    "dynamics": "Dynamics",
    "training": "WholeRun",
    "efficiency": "Efficiency",
    "convexity": "Convexity",
    "forgetting": "Forgetting",
    "feedback": "Feedback",
    "refresh": "Refresh",
    "variants": "Variants",
}


def load_study(name: str) -> Study:
    """Raises UsageError with all names where there is none of this one."""
    if name not in STUDIES:
        near = get_close_matches(name, STUDIES, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UsageError(f"no study {name!r}{hint} There are: {', '.join(STUDIES)}")
    study: Study = getattr(import_module(f"lco_lite.study.{name}"), STUDIES[name])()
    return study
