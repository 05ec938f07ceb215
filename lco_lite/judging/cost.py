"""What judging costs, before it starts, and who has agreed to that."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lco_lite.errors import UsageError
from lco_lite.recipe import Eval


@dataclass(frozen=True)
class Estimate:
    """``requests`` still to be sent, with their tokens, and dollars where prices are known; ``known`` from before."""

    requests: int
    known: int
    tokens_in: int
    tokens_out: int
    dollars: float | None

    @classmethod
    def of(
        cls, requests: int, known: int, tokens_in: int, tokens_out: int, price: tuple[float, float] | None
    ) -> Estimate:
        """``price``: dollars a million tokens, in and out."""
        dollars = None if price is None else (tokens_in * price[0] + tokens_out * price[1]) / 1e6
        return cls(requests, known, tokens_in, tokens_out, dollars)

    def times(self, n: int) -> Estimate:
        """Of ``n`` passes like this one."""
        dollars = None if self.dollars is None else n * self.dollars
        return replace(
            self,
            requests=n * self.requests,
            tokens_in=n * self.tokens_in,
            tokens_out=n * self.tokens_out,
            dollars=dollars,
        )

    def __str__(self) -> str:
        known = f" ({self.known:,} more are known from before)" if self.known else ""
        cost = "" if self.dollars is None else f", about ${self.dollars:.2f}"
        return (
            f"{self.requests:,} requests{known}, about {self.tokens_in:,} tokens in and {self.tokens_out:,} out{cost}"
        )


def tokens_of(*texts: str) -> int:
    """About how many these are: a token is taken as four characters."""
    return math.ceil(sum(map(len, texts)) / 4)


def refuse_unconfirmed(cost: Estimate, settings: Eval) -> None:
    """Raises UsageError where one pass takes more than ``judge_limit`` requests and nobody has said yes to that."""
    if cost.requests <= settings.judge_limit or settings.judge_confirmed:
        return
    passes = 1 if settings.temperature == 0 else settings.seeds
    all_of_them = "" if passes == 1 else f"; {passes} passes like this one take {replace(cost.times(passes), known=0)}"
    raise UsageError(
        f"judging this pass takes {cost}{all_of_them}. Without --yes at most {settings.judge_limit} requests a pass "
        "are sent (eval.judge_limit). The responses are kept: the same command with --yes goes on with judging"
    )
