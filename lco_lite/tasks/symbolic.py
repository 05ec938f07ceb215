"""Equality by computer algebra in a process of its own: each comparison ends in time, whatever the LaTeX says."""

import json

from lco_lite.errors import LcoError
from lco_lite.line_worker import LineWorker

SECONDS = 3.0


class Verifier:
    """One worker process and the lock that callers share."""

    def __init__(self) -> None:
        self._worker = LineWorker("lco_lite.tasks.symbolic_worker")

    def equal(self, answer: str, gold: str, tolerance: float = 0.0) -> bool | None:
        """Is ``answer`` mathematically equal to ``gold`` (LaTeX without dollar signs)? None if it could not be told.

        With a ``tolerance``, values that differ by no more than that part of gold's count as equal.
        """
        if self._worker.greet() is None:
            raise LcoError("the process that compares formulas does not start; is math-verify installed?")
        line = self._worker.ask(json.dumps([answer, gold, tolerance]), SECONDS)
        return None if line is None else bool(json.loads(line))

    def close(self) -> None:
        """Ends the worker process; the next comparison starts another."""
        self._worker.close()


_verifier = Verifier()
equal = _verifier.equal
