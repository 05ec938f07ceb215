"""The study of gradients on one batch: its numbers are the equations', and its claims are judged by its thresholds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml

from lco_lite.command import command
from lco_lite.objectives import reference
from lco_lite.rollout.engine import Response
from lco_lite.sequences import Example
from lco_lite.study import dynamics
from lco_lite.study.base import Results
from tests.conftest import TINY
from tests.train.test_chain import run_stage

STRATEGY = {s.name: s for s in dynamics.STRATEGIES}


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A run with sft and reward model."""
    file = tmp_path_factory.mktemp("dynamics") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    run_stage(file, "rm")
    return file


@pytest.fixture(scope="module")
def ctx(warm):
    with command(str(warm), warm.parent / "runs", None, [], {}, quiet=True) as ctx:
        yield ctx


@pytest.fixture(scope="module")
def opened(ctx):
    return dynamics.open_models(ctx, None)


def logits(role, batch):
    with torch.no_grad():
        return role.model.head.logits(role.hidden(batch)).double()


@pytest.mark.parametrize("name", STRATEGY)
@pytest.mark.parametrize("sign", dynamics.SIGNS)
def test_the_gradients_in_the_logits_are_those_of_the_equations(opened, monkeypatch, name, sign):
    """At the third update, when π_θ is no longer π_old, by autograd on plain logits in float64."""
    if sign not in STRATEGY[name].signs:
        pytest.skip("cross-entropy has no wrong side")
    models, parameters = opened
    examples = [Example([5, 6, 7], [8, 9, 10, 11]), Example([12, 13], [14, 15])]
    phase = dynamics.phase_of([Response(e, False) for e in examples], sign, 12)
    seen, before = [], [q.detach().clone() for _, q in parameters]
    real = dynamics.training.accumulate

    def looking(models, rl, report, minibatch, tokens):
        seen.append((minibatch[0], logits(models.policy, minibatch[0].batch)))
        real(models, rl, report, minibatch, tokens)

    monkeypatch.setattr(dynamics.training, "accumulate", looking)
    rl = STRATEGY[name].settings(3e-3)
    curves = dynamics.updates(models, parameters, phase, rl, 3)
    (micro, old), (_, z) = seen[0], seen[2]
    a = 1.0 if sign == "pos" else -1.0
    actions, p, p_old = micro.batch.actions, z.softmax(-1), old.softmax(-1)
    one = torch.nn.functional.one_hot(actions, z.shape[-1]).double()
    ratio = (p / p_old).gather(-1, actions[:, None])
    if name in ("sft", "reinforce"):
        expected = a * (p - one)  # eq 4
    elif name.startswith("ppo"):
        inside = ratio < 1.2 if a > 0 else ratio > 0.8
        held = inside if name == dynamics.CLIPPED else torch.ones_like(inside)
        expected = a * ratio * (p - one) * held  # eq 5
    else:
        sparse = reference.sparse_advantages(actions, torch.full((len(actions),), a).double(), z.shape[-1])
        if name == "kld, dense":
            sparse = logits(models.reward_model, micro.batch) - logits(models.reference, micro.batch)
        target = reference.optimal_logits(old, sparse, 1.0)
        gap = z - target
        of = {"lch": gap.tanh() / z.shape[-1], "mse": 2 * gap / z.shape[-1]}
        expected = of.get(name, p - target.softmax(-1))  # eq 47
    at_action = expected.gather(-1, actions[:, None]).abs().mean().item()
    others = expected.scatter(-1, actions[:, None], 0.0).norm(dim=-1).mean().item()
    dynamics.restore([(q, value) for (_, q), value in zip(parameters, before, strict=True)])
    assert (p - p_old).abs().max() > 1e-4, "the policy has moved"
    assert curves["logit_grad_sampled"][2] == pytest.approx(at_action, rel=2e-3, abs=1e-7)
    assert curves["logit_grad_others"][2] == pytest.approx(others, rel=2e-3, abs=1e-7)
    assert curves["sampled_prob"][2] == pytest.approx(p.gather(-1, actions[:, None]).mean().item(), rel=1e-4)


