"""The engines: the distribution they sample from, where responses end, and that batching changes nothing."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from lco_lite.errors import ModelError
from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.models.loading import build_scratch, byte_tokenizer, load_base, load_tokenizer
from lco_lite.objectives.reference import optimal_logits
from lco_lite.recipe.sections import Init, Lora, Model, Rollout
from lco_lite.rollout import hf, paged
from lco_lite.rollout.engine import (
    Engine,
    Response,
    Sampling,
    StopStrings,
    before_stop,
    engine_for,
    finished,
    in_order,
    left_padded,
    open_engine,
)
from lco_lite.rollout.hf import HFEngine
from lco_lite.rollout.lockstep import draw, mixture, optimal_policy
from lco_lite.rollout.paged import Way
from lco_lite.sequences import Example, seeded
from tests.models.families import COMMON, FAMILIES, load, save

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
GREEDY = Sampling(temperature=0, top_p=1.0, max_new_tokens=6, batch=2)
ENGINES = ("hf", "paged", "lockstep")


def opened(kind: str, role: Role, rows: int | None = None) -> Engine:
    if kind == "lockstep":
        return open_engine([role], 3, lambda z: z[0], rows)
    return open_engine([role], 3, rows=rows, settings=Rollout(engine=kind))


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


@pytest.mark.parametrize("kind", ENGINES)
def test_a_batch_under_way_tells_how_far_it_is(model, kind, monkeypatch):
    """Token by token; paged, whose loop is another thread's, whenever it is looked at."""
    if kind == "paged":
        real = ContinuousBatchingManager.get_result
        monkeypatch.setattr(ContinuousBatchingManager, "get_result", lambda self, **kw: real(self, timeout=1e-3))
    told = list[float]()
    sampling = Sampling(temperature=0, top_p=1.0, max_new_tokens=32, batch=16, tell=told.append)
    in_order(opened(kind, Role(model)).generate(MIXED, sampling))
    assert told == sorted(told) and 0 <= told[0] < 0.5 < told[-1] <= 1
    assert len(set(told)) > 3, "and not only when responses are there"


@pytest.mark.parametrize("kind", ENGINES)
def test_a_response_ends_where_a_stop_string_is_complete(model, kind):
    """Told from what the same model says without them: every response is cut at the token that completes a string."""
    engine, tokenizer = opened(kind, Role(model)), model.tokenizer
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


@pytest.mark.parametrize("kind", ENGINES)
def test_a_stop_string_that_begins_in_the_prompt_ends_nothing(model, kind):
    engine = opened(kind, Role(model))
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
    for engine in (opened(kind, Role(model)) for kind in ENGINES):
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
        (260, opened("hf", Role(padded))),
        (200, opened("hf", Role(padded), rows=200)),
        (260, opened("paged", Role(padded))),
        (200, opened("paged", Role(padded), rows=200)),
        (260, opened("lockstep", Role(padded))),
    ):
        drawn = [i for r in in_order(engine.generate(PROMPTS, sampling)) for i in r.example.response]
        assert max(drawn) < rows, "an id past the tokenizer's tokens has neither text nor a row in the losses"


@pytest.mark.parametrize("kind", ENGINES)
def test_an_adapter_is_sampled_from_only_through_its_role(model, kind):
    plain = in_order(opened(kind, Role(model)).generate(PROMPTS, GREEDY))
    adapted = in_order(opened(kind, Role(model, "reward")).generate(PROMPTS, GREEDY))
    assert plain != adapted
    assert in_order(opened(kind, Role(model)).generate(PROMPTS, GREEDY)) == plain
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


