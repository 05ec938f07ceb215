"""LCO inside TRL's trainer, for clusters: TRL 1.16 samples the responses and spreads the work, the loss is LCO's.

    trainer = LCOTrainer(model, reward_model=phi, reference=phi_ref, args=GRPOConfig(...), train_dataset=prompts,
                         processing_class=tokenizer, peft_config=LoraConfig(...), objective="kld", beta=1.0)
    trainer.train()

π_old is the policy when the responses were sampled. Each time TRL has sampled, every micro-batch is scored in the very
shape in which it is trained on, and its target serves all of ``steps_per_generation`` and ``num_iterations``. The loss
is a mean over the response tokens of an update, of all processes. docs/scaling.md says what is tested.

Legend: B sequences of a micro-batch, L tokens of the longest prompt and the longest completion together, C of the
latter, T response tokens, d hidden.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from lco_lite.errors import UsageError
from lco_lite.feedback.advantages import dpo_shift, log_phi_shift, sampled_advantages
from lco_lite.models.language_model import decoder_of, head_of, prove_head
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import OBJECTIVES, WEIGHTINGS, lco_loss
from lco_lite.objectives.targets import DenseTarget

START = "start"  # the adapter that is the policy before RL, where there is an anchor
AS_IS = ""  # whatever adapter is active
# settings that only GRPO's loss would heed, and what they are when they ask for nothing
NEUTRAL: dict[str, Any] = {"beta": 0.0, "entropy_coef": 0.0, "use_adaptive_entropy": False, "sync_ref_model": False}
NEUTRAL |= {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}


@dataclass(frozen=True)
class PaddedBatch:
    """TRL's micro-batch: prompts padded on the left, completions on the right."""

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    response: Tensor  # [B, C] of bool: tokens that are trained on
    actions: Tensor  # [T]

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> PaddedBatch:
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        response = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:  # what a tool said is no action
            response = response & inputs["tool_mask"].bool()
        return cls(ids, mask, response, inputs["completion_ids"][response])

    @property
    def forward(self) -> dict[str, Tensor]:
        """What a model is given. Positions count from each row's first real token."""
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": positions}

    def select(self, hidden: Tensor) -> Tensor:
        """[B, L, d] -> [T, d]: the states that predict response tokens."""
        return hidden[:, -self.response.shape[1] - 1 : -1][self.response]


@dataclass(frozen=True)
class Scorer:
    """A model that is only asked for hidden states, with one of its adapters; None: its base alone."""

    model: Any
    head: Head
    adapter: str | None = AS_IS

    def hidden(self, batch: PaddedBatch) -> Tensor:
        """[T, d]"""
        with switched(self.model, self.adapter):
            decoder = decoder_of(base_of(self.model))
            return batch.select(decoder(**batch.forward, use_cache=False).last_hidden_state)