@pytest.mark.parametrize("full", [None, False])
def test_every_strategy_starts_from_the_same_weights_and_all_or_the_adapters_are_trained(ctx, monkeypatch, full):
    task = dynamics.rewarding_task(ctx.recipe)
    monkeypatch.setattr(type(task), "grade", lambda self, text, item: SimpleNamespace(right=len(text) % 2 == 0))
    row = dynamics.probe(
        ctx, {"updates": 2, "prompts": 32, "responses": 3, "full": full, "lr": 1e-4, "adapter_lr": 1e-4}
    )
    assert row["trained"] == ("adapter" if full is False else "all weights")
    assert row["responses"] == {"neg": 3, "pos": 3} and 0 < row["accuracy"] < 1
    assert list(row["curves"]) == list(STRATEGY) and list(row["curves"]["sft"]) == ["pos"]
    for sign in dynamics.SIGNS:
        first = {c[sign]["entropy"][0] for c in row["curves"].values() if sign in c}
        assert max(first) == pytest.approx(min(first), rel=1e-4)
    kld = row["curves"]["kld"]["neg"]
    assert kld["qkv_grad_norm"][0] < kld["grad_norm"][0] and kld["loss"][1] < kld["loss"][0]
    sft, reinforce = row["curves"]["sft"]["pos"], row["curves"]["reinforce"]["pos"]
    assert sft["grad_norm"] == pytest.approx(reinforce["grad_norm"], rel=1e-3), "cross-entropy is reinforce with A = 1"


def row(seed, ppo=(1, 4, 0.1), clipped=(1, 2, 0.0), lco=(1, 1.1, 0.1), entropy=(1, 1, 0.9), prob=(0.8, 0.8, 0.5)):
    """Hand-made: a little noise a seed."""
    noise = 1 + 0.01 * (-1) ** seed

    def curves(norm):
        numbers = {"qkv_grad_norm": norm, "grad_norm": norm, "entropy": entropy, "sampled_prob": prob}
        return {name: [values[0], values[1] * noise, values[2] * noise] for name, values in numbers.items()}

    of = {dynamics.FREE: {"neg": curves(ppo), "pos": curves((1, 1, 0.2))}, dynamics.CLIPPED: {"neg": curves(clipped)}}
    of |= {name: {sign: curves(lco) for sign in dynamics.SIGNS} for name in dynamics.LCO}
    told = {"trained": "all weights", "lr": 1e-4, "responses": {"neg": 6, "pos": 6}}
    return {"label": dynamics.LABEL, "seed": seed, "curves": of, **told}


def verdicts(rows):
    report = dynamics.Dynamics().report(Results(rows))
    return {claim.name: claim.verdict for claim in report.claims}, report


def test_claims_are_reproduced_where_all_their_numbers_say_so():
    found, report = verdicts([row(seed) for seed in range(1, 5)])
    assert set(found.values()) == {"reproduced"} and len(found) == 7
    assert len(report.plots) == 3 and len(report.tables[0].columns) == len(report.tables[0].rows[0])


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({"ppo": (1, 1, 0.1)}, "C1 grows"),
        ({"clipped": (1, 8, 0)}, "C1 clip"),
        ({"lco": (1, 1.1, 0.9)}, "C2 kld"),
        ({"lco": (1, 3, 0.1)}, "C2 mse"),
        ({"entropy": (1, 1, 0.1)}, "C2 lch"),
        ({"entropy": (1, 5, 5)}, "C2 lch"),
        ({"prob": (0.8, 0.8, 0.01)}, "C2 kld"),
    ],
)
def test_a_claim_is_not_reproduced_where_one_number_is_on_the_wrong_side(changed, claim):
    found, _ = verdicts([row(seed, **changed) for seed in range(1, 5)])
    assert found[claim] == "not reproduced"
    assert claim != "C2 kld" or "prob" not in changed or found["C2 kld, dense"] == "reproduced"


def test_a_claim_is_unclear_without_rows_with_one_seed_and_where_seeds_disagree():
    assert set(verdicts([])[0].values()) == {"unclear"}
    assert set(verdicts([row(1)])[0].values()) == {"unclear"}
    found, _ = verdicts([row(seed, ppo=(1, 1.0 if seed % 2 else 5.0, 0.1)) for seed in range(1, 5)])
    assert found["C1 grows"] == "unclear"


def test_the_seed_that_rates_are_chosen_on_does_not_count():
    with_it = verdicts([row(0, ppo=(1, 1e-6, 1)), *(row(seed) for seed in range(1, 5))])[1]
    assert with_it.claims == verdicts([row(seed) for seed in range(1, 5)])[1].claims