class HostReads(TorchDispatchMode):
    """Counts how often a number is taken off the device: what a GPU is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_lockstep_waits_for_no_token_and_ends_alike_however_seldom_it_looks(model):
    roles = [Role(model), Role(model, "reward"), Role(model, "reference")]
    engine, long = open_engine(roles, 3, optimal_policy(1.0)), replace(GREEDY, max_new_tokens=24, batch=3)
    assert engine.look_every == 1, "on a CPU looking costs nothing, and nothing is made in vain"
    plain = in_order(engine.generate(PROMPTS, long))
    early = Counter(r.example.response[-1] for r in plain).most_common(1)[0][0]
    reads, made = {}, {}
    for every in (1, 8, 24):
        engine.look_every = every
        with HostReads() as mode:
            assert in_order(engine.generate(PROMPTS, long)) == plain
        reads[every] = mode.count
        other = open_engine(roles, early, optimal_policy(1.0))
        other.look_every = every
        made[every] = in_order(other.generate(PROMPTS, long))
    assert all(r.truncated for r in plain) and [reads[1] - reads[n] for n in (8, 24)] == [24 - 3, 24 - 1]
    assert made[1] == made[8] == made[24] != plain


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


@pytest.mark.parametrize("kind", ENGINES)
def test_the_same_seed_gives_the_same_responses_and_leaves_other_draws_alone(model, kind):
    sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=5, batch=2)
    before = torch.get_rng_state()
    with seeded(3, "rollout", 1):
        one = in_order(opened(kind, Role(model)).generate(PROMPTS, sampling))
    with seeded(3, "rollout", 1):
        two = in_order(opened(kind, Role(model)).generate(PROMPTS, sampling))
    with seeded(3, "rollout", 2):
        other = in_order(opened(kind, Role(model)).generate(PROMPTS, sampling))
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), before)


# generate, whose batch shrinks

MIXED = [[10 + (i * 7 + k) % 200 for k in range(1 + i * 5 % 17)] for i in range(16)]


class Whole(HFEngine):
    """As transformers has it: a row that has ended stays until all have."""

    shrinks_from = 10**9


class Always(HFEngine):
    shrinks_from = 2


def ends_apart(role: Role, sampling: Sampling) -> set[int]:
    """Stop tokens with which they have unlike lengths, at least three in four short of the limit: of each in turn the
    token that comes first in it at the latest place."""
    whole = [r.example.response for r in in_order(Whole(role, 3, role.model.head.rows).generate(MIXED, sampling))]
    stops = set[int]()
    for ids in whole:
        if sum(not stops & set(other) for other in whole) <= len(MIXED) // 4:
            break
        stops.add(max(ids, key=ids.index))
    return stops


def whole_and_shrunk(role: Role, sampling: Sampling, monkeypatch) -> list[list[Response]]:
    """What both make of ``MIXED``, where the rows of each call of generate are at most half of those before."""
    stops, rows, made = ends_apart(role, replace(sampling, stop=())), [], []
    real = role.model.base.generate
    for kind in (Whole, Always):
        engine = kind(role, 3, role.model.head.rows)
        engine.stop_ids = stops
        rows.clear()
        with monkeypatch.context() as patch:
            patch.setattr(role.model.base, "generate", lambda **kw: rows.append(len(kw["input_ids"])) or real(**kw))
            made.append(in_order(engine.generate(MIXED, sampling)))
    assert len({len(r.example.response) for r in made[0]}) > 1, "they end apart"
    assert rows[0] == len(MIXED) and len(rows) > 1 and all(after <= before // 2 for before, after in pairwise(rows))
    return made


LONG = Sampling(temperature=0, top_p=1.0, max_new_tokens=30, batch=16)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gemma3-vision", "mistral3", "opt", "gpt_neox"])
def test_a_batch_that_shrinks_makes_the_tokens_of_one_that_does_not(tmp_path, monkeypatch, family):
    """Past the sliding window of 16 of those that have one."""
    made = whole_and_shrunk(Role(load(save(family, tmp_path / "m"))), LONG, monkeypatch)
    assert made[0] == made[1]


def test_adapters_and_stop_strings_shrink_alike(model, monkeypatch):
    for name in (None, "reward", "reference"):
        made = whole_and_shrunk(Role(model, name), LONG, monkeypatch)
        assert made[0] == made[1]
        text = model.tokenizer.decode(max((r.example.response for r in made[0]), key=len)[-2:])
        made = whole_and_shrunk(Role(model, name), replace(LONG, stop=(text, "never said")), monkeypatch)
        assert made[0] == made[1]
    assert model.active is None


@pytest.mark.parametrize("kind", ["linear and full attention", "static", "the model's own"])
def test_a_cache_of_another_kind_goes_along_or_is_made_again(tmp_path, monkeypatch, kind):
    """States of linear attention are selected with the keys; of one without keys, or with a fixed number of rows, the
    tokens are read again."""
    if kind != "linear and full attention":
        model = load(save("gemma3", tmp_path / "m"))
        model.base.generation_config.cache_implementation = "static" if kind == "static" else None
    else:
        layers = ["linear_attention", "full_attention"]
        tiny = {"head_dim": 8, "layer_types": layers, "num_experts": 0, "linear_num_value_heads": 2}
        tiny |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        made = transformers.Qwen3NextConfig(**{**COMMON, **tiny})
        torch.manual_seed(0)
        base = transformers.Qwen3NextForCausalLM(made).eval()
        with torch.no_grad():
            for p in base.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.2)
        model = LanguageModel(base, byte_tokenizer(128))
    calls, real = [], hf.only

    def only(cache, rows):
        calls.append(real(None if kind == "the model's own" else cache, rows))
        return calls[-1]

    monkeypatch.setattr(hf, "only", only)
    made = whole_and_shrunk(Role(model), LONG, monkeypatch)
    assert made[0] == made[1]
    assert {cache is not None for cache in calls} == {kind == "linear and full attention"}


def test_a_batch_too_small_to_gain_does_not_shrink(model, monkeypatch):
    rows, real = [], model.base.generate
    monkeypatch.setattr(model.base, "generate", lambda **kw: rows.append(len(kw["input_ids"])) or real(**kw))
    role = Role(model)
    stops = ends_apart(role, LONG)
    rows.clear()
    engine = HFEngine(role, 3, model.head.rows)
    engine.stop_ids = stops
    in_order(engine.generate(MIXED, LONG))
    assert rows[0] == 16 and min(rows[:-1]) >= HFEngine.shrinks_from > 2


# continuous batching


def test_of_auto_a_gpu_of_capability_8_samples_in_pages_and_the_rest_by_generate(monkeypatch):
    for capability, kind in (((7, 5), "hf"), ((8, 0), "paged"), ((9, 0), "paged")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert engine_for("auto", torch.device("cuda")) == kind
        assert engine_for("hf", torch.device("cuda")) == "hf"
    assert engine_for("auto", torch.device("cpu")) == "hf"
    assert engine_for("paged", torch.device("cpu")) == "paged"


def test_paged_greedy_is_that_of_generate_whoever_ends_first(model):
    """Base and adapters in turn, five slots for sixteen prompts; some responses end early."""
    for name in (None, "reward", "reference", "reward", None):
        long = Sampling(temperature=0, top_p=1.0, max_new_tokens=40, batch=5)
        plain = in_order(opened("hf", Role(model, name)).generate(MIXED, long))
        ends = Counter(r.example.response[-1] for r in plain).most_common(1)[0][0]  # a token that some of them reach
        made = [
            in_order(open_engine([Role(model, name)], ends, settings=Rollout(engine=asked)).generate(MIXED, long))
            for asked in ("hf", "paged")
        ]
        assert made[0] == made[1]
        assert len({len(r.example.response) for r in made[1]}) > 1, "they end apart"


def test_a_cache_for_two_of_sixteen_responses_changes_no_token(model, monkeypatch):
    monkeypatch.setattr(paged, "PAGE", 8)  # up to 41 tokens of prompt and response: six pages each
    engine = opened("paged", Role(model))
    sampled, passes = engine._config(replace(GREEDY, max_new_tokens=24)), []
    real = model.base.forward
    monkeypatch.setattr(model.base, "forward", lambda **kw: passes.append(kw["input_ids"].shape[1]) or real(**kw))
    wide = paged.run(model, MIXED, sampled, 16, 0, Way())
    ample = len(passes)
    tight = paged.run(model, MIXED, sampled, 16, 0, Way(), pages=12)
    assert tight == wide
    assert len(passes) - ample > 2 * ample, "in a small cache few of them go on at once"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sampled_from_in_pages_as_by_generate(tmp_path, family):
    role = Role(load(save(family, tmp_path / "m")))
    long = replace(GREEDY, max_new_tokens=20, batch=3)  # past the sliding window of 16 of those that have one
    made = [in_order(opened(kind, role).generate(MIXED[:8], long)) for kind in ("hf", "paged")]
    assert made[0] == made[1]


def test_greedy_is_the_same_on_nf4_in_pages_and_in_a_batch_that_shrinks(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    build_scratch(Init(hidden_size=64, layers=2, heads=2, intermediate_size=128, std=0.3), tmp_path / "m", seed=1)
    weights = Model(path=str(tmp_path / "m"), quantization="nf4")
    model = LanguageModel(load_base(weights, torch.device("cpu")), load_tokenizer(weights))
    model.add_adapter("policy", Lora(r=2), 0)
    with torch.no_grad():
        for _, p in model.trainable("policy"):
            p.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    for name in (None, "policy"):
        made = [in_order(opened(k, Role(model, name)).generate(MIXED, GREEDY)) for k in ("hf", "paged")]
        assert made[0] == made[1]
        made = whole_and_shrunk(Role(model, name), replace(LONG, max_new_tokens=12), monkeypatch)
        assert made[0] == made[1]


@pytest.mark.parametrize("kind", ["hf", "paged"])
def test_samples_have_the_distribution_at_temperature_and_nucleus(model, kind):
    """chi-squared of both tokens of 4,000 responses against the product of plain forward passes. More than half end
    with the first, so that of ``hf`` the second is of a batch that has shrunk."""
    role, prompt, n = Role(model), PROMPTS[0], 4000

    def exact(ids: list[int]) -> torch.Tensor:
        p = (logits(role, ids) / 0.5).softmax(-1)
        order = p.argsort(descending=True)
        kept = order[: int((p[order].cumsum(0) < 0.4).sum()) + 1]
        return torch.zeros_like(p).index_copy(0, kept, p[kept] / p[kept].sum())

    first = exact(prompt)
    order = first.argsort(descending=True).tolist()
    ends = {3, *order[: int((first[order].cumsum(0) < 0.5).sum()) + 1]}  # half of the responses and more
    expected = {
        (a, b): n * first[a].item() * p
        for a in first.nonzero().flatten().tolist()
        for b, p in (enumerate(exact([*prompt, a]).tolist()) if a not in ends else [(-1, 1.0)])
        if p > 0
    }
    with seeded(0, "draws"):
        sampling = Sampling(temperature=0.5, top_p=0.4, max_new_tokens=2, batch=1000)
        engine = opened(kind, role)
        engine.stop_ids = ends
        made = in_order(engine.generate([prompt] * n, sampling))
    drawn = Counter(tuple([*r.example.response, -1][:2]) for r in made)
    assert set(drawn) <= set(expected), "nothing outside the nucleus"
    cells = [cell for cell, mean in expected.items() if mean >= 5]
    rest = n - sum(expected[c] for c in cells), n - sum(drawn[c] for c in cells)
    chi = sum((drawn[c] - expected[c]) ** 2 / expected[c] for c in cells) + (rest[1] - rest[0]) ** 2 / max(rest[0], 5)
    assert len(cells) > 8
    assert chi < len(cells) + 4 * (2 * len(cells)) ** 0.5


def test_batches_ahead_have_random_numbers_of_their_own_and_go_on_from_a_kept_state(model):
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8, batch=1)
    engine = opened("paged", Role(model))
    with seeded(0, "draws"):
        whole = list(engine.generate([[7, 8]] * 8, sampling))
    assert [places for places, _ in whole] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert whole[0][1] != whole[1][1]
    with seeded(0, "draws"):
        next(engine.generate([[7, 8]] * 8, sampling))
        (later,) = engine.generate([[7, 8]] * 4, sampling)
    assert later[1] == whole[1][1]


def injected(error: BaseException):
    def forward(*args, **kw):
        raise error

    return forward


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ZeroDivisionError("boom")])
def test_what_goes_wrong_in_the_thread_is_raised_where_samples_are_asked_for(model, monkeypatch, error):
    engine, before = opened("paged", Role(model, "reward")), threading.active_count()
    with monkeypatch.context() as patch, pytest.raises(type(error), match=str(error)):
        patch.setattr(model.base, "forward", injected(error))
        in_order(engine.generate(PROMPTS, GREEDY))
    assert threading.active_count() == before and model.active is None
    assert in_order(engine.generate(PROMPTS, GREEDY)) == in_order(
        opened("hf", Role(model, "reward")).generate(PROMPTS, GREEDY)
    )


def test_a_cache_that_does_not_fit_is_out_of_memory_and_says_what_it_is_for(model):
    engine = opened("paged", Role(model))
    huge = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=2**36, batch=3)
    with pytest.raises(torch.OutOfMemoryError, match=r"3 responses of up to 68719476741 tokens at once.* do not fit"):
        in_order(engine.generate(PROMPTS, huge))
    assert in_order(engine.generate(PROMPTS, GREEDY))


def test_whoever_stops_in_the_middle_leaves_no_thread_adapter_or_attention_behind(model, monkeypatch):
    engine, before, calls = opened("paged", Role(model, "reward")), threading.active_count(), []
    attention, state = model.base.config._attn_implementation, torch.get_rng_state()
    real = ContinuousBatchingManager.get_result

    def get_result(self, *args, **kw):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kw)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ContinuousBatchingManager, "get_result", get_result)
        paged.run(model, MIXED, engine._config(replace(GREEDY, max_new_tokens=100)), 2, 0, Way())
    assert threading.active_count() == before and not calls[0].is_running() and calls[0].batch_processor is None
    assert model.base.config._attn_implementation == attention and model.active is None
    assert torch.equal(torch.get_rng_state(), state)
    started = engine.generate(MIXED * 4, GREEDY)
    next(started)
    started.close()
    assert threading.active_count() == before and model.active is None


# the ways of attention


def kernel_on_cpu(align_ends: bool):
    """What torch's kernel computes, sequence by sequence: the last query sees the last key."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        made = torch.zeros_like(q)
        for a, b, c, d in zip(
            *(ends for cu in (cu_q, cu_k) for ends in (cu[:-1].tolist(), cu[1:].tolist())), strict=True
        ):
            query, key = torch.arange(b - a).unsqueeze(1), torch.arange(d - c)
            query = query + (d - c) - (b - a) if align_ends else query
            seen = (key <= query) & ((key >= query - window_size[0]) | (window_size[0] < 0))
            states = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            out = torch.nn.functional.scaled_dot_product_attention(
                *states, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
            )
            made[a:b] = out[0].transpose(0, 1)
        return made

    return varlen_attn


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_torchs_own_kernel_is_taken_where_it_is_right(tmp_path, monkeypatch, family):
    """Emulated on a CPU: grouped heads, a sliding window, prompts and single tokens in one pass."""
    import torch.nn.attention.varlen

    model, said = load(save(family, tmp_path / "m")), []
    monkeypatch.setattr(paged, "_ways", lambda model: iter([Way(paged.TORCH_FLASH), Way()]))
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel_on_cpu(align_ends=True))
    engine = open_engine([Role(model)], 3, settings=Rollout(engine="paged"), say=said.append)
    assert engine.way == Way(paged.TORCH_FLASH) and not said
    long = replace(GREEDY, max_new_tokens=24, batch=3)
    assert in_order(engine.generate(MIXED, long)) == in_order(opened("hf", Role(model)).generate(MIXED, long))


