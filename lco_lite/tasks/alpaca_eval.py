"""AlpacaEval (Li et al. 2023; length-controlled: Dubois et al. 2024): 805 instructions, compared with a reference.

The outputs of each pass are written in AlpacaEval's format. A judge at ``eval.judge_url``, or the ``alpaca-eval``
package, compares them with the reference's; without either the only metric is their mean length in characters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lco_lite.errors import DataError
from lco_lite.files import write_json
from lco_lite.recipe import Eval
from lco_lite.tasks.base import Benchmark, Grade, Item, Problem
from lco_lite.tasks.source import FOLDER, Rows, first_file, read_rows

FILES = ("alpaca_eval_gpt4_1106_preview.jsonl", "alpaca_eval_text_davinci_003.jsonl")
HUB, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"
_NO_JUDGE = (
    "no judge, so no win rate. Add --judge-url URL --judge-model NAME (a chat-completions API) or --judge-url "
    "alpaca-eval (that package); the responses are kept"
)


@dataclass
class AlpacaEval(Benchmark):
    """Not right or wrong: ``aggregate`` scores a pass."""

    def grade(self, response: str, item: Item) -> Grade:
        return Grade(False, None, "scored by aggregate")

    def scored_by(self, settings: Eval) -> dict[str, Any]:
        """The settings that ``aggregate`` rests on, beside the responses."""
        return settings.model_dump(mode="json", include={"judge_url", "judge_model", "judge_options"})

    def check(self, settings: Eval, n: int, passes: int, console: Any) -> None:
        """Before the first response is made: is all there that judging ``n`` of them, ``passes`` times, will need?

        Raises UsageError where it is not.
        """
        if settings.judge_url is not None:
            from lco_lite.judging.alpaca import check_judge

            check_judge(settings, n, passes, console)

    def aggregate(self, rows: list[dict[str, Any]], settings: Eval, folder: Path, console: Any) -> dict[str, float]:
        """Metrics of one pass: ``win_rate`` and ``lc_win_rate`` in [0, 1] first, where there is a judge.

        Writes ``outputs.json`` and, of a judge, ``judged.jsonl``. Raises UsageError where that takes more requests than
        are confirmed, and what ``ChatClient.ask`` raises.
        """
        outputs = [alpaca_output(row, generator_of(folder)) for row in rows]
        write_json(folder / "outputs.json", outputs)
        length = {"mean_length": sum(len(o["output"]) for o in outputs) / len(outputs)}
        if settings.judge_url is None:
            console.warn(f"{self.name}: {_NO_JUDGE}")
            return length
        from lco_lite.judging.alpaca import win_rates

        return win_rates(rows, outputs, settings, folder, console) | length


def alpaca_eval(data: Path | None = None) -> AlpacaEval:
    """The task; the reference is GPT-4 Turbo's output (AlpacaEval 2), or whose is in the file that is named."""
    return AlpacaEval("alpaca_eval", {"test": partial(_rows, data)}, _read, template="{problem}", max_new_tokens=2_048)


def alpaca_output(row: Mapping[str, Any], generator: str) -> dict[str, str]:
    """A row in AlpacaEval's format. What a model thought before ``</think>`` is no part of its answer."""
    text = row["response"].rpartition("</think>")[2].strip()
    found = {"instruction": row["row"]["instruction"], "output": text, "generator": generator}
    return found | {"dataset": row["row"].get("dataset", "")}


def generator_of(folder: Path) -> str:
    """``eval/alpaca_eval--rl-kld.files/seed-0`` -> ``rl-kld``."""
    return folder.parent.name.removesuffix(".files").rpartition("--")[2] or "lco-lite"


def _rows(data: Path | None) -> Rows:
    if data is not None and not data.is_dir():
        return read_rows(data)
    local = first_file(data, *FILES)
    return read_rows(local) if local else _fetch()


def _fetch() -> Rows:
    """The set on the hub is no table but plain files, so it is not for ``datasets``."""
    try:
        from huggingface_hub import hf_hub_download

        found = json.loads(Path(hf_hub_download(HUB, HUB_FILE, repo_type="dataset")).read_text(encoding="utf-8"))
    except Exception as e:  # offline, renamed, gated: many kinds, one meaning
        first = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise DataError(
            f"{HUB_FILE} of the hub set {HUB} cannot be loaded: {first[:200]}. To use local data, set {FOLDER}=DIR to "
            f"a folder with {' or '.join(FILES)}"
        ) from e
    return [(f"{HUB}, {HUB_FILE}, row {i}", row) for i, row in enumerate(found, 1)]


def _read(row: Mapping[str, Any]) -> Problem:
    """The reference's output may be empty; text_davinci_003's is, twice."""
    for name in ("instruction", "output"):
        if not isinstance(row[name], str):
            raise ValueError(f"field {name} is {row[name]!r:.60}, not a text")
    if not row["instruction"].strip():
        raise ValueError("field instruction is empty")
    return Problem(row["instruction"], row["output"])
