"""LCO from hidden states against the paper's equations on logits, in float64, over every kind of head and target."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import KINDS, Case, cases, make_case, wide_logits
from torch import Tensor

from lco_lite.objectives import reference
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import OBJECTIVES, WEIGHTINGS, lco_loss
from lco_lite.objectives.targets import DenseTarget, MixedTarget, SparseTarget

objectives, weightings, chunks = st.sampled_from(OBJECTIVES), st.sampled_from(WEIGHTINGS), st.sampled_from([None, 1, 3])


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    return [grad[: case.head.rows] if i else grad for i, grad in enumerate(torch.autograd.grad(loss, case.inputs))]


@settings(max_examples=400)
@given(cases(), objectives, weightings, chunks)
def test_value_and_gradients_equal_the_oracle(case: Case, objective: str, weighting: str, chunk: int | None) -> None:
    loss, diagnostics = lco_loss(objective, case.hidden, case.head, case.target, weighting, chunk)
    exact = case.exact(objective, weighting)
    torch.testing.assert_close(diagnostics["loss"], exact.detach())
    torch.testing.assert_close(loss, exact.mean())
    for got, want in zip(gradients(3 * loss, case), gradients(3 * exact.mean(), case), strict=True):
        torch.testing.assert_close(got, want)


DIAGNOSTICS = {"loss", "logit_grad_norm", "logit_grad_sampled", "entropy", "logprob"}


@settings(max_examples=300)
@given(cases(), objectives, weightings, chunks, st.booleans())
def test_diagnostics_equal_the_oracle(
    case: Case, objective: str, weighting: str, chunk: int | None, others: bool
) -> None:
    """``others``: of actions that a sparse advantage is not of."""
    actions = (case.actions + 1) % case.rows if others else case.actions
    _, seen = lco_loss(objective, case.hidden, case.head, case.target, weighting, chunk, actions=actions)
    assert set(seen) >= DIAGNOSTICS
    logits = case.logits().detach().requires_grad_()
    case.logits = lambda: logits  # type: ignore[method-assign]
    (grad,) = torch.autograd.grad(case.exact(objective, weighting).sum(), logits)
    log_p, log_old = torch.log_softmax(logits.detach(), -1), torch.log_softmax(case.old_logits, -1)
    exact = {
        "loss": case.exact(objective, weighting).detach(),
        "logit_grad_norm": grad.norm(dim=-1),
        "logit_grad_sampled": grad.gather(-1, actions.unsqueeze(-1)).squeeze(-1).abs(),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logprob": log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1),
        "kl_to_old": (log_p.exp() * (log_p - log_old)).sum(-1),
    }
    for name, value in seen.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, exact[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_actions_diagnostics_are_there_exactly_where_they_are_free(objective: str) -> None:
    always, formed, known = {"loss", "logit_grad_norm"}, {"entropy", "logprob"}, {"logit_grad_sampled"}
    dense, sparse, anchored = make_case(), make_case(kind="sparse"), make_case(kind="sparse", anchor=0.5)
    capped, mixed = make_case(softcap=5.0), make_case(kind="mixed")
    expected = {
        "dense": always | ({"entropy"} if objective == "kld" else set()),
        "sparse": always | known | (formed | {"kl_to_old"} if objective == "kld" else set()),
        "anchored": always | known | (formed if objective == "kld" else set()),
        "capped": always | {"entropy"},
        "mixed": always | known | (formed if objective == "kld" else set()),
    }
    for (name, keys), case in zip(expected.items(), (dense, sparse, anchored, capped, mixed), strict=True):
        assert set(lco_loss(objective, case.hidden, case.head, case.target)[1]) == keys, name


@settings(max_examples=100)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["dense", "mixed"]),
    objectives,
    weightings,
    st.booleans(),
    st.sampled_from([None, 4.0]),
)
def test_standardised_advantages_equal_the_oracle(
    seed: int, kind: str, objective: str, weighting: str, own_head: bool, softcap: float | None
) -> None:
    """Of a mixed target the dense part alone."""
    case = make_case(seed, kind, own_head=own_head, softcap=softcap, scale=0.5, standardise=True)
    loss, seen = lco_loss(
        objective, case.hidden, case.head, case.target, weighting, standardise=True, actions=case.actions
    )
    exact = case.exact(objective, weighting).mean()
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradients(loss, case), gradients(exact, case))
    logits = case.logits().detach().requires_grad_()
    case.logits = lambda: logits  # type: ignore[method-assign]
    (grad,) = torch.autograd.grad(case.exact(objective, weighting).sum(), logits)
    sampled = grad.gather(-1, case.actions.unsqueeze(-1)).squeeze(-1).abs()
    torch.testing.assert_close(seen["logit_grad_sampled"], sampled)


@settings(max_examples=60)
@given(st.integers(0, 2**31), objectives, weightings, st.floats(-20, 20))
def test_a_constant_added_to_the_advantage_changes_nothing(
    seed: int, objective: str, weighting: str, constant: float
) -> None:
    case = make_case(seed, own_head=True)
    own = case.target.shift_head  # type: ignore[union-attr]
    ones = torch.ones(len(own.weight), 1, dtype=torch.float64)
    shift = torch.nn.functional.pad(case.target.shift, (0, 1), value=constant)  # type: ignore[union-attr]
    raised = DenseTarget(case.target.old, 1.0, shift, Head(torch.cat([own.weight, ones], -1), rows=own.rows))
    for target in (case.target, raised):
        target.anchor = 0.0
    loss, _ = lco_loss(objective, case.hidden, case.head, case.target, weighting)
    other, _ = lco_loss(objective, case.hidden, case.head, raised, weighting)
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(gradients(other, case), gradients(loss, case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_advantage_means_no_gradient_while_the_policy_is_the_old_one(
    objective: str, weighting: str, kind: str
) -> None:
    case = make_case(kind=kind, spread=0.0, dtype=torch.float32)
    hidden = case.target.old.clone().requires_grad_()
    loss, seen = lco_loss(objective, hidden, case.head, case.target, weighting, actions=case.actions)
    loss.backward()
    assert hidden.grad is not None
    assert loss.abs() < 1e-6 and hidden.grad.abs().max() < 1e-6 and seen["logit_grad_norm"].max() < 1e-6


@pytest.mark.parametrize("kind", ["dense", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_the_first_update_the_residual_is_the_advantage_exactly(dtype: torch.dtype, kind: str) -> None:
    case = make_case(kind=kind, dtype=dtype, beta=0.5, tokens=6, width=8)
    target = case.target
    residual, mean = target.residual(target.old, case.head, None, False)
    expected = case.head.project(target.shift.float() / 0.5)  # type: ignore[union-attr]
    if isinstance(target, MixedTarget):
        expected[torch.arange(6), target.actions] += target.advantages.float() / 0.5
    assert torch.equal(residual, expected)
    advantage = case.target_logits - case.old_logits
    torch.testing.assert_close((residual - mean).double(), advantage, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_keeps_three_digits_of_the_gradient(
    objective: str, weighting: str, kind: str, dtype: torch.dtype
) -> None:
    case = make_case(1, kind, tokens=16, width=32, vocabulary=300, scale=0.2, dtype=dtype, spread=0.3)
    loss, _ = lco_loss(objective, case.hidden, case.head, case.target, weighting)
    (got,) = torch.autograd.grad(loss, case.hidden)
    assert got.dtype == dtype
    exact, h = Case(**vars(case)), case.hidden.detach().double().requires_grad_()
    exact.logits = lambda: wide_logits(case.head, h)[:, : case.rows]  # type: ignore[method-assign]
    (want,) = torch.autograd.grad(exact.exact(objective, weighting).mean(), h)
    assert (got.double() - want).norm() < (1e-4 if dtype == torch.float32 else 3e-3) * want.norm()


def test_the_residual_form_is_far_more_accurate_than_half_precision_logits() -> None:
    case = make_case(2, tokens=32, width=64, vocabulary=500, scale=0.5, dtype=torch.bfloat16, spread=0.1)
    case.hidden = (case.target.old + 0.02 * case.hidden.detach()).requires_grad_()
    h = case.hidden.detach().double().requires_grad_()
    exact, z = Case(**vars(case)), wide_logits(case.head, h)
    exact.logits = lambda: z  # type: ignore[method-assign]
    (want,) = torch.autograd.grad(exact.exact("kld", "mean").mean(), h)
    (ours,) = torch.autograd.grad(lco_loss("kld", case.hidden, case.head, case.target)[0], case.hidden)
    naive = Case(**vars(case))
    weight, shift = case.head.weight, case.target.shift  # type: ignore[union-attr]
    naive.logits = lambda: (0.5 * (case.hidden @ weight.T)).float()  # type: ignore[method-assign]
    naive.target_logits = ((0.5 * (case.target.old @ weight.T)) + 0.5 * (shift @ weight.T)).float()
    (other,) = torch.autograd.grad(naive.exact("kld", "mean").mean(), case.hidden)
    ours_error, other_error = ((g.double() - want).norm() / want.norm() for g in (ours, other))
    assert ours_error < 3e-3 < 10 * ours_error < other_error


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from([-8.0, -1.0, 0.3, 2.0, 30.0]))
def test_sparse_kld_starts_as_a_policy_gradient_with_a_bounded_weight(seed: int, advantage: float) -> None:
    case = make_case(seed, kind="sparse")
    target = SparseTarget(case.target.old, 0.5, case.actions, torch.full((5,), advantage).double())
    hidden = target.old.clone().requires_grad_()
    loss, seen = lco_loss("kld", hidden, case.head, target)
    (got,) = torch.autograd.grad(loss, hidden)
    p = torch.softmax(case.old_logits, -1)
    sampled = torch.nn.functional.one_hot(case.actions, p.shape[-1])
    ratio = torch.expm1(torch.tensor(advantage / 0.5).double()) * (p * sampled).sum(-1, keepdim=True)
    weight = ratio / (1 + ratio)  # κp / (1 + κp), κ = e^(A/β) − 1
    torch.testing.assert_close(got, weight * (p - sampled) @ case.head.weight / 5)
    p_sampled = (p * sampled).sum(-1)
    assert (weight <= 1).all()
    assert (seen["logit_grad_norm"] <= math.sqrt(2) * (p_sampled if advantage < 0 else 1 - p_sampled) + 1e-12).all()
    torch.testing.assert_close(seen["kl_to_old"], torch.zeros(5, dtype=torch.float64))


@settings(max_examples=400)
@given(
    st.sampled_from([1e-8, 1e-3, 0.5, 0.999, 1 - 1e-6, 1 - 1e-9, 1 - 1e-12, None]) | st.floats(1e-8, 1 - 1e-12),
    st.floats(-40, 40),
    st.integers(0, 2**31),
    st.floats(0, 2),
    st.booleans(),
)
def test_sparse_and_mixed_kld_keep_their_digits_in_single_precision_however_sure_the_policy_is(
    p: float | None, tilt: float, seed: int, drift: float, mixed: bool
) -> None:
    """``p`` of the sampled token; None: 1 − 1e-45. What the others have is not 1 − p once p has been rounded."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(12, generator=g, dtype=torch.float64)
    odds = 103.6 if p is None else math.log(p) - math.log1p(-p)
    z[3] = odds + z[torch.arange(12) != 3].logsumexp(0)
    z -= z.mean()
    old = (z + drift * torch.randn(12, generator=g, dtype=torch.float64)).float()
    hidden, head = z.float().unsqueeze(0).requires_grad_(), Head(torch.eye(12))  # logits are the states
    actions = torch.tensor([3])
    shift = torch.randn(1, 12, generator=g) if mixed else torch.zeros(1, 12)
    target = SparseTarget(old.unsqueeze(0), 1.0, actions, torch.tensor([tilt]))
    if mixed:
        target = MixedTarget(**vars(target), shift=shift)
    loss, seen = lco_loss("kld", hidden, head, target)
    (got,) = torch.autograd.grad(loss, hidden)
    wide = hidden.detach().double().requires_grad_()
    advantages = reference.sparse_advantages(actions, target.advantages.double(), 12) + shift
    exact = reference.kld(wide, reference.optimal_logits(old.double().unsqueeze(0), advantages, 1.0))
    (want,) = torch.autograd.grad(exact.sum(), wide)
    assert abs(loss.item() - exact.item()) < 1e-5 * exact.item() + 2e-6
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    assert all(value.isfinite().all() for value in seen.values())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_sparse_advantage_a_mixed_target_is_the_dense_one_to_the_last_bit(
    objective: str, weighting: str
) -> None:
    case = make_case(dtype=torch.float32)
    silent = MixedTarget(**vars(case.target), actions=case.actions, advantages=torch.zeros(5))
    losses = [
        lco_loss(objective, case.hidden, case.head, target, weighting, actions=case.actions)
        for target in (case.target, silent)
    ]
    (dense, seen), (mixed, also_seen) = losses
    assert torch.equal(dense, mixed) and torch.equal(gradients(dense, case)[0], gradients(mixed, case)[0])
    assert seen.keys() == also_seen.keys() and all(torch.equal(seen[name], also_seen[name]) for name in seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_targets_stay_finite(objective: str, kind: str) -> None:
    case = make_case(kind=kind, beta=0.001, spread=3.0, dtype=torch.float32)
    loss, seen = lco_loss(objective, case.hidden, case.head, case.target)
    (grad,) = torch.autograd.grad(loss, case.hidden)
    assert loss.isfinite() and grad.isfinite().all()
    assert all(value.isfinite().all() for value in seen.values())
    torch.testing.assert_close(
        seen["loss"].double(), case.exact(objective, "mean").detach().double(), rtol=1e-4, atol=0
    )


@settings(max_examples=40)
@given(cases(tokens=6), objectives, weightings)
def test_a_minibatch_of_a_target_gives_the_loss_of_its_tokens(case: Case, objective: str, weighting: str) -> None:
    whole, _ = lco_loss(objective, case.hidden, case.head, case.target, weighting)
    per_token = case.exact(objective, weighting).detach()
    for index in (torch.tensor([4, 1]), slice(2, 5), torch.tensor([True, False] * 3)):
        part, seen = lco_loss(objective, case.hidden[index], case.head, case.target[index], weighting)
        torch.testing.assert_close(seen["loss"], per_token[index])
        assert part.isfinite() and whole.isfinite()


def test_no_graph_is_made_without_a_gradient_to_compute() -> None:
    case = make_case()
    assert not lco_loss("kld", case.hidden.detach(), case.head, case.target)[0].requires_grad
    with torch.no_grad():
        loss, _ = lco_loss("kld", case.hidden, case.head, case.target)
    torch.testing.assert_close(loss, case.exact("kld", "mean").mean().detach())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast_around_the_loss_does_not_lower_its_precision(objective: str) -> None:
    case = make_case(dtype=torch.float32, width=32, vocabulary=200)
    plain, _ = lco_loss(objective, case.hidden, case.head, case.target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = lco_loss(objective, case.hidden, case.head, case.target)
    assert torch.equal(plain, inside)


def test_a_shared_head_given_again_is_recognised() -> None:
    case = make_case(scale=0.5)
    again = Head(case.head.weight, scale=0.5, rows=case.head.rows)
    assert DenseTarget(case.target.old, 1.0, case.target.old, again).through(case.head) is case.head
    scaled = Head(case.head.weight, scale=0.6, rows=case.head.rows)
    assert DenseTarget(case.target.old, 1.0, case.target.old, scaled).through(case.head) is scaled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "ppo"}, "objective must be one of kld, lch, mse; got 'ppo'"),
        ({"weighting": "max"}, "weighting must be one of mean, sum, policy; got 'max'"),
        ({"hidden": torch.zeros(0, 4)}, "at least one token"),
        ({"hidden": torch.zeros(4, 4)}, "hidden has 4 tokens, the target 5"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change: dict[str, object], message: str) -> None:
    case = make_case(dtype=torch.float32)
    arguments = {"objective": "kld", "hidden": case.hidden, "head": case.head, "target": case.target, **change}
    with pytest.raises(ValueError, match=message):
        lco_loss(**arguments)  # type: ignore[arg-type]


