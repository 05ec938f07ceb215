"""Each policy gradient and regression against a plain restatement of its paper, in float64, split into micro-batches,
and tied to its relatives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lco_lite.objectives import reference
from lco_lite.objectives.policy_gradient import (
    ADVANTAGE_ONLY,
    POLICY_GRADIENTS,
    Clip,
    Correction,
    PolicyBatch,
    ValueHead,
    value_loss,
)
from lco_lite.recipe.rl import COMPARISONS, REGRESSIONS

LENGTHS = [3, 1, 4, 2]
ROWS = torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)])
PROMPTS = torch.tensor([7, 3, 7, 3])  # of the sequences
CLIP, BETA, LIMIT = Clip(0.2, 0.28), 0.7, 5


def case(seed=0, on_policy=False, spread=True):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(len(ROWS), generator=generator, dtype=torch.float64)
    shift = 0 if on_policy else 0.6 * torch.randn(len(ROWS), generator=generator, dtype=torch.float64)
    new = (old + shift).requires_grad_()
    per_sequence = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    advantages = per_sequence[ROWS] if spread else torch.randn(len(ROWS), generator=generator, dtype=torch.float64)
    return new, old, advantages


def clipped(ratio, a, low=CLIP.low, high=CLIP.high):
    return min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)


def restated(name, new, old, advantages):
    """The papers' formulas, token by token."""
    tokens = list(zip(new.tolist(), old.tolist(), advantages.tolist(), ROWS.tolist(), strict=True))
    sequences = [[t for t in tokens if t[3] == i] for i in range(len(LENGTHS))]
    if name == "reinforce":
        return -sum(n * a for n, _, a, _ in tokens) / len(tokens)
    if name in ("ppo", "dapo"):
        return -sum(clipped(math.exp(n - o), a) for n, o, a, _ in tokens) / len(tokens)
    if name == "grpo":
        return -sum(sum(clipped(math.exp(n - o), a) for n, o, a, _ in s) / len(s) for s in sequences) / len(sequences)
    if name == "dr_grpo":
        return -sum(clipped(math.exp(n - o), a) for n, o, a, _ in tokens) / (len(sequences) * LIMIT)
    if name == "cispo":
        return -sum(min(math.exp(n - o), 1 + CLIP.high) * a * n for n, o, a, _ in tokens) / len(tokens)
    if name == "dppo":
        kept = [
            math.exp(n - o) * a
            for n, o, a, _ in tokens
            if (math.exp(n) - math.exp(o) <= CLIP.high if a > 0 else math.exp(o) - math.exp(n) <= CLIP.low)
        ]
        return -sum(kept) / (len(sequences) * LIMIT)
    if name == "raft":
        return -sum(n for n, _, a, _ in tokens if a > 0) / len(tokens)
    if name == "dro":
        return sum((a - BETA * (n - o)) ** 2 for n, o, a, _ in tokens) / (2 * BETA * len(tokens))
    advantage, moved = [s[0][2] for s in sequences], [sum(n - o for n, o, _, _ in s) for s in sequences]
    if name == "pmd":
        return sum((a - BETA * m) ** 2 for a, m in zip(advantage, moved, strict=True)) / (2 * BETA * len(sequences))
    pairs = [(0, 2), (1, 3)]  # of the same prompt
    if name == "rebel":
        missed = [advantage[i] - advantage[j] - BETA * (moved[i] - moved[j]) for i, j in pairs]
        return sum(m**2 for m in missed) / (4 * BETA * len(pairs))
    if name == "tpo":
        now, before = ([sum(t[k] for t in s) for s in sequences] for k in (0, 1))
        total = 0.0
        for pair in pairs:
            p = [math.exp(now[i]) / sum(math.exp(now[j]) for j in pair) for i in pair]
            tilted = [math.exp(before[i] + advantage[i] / BETA) for i in pair]
            q = [t / sum(tilted) for t in tilted]
            total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        return total / len(pairs)
    ratios = [math.exp(sum(n - o for n, o, _, _ in s) / (len(s) if name == "gspo" else 1)) for s in sequences]
    return -sum(clipped(r, s[0][2]) for r, s in zip(ratios, sequences, strict=True)) / len(sequences)


