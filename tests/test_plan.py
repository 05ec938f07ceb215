"""What ``plan`` says, against what is counted while the trainers really run; and what the command prints."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Qwen2Config
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.context import Clock
from lco_lite.errors import DataError
from lco_lite.models.loading import load_config
from lco_lite.plan import LiveBytes, measured, peaks, work
from lco_lite.plan.verdict import RESERVE, memory_of, on_device
from lco_lite.recipe.file import load_recipe
from lco_lite.train.rollouts import DYNAMIC_ROUNDS
from tests.models import families
from tests.train.test_chain import run_stage

LENGTH, RESPONSE = 64, 52
ROOT = Path(__file__).parents[1]


def saved(family: str, folder: Path, layers: int) -> Path:
    """Deeper than the two depths that are looked at, and wide enough to count."""
    kinds = ["sliding_attention", "full_attention"] if family == "gemma3" else ["full_attention"]
    types = [kinds[i % 6 == 5 and len(kinds) - 1] for i in range(layers)]
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": layers, "layer_types": types}
    return families.save(family, folder, **sizes)


def recipe_file(folder: Path, model: dict[str, Any], reward_model: Any = "self") -> Path:
    """Sequences as long as the recipe lets in, with some padding: a text's tokens are its bytes and 3 around."""
    shown = [{"prompt": f"{i % 10}", "response": "y" * (LENGTH - 4 - (i % 4 == 0))} for i in range(16)]
    pairs = [
        {"prompt": f"{i % 10}", "chosen": "y" * (RESPONSE - 1), "rejected": "n" * (RESPONSE - 2)} for i in range(16)
    ]
    prompts = [{"prompt": f"{i:02}".rjust(LENGTH - RESPONSE - 2, "x")} for i in range(16)]
    data = {}
    for name, rows in (("demonstrations", shown), ("preferences", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data[name] = str(folder / f"{name}.jsonl")
    stage = {"batch_size": 8, "micro_batch_tokens": 4 * LENGTH, "max_length": LENGTH}
    rl = {**stage, "steps": 1, "prompts_per_step": 16, "minibatch": 8, "max_new_tokens": RESPONSE, "rollout_batch": 8}
    rl |= {"temperature": 1.0, "top_p": 0.9, "inner_epochs": 2, "eval_every": 0}
    rl.pop("batch_size")
    pairs_of = {**stage, "max_length": RESPONSE + 3, "max_steps": 2, "held_out": 0.0}
    pairs_of["micro_batch_tokens"] = 4 * pairs_of["max_length"]
    recipe = {"name": "small", "device": "cpu", "data": data, "model": model, "reward_model": reward_model}
    recipe |= {"sft": {**stage, "max_steps": 2}, "train_rm": pairs_of, "rl": rl}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def counted(file: Path, stage: str, monkeypatch: pytest.MonkeyPatch, *sets: str) -> dict[str, float]:
    """Phase of the clock -> the most bytes that lived in it while the trainer ran with real numbers."""
    found: dict[str, float] = {}
    clock = Clock.__call__

    @contextlib.contextmanager
    def counting(self: Clock, phase: str):
        gc.collect()
        for one in gc.get_objects():
            if isinstance(one, torch.Tensor):
                live.add(one)
                state = getattr(one, "quant_state", None)
                for held in (
                    (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code) if state else ()
                ):
                    live.add(held)
        live.restart()
        with clock(self, phase):
            yield
        found[phase] = max(found.get(phase, 0.0), live.here.peak)

    with monkeypatch.context() as patched, LiveBytes() as live:
        patched.setattr(Clock, "__call__", counting)
        run_stage(file, stage, *sets)
    return found


def planned(file: Path, stage: str, *sets: str) -> dict[str, float]:
    """On a CPU the hidden states of the phase's 16 responses stay; the plan's phases see those of a micro-batch, 4."""
    found, _, kept = peaks(load_recipe(file, list(sets)), stage, on_card=False, only=WATCHED[stage])
    more = dict.fromkeys(("rl score", "rl update"), 12 * RESPONSE * kept)
    return {phase: sum(held.values()) + more.get(phase, 0.0) for phase, held in found.items()}


WATCHED = {"sft": "sft", "rm": "train-rm", "rl": "rl update"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family,layers,checkpointing,objective",
    [
        ("llama", 5, False, "mse"),
        ("qwen2", 5, True, "lch"),
        pytest.param("gemma3", 14, False, "kld", marks=pytest.mark.long),
    ],
)
def test_planned_peaks_are_those_that_are_counted_while_the_trainers_run(
    family, layers, checkpointing, objective, tmp_path, monkeypatch
):
    model = {"path": str(saved(family, tmp_path / "model", layers)), "lora": {"r": 4, "alpha": 8}}
    file = recipe_file(tmp_path, model | {"gradient_checkpointing": checkpointing})
    pairs = {}
    pairs["sft"] = planned(file, "sft")["sft"], counted(file, "sft", monkeypatch)["update"]
    pairs["rm"] = planned(file, "rm")["train-rm"], counted(file, "rm", monkeypatch)["update"]
    said = planned(file, "rl", f"rl.objective={objective}")
    seen = counted(file, f"rl-{objective}", monkeypatch, f"rl.objective={objective}")
    pairs |= {f"{objective} {phase}": (said[f"rl {phase}"], seen[phase]) for phase in ("score", "update")}
    off = {phase: said / seen - 1 for phase, (said, seen) in pairs.items()}
    print(family, {phase: f"{share:+.3f}" for phase, share in off.items()})
    assert all(abs(share) < 0.07 for share in off.values()), off


@pytest.mark.parametrize("objective", ["tpo", "opd"])
def test_a_loss_over_whole_groups_and_a_teachers_are_planned_too(tiny, objective):
    found, _, _ = peaks(load_recipe(tiny, [f"rl.objective={objective}"]), "rl", False, only="rl update")
    assert found["rl update"]["activations"] > 0


def run_plan(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


SMALLER = ["--set", "model.init.layers=1", "--set", "rl.eval_every=0", "--set", "train_rm.check_items=0"]
SMALLER += ["--set", "rollout.engine=hf"]


def test_the_command_says_what_fits_and_what_to_change_where_it_does_not(tmp_path):
    result = run_plan("quickstart", "--gpu", "12GiB", "--runs", str(tmp_path), *SMALLER)
    assert result.exit_code == 0, result.output
    assert "rl update" in result.output
    assert "--set" not in result.output
    assert "no rate known: give --rate" in result.output
    result = run_plan("quickstart", "--gpu", "1000MiB", "--rate", "1000", "--json", "--runs", str(tmp_path), *SMALLER)
    facts = json.loads(result.stdout)
    room = facts["memory"] - facts["reserve"]
    too_large = {phase for phase, held in facts["phases"].items() if sum(held.values()) > room}
    assert too_large == facts["changes"].keys()
    assert "rl rollout" in too_large
    assert facts["changes"]["rl rollout"].startswith("--set rl.rollout_batch=")
    assert facts["work"]["rl"]["hours"] == facts["work"]["rl"]["tokens"] / 1000 / 3600
    change = facts["changes"]["rl rollout"].split()
    again = json.loads(
        run_plan("quickstart", "--gpu", "1000MiB", "--json", "--runs", str(tmp_path), *SMALLER, *change).stdout
    )
    assert sum(again["phases"]["rl rollout"].values()) <= room


def test_what_vllm_takes_besides_is_said(tmp_path):
    sets = ["--set", "rollout.engine=vllm", "--set", "rollout.gpu_share=0.4"]
    result = run_plan("quickstart", "--gpu", "12GiB", "--runs", str(tmp_path), *SMALLER, *sets)
    assert "not planned: rollout.engine: vllm" in result.output and "takes 40% of the card" in result.output


def test_what_cannot_be_planned_is_one_message(tmp_path):
    result = run_plan("quickstart", "--gpu", "twelve")
    assert result.exit_code == 2
    assert "--gpu: 'twelve' is no size" in result.output
    spec = tmp_path / "mine.py"
    spec.write_text("def loss(logprobs, batch):\n    return logprobs.sum() * batch.advantages.tolist()[0]\n")
    own = [f"--set=rl.objective={spec}:loss", "--set=rl.feedback=rule"]
    result = run_plan("quickstart", "--gpu", "12GiB", *SMALLER, *own)
    assert result.exit_code == 2
    assert "mine.py:loss does not run on tensors without numbers: it is not planned" in result.output
    result = run_plan("quickstart", "--set", "model={path: ./nowhere}", "--set", "rl.eval_every=0")
    assert result.exit_code == 2
    assert "nowhere: no such folder" in result.output


def test_an_earlier_run_gives_its_rate_and_what_a_token_takes_to_learn_from(tmp_path):
    row = {"step": 1, "response_tokens": 500, "mean_response_tokens": 50.0}
    row |= {"seconds": {"rollout": 5.0, "score": 1.0, "update": 4.0}}
    (tmp_path / "math" / "rl-kld").mkdir(parents=True)
    (tmp_path / "math" / "rl-kld" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert measured(tmp_path, "math") == {"rate": 100.0, "response": 50.0, "learning": 0.01}
    assert measured(tmp_path, "other") is None
    log = tmp_path / "math" / "rl-kld" / "metrics.jsonl"
    row["seconds"]["score"] = None  # not finite
    log.write_text(json.dumps(row) + "\n" + json.dumps({**row, "response_tokens": 0}) + "\n")
    assert measured(tmp_path, "math") == {"rate": 100.0, "response": 50.0, "learning": 0.008}
    log.write_text(json.dumps({**row, "seconds": {"rollout": "x"}}) + "\n")
    with pytest.raises(DataError, match="line 1: damaged: seconds.rollout: found 'x'"):
        measured(tmp_path, "math")


def test_work_is_counted_from_the_recipe():
    rows = work(load_recipe(ROOT / "recipes" / "math.yaml"))
    assert rows["sft"]["updates"] == 63
    assert rows["rm"]["tokens"] == 8000 * 4 * 2048 + 2 * 200 * 2048
    assert rows["rl"] == {"updates": 320, "responses": 20 * 512 + 20 * 256, "tokens": (20 * 512 + 20 * 256) * 2048}
    assert rows["eval"]["tokens"] is None
    sets = ["rl.objective=dapo", "rl.prompts_per_step=16", "rl.minibatch=16"]
    once, again = (
        work(load_recipe(ROOT / "recipes" / "math.yaml", [*sets, f"rl.dynamic_sampling={on}"]))["rl"]
        for on in ("false", "true")
    )
    looks = 20 * 256  # responses of looks, which are sampled once
    assert again["responses"] - looks == (1 + DYNAMIC_ROUNDS) * (once["responses"] - looks)
    assert again["tokens"] == again["responses"] * 2048 and again["updates"] == once["updates"]


@pytest.fixture(scope="module")
def two_bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    small, large = (str(saved("llama", folder / name, layers)) for name, layers in (("small", 3), ("large", 4)))
    lora = {"r": 4, "alpha": 8}
    return recipe_file(folder, {"path": small, "lora": lora}, {"path": large, "lora": lora})


def on_card(file: Path, stage: str, phase: str, *sets: str) -> dict[str, float]:
    return peaks(load_recipe(file, list(sets)), stage, on_card=True, only=phase).phases[phase]


@pytest.mark.slow
def test_what_no_phase_needs_lies_on_the_host_and_a_streamed_base_is_there_block_by_block(two_bases):
    every = on_card(two_bases, "rm", "train-rm", "residency=all")
    by_phase = on_card(two_bases, "rm", "train-rm")
    streamed = on_card(two_bases, "rm", "train-rm", "reward_model.streaming=true")
    assert every["host"] < by_phase["host"] < streamed["host"]
    left = every["weights"] - by_phase["weights"]
    assert left == pytest.approx(by_phase["host"] - every["host"], rel=0.05), "what left the card is on the host"
    block = (64 * 64 * 4 + 3 * 64 * 192) * 2  # bytes of its matrices, in 16 bits
    assert streamed["weights"] < by_phase["weights"] - 2 * block, "two of its four"
    assert all(every[name] == by_phase[name] == streamed[name] for name in ("adapters", "optimiser", "cache", "kept"))


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_reward_models_own_card_is_planned_as_the_policys_on_a_machine_without_either(two_bases, device):
    phase = "rl", "rl rollout"
    assert on_card(two_bases, *phase, f"reward_model.device={device}") == on_card(two_bases, *phase)


@pytest.mark.slow
def test_offloaded_checkpoints_lie_on_the_host_and_moments_in_8_bits_are_a_quarter(two_bases):
    sets = ["reward_model.gradient_checkpointing=true", "reward_model.lora={r: 256, alpha: 8}"]
    here = on_card(two_bases, "rm", "train-rm", *sets)
    sets[0] = "reward_model.gradient_checkpointing=offload"
    there = on_card(two_bases, "rm", "train-rm", *sets, "train_rm.optimizer=adamw_8bit")
    tokens = 2 * 2 * (RESPONSE + 3)  # two pairs
    inputs = 4 * tokens * 64 * 2  # of each of four blocks, in 16 bits
    assert there["host"] - here["host"] == pytest.approx(inputs, rel=0.1), "beside small tensors of the batch"
    moments = here["optimiser"] * 2 / 3  # of three numbers a weight one is its gradient
    assert there["optimiser"] == pytest.approx(here["optimiser"] - moments * 3 / 4, rel=0.02)


def test_a_paged_cache_has_pages_for_every_slot_at_its_longest(two_bases):
    held = on_card(two_bases, "rl", "rl rollout", "rl.rollout_batch=5", "rl.max_length=400", "rl.max_new_tokens=300")
    config = load_config(load_recipe(two_bases).model)
    a_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2  # bytes, in 16 bits
    assert held["cache"] == (5 * 2 + 2) * 256 * a_token, "and two pages for padding"


@pytest.mark.slow
def test_methods_that_look_at_numbers_on_the_host_are_planned_too(two_bases):
    ppo = on_card(two_bases, "rl", "rl update", "rl.objective=ppo", "rl.feedback=dpo_sampled")
    minillm = on_card(two_bases, "rl", "rl update", "rl.objective=minillm", "rl.feedback=dpo")
    assert ppo["optimiser"] > minillm["optimiser"], "a critic beside the policy"


def test_a_recipes_memory_limit_is_what_is_planned_for(monkeypatch):
    recipe = load_recipe(ROOT / "recipes" / "math.yaml", ["memory_limit=8GiB"])
    assert memory_of(recipe, None) == (8 * 2**30, "memory_limit 8GiB")
    assert memory_of(recipe, "6GiB") == (6 * 2**30, "--gpu 6GiB")


# what the shipped recipes for small cards say

CONFIGS = {
    "Qwen/Qwen2.5-3B-Instruct": (2048, 36, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False),
}
TIGHTEST = {"math": (12, "rm", "φ check"), "math_8gb": (8, "rl", "rl rollout"), "math_6gb": (6, "rl", "rl update")}


def without_hub(name: str, folder: Path) -> list[str]:
    """The recipe's models as configs alone."""
    recipe, sets = load_recipe(ROOT / "recipes" / f"{name}.yaml"), []
    for section in ("model", "reward_model"):
        path = getattr(recipe, section).path
        hidden, layers, heads, keys, inner, vocabulary, tied = CONFIGS[path]
        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys,
            tie_word_embeddings=tied,
        )
        config.save_pretrained(folder / section)
        sets.append(f"{section}.path={folder / section}")
    return sets


@pytest.mark.slow
@pytest.mark.parametrize("name", TIGHTEST)
def test_the_shipped_recipes_for_small_cards_fit_them_as_planned(name, tmp_path):
    """Where they are tightest; all phases where LCO_LITE_PLAN_ALL is set, for that takes minutes."""
    size, stage, phase = TIGHTEST[name]
    sets = without_hub(name, tmp_path)
    if os.environ.get("LCO_LITE_PLAN_ALL"):
        words = [word for one in sets for word in ("--set", one)]
        facts = json.loads(run_plan(name, "--gpu", f"{size}GiB", "--json", *words).stdout)
        assert facts["fits"], facts["changes"]
        return
    held = peaks(load_recipe(ROOT / "recipes" / f"{name}.yaml", sets), stage, on_card=True, only=phase).phases[phase]
    assert on_device(held) <= size * 2**30 - RESERVE


def test_recipes_for_small_cards_differ_from_maths_in_memory_and_speed_only():
    math = load_recipe(ROOT / "recipes" / "math.yaml").model_dump()
    for name, lengths in {"math_8gb": set(), "math_6gb": {"train_rm.max_length", "rl.max_length"}}.items():
        other = load_recipe(ROOT / "recipes" / f"{name}.yaml").model_dump()
        differ = {
            f"{section}.{key}"
            for section, settings in math.items()
            if isinstance(settings, dict)
            for key, value in settings.items()
            if value != other[section][key]
        }
        memory = {"model.gradient_checkpointing", "reward_model.gradient_checkpointing", "reward_model.streaming"}
        memory |= {"train_rm.check_items", "rl.micro_batch_tokens", "rl.rollout_batch", "eval.batch"}
        assert differ <= memory | lengths, name
