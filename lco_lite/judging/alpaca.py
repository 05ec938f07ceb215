"""Win rates of one pass over AlpacaEval's instructions, by a judge behind an API or by the ``alpaca-eval`` package."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lco_lite.errors import UsageError
from lco_lite.files import write_text
from lco_lite.judging import alpaca_package
from lco_lite.judging.chat_api import ChatClient
from lco_lite.judging.cost import Estimate, refuse_unconfirmed, tokens_of
from lco_lite.judging.length_control import length_controlled
from lco_lite.judging.pairwise import Answers, Judge, Judgement, Pair
from lco_lite.recipe import Eval
from lco_lite.telemetry.console import Console

KEY_VARIABLE = "OPENAI_API_KEY"
_PACKAGE_PROMPT = 250  # tokens of what the package asks about the texts
_FEW = 0.05
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")

Row = Mapping[str, Any]


def check_judge(settings: Eval, n: int, passes: int, console: Console) -> None:
    """What can be said before there is a response. UsageError: the package or the key is absent."""
    by_package = settings.judge_url == alpaca_package.NAME
    if by_package:
        alpaca_package.need_package()
    else:
        judge_key(settings)
    requests = n if by_package else 2 * n
    if requests > settings.judge_limit and not settings.judge_confirmed:
        console.warn(
            f"judging takes up to {requests:,} requests a pass ({passes}), and without --yes no more than "
            f"{settings.judge_limit} are sent; the responses will be kept"
        )


def win_rates(
    rows: Sequence[Row], outputs: Sequence[dict[str, str]], settings: Eval, folder: Path, console: Console
) -> dict[str, float]:
    """``rows`` have the reference in ``row``, ``outputs`` are theirs in AlpacaEval's format. Shares in [0, 1]."""
    judged = _by_package if settings.judge_url == alpaca_package.NAME else _by_judge
    return judged(rows, outputs, settings, folder, console)


def judge_key(settings: Eval) -> str | None:
    """The API's key. Where no variable is named, OpenAI's goes to https and to this machine only, if it is set.

    Raises UsageError where a variable is named and not set.
    """
    named = settings.judge_key_variable
    if named is not None:
        if not os.environ.get(named):
            raise UsageError(f"eval.judge_key_variable: the environment variable {named} is not set")
        return os.environ[named]
    parts = urlsplit(settings.judge_url or "")
    private = parts.scheme == "https" or parts.hostname in _THIS_MACHINE
    return os.environ.get(KEY_VARIABLE) if private else None


def _by_judge(
    rows: Sequence[Row], outputs: Sequence[dict[str, str]], settings: Eval, folder: Path, console: Console
) -> dict[str, float]:
    assert settings.judge_url is not None
    judge = Judge(ChatClient(settings.judge_url, judge_key(settings)), settings, Answers(folder.parent / "judge.jsonl"))
    pairs = [Pair(o["instruction"], o["output"], r["row"]["output"]) for o, r in zip(outputs, rows, strict=True)]
    cost = judge.estimate(pairs)
    console.note(f"{settings.judge_model} judges {len(pairs)} pairs in both orders: {cost}")
    refuse_unconfirmed(cost, settings)
    found = judge.scores(pairs, console)
    lines = [{"id": row["id"], **asdict(one)} for row, one in zip(rows, found, strict=True)]
    write_text(folder / "judged.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return _metrics(pairs, found, _difficulty(rows), console)


def _metrics(
    pairs: Sequence[Pair], found: Sequence[Judgement], difficulty: Sequence[float] | None, console: Console
) -> dict[str, float]:
    off_point = sum(one.off_point for one in found)
    if off_point:
        console.warn(f"{off_point} of {2 * len(found)} verdicts were neither A, B nor tie, and count as ties")
    scores = [one.score for one in found]
    differences = [len(p.answer) - len(p.reference) for p in pairs]
    longer = sum(d > 0 for d in differences) / len(differences)
    if not _FEW <= longer <= 1 - _FEW:
        console.warn(
            f"{longer:.0%} of the answers are longer than the reference's: the length-controlled win rate extrapolates"
        )
    return {
        "win_rate": sum(scores) / len(scores),
        "lc_win_rate": length_controlled(scores, differences, difficulty),
        "orders_agree": sum(one.in_order[0] == one.in_order[1] for one in found) / len(found),
        "off_point": off_point / (2 * len(found)),
    }


def _difficulty(rows: Sequence[Row]) -> list[float] | None:
    """Of each instruction, where the data has it."""
    known = [row["row"].get("instruction_difficulty") for row in rows]
    return None if any(value is None for value in known) else [float(value) for value in known]


def _by_package(
    rows: Sequence[Row], outputs: Sequence[dict[str, str]], settings: Eval, folder: Path, console: Console
) -> dict[str, float]:
    alpaca_package.need_package()
    references = [dict(row["row"]) for row in rows]
    texts = [(o["instruction"], o["output"], r["output"]) for o, r in zip(outputs, references, strict=True)]
    tokens_in = sum(_PACKAGE_PROMPT + tokens_of(*some) for some in texts)
    cost = Estimate.of(len(rows), 0, tokens_in, len(rows), settings.judge_price)
    console.note(f"{alpaca_package.NAME} judges {len(rows)} pairs: {cost}")
    refuse_unconfirmed(cost, settings)
    if [row["id"] for row in rows] != [f"alpaca_eval/test/{i}" for i in range(len(rows))]:
        console.warn(f"{alpaca_package.NAME} knows an instruction's difficulty by its place, and some are left out")
    return alpaca_package.package_win_rates(outputs, references, settings.judge_model, folder)