def test_standardising_one_action_is_refused() -> None:
    case = make_case(kind="sparse")
    with pytest.raises(ValueError, match="dense"):
        lco_loss("mse", case.hidden, case.head, case.target, standardise=True)


@pytest.mark.parametrize("missing", ["old_head", "reference_head", "shift_head"])
def test_a_trained_head_without_its_frozen_copies_is_refused(missing: str) -> None:
    case = make_case(trained=True, anchor=0.5)
    setattr(case.target, missing, None)
    with pytest.raises(ValueError, match=missing):
        lco_loss("kld", case.hidden, case.head, case.target)


def test_a_soft_capped_reward_model_needs_its_reference_states() -> None:
    case = make_case(softcap=4.0)
    case.target.shift_base = None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="shift_base"):
        lco_loss("kld", case.hidden, case.head, case.target)


def test_targets_refuse_what_cannot_be_meant() -> None:
    h = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="beta"):
        DenseTarget(h, 0.0, h)
    with pytest.raises(ValueError, match="reference"):
        DenseTarget(h, 1.0, h, anchor=0.5)
    with pytest.raises(ValueError, match="anchor must be in 0..1"):
        DenseTarget(h, 1.0, h, anchor=1.5, reference=h)
    with pytest.raises(ValueError, match="actions has 2 tokens, old has 3"):
        SparseTarget(h, 1.0, torch.zeros(2, dtype=torch.long), torch.zeros(3))
    with pytest.raises(ValueError, match="advantages has 2 tokens, old has 3"):
        MixedTarget(h, 1.0, torch.zeros(3, dtype=torch.long), torch.zeros(2), shift=h)