def loss(name, new, old, advantages, part=slice(None), clip=CLIP, beta=BETA, prompts=PROMPTS):
    """``part``: the tokens of a micro-batch."""
    rows = ROWS[part].unique(return_inverse=True)[1]
    more = {"groups": prompts[ROWS[part]], "beta": beta, "limit": LIMIT}
    batch = PolicyBatch(new[part], old[part], advantages[part], rows, len(ROWS), len(LENGTHS), **more)
    return POLICY_GRADIENTS[name](batch, clip)


def gradient(name, new, *rest, **more):
    return torch.autograd.grad(loss(name, new, *rest, **more)[0], new)[0]


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
@pytest.mark.parametrize("seed", range(5))
def test_each_loss_is_the_papers_formula(name, seed):
    new, old, advantages = case(seed)
    assert loss(name, new, old, advantages)[0].item() == pytest.approx(restated(name, new, old, advantages), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in POLICY_GRADIENTS if name != "cispo"])  # its weight is held fixed
def test_gradients_agree_with_finite_differences(name):
    new, old, advantages = case(3)
    assert torch.autograd.gradcheck(lambda x: loss(name, x, old, advantages)[0], new, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("name", [name for name in POLICY_GRADIENTS if name not in REGRESSIONS])
def test_a_weight_multiplies_the_loss_of_what_the_ratio_is_of(name, kind):
    """A token's for most; the product of a response's for rloo, its geometric mean for gspo. Values and gradients: a
    weight is a constant, so that the loss is one of weighted advantages."""
    new, old, advantages = case(4)
    sampler = old - torch.linspace(-0.5, 0.6, len(ROWS), dtype=torch.float64)
    held = Correction(kind, 1.2, 0.8, 1.4)
    low, high = (0.0, 1.2) if kind == "truncate" else (0.8, 1.4)
    weight = reference.importance(old, sampler, kind, low, high)
    if name in ("rloo", "gspo"):
        for i, n in enumerate(LENGTHS):
            share = 1 / n if name == "gspo" else 1.0
            mine = (i == ROWS).nonzero().flatten()
            weight[mine] = reference.importance(share * old[mine].sum(), share * sampler[mine].sum(), kind, low, high)
    assert len(set(weight.tolist())) > 1
    more = {"limit": LIMIT, "log_w": old - sampler, "correction": held}
    batch = PolicyBatch(new, old, advantages, ROWS, len(ROWS), len(LENGTHS), **more)
    like, weighted = ("reinforce", (advantages > 0) * weight) if name == "raft" else (name, advantages * weight)
    got, want = POLICY_GRADIENTS[name](batch, CLIP)[0], loss(like, new, old, weighted)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(x, new)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)
    same = replace(batch, log_w=torch.zeros_like(old))
    assert torch.equal(POLICY_GRADIENTS[name](same, CLIP)[0], loss(name, new, old, advantages)[0])


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_a_weight_is_the_references_however_far_apart_policy_and_sampler_are(kind):
    log_w = torch.tensor([0.1, 20.0, 100.0, -200.0, torch.inf, -torch.inf])
    want = reference.importance(log_w, torch.zeros(6), kind, 0.5, 5.0)
    assert torch.equal(Correction(kind, 5.0, 0.5, 5.0)(log_w), want) and want.isfinite().all()


@pytest.mark.parametrize("name", ["ppo", "dapo"])
def test_with_one_update_a_rollout_the_gradient_is_that_of_reinforce(name):
    new, old, advantages = case(on_policy=True, spread=False)
    (ours,) = torch.autograd.grad(loss(name, new, old, advantages)[0], new)
    (plain,) = torch.autograd.grad(loss("reinforce", new, old, advantages)[0], new)
    torch.testing.assert_close(ours, plain)


