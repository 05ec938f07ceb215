"""Log-probabilities of sampled tokens against log-softmax of whole logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import Case, cases, make_case, wide_logits
from torch import Tensor

from lco_lite.objectives import reference
from lco_lite.objectives.logprobs import kl_divergence, token_logprobs

chunks, temperatures = st.sampled_from([None, 1, 3]), st.sampled_from([1.0, 0.6, 2.5])


def exact(case: Case, logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log π(action) at the temperature, and the entropy at 1."""
    log_p = torch.log_softmax(logits, -1)
    sampled = torch.log_softmax(logits / temperature, -1).gather(-1, case.actions.unsqueeze(-1)).squeeze(-1)
    return sampled, -(log_p.exp() * log_p).sum(-1)


@settings(max_examples=200)
@given(cases(), chunks, temperatures, st.integers(0, 2**31))
def test_values_and_gradients_equal_the_whole_logits(
    case: Case, chunk: int | None, temperature: float, seed: int
) -> None:
    upstream = torch.randn(len(case.hidden), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logprobs, seen = token_logprobs(case.hidden, case.head, case.actions, chunk, temperature)
    logits = case.head.logits(case.hidden)
    expected, expected_entropy = exact(case, logits, temperature)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(seen["entropy"], expected_entropy.detach())
    torch.testing.assert_close(seen["logprob"], exact(case, logits)[0].detach())
    assert not any(value.requires_grad for value in seen.values())
    got = torch.autograd.grad(logprobs, case.inputs, upstream)
    for ours, theirs in zip(got, torch.autograd.grad(expected, case.inputs, upstream), strict=True):
        rows = case.head.rows if ours is not got[0] else None
        torch.testing.assert_close(ours[:rows], theirs[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_keeps_three_digits(dtype: torch.dtype) -> None:
    case = make_case(3, tokens=16, width=32, vocabulary=300, scale=0.3, dtype=dtype)
    h = case.hidden.detach().double().requires_grad_()
    expected, _ = exact(case, wide_logits(case.head, h))
    logprobs, _ = token_logprobs(case.hidden, case.head, case.actions)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    (want,), (got,) = (torch.autograd.grad(x.sum(), y) for x, y in ((expected, h), (logprobs, case.hidden)))
    assert got.dtype == dtype
    assert (got.double() - want).norm() < (1e-5 if dtype == torch.float32 else 3e-3) * want.norm()


@settings(max_examples=40)
@given(cases(), chunks)
def test_nothing_is_kept_for_backward_under_no_grad(case: Case, chunk: int | None) -> None:
    with torch.no_grad():
        logprobs, seen = token_logprobs(case.hidden, case.head, case.actions, chunk)
        expected, expected_entropy = exact(case, case.head.logits(case.hidden))
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(seen["entropy"], expected_entropy)


@settings(max_examples=100)
@given(cases(), chunks, temperatures, st.booleans())
def test_gradient_diagnostics_are_those_of_log_pi_at_its_logits(
    case: Case, chunk: int | None, temperature: float, keep: bool
) -> None:
    with torch.set_grad_enabled(keep):
        _, seen = token_logprobs(case.hidden, case.head, case.actions, chunk, temperature)
    logits = case.head.logits(case.hidden).detach().requires_grad_()
    (grad,) = torch.autograd.grad(exact(case, logits, temperature)[0].sum(), logits)
    sampled = grad.gather(-1, case.actions.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(seen["logit_grad_norm"], grad.norm(dim=-1))
    torch.testing.assert_close(seen["logit_grad_sampled"], sampled.abs())


@settings(max_examples=100)
@given(cases())
def test_the_divergence_from_the_old_policy_equals_the_whole_logits(case: Case) -> None:
    old_head = case.target.old_head
    kl = kl_divergence(case.hidden, case.target.old, case.head, old_head)
    old_logits = (old_head or case.head).logits(case.target.old)
    torch.testing.assert_close(kl, reference.kld(old_logits, case.head.logits(case.hidden)).detach())
    assert not kl.requires_grad and (kl > -1e-12).all()


def test_the_divergence_of_a_policy_from_itself_is_zero_and_of_a_near_one_keeps_its_digits() -> None:
    case = make_case(1, tokens=16, width=32, vocabulary=300, scale=0.2, dtype=torch.float32)
    assert kl_divergence(case.hidden, case.hidden, case.head).tolist() == [0.0] * 16
    near = case.hidden + 0.01 * case.target.old
    want = reference.kld(wide_logits(case.head, near), wide_logits(case.head, case.hidden)).detach()
    torch.testing.assert_close(kl_divergence(case.hidden, near, case.head).double(), want, rtol=1e-2, atol=0)


def test_a_trained_head_changed_before_backward_is_noticed() -> None:
    case = make_case(trained=True)
    logprobs, _ = token_logprobs(case.hidden, case.head, case.actions)
    with torch.no_grad():
        case.head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_a_head_alone_can_be_trained() -> None:
    case = make_case(trained=True, bias=True)
    hidden = case.hidden.detach()
    logprobs, _ = token_logprobs(hidden, case.head, case.actions)
    (got,) = torch.autograd.grad(logprobs.sum(), case.head.weight)
    expected, _ = exact(case, case.head.logits(hidden))
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), case.head.weight)[0])


def test_sizes_that_do_not_fit_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"hidden must be \[T, d\] and actions \[T\], got \[5, 4\] and \[4\]"):
        token_logprobs(case.hidden, case.head, case.actions[:4])