def test_a_kernel_that_is_wrong_is_not_taken_and_that_is_said_once(tmp_path, monkeypatch):
    import torch.nn.attention.varlen

    model, said = load(save("llama", tmp_path / "m")), []
    monkeypatch.setattr(paged, "_ways", lambda model: iter([Way(paged.TORCH_FLASH), Way()]))
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel_on_cpu(align_ends=False))
    for _ in range(2):
        assert open_engine([Role(model)], 3, settings=Rollout(engine="paged"), say=said.append).way == Way()
    (line,) = said
    assert line.startswith("paged rollouts: flash_torch is of no use here: its log-probabilities are off by")


def test_graphs_that_cannot_be_captured_are_left_out_and_that_is_said_once(tmp_path, monkeypatch):
    model, said, real = load(save("llama", tmp_path / "m")), [], paged.run

    def run(model, prompts, sampled, slots, seed, way, **kw):
        if way.graphs:
            raise RuntimeError("operation not permitted when stream is capturing")
        return real(model, prompts, sampled, slots, seed, way, **kw)

    monkeypatch.setattr(paged, "run", run)
    monkeypatch.setattr(paged, "_ways", lambda model: iter([Way(None, graphs=True), Way()]))
    for _ in range(2):
        assert open_engine([Role(model)], 3, settings=Rollout(engine="paged"), say=said.append).way == Way()
    assert said == [
        "paged rollouts: own attention in CUDA graphs is of no use here: RuntimeError: operation not permitted when "
        "stream is capturing"
    ]


def test_a_model_that_pages_do_not_serve_is_refused_or_left_to_generate(tmp_path, monkeypatch):
    model, said = load(save("gpt_neox", tmp_path / "m")), []
    with pytest.raises(ModelError, match=r"rollout.engine: paged does not run GPTNeoXForCausalLM: use hf"):
        open_engine([Role(model)], 3, settings=Rollout(engine="paged"))
    monkeypatch.setattr("lco_lite.rollout.engine.engine_for", lambda asked, device: "paged")
    other = load(save("gpt_neox", tmp_path / "n"))
    for _ in range(2):
        assert type(open_engine([Role(other)], 3, settings=Rollout(engine="auto"), say=said.append)) is HFEngine
    assert len(said) == 1 and "own attention is of no use here" in said[0]
