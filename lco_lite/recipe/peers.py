"""What a key that a recipe does not have is called here: the names of TRL, verl, OpenRLHF, unsloth and mlx-lm, our own
without their section, and near misses. Keys are told whole (``rl.lr``), as ``--set`` takes them."""

from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from lco_lite.recipe import Recipe
from lco_lite.recipe.rl import RewardPart

# theirs -> the ends of our keys
PEERS = {
    "learning_rate": "lr",
    "actor_learning_rate": "rl.lr",
    "lr_scheduler_type": "schedule",
    "lr_schedule": "schedule",
    "warmup_ratio": "warmup_steps",
    "optim": "optimizer",
    "adam_beta1": "adam_betas",
    "adam_beta2": "adam_betas",
    "adam_epsilon": "adam_eps",
    "grad_clip": "max_grad_norm",
    "num_train_epochs": "epochs rl.steps",
    "num_epochs": "epochs rl.steps",
    "epochs": "epochs rl.steps",
    "iters": "steps max_steps",
    "max_train_steps": "steps max_steps",
    "max_steps": "steps max_steps",
    "steps": "steps max_steps",
    "total_episodes": "rl.steps",
    "num_generations": "responses_per_prompt",
    "n_samples_per_prompt": "responses_per_prompt",
    "group_size": "responses_per_prompt",
    "generation_batch_size": "rl.prompts_per_step rl.responses_per_prompt",
    "train_batch_size": "minibatch batch_size",
    "batch_size": "minibatch batch_size eval.batch",
    "rollout_batch_size": "prompts_per_step",
    "mini_batch_size": "minibatch batch_size",
    "ppo_mini_batch_size": "minibatch",
    "per_device_train_batch_size": "minibatch batch_size micro_batch_tokens",
    "gradient_accumulation_steps": "minibatch batch_size micro_batch_tokens",
    "num_iterations": "inner_epochs",
    "num_ppo_epochs": "inner_epochs",
    "ppo_epochs": "inner_epochs",
    "max_completion_length": "max_new_tokens",
    "max_response_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_prompt_length": "sft.max_length train_rm.max_length rl.max_length",
    "max_seq_length": "sft.max_length train_rm.max_length rl.max_length",
    "loss_type": "objective",
    "algorithm": "objective",
    "beta": "beta kl_coef",
    "epsilon": "clip_low",
    "cliprange": "clip_low",
    "clip_ratio": "clip_low",
    "epsilon_high": "clip_high",
    "kl_loss_coef": "kl_coef",
    "init_kl_coef": "kl_coef",
    "vf_coef": "value_coef",
    "lam": "gae_lambda",
    "mask_truncated_completions": "overlong_buffer",
    "reward_funcs": "reward_function",
    "reward_fn": "reward_function",
    "reward_weights": "rl.rewards",
    "reward_model_path": "reward_model.path",
    "model": "path",
    "model_name": "path",
    "model_name_or_path": "path",
    "torch_dtype": "dtype",
    "bf16": "dtype",
    "fp16": "dtype",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "attn_implementation": "attention",
    "peft_config": "lora",
    "lora_config": "lora",
    "lora_parameters": "lora",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target_modules": "lora.targets",
    "use_vllm": "rollout.engine",
    "vllm_gpu_memory_utilization": "rollout.gpu_share",
    "dataset_name": "data.demonstrations data.prompts",
    "train_file": "data.demonstrations data.prompts",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "system_prompt": "chat.system",
    "report_to": "trackers",
    "output_dir": "name",
    "run_name": "name",
}
# what is to be said besides
REMARKS = {
    "warmup_ratio": "in updates, not a share",
    "generation_batch_size": "their product is a phase's responses",
    "per_device_train_batch_size": "an update's responses; what is on the device at once, in tokens, is "
    "micro_batch_tokens",
    "max_prompt_length": "which is of prompt and response together",
    "max_seq_length": "of prompt and response together",
    "beta": "the beta of TRL's GRPO is rl.kl_coef",
    "mask_truncated_completions": "which takes reward off the longest responses and masks none",
    "bf16": "bfloat16",
    "fp16": "float16",
    "load_in_4bit": "nf4",
    "load_in_8bit": "int8",
    "use_vllm": "vllm",
    "output_dir": "the run's folder under --runs",
}
REMARKS["gradient_accumulation_steps"] = REMARKS["per_device_train_batch_size"]
REMARKS |= dict.fromkeys(
    ("iters", "max_train_steps", "max_steps"), "rl.steps counts rollout phases, the others updates"
)
# what needs no setting here, or has none
NOTHING = {
    "logging_steps": "every step is logged",
    "logging_first_step": "every step is logged",
    "logging_strategy": "every step is logged",
    "resume_from_checkpoint": "the same command goes on from its last checkpoint",
    "top_k": "responses are sampled by temperature and top_p (rl.variant.top_k is the public code's choice of tokens)",
}


def called_here(name: str, section: str = "") -> list[str]:
    """The keys that another program's ``name`` stands for, or that end in it: those in ``section`` (dotted; empty: the
    top), else all there are, rl's first."""
    ends = PEERS.get(name, name).split()
    keys = [key for end in ends for key in all_keys() if f".{key}".endswith(f".{end}")]
    inside = [key for key in keys if key.startswith(f"{section}.")]
    return inside or sorted(keys, key=lambda key: not key.startswith("rl."))


def answered(written: str, section: str = "") -> str:
    """What to say of the unknown key ``written`` in ``section``."""
    name = written.lower().replace("-", "_")
    if name in NOTHING:
        return f"there is nothing to set: {NOTHING[name]}"
    own, keys = _keys_of(section), called_here(name, section)
    near = [] if name in PEERS or name in own else get_close_matches(name, own, 1)
    if near:
        meant = dict.fromkeys([own[near[0]], *keys])
        return f"did you mean {' or '.join(map(repr, meant))}?"
    if not keys:
        return f"accepted: {', '.join(own)}"
    first = [key for key in keys if key.partition(".")[0] == keys[0].partition(".")[0]]
    others = [key for key in keys if key not in first]
    also = f"; also {', '.join(others)}" if others else ""
    return f"here it is {' or '.join(first)}{also}" + (f" ({REMARKS[name]})" if name in REMARKS else "")


@cache
def all_keys() -> tuple[str, ...]:
    """Of every section and setting, dotted, in the recipe's order."""
    return tuple(_below(Recipe, ""))


def _below(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for inner in (field.annotation, *get_args(field.annotation)):
            if _is_section(inner):
                yield from _below(inner, f"{prefix}{name}.")


def _is_section(kind: Any) -> bool:
    return hasattr(kind, "model_fields")


def _keys_of(section: str) -> dict[str, str]:
    """By last part, the keys of a section, which may be that of a reward under the user's own name."""
    inside = [key for key in all_keys() if key.rpartition(".")[0] == section]
    inside = inside or [f"{section}.{name}" for name in RewardPart.model_fields]
    return {key.rpartition(".")[2]: key for key in inside}
