"""Every role gets the weights that the table in ``lco_lite.weights`` says, with adapters and without."""

from __future__ import annotations

import io

import pytest
import torch

from lco_lite import weights
from lco_lite.console import Console
from lco_lite.context import Context
from lco_lite.models.language_model import Role
from lco_lite.recipe.file import load_recipe
from lco_lite.run import Run
from lco_lite.sequences import Example, collate
from lco_lite.train.pipeline import train as train_stage
from tests.models.families import load, save

BATCH = collate([Example([10, 20, 30], [40, 50])], pad_id=0)
KINDS = {"adapters": [], "full fine-tuning": ["model.lora=null"], "a reward model of its own": []}
KINDS["full fine-tuning, by phase"] = ["model.lora=null", "residency=phase"]


@pytest.fixture(params=KINDS)
def ctx(request, tiny, tmp_path):
    base = save("llama", tmp_path / "base")
    sets = [f"model={{path: {base}, lora: {{r: 2}}}}", *KINDS[request.param]]
    if request.param == "a reward model of its own":
        sets.append(f"reward_model={{path: {save('llama', tmp_path / 'other', num_hidden_layers=1)}, lora: {{r: 2}}}}")
    recipe = load_recipe(tiny, sets)
    return Context(Run.open(tmp_path, "run"), recipe, Console(quiet=True), torch.device("cpu"))


def hidden(role: Role) -> torch.Tensor:
    with torch.no_grad():
        return role.hidden(BATCH)


def train(ctx: Context, role: Role, stage: str) -> torch.Tensor:
    """Moves the weights that the stage trains, keeps them in the run, and gives the hidden states of the result."""
    before = hidden(role)
    with torch.no_grad():
        for _, parameter in weights.trainable(ctx, role, stage):
            parameter.add_(0.05)
    weights.save(role, ctx.run.stage(stage), {})
    after = hidden(role)
    assert not torch.equal(before, after)
    return after


def test_what_a_stage_left_is_what_the_next_one_starts_from(ctx):
    trained = train(ctx, weights.open_sft(ctx), "sft")
    start = weights.open_start(ctx)
    assert torch.equal(hidden(start), trained) and torch.equal(hidden(weights.open_stage(ctx, "sft")), trained)

    policy = weights.open_policy(ctx, start)
    assert torch.equal(hidden(policy), trained)
    moved = train(ctx, policy, "rl-kld")
    assert torch.equal(hidden(start), trained), "the policy is a copy"
    assert torch.equal(hidden(weights.open_stage(ctx, "rl-kld")), moved)

    phi, reference = weights.open_untrained_reward_model(ctx, start)
    untrained = hidden(reference)
    assert torch.equal(hidden(phi), untrained)
    assert torch.equal(untrained, trained) == (ctx.recipe.reward_model == "self")
    scored = train(ctx, phi, "rm")
    phi, reference = weights.open_feedback_models(ctx, weights.open_start(ctx))
    assert torch.equal(hidden(phi), scored) and torch.equal(hidden(reference), untrained)
    assert torch.equal(hidden(weights.open_stage(ctx, "rm")), scored)


@pytest.mark.parametrize("feedback", ["logprob", "rule"])
def test_feedback_without_dpo_has_no_reference(ctx, feedback):
    ctx.recipe = ctx.recipe.model_copy(update={"sft": ctx.recipe.sft.model_copy(update={"enabled": False})})
    ctx.recipe = ctx.recipe.model_copy(update={"rl": ctx.recipe.rl.model_copy(update={"feedback": feedback})})
    start = weights.open_start(ctx)
    phi, reference = weights.open_feedback_models(ctx, start)
    assert reference is None
    if feedback == "rule":
        assert phi is None
    elif ctx.recipe.reward_model == "self":
        assert phi is start
    else:
        assert phi.adapter is None and phi.model is not start.model


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_an_adapter_of_a_quantised_base_says_so_where_it_is_saved_and_on_the_screen(tiny, tmp_path, quantization):
    base, screen = save("llama", tmp_path / "base"), io.StringIO()
    recipe = load_recipe(tiny, [f"model={{path: {base}, lora: {{r: 2}}, quantization: {quantization}}}", "sft.lr=0.1"])
    ctx = Context(Run.open(tmp_path, "run"), recipe, Console(stdout=screen), torch.device("cpu"))
    train_stage(ctx, "sft")
    adapter = ctx.run.stage("sft").adapter
    if quantization == "none":
        assert not (adapter / "README.md").exists() and "full-precision" not in screen.getvalue()
        return
    said, stored = (adapter / "README.md").read_text().strip(), {"nf4": "NF4", "int8": "LLM.int8"}[quantization]
    assert f"in {stored} (bitsandbytes). On the full-precision base it answers otherwise" in said
    assert f"sft: {said}" in screen.getvalue()
    full = load(base)
    full.load_adapter("start", adapter)
    assert not torch.allclose(hidden(Role(full, "start")), hidden(weights.open_stage(ctx, "sft")), rtol=1e-3)
