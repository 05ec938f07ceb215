"""One exception tree, mapped to exit statuses at one place (``command.boundary``).

A message says what was found, where, and what is accepted; the user never sees a traceback for a mistake of theirs.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class LcoError(Exception):
    """Failed while running."""

    exit_code = 1


class UsageError(LcoError):
    """Wrong usage, recipe, data, model or checkpoint: something the user can mend."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe or an override of it is not valid; the message names every field."""


class DataError(UsageError):
    """A data source is missing or malformed; the message names file and line."""


class ModelError(UsageError):
    """A model, tokenizer or adapter cannot be used as asked."""


class MemoryExhausted(LcoError):
    """Out of memory on the device; the message names phase, peak and remedies."""

    exit_code = 3


class Diverged(LcoError):
    """A number of the training is not finite, or it collapsed; the last good checkpoint is named."""

    exit_code = 4


class WeightsLost(Diverged):
    """A weight is not finite any more: the stage goes on from its last checkpoint, without the batch that is named."""


class RankLost(LcoError):
    """Another of the processes that share the work has ended."""


class Interrupted(LcoError):
    """Stopped by the user after a checkpoint."""

    exit_code = 130


@contextmanager
def naming(field: str) -> Iterator[None]:
    """A UsageError of the block begins with the recipe's field that it is about, unless it names one of that section
    itself."""
    try:
        yield
    except UsageError as e:
        if str(e).startswith(f"{field.partition('.')[0]}."):
            raise
        raise type(e)(f"{field}: {e}") from e
