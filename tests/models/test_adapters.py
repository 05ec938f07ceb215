"""Named adapters on one base: switching, copying, saving, and refusing those of another base."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lco_lite.errors import ModelError
from lco_lite.models.loading import byte_tokenizer
from lco_lite.recipe.sections import Lora
from tests.models.families import DROPOUT, load, save

IDS = torch.tensor([[10, 20, 30, 40]])
ONES = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("adapters") / "m")


def hidden(model, name):
    with torch.no_grad(), model.use(name):
        return model.hidden_states(IDS, ONES)


def perturbed(folder, *names):
    model = load(folder)
    for seed, name in enumerate(names):
        model.add_adapter(name, Lora(r=2), seed)
        with torch.no_grad():
            for _, p in model.trainable(name):
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


def test_a_new_adapter_equals_the_base_and_depends_on_its_seed_alone(folder):
    one, two = load(folder), load(folder)
    one.add_adapter("policy", Lora(r=2), seed=7)
    torch.rand(3)
    two.add_adapter("other", Lora(r=2), seed=1)
    two.add_adapter("policy", Lora(r=2), seed=7)
    assert torch.equal(hidden(one, "policy"), hidden(one, None))
    a, b = one.adapter_state("policy"), two.adapter_state("policy")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_use_activates_one_adapter_and_restores_the_one_before_also_after_an_error(folder):
    model = perturbed(folder, "policy", "reward")
    model.activate("policy")
    policy = hidden(model, "policy")
    with pytest.raises(KeyError), model.use("reward"):
        assert model.active == "reward"
        raise KeyError
    assert model.active == "policy"
    assert torch.equal(hidden(model, "policy"), policy)
    assert not torch.equal(hidden(model, "reward"), policy)


def test_only_the_trained_adapter_gets_a_gradient_however_often_others_are_used(folder):
    model = perturbed(folder, "policy", "reward")
    trained = dict(model.trainable("policy"))
    with model.use("reward"), model.use(None):
        pass
    assert all(p.requires_grad for p in trained.values())
    with model.use("policy"):
        model.hidden_states(IDS, ONES).sum().backward()
    with_gradient = {name for name, p in model.base.named_parameters() if p.grad is not None}
    assert len(with_gradient) == len(trained) and all(".policy." in name for name in with_gradient)


def test_a_copy_has_the_same_bits_and_goes_its_own_way(folder):
    model = perturbed(folder, "policy")
    model.copy_adapter("policy", "twin")
    assert torch.equal(hidden(model, "policy"), hidden(model, "twin"))
    with torch.no_grad():
        for _, p in model.trainable("twin"):
            p.add_(1.0)
    assert not torch.equal(hidden(model, "policy"), hidden(model, "twin"))


def test_a_saved_adapter_loads_in_plain_peft_and_here_to_the_same_bits(folder, tmp_path):
    model = perturbed(folder, "policy")
    expected = hidden(model, "policy")
    model.save_adapter("policy", tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(plain.base_model.model.model(IDS, ONES).last_hidden_state, expected)
    again = load(folder)
    again.load_adapter("anything", tmp_path / "adapter")
    assert torch.equal(hidden(again, "anything"), expected)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(folder)


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_an_adapter_of_another_base_is_refused(folder, tmp_path, change):
    perturbed(folder, "policy").save_adapter("policy", tmp_path / "adapter")
    other = load(save("llama", tmp_path / "other", **change))
    with pytest.raises(ModelError, match="of another base"):
        other.load_adapter("policy", tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("own", "refused"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules"),
        ({"trainable_token_indices": {"lm_head": [10]}}, "trainable_token_indices"),
        ({"trainable_token_indices": [10]}, {"qwen2": "trainable_token_indices"}),  # of embeddings, tied or not
        ({"modules_to_save": ["embed_tokens"]}, None),
    ],
)
def test_an_adapter_from_elsewhere_that_changes_the_head_is_refused_and_others_are_the_same_everywhere(
    tmp_path, family, own, refused
):
    """What samples asks the base for logits, what scores and learns asks ``head``."""
    folder = save(family, tmp_path / "m")
    made = get_peft_model(load(folder).base, LoraConfig(r=2, **{"target_modules": ["q_proj"], **own}))
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, made.parameters()):
            p.normal_(generator=torch.Generator().manual_seed(0))
    made.save_pretrained(str(tmp_path / "adapter"))
    model = load(folder)
    if field := refused.get(family) if isinstance(refused, dict) else refused:
        with pytest.raises(ModelError, match=f"adapter_config.json: {field} changes the LM head"):
            model.load_adapter("policy", tmp_path / "adapter")
        return
    model.load_adapter("policy", tmp_path / "adapter")
    with torch.no_grad(), model.use("policy"):
        logits = model.base(input_ids=IDS).logits[0, :, : model.head.rows]
        torch.testing.assert_close(model.head.logits(hidden(model, "policy")[0]), logits)
        torch.testing.assert_close(logits, made.eval()(input_ids=IDS).logits[0, :, : model.head.rows])


def test_damaged_missing_and_pickled_adapters_are_told(folder, tmp_path):
    model = perturbed(folder, "policy")
    with pytest.raises(ModelError, match="adapter_config.json"):
        model.load_adapter("x", tmp_path)
    model.save_adapter("policy", tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged"):
        model.load_adapter("y", tmp_path / "adapter")
    weights.rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        model.load_adapter("z", tmp_path / "adapter")


def test_named_targets_are_used_and_unknown_ones_told(folder):
    model = load(folder)
    model.add_adapter("policy", Lora(r=2, targets=["q_proj", "v_proj"]), 0)
    assert all("q_proj" in name or "v_proj" in name for name, _ in model.trainable("policy"))
    with pytest.raises(ModelError, match="no linear layer named wq; there are: down_proj"):
        model.add_adapter("other", Lora(r=2, targets=["wq"]), 0)


def test_adapters_are_kept_in_fp32_on_a_bf16_base(folder):
    model = load(folder, dtype="bfloat16")
    model.add_adapter("policy", Lora(r=2), 0)
    assert {p.dtype for _, p in model.trainable("policy")} == {torch.float32}
    assert hidden(model, "policy").dtype == torch.bfloat16


@pytest.mark.parametrize("weights", [{}, {"quantization": "nf4"}, {"quantization": "int8"}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scoring_and_training_see_the_same_bits(folder, weights, checkpointing):
    """h_θ = h_old to the last bit before the first update, in every precision, with and without recomputation."""
    model = load(folder, checkpointing, **weights)
    model.add_adapter("policy", Lora(r=2), 0)
    trained = model.trainable("policy")
    with torch.no_grad():
        for _, p in trained:
            p.normal_(std=0.1)
    scored = hidden(model, "policy")
    with model.training_mode(), model.use("policy"):
        now = model.hidden_states(IDS, ONES)
        now.float().square().sum().backward()
    assert torch.equal(now.detach(), scored)
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in trained)


@pytest.mark.parametrize("family", DROPOUT)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_sft_drops_anything_and_an_update_sees_the_function_that_scored(tmp_path, family, checkpointing):
    """The base's own dropout and skipped layers, and the adapter's: none where two passes are compared."""
    model = load(save(family, tmp_path / "m", **DROPOUT[family]), checkpointing)
    model.add_adapter("policy", Lora(r=2, dropout=0.2), 0)
    trained = model.trainable("policy")
    with torch.no_grad():
        for _, p in trained:
            p.normal_(std=0.1)
    scored = hidden(model, "policy")
    assert torch.equal(hidden(model, "policy"), scored), "a new adapter drops nothing in rollouts and scores"
    gradients = []
    for recomputes in (checkpointing, False):
        model.checkpointing = recomputes
        with model.training_mode(), model.use("policy"):
            now = model.hidden_states(IDS, ONES)
            now.square().sum().backward()
        assert torch.equal(now.detach(), scored)
        gradients.append([p.grad for _, p in trained])
        model.base.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))
    model.checkpointing = checkpointing
    with model.training_mode(dropout=True), model.use("policy"):
        now = model.hidden_states(IDS, ONES)
        now.square().sum().backward()
    assert not torch.equal(now.detach(), scored), "as configured"
    assert torch.equal(hidden(model, "policy"), scored)


def test_recomputing_keeps_fewer_activations(folder):
    kept = []
    for checkpointing in (False, True):
        model, sizes = load(folder, checkpointing), list[int]()
        model.trainable_full(freeze_head=True)
        with (
            model.training_mode(),
            torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x),
        ):
            model.hidden_states(IDS, ONES)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_4_bit_layers_pass_the_gradient_on_after_scoring(tmp_path):
    """Whole blocks and no biases: such layers bitsandbytes repacks on some CPUs, and their gradient is lost unsaid."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **size)).save_pretrained(tmp_path)
    byte_tokenizer(64).save_pretrained(tmp_path)
    model = load(tmp_path, quantization="nf4")
    hidden(model, None)
    layers = [m for m in model.base.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 7
    for layer in layers:
        x = torch.randn(2, layer.in_features, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None and x.grad.any()


def test_recomputing_activations_changes_no_gradient_and_ends_with_the_block(folder):
    gradients = []
    for checkpointing in (False, True):
        model = load(folder, checkpointing)
        model.add_adapter("policy", Lora(r=2), 0)
        trained = model.trainable("policy")
        with model.training_mode(), model.use("policy"):
            model.hidden_states(IDS, ONES).square().sum().backward()
        gradients.append([p.grad for _, p in trained])
        assert not model.base.training and not any("forward" in vars(m) for m in model.base.modules())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_of_code_that_came_with_the_weights_blocks_are_recomputed_however_many_experts_one_has(folder, monkeypatch):
    model = load(folder)
    for block in (blocks := model.decoder.layers):
        block.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(len(blocks) + 1))
    monkeypatch.setattr("lco_lite.models.language_model.GradientCheckpointingLayer", type(None))
    assert model._blocks() == list(blocks)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_head_is_never_quantised_tied_or_not(tmp_path, family):
    for quantization in ("nf4", "int8"):
        model = load(save(family, tmp_path / family / quantization), quantization=quantization)
        assert model.head.weight.dtype == torch.float32
        assert (
            "bnb" in type(model.decoder.layers[0].mlp.up_proj).__module__
            or "bitsandbytes" in type(model.decoder.layers[0].mlp.up_proj).__module__
        )


def test_full_fine_tuning_freezes_the_head_and_what_is_tied_to_it(tmp_path):
    untied, tied = load(save("llama", tmp_path / "u")), load(save("qwen2", tmp_path / "t"))
    names = [name for name, _ in untied.trainable_full(freeze_head=True)]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    assert "model.embed_tokens.weight" not in [name for name, _ in tied.trainable_full(freeze_head=True)]
    assert not untied.head.is_trained
    assert "lm_head.weight" in [name for name, _ in untied.trainable_full(freeze_head=False)]
    assert untied.head.is_trained
