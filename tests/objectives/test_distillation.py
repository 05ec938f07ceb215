"""Distillation losses from hidden states against whole logits, in float64, and against MiniLLM's own gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import Case, cases, make_case
from torch import Tensor

from lco_lite.feedback.advantages import mean_reward_to_go
from lco_lite.objectives import reference
from lco_lite.objectives.distillation import Teacher, jsd_loss, minillm, mixture_weights
from lco_lite.objectives.head import Head
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.objectives.policy_gradient import Clip, PolicyBatch

betas = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


def a_teacher(case: Case, seed: int, padding: int = 1) -> Teacher:
    """Wider than the policy, with other padding rows."""
    g = torch.Generator().manual_seed(seed)
    width, dtype = case.hidden.shape[1] + 2, case.hidden.dtype
    weight = torch.randn(case.head.rows + padding, width, generator=g, dtype=torch.float64).to(dtype)
    hidden = torch.randn(len(case.hidden), width, generator=g, dtype=torch.float64).to(dtype)
    return Teacher(hidden, Head(weight, rows=case.head.rows - 1))


def whole(case: Case, teacher: Teacher) -> tuple[Tensor, Tensor]:
    rows = min(case.head.rows, teacher.head.rows)
    return case.head.logits(case.hidden)[:, :rows], teacher.head.logits(teacher.hidden)[:, :rows]


@settings(max_examples=200)
@given(cases(), betas, st.sampled_from([None, 1, 3]), st.integers(0, 2**31))
def test_value_and_gradient_equal_the_whole_logits(case: Case, beta: float, chunk: int | None, seed: int) -> None:
    teacher = a_teacher(case, seed)
    weights = torch.rand(len(case.hidden), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss, found = jsd_loss(case.hidden, case.head, teacher, beta, weights, chunk)
    each = weights * reference.jsd(*whole(case, teacher), beta)
    torch.testing.assert_close(loss, each.mean())
    torch.testing.assert_close(found["loss"], each.detach())
    got, want = (torch.autograd.grad(x, case.inputs) for x in (loss, each.mean()))
    for ours, theirs in zip(got, want, strict=True):
        rows = teacher.head.rows if ours is not got[0] else None
        torch.testing.assert_close(ours[:rows], theirs[:rows])


def over_v(case: Case, loss: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """The diagnostics of the tokens' ``loss`` [T] on plain ``logits``."""
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    log_p, index = logits.detach().log_softmax(-1), case.actions.unsqueeze(-1)
    return {
        "loss": loss.detach(),
        "logit_grad_norm": grad.norm(dim=-1),
        "logit_grad_sampled": grad.gather(-1, index).squeeze(-1).abs(),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logprob": log_p.gather(-1, index).squeeze(-1),
    }


