"""Our losses and advantages against TRL's own code on identical tensors, in float64: extra ``bench``.

TRL's methods are called on a stand-in for its trainer, so that no model, data set or accelerator is needed. What
differs between the two, and is held fixed here:

- TRL averages each micro-batch of GRPO, GSPO and RLOO over its own sequences and then over micro-batches; ours divides
  by the minibatch's sequences. The same where micro-batches have as many sequences each.
- TRL's CISPO takes as ``epsilon_high`` the largest weight, ours as ``clip_high`` what it is more than 1.
- TRL divides DAPO and CISPO by the rollout's tokens times the share of it in one update; ours by those of the update
  itself. The same for one update a rollout.
- TRL masks padding of [B, L]; ours has response tokens only, [T].
- TRL's GKD needs two logits of one width; ours takes the rows that both heads share, so here heads are of one width.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lco_lite.feedback.advantages import divide_by_group_std, subtract_baseline
from lco_lite.objectives.distillation import Teacher, jsd_loss
from lco_lite.objectives.head import Head
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.objectives.policy_gradient import POLICY_GRADIENTS, Clip, Correction, PolicyBatch

trl = pytest.importorskip("trl", reason="needs TRL 1.16: pip install 'lco-lite[bench]'")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"parity is stated for TRL 1.16, found {trl.__version__}", allow_module_level=True)

from trl import GRPOTrainer, RLOOTrainer  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

GROUP, LENGTHS, LIMIT = 4, [3, 1, 6, 2, 5, 5, 1, 4], 9
LONGEST, SEQUENCES = max(LENGTHS), len(LENGTHS)
MASK = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]  # [B, L]
ROWS = MASK.nonzero()[:, 0]
# ours -> TRL's trainer, loss type and level of the ratio; the clip of both
LOSSES: dict[str, tuple[Any, str | None, str | None, Clip]] = {
    "grpo": (GRPOTrainer, "grpo", "token", Clip(0.2, 0.2)),
    "dapo": (GRPOTrainer, "dapo", "token", Clip(0.2, 0.28)),
    "dr_grpo": (GRPOTrainer, "dr_grpo", "token", Clip(0.2, 0.2)),
    "cispo": (GRPOTrainer, "cispo", "token", Clip(0.2, 0.28)),
    "gspo": (GRPOTrainer, "grpo", "sequence", Clip(3e-4, 4e-4)),
    "rloo": (RLOOTrainer, None, None, Clip(0.2, 0.2)),
}


def draw(seed: int, drift: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log π_θ [B, L] with a gradient, log π_old [B, L], advantages [B]); ``drift`` sets how far ratios are from 1."""
    g = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(SEQUENCES, LONGEST, generator=g, dtype=torch.float64)
    new = (old + drift * torch.randn(old.shape, generator=g, dtype=torch.float64)).requires_grad_()
    return new, old, torch.randn(SEQUENCES, generator=g, dtype=torch.float64)


def stand_in(new: Tensor, clip: Clip, loss_type: str | None, level: str | None, **more: Any) -> SimpleNamespace:
    """A trainer whose model has just given ``new``, with TRL's defaults wherever the loss looks."""
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    accelerator = SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    given = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "args": SimpleNamespace(delta=None, steps_per_generation=1),
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon_low": clip.low,
        "epsilon_high": clip.high + (loss_type == "cispo"),
        "max_completion_length": LIMIT,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "_metrics": metrics,
        "_get_per_token_logps_and_entropies": lambda *a, **k: (new, torch.ones_like(new), None),
    }
    return SimpleNamespace(**given | more)


def theirs(
    name: str,
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    part: slice = slice(None),
    parts: int = 1,
    importance_sampling_ratio: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """TRL's loss of the sequences in ``part``, one of ``parts`` micro-batches of the only update of a rollout."""
    trainer, loss_type, level, clip = LOSSES[name]
    mask = MASK[part].long()
    arguments = SimpleNamespace(delta=None, steps_per_generation=parts)
    settings |= {"args": arguments, "current_gradient_accumulation_steps": parts}
    stub = stand_in(new[part], clip, loss_type, level, **settings)
    ids = torch.zeros_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages[part],
        "old_per_token_logps": old[part],
        "old_logps": (old[part] * mask).sum(1),
        "num_items_in_batch": MASK.sum(),
        "importance_sampling_ratio": importance_sampling_ratio,
    }
    loss = trainer._compute_loss(stub, None, inputs)
    return loss / parts if trainer is RLOOTrainer else loss  # transformers' loop divides what RLOO returns


