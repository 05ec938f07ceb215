"""How is a reward function of the user's called? By our signature or TRL's; the names of its parameters say which.

=========================================  =========================================================================
``f(prompts, responses, rows)``            by place: texts, texts, the data rows of the prompts
``f(prompts, completions, **columns)``     TRL's, by name, as many as it takes: ``prompts`` and ``completions`` are
                                           texts or, where the data has turns, messages; ``completion_ids``; and each
                                           column of the data as a list
=========================================  =========================================================================

Either returns a number a response, or None where the reward does not apply.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lco_lite.errors import UsageError

ACCEPTED = "f(prompts, responses, rows) or TRL's f(prompts, completions, **columns)"
RETURNS = "a list with a number for each response is needed, None where the reward does not apply"
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL 1.16 leaves them out
_TRAINERS = ("trainer_state", "log_extra", "log_metric", "environments")  # what only TRL's trainer can hand over
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Adapted:
    """A reward function as one of (prompts, responses, what is known of each), whichever signature it has.

    What is known of a response is a mapping: ``row``, the data row of its prompt; ``lacks``, the columns that only
    other rows of the data have; ``turns``, the prompt's messages where the data has turns, else None; ``ids``, the
    response's tokens. ``named``: parameter -> whether it must be given."""

    function: Callable[..., Any]
    is_trl: bool
    takes_all: bool
    named: Mapping[str, bool] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], known: Sequence[Mapping[str, Any]]) -> Any:
        rows = [one["row"] for one in known]
        if not self.is_trl:
            return self.function(prompts, responses, rows)
        columns = list(dict.fromkeys(name for one in known for name in (*one["row"], *one["lacks"])))
        given: dict[str, Any] = {n: [row.get(n) for row in rows] for n in columns if n not in _NOT_COLUMNS}
        given |= {"prompts": prompts, "completions": responses, "completion_ids": [one["ids"] for one in known]}
        if known and known[0]["turns"] is not None:
            given["prompts"] = [one["turns"] for one in known]
            given["completions"] = [[{"role": "assistant", "content": text}] for text in responses]
        self._refuse_missing([n for n, needed in self.named.items() if needed and n not in given], columns)
        returned = self.function(**{n: v for n, v in given.items() if self.takes_all or n in self.named})
        if inspect.isawaitable(returned):
            import asyncio

            return asyncio.run(_awaited(returned))
        return returned

    def _refuse_missing(self, missing: Sequence[str], columns: Sequence[str]) -> None:
        if trainers := [name for name in missing if name in _TRAINERS]:
            which = ", ".join(trainers)
            raise UsageError(f"it asks for {which}, which only TRL's trainer has; give it a default to go without")
        if missing:
            raise UsageError(f"it asks for {', '.join(missing)}, and the data has the columns {', '.join(columns)}")

    def about(self) -> dict[str, Any]:
        """As JSON: by which signature it is called, and whether it looks at token ids."""
        takes_ids = self.is_trl and (self.takes_all or "completion_ids" in self.named)
        return {
            "signature": "TRL's signature" if self.is_trl else "f(prompts, responses, rows)",
            "takes_ids": takes_ids,
        }


def adapted(function: Callable[..., Any]) -> Adapted:
    """Raises UsageError for a function that takes neither."""
    found = inspect.signature(function)
    named = {n: p.default is p.empty for n, p in found.parameters.items() if p.kind in _BY_NAME}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in found.parameters.values())
    if not {"completions", "completion_ids"} & set(named):
        try:
            found.bind([], [], [])
            return Adapted(function, False, takes_all, named)
        except TypeError:
            if not takes_all:
                raise UsageError(f"takes {found}; accepted: {ACCEPTED}") from None
    return Adapted(function, True, takes_all, named)


async def _awaited(value: Any) -> Any:
    return await value
