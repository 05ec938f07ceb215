"""Win rates of one pass over AlpacaEval's instructions, by a judge behind an API or by the ``alpaca-eval`` package."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from lco_lite.console import Console
from lco_lite.errors import LcoError, UsageError
from lco_lite.files import write_text
from lco_lite.judging.judge import Answers, ChatClient, Estimate, Judge, Judgement, Pair, refuse_unconfirmed, tokens_of
from lco_lite.recipe import Eval

KEY_VARIABLE = "OPENAI_API_KEY"
_PACKAGE_PROMPT = 250  # tokens of what the package asks about the texts
_FEW = 0.05
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")

Row = Mapping[str, Any]


def check_judge(settings: Eval, n: int, passes: int, console: Console) -> None:
    """What can be said before there is a response. UsageError: the package or the key is absent."""
    by_package = settings.judge_url == PACKAGE
    if by_package:
        need_package()
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
    judged = _by_package if settings.judge_url == PACKAGE else _by_judge
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
    need_package()
    references = [dict(row["row"]) for row in rows]
    texts = [(o["instruction"], o["output"], r["output"]) for o, r in zip(outputs, references, strict=True)]
    tokens_in = sum(_PACKAGE_PROMPT + tokens_of(*some) for some in texts)
    cost = Estimate.of(len(rows), 0, tokens_in, len(rows), settings.judge_price)
    console.note(f"{PACKAGE} judges {len(rows)} pairs: {cost}")
    refuse_unconfirmed(cost, settings)
    if [row["id"] for row in rows] != [f"alpaca_eval/test/{i}" for i in range(len(rows))]:
        console.warn(f"{PACKAGE} knows an instruction's difficulty by its place, and some are left out")
    return package_win_rates(outputs, references, settings.judge_model, folder)


PACKAGE = "alpaca-eval"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"


def need_package() -> None:
    """Raises UsageError where it is not installed."""
    if importlib.util.find_spec("alpaca_eval") is None:
        raise UsageError(f"--judge-url {PACKAGE} needs that package: pip install 'lco-lite[alpaca]'")


def package_win_rates(
    outputs: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]], annotator: str | None, folder: Path
) -> dict[str, float]:
    """``win_rate`` and ``lc_win_rate`` in [0, 1]; its annotations and its cache go to ``folder``.

    The package finds an instruction's difficulty by its place, so ``outputs`` are the first so many, in order. Raises
    LcoError where the package fails.
    """
    import alpaca_eval

    try:
        board, _ = alpaca_eval.evaluate(
            model_outputs=list(outputs),
            reference_outputs=list(references),
            annotators_config=annotator or ANNOTATOR,
            name=outputs[0]["generator"],
            output_path=str(folder),
            precomputed_leaderboard=None,
            is_cache_leaderboard=False,
            is_return_instead_of_print=True,
            metric_kwargs={"save_weights_dir": None},  # else it writes into its own installation
            caching_path=str(folder / "alpaca-eval-cache.json"),
        )
        row = board.loc[outputs[0]["generator"]]
        win_rate, controlled = float(row["win_rate"]), float(row["length_controlled_winrate"])
    except Exception as e:  # its annotators raise what their clients raise
        raise LcoError(f"{PACKAGE} failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
    return {"win_rate": win_rate / 100, "lc_win_rate": controlled / 100}


RIDGE = 1.0  # of phi and psi
RIDGE_OF_CONSTANT = 1e-6
_STEPS, _ENOUGH = 100, 1e-10


def length_controlled(
    scores: Sequence[float], differences: Sequence[float], difficulty: Sequence[float] | None = None
) -> float:
    """Win rate in [0, 1]. ``scores`` in [0, 1]; ``differences`` in characters; ``difficulty`` where it is known."""
    import torch

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor([float(v) for v in values], dtype=torch.float64)

    s, d = column(scores), column(differences)
    spread = float(d.std()) if len(d) > 1 else 0.0
    length = torch.tanh(d / spread) if spread > 0 else torch.zeros_like(d)
    x = torch.stack([torch.ones_like(s), length, *([] if difficulty is None else [column(difficulty)])], dim=1)
    weights = _fit(x, s)
    even = x.clone()
    even[:, 1] = 0.0
    return float(torch.sigmoid(even @ weights).mean())


def _fit(x: Tensor, s: Tensor) -> Tensor:
    """[N, K], [N] -> [K]: the weights of highest posterior, by Newton's method."""
    import torch

    ridge = torch.full((x.shape[1],), RIDGE, dtype=x.dtype)
    ridge[0] = RIDGE_OF_CONSTANT

    def cost(w: Tensor) -> float:
        z = x @ w
        return float(torch.nn.functional.softplus(z).sum() - s @ z + (ridge * w * w).sum() / 2)

    w = torch.zeros_like(ridge)
    for _ in range(_STEPS):
        p = torch.sigmoid(x @ w)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + torch.diag(ridge)
        step = torch.linalg.solve(curvature, x.T @ (p - s) + ridge * w)
        scale = 1.0
        while cost(w - scale * step) > cost(w) and scale > _ENOUGH:
            scale /= 2  # a whole step may overshoot where the scores are all alike
        w = w - scale * step
        if float((scale * step).abs().max()) < _ENOUGH:
            break
    return w
