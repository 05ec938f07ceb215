"""Win rates of one pass over AlpacaEval's instructions, by a judge behind an API or by the ``alpaca-eval`` package.

The length-controlled win rate is the package's own (Dubois et al. 2024, AlpacaEval 2), whoever judges: its model is
fitted with its table of instructions' difficulties and of answers that were told to be short or long.
"""

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lco_lite.console import Console
from lco_lite.errors import LcoError, UsageError
from lco_lite.files import write_text
from lco_lite.judging.judge import ChatClient, Comparison, Estimate, Judge, refuse_unconfirmed, tokens_of
from lco_lite.judging.keys import judge_key
from lco_lite.recipe import Eval

PACKAGE, ANNOTATOR = "alpaca-eval", "weighted_alpaca_eval_gpt4_turbo"
TABLE = "df_gamed.csv of the hub set tatsu-lab/alpaca_eval"
_PACKAGE_PROMPT = 250  # tokens of what the package asks about the texts

Row = Mapping[str, Any]
Lines: TypeAlias = list[dict[str, Any]]
"""What ``judged.jsonl`` says of each row: ``score`` in [0, 1], None where the package has no verdict."""


def check_judge(settings: Eval, n: int, passes: int, console: Console) -> None:
    """What can be said before there is a response. UsageError: the package or the key is absent, or may not be sent."""
    by_package = settings.judge_url == PACKAGE
    if by_package:
        if importlib.util.find_spec("alpaca_eval") is None:
            raise UsageError(f"--judge-url {PACKAGE} needs that package: pip install 'lco-lite[alpaca]'")
        if settings.confirmed_key is not None:
            raise UsageError(f"--judge-key: {PACKAGE} reads OPENAI_API_KEY itself, for its own annotators alone")
        annotator = settings.judge_model or ANNOTATOR
        if not re.fullmatch(r"\w[\w.-]*", annotator) or Path(annotator).exists():  # a folder may name any host
            raise UsageError(f"eval.judge_model: {annotator!r} is no annotator of the package {PACKAGE}, but a path")
    else:
        judge_key(settings)
    requests = n if by_package else 2 * n
    if requests > settings.judge_limit and not settings.judge_confirmed:
        console.warn(
            f"judging takes up to {requests:,} requests a pass ({passes}), and without --yes no more than "
            f"{settings.judge_limit} are sent; the responses will be kept"
        )


