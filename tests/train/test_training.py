"""What every stage's updates go through: masters of 16-bit weights, Adam's ε, a critic's own clip, the schedule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import typer
from torch.nn import Parameter

from lco_lite import weights
from lco_lite.console import Console
from lco_lite.context import Context
from lco_lite.data.prompts import recipe_task
from lco_lite.errors import Diverged, UsageError
from lco_lite.evaluation.evaluate import evaluate_stage
from lco_lite.metrics import read_log
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import lco_loss
from lco_lite.objectives.targets import SparseTarget
from lco_lite.recipe import Rl
from lco_lite.recipe.file import load_recipe
from lco_lite.recipe.sections import Lora, TrainRm
from lco_lite.run import Run
from lco_lite.train import methods
from lco_lite.train.guard import Warned
from lco_lite.train.rollouts import Rollouts
from lco_lite.train.training import StageTraining
from tests.models.families import load, save
from tests.train.test_chain import killed_after, run_stage, same, start, trained

BF16 = ("model.dtype=bfloat16", "model.lora=null")


@pytest.fixture
def training(tiny, tmp_path):
    """Makes what trains these parameters, in a run of its own."""

    def make(parameters, settings, updates=20):
        ctx = Context(Run.open(tmp_path, "run"), load_recipe(tiny), Console(quiet=True), torch.device("cpu"))
        return StageTraining(ctx, ctx.run.stage("rm"), parameters, settings, updates, updates)

    return make


@pytest.mark.parametrize("lr", [1e-6, 5e-6])
def test_masters_of_bf16_weights_move_as_an_fp32_optimiser_fed_the_same_gradients(tmp_path, training, lr):
    """Gradients of several micro-batches are summed in fp32; on the weights themselves the updates would be lost."""
    folder = save("llama", tmp_path / "m")
    model, twin = load(folder, dtype="bfloat16"), load(folder, dtype="bfloat16")
    named = model.trainable_full(freeze_head=True)
    twins = [p for _, p in twin.trainable_full(freeze_head=True)]
    stage = training(named, TrainRm(lr=lr, schedule="constant"))
    first = [p.detach().float() for p in twins]
    wide, raw = ([Parameter(p.detach().clone().to(dtype)) for p in twins] for dtype in (torch.float32, torch.bfloat16))
    adamw = [torch.optim.AdamW(kind, lr=lr, weight_decay=0.0) for kind in (wide, raw)]

    def loss(model, ids):
        return model.hidden_states(ids, torch.ones_like(ids)).float().square().mean()

    for update in range(10):
        batches = torch.randint(4, 250, (2, 3, 9), generator=torch.Generator().manual_seed(update))
        with torch.no_grad():
            for p, q in zip(twins, [p for _, p in named], strict=True):
                p.copy_(q)
        parts = [torch.autograd.grad(loss(twin, ids), twins) for ids in batches]
        for ids in batches:
            loss(model, ids).backward()
        stage.update()
        for kind, optimiser in zip((wide, raw), adamw, strict=True):
            for p, *gradients in zip(kind, *parts, strict=True):
                p.grad = sum(g.float() for g in gradients).to(p.dtype)
            torch.nn.utils.clip_grad_norm_(kind, 1.0)
            optimiser.step()
    assert all(torch.equal(master, p) for master, p in zip(stage.masters.values(), wide, strict=True))
    assert all(torch.equal(p.detach(), master.bfloat16()) for (_, p), master in zip(named, wide, strict=True))

    def moved(weights):
        return torch.cat([(p.detach().float() - before).flatten() for p, before in zip(weights, first, strict=True)])

    asked, lost = moved(wide), moved(raw)
    seen = torch.cat([(p.grad.flatten() != 0) for p in wide])  # embeddings of tokens that no batch has get none
    assert (asked[seen] != 0).float().mean() > 0.99
    assert (lost[seen] != 0).float().mean() < 0.2 and torch.cosine_similarity(asked, lost, dim=0) < 0.5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_trained_head_tied_or_not_is_saved_as_its_master(tmp_path, training, family):
    model = load(save(family, tmp_path / "m"), dtype="bfloat16")
    stage = training(model.trainable_full(freeze_head=False), TrainRm(lr=1e-6))
    ids = torch.tensor([[5, 6, 7]])
    model.base(ids).logits.square().mean().backward()
    stage.update()
    model.save_full(tmp_path / "saved", stage.masters)
    again = load(tmp_path / "saved", dtype="float32").base
    assert all(torch.equal(p, stage.masters[name]) for name, p in again.named_parameters())
    assert not torch.equal(
        again.get_output_embeddings().weight.bfloat16().float(), again.get_output_embeddings().weight
    )


def test_weights_of_32_bits_and_adapters_are_their_own_masters(tmp_path, training):
    model = load(save("llama", tmp_path / "m"), dtype="bfloat16")
    model.add_adapter("policy", Lora(r=2), 0)
    stage = training(model.trainable("policy"), TrainRm())
    assert all(stage.masters[name] is p and p.dtype == torch.float32 for name, p in stage.parameters.items())


@pytest.mark.parametrize(("stage", "after"), [("rm", 1), ("rl-kld", 1)])
def test_full_fine_tuning_in_bf16_goes_on_to_the_same_bits_by_the_masters_in_its_checkpoints(
    tiny, monkeypatch, stage, after
):
    lr = ("train_rm.lr=1e-5", "rl.lr=1e-5", "rl.warmup_steps=0")  # most masters do not reach the next bf16 number
    whole = run_stage(tiny, stage, *BF16, *lr, name="whole")
    with killed_after(monkeypatch, stage, after):
        run_stage(tiny, stage, *BF16, *lr, name="cut")
    cut = run_stage(tiny, stage, *BF16, *lr, name="cut")
    assert same(trained(whole, stage), trained(cut, stage))


def test_what_a_stage_in_bf16_leaves_has_every_update_and_the_next_goes_on_from_there(tiny):
    """The change of a stage is that of its masters, far under what bfloat16 can hold; it loads to what was trained."""
    lr = ("train_rm.lr=1e-6", "train_rm.schedule=constant", "rl.lr=1e-6", "rl.warmup_steps=0")
    ctx = run_stage(tiny, "rl-kld", *BF16, *lr)
    sft, made = trained(ctx, "sft"), {stage: trained(ctx, stage) for stage in ("rm", "rl-kld")}
    assert sft["model.norm.weight"].dtype == torch.float32
    for stage, after in made.items():
        updates = len(
            read_log(ctx.run.stage(stage).metrics if stage == "rm" else ctx.run.stage(stage).path / "updates.jsonl")
        )
        layer = [key for key in sft if ".layers." in key]
        change = torch.cat([(after[key].double() - sft[key].double()).flatten() for key in layer])
        assert (change != 0).float().mean() > 0.95 and change.abs().max() < 1.5e-6 * updates
        rounded = torch.cat([(after[key].bfloat16() != sft[key].bfloat16()).flatten() for key in layer])
        assert rounded.float().mean() < 0.2
    opened = weights.open_stage(ctx, "rl-kld").model.base
    assert all(torch.equal(p, made["rl-kld"][name].bfloat16()) for name, p in opened.named_parameters())
    assert {p.dtype for p in opened.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("setting", ["model.dtype=float16", "reward_model={path: x, dtype: float16}"])
def test_training_in_float16_is_refused_with_the_reason_before_anything_is_done(tiny, capsys, setting):
    with pytest.raises(typer.Exit) as e:
        run_stage(tiny, "rl-kld", setting)
    assert e.value.exit_code == UsageError.exit_code
    told = capsys.readouterr().err
    assert setting.partition("=")[0].partition(".")[0] in told and "bfloat16 or float32" in told
    assert not (tiny.parent / "runs/tiny/sft").exists()


def test_float16_is_good_enough_for_scores(tiny):
    with start(tiny, "model.dtype=float16") as ctx:
        assert evaluate_stage(ctx, recipe_task(ctx.recipe), "base")["n"] == 8


@pytest.mark.parametrize("objective", ["mse", "lch"])
def test_a_sparse_mean_over_a_real_vocabulary_takes_the_step_that_the_learning_rate_says(training, objective):
    generator = torch.Generator().manual_seed(0)
    rows, tokens = 49_152, 512
    head = Head(torch.randn(rows, 8, generator=generator) * 0.1)
    old = torch.randn(tokens, 8, generator=generator)
    signs = torch.randint(0, 2, (tokens,), generator=generator) * 2.0 - 1
    target = SparseTarget(old, 1.0, torch.randint(0, rows, (tokens,), generator=generator), signs)

    def size(eps, weighting):
        """A first step over the learning rate, mean over weights."""
        asked = {"objective": objective, "feedback": "rule", "adam_eps": eps, "weighting": weighting, "warmup_steps": 0}
        hidden, rl = Parameter(old.clone()), Rl.model_validate({**asked, "lr": 1e-3})
        lco_loss(objective, hidden, head, target, weighting)[0].backward()
        training([("hidden", hidden)], rl).update()
        return ((hidden.detach() - old).abs().mean() / 1e-3).item()

    assert size(1e-8, "mean") < 0.5, "TRL's ε is larger than the gradient"
    assert size(None, "mean") == pytest.approx(1, abs=1e-2) and size(None, "sum") == pytest.approx(1, abs=1e-2)


def test_only_the_sparse_mean_has_a_smaller_epsilon_and_ones_own_counts():
    def eps(**rl):
        return Rl.model_validate(rl).eps

    assert eps(objective="mse", feedback="rule") == eps(objective="lch", feedback="dpo_sampled") == 1e-14
    others = [{"objective": "mse"}, {"objective": "kld", "feedback": "rule"}, {"objective": "grpo"}]
    others += [{"objective": "mse", "feedback": "rule", "weighting": w} for w in ("sum", "policy")]
    others += [{"objective": "mse", "feedback": "rule", "variant": {"top_k": 1}}]
    assert {eps(**rl) for rl in others} == {1e-8} == {TrainRm().eps}
    assert eps(objective="mse", feedback="rule", adam_eps=1e-6) == 1e-6


def test_a_critic_is_clipped_and_measured_by_itself(training):
    policy, critic = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    stage = training([("w", policy), ("critic.w", critic)], TrainRm(max_grad_norm=1.0))
    stage.adamw.register_step_pre_hook(lambda *_: seen.extend(p.grad.norm().item() for p in (policy, critic)))
    seen: list[float] = []
    policy.grad, critic.grad = torch.full((3,), 0.1), torch.full((3,), 100.0)
    told = stage.update()
    assert told["grad_norm"] == pytest.approx(0.1 * math.sqrt(3))
    assert told["critic_grad_norm"] == pytest.approx(100 * math.sqrt(3))
    assert seen == pytest.approx([0.1 * math.sqrt(3), 1.0], rel=1e-4), "the policy's is under the limit and stays"


def test_ppo_tells_its_critics_loss_and_gradient_apart(tiny, monkeypatch):
    parts = []
    real = methods.value_loss

    def spy(values, old_values, returns, clip, tokens):
        parts.append(0.5 * (values.detach() - returns).square().sum().item() / tokens)  # with a clip that never acts
        return real(values, old_values, returns, clip, tokens)

    monkeypatch.setattr(methods, "value_loss", spy)
    ctx = run_stage(tiny, "rl-ppo", "rl.objective=ppo", "rl.value_clip=1e9", "rl.micro_batch_tokens=40")
    updates = read_log(ctx.run.stage("rl-ppo").path / "updates.jsonl")
    assert len(parts) > len(updates), "several micro-batches an update"
    assert sum(u["value_loss"] for u in updates) == pytest.approx(sum(parts), rel=1e-4)
    assert all(u["critic_grad_norm"] > 0 for u in updates)
    assert {"value_loss", "critic_grad_norm"} <= set(read_log(ctx.run.stage("rl-ppo").metrics)[0])
    other = run_stage(tiny, "rl-grpo", "rl.objective=grpo", "rl.prompts_per_step=4")
    assert not {"value_loss", "critic_grad_norm"} & set(read_log(other.run.stage("rl-grpo").metrics)[0])


def test_the_schedule_ends_with_the_last_update_where_dynamic_sampling_makes_phases_smaller(tiny, monkeypatch):
    real = Rollouts.phase
    sizes = {0: 8, 1: 3, 2: 5}

    def smaller(self, step, stop_if_asked):
        return real(self, step, stop_if_asked).only(range(sizes[step]), 1)

    sets = ("rl.feedback=rule", "rl.steps=3", "rl.inner_epochs=1", "rl.schedule=cosine", "rl.warmup_steps=2")

    def rates(name):
        ctx = run_stage(tiny, "rl-kld", *sets, name=name)
        return [row["lr"] / 1e-3 for row in read_log(ctx.run.stage("rl-kld").path / "updates.jsonl")]

    def cosine(update, total):
        return 0.5 * (1 + math.cos(math.pi * (update - 2) / (total - 2)))

    assert rates("full") == pytest.approx([0.5, 1.0, *(cosine(u, 6) for u in range(2, 6))])
    monkeypatch.setattr(Rollouts, "phase", smaller)
    # minibatches of 4: two updates, one where two were planned, two
    assert rates("smaller") == pytest.approx([0.5, 1.0, cosine(2, 5), cosine(3, 5), cosine(4, 5)])


GROUPS = ("rl.objective=grpo", "rl.whole_groups=true", "rl.prompts_per_step=4", "rl.steps=3", "rl.weight_decay=0.1")
GROUPS += ("rl.schedule=cosine", "rl.kl_coef=0", "rl.lr=1e-3", "rl.eval_every=0")


@pytest.fixture
def partly_dead(monkeypatch):
    """Two of four groups have no signal in the first step, none has one in the second, all in the third."""
    real, weights_after = Rollouts.phase, dict[int, list[torch.Tensor]]()
    dead = {0: (0, 2), 1: (0, 1, 2, 3), 2: ()}

    def phase(self, step, stop_if_asked):
        rewards = [0.3 if i // 4 in dead[step] else i / 7 for i in range(16)]
        return replace(real(self, step, stop_if_asked), rewards={"rule": rewards})

    keep = StageTraining.keep

    def kept(self, step, *told):
        weights_after[step] = [p.detach().clone() for p in self.masters.values()]
        keep(self, step, *told)

    monkeypatch.setattr(Rollouts, "phase", phase)
    monkeypatch.setattr(StageTraining, "keep", kept)
    return weights_after


def test_an_update_without_a_signal_is_not_made_and_the_schedule_knows(tiny, partly_dead, capsys):
    ctx = run_stage(tiny, "rl-grpo", *GROUPS)
    stage = ctx.run.stage("rl-grpo")
    rows, updates = read_log(stage.metrics), read_log(stage.path / "updates.jsonl")
    assert [row["skipped_updates"] for row in rows] == [4, 8, 0]
    assert [row["dead_groups"] for row in rows] == [0.5, 1.0, 0.0]
    assert [sum(u["step"] == step for u in updates) for step in (1, 2, 3)] == [4, 0, 8]
    assert not {"loss", "lr", "kl_to_old"} & rows[1].keys() and {"loss", "lr", "kl_to_old"} <= rows[2].keys()
    first, second, third = partly_dead[0], partly_dead[1], partly_dead[2]
    assert all(map(torch.equal, first, second)), "neither momentum nor weight decay"
    assert not all(map(torch.equal, second, third))
    assert updates[-1]["lr"] / 1e-3 == pytest.approx(0.5 * (1 + math.cos(math.pi * 9 / 10))), "the last of 12"
    assert "step 2: every group is dead" in capsys.readouterr().err


@pytest.mark.parametrize("after", [1, 2])
def test_a_stage_goes_on_to_the_same_bits_from_before_and_after_skipped_updates(tiny, monkeypatch, partly_dead, after):
    whole = run_stage(tiny, "rl-grpo", *GROUPS, name="whole")
    with killed_after(monkeypatch, "rl-grpo", after):
        run_stage(tiny, "rl-grpo", *GROUPS, name="cut")
    cut = run_stage(tiny, "rl-grpo", *GROUPS, name="cut")
    assert same(trained(whole, "rl-grpo"), trained(cut, "rl-grpo"))
    logs = [read_log(ctx.run.stage("rl-grpo").path / "updates.jsonl") for ctx in (whole, cut)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("method", ["ppo", "pmd", "kld"])
def test_methods_that_learn_without_an_advantage_make_all_their_updates(tiny, partly_dead, method):
    fours = [one for one in FOURS if method != "ppo" or "baseline" not in one]  # its critic is one
    ctx = run_stage(tiny, f"rl-{method}", f"rl.objective={method}", *GROUPS[1:], "rl.steps=2", *fours)
    rows = read_log(ctx.run.stage(f"rl-{method}").path / "updates.jsonl")
    assert [sum(row["step"] == step for row in rows) for step in (1, 2)] == [8, 8]
    assert not all(map(torch.equal, partly_dead[0], partly_dead[1]))


FOURS = ("rl.responses_per_prompt=4", "rl.inner_epochs=2", "rl.feedback=rule", "rl.baseline=group")


def test_a_reward_model_that_does_not_move_is_said_and_off_says_nothing(tiny, capsys):
    run_stage(tiny, "rm", "train_rm.lr=1e-9", name="said")
    assert "φ has learned next to nothing" in capsys.readouterr().err
    run_stage(tiny, "rm", "train_rm.lr=1e-9", "rl.guard=off", name="off")
    assert "φ has learned" not in capsys.readouterr().err


def test_only_a_collapse_ends_a_run_whose_guard_is_stop(training, tiny, capsys):
    one = training([("w", Parameter(torch.ones(2)))], TrainRm())
    one.ctx.recipe = one.ctx.recipe.model_copy(update={"rl": Rl(guard="stop")})
    one.ctx.console = Console()
    with one:
        one.keep(0, {}, [Warned("dull", stops=False)])
        with pytest.raises(Diverged, match="after step 2: wild"):
            one.keep(1, {}, [Warned("dull", stops=False), Warned("wild", stops=True)])
    assert one.saved == 2 and capsys.readouterr().out.count("other settings take") == 1
