"""The whole chain on a model of a few thousand weights: what it leaves behind; nothing is done twice or lost."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lco_lite.checkpoint import checkpoints
from lco_lite.command import command
from lco_lite.context import Context
from lco_lite.errors import UsageError
from lco_lite.metrics import read_log
from lco_lite.train import methods
from lco_lite.train.pipeline import run_all, train
from lco_lite.train.training import StageTraining
from tests.models.families import DROPOUT, save


def start(recipe: Path, *sets: str, name: str | None = None):
    return command(str(recipe), recipe.parent / "runs", name, list(sets), {}, quiet=True)


def run_stage(recipe: Path, stage: str, *sets: str, name: str | None = None, fresh: bool = False) -> Context:
    with start(recipe, *sets, name=name) as ctx:
        train(ctx, stage, fresh)
    return ctx


def trained(ctx: Context, stage: str) -> dict[str, torch.Tensor]:
    folder = ctx.run.stage(stage)
    file = folder.adapter / "adapter_model.safetensors"
    return load_file(file if file.exists() else folder.model / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A run that has gone through everything, for the tests that only look."""
    import yaml

    from tests.conftest import TINY

    file = tmp_path_factory.mktemp("chain") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    with start(file) as ctx:
        run_all(ctx, fresh=False)
    return ctx


def test_a_run_leaves_the_folder_that_the_contract_names(done):
    path = done.run.path
    for made in (
        "recipe.yaml",
        "environment.json",
        "sft/model/model.safetensors",
        "sft/metrics.jsonl",
        "rm/adapter/adapter_model.safetensors",
        "rm/pairs.jsonl",
        "rl-kld/adapter/adapter_config.json",
        "rl-kld/metrics.jsonl",
        "rl-kld/samples.jsonl",
        "eval/arithmetic--sft.json",
        "eval/arithmetic--rm.json",
        "eval/arithmetic--rl-kld.json",
        "eval/arithmetic--rl-kld.rows.jsonl",
    ):
        assert (path / made).exists(), made
    assert not list(path.rglob("*.bin")) and not list(path.rglob("*.pt")), "nothing pickled"


def test_the_sft_model_and_the_adapters_load_in_plain_transformers_and_peft(done):
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(done.run.stage("sft").model)
    tokenizer = AutoTokenizer.from_pretrained(done.run.stage("sft").model)
    assert len(tokenizer) == model.config.vocab_size == 260
    before = model(torch.tensor([[5, 6, 7]])).logits.detach().clone()
    adapted = PeftModel.from_pretrained(model, done.run.stage("rl-kld").adapter)
    assert not torch.equal(adapted(torch.tensor([[5, 6, 7]])).logits, before)


def test_metrics_hold_one_line_a_step_with_the_contracts_names(done):
    rows = read_log(done.run.stage("rl-kld").metrics)
    assert [row["step"] for row in rows] == [1, 2]
    names = {"loss", "grad_norm", "reward", "accuracy", "kl_to_old", "entropy", "sampled_prob", "response_tokens", "lr"}
    names |= {"samples_seen", "peak_mib", "eval", "tokens_per_second", "truncated", "seconds"}
    assert names <= set(rows[-1]), names - set(rows[-1])
    assert {"logit_grad_norm_pos", "logit_grad_norm_neg"} & set(rows[-1])
    assert rows[-1]["samples_seen"] == 16
    assert set(rows[-1]["seconds"]) == {"rollout", "score", "update", "samples", "eval"}