def ours(name: str, new: Tensor, old: Tensor, advantages: Tensor, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(our loss, which tokens or sequences the clip holds)."""
    mask = MASK[part]
    rows = mask.nonzero()[:, 0]
    batch = PolicyBatch(
        new[part][mask], old[part][mask], advantages[part][rows], rows, len(ROWS), SEQUENCES, limit=LIMIT
    )
    loss, found = POLICY_GRADIENTS[name](batch, LOSSES[name][3])
    return loss, found["clipped"]


# ours -> TRL's mode, its bounds
CORRECTIONS: dict[str, tuple[str, float | None, float]] = {
    "truncate": ("truncate", None, 1.3),
    "mask": ("mask", 0.8, 1.25),
}


@pytest.mark.parametrize("kind", CORRECTIONS)
@pytest.mark.parametrize(("name", "level"), [("grpo", "token"), ("dapo", "token"), ("rloo", "sequence")])
def test_the_correction_for_another_sampler_is_that_of_trl(name: str, level: str, kind: str) -> None:
    """Weights from its rollout code; loss and gradient of those whose ratio is a token's. TRL's RLOO has no correction,
    its weight of a sequence is that of its GRPO."""
    new, old, advantages = draw(5, 0.3)
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampler = old + (0.3 if level == "token" else 0.15) * noise
    told = [row[:n].tolist() for row, n in zip(sampler, LENGTHS, strict=True)]
    mode, low, high = CORRECTIONS[kind]
    vllm = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    bounds = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    mode = {"vllm_importance_sampling_mode": f"{level}_{mode}"}
    out = rolled_out(GRPOTrainer, torch.randn(SEQUENCES).double(), told, old=old, beta=0.0, **vllm, **bounds, **mode)
    want = out["importance_sampling_ratio"]  # [B, L], or [B, 1]
    held = Correction(kind, high, low or 0.0, high)
    log_w = (old - torch.tensor(sampler.float().tolist(), dtype=torch.float64))[MASK]
    whole = torch.zeros(SEQUENCES, dtype=torch.float64).index_add(0, ROWS, log_w)
    got = held(log_w) if level == "token" else held(whole)
    torch.testing.assert_close(got, want[MASK] if level == "token" else want[:, 0], rtol=1e-6, atol=1e-7)
    assert ((got == 0) | (got == high)).any() and len(set(got.tolist())) > 2, "some are held, some are not"
    batch = PolicyBatch(new[MASK], old[MASK], advantages[ROWS], ROWS, len(ROWS), SEQUENCES)
    batch = replace(batch, log_w=log_w, correction=held)
    loss = POLICY_GRADIENTS[name](batch, LOSSES[name][3])[0]
    if level == "token":
        full = theirs(name, new, old, advantages, importance_sampling_ratio=want, **vllm)
    else:  # a minibatch whose sequences count as often as they weigh
        full = theirs(name, new, old, advantages * got)
    torch.testing.assert_close(loss, full, rtol=1e-6, atol=1e-8)
    grads = [torch.autograd.grad(x, new)[0] for x in (loss, full)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_trl(name: str, seed: int, drift: float) -> None:
    new, old, advantages = draw(seed, drift)
    (got, clipped), want = ours(name, new, old, advantages), theirs(name, new, old, advantages)
    assert clipped.any() == (drift > 0), "the clip acts only once the policy has moved"
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    got_grad, want_grad = (torch.autograd.grad(x, new)[0] for x in (got, want))
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-14)
    assert want_grad[MASK].any() and not want_grad[~MASK].any()


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_trls_accumulated_loss(name: str) -> None:
    new, old, advantages = draw(7, 0.3)
    halves = slice(0, SEQUENCES // 2), slice(SEQUENCES // 2, SEQUENCES)
    got = sum(ours(name, new, old, advantages, part)[0] for part in halves)
    want = sum(theirs(name, new, old, advantages, part, parts=2) for part in halves)
    assert isinstance(got, Tensor) and isinstance(want, Tensor)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (got, want)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_log_probabilities_at_a_temperature_and_grpos_gradient_in_the_weights_are_those_of_trl(
    temperature: float, softcap: float | None
) -> None:
    """A model's forward as TRL's trainer does it, with its own head, which is in float32."""
    import transformers as tf

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 41}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = tf.LlamaConfig(**size) if softcap is None else tf.Gemma2Config(**size, final_logit_softcapping=softcap)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from uniform
    _, _, advantages = draw(3, 0.0)
    prompt, ids = torch.full((SEQUENCES, 1), 7), torch.randint(1, 41, (SEQUENCES, LONGEST)) * MASK
    old = -2 - torch.rand(SEQUENCES, LONGEST)
    everything = torch.cat([prompt, ids], 1), torch.cat([torch.ones_like(prompt), MASK.long()], 1)
    hidden = model.base_model(input_ids=everything[0], attention_mask=everything[1]).last_hidden_state[:, :-1][MASK]
    head = Head(model.lm_head.weight, softcap=softcap)
    got, _ = token_logprobs(hidden, head, ids[MASK], temperature=temperature)
    batch = PolicyBatch(got, old[MASK], advantages[ROWS].float(), ROWS, len(ROWS), SEQUENCES)
    clip = Clip(0.2, 0.2)
    loss, _ = POLICY_GRADIENTS["grpo"](batch, clip)
    weights = list(model.parameters())
    ours_grad = torch.autograd.grad(loss, weights)

    add_fused_lm_head(model, temperature=temperature)
    stub = stand_in(torch.zeros(0), clip, "grpo", "token")
    stub.accelerator.autocast, stub.accelerator.is_main_process = contextlib.nullcontext, False
    logps, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(stub, model, *everything, LONGEST)
    torch.testing.assert_close(got, logps[MASK], rtol=1e-5, atol=1e-5)
    stub._get_per_token_logps_and_entropies = lambda *a, **k: (logps, torch.ones_like(logps), None)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": ids,
        "completion_mask": MASK.long(),
        "advantages": advantages.float(),
        "old_per_token_logps": old,
        "num_items_in_batch": MASK.sum(),
    }
    want = GRPOTrainer._compute_loss(stub, None, inputs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    theirs_grad = torch.autograd.grad(want, weights)
    for mine, other in zip(ours_grad, theirs_grad, strict=True):
        assert (mine - other).norm() < 1e-4 * other.norm() + 1e-7


def rollout_advantages(trainer: Any, rewards: Tensor, **settings: Any) -> Tensor:
    """The advantages [B] that TRL's trainer gives responses with ``rewards`` [B], in its own rollout code."""
    return rolled_out(trainer, rewards, **settings)["advantages"]


def rolled_out(trainer: Any, rewards: Tensor, told: list[list[float]] | None = None, **settings: Any) -> dict[str, Any]:
    """What TRL's rollout code gives to its loss; ``told``: the sampler's log-probabilities."""
    made = [[5] * n for n in LENGTHS]
    prompts, texts = [[1]] * SEQUENCES, ["x"] * SEQUENCES
    answer: Any = (prompts, made, texts)
    if trainer is GRPOTrainer:  # also tools, fields of the user's and images: none
        answer = (prompts, made, None, texts, told, {}, None, None)
    logs: dict[str, Any] = {k: [] for k in ("prompt", "completion", "advantages")}
    old = settings.pop("old", torch.zeros(SEQUENCES, LONGEST, dtype=torch.float64))
    reference = settings.pop("reference", None)
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)

    def logprobs(asked: Any, *a: Any, **k: Any) -> tuple[Tensor | None, None, None]:
        return (old if asked is model else reference), None, None

    given = {
        "model": model,
        "ref_model": SimpleNamespace(),
        "_get_per_token_logps_and_entropies": logprobs,
        "_generate": lambda prompts: answer,
        "_calculate_rewards": lambda *a: rewards[:, None],
        "reward_weights": torch.ones(1, dtype=torch.float64),
        "reward_func_names": ["given"],
        "reward_clip_range": None,
        "num_generations": GROUP,
        "scale_rewards": "group",
        "normalize_advantages": False,
        "multi_objective_aggregation": "sum_then_normalize",
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "num_iterations": 1,
        "pad_to_multiple_of": None,
        "mask_truncated_completions": False,
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "_logs": logs | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "args": SimpleNamespace(
            per_device_train_batch_size=SEQUENCES,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
    }
    stub = stand_in(torch.zeros(0), Clip(0.2, 0.2), None, None, **given | settings)
    return trainer._generate_and_score_completions(stub, [{"prompt": "x"}] * SEQUENCES)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_grpos_group_advantages_are_those_of_trl(scale: str) -> None:
    rewards = torch.tensor([1.0, -1, -1, 1, 1, 1, 1, 1], dtype=torch.float64)
    got = subtract_baseline(rewards, "group", GROUP)
    if scale == "group":
        got = divide_by_group_std(got, rewards, GROUP)
    torch.testing.assert_close(got, rollout_advantages(GRPOTrainer, rewards, scale_rewards=scale))


def test_rloos_advantages_less_the_kl_to_the_reference_are_those_of_trl() -> None:
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(SEQUENCES, generator=g, dtype=torch.float64)
    old, reference = -torch.rand(2, SEQUENCES, LONGEST, generator=g, dtype=torch.float64)
    want = rollout_advantages(RLOOTrainer, rewards, beta=0.05, old=old, reference=reference)
    penalised = rewards - 0.05 * ((old - reference) * MASK).sum(1)
    torch.testing.assert_close(subtract_baseline(penalised, "leave_one_out", GROUP), want)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gkds_divergence_and_its_gradient_are_those_of_trl(beta: float) -> None:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    head, teacher = Head(normal(11, 5)), Teacher(normal(len(ROWS), 7), Head(normal(11, 7)))
    hidden = normal(len(ROWS), 5).requires_grad_()
    got, _ = jsd_loss(hidden, head, teacher, beta, chunk=4)
    padded = torch.zeros(2, SEQUENCES, LONGEST, 11, dtype=torch.float64)
    student, taught = padded.unbind()
    student = student.index_put((MASK,), head.logits(hidden))
    taught[MASK] = teacher.head.logits(teacher.hidden)
    labels = torch.where(MASK, 1, -100)
    want = GKDTrainer.generalized_jsd_loss(student, taught, labels, beta=beta)  # its mean is over unmasked tokens
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (got, want)), rtol=1e-10, atol=1e-12)
