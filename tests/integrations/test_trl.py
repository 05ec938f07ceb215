"""LCO in TRL's trainer: the same gradients as in ours, and a policy that comes nearer to π*."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", minversion="1.16", reason="needs TRL 1.16: pip install 'lco-lite[trl]'")

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig

from lco_lite.errors import UsageError
from lco_lite.integrations.trl import LCOTrainer, PaddedBatch
from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.models.loading import byte_tokenizer, load_base
from lco_lite.recipe import Rl
from lco_lite.recipe.sections import Model
from lco_lite.rollout.engine import Response
from lco_lite.sequences import Example, collate
from lco_lite.train import rl as ours
from lco_lite.train.methods import Models, score
from lco_lite.train.rollouts import Phase

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.3)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
RESPONSES = [[20, 21, 22, 23, 24], [25, 26], [27, 28, 29], [30]]  # the second one of a prompt is longer


def base(seed: int = 0, dtype: torch.dtype = torch.float64, width: int = 16) -> Any:
    torch.manual_seed(seed)
    size = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=260, initializer_range=0.3, attention_dropout=0.2, **ids))
    return model.to(dtype)


def adapted(model: Any, *names: str) -> Any:
    """A PeftModel with these adapters, the first of them the policy's, none of them zero."""
    model = get_peft_model(model, LORA, autocast_adapter_dtype=False)
    for name in names:
        model.add_adapter(name, LORA, autocast_adapter_dtype=False)
    torch.manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.normal_(std=0.1)
    return model


