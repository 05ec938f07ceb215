"""What samples.jsonl tells of a token, against the paper's equations on plain logits."""

from __future__ import annotations

import pytest
import torch

from lco_lite.objectives.distillation import Teacher
from lco_lite.recipe import Rl
from lco_lite.sequences import Batch
from lco_lite.train.methods import MicroBatch
from lco_lite.train.samples import RARE, candidates
from tests.objectives.objective_cases import make_case

NOTHING = torch.empty(0, dtype=torch.long)


def micro_of(case, target, advantages):
    old = case.target.old
    batch = Batch(NOTHING, NOTHING, NOTHING, case.actions, torch.zeros(len(old), dtype=torch.long))
    responses = torch.zeros(len(old), dtype=torch.long)
    return MicroBatch(batch, responses, len(old), 1, old, case.target.old_head, advantages, target)


def looked(case, target, beta=1.0):
    advantages = torch.linspace(-1, 1, len(case.actions))
    micro, every = micro_of(case, target, advantages), torch.arange(len(case.actions))
    with torch.no_grad():
        return candidates(micro, case.hidden.detach(), case.head, every, Rl(beta=beta)), advantages


@pytest.mark.parametrize(
    "how",
    [
        {"kind": "dense", "padding": 2},
        {"kind": "dense", "anchor": 0.5, "own_head": True, "bias": True},
        {"kind": "dense", "trained": True, "softcap": 4.0},
        {"kind": "sparse", "vocabulary": 30},
        {"kind": "mixed", "beta": 0.5},
    ],
    ids=str,
)
def test_a_token_has_the_probabilities_of_all_three_policies_and_the_advantages_of_the_likeliest(how):
    case = make_case(7, **how)
    tokens, advantages = looked(case, case.target, case.target.beta)
    old, star, new = (z.softmax(-1) for z in (case.old_logits, case.target_logits, case.logits().detach()))
    base = case.old_logits
    if case.target.anchor:
        reference = case.target.reference_head or case.head
        base = (base + reference.logits(case.target.reference)[:, : case.rows]) / 2
    dense = case.target.beta * (case.target_logits - base)
    for t, of in enumerate(tokens):
        assert of[0][0] == case.actions[t] and of[0][1] == pytest.approx(advantages[t].item(), rel=1e-3)
        assert [one[2] for one in of[1:]] == sorted((one[2] for one in of[1:]), reverse=True)
        likely = {
            int(i)
            for p in (old, star, new)
            for i in p[t].topk(5).indices
            if max(q[t, i] for q in (old, star, new)) > RARE
        }
        assert {one[0] for one in of} == likely | {int(case.actions[t])}
        for token, a, *ps in of:
            assert ps == pytest.approx([p[t, token].item() for p in (old, star, new)], abs=6e-5)
            if token != case.actions[t]:
                assert (
                    a is None
                    if how["kind"] == "sparse"
                    else a == pytest.approx(dense[t, token].item(), rel=1e-3, abs=1e-6)
                )


def test_a_policy_gradient_has_no_target_and_a_distillation_its_teacher():
    case = make_case(3, kind="sparse", vocabulary=9)
    for target, star in ((None, None), (Teacher(case.target.reference, case.head), True)):
        tokens, _ = looked(case, target)
        teacher = case.head.logits(case.target.reference).softmax(-1)
        for t, of in enumerate(tokens):
            for token, _, _, p, _ in of:
                assert p is None if star is None else p == pytest.approx(teacher[t, token].item(), abs=6e-5)
