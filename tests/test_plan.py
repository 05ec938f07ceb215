"""What ``plan`` says, against what is counted while the trainers really run; and what the command prints."""

from __future__ import annotations

import contextlib
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.context import Clock
from lco_lite.errors import UsageError
from lco_lite.plan import GIB, LiveBytes, measured, parse_bytes, peaks, work
from lco_lite.recipe.file import load_recipe
from tests.models import families
from tests.train.test_chain import run_stage

LENGTH, RESPONSE = 64, 52


def saved(family: str, folder: Path, layers: int) -> Path:
    """Deeper than the two depths that are looked at, and wide enough to count."""
    kinds = ["sliding_attention", "full_attention"] if family == "gemma3" else ["full_attention"]
    types = [kinds[i % 6 == 5 and len(kinds) - 1] for i in range(layers)]
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": layers, "layer_types": types}
    return families.save(family, folder, **sizes)


def recipe_file(folder: Path, model: dict[str, Any], reward_model: Any = "self") -> Path:
    """Every sequence is as long as the recipe lets in: 3 tokens of template and end are beside the text's bytes."""
    shown = [{"prompt": f"{i % 10}", "response": "y" * (LENGTH - 4)} for i in range(16)]
    pairs = [
        {"prompt": f"{i % 10}", "chosen": "y" * (RESPONSE - 1), "rejected": "n" * (RESPONSE - 1)} for i in range(16)
    ]
    prompts = [{"prompt": f"{i:02}".rjust(LENGTH - RESPONSE - 2, "x")} for i in range(16)]
    data = {}
    for name, rows in (("demonstrations", shown), ("preferences", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data[name] = str(folder / f"{name}.jsonl")
    stage = {"batch_size": 8, "micro_batch_tokens": 4 * LENGTH, "max_length": LENGTH}
    rl = {**stage, "steps": 1, "prompts_per_step": 16, "minibatch": 8, "max_new_tokens": RESPONSE, "rollout_batch": 8}
    rl |= {"temperature": 1.0, "top_p": 0.9, "inner_epochs": 2, "eval_every": 0}
    rl.pop("batch_size")
    pairs_of = {**stage, "max_length": RESPONSE + 3, "max_steps": 2, "held_out": 0.0}
    pairs_of["micro_batch_tokens"] = 4 * pairs_of["max_length"]
    recipe = {"name": "small", "device": "cpu", "data": data, "model": model, "reward_model": reward_model}
    recipe |= {"sft": {**stage, "max_steps": 2}, "train_rm": pairs_of, "rl": rl}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def counted(file: Path, stage: str, monkeypatch: pytest.MonkeyPatch, *sets: str) -> dict[str, float]:
    """Phase of the clock -> the most bytes that lived in it while the trainer ran with real numbers."""
    found: dict[str, float] = {}
    clock = Clock.__call__

    @contextlib.contextmanager
    def counting(self: Clock, phase: str):
        gc.collect()
        for one in gc.get_objects():
            if isinstance(one, torch.Tensor):
                live._add(one)
                state = getattr(one, "quant_state", None)
                for held in (
                    (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code) if state else ()
                ):
                    live._add(held)
        live.restart()
        with clock(self, phase):
            yield
        found[phase] = max(found.get(phase, 0.0), live.peak)

    with monkeypatch.context() as patched, LiveBytes() as live:
        patched.setattr(Clock, "__call__", counting)
        run_stage(file, stage, *sets)
    return found


def planned(file: Path, stage: str, *sets: str) -> dict[str, float]:
    recipe = load_recipe(file, list(sets))
    return {phase: sum(held.values()) for phase, held in peaks(recipe, stage, on_card=False)[0].items()}


@pytest.mark.parametrize("family,layers", [("llama", 9), ("qwen2", 9), ("gemma3", 14)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planned_peaks_are_those_that_are_counted_while_the_trainers_run(
    family, layers, checkpointing, tmp_path, monkeypatch
):
    model = {"path": str(saved(family, tmp_path / "model", layers)), "lora": {"r": 4, "alpha": 8}}
    file = recipe_file(tmp_path, model | {"gradient_checkpointing": checkpointing})
    sft = counted(file, "sft", monkeypatch)
    said = planned(file, "sft")
    print(family, "sft", sft, said)
    rm = counted(file, "rm", monkeypatch)
    print(family, "rm", rm, planned(file, "rm"))
    for o in ("kld", "lch", "mse"):
        print(o, counted(file, f"rl-{o}", monkeypatch, f"rl.objective={o}"), planned(file, "rl", f"rl.objective={o}"))
    assert 0