def given_responses(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Two of each prompt, in the order in which TRL asks: it repeats the prompts itself."""
    made: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    seen: dict[int, int] = {}
    for prompt in prompts:
        i = int(prompt)
        seen[i] = seen.get(i, 0) + 1
        ids = RESPONSES[i] + [40 + i] * (seen[i] - 1)
        for name, value in {"prompt_ids": PROMPTS[i], "completion_ids": ids, "logprobs": [0.0] * len(ids)}.items():
            made[name].append(value)
    return made


EXAMPLES = [Example(PROMPTS[i], RESPONSES[i] + [40 + i] * again) for i in range(4) for again in range(2)]


def config(folder: Path, **more: Any) -> GRPOConfig:
    how: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "shuffle_dataset": False,
        "num_generations": 2,
    }
    how |= {"max_steps": 1, "max_completion_length": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    how |= {"logging_steps": 1, "save_strategy": "no", "bf16": False, "use_cpu": True, "report_to": "none"}
    return GRPOConfig(str(folder), disable_tqdm=True, max_grad_norm=1e9, **how | more)


def trainer_of(folder: Path, model: Any, phi: Any, ref: Any = None, settings: Any = None, **how: Any) -> LCOTrainer:
    data = Dataset.from_dict({"prompt": [str(i % 4) for i in range(8)]})
    settings = settings or {}
    return LCOTrainer(
        model, phi, ref, args=config(folder, **settings), train_dataset=data, processing_class=byte_tokenizer(64), **how
    )


class Gradients(TrainerCallback):
    """Those of the first update, before the optimiser's step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def ours_of(model: Any) -> LanguageModel:
    return LanguageModel(model.eval(), byte_tokenizer(64))


def our_gradients(models: Models, parameters: Any, **rl: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """What our trainer's score and accumulate give on the same responses, in two micro-batches."""
    phase = Phase([], 8, [Response(e, True) for e in EXAMPLES], None, {}, [False] * 8, 8)
    settings = Rl(**rl)
    (minibatch,) = score(models, phase, [[[0, 1, 2, 3, 4], [5, 6, 7]]], settings)
    report = ours.Report(phase, settings)
    with models.policy.model.training_mode():
        ours.accumulate(models, settings, report, minibatch, 10**6)
    return report._loss, {name: p.grad for name, p in parameters if p.grad is not None}


def same(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    """Up to the float32 that Llama's norms compute in, whose rounding depends on the padding."""
    assert set(theirs) == set(ours)
    for name, gradient in ours.items():
        assert (theirs[name] - gradient).norm() < 1e-5 * gradient.norm()


CASES: list[dict[str, Any]] = [
    {"objective": "kld"},
    {"objective": "lch", "anchor": 0.5},
    {"objective": "mse", "beta": 0.5, "weighting": "sum", "standardise": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["objective"])
def test_the_update_with_adapters_on_one_base_is_that_of_our_own_trainer(tmp_path, case):
    model = adapted(base(), "dpo", "sft")
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    caught = Gradients()
    trainer = trainer_of(tmp_path, model, "dpo", "sft", rollout_func=given_responses, callbacks=[caught], **case)
    trainer.train()
    mine = ours_of(base())
    for name in ("default", "dpo", "sft", "before"):
        mine._attach(name, LORA)
    with torch.no_grad():
        for key, parameter in mine._peft.named_parameters():
            parameter.data = state[key.replace(".before.", ".default.")].clone()
    parameters = mine.trainable("default")
    roles = (Role(mine, name) for name in ("default", "before", "dpo", "sft"))
    loss, gradients = our_gradients(Models(*roles), parameters, **case)
    assert len(gradients) == 8
    same(caught.found, gradients)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("feedback", ["dpo", "logprob"])
def test_a_whole_model_is_trained_head_and_all_as_in_our_own_trainer(tmp_path, feedback):
    """φ and φ_ref are models of another width; the head of φ_ref is φ's."""
    phi, ref = base(1, width=20), base(2, width=20)
    ref.lm_head.load_state_dict(phi.lm_head.state_dict())
    ref = ref if feedback == "dpo" else None
    caught, start = Gradients(), base(3)
    how: dict[str, Any] = {"anchor": 0.25, "start": start, "feedback": feedback}
    trainer = trainer_of(
        tmp_path, base(), copy.deepcopy(phi), ref, rollout_func=given_responses, callbacks=[caught], **how
    )
    trainer.train()
    mine = ours_of(base())
    parameters = mine.trainable_full(freeze_head=False)
    for other in (phi, start, *([ref] if ref else [])):
        other.requires_grad_(False)
    roles = [None if m is None else Role(ours_of(m)) for m in (start, phi, ref)]
    _, gradients = our_gradients(
        Models(Role(mine), *roles), parameters, objective="kld", anchor=0.25, feedback=feedback
    )
    assert "lm_head.weight" in gradients
    same(caught.found, gradients)


def test_updates_on_the_same_responses_bring_the_policy_to_its_target_and_the_adapter_loads_in_ours(tmp_path):
    """The loss is KL(π* ‖ π_θ) while the responses, and so π*, stand still. TRL samples here."""
    policy, phi = (
        LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        adapted(base(dtype=torch.float32)),
    )
    settings = {"num_iterations": 12, "max_steps": 12, "learning_rate": 3e-2}
    how = {"settings": settings, "peft_config": policy, "beta": 0.2}
    trainer = trainer_of(tmp_path / "run", base(dtype=torch.float32), phi, **how)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and all(0 < row["sampled_prob"] < 1 for row in rows)
    trainer.save_model(str(tmp_path / "adapter"))
    mine = ours_of(base(dtype=torch.float32))
    mine.load_adapter("policy", tmp_path / "adapter")
    batch = collate(EXAMPLES, 0)
    with torch.no_grad():
        whole = trainer.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        hidden = Role(mine, "policy").hidden(batch)
    torch.testing.assert_close(hidden, batch.select(whole.hidden_states[-1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hidden, Role(mine).hidden(batch), atol=1e-2)


def test_each_generation_batch_is_scored_by_the_policy_that_sampled_it_in_the_shapes_that_are_trained_on(tmp_path):
    """h_θ = h_old to the last bit until the first update; then π_old stands still until TRL samples again."""
    settings = {"steps_per_generation": 8, "num_iterations": 2, "max_steps": 8}
    data = {"rollout_func": given_responses, "settings": settings}
    trainer = trainer_of(tmp_path, adapted(base()), adapted(base(1)), **data)
    prepare, seen = trainer._prepare_inputs, []

    def spy(generation_batch: Any) -> Any:
        inputs = prepare(generation_batch)
        batch = PaddedBatch.of(inputs)
        with torch.no_grad():
            now = batch.select(trainer.model(**batch.forward, hidden_only=True))
        seen.append((torch.equal(now, inputs["target"].old), int(inputs["num_items_in_batch"]), inputs["target"]))
        return inputs

    trainer._prepare_inputs = spy  # type: ignore[method-assign]
    trainer.train()
    fresh, tokens, targets = zip(*seen, strict=True)
    assert fresh == ((True,) * 4 + (False,) * 12) * 2
    assert targets[:8] == targets[8:16] and targets[0] is not targets[16]
    assert sum(tokens[:8:4]) == sum(len(target) for target in targets[:8])


@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "whole model"])
def test_where_every_response_was_cut_and_cut_ones_are_masked_nothing_is_learned_and_every_weight_has_a_gradient(
    tmp_path, whole
):
    caught, phi = Gradients(), adapted(base(1))
    how: dict[str, Any] = {"settings": {"mask_truncated_completions": True}, "callbacks": [caught]}
    trainer = trainer_of(tmp_path, base() if whole else adapted(base()), phi, rollout_func=given_responses, **how)
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert caught.found.keys() == trained and not any(gradient.any() for gradient in caught.found.values())
    assert trainer.state.log_history[0]["loss"] == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"objective": "ppo"}, "objective: 'ppo'; accepted: kld, lch, mse"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"settings": {"beta": 0.1}}, "args.beta: 0.1 is for GRPO's loss"),
        ({"settings": {"steps_per_generation": 2}}, "no multiple of gradient_accumulation_steps"),
        ({"phi": "none"}, "reward_model: no adapter 'none' on the model; there are: default, dpo"),
        ({"phi": "default"}, "'default' is the adapter that is trained"),
        ({"phi": "base"}, "has no adapters to take off: give φ_ref"),
        ({"feedback": "logprob", "ref": "dpo"}, "feedback logprob has none"),
        ({"phi": "base", "ref": "base"}, "its head is not the reward model's"),
        ({"model": "base", "anchor": 0.5, "phi": "peft"}, "start: an anchor of a policy without adapters needs it"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:30],
)
def test_what_the_loss_cannot_do_is_one_message(tmp_path, how, message):
    kinds = {"base": lambda: base(len(how)), "peft": lambda: adapted(base(3))}
    made = {name: kinds.get(value, lambda v=value: v)() for name, value in how.items() if name in ("phi", "ref")}
    model = base() if how.get("model") == "base" else adapted(base(), "dpo")
    if how.get("ref") == "base":
        made["ref"] = base(9)
    more = {name: value for name, value in how.items() if name not in ("phi", "ref", "model")}
    with pytest.raises(UsageError, match=re.escape(message)):
        trainer_of(tmp_path, model, made.get("phi", "dpo"), made.get("ref"), **more)


