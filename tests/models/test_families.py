"""Heads and hidden states are found by structure in every family, and proved."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from lco_lite.errors import ModelError
from lco_lite.models.language_model import head_of, prove_head
from lco_lite.models.loading import byte_tokenizer
from lco_lite.recipe.sections import Lora
from tests.models.families import FAMILIES, config, load, save

IDS = torch.tensor([[10, 20, 30, 40, 50], [60, 70, 80, 90, 100]])
ONES = torch.ones_like(IDS)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return load(save(request.param, tmp_path_factory.mktemp(request.param) / "m"))


def test_the_head_of_the_hidden_states_gives_the_models_own_logits(model):
    with torch.no_grad():
        logits = model.base(input_ids=IDS, attention_mask=ONES).logits[..., : model.head.rows]
        ours = model.head.logits(model.hidden_states(IDS, ONES).flatten(0, 1))
    assert model.head.rows < 264, "rows past the tokenizer's tokens pad the matrix"
    torch.testing.assert_close(ours, logits.flatten(0, 1).float(), rtol=1e-4, atol=1e-4)


def test_left_and_right_padding_give_the_same_hidden_states(model):
    pad = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        plain = model.hidden_states(IDS, ONES)
        left = model.hidden_states(torch.cat([pad, IDS], 1), torch.cat([pad, ONES], 1))[:, 3:]
        right = model.hidden_states(torch.cat([IDS, pad], 1), torch.cat([ONES, pad], 1))[:, :5]
    torch.testing.assert_close(left, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, plain, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_all_linear_layers_leaves_head_and_vision_alone(model):
    before = model.hidden_states(IDS, ONES).detach()
    model.add_adapter("tuned", Lora(r=2), seed=0)
    trained = model.trainable("tuned")
    assert trained and not any("lm_head" in name or "vision" in name for name, _ in trained)
    with torch.no_grad():
        for _, p in trained:
            p.normal_(std=0.3)
    with model.use("tuned"):
        hidden = model.hidden_states(IDS, ONES)
        hidden.square().sum().backward()
        assert not torch.allclose(hidden, before)
    assert all(p.grad is not None for _, p in trained)
    with model.use(None), torch.no_grad():
        assert torch.equal(model.hidden_states(IDS, ONES), before)


def test_scale_and_soft_cap_are_found(tmp_path):
    assert load(save("granite", tmp_path / "g")).head.scale == 0.25
    assert load(save("cohere", tmp_path / "c")).head.scale == 0.25
    assert load(save("gemma2", tmp_path / "g2")).head.softcap == 3.0


def test_a_head_that_does_something_else_is_refused_by_name(tmp_path):
    model = load(save("llama", tmp_path / "m"))
    real = model.base.forward

    def squared(*args, **kw):
        out = real(*args, **kw)
        out.logits = out.logits * out.logits
        return out

    model.base.forward = squared
    with pytest.raises(ModelError, match="LlamaForCausalLM.*not supported"):
        prove_head(model.base, head_of(model.base))


def test_a_model_without_a_language_head_is_refused(tmp_path):
    made = tf.BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ModelError, match="Bert"):
        head_of(tf.BertModel(made))


@pytest.mark.parametrize("kind", [tf.T5ForConditionalGeneration, tf.BartForConditionalGeneration])
def test_an_encoder_decoder_is_refused_by_name(tmp_path, kind):
    sizes = {"vocab_size": 264, "d_model": 8, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    layers = {"num_layers": 1, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    layers |= {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    kind(kind.config_class(**sizes, **layers)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{kind.__name__} is no causal language model: it is not supported"):
        load(tmp_path)


def test_a_model_that_sees_its_padding_is_refused_by_name(tmp_path):
    sizes = {"vocab_size": 264, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}
    tf.RwkvForCausalLM(tf.RwkvConfig(**sizes)).save_pretrained(tmp_path)
    byte_tokenizer(64).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="RwkvForCausalLM: padding on the left changes its hidden states"):
        load(tmp_path)


def test_a_state_space_model_is_proved_like_any_other(tmp_path):
    sizes = {"vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    tf.MambaForCausalLM(tf.MambaConfig(**sizes)).save_pretrained(tmp_path)
    byte_tokenizer(64).save_pretrained(tmp_path)
    assert load(tmp_path).head.rows == 260


def test_a_classifier_is_not_taken_for_a_language_model_with_a_random_head(tmp_path):
    tf.LlamaForSequenceClassification(config("llama")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification, and lacks 1 weights.*lm_head\.weight"):
        load(tmp_path)
