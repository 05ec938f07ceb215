"""The ``alpaca-eval`` package as the judge: its own annotator, its own length-controlled win rate."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lco_lite.errors import LcoError, UsageError

NAME = "alpaca-eval"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"


def need_package() -> None:
    """Raises UsageError where it is not installed."""
    if importlib.util.find_spec("alpaca_eval") is None:
        raise UsageError(f"--judge-url {NAME} needs that package: pip install 'lco-lite[alpaca]'")


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
        raise LcoError(f"{NAME} failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
    return {"win_rate": win_rate / 100, "lc_win_rate": controlled / 100}
