"""Small choices that papers and code make differently: the public code's five, Adam's ε, the weighting over the
vocabulary, and which way round the KL is.

With the start of RL as φ's reference, as in the quickstart, LCO-KLD with anchor 1 and β 1 fits φ itself by the forward
KL on the policy's own responses; OPD fits it by the reverse one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lco_lite.study.base import FEWEST, Cell, Claim, Findings, Results, Study, Table, Verdict, judged, told
from lco_lite.study.feedback import SPARSE_RATES
from lco_lite.study.methods import METHODS
from lco_lite.study.statistics import mean_std
from lco_lite.study.tuned import Contender, failures, of, rates_tried, tiered

if TYPE_CHECKING:
    from lco_lite.recipe import Recipe

SMALL = 0.02  # a difference in pass@1 that would make one choose; set before the study ran


def like(name: str, **more: Any) -> Contender:
    """As another method here, at its rate, with these fields of ``rl`` besides."""
    method = ALL[name]
    return Contender({**method.sets, **{f"rl.{field}": value for field, value in more.items()}}, tuned_as=name)


ALL: dict[str, Contender] = {"kld": METHODS["kld"], "mse": METHODS["mse"], "lch": METHODS["lch"], "opd": METHODS["opd"]}
ALL["mse, rule"] = Contender(of("mse", feedback="rule"), SPARSE_RATES)
ALL["kld, logprob"] = Contender(of("kld", feedback="logprob"), SPARSE_RATES)
ALL |= {
    "mse, sum": Contender(of("mse", weighting="sum"), SPARSE_RATES),
    "mse, policy": Contender(of("mse", weighting="policy"), SPARSE_RATES),
    "lch, policy": Contender(of("lch", weighting="policy"), SPARSE_RATES),
    "kld, standardised": like("kld", standardise=True),
    "kld, top 5": like("kld", **{"variant.top_k": 5}),
    "mse, current target": like("mse", **{"variant.target": "current"}),
    "mse, rule, negative β": like("mse, rule", **{"variant.negative_beta": 100.0}),
    "kld, logprob, agreement": like("kld, logprob", **{"variant.agreement": -0.02}),
    "mse, rule, ε 1e-8": like("mse, rule", adam_eps=1e-8),
    "kld to φ": like("kld", anchor=1.0),
}
# what is set against what
AGAINST = {
    "kld, top 5": "kld",
    "kld, standardised": "kld",
    "mse, current target": "mse",
    "mse, rule, negative β": "mse, rule",
    "kld, logprob, agreement": "kld, logprob",
    "mse, rule, ε 1e-8": "mse, rule",
    "mse, sum": "mse",
    "mse, policy": "mse",
    "lch, policy": "lch",
    "kld to φ": "opd",
}


class Variants(Study):
    name = "variants"
    asks = "Which small choices matter? (the public code's, Adam's ε, weighting over V, forward or reverse KL)"
    seeds = 4
    labels = tuple(ALL)

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        return tiered([ALL], recipe, seeds, done, self.only)

    def report(self, results: Results) -> Findings:
        claims = [_matters(results, a, b) for a, b in AGAINST.items()]
        rows = []
        for name in ALL:
            if found := results.by_seed(name):
                other = AGAINST.get(name)
                less = told(results.difference(name, other)) if other else None
                rows.append(
                    [name, f"{results.of(name)[0]['lr']:g}", len(found), mean_std(list(found.values())), other, less]
                )
        columns = ["method", "lr", "n", "pass@1", "against", "difference"]
        return Findings(
            claims, [Table("variants", "Scores", columns, rows), rates_tried(results)], (), failures(results)
        )


def _matters(results: Results, a: str, b: str) -> Claim:
    """Reproduced: it matters. Not reproduced: the interval lies within ``SMALL`` of 0."""
    found = results.difference(a, b)
    verdict: Verdict = "unclear"
    if found is not None and found.n >= FEWEST:
        if judged(found) != "unclear":
            verdict = "reproduced"
        elif found.low > -SMALL and found.high < SMALL:
            verdict = "not reproduced"
    threshold = f"the interval of the paired difference leaves out 0; not so where it lies within {SMALL:g} of it."
    return Claim(a, f"{a} differs from {b}.", threshold, verdict, f"Difference {told(found)}.")
