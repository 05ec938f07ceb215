"""Graded responses to numbers: pass@1, pass@k, maj@k, with their spread over seeds and their error over items."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import eq
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat

from lco_lite.errors import DataError
from lco_lite.files import Count, Sha256, checked, damage, read_json, read_jsonl, verify
from lco_lite.grading import Grade, Item

Graded = dict[str, Any]
"""A response and its grade as it stands in a ``.rows.jsonl``; see ``graded``."""
Same = Callable[[str, str], bool]
"""Are two answers, as they were extracted, one?"""


LIKELIHOODS = "held_out-likelihood"
"""What is kept under this name beside the scores is none (evaluation/held_out.py)."""


# the files of a score, field by field: what is believed of them


class MetricKept(BaseModel):
    mean: FiniteFloat
    std: FiniteFloat | None
    stderr: FiniteFloat | None


class SamplingKept(BaseModel):
    temperature: FiniteFloat


class ScoreSettings(BaseModel):
    made_by: str
    sampling: SamplingKept
    protocol: dict[str, Any]
    items: str
    scored_by: dict[str, Any] = {}


class ScoreKept(MetricKept):
    task: str
    stage: str
    metric: Annotated[str, Field(max_length=200)]
    metrics: dict[str, MetricKept]
    n: Annotated[int, Field(ge=1, le=10_000_000)]
    seeds: Annotated[Count, Field(ge=1)]
    truncated: FiniteFloat = 0.0
    own: bool = False
    settings: ScoreSettings
    rows_sha256: Sha256 = ""


class ResponseKept(BaseModel):
    """``score``: of a task that is not right or wrong, None where it could not be had."""

    id: str
    seed: int
    sample: Count
    right: bool
    gold: str
    extracted: str | None
    response: str
    score: FiniteFloat | None = None


class LikelihoodsKept(BaseModel):
    stage: str
    settings: dict[str, str]
    loss: FiniteFloat = 0.0
    margin: FiniteFloat = 0.0
    demonstrations: Count = 0
    pairs: Count = 0


def graded(item: Item, response: str, grade: Grade, truncated: bool) -> Graded:
    asked = {"id": item.id, "prompt": item.prompt, "response": response, "extracted": grade.extracted}
    return asked | {"gold": item.gold, "right": grade.right, "why": grade.why, "truncated": truncated}


def read_score(file: Path, kind: type[BaseModel] = ScoreKept) -> dict[str, Any]:
    """A score, or the likelihoods, as they lie on disk. DataError where they are damaged."""
    result: dict[str, Any] = read_json(file, kind, "Delete it: eval makes it again")
    if not file.stem.endswith(f"--{result['stage']}"):
        raise DataError(f"{file}: damaged: stage: found {result['stage']!r:.60}, it should be as the file's name says")
    return result


def score_files(run: Path) -> list[Path]:
    return sorted(f for f in (run / "eval").glob("*--*.json") if not f.name.startswith(f"{LIKELIHOODS}--"))


def read_scores(run: Path) -> dict[Path, dict[str, Any]]:
    """All scores of a run by file."""
    return {file: read_score(file) for file in score_files(run)}


def read_rows(file: Path, result: Mapping[str, Any]) -> list[Graded]:
    """The responses that the score ``result`` in ``file`` was made of. DataError where those beside it are others, or
    damaged; scores of earlier versions do not say which they were."""
    rows, remedy = file.with_suffix(".rows.jsonl"), f"Put it back, or delete {file}: eval makes both again"
    if "rows_sha256" in result:
        verify(rows.parent, {rows.name: result["rows_sha256"]}, remedy)
    with damage(rows, remedy):
        read = read_jsonl(rows)
    for i, row in enumerate(read, 1):
        with damage(f"{rows}, line {i}", remedy):
            checked(row, ResponseKept)
    if (items := len({row["id"] for row in read})) > result["n"]:
        raise DataError(f"{rows}: damaged: found {items} items, {file} is of {result['n']}. {remedy}")
    return read


def pass_at(k: int, n: int, right: int) -> float:
    """The chance that one of ``k`` responses, drawn without return from ``n`` of which ``right`` are right, is right:
    1 - C(n - right, k) / C(n, k), unbiased for pass@k (Chen et al. 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_right(responses: Sequence[Graded], same: Same = eq) -> bool:
    """Whether the answer most responses give is right; of several, that seen first; no answer is no vote. Answers are
    one where they are the ``same``."""
    votes: list[list[Graded]] = []
    for r in responses:
        if r["extracted"] is not None:
            agreed = next((v for v in votes if v[0]["extracted"] == r["extracted"]), None)
            agreed = agreed or next((v for v in votes if same(r["extracted"], v[0]["extracted"])), None)
            if agreed is None:
                votes.append([r])
            else:
                agreed.append(r)
    return any(r["right"] for r in max(votes, key=len, default=[]))  # max takes the first of equals


def item_scores(responses: Sequence[Graded], samples: int, same: Same = eq) -> dict[str, list[float]]:
    """Metric -> one value an item, in the order of the items; ``responses`` of one pass, an item's samples together."""
    groups = [responses[i : i + samples] for i in range(0, len(responses), samples)]
    right = [sum(bool(r["right"]) for r in group) for group in groups]
    scores = {"pass@1": [c / samples for c in right]}
    if samples > 1:
        powers = (2**i for i in range(1, samples.bit_length()))
        for k in [*(k for k in powers if k < samples), samples]:
            scores[f"pass@{k}"] = [pass_at(k, samples, c) for c in right]
        if all(r["extracted"] is not None for r in responses if r["right"]):  # else its grader takes no answer out
            scores[f"maj@{samples}"] = [float(majority_right(group, same)) for group in groups]
    return scores


def summarise(passes: Sequence[Sequence[Graded]], n: int, samples: int = 1, same: Same = eq) -> dict[str, Any]:
    """Over ``n`` items, of which those without a response count as wrong. For every metric, mean over seeds; std: the
    sample deviation over seeds (None for one); stderr: over items, of their mean over seeds (None for one item)."""
    scores = [item_scores(responses, samples, same) for responses in passes]
    metrics = {}
    for name in [name for name in scores[0] if all(name in one for one in scores)]:
        metrics[name] = over_items([[*one[name], *[0.0] * (n - len(one[name]))] for one in scores])
    truncated = statistics.fmean(float(r["truncated"]) for responses in passes for r in responses)
    return main_first(metrics) | {"n": n, "seeds": len(passes), "samples": samples, "truncated": truncated}


def over_items(values: Sequence[Sequence[float | None]]) -> dict[str, float | None]:
    """``values``: pass by pass, a number an item in the same order, or None where an item has none."""
    by_item = [statistics.fmean(known) for item in zip(*values, strict=True) if (known := _known(item))]
    stderr = statistics.stdev(by_item) / math.sqrt(len(by_item)) if len(by_item) > 1 else None
    return spread([statistics.fmean(_known(one)) for one in values], stderr)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def spread(values: Sequence[float], stderr: float | None = None) -> dict[str, float | None]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "stderr": stderr}


def main_first(metrics: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    """The first metric is the main one, whose numbers stand in the result itself."""
    main = next(iter(metrics))
    return {"metric": main, **metrics[main], "metrics": metrics}