def test_samples_have_every_token_of_the_first_responses_with_three_policies(done):
    rows = read_log(done.run.stage("rl-kld").samples)
    assert [("tokens" in row) for row in rows] == 2 * (4 * [True] + 4 * [False])
    for row in rows[:4]:
        assert len(row["tokens"]) == row["response_tokens"]
        pieces = [of[0][0] for of in row["tokens"] if not re.fullmatch(r"<\|\w+\|>", of[0][0])]
        said = [bytes([int(p[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", p) else p.encode() for p in pieces]
        assert b"".join(said).decode("utf-8", "replace") == row["response"]
        assert all(0 <= p <= 1 for of in row["tokens"] for _, _, *ps in of for p in ps)
    old, new = ([of[0][k] for row in rows for of in row.get("tokens", [])] for k in (2, 4))
    assert old != new, "the policy after the updates"


def test_scores_have_mean_and_spread_over_seeds_and_a_row_an_item_and_seed(done):
    result = json.loads(done.run.eval_path("arithmetic", "rl-kld").read_text())
    rows = done.run.eval_path("arithmetic", "rl-kld").with_suffix(".rows.jsonl").read_text().splitlines()
    assert result["n"] == 8 and result["seeds"] == 2 and len(rows) == 16
    assert result["mean"] == pytest.approx(sum(json.loads(r)["right"] for r in rows) / 16)
    assert set(json.loads(rows[0])) == {
        "seed",
        "sample",
        "id",
        "prompt",
        "response",
        "extracted",
        "gold",
        "right",
        "why",
        "truncated",
    }


def test_what_a_score_will_lack_is_said_before_anything_is_trained(tiny, tmp_path, monkeypatch, capsys):
    row = {"question": "Who?", "passages": [["A", "B."]], "answer": ["C"]}
    (tmp_path / "qa_feedback_dev.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("LCO_LITE_DATA", str(tmp_path))
    ran = []
    monkeypatch.setattr("lco_lite.train.pipeline._train_one", lambda *_: ran.append(True))
    with pytest.raises(typer.Exit), start(tiny, "eval.tasks=[qa_feedback]") as ctx:
        run_all(ctx, fresh=False)
    assert not ran and "eval.reward_models.relevance" in capsys.readouterr().err


def test_the_newest_policy_is_what_rl_made_and_never_the_reward_model(done):
    assert done.run.newest_stage() == "rl-kld"


def test_a_stage_that_is_done_is_left_alone(done):
    before = done.run.stage("rl-kld").id()
    with command(None, done.run.path.parent, done.run.name, [], {}, quiet=True) as ctx:
        train(ctx, "rl-kld")
    assert ctx.run.stage("rl-kld").id() == before


def test_another_objective_goes_beside_the_first_and_shares_the_reward_model(done):
    rm = done.run.stage("rm").id()
    flags = {"rl.objective": "lch", "rl.weighting": "policy", "rl.anchor": 0.5}
    with command(None, done.run.path.parent, done.run.name, [], flags, quiet=True) as ctx:
        train(ctx, "rl-lch")
    assert ctx.run.stage("rl-lch").is_done() and ctx.run.stage("rl-kld").is_done()
    assert ctx.run.stage("rm").id() == rm


def test_changed_settings_are_refused_with_the_difference(done, capsys):
    import typer

    with (
        pytest.raises(typer.Exit) as e,
        command(None, done.run.path.parent, done.run.name, ["rl.beta=0.5"], {}, quiet=True) as ctx,
    ):
        train(ctx, "rl-kld")
    assert e.value.exit_code == 2
    message = capsys.readouterr().err
    assert "rl.beta: 1.0 → 0.5" in message and "--fresh" in message and "--name" in message


def test_two_runs_with_one_seed_end_in_the_same_bits_whatever_samples_are_kept_and_another_seed_does_not(tiny):
    one = run_stage(tiny, "rl-kld", name="one")
    two = run_stage(tiny, "rl-kld", "rl.samples=0", name="two")
    assert all("tokens" not in row for row in read_log(two.run.stage("rl-kld").samples))
    other = run_stage(tiny, "rl-kld", "seed=1", name="other")
    assert same(trained(one, "rl-kld"), trained(two, "rl-kld"))
    assert not same(trained(one, "rl-kld"), trained(other, "rl-kld"))


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> Iterator[None]:
    """What runs inside dies once ``step`` steps of ``stage`` are in a checkpoint."""
    real = StageTraining.keep

    def keep_then_die(self: StageTraining, *args: Any) -> None:
        real(self, *args)
        if self.stage.name == stage and self.done == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageTraining, "keep", keep_then_die)
        yield


@pytest.mark.parametrize(("stage", "after"), [("sft", 2), ("rm", 1), ("rl-kld", 1)])
def test_a_stage_killed_after_a_checkpoint_ends_with_the_same_bits(tiny, monkeypatch, stage, after):
    whole = run_stage(tiny, stage, name="whole")

    with killed_after(monkeypatch, stage, after):
        run_stage(tiny, stage, name="cut")
    cut = run_stage(tiny, stage, name="cut")
    assert same(trained(whole, stage), trained(cut, stage))
    if stage == "rl-kld":
        samples = [ctx.run.stage(stage).samples.read_bytes() for ctx in (whole, cut)]
        assert samples[0] == samples[1] and b'"tokens"' in samples[0]
    steps = [[row["step"] for row in read_log(ctx.run.stage(stage).metrics)] for ctx in (whole, cut)]
    assert steps[0] == steps[1]


def test_fresh_starts_a_stage_again_and_drops_what_was_built_on_it(tiny):
    run_stage(tiny, "rl-kld")
    ctx = run_stage(tiny, "rm", fresh=True)
    assert ctx.run.stage("rm").is_done()
    assert not ctx.run.stage("rl-kld").path.exists()
    assert ctx.run.stage("sft").is_done()


def test_rule_feedback_needs_no_reward_model(tiny):
    sets = ("rl.feedback=rule", "rl.responses_per_prompt=2", "rl.baseline=group")
    ctx = run_stage(tiny, "rl-kld", *sets)
    assert not ctx.run.stage("rm").path.exists()
    assert "dead_groups" in read_log(ctx.run.stage("rl-kld").metrics)[0]


def test_full_fine_tuning_goes_through_every_stage_with_the_head_frozen(tiny):
    ctx = run_stage(tiny, "rl-kld", "model.lora=null", "rl.anchor=0.5")
    sft, rl = trained(ctx, "sft"), trained(ctx, "rl-kld")
    assert torch.equal(sft["lm_head.weight"], rl["lm_head.weight"])
    assert not torch.equal(sft["model.embed_tokens.weight"], rl["model.embed_tokens.weight"])


def test_a_trained_head_goes_through_the_logits_path(tiny):
    ctx = run_stage(tiny, "rl-lch", "model.lora=null", "model.train_head=true", "rl.objective=lch")
    sft, rl = trained(ctx, "sft"), trained(ctx, "rl-lch")
    assert not torch.equal(sft["lm_head.weight"], rl["lm_head.weight"])


def test_the_first_dpo_loss_is_that_of_two_equal_models_with_dropout_in_the_recipe(tiny, tmp_path):
    """Model and reference are two adapters with the same weights, those of sft."""
    model = f"model={{path: {save('llama', tmp_path / 'base')}, lora: {{r: 4, dropout: 0.3}}}}"
    ctx = run_stage(tiny, "rm", model, "sft.lr=0.01", "train_rm.max_steps=1", "train_rm.check_items=0")
    assert all(b.any() for name, b in trained(ctx, "sft").items() if "lora_B" in name), "dropout has something to drop"
    (row,) = read_log(ctx.run.stage("rm").metrics)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6) and row["margin"] == 0


def test_two_runs_of_a_seed_are_the_same_to_the_last_bit_whatever_was_drawn_before_them(tiny, tmp_path):
    """Dropout, what a user draws, and the random states of a checkpoint come from the recipe's seed."""
    model = f"model={{path: {save('llama', tmp_path / 'base')}, lora: {{r: 4, dropout: 0.3}}}}"
    made = []
    for name in ("one", "two"):
        torch.seed()
        random.seed()
        np.random.seed()
        ctx = run_stage(tiny, "sft", model, "sft.max_steps=2", name=name)
        newest = checkpoints(ctx.run.stage("sft").checkpoints)[-1]
        made.append([file.read_bytes() for file in sorted(newest.glob("*.safetensors"))])
        made[-1].append(json.loads((newest / "state.json").read_text())["content"]["rng"])
    assert len(made[0]) == 3 and made[0] == made[1]


@pytest.mark.parametrize("family", [None, *DROPOUT])
def test_the_loss_at_the_first_update_is_that_of_the_advantage_alone(tiny, tmp_path, monkeypatch, family):
    """h_θ = h_old to the last bit: r = A/β exactly, so the loss of the first micro-batch is a function of A only.
    Whatever drops activations in the families that do would make them differ."""
    sets = ["rl.objective=mse", "rl.micro_batch_tokens=40"]
    if family is not None:
        base = save(family, tmp_path / "base", **DROPOUT[family])
        sets += [f"model={{path: {base}, lora: {{r: 2, dropout: 0.2}}}}", "sft.enabled=false"]
        sets += ["rl.feedback=rule", "rl.baseline=none"]
    seen = []
    real = methods.lco_loss

    def spy(objective, hidden, head, target, *args, **kw):
        seen.append(torch.equal(hidden.detach(), target.old))
        return real(objective, hidden, head, target, *args, **kw)

    monkeypatch.setattr(methods, "lco_loss", spy)
    run_stage(tiny, "rl-mse", *sets)
    assert seen[0], "hidden states of the first update are those that were scored"
    assert not all(seen)


def test_a_prompt_longer_than_the_window_is_left_out_and_counted(tiny, capsys):
    data = tiny.parent / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "1+1"}) + "\n" + json.dumps({"prompt": "9" * 300}) + "\n")
    run_stage(tiny, "rl-kld", f"data.prompts={data}", "rl.guard=off")
    assert "1 of 2 prompts are longer than 256 tokens and are left out" in capsys.readouterr().err


def test_stages_not_in_the_recipe_are_refused_with_the_reason(tiny):
    with start(tiny, "rl.feedback=rule") as ctx, pytest.raises(UsageError, match="feedback is neither dpo"):
        train(ctx, "rm")
