"""AlpacaEval (Li et al. 2023; length-controlled: Dubois et al. 2024): 805 instructions, compared with a reference."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lco_lite.console import Console
from lco_lite.files import write_json
from lco_lite.recipe import Eval
from lco_lite.tasks.base import Problem, Rows, Task, first_file, hub_error, read_rows

# GPT-4 Turbo's outputs are the reference of AlpacaEval 2; text_davinci_003's were that of the first.
FILES = ("alpaca_eval_gpt4_1106_preview.jsonl", "alpaca_eval_text_davinci_003.jsonl")
HUB, HUB_FILE = "tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"
# digest of the 805 instructions: the package knows an instruction's difficulty by its place among them
INSTRUCTIONS = "18511e7a68c0c5d7"
_ADD_JUDGE = "Add --judge-url URL --judge-model NAME (a chat-completions API) or --judge-url alpaca-eval (that package)"


class AlpacaEval(Task):
    """Neither right nor wrong: a judge prefers the response or the reference's output."""

    def check(self, settings: Eval, n: int, passes: int, console: Console) -> None:
        if settings.judge_url is not None:
            from lco_lite.judging.alpaca import check_judge

            check_judge(settings, n, passes, console)

    def scored_by(self, settings: Eval) -> dict[str, Any]:
        return settings.model_dump(mode="json", include={"judge_url", "judge_model", "judge_options"})

    def aggregate(self, rows: list[dict[str, Any]], settings: Eval, folder: Path, console: Console) -> dict[str, Any]:
        """``win_rate`` and ``lc_win_rate`` in [0, 1], where there is a judge; ``mean_length`` in characters.

        Writes ``outputs.json`` and, of a judge, ``judged.jsonl``. Raises UsageError where that takes more requests than
        are confirmed, and what ``ChatClient.ask`` raises.
        """
        stage = folder.parent.name.removesuffix(".files").rpartition("--")[2]  # alpaca_eval--rl-kld.files/seed-0
        outputs = [
            {
                "instruction": row["row"]["instruction"],
                "output": row["response"].rpartition("</think>")[2].strip(),  # thoughts are no part of the answer
                "generator": stage or "lco-lite",
                "dataset": row["row"].get("dataset", ""),
            }
            for row in rows
        ]
        write_json(folder / "outputs.json", outputs)
        length = {"mean_length": sum(len(o["output"]) for o in outputs) / len(outputs)}
        if settings.judge_url is None:
            console.warn(f"{self.name}: no judge, so no win rate. {_ADD_JUDGE}; the responses are kept")
            return length
        from lco_lite.judging.alpaca import win_rates

        return win_rates(rows, outputs, settings, folder, console, self._places(rows)) | length

    def _places(self, rows: list[dict[str, Any]]) -> list[int] | None:
        """Where the rows stand among AlpacaEval's instructions; None where the task's data are others."""
        place = {item.id: i for i, item in enumerate(self.items("test"))}
        lines = (" ".join(item.prompt.split()) for item in self.items("test"))
        if hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] != INSTRUCTIONS:
            return None
        return [place[row["id"]] for row in rows]


def alpaca_eval(data: Path | None = None) -> Task:
    """The task; its reference is the one whose file is named or found, GPT-4 Turbo's first."""
    return AlpacaEval(
        "alpaca_eval", {"test": _rows}, _read, data, grader=None, template="{problem}", max_new_tokens=2_048
    )


def _rows(folder: Path | None) -> Rows:
    """The set on the hub is no table but plain files, so it is not for ``datasets``."""
    if file := first_file(folder, FILES):
        return read_rows(file)
    try:
        from huggingface_hub import hf_hub_download

        rows = json.loads(Path(hf_hub_download(HUB, HUB_FILE, repo_type="dataset")).read_text(encoding="utf-8"))
    except Exception as e:  # offline, renamed, gated: many kinds, one meaning
        raise hub_error(f"{HUB_FILE} of the hub set {HUB}", " or ".join(FILES), e) from e
    return [(f"{HUB}, {HUB_FILE}, row {i}", row) for i, row in enumerate(rows, 1)]


def _read(row: Mapping[str, Any]) -> Problem:
    """The reference's output may be empty; text_davinci_003's is, twice."""
    for name in ("instruction", "output"):
        if not isinstance(row[name], str):
            raise ValueError(f"field {name} is {row[name]!r:.60}, not a text")
    if not row["instruction"].strip():
        raise ValueError("field instruction is empty")
    return Problem(row["instruction"], row["output"])


TASKS = {"alpaca_eval": alpaca_eval}