class LCOTrainer(GRPOTrainer):
    """GRPOTrainer with LCO's loss, for text. What is not named here is as there.

    ``reward_model``, φ: a causal model of the policy's tokenizer, or the name of an adapter of ``model``, which is a
    PeftModel then. ``reference``, φ_ref: a model with φ's head, or the name of an adapter of φ's PeftModel; None: φ's
    base without adapters. ``feedback``: "dpo", A = log φ − log φ_ref (eq 13); "logprob", A = log φ (eq 12), without a
    reference. ``objective``: "kld", "lch" or "mse" (eqs 8 to 10). ``beta``: β, in units of the advantage; GRPO's is 0.
    ``weighting`` and ``standardise``: as in ``lco_loss``. ``anchor`` λ: z* starts at (1−λ) z_old + λ z_ref, where
    z_ref is the policy before RL: a copy of its adapter; without adapters, ``start``, a second copy of the model.

    ``reward_funcs`` are for the log alone. Dropout is off: an update sees the very function that scored. A head that is
    trained (full fine-tuning) is copied for each generation batch. Raises UsageError for what this loss cannot do.
    """

    def __init__(
        self,
        model: Any,
        reward_model: Any,
        reference: Any = None,
        *,
        objective: str = "kld",
        beta: float = 1.0,
        anchor: float = 0.0,
        weighting: str = "mean",
        standardise: bool = False,
        feedback: str = "dpo",
        start: Any = None,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        **trl: Any,
    ) -> None:
        for name, value, accepted in (
            ("objective", objective, OBJECTIVES),
            ("weighting", weighting, WEIGHTINGS),
            ("feedback", feedback, ("dpo", "logprob")),
        ):
            if value not in accepted:
                raise UsageError(f"{name}: {value!r}; accepted: {', '.join(accepted)}")
        if not beta > 0 or not 0 <= anchor <= 1:
            raise UsageError(f"beta must be positive and anchor in 0..1; got {beta} and {anchor}")
        args = GRPOConfig("lco") if args is None else args
        for name, value in NEUTRAL.items():
            if getattr(args, name) != value:
                raise UsageError(f"args.{name}: {getattr(args, name)} is for GRPO's loss, not LCO's: leave it {value}")
        if args.steps_per_generation % args.gradient_accumulation_steps:
            raise UsageError(
                f"args.steps_per_generation: {args.steps_per_generation} is no multiple of gradient_accumulation_steps "
                f"({args.gradient_accumulation_steps}): an update is a mean over its response tokens, sampled before it"
            )
        if not is_peft_model(model) and trl.get("peft_config") is None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # the head works outside of the forward pass: DDP would miss it
        unrounded = trained_weights(model) if is_peft_model(model) else {}
        super().__init__(model, no_reward if reward_funcs is None else reward_funcs, args, **trl)
        if self._is_vlm:
            raise UsageError("processing_class: text only: give the tokenizer of the processor")
        if self.aux_loss_enabled:
            raise UsageError("args.router_aux_loss_coef: this loss has no term for routers: set it to 0.0")
        if self.is_fsdp_enabled or getattr(args.deepspeed_plugin, "zero_stage", 0) == 3:
            raise UsageError("FSDP and ZeRO-3 shard the head, which the loss reads whole: use DDP, ZeRO-1 or ZeRO-2")
        self.objective, self.weighting, self.standardise = objective, weighting, standardise
        self.lco_beta, self.anchor = beta, anchor
        if getattr(base_of(self.model), "is_quantized", False):  # TRL rounds to bfloat16, on which small steps are lost
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.data = unrounded.get(name, parameter.data).float()
        without_dropout(self.model)
        self.head = self._proved(self.model)
        if is_peft_model(self.model) and self.head.is_trained:
            raise UsageError("modules_to_save: an LM head of the adapter's own is not supported: leave it out")
        self.phi, self.phi_ref = self._feedback(reward_model, reference, feedback)
        self.start = self._start(start) if anchor else None
        with_hidden_only(base_of(self.model))

    def _proved(self, model: Any) -> Head:
        """The model's head over the tokens of the policy's tokenizer."""
        base, tokens = base_of(model), max(self._tokenizer.get_vocab().values()) + 1
        head = head_of(base, tokens)
        if head.rows < tokens:
            raise UsageError(f"{type(base).__name__}: a head of {head.rows} rows; the tokenizer has {tokens} tokens")
        prove_head(base, head)
        return head

    def _placed(self, model: Any) -> Any:
        """On this process's device, frozen."""
        return self.accelerator.prepare_model(model.requires_grad_(False).eval(), evaluation_mode=True)

    def _feedback(self, phi: Any, reference: Any, feedback: str) -> tuple[Scorer, Scorer | None]:
        if isinstance(phi, str):
            scorer = Scorer(self.model, self.head, self._adapter_of(self.model, phi, "reward_model"))
        else:
            phi = self._placed(phi)
            scorer = Scorer(phi, self._proved(phi))
        if feedback == "logprob":
            if reference is not None:
                raise UsageError("reference: feedback logprob has none (eq 12)")
            return scorer, None
        if reference is None or isinstance(reference, str):
            if not is_peft_model(scorer.model):
                raise UsageError("reference: the reward model has no adapters to take off: give φ_ref")
            named = reference and self._adapter_of(scorer.model, reference, "reference")
            return scorer, Scorer(scorer.model, scorer.head, named)
        other = Scorer(placed := self._placed(reference), self._proved(placed))
        if not torch.equal(other.head.vocabulary, scorer.head.vocabulary):
            raise UsageError("reference: its head is not the reward model's, so A is no difference of hidden states")
        return scorer, other

    def _adapter_of(self, model: Any, name: str, what: str) -> str:
        """``name``, of an adapter that is not trained."""
        known = list(model.peft_config) if is_peft_model(model) else []
        if name not in known:
            raise UsageError(f"{what}: no adapter {name!r} on the model; there are: {', '.join(known) or 'none'}")
        if model is self.model and name in model.active_adapters:
            raise UsageError(f"{what}: {name!r} is the adapter that is trained")
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.requires_grad_(False)
        return name

    def _start(self, start: Any) -> Scorer:
        """The policy before RL."""
        if start is not None:
            return Scorer(placed := self._placed(start), self._proved(placed))
        if not is_peft_model(self.model):
            raise UsageError("start: an anchor of a policy without adapters needs it, a second copy of the model")
        policy, weights = self.model.active_adapter, dict(self.model.named_parameters())
        self.model.add_adapter(START, self.model.peft_config[policy])
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if f".{START}." in key:
                    parameter.copy_(weights[key.replace(f".{START}.", f".{policy}.")]).requires_grad_(False)
        without_dropout(self.model)
        return Scorer(self.model, self.head, START)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            self._score([inputs], 1)
        elif self._buffered_inputs is not before:  # TRL has sampled, from the policy as it is now
            self._score(self._buffered_inputs, self.args.gradient_accumulation_steps)
        return inputs

    @torch.no_grad()
    def _score(self, micro_batches: list[dict[str, Any]], together: int) -> None:
        """Adds what LCO fits to each micro-batch, kept on the CPU until its turn, and the response tokens of the update
        to which ``together`` of them belong."""
        old_head = self.head.frozen() if self.head.is_trained else None
        for inputs in micro_batches:
            batch, through, more = PaddedBatch.of(inputs), self.phi.head, dict[str, Any]()
            with self.accelerator.autocast():
                old = batch.select(self.model(**batch.forward, hidden_only=True))
                hidden = self.phi.hidden(batch)
                before = None if self.phi_ref is None else self.phi_ref.hidden(batch)
                if self.start is not None:
                    reference_head = None if old_head is None else self.start.head
                    more = {
                        "anchor": self.anchor,
                        "reference": self.start.hidden(batch),
                        "reference_head": reference_head,
                    }
            if before is None:
                shift, through, base = log_phi_shift(hidden, through)
            else:
                shift, base = dpo_shift(hidden, before), before if through.softcap is not None else None
            more |= {"old_head": old_head, "shift_head": through, "shift_base": base}
            inputs["advantages"] = sampled_advantages(shift, through, batch.actions, base)
            inputs["target"] = DenseTarget(old, self.lco_beta, shift, **more).to("cpu")
        tokens = torch.tensor([len(inputs["target"]) for inputs in micro_batches], device=self.accelerator.device)
        of_updates = self.accelerator.reduce(tokens, "sum").view(-1, together).sum(1).tolist()
        for i, inputs in enumerate(micro_batches):
            inputs["num_items_in_batch"] = of_updates[i // together]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """This micro-batch's part of the mean over the update's tokens. Gradients are averaged over processes, so it is
        multiplied by their number."""
        batch, target = PaddedBatch.of(inputs), inputs["target"]
        hidden = batch.select(whole := model(**batch.forward, hidden_only=True))  # [T, d]
        seen = dict.fromkeys(("entropy", "logprob", "logit_grad_norm"), hidden.new_zeros(0))
        if not len(hidden):  # DDP waits for every weight that is trained, the head's too
            loss: Any = 0.0 * sum(x.sum() for x in (whole, self.head.weight, self.head.bias) if x is not None)
        else:
            how: dict[str, Any] = {"standardise": self.standardise, "actions": batch.actions}
            target = target.to(hidden.device)
            loss, seen = lco_loss(self.objective, hidden, self.head, target, self.weighting, **how)
            loss = loss * (self.accelerator.num_processes * len(hidden) / inputs["num_items_in_batch"])
        values = {name: seen[name] for name in ("entropy", "logit_grad_norm")}
        values |= {"sampled_prob": seen["logprob"].exp(), "advantage": inputs["advantages"]}
        sums = torch.stack([value.sum().float() for value in (*values.values(), torch.ones_like(batch.actions))])
        *totals, tokens = self.accelerator.reduce(sums, "sum").tolist()
        for name, total in zip(values, totals, strict=True):
            self._metrics["train" if self.model.training else "eval"][name].append(total / max(tokens, 1.0))
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Responses only say where the loss looks: no ratio of probabilities is needed. Of vLLM's it is logged."""
        if self.use_vllm and self.vllm_importance_sampling_correction:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return None, None, None


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """Stands in for ``reward_funcs``: TRL asks for one."""
    return [0.0] * len(completions)


def base_of(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def trained_weights(model: Any) -> dict[str, Any]:
    """By name. A value stays what it is while TRL rounds the weight's ``data``."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def switched(model: Any, adapter: str | None) -> Iterator[None]:
    """This adapter is active for the length of the block; which weights are trained stays as it was."""
    if adapter == AS_IS:
        yield
        return
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with use_adapter(model, adapter):
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def without_dropout(model: Any) -> None:
    disable_dropout_in_model(model)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def with_hidden_only(base: Any) -> None:
    """``base(..., hidden_only=True)`` gives [B, L, d], what the head receives, through whatever wraps the model: DDP
    counts gradients from its own forward pass."""
    whole = base.forward

    @functools.wraps(type(base).forward)  # generate looks at the signature
    def forward(self: Any, *args: Any, hidden_only: bool = False, **kwargs: Any) -> Any:
        if not hidden_only:
            return whole(*args, **kwargs)
        given = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        return decoder_of(self)(**given, use_cache=False).last_hidden_state

    base.forward = types.MethodType(forward, base)
