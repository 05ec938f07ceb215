"""What ``plan`` says of real models, against what is counted while the trainers run on their weights.

Only where asked, for it takes minutes: LCO_LITE_REAL_MODELS=FOLDER[:FOLDER…], model folders as save_pretrained writes
them. The differences are in docs/memory.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lco_lite.models.chat import ChatFormat
from lco_lite.models.loading import load_tokenizer
from lco_lite.plan import peaks
from lco_lite.recipe.file import load_recipe
from lco_lite.recipe.sections import Weights
from tests.test_plan import counted

FOLDERS = [Path(path) for path in os.environ.get("LCO_LITE_REAL_MODELS", "").split(":") if path]
NEW = 24  # tokens of a response: few, so that it hardly ends by itself
TEXT = "one two three four five six seven "


def recipe_file(folder: Path, model: Path) -> Path:
    """Sequences are as long as the recipe lets in, every other one a word shorter, so that there is a mask."""
    tokenizer = load_tokenizer(Weights(path=str(model)))
    chat = ChatFormat(tokenizer, {})
    asked = [[{"role": "user", "content": f"Write a long story about {i}" + i % 2 * " now"}] for i in range(8)]
    fits = (n for n in range(10, 0, -1) if len(chat.example(asked[1], TEXT * n)) <= tokenizer.model_max_length)
    text = TEXT * next(fits)
    length, prompt = len(chat.example(asked[1], text)), len(chat.prompt(asked[1]))
    rows: dict[str, list[Any]] = {
        "demonstrations": [{"prompt": a[0]["content"], "response": text} for a in asked],
        "preferences": [{"prompt": a[0]["content"], "chosen": text, "rejected": text} for i, a in enumerate(asked)],
        "prompts": [{"prompt": a[0]["content"]} for a in asked],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    stage = {"batch_size": 4, "micro_batch_tokens": 2 * length, "max_length": length, "max_steps": 2}
    rl = {"steps": 2, "prompts_per_step": 8, "minibatch": 4, "rollout_batch": 8, "eval_every": 0, "inner_epochs": 2}
    rl |= {"max_new_tokens": NEW, "max_length": prompt + NEW, "micro_batch_tokens": 2 * (prompt + NEW), "top_p": 1.0}
    recipe = {"name": "real", "device": "cpu", "reward_model": "self", "sft": stage, "rl": rl | {"temperature": 1.0}}
    recipe["train_rm"] = stage | {"held_out": 0.0, "micro_batch_tokens": 4 * length}
    recipe["model"] = {"path": str(model), "lora": {"r": 16, "alpha": 32}}
    recipe["data"] = {name: str(folder / f"{name}.jsonl") for name in rows}
    file = folder / "real.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not FOLDERS, reason="real weights: LCO_LITE_REAL_MODELS=FOLDER[:FOLDER…]")
@pytest.mark.parametrize("model", FOLDERS, ids=lambda folder: folder.name)
def test_of_real_models_planned_phases_are_those_that_are_counted(model, tmp_path, monkeypatch):
    file, off = recipe_file(tmp_path, model), dict[str, float]()

    def compare(name: str, said: float, found: float) -> None:
        off[name] = said / found - 1
        print(
            f"| {model.name} | {name} | {said / 2**20:.0f} | {found / 2**20:.0f} | {100 * off[name]:+.1f} % |",
            flush=True,
        )

    recipe = load_recipe(file)
    for stage, name in {"sft": "sft", "rm": "train-rm"}.items():
        planned, seen = peaks(recipe, stage, on_card=False, only=name), counted(file, stage, monkeypatch)
        compare(name, sum(planned.phases[name].values()), seen["update"])
    planned, seen = peaks(recipe, "rl", on_card=False), counted(file, "rl-kld", monkeypatch)
    # all of the phase stays on a CPU: 8 responses, where the plan's phases see those of one micro-batch, 2
    more = {"rl score": (8 - 2) * NEW * planned.kept, "rl update": (8 - 2) * NEW * planned.kept, "rl rollout": 0.0}
    for name, other in more.items():
        compare(name, sum(planned.phases[name].values()) + other, seen[name.removeprefix("rl ")])
    assert all(abs(share) < 0.07 for share in off.values()), off