def test_the_clip_takes_the_gradient_away_only_where_the_ratio_has_gone_too_far_already():
    new = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    batch = PolicyBatch(
        new, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.zeros(4, dtype=torch.long), 4, 1
    )
    value, found = POLICY_GRADIENTS["ppo"](batch, Clip(0.2, 0.2))
    value.backward()
    assert found["clipped"].tolist() == [1, 0, 0, 1]
    assert (new.grad == 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
@given(seed=st.integers(0, 50), cut=st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_micro_batches_add_up_to_the_minibatch(name, seed, cut):
    new, old, advantages = case(seed)
    first = PROMPTS[ROWS] == 7 if name in COMPARISONS else cut >= ROWS
    parts = [loss(name, new, old, advantages, part)[0] for part in (first, ~first)]
    torch.testing.assert_close(sum(parts), loss(name, new, old, advantages)[0])


# how they hang together


def centred(advantages, prompts):
    """Less the mean of the prompt's sequences, [T]."""
    each = advantages[[ROWS.tolist().index(i) for i in range(len(LENGTHS))]]
    means = {p: each[prompts == p].mean() for p in prompts.tolist()}
    return (each - torch.stack([means[p] for p in prompts.tolist()]))[ROWS]


def test_dr_grpo_is_ppo_over_the_longest_length_and_grpo_where_all_are_as_long():
    new, old, advantages = case(1)
    ppo, ours = loss("ppo", new, old, advantages)[0], loss("dr_grpo", new, old, advantages)[0]
    torch.testing.assert_close(ours * LIMIT * len(LENGTHS), ppo * len(ROWS))
    one = ROWS == 2  # a sequence of 4 tokens
    grpo, ours = loss("grpo", new, old, advantages, one)[0], loss("dr_grpo", new, old, advantages, one)[0]
    torch.testing.assert_close(ours * LIMIT / 4, grpo)


def test_cispo_is_reinforce_whose_advantage_is_weighted_by_the_clipped_ratio():
    new, old, advantages = case(2, spread=False)
    weight = (new - old).exp().clamp(max=1 + CLIP.high).detach()
    assert (weight == 1 + CLIP.high).any()
    torch.testing.assert_close(
        loss("cispo", new, old, advantages)[0], loss("reinforce", new, old, weight * advantages)[0]
    )
    torch.testing.assert_close(
        gradient("cispo", new, old, advantages), gradient("reinforce", new, old, weight * advantages)
    )


def test_dppo_lets_a_rare_token_grow_and_holds_a_likely_one_where_ppo_does_the_reverse():
    old = torch.tensor([1e-4, 0.7, 0.7]).double().log()
    new = torch.tensor([1e-2, 0.9, 0.5]).double().log().requires_grad_()
    batch = PolicyBatch(new, old, torch.tensor([1.0, 1.0, 1.0]).double(), torch.tensor([0, 0, 0]), 3, 1)
    held = {name: POLICY_GRADIENTS[name](batch, Clip(0.15, 0.15))[1]["clipped"] for name in ("ppo", "dppo")}
    assert held["dppo"].tolist() == [0, 1, 0] and held["ppo"].tolist() == [1, 1, 0]
    held = POLICY_GRADIENTS["ppo"](batch, Clip(0.3, 0.3))[1]["clipped"]
    assert held.tolist() == [1, 0, 0], "the ratio of a likely token is near 1 however much of its mass has moved"


def test_dppo_within_its_bounds_is_dr_grpo_without_a_clip():
    new, old, advantages = case(3)
    free = Clip(1.0, 100.0)
    torch.testing.assert_close(
        gradient("dppo", new, old, advantages, clip=free), gradient("dr_grpo", new, old, advantages, clip=free)
    )


def test_raft_is_reinforce_with_1_for_a_positive_advantage_and_0_for_any_other():
    new, old, advantages = case(4)
    ours = loss("raft", new, old, advantages)[0]
    torch.testing.assert_close(ours, loss("reinforce", new, old, (advantages > 0).double())[0])
    assert (gradient("raft", new, old, advantages)[advantages < 0] == 0).all()


def test_at_the_first_update_raft_is_raft_plus_plus():
    """Xiong et al. 2025: ratio and clip of PPO."""
    new, old, advantages = case(4, on_policy=True)
    right = (advantages > 0).double()
    torch.testing.assert_close(gradient("raft", new, old, advantages), gradient("ppo", new, old, right))


@pytest.mark.parametrize("seed", range(3))
def test_dros_gradient_is_that_of_lco_mse_at_the_sampled_entry(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, old = torch.randn(2, len(ROWS), 6, generator=generator, dtype=torch.float64).log_softmax(-1).unbind()
    actions = torch.randint(6, (len(ROWS),), generator=generator)
    advantages, places = case(seed, spread=False)[2], actions.unsqueeze(-1)
    logits.requires_grad_()
    target = old + reference.sparse_advantages(actions, advantages, 6) / BETA  # z*, without a constant
    (full,) = torch.autograd.grad(reference.mse(logits, target, "sum").mean(), logits)
    sampled, before = (x.gather(-1, places).squeeze(-1).detach() for x in (logits, old))
    ours = gradient("dro", sampled.requires_grad_(), before, advantages)
    torch.testing.assert_close(ours, BETA / 2 * full.gather(-1, places).squeeze(-1))
    (first,) = torch.autograd.grad(reference.mse(z := old.clone().requires_grad_(), target, "sum").mean(), z)
    assert first.count_nonzero() == len(ROWS), "at the first update the sampled entry is all there is"


def test_dro_is_verls_loss_up_to_a_constant():
    new, old, advantages = case(5, spread=False)
    verl = -(new * advantages - BETA / 2 * (new - old).square()).mean()
    torch.testing.assert_close(gradient("dro", new, old, advantages), torch.autograd.grad(verl, new)[0])


def test_pmds_gradient_is_kimis():
    new, old, advantages = case(5)
    now, before = (torch.zeros(4).double().index_add(0, ROWS, x) for x in (new, old))
    a = advantages[[ROWS.tolist().index(i) for i in range(4)]]
    kimi = -(a * now - BETA / 2 * (now - before).square()).mean()
    torch.testing.assert_close(gradient("pmd", new, old, advantages), torch.autograd.grad(kimi, new)[0])


def test_of_responses_of_one_token_pmd_is_dro():
    new, old, advantages = case(6)
    one = ROWS == 1
    both = [loss(name, new, old, advantages, one)[0] for name in ("dro", "pmd")]
    torch.testing.assert_close(both[0] * len(ROWS), both[1] * len(LENGTHS))


@pytest.mark.parametrize("prompts", [PROMPTS, torch.zeros(4, dtype=torch.long)])
def test_rebel_is_pmd_less_the_best_constant_of_each_prompt(prompts):
    new, old, advantages = case(7)
    k, moved = int((prompts == prompts[0]).sum()), torch.zeros(4).double().index_add(0, ROWS, new - old).detach()
    rest = centred(advantages, prompts) + BETA * (moved[ROWS] - centred(moved[ROWS], prompts))
    ours, theirs = loss("rebel", new, old, advantages, prompts=prompts)[0], loss("pmd", new, old, rest)[0]
    torch.testing.assert_close(ours, theirs * k / (k - 1))
    for name, a in (("rebel", advantages + prompts[ROWS]), ("pmd", rest + 0.1)):
        other = loss(name, new, old, a, prompts=prompts)[0]
        assert torch.isclose(other, ours) if name == "rebel" else other > theirs, "what cancels, and what is best"


@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
def test_at_the_first_update_the_regressions_are_policy_gradients_whatever_beta(beta):
    new, old, advantages = case(8, on_policy=True)
    dro, reinforce = gradient("dro", new, old, advantages, beta=beta), gradient("reinforce", new, old, advantages)
    torch.testing.assert_close(dro, reinforce)
    pmd, rloo = gradient("pmd", new, old, advantages, beta=beta), gradient("rloo", new, old, advantages)
    torch.testing.assert_close(pmd, rloo)
    others = 2 * centred(advantages, PROMPTS)  # A less the mean of the other responses, of two
    torch.testing.assert_close(gradient("rebel", new, old, advantages, beta=beta), gradient("rloo", new, old, others))


@pytest.mark.parametrize("prompts", [PROMPTS, torch.zeros(4, dtype=torch.long)])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_tpo_is_lco_kld_on_the_logits_of_a_prompts_responses(prompts, beta):
    new, old, advantages = case(9)
    z, z_old = (torch.zeros(4).double().index_add(0, ROWS, x) for x in (new, old))
    a = advantages[[ROWS.tolist().index(i) for i in range(4)]]
    groups = [prompts == p for p in prompts.unique()]
    kld = torch.stack([reference.kld(z[g], reference.optimal_logits(z_old[g], a[g], beta)) for g in groups]).mean()
    torch.testing.assert_close(loss("tpo", new, old, advantages, beta=beta, prompts=prompts)[0], kld)
    ours = gradient("tpo", new, old, advantages, beta=beta, prompts=prompts)
    torch.testing.assert_close(ours, torch.autograd.grad(kld, new)[0])


@pytest.mark.parametrize("name", REGRESSIONS)
def test_prompts_whose_responses_are_all_as_good_have_no_gradient_at_the_first_update_to_the_last_bit(name):
    """Adam makes whole steps of what is left of a rounding."""
    new, old, _ = (x.detach().float() for x in case(11, on_policy=True))
    assert gradient(name, new.requires_grad_(), old, torch.zeros_like(old)).count_nonzero() == 0


@pytest.mark.parametrize("name", REGRESSIONS)
def test_the_minimum_of_a_regression_is_the_optimal_policy(name):
    _, old, advantages = case(10)
    lengths = torch.tensor(LENGTHS)[ROWS]
    best = old + advantages / BETA / (1 if name == "dro" else lengths)  # log π_old + A/β, of tokens or of sequences
    best.requires_grad_()
    torch.testing.assert_close(loss(name, best, old, advantages)[0].detach(), torch.zeros(()).double())
    assert gradient(name, best, old, advantages).abs().max() < 1e-12


def test_the_critic_starts_at_zero_and_trains_no_hidden_state():
    hidden = torch.randn(5, 8, requires_grad=True)
    head = ValueHead(8)
    values = head(hidden)
    assert values.tolist() == [0] * 5
    value_loss(values, torch.zeros(5), torch.ones(5), 0.2, 5).backward()
    assert hidden.grad is None and head.linear.bias.grad.item() == pytest.approx(-1.0)


def test_the_value_loss_takes_the_worse_of_free_and_clipped():
    values, old, returns = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.ones(2)
    expected = 0.5 * (max((1 - 1) ** 2, (0.2 - 1) ** 2) + (0.1 - 1) ** 2) / 2
    assert value_loss(values, old, returns, 0.2, 2).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
@pytest.mark.parametrize("kind", [None, "truncate", "mask"])
def test_without_an_advantage_the_gradient_is_exactly_0_for_those_that_say_so_and_not_for_regressions(name, kind):
    new, old, advantages = case(seed=3)
    held, log_w = kind and Correction(kind, 2.0, 0.5, 2.0), torch.linspace(-1, 1, len(ROWS), dtype=torch.float64)
    none = -advantages.abs() if name == "raft" else torch.zeros_like(advantages)
    batch = PolicyBatch(new, old, none, ROWS, len(ROWS), len(LENGTHS), log_w=log_w, correction=held)
    batch = replace(batch, groups=PROMPTS[ROWS], beta=BETA, limit=LIMIT)
    (gradient,) = torch.autograd.grad(POLICY_GRADIENTS[name](batch, CLIP)[0], new)
    if name in ADVANTAGE_ONLY:
        assert not gradient.any()
    else:
        assert gradient.any() == (name != "ppo"), "ppo's critic learns"
