"""vLLM as an engine, on a stand-in with the parts of vLLM 0.30 that are used, which samples from the HF model; and on
vLLM itself where it is installed and there is a GPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import typer
from peft import PeftModel
from torch import Tensor

from lco_lite import ranks
from lco_lite.errors import ModelError, RecipeError, UsageError
from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.models.loading import build_scratch, load_base, load_tokenizer
from lco_lite.objectives.logprobs import sampled_from
from lco_lite.recipe.file import load_recipe
from lco_lite.recipe.sections import Init, Lora, Model, Rollout
from lco_lite.rollout import vllm as engine_file
from lco_lite.rollout.engine import Sampling, in_order, open_engine
from lco_lite.rollout.lockstep import draw
from lco_lite.sequences import collate, seeded
from tests.train.test_chain import run_stage

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
GREEDY = Sampling(temperature=0, top_p=1.0, max_new_tokens=6, batch=2)


@dataclass(frozen=True)
class SamplingParams:
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    stop_token_ids: list[int]
    ignore_eos: bool
    stop: list[str] | None
    detokenize: bool
    skip_special_tokens: bool
    logit_bias: dict[int, float] | None
    logprobs: int | None


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class LLM:
    """Weights and adapters from their folders, by plain forward passes. ``did``: what was asked of it, in order."""

    model: str
    revision: str | None = None
    tokenizer_revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.92
    enable_lora: bool = False
    enable_sleep_mode: bool = False
    logprobs_mode: str = "raw_logprobs"
    max_loras: int = 1
    max_lora_rank: int = 16

    made: ClassVar[list[LLM]]  # of the test, oldest first
    fails: ClassVar[list[BaseException]]  # raised by the next batches

    def __post_init__(self) -> None:
        torch.manual_seed(0)  # as vLLM does
        stored = "nf4" if self.quantization == "bitsandbytes" else "none"
        self.settings = Model(path=self.model, dtype=self.dtype, quantization=stored)
        self.base: Any = load_base(self.settings, torch.device("cpu"))
        self.tokenizer = load_tokenizer(self.settings)
        self.adapters: dict[int, Any] = {}
        self.did, self.asleep, self.alive = ["opened"], False, True
        self.llm_engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(shutdown=self._shutdown))
        LLM.made.append(self)

    def _shutdown(self) -> None:
        self.alive = False
        self.did.append("shutdown")

    def sleep(self, level: int = 1) -> None:
        assert level == 1 and self.enable_sleep_mode and not self.asleep
        self.asleep = True
        self.did.append("sleep")

    def wake_up(self) -> None:
        assert self.asleep
        self.asleep = False
        self.did.append("wake_up")

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request=None) -> list[Any]:
        assert self.alive and not self.asleep and not use_tqdm and len(prompts) == len(sampling_params)
        self.did.append("generate")
        if LLM.fails:
            raise LLM.fails.pop(0)
        return [
            self._one(p["prompt_token_ids"], s, lora_request) for p, s in zip(prompts, sampling_params, strict=True)
        ]

    def _logits(self, ids: list[int], adapter: LoRARequest | None) -> Tensor:
        tokens = torch.tensor([ids])
        if adapter is None:
            return self.base(input_ids=tokens).logits[0, -1]
        assert self.enable_lora and adapter.lora_int_id > 0
        if adapter.lora_int_id not in self.adapters:  # an id is read once
            whole = load_base(self.settings, torch.device("cpu"))
            self.adapters[adapter.lora_int_id] = PeftModel.from_pretrained(whole, adapter.lora_path)
            assert self.adapters[adapter.lora_int_id].peft_config["default"].r <= self.max_lora_rank
        return self.adapters[adapter.lora_int_id](input_ids=tokens).logits[0, -1]

    def _one(self, prompt: list[int], asked: SamplingParams, adapter: LoRARequest | None) -> Any:
        assert len(prompt) + asked.max_tokens <= self.max_model_len and asked.ignore_eos
        ids: list[int] = []
        logprobs: list[dict[int, Any]] = []
        reason = "length"
        with torch.random.fork_rng():
            torch.manual_seed(asked.seed)
            while len(ids) < asked.max_tokens:
                z = self._logits(prompt + ids, adapter).float()
                for token, bias in (asked.logit_bias or {}).items():
                    z[token] += bias
                z = z / (asked.temperature or 1.0)
                ids.append(int(draw(z[None], Sampling(asked.temperature, asked.top_p, 1, 1))))
                if asked.top_p < 1:
                    order = z.argsort(descending=True)
                    p = z.softmax(-1)[order]
                    z[order[p.cumsum(0) - p >= asked.top_p]] = -torch.inf
                told = z.log_softmax(-1)[ids[-1]].item()
                logprobs.append({ids[-1]: types.SimpleNamespace(logprob=told)})
                text = self.tokenizer.decode(ids) if asked.detokenize else ""
                if ids[-1] in asked.stop_token_ids or any(s in text for s in asked.stop or []):
                    reason = "stop"
                    break
        told_of = None if asked.logprobs is None else logprobs
        output = types.SimpleNamespace(token_ids=tuple(ids), logprobs=told_of, finish_reason=reason)
        return types.SimpleNamespace(outputs=[output])


@pytest.fixture
def stand_in(monkeypatch):
    package, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.LLM, package.SamplingParams, package.lora = LLM, SamplingParams, lora
    lora.request, request.LoRARequest = request, LoRARequest
    plugin = types.ModuleType("vllm_bnb_plugin")
    for module in (package, lora, request, plugin):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    monkeypatch.setattr(LLM, "made", [], raising=False)
    monkeypatch.setattr(LLM, "fails", [], raising=False)
    yield LLM
    engine_file.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm") / "model"
    build_scratch(Init(hidden_size=16, layers=1, heads=2, intermediate_size=16, std=0.3), path, seed=1)
    return path


@pytest.fixture
def model(folder) -> LanguageModel:
    weights = Model(path=str(folder))
    model = LanguageModel(load_base(weights, torch.device("cpu")), load_tokenizer(weights))
    for seed, (name, r) in enumerate((("reward", 2), ("reference", 20))):
        model.add_adapter(name, Lora(r=r), seed)
        change(model, name, seed)
    model.activate(None)
    return model


def change(model: LanguageModel, name: str, seed: int) -> None:
    with torch.no_grad():
        for _, p in model.trainable(name):
            p.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))


def both(role: Role, sampling: Sampling, stop: int = 3, rows: int | None = None) -> list[list]:
    return [
        in_order(open_engine([role], stop, rows=rows, settings=Rollout(engine=kind)).generate(PROMPTS, sampling))
        for kind in ("hf", "vllm")
    ]


def test_greedy_is_that_of_hf_for_the_base_and_every_adapter_in_turn_by_one_vllm(stand_in, model):
    for name in ("reward", None, "reference", "reward"):
        hf, vllm = both(Role(model, name), GREEDY)
        assert hf == vllm
    made = stand_in.made
    assert [(llm.max_lora_rank, llm.alive) for llm in made] == [(8, False), (32, True)], (
        "reopened for a larger rank only"
    )
    assert {llm.model for llm in made} == {str(model.base.name_or_path)}
    assert made[1].gpu_memory_utilization == 0.3 and made[1].max_model_len == 256 and made[1].dtype == "float32"


def test_an_nf4_base_is_nf4_there_too(stand_in, tmp_path):
    pytest.importorskip("bitsandbytes")
    build_scratch(Init(hidden_size=64, layers=1, heads=2, intermediate_size=64, std=0.3), tmp_path / "m", seed=1)
    weights = Model(path=str(tmp_path / "m"), quantization="nf4")
    model = LanguageModel(load_base(weights, torch.device("cpu")), load_tokenizer(weights))
    model.add_adapter("policy", Lora(r=2), 0)
    change(model, "policy", 0)
    hf, vllm = both(Role(model, "policy"), GREEDY)
    assert hf == vllm and stand_in.made[0].quantization == "bitsandbytes"


def test_the_adapter_is_sampled_from_as_it_was_when_it_was_handed_over(stand_in, model):
    engine = open_engine([Role(model, "reward")], 3, settings=Rollout(engine="vllm"))
    before = in_order(engine.generate(PROMPTS, GREEDY))
    change(model, "reward", 7)
    assert in_order(engine.generate(PROMPTS, GREEDY)) == before
    engine.sync()
    after = in_order(engine.generate(PROMPTS, GREEDY))
    assert after != before
    assert after == in_order(
        open_engine([Role(model, "reward")], 3, settings=Rollout(engine="hf")).generate(PROMPTS, GREEDY)
    )


def test_it_sleeps_outside_its_batches(stand_in, model):
    engine = open_engine([Role(model, "reward")], 3, settings=Rollout(engine="vllm"))
    made = engine.generate(PROMPTS * 4, replace(GREEDY, batch=1))
    next(made)
    (llm,) = stand_in.made
    assert llm.asleep and llm.did == ["opened", "sleep", "wake_up", "generate", "sleep"]
    made.close()
    assert llm.asleep and llm.alive


def test_rows_that_pad_the_head_are_never_drawn_and_too_many_are_refused(stand_in, model, monkeypatch):
    sampling = Sampling(1.0, 1.0, 30, 3)
    drawn = [i for r in both(Role(model), sampling, rows=40)[1] for i in r.example.response]
    assert max(drawn) < 40
    monkeypatch.setattr(engine_file, "MOST_BIASED", 100)
    with pytest.raises(ModelError, match="220 rows of its head are not to be drawn, and vLLM leaves out 100 at most"):
        open_engine([Role(model)], 3, rows=40, settings=Rollout(engine="vllm"))


def test_stop_strings_and_stop_ids_cut_as_hf_does(stand_in, model):
    long = replace(GREEDY, max_new_tokens=24, batch=3)
    whole = both(Role(model), long)[0]
    stops = (model.tokenizer.decode(whole[0].example.response[5:8]), "never said")
    hf, vllm = both(Role(model), replace(long, stop=stops))
    assert hf == vllm and not vllm[0].truncated and len(vllm[0].example.response) <= 8
    hf, vllm = both(Role(model), long, stop=whole[2].example.response[3])
    assert hf == vllm and not vllm[2].truncated


def test_a_seed_gives_the_same_samples_and_leaves_torchs_numbers_alone(stand_in, model):
    sampling = Sampling(1.0, 0.9, 5, 2)
    state = torch.get_rng_state()
    made = []
    for seed in (0, 0, 1):
        with seeded(seed, "rollout"):
            made.append(
                in_order(
                    open_engine([Role(model, "reward")], 3, settings=Rollout(engine="vllm")).generate(PROMPTS, sampling)
                )
            )
    assert made[0] == made[1] != made[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_log_probabilities_are_asked_for_and_told(stand_in, model):
    engine = open_engine([Role(model)], 3, settings=Rollout(engine="vllm"))
    assert all(r.logprobs is None for r in in_order(engine.generate(PROMPTS, GREEDY)))
    for response in in_order(engine.generate(PROMPTS, replace(GREEDY, logprobs=True))):
        ids = torch.tensor([response.example.prompt + response.example.response])
        with torch.no_grad():
            z = model.base(input_ids=ids).logits[0, len(response.example.prompt) - 1 : -1].log_softmax(-1)
        exact = z.gather(1, torch.tensor(response.example.response)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.logprobs), exact)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA Error: out of memory at cumem.cpp:1")]
)
def test_out_of_memory_is_that_of_torch_and_the_next_batch_opens_another(stand_in, model, error):
    engine = open_engine([Role(model, "reward")], 3, settings=Rollout(engine="vllm"))
    first = in_order(engine.generate(PROMPTS, GREEDY))
    stand_in.fails.append(error)
    with pytest.raises(torch.OutOfMemoryError, match=r"2 responses of up to .* do not fit rollout.gpu_share 0.3"):
        in_order(engine.generate(PROMPTS, GREEDY))
    assert not stand_in.made[0].alive
    assert in_order(engine.generate(PROMPTS, GREEDY)) == first and len(stand_in.made) == 2


def test_an_interrupt_in_a_batch_leaves_no_vllm_behind(stand_in, model):
    engine = open_engine([Role(model, "reward")], 3, settings=Rollout(engine="vllm"))
    stand_in.fails.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        in_order(engine.generate(PROMPTS, GREEDY))
    assert not stand_in.made[0].alive and not engine_file._open
    assert in_order(engine.generate(PROMPTS, GREEDY))


def test_a_model_that_vllm_does_not_open_is_one_message(stand_in, model, monkeypatch):
    def refuse(self):
        raise ValueError("Free memory on device cuda:0 is less than desired GPU memory utilization")

    monkeypatch.setattr(LLM, "__post_init__", refuse)
    with pytest.raises(ModelError, match=r"vllm does not open .* with rollout.gpu_share 0.3: ValueError: Free memory"):
        in_order(open_engine([Role(model)], 3, settings=Rollout(engine="vllm")).generate(PROMPTS, GREEDY))


def test_it_is_refused_beside_other_processes(stand_in, model, monkeypatch):
    monkeypatch.setattr(ranks, "_world", 2)
    with pytest.raises(ModelError, match="vllm runs in one process on one GPU: take paged"):
        open_engine([Role(model)], 3, settings=Rollout(engine="vllm"))


def test_vllm_is_told_of_expandable_segments_and_to_stay_in_this_process(stand_in, model, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    in_order(open_engine([Role(model)], 3, settings=Rollout(engine="vllm")).generate(PROMPTS, GREEDY))
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_where_it_is_not_installed_nothing_is_trained_and_the_message_says_how(tiny, model, capsys):
    with pytest.raises(ModelError, match=r"vllm needs vllm, which is not installed: pip install 'lco-lite\[vllm\]'"):
        open_engine([Role(model)], 3, settings=Rollout(engine="vllm"))
    assert "vllm-bnb-plugin" in str(engine_file.missing("nf4"))
    with pytest.raises((typer.Exit, UsageError)):
        run_stage(tiny, "sft", "rollout.engine=vllm")
    assert "pip install 'lco-lite[vllm]'" in capsys.readouterr().err


def test_every_path_samples_through_the_one_vllm(stand_in, tiny):
    """Pairs, the check of φ, rollouts and held-out scores of a whole run."""
    run_stage(tiny, "rl-kld", "rollout.engine=vllm")
    assert len([llm for llm in stand_in.made if llm.alive]) == 1
    assert all(did == "sleep" for llm in stand_in.made for did in llm.did[-1:] if llm.alive)
    assert max(len(llm.adapters) for llm in stand_in.made) > 1, "policies of several steps, and φ"


def test_what_vllm_does_not_take_is_refused_in_the_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("task: arithmetic\nmodel: {path: m, quantization: int8}\nrollout: {engine: vllm}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["rl.temperature=3", "train_rm.temperature=1"])
    assert "does not quantise to int8" in str(caught.value)
    assert "temperatures up to 2, and rl.temperature is 3" in str(caught.value)
    with pytest.raises(RecipeError, match="a base that stands still, and model.lora is null"):
        load_recipe(file, ["model.quantization=none", "model.lora=null"])


def test_an_adapter_that_vllm_does_not_load_is_one_message(stand_in, model):
    stand_in.fails.append(ValueError("lm_head is not supported"))
    with pytest.raises(ModelError, match="rollout.engine: vllm: lm_head is not supported"):
        in_order(open_engine([Role(model, "reward")], 3, settings=Rollout(engine="vllm")).generate(PROMPTS, GREEDY))


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or not torch.cuda.is_available(), reason="needs vLLM and a GPU"
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_vllm_itself_samples_from_the_adapter_that_was_handed_over(tmp_path, quantization):
    """Log-probabilities of greedy tokens are the trainer's, up to half precision; another adapter's are not."""
    init = Init(hidden_size=256, layers=2, heads=4, intermediate_size=256, std=0.1)
    build_scratch(init, tmp_path / "m", seed=1)
    weights = Model(path=str(tmp_path / "m"), dtype="bfloat16", quantization=quantization)
    model = LanguageModel(load_base(weights, torch.device("cuda")), load_tokenizer(weights))
    model.add_adapter("policy", Lora(r=8), 0)
    engine = open_engine([Role(model, "policy")], 3, settings=Rollout(engine="vllm", gpu_share=0.2))
    try:
        for seed in (0, 1):
            change(model, "policy", seed)
            engine.sync()
            for response in in_order(engine.generate(PROMPTS, replace(GREEDY, logprobs=True))):
                batch = collate([response.example], 0).to("cuda")
                with torch.no_grad():
                    hidden = Role(model, "policy").hidden(batch)
                exact = sampled_from(hidden, model.head, batch.actions, 1.0, 1.0).cpu()
                assert (torch.tensor(response.logprobs) - exact).abs().mean() < 0.1
    finally:
        engine_file.close()
