"""Both engines: the distribution they sample from, where responses end, and that batching changes nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.models.loading import build_scratch, load_base, load_tokenizer
from lco_lite.objectives.reference import optimal_logits
from lco_lite.recipe.sections import Init, Lora, Model
from lco_lite.rollout.engine import (
    Response,
    Sampling,
    StopStrings,
    before_stop,
    finished,
    in_order,
    left_padded,
    open_engine,
)
from lco_lite.rollout.lockstep import draw, mixture, optimal_policy
from lco_lite.sequences import Example, seeded
from tests.models.families import load, save

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
GREEDY = Sampling(temperature=0, top_p=1.0, max_new_tokens=6, batch=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("engines") / "model"
    build_scratch(Init(hidden_size=16, layers=1, heads=2, intermediate_size=16, std=0.3), folder, seed=1)
    weights = Model(path=str(folder))
    model = LanguageModel(load_base(weights, torch.device("cpu")), load_tokenizer(weights))
    for seed, name in enumerate(("reward", "reference")):
        model.add_adapter(name, Lora(r=2), seed)
        with torch.no_grad():
            for _, p in model.trainable(name):
                p.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
    model.activate(None)
    return model


def logits(role: Role, ids: list[int]) -> torch.Tensor:
    with torch.no_grad(), role.model.use(role.adapter):
        return role.model.base(input_ids=torch.tensor([ids])).logits[0, -1]


def test_left_padding_ends_every_prompt_in_the_same_column():
    ids, mask = left_padded(PROMPTS, 0)
    assert ids.tolist() == [[0, 0, 10, 11, 12], [0, 0, 0, 0, 20], [30, 31, 32, 33, 34]]
    assert mask.sum(1).tolist() == [3, 1, 5]


def test_a_response_ends_with_its_first_stop_token_or_is_truncated():
    assert finished([1], [5, 3, 0, 0], {3}) == finished([1], [5, 3], {3})
    assert finished([1], [5, 3, 0], {3}).example == Example([1], [5, 3])
    assert finished([1], [5, 6], {3}).truncated


@pytest.mark.parametrize("combine", [None, lambda z: z[0]], ids=["hf", "lockstep"])
def test_a_response_ends_where_a_stop_string_is_complete(model, combine):
    """Told from what the same model says without them: every response is cut at the token that completes a string."""
    engine, tokenizer = open_engine([Role(model)], 3, combine), model.tokenizer
    free = Sampling(temperature=0, top_p=1.0, max_new_tokens=24, batch=3)
    whole = [r.example.response for r in in_order(engine.generate(PROMPTS, free))]
    stops = ("never said", tokenizer.decode(whole[0][5:8]), tokenizer.decode(whole[2][1:3]))
    made = in_order(engine.generate(PROMPTS, replace(free, stop=stops)))
    lengths = []
    for ids, response in zip(whole, made, strict=True):
        n = next((n for n in range(len(ids)) if any(s in tokenizer.decode(ids[:n]) for s in stops)), len(ids))
        lengths.append(n)
        assert response.example.response == ids[:n]
        assert response.truncated == (n == 24)
        assert not any(s in before_stop(tokenizer.decode(ids[:n]), stops) for s in stops)
    assert lengths[0] <= 8 and lengths[2] <= 3 and len(set(lengths)) > 1, "they end apart, and the batch goes on"


@pytest.mark.parametrize("combine", [None, lambda z: z[0]], ids=["hf", "lockstep"])
def test_a_stop_string_that_begins_in_the_prompt_ends_nothing(model, combine):
    engine = open_engine([Role(model)], 3, combine)
    first = in_order(engine.generate(PROMPTS[:1], GREEDY))[0].example.response
    across = model.tokenizer.decode([PROMPTS[0][-1], first[0]])
    assert across not in model.tokenizer.decode(first)
    assert in_order(engine.generate(PROMPTS[:1], replace(GREEDY, stop=(across,))))[0].example.response == first


def test_a_stop_string_is_seen_whichever_tokens_spell_it():
    """Tokens longer and shorter than the string, a letter of several bytes, and a padding that follows the end."""
    spelt = {
        0: b"",
        1: b"so ",
        2: "\u00e9".encode()[:1],
        3: "\u00e9".encode()[1:],
        4: b"Question: What",
        5: b"\n",
        6: b"\n\n",
        7: b"</s>",
    }
    tokenizer = SimpleNamespace(decode=lambda ids: b"".join(spelt[i] for i in ids).decode(errors="replace"))
    for stop, ids, end in (
        ("Question:", [1, 4, 0, 0], 2),
        ("\n\n", [1, 5, 5, 0], 3),
        ("\n\n", [5, 1, 6, 1], 3),
        ("\u00e9", [1, 2, 3, 0], 3),
        ("o \u00e9\n", [1, 2, 3, 5, 0], 4),
    ):
        strings = StopStrings(tokenizer, (stop,))
        assert [strings.reached(torch.tensor([ids[: n + 1]])).item() for n in range(end)] == [False] * (end - 1) + [
            True
        ]
        assert finished([9], ids, {7}, strings) == Response(Example([9], ids[:end]), truncated=False)
    assert finished([9], [1, 7, 4], {7}, StopStrings(tokenizer, ("Question:",))).example.response == [1, 7]


def test_the_text_ends_before_the_first_of_the_stop_strings():
    assert before_stop("a\n\nQ: b", ("Q:", "\n\n")) == "a"
    assert before_stop("a", ("Q:",)) == before_stop("a", ()) == "a"


def test_greedy_decoding_takes_the_likeliest_token_of_a_plain_forward_pass(model):
    for engine in (open_engine([Role(model)], 3), open_engine([Role(model)], 3, lambda z: z[0])):
        for prompt, response in zip(PROMPTS, in_order(engine.generate(PROMPTS, GREEDY)), strict=True):
            ids = list(prompt)
            for token in response.example.response:
                assert token == logits(Role(model), ids).argmax().item()
                ids.append(token)


@pytest.mark.parametrize("greedy", [True, False])
def test_rows_that_pad_the_head_are_never_drawn(tmp_path, greedy):
    padded = load(save("llama", tmp_path / "m", vocab_size=400))
    assert padded.head.rows == 260 and padded.head.weight.shape[0] == 400
    sampling = GREEDY if greedy else Sampling(1.0, 1.0, 30, 3)
    for rows, engine in (
        (260, open_engine([Role(padded)], 3)),
        (200, open_engine([Role(padded)], 3, rows=200)),
        (260, open_engine([Role(padded)], 3, lambda z: z[0])),
    ):
        drawn = [i for r in in_order(engine.generate(PROMPTS, sampling)) for i in r.example.response]
        assert max(drawn) < rows, "an id past the tokenizer's tokens has neither text nor a row in the losses"


def test_an_adapter_is_sampled_from_only_through_its_role(model):
    plain = in_order(open_engine([Role(model)], 3).generate(PROMPTS, GREEDY))
    adapted = in_order(open_engine([Role(model, "reward")], 3).generate(PROMPTS, GREEDY))
    assert plain != adapted
    assert in_order(open_engine([Role(model)], 3).generate(PROMPTS, GREEDY)) == plain
    assert model.active is None


def test_decoding_from_the_optimal_policy_is_exact_against_enumeration(model):
    """Next-token frequencies under the engine are softmax(z_old + A/β) of the reference, for β below and above 1."""
    roles = [Role(model), Role(model, "reward"), Role(model, "reference")]
    for beta in (0.5, 2.0):
        engine = open_engine(roles, 3, optimal_policy(beta))
        ids = PROMPTS[0]
        z, z_dpo, z_ref = (logits(role, ids) for role in roles)
        exact = optimal_logits(z, z_dpo.log_softmax(-1) - z_ref.log_softmax(-1), beta).softmax(-1)
        drawn = torch.zeros_like(exact)
        with seeded(0, "draws"):
            one = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1, batch=2000)
            for response in in_order(engine.generate([ids] * 4000, one)):
                drawn[response.example.response[0]] += 1 / 4000
        assert (drawn - exact).abs().sum() < 4 * (exact * (1 - exact) / 4000).sqrt().sum()
        greedy = in_order(engine.generate([ids], GREEDY))[0].example.response
        assert greedy[0] == exact.argmax().item()


def test_the_caches_of_a_lockstep_follow_the_tokens_that_were_chosen(model):
    roles = [Role(model), Role(model, "reward"), Role(model, "reference")]
    response = in_order(open_engine(roles, 3, optimal_policy(1.0)).generate(PROMPTS, GREEDY))[2].example
    ids = list(response.prompt)
    for token in response.response:
        z, z_dpo, z_ref = (logits(role, ids) for role in roles)
        assert token == optimal_logits(z, z_dpo.log_softmax(-1) - z_ref.log_softmax(-1), 1.0).argmax().item()
        ids.append(token)


def test_a_mixture_is_the_weighted_mean_of_the_distributions():
    z = torch.randn(2, 3, 7)
    mixed = mixture(0.25)([z[0], z[1]]).exp()
    torch.testing.assert_close(mixed, 0.75 * z[0].softmax(-1) + 0.25 * z[1].softmax(-1))


def test_a_mixture_at_a_temperature_is_of_what_each_would_sample_at_it(model):
    """The weight of MiniLLM is π_T/(α φ_T + (1−α) π_T): that is the distribution that the engine draws from."""
    roles, ids = [Role(model), Role(model, "reward")], PROMPTS[0]
    policy, teacher = ((logits(role, ids) / 0.4).softmax(-1) for role in roles)
    exact, drawn = 0.5 * teacher + 0.5 * policy, torch.zeros_like(policy)
    sampling = Sampling(temperature=0.4, top_p=1.0, max_new_tokens=1, batch=2000)
    with seeded(0, "draws"):
        for response in in_order(open_engine(roles, 3, mixture(0.5)).generate([ids] * 4000, sampling)):
            drawn[response.example.response[0]] += 1 / 4000
    at_one = torch.stack([logits(role, ids).softmax(-1) for role in roles]).mean(0).pow(1 / 0.4)
    assert (drawn - exact).abs().sum() < 4 * (exact * (1 - exact) / 4000).sqrt().sum()
    assert (at_one / at_one.sum() - exact).abs().sum() > 0.02, "to sharpen the mixture is another distribution"


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    with seeded(0, "nucleus"):
        tokens = draw(z, Sampling(temperature=1.0, top_p=0.75, max_new_tokens=1, batch=1))
    assert set(tokens.tolist()) == {0, 1}
    assert (tokens == 0).float().mean().item() == pytest.approx(0.625, abs=0.05)


def test_the_same_seed_gives_the_same_responses_and_leaves_other_draws_alone(model):
    sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=5, batch=2)
    before = torch.get_rng_state()
    with seeded(3, "rollout", 1):
        one = in_order(open_engine([Role(model)], 3).generate(PROMPTS, sampling))
    with seeded(3, "rollout", 1):
        two = in_order(open_engine([Role(model)], 3).generate(PROMPTS, sampling))
    with seeded(3, "rollout", 2):
        other = in_order(open_engine([Role(model)], 3).generate(PROMPTS, sampling))
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), before)