@settings(max_examples=100)
@given(cases(trained=False, own_head=True), betas, st.sampled_from([None, 1, 3]), st.integers(0, 2**31))
def test_diagnostics_equal_the_whole_logits(case: Case, beta: float, chunk: int | None, seed: int) -> None:
    case.actions = case.actions.clamp(max=case.head.rows - 2)
    teacher = a_teacher(case, seed)
    weights = torch.rand(len(case.hidden), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, seen = jsd_loss(case.hidden, case.head, teacher, beta, weights, chunk, case.actions)
    student, taught = (x.detach() for x in whole(case, teacher))
    student.requires_grad_()
    want = over_v(case, weights * reference.jsd(student, taught, beta), student)
    assert set(seen) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(seen[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_minillms_diagnostics_are_those_of_both_parts(temperature: float) -> None:
    case = make_case(2, tokens=12, vocabulary=9)
    g = torch.Generator().manual_seed(4)
    teacher = Teacher(case.target.old, Head(torch.randn(9, 4, generator=g, dtype=torch.float64)))
    weights = torch.rand(12, generator=g, dtype=torch.float64)
    logits = case.head.logits(case.hidden).detach().requires_grad_()
    logprobs = (logits / temperature).log_softmax(-1).gather(-1, case.actions.unsqueeze(-1)).squeeze(-1)
    old = logprobs.detach() + torch.randn(12, generator=g, dtype=torch.float64)
    returns, rows = torch.randn(12, generator=g, dtype=torch.float64), torch.zeros(12, dtype=torch.long)
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * returns, ratio.clamp(0.8, 1.2) * returns)
    taught = teacher.head.logits(teacher.hidden)
    want = over_v(case, weights * (reference.jsd(logits, taught, 1.0) - gain), logits)
    batch = PolicyBatch(logprobs.detach(), old, returns, rows, 12, 1, actions=case.actions)
    _, seen = minillm(case.hidden, case.head, teacher, batch, weights, Clip(0.2, 0.2), temperature)
    assert 0 < seen["clipped"].sum() < 12
    for name, value in want.items():
        torch.testing.assert_close(seen[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_minillms_loss_and_gradient_are_the_papers_token_by_token(temperature: float) -> None:
    """Restated on plain logits: two responses of 7 and 5 tokens in a minibatch of 20, drawn from the mixture at T."""
    case, lengths, share = make_case(6, tokens=12, vocabulary=9, spread=0.3), [7, 5], 0.2
    g = torch.Generator().manual_seed(4)
    teacher = Teacher(case.target.old, Head(torch.randn(9, 4, generator=g, dtype=torch.float64)))
    z, z_old = case.head.logits(case.hidden), case.head.logits(case.hidden + 0.3 * case.target.old).detach()
    taught, index = teacher.head.logits(teacher.hidden), case.actions.unsqueeze(-1)

    def says(logits: Tensor, t: float) -> Tensor:
        return (logits / t).log_softmax(-1).gather(-1, index).squeeze(-1)

    want, at = torch.zeros((), dtype=torch.float64), 0
    gain, old, new, phi = says(taught, 1) - says(z_old, 1), *(says(x, temperature) for x in (z_old, z, taught))
    for length in lengths:
        for t in range(at, at + length):
            following = gain[t + 1 : at + length]
            r = following.mean() if len(following) else torch.zeros(())
            w = old[t].exp() / (share * phi[t].exp() + (1 - share) * old[t].exp())
            rho = (new[t] - old[t]).exp()
            p, q = z[t].softmax(-1), taught[t].softmax(-1)
            kl = (p * (p.log() - q.log())).sum()
            want = want + w * (kl - torch.minimum(rho * r, rho.clamp(0.8, 1.2) * r)) / 20
        at += length
    rows = torch.tensor([0] * 7 + [1] * 5)
    got, _ = token_logprobs(case.hidden, case.head, case.actions, temperature=temperature)
    batch = PolicyBatch(got, old, mean_reward_to_go(gain, rows), rows, 20, 3, actions=case.actions)
    weights = mixture_weights(old, phi, share)
    loss, seen = minillm(case.hidden, case.head, teacher, batch, weights, Clip(0.2, 0.2), temperature)
    assert 0 < seen["clipped"].sum() < 12
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, case.hidden)[0] for x in (loss, want)))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_policy_that_is_its_teacher_has_no_loss_and_no_gradient(beta: float) -> None:
    case = make_case(1)
    loss, found = jsd_loss(case.hidden, case.head, Teacher(case.hidden.detach(), case.head), beta)
    (grad,) = torch.autograd.grad(loss, case.hidden)
    assert abs(loss.item()) < 1e-14 and grad.norm() < 1e-14 and found["logit_grad_norm"].max() < 1e-14


def test_the_ends_are_the_two_divergences_and_the_middle_is_symmetric() -> None:
    a, b = torch.randn(2, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(reference.jsd(a, b, 0.0), reference.kld(a, b))
    torch.testing.assert_close(reference.jsd(a, b, 1.0), reference.kld(b, a))
    torch.testing.assert_close(reference.jsd(a, b, 0.5), reference.jsd(b, a, 0.5))


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_a_share_outside_the_unit_interval_is_refused(beta: float) -> None:
    case = make_case(1)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        jsd_loss(case.hidden, case.head, a_teacher(case, 0), beta)


def test_minillms_gradient_is_that_of_the_reverse_kl_of_whole_responses() -> None:
    """Two tokens of a vocabulary of 3, all 9 responses: the expectation of the two-part gradient under π_θ is the
    gradient of KL(π_θ ‖ φ) over responses. Length normalisation divides by 1 here, as one token follows at most."""
    vocabulary = 3
    g = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(1, vocabulary, generator=g, dtype=torch.float64),
        torch.randn(vocabulary, vocabulary, generator=g, dtype=torch.float64),
    )
    states = torch.cat([first, second]).requires_grad_()  # logits are the states: the head is the identity
    taught = torch.randn(1 + vocabulary, vocabulary, generator=g, dtype=torch.float64)
    head = Head(torch.eye(vocabulary, dtype=torch.float64))
    log_p, log_t = states.log_softmax(-1), taught.log_softmax(-1)
    responses = [(a, b) for a in range(vocabulary) for b in range(vocabulary)]
    joint = torch.stack([log_p[0, a] + log_p[1 + a, b] for a, b in responses])
    joint_t = torch.stack([log_t[0, a] + log_t[1 + a, b] for a, b in responses])
    (want,) = torch.autograd.grad((joint.exp() * (joint - joint_t)).sum(), states, retain_graph=True)
    got = torch.zeros_like(want)
    for (a, b), p in zip(responses, joint.exp().detach(), strict=True):
        index, actions, rows = torch.tensor([0, 1 + a]), torch.tensor([a, b]), torch.zeros(2, dtype=torch.long)
        logprobs = log_p[index, actions]
        advantages = mean_reward_to_go((log_t[index, actions] - logprobs).detach(), rows)
        batch = PolicyBatch(logprobs, logprobs.detach(), advantages, rows, 2, 1)
        ones = torch.ones(2, dtype=torch.float64)
        loss, _ = minillm(states[index], head, Teacher(taught[index], head), batch, ones, Clip(0.2, 0.2))
        got += p * 2 * torch.autograd.grad(loss, states, retain_graph=True)[0]  # the loss is a mean over 2 tokens
    torch.testing.assert_close(got, want)


def test_weights_correct_for_the_mixture_and_never_exceed_its_inverse_share() -> None:
    p, q = (torch.rand(2, 50, dtype=torch.float64) + 1e-3).unbind()
    weights = mixture_weights(p.log(), q.log(), 0.2)
    torch.testing.assert_close(weights, p / (0.2 * q + 0.8 * p))
    assert weights.max() <= 1.25
    assert mixture_weights(p.log(), q.log(), 0.0).tolist() == [1.0] * 50