def updated(folder: Path, whole: bool, accumulate: int) -> dict[str, torch.Tensor]:
    """The gradients of an update on eight responses of unlike lengths."""
    caught, start = Gradients(), base(3) if whole else None
    policy, phi, ref = (base(), base(1), base(1)) if whole else (adapted(base(), "dpo"), "dpo", None)
    settings = {"gradient_accumulation_steps": accumulate, "gradient_checkpointing": not whole}
    how: dict[str, Any] = {"rollout_func": given_responses, "callbacks": [caught], "settings": settings}
    trainer_of(folder, policy, phi, ref, anchor=0.5, start=start, **how).train()
    return {name.removeprefix("module."): gradient for name, gradient in caught.found.items()}


def in_one_of_two(rank: int, folder: Path, port: int, whole: bool) -> None:
    """A process of two under DDP."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    save_file(updated(folder, whole, accumulate=2), folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "whole model"])
def test_two_processes_make_the_update_of_one_though_their_responses_are_of_unlike_lengths(tmp_path, whole):
    alone = updated(tmp_path, whole, accumulate=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(in_one_of_two, (tmp_path, port, whole), nprocs=2, start_method="fork")
    for rank in (0, 1):
        same(load_file(tmp_path / f"{rank}.safetensors"), alone)


def test_adapters_of_a_quantised_base_stay_in_float32_and_as_they_were(tmp_path):
    """TRL rounds them to bfloat16."""
    wide = base(dtype=torch.float32, width=64)
    wide.save_pretrained(tmp_path / "base")
    quantised = Model(path=str(tmp_path / "base"), quantization="nf4")
    model = adapted(load_base(quantised, torch.device("cpu")))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_of(tmp_path, model, base(1, torch.float32, 64), feedback="logprob", rollout_func=given_responses)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])


def test_the_script_of_the_page_on_scaling_runs_as_it_stands_but_for_sizes(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer(64)
    for name in ("policy", "phi"):
        base(dtype=torch.float32).save_pretrained(tmp_path / f"{name}-base")
        tokenizer.save_pretrained(tmp_path / f"{name}-base")
        model = LlamaForCausalLM.from_pretrained(tmp_path / f"{name}-base")
        adapted(model).save_pretrained(tmp_path / name)
    asked = [{"prompt": [{"role": "user", "content": f"{i} + 1 ="}]} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    for there, here in {
        "runs/math/sft/adapter": "policy",
        "runs/math/rm/adapter": "phi",
        '"max_completion_length": 2048': '"max_completion_length": 4, "max_steps": 3',
        '"bf16": True, "use_vllm": True, "vllm_mode": "colocate"': '"bf16": False, "use_cpu": True',
        "bfloat16": "float32",
    }.items():
        assert there in script
        script = script.replace(there, here)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(compile(script, "scaling.md", "exec"), made)
    assert made["trainer"].state.global_step == 3
    first = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    last = load_file(tmp_path / "lco" / "adapter" / "adapter_model.safetensors")
    assert first.keys() == last.keys() and any(not torch.equal(first[name], last[name]) for name in first)


def test_only_the_plug_in_imports_trl_and_nothing_imports_the_plug_in():
    for file in (Path(__file__).resolve().parents[2] / "lco_lite").rglob("*.py"):
        words = file.read_text(encoding="utf-8")
        assert file.name == "trl.py" or not re.search(
            r"^\s*(from|import) (trl|lco_lite\.integrations)\b", words, re.M
        ), file
