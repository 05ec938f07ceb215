"""The head: logits of every kind, padding, what it remembers."""

import pytest
import torch

from lco_lite.objectives.head import Head, row_covariance


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def test_logits_apply_bias_scale_and_soft_cap_over_the_tokens_only() -> None:
    weight, bias, hidden = normal(9, 4), normal(9), normal(3, 4)
    expected = 5 * torch.tanh(0.5 * (hidden @ weight[:7].T + bias[:7]) / 5)
    torch.testing.assert_close(Head(weight, bias, 0.5, 5.0, 7).logits(hidden), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_not_rounded(dtype: torch.dtype) -> None:
    weight, hidden = normal(50, 16).to(dtype), normal(3, 16).to(dtype)
    logits = Head(weight).logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T)


def test_logits_are_differentiable_whatever_the_types() -> None:
    weight, hidden = normal(50, 16).bfloat16().requires_grad_(), normal(3, 16).bfloat16().requires_grad_()
    Head(weight).logits(hidden).sum().backward()
    assert weight.grad is not None and hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0].float(), weight.detach().float().sum(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [10, -1])
def test_more_tokens_than_rows_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=r"rows must be in 1\.\.9"):
        Head(normal(9, 4), rows=rows)


def test_a_head_is_linear_unless_it_is_capped_or_trained() -> None:
    weight = normal(9, 4)
    assert Head(weight, bias=normal(9), scale=0.1).is_linear
    assert not Head(weight, softcap=30.0).is_linear
    assert not Head(weight.clone().requires_grad_()).is_linear
    assert Head(weight.clone().requires_grad_()).frozen().is_linear


def test_a_frozen_copy_does_not_follow_the_trained_head() -> None:
    head = Head(normal(9, 4).requires_grad_(), normal(9).requires_grad_())
    copy, hidden = head.frozen(), normal(3, 4)
    before = copy.logits(hidden)
    with torch.no_grad():
        head.weight.add_(1.0)
    assert torch.equal(copy.logits(hidden), before)


def test_moments_leave_padding_out_and_are_computed_once() -> None:
    weight = normal(9, 4)
    weight[7:] = torch.nan
    head = Head(weight, rows=7)
    torch.testing.assert_close(head.mean_row, weight[:7].mean(0))
    torch.testing.assert_close(row_covariance(head), torch.cov(weight[:7].T, correction=0))
    assert row_covariance(head) is row_covariance(head)
    assert head.prefix(5) is head.prefix(5) and row_covariance(head.prefix(5)) is not row_covariance(head)


def test_moments_of_two_heads_stand_side_by_side() -> None:
    left, right = Head(normal(9, 4), rows=7), Head(normal(8, 3), rows=7)
    rows = torch.cat([left.vocabulary, right.vocabulary], -1)
    torch.testing.assert_close(row_covariance(left, right), torch.cov(rows.T, correction=0))


def test_moments_follow_a_weight_that_is_overwritten() -> None:
    head = Head(normal(9, 4))
    before = row_covariance(head), head.mean_row
    head.weight.mul_(2)
    torch.testing.assert_close(row_covariance(head), 4 * before[0])
    torch.testing.assert_close(head.mean_row, 2 * before[1])


def test_the_covariance_survives_a_large_common_row() -> None:
    weight = normal(200, 4)
    torch.testing.assert_close(row_covariance(Head(weight + 1000)), row_covariance(Head(weight)), rtol=1e-2, atol=1e-3)
