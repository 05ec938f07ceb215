"""Gradients against verl's own losses on identical tensors, in float64; skipped without verl 0.9.1, which is no extra.

Its losses have stop-gradients in other places, and DRO lacks a constant, so values differ and gradients are compared.
Held fixed: verl's importance weights are truncated at ``clip_ratio_c``, ours are not; its CISPO has a lower bound too.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from lco_lite.objectives.policy_gradient import POLICY_GRADIENTS, Clip, PolicyBatch

algorithms: Any = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl 0.9.1")
if importlib.metadata.version("verl") != "0.9.1":
    pytest.skip("parity is stated for verl 0.9.1", allow_module_level=True)

from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

LENGTHS, LIMIT, BETA = [3, 1, 6, 2, 5, 5, 1, 4], 6, 0.3
MASK = torch.arange(LIMIT) < torch.tensor(LENGTHS)[:, None]  # [B, L]
ROWS = MASK.nonzero()[:, 0]
# ours -> verl's, how it aggregates, the clip of both
LOSSES = {
    "dppo": ("dppo_tv", "seq-mean-token-sum-norm", Clip(0.15, 0.15)),
    "cispo": ("cispo", "token-mean", Clip(0.9999, 0.28)),
    "dro": ("dro", "token-mean", Clip(0.2, 0.2)),
    "dr_grpo": ("vanilla", "seq-mean-token-sum-norm", Clip(0.2, 0.2)),
}


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_verl(name: str, seed: int) -> None:
    theirs, aggregation, clip = LOSSES[name]
    g = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(MASK.shape, generator=g, dtype=torch.float64)
    new = (old + 0.4 * torch.randn(MASK.shape, generator=g, dtype=torch.float64)).clamp(max=-1e-3).requires_grad_()
    advantages = torch.randn(len(LENGTHS), 1, generator=g, dtype=torch.float64).expand(MASK.shape)
    sizes = {"loss_scale_factor": LIMIT, "global_batch_size": len(LENGTHS), "batch_num_tokens": len(ROWS)}
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=clip.low,
        clip_ratio_high=clip.high,
        clip_ratio_c=1e4,
        policy_loss=PolicyLossConfig(loss_mode=theirs, dro_beta=BETA),
    )
    config.global_batch_info.update(sizes)
    want, seen = algorithms.get_policy_loss_fn(theirs)(old, new, advantages, MASK.double(), aggregation, config)
    batch = PolicyBatch(new[MASK], old[MASK], advantages[MASK], ROWS, len(ROWS), len(LENGTHS), beta=BETA, limit=LIMIT)
    got, found = POLICY_GRADIENTS[name](batch, clip)
    assert gradient(want, new)[MASK].count_nonzero() > len(ROWS) / 2
    torch.testing.assert_close(gradient(got, new), gradient(want, new), rtol=1e-12, atol=1e-14)
    if name == "dppo":
        assert 0 < found["clipped"].mean().item() == pytest.approx(seen["actor/pg_clipfrac"])
