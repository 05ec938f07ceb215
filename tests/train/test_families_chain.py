"""Every family goes through sft, train-rm, rl and eval; policy and reward model may differ in size and padding."""

from __future__ import annotations

import json

import pytest
import typer
import yaml

from lco_lite.metrics import read_log
from lco_lite.train.pipeline import run_all, train
from tests.conftest import TINY
from tests.models.families import save
from tests.train.test_chain import start, trained

FAMILIES = ("qwen2", "qwen3", "llama3.2", "gemma2", "gemma3", "gemma3-vision", "mistral3", "ministral3")


def recipe(folder, name: str, **changes):
    """A recipe whose policy is ``folder / name``, an ordinary model folder."""
    model = {"path": str(folder / name), "lora": {"r": 2, "alpha": 4}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**TINY, "name": name, "model": model, **changes}))
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_the_whole_chain(tmp_path, family):
    save(family, tmp_path / family)
    with start(recipe(tmp_path, family)) as ctx:
        run_all(ctx, fresh=False)
    for stage in ("sft", "rm", "rl-kld"):
        assert any(p.abs().max() > 0 for name, p in trained(ctx, stage).items() if "lora_B" in name), stage
        assert all(row["grad_norm"] > 0 for row in read_log(ctx.run.stage(stage).metrics) if "grad_norm" in row)
    kept = [json.loads(file.read_text()) for file in (ctx.run.path / "eval").rglob("*.json")]
    assert kept, "the scores of the stages"


def test_policy_and_reward_model_may_differ_in_width_depth_and_padded_vocabulary(tmp_path):
    save("qwen2", tmp_path / "policy")
    save(
        "qwen3",
        tmp_path / "judge",
        hidden_size=48,
        num_hidden_layers=3,
        vocab_size=320,
        layer_types=["full_attention"] * 3,
    )
    judge = {"path": str(tmp_path / "judge"), "lora": {"r": 2, "alpha": 4}}
    with start(recipe(tmp_path, "policy", reward_model=judge)) as ctx:
        for objective in ("kld", "lch", "mse", "gkd", "minillm"):
            ctx.recipe.rl.objective = objective
            train(ctx, f"rl-{objective}", fresh=False)
            rows = read_log(ctx.run.stage(f"rl-{objective}").metrics)
            assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)


def test_a_reward_model_of_another_tokenizer_is_refused(tmp_path, capsys):
    save("qwen2", tmp_path / "policy")
    file = save("qwen2", tmp_path / "judge") / "tokenizer.json"
    file.write_text(
        file.read_text().replace('"a":', '"swapped":').replace('"b":', '"a":').replace('"swapped":', '"b":')
    )
    with (
        pytest.raises(typer.Exit),
        start(recipe(tmp_path, "policy", reward_model={"path": str(tmp_path / "judge")})) as ctx,
    ):
        train(ctx, "rm", fresh=False)
    assert "tokenizer" in capsys.readouterr().err
