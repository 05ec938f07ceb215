"""Fixtures that every part shares: few threads, and the smallest recipe that goes through all stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lco_lite.user_code import load_function

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads beyond what is free spin

TINY: dict[str, Any] = {
    "name": "tiny",
    "task": "arithmetic",
    "device": "cpu",
    "threads": 1,
    "model": {
        "init": {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64},
        "lora": {"r": 4, "alpha": 8},
    },
    "sft": {"examples": 64, "max_steps": 4, "batch_size": 16, "lr": 1e-3, "save_every": 1},
    "train_rm": {
        "prompts": 12,
        "samples_per_prompt": 2,
        "demonstrations_as_chosen": True,
        "batch_size": 4,
        "lr": 1e-3,
        "check_items": 8,
        "save_every": 1,
        "held_out": 0.2,
    },
    "rl": {
        "steps": 2,
        "prompts_per_step": 8,
        "minibatch": 4,
        "inner_epochs": 2,
        "lr": 1e-3,
        "warmup_steps": 2,
        "eval_items": 8,
        "max_new_tokens": 12,
    },
    "eval": {"seeds": 2, "items": 8, "max_new_tokens": 12},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: what takes minutes must not be what one process is left with at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    torch.set_num_threads(1)
    yield


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The recipe file of a run that takes seconds."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    return file


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Writes a user's file and names its function ``f``."""

    def write(body: str) -> str:
        file = tmp_path / "own.py"
        file.write_text(body)
        return f"{file}:f"

    yield write
    load_function.cache_clear()