def win_rates(
    rows: Sequence[Row],
    outputs: Sequence[dict[str, str]],
    settings: Eval,
    folder: Path,
    console: Console,
    places: Sequence[int] | None,
) -> dict[str, Any]:
    """``win_rate`` and ``lc_win_rate`` in [0, 1], a number a row; of a judge also shares of its verdicts.

    ``rows`` have the reference in ``row``, ``outputs`` are theirs in AlpacaEval's format, and ``places`` are those of
    the instructions in its list; without them there is no length control. Where the package cannot do it, it is None.
    """
    judged = _by_package if settings.judge_url == PACKAGE else _by_judge
    lines, shares = judged(rows, outputs, settings, folder, console)
    write_text(folder / "judged.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    metrics: dict[str, Any] = {"win_rate": [line["score"] for line in lines]}
    if places is None:
        console.warn("these are not AlpacaEval's 805 instructions in its order: no length-controlled win rate")
    else:
        metrics["lc_win_rate"] = length_controlled(metrics["win_rate"], rows, outputs, places, console)
    return metrics | shares


def length_controlled(
    scores: Sequence[float | None],
    rows: Sequence[Row],
    outputs: Sequence[dict[str, str]],
    places: Sequence[int],
    console: Console,
) -> list[float] | None:
    """The package's ``glm_preference`` in [0, 1]: how likely each answer would win at the reference's length.

    Its mean is the package's ``length_controlled_winrate``, its standard error over items ``lc_standard_error``. None,
    with a warning, where the package or its table is not to be had or its fit fails.
    """
    try:
        import pandas
        from alpaca_eval.metrics import get_length_controlled_winrate

        annotations = pandas.DataFrame(
            {
                "preference": [math.nan if score is None else 1 + score for score in scores],
                "output_1": [row["row"]["output"] for row in rows],
                "output_2": [o["output"] for o in outputs],
                "generator_1": "reference",
                "generator_2": "policy",
            },
            index=list(places),
        )
        get_length_controlled_winrate(annotations, save_weights_dir=None)  # else it writes into its own installation
        return [float(p) for p in annotations["glm_preference"]]
    except Exception as e:  # not installed, offline, too few rows: many kinds, one meaning
        console.warn(
            f"no length-controlled win rate ({type(e).__name__}: {' '.join(str(e).split())[:200]}). It takes the "
            f"package (pip install 'lco-lite[alpaca]') and, once, its table {TABLE}; the same command tries again, and "
            "nothing is judged twice"
        )
        return None


def _by_judge(
    rows: Sequence[Row], outputs: Sequence[dict[str, str]], settings: Eval, folder: Path, console: Console
) -> tuple[Lines, dict[str, float]]:
    assert settings.judge_url is not None
    judge = Judge(ChatClient(settings.judge_url, judge_key(settings)), settings, folder.parent / "judge.jsonl")
    pairs = zip(outputs, rows, strict=True)
    compared = [Comparison(o["instruction"], o["output"], row["row"]["output"]) for o, row in pairs]
    cost = judge.estimate(compared)
    console.note(f"{settings.judge_model} judges {len(compared)} pairs in both orders: {cost}")
    refuse_unconfirmed(cost, settings)
    judgements = judge.scores(compared, console)
    lines = [{"id": row["id"], **one._asdict()} for row, one in zip(rows, judgements, strict=True)]
    n, off_point = len(judgements), sum(one.off_point for one in judgements)
    if off_point:
        console.warn(f"{off_point} of {2 * n} verdicts were neither A, B nor tie, and count as ties")
    agree = sum(one.in_order[0] == one.in_order[1] for one in judgements)
    return lines, {"orders_agree": agree / n, "off_point": off_point / (2 * n)}


def _by_package(
    rows: Sequence[Row], outputs: Sequence[dict[str, str]], settings: Eval, folder: Path, console: Console
) -> tuple[Lines, dict[str, float]]:
    """The package's annotations and its cache go to ``folder``. Raises LcoError where it fails."""
    references = [dict(row["row"]) for row in rows]
    texts = [(o["instruction"], o["output"], r["output"]) for o, r in zip(outputs, references, strict=True)]
    tokens_in = sum(_PACKAGE_PROMPT + tokens_of(*three) for three in texts)
    cost = Estimate(len(rows), 0, tokens_in, len(rows), settings.judge_price)
    console.note(f"{PACKAGE} judges {len(rows)} pairs: {cost}")
    refuse_unconfirmed(cost, settings)
    try:
        import alpaca_eval

        _, annotations = alpaca_eval.evaluate(
            model_outputs=list(outputs),
            reference_outputs=references,
            annotators_config=settings.judge_model or ANNOTATOR,
            name=outputs[0]["generator"],
            output_path=str(folder),
            precomputed_leaderboard=None,
            is_cache_leaderboard=False,
            is_return_instead_of_print=True,
            fn_metric="get_winrate",  # length control comes after: what is judged is kept without it
            sort_by="win_rate",
            caching_path=str(folder / "alpaca-eval-cache.json"),
        )
    except Exception as e:  # its annotators raise what their clients raise
        raise LcoError(f"{PACKAGE} failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
    preferences = {one["instruction"]: one["preference"] for one in annotations}
    lines = [{"id": row["id"], "score": _score(preferences.get(row["row"]["instruction"]))} for row in rows]
    if unjudged := sum(line["score"] is None for line in lines):
        if unjudged == len(lines):
            raise LcoError(f"{PACKAGE} failed: none of its {unjudged} annotations has a preference; see {folder}")
        console.warn(f"{unjudged} of {len(lines)} pairs have no verdict of {PACKAGE}, and are left out as it does")
    return lines, {}


def _score(preference: float | None) -> float | None:
    """The package's preference, 1 the reference's to 2 ours, as a share; 0 is a draw in its older annotations."""
    if preference is None or math.isnan(preference):
        return None
    return 0.5 if preference == 0 else float(preference) - 1
