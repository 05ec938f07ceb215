"""Whole stages with bases that come and go, on a CPU: the bits of stages with everything resident, and less at once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from lco_lite import command, weights
from lco_lite.context import Context
from lco_lite.data.prompts import recipe_task
from lco_lite.evaluation.evaluate import evaluate_stage
from lco_lite.models.residency import FrozenWeights
from lco_lite.recipe.file import load_recipe
from lco_lite.rollout.hf import HFEngine
from lco_lite.rollout.lockstep import LockstepEngine
from lco_lite.run import Run, stage_settings
from lco_lite.train import methods, reward_model
from lco_lite.train.pipeline import train
from lco_lite.train.training import StageTraining, master_of
from tests.models.families import save
from tests.train.test_chain import killed_after, run_stage, same, start, trained

PHASE, STREAMED = "residency=phase", "reward_model.streaming=true"


def own_base(folder: Path, quantization: str = "none") -> str:
    """A reward model of three blocks with more rows in its head than there are tokens."""
    base = save("llama", folder / "phi", num_hidden_layers=3)
    return f"reward_model={{path: {base}, quantization: {quantization}, lora: {{r: 2}}}}"


@pytest.mark.parametrize("quantization", [pytest.param("none", marks=pytest.mark.slow), "nf4"])
def test_stages_end_in_the_same_bits_wherever_their_frozen_weights_lie(tiny, tmp_path, monkeypatch, quantization):
    """Also where they go on after a kill with another residency, and with block inputs that wait on the host."""
    sets = [own_base(tmp_path, quantization), "rl.eval_every=0", "train_rm.check_items=0"]
    plain = run_stage(tiny, "rl-kld", *sets, name="plain")
    phased = run_stage(tiny, "rl-kld", *sets, PHASE, STREAMED, name="phased")
    with killed_after(monkeypatch, "rm", 1):
        run_stage(tiny, "rm", *sets, name="crossed")
    with killed_after(monkeypatch, "rl-kld", 1):
        offload = "reward_model.gradient_checkpointing=offload"
        run_stage(tiny, "rl-kld", *sets, STREAMED, offload, name="crossed")
    crossed = run_stage(tiny, "rl-kld", *sets, PHASE, name="crossed")
    for ctx in (phased, crossed):
        assert same(trained(plain, "rm"), trained(ctx, "rm"))
        assert same(trained(plain, "rl-kld"), trained(ctx, "rl-kld"))


def present(ctx: Context) -> list[str]:
    """Names of the bases that are on the device."""
    return sorted(base.name for base in ctx.bases if not all(bundle.away for bundle in base.bundles))


def test_one_base_is_on_the_device_at_a_time_and_comes_once_a_phase(tiny, tmp_path, monkeypatch):
    with start(tiny, own_base(tmp_path), PHASE, "rl.eval_every=0") as ctx:
        seen, loaded, came = list[list[str]](), list[str](), list[str]()
        load, come = weights.load_base, FrozenWeights.come

        def load_base(settings, *args, **kw):
            seen.append(present(ctx))
            assert not seen[-1], "room is made before a base is loaded"
            loaded.append(Path(kw.get("folder") or args[1] or settings.path).name)
            return load(settings, *args, **kw)

        def watched(self):
            away = all(bundle.away for bundle in self.bundles)
            come(self)
            seen.append(present(ctx))
            came.extend([self.name] * away)

        monkeypatch.setattr(weights, "load_base", load_base)
        monkeypatch.setattr(FrozenWeights, "come", watched)
        sampled = reward_model.sampled_pairs
        monkeypatch.setattr(
            reward_model, "sampled_pairs", lambda *given: (sampled(*given), came.append(f"pairs of {loaded[1:]}"))[0]
        )
        train(ctx, "rm")
        assert loaded == ["base", "model", "phi"] and came[0] == "pairs of ['model']"
        assert came[1:] == ["model", "phi"], "the check after train-rm, each once"
        came.clear()
        train(ctx, "rl-kld")
        assert came == ["model", *2 * ["phi", "model"]], "rollout, then score by φ, then update, in two steps"
    assert max(map(len, seen)) == 1


def test_the_optimum_is_sampled_with_its_bases_together(tiny, tmp_path, monkeypatch):
    """π* asks both for every token."""
    base = own_base(tmp_path)
    run_stage(tiny, "rm", base, "train_rm.check_items=0")
    held, real = list[list[str]](), LockstepEngine._next_logits
    scores = []
    for sets in ([], [PHASE, STREAMED]):
        with start(tiny, base, *sets) as ctx, monkeypatch.context() as patch:

            def watched(self, *args, ctx=ctx):
                held.append(present(ctx))
                return real(self, *args)

            patch.setattr(LockstepEngine, "_next_logits", watched)
            task = recipe_task(ctx.recipe)
            assert task is not None
            scores.append(evaluate_stage(ctx, task, "optimal")["mean"])
            ctx.run.eval_path("arithmetic", "optimal").unlink()
    assert scores[0] == scores[1]
    assert {tuple(names) for names in held} == {(), ("model", "phi")}


def test_full_fine_tuning_by_phase_ends_in_the_same_bits(tiny):
    sets = ["model.lora=null", "rl.anchor=0.5", "rl.eval_every=0", "train_rm.check_items=0", "rl.steps=1"]
    plain, phased = (run_stage(tiny, "rl-kld", *sets, *more, name=f"run{len(more)}") for more in ([], [PHASE]))
    assert same(trained(plain, "rm"), trained(phased, "rm"))
    assert same(trained(plain, "rl-kld"), trained(phased, "rl-kld"))


@pytest.mark.parametrize("family", ["llama", "gemma3-vision"])
def test_the_rows_of_a_reward_model_are_known_before_it_is_loaded(tiny, tmp_path, family):
    base = save(family, tmp_path / "phi")
    with start(tiny, f"reward_model={{path: {base}, lora: {{r: 2}}}}") as ctx:
        begun = weights.open_sft(ctx)
        known = weights.rows_of_reward_model(ctx, begun)
        assert known == weights.open_untrained_reward_model(ctx, begun)[0].model.head.rows == 260


def test_what_the_optimiser_holds_makes_room_for_the_check_of_the_reward_model(tiny, monkeypatch):
    stages, seen = list[StageTraining](), list[int]()
    real, check = StageTraining.__enter__, reward_model.held_out_accuracy
    monkeypatch.setattr(StageTraining, "__enter__", lambda self: (stages.append(self), real(self))[1])

    def checked(*args):
        training = stages[-1]
        seen.append(len(training.adamw.state) + len(training.adamw.param_groups) + len(training.masters))
        assert training.updates and all(p.grad is None for p in training.parameters.values())
        return check(*args)

    monkeypatch.setattr(reward_model, "held_out_accuracy", checked)
    run_stage(tiny, "rm", "train_rm.max_steps=1")
    assert seen == [0, 0]


def test_a_weight_does_not_keep_the_master_that_its_gradients_go_to():
    weight = Parameter(torch.ones(4, dtype=torch.bfloat16))
    master = master_of(weight, weight)
    (3 * weight).sum().backward()
    assert master.grad is not None and master.grad.tolist() == [3.0] * 4 and weight.grad is None
    gone = weakref.ref(master)
    del master
    gc.collect()
    assert gone() is None


def test_a_look_at_held_out_items_keeps_to_the_tokens_of_eval(tiny, monkeypatch):
    sizes, real = list[int](), HFEngine._generate_batch

    def generate(self, prompts, sampling):
        sizes.append(len(prompts) * (max(map(len, prompts)) + sampling.max_new_tokens))
        return real(self, prompts, sampling)

    run_stage(tiny, "sft")
    monkeypatch.setattr(HFEngine, "_generate_batch", generate)
    run_stage(tiny, "rm", "rl.rollout_batch=1", "eval.batch_tokens=60", "train_rm.max_steps=1")
    assert len(sizes) >= 24 + 2 * 3 and max(sizes) <= 60


@pytest.mark.parametrize("objective", ["kld", "grpo"])
def test_scored_states_are_copied_once_each_way(tiny, monkeypatch, objective):
    """h_old of a micro-batch and of its target is one tensor on the host, and one again on the device."""
    seen, real = list[bool](), methods.MicroBatch.to

    def to(self, device):
        moved = real(self, device)
        if self.target is not None:
            copies = torch.device("meta")
            seen.append(self.target.old is self.old and moved.target.old is moved.old)
            away = real(self, copies)
            seen.append(away.target.old is away.old and away.old.device == copies)
            half = self.within(1, 1)[0]
            seen.append(half.target.old is half.old)
        return moved

    monkeypatch.setattr(methods.MicroBatch, "to", to)
    run_stage(tiny, f"rl-{objective}", f"rl.objective={objective}", "rl.feedback=rule", "rl.responses_per_prompt=2")
    assert all(seen) and bool(seen) == (objective == "kld")


def test_where_weights_lie_may_change_between_two_starts(tiny, tmp_path):
    base = own_base(tmp_path)
    one, other = (load_recipe(tiny, [base, *more]) for more in ([], [PHASE, STREAMED]))
    for stage in ("sft", "rm", "rl-kld"):
        assert stage_settings(one, stage) == stage_settings(other, stage)
        assert not {key for key in stage_settings(one, stage) if "residency" in key or "streaming" in key}


@pytest.mark.parametrize(
    ("stage", "phase", "sets", "helps", "does_not"),
    [
        ("rm", "update", ["residency=all"], ["residency: phase", "reward_model.streaming: true"], "model.gradient_"),
        ("rm", "update", ["reward_model.gradient_checkpointing=true"], ["checkpointing: offload"], "residency"),
        (
            "sft",
            "update",
            ["model.gradient_checkpointing=true"],
            ["model.gradient_checkpointing: offload"],
            "streaming",
        ),
        ("rl-kld", "score", [], ["reward_model.streaming: true"], "offload"),
        ("rl-kld", "score", [STREAMED, PHASE], ["rl.prompts_per_step"], "streaming"),
        (
            "rl-kld",
            "update",
            ["residency=all"],
            ["residency: phase", " model.gradient_checkpointing: true"],
            "streaming",
        ),
    ],
)
def test_out_of_memory_names_what_leaves_the_device_where_that_helps(
    tiny, tmp_path, stage, phase, sets, helps, does_not
):
    recipe, gpu = load_recipe(tiny, [own_base(tmp_path), *sets]), torch.device("cuda")
    run = Run.open(tmp_path / "runs", "new")
    ctx = SimpleNamespace(run=run, recipe=recipe, clock=SimpleNamespace(phase=phase), stage=stage, device=gpu)
    listed = " " + "; ".join(command._remedies(ctx))
    assert all(text in listed for text in helps) and f" {does_not}" not in listed
