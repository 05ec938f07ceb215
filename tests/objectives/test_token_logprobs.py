"""Log-probabilities of sampled tokens against log-softmax of whole logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import Case, cases, make_case, wide_logits
from torch import Tensor

from lco_lite.objectives.logprobs import token_logprobs

chunks = st.sampled_from([None, 1, 3])


def exact(case: Case, logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(-1, case.actions.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@settings(max_examples=200)
@given(cases(), chunks, st.integers(0, 2**31))
def test_values_and_gradients_equal_the_whole_logits(case: Case, chunk: int | None, seed: int) -> None:
    upstream = torch.randn(len(case.hidden), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logprobs, entropy = token_logprobs(case.hidden, case.head, case.actions, chunk)
    expected, expected_entropy = exact(case, case.head.logits(case.hidden))
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy.detach())
    assert not entropy.requires_grad
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
        logprobs, entropy = token_logprobs(case.hidden, case.head, case.actions, chunk)
        expected, expected_entropy = exact(case, case.head.logits(case.hidden))
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)


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
