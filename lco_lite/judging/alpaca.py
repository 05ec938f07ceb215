"""Win rates of one pass over AlpacaEval's instructions, by a judge behind an API or by the ``alpaca-eval`` package.

The length-controlled win rate is the one that remains when a model's answers are as long as the reference's (Dubois et
al. 2024, AlpacaEval 2). A logistic model of the score s of each pair is fitted by its log-likelihood:

    s_i ~ sigmoid(theta + phi * tanh(d_i / std(d)) + psi * difficulty_i),  d_i = length of the answer - of the reference

and the win rate is the mean of sigmoid(theta + psi * difficulty_i): the length term is set to 0. phi and psi have a
standard normal prior (a ridge of 1), theta one so wide that it only keeps it finite where every score is the same.
"""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from lco_lite.console import Console
from lco_lite.errors import LcoError, UsageError
from lco_lite.files import write_text
from lco_lite.judging.judge import ChatClient, Comparison, Estimate, Judge, refuse_unconfirmed, tokens_of
from lco_lite.recipe import Eval

PACKAGE, ANNOTATOR = "alpaca-eval", "weighted_alpaca_eval_gpt4_turbo"
KEY_VARIABLE = "OPENAI_API_KEY"
RIDGE, RIDGE_OF_CONSTANT = 1.0, 1e-6
_PACKAGE_PROMPT = 250  # tokens of what the package asks about the texts
_FEW = 0.05
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")

Row = Mapping[str, Any]


def check_judge(settings: Eval, n: int, passes: int, console: Console) -> None:
    """What can be said before there is a response. UsageError: the package or the key is absent."""
    by_package = settings.judge_url == PACKAGE
    if by_package:
        if importlib.util.find_spec("alpaca_eval") is None:
            raise UsageError(f"--judge-url {PACKAGE} needs that package: pip install 'lco-lite[alpaca]'")
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
    if (named := settings.judge_key_variable) is not None:
        if key := os.environ.get(named):
            return key
        raise UsageError(f"eval.judge_key_variable: the environment variable {named} is not set")
    parts = urlsplit(settings.judge_url or "")
    private = parts.scheme == "https" or parts.hostname in _THIS_MACHINE
    return os.environ.get(KEY_VARIABLE) if private else None


def _by_judge(
    rows: Sequence[Row], outputs: Sequence[dict[str, str]], settings: Eval, folder: Path, console: Console
) -> dict[str, float]:
    assert settings.judge_url is not None
    judge = Judge(ChatClient(settings.judge_url, judge_key(settings)), settings, folder.parent / "judge.jsonl")
    pairs = zip(outputs, rows, strict=True)
    compared = [Comparison(o["instruction"], o["output"], row["row"]["output"]) for o, row in pairs]
    cost = judge.estimate(compared)
    console.note(f"{settings.judge_model} judges {len(compared)} pairs in both orders: {cost}")
    refuse_unconfirmed(cost, settings)
    judgements = judge.scores(compared, console)
    lines = [{"id": row["id"], **one._asdict()} for row, one in zip(rows, judgements, strict=True)]
    write_text(folder / "judged.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    n, off_point = len(judgements), sum(one.off_point for one in judgements)
    if off_point:
        console.warn(f"{off_point} of {2 * n} verdicts were neither A, B nor tie, and count as ties")
    scores = [one.score for one in judgements]
    difficulty = [row["row"].get("instruction_difficulty") for row in rows]
    known = None if None in difficulty else [float(value) for value in difficulty]  # not all data has it
    differences = [len(one.answer) - len(one.reference) for one in compared]
    longer = sum(d > 0 for d in differences) / n
    if not _FEW <= longer <= 1 - _FEW:
        console.warn(
            f"{longer:.0%} of the answers are longer than the reference's: the length-controlled win rate extrapolates"
        )
    return {
        "win_rate": sum(scores) / n,
        "lc_win_rate": length_controlled(scores, differences, known),
        "orders_agree": sum(one.in_order[0] == one.in_order[1] for one in judgements) / n,
        "off_point": off_point / (2 * n),
    }


def length_controlled(
    scores: Sequence[float], differences: Sequence[float], difficulty: Sequence[float] | None = None
) -> float:
    """Win rate in [0, 1]. ``scores`` in [0, 1]; ``differences`` in characters; ``difficulty`` where it is known."""
    s, d = torch.tensor(scores, dtype=torch.float64), torch.tensor(differences, dtype=torch.float64)
    spread = float(d.std()) if len(d) > 1 else 0.0
    length = torch.tanh(d / spread) if spread > 0 else torch.zeros_like(d)
    known = [] if difficulty is None else [torch.tensor(difficulty, dtype=torch.float64)]
    x = torch.stack([torch.ones_like(s), length, *known], dim=1)  # [N, K]
    ridge = torch.tensor([RIDGE_OF_CONSTANT, *[RIDGE] * (x.shape[1] - 1)], dtype=torch.float64)
    w = torch.zeros_like(ridge, requires_grad=True)
    newton = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def cost() -> torch.Tensor:  # minus the log of the posterior
        newton.zero_grad()
        z = x @ w
        value = torch.nn.functional.softplus(z).sum() - s @ z + (ridge * w * w).sum() / 2
        value.backward()
        return value

    newton.step(cost)  # type: ignore[no-untyped-call]
    even = x.clone()
    even[:, 1] = 0.0
    return float(torch.sigmoid(even @ w.detach()).mean())


def _by_package(
    rows: Sequence[Row], outputs: Sequence[dict[str, str]], settings: Eval, folder: Path, console: Console
) -> dict[str, float]:
    """The package's annotations and its cache go to ``folder``. Raises LcoError where it fails."""
    references = [dict(row["row"]) for row in rows]
    texts = [(o["instruction"], o["output"], r["output"]) for o, r in zip(outputs, references, strict=True)]
    tokens_in = sum(_PACKAGE_PROMPT + tokens_of(*three) for three in texts)
    cost = Estimate(len(rows), 0, tokens_in, len(rows), settings.judge_price)
    console.note(f"{PACKAGE} judges {len(rows)} pairs: {cost}")
    refuse_unconfirmed(cost, settings)
    if [row["id"] for row in rows] != [f"alpaca_eval/test/{i}" for i in range(len(rows))]:
        console.warn(f"{PACKAGE} knows an instruction's difficulty by its place, and some are left out")

    import alpaca_eval

    try:
        board, _ = alpaca_eval.evaluate(
            model_outputs=list(outputs),
            reference_outputs=references,
            annotators_config=settings.judge_model or ANNOTATOR,
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
