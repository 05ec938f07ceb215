"""What is too much for the memory is done again in halves, with the same gradient; one sequence alone exits 3."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import typer

from lco_lite.console import Console
from lco_lite.data.prompts import recipe_task
from lco_lite.errors import MemoryExhausted, ModelError, RecipeError
from lco_lite.evaluation import evaluate
from lco_lite.evaluation.evaluate import evaluate_stage
from lco_lite.metrics import read_log
from lco_lite.models.language_model import LanguageModel
from lco_lite.models.loading import base_dtype, limit_memory, resolve_device
from lco_lite.recipe.file import load_recipe
from lco_lite.recipe.sections import Model, RewardModel, TrainRm
from lco_lite.rollout.hf import HFEngine
from lco_lite.sequences import Example, collate, halved, micro_batches
from lco_lite.train import rl
from lco_lite.train.training import StageTraining, open_optimizer
from tests.train.test_chain import Killed, killed_after, run_stage, same, start, trained
from tests.train.test_rollouts import numbers, stop_in_call


def run_out(patch: pytest.MonkeyPatch, where: str, tokens: int, after: int = 0) -> list[int]:
    """Forward passes of ``where`` (a training phase's ``hidden_states``, or ``generate``) fail above ``tokens`` padded
    tokens, once ``after`` larger ones have passed. Returns the sizes that failed."""
    failed, passed = list[int](), [0]

    def too_much(size):
        if size > tokens:
            passed[0] += 1
            if passed[0] > after:
                failed.append(size)
                torch.rand(7)  # what fails has drawn already
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if where == "generate":
        real = HFEngine._generate_batch

        def generate(self, prompts, sampling):
            too_much(len(prompts) * (max(map(len, prompts)) + sampling.max_new_tokens))
            return real(self, prompts, sampling)

        patch.setattr(HFEngine, "_generate_batch", generate)
        return failed
    real_states = LanguageModel.hidden_states

    def hidden_states(self, input_ids, attention_mask):
        if torch.is_grad_enabled() == (where == "update"):
            too_much(input_ids.numel())
        return real_states(self, input_ids, attention_mask)

    patch.setattr(LanguageModel, "hidden_states", hidden_states)
    return failed


def test_halves_are_of_the_largest_micro_batch_that_can_be_split():
    lengths = [10, 10, 10, 7, 7, 3, 30]
    tokens, seen = 64, []
    while found := halved([lengths], tokens):
        largest = max(len(p) * max(lengths[i] for i in p) for p in micro_batches(lengths, tokens) if len(p) > 1)
        assert found == (largest, largest // 2)
        seen.append(tokens := found[1])
    assert all(len(places) == 1 for places in micro_batches(lengths, tokens)) and seen == sorted(
        set(seen), reverse=True
    )
    assert halved([[9], [400]], 500) is None
    assert halved([[9, 9, 9, 9]], 500, group=4) is None and halved([[9] * 8], 500, group=4) == (72, 36)


def test_a_part_of_a_batch_is_what_is_collated_of_its_sequences():
    examples = [Example([1] * p, [2 + k for k in range(r)]) for p, r in ((3, 4), (2, 2), (5, 1), (1, 3))]
    whole = collate(examples, 0)
    for rows in ([0], [1, 3], [0, 2], [0, 1, 2, 3]):
        part, alone = whole.only(rows), collate([examples[i] for i in rows], 0)
        assert all(torch.equal(getattr(part, f.name), getattr(alone, f.name)) for f in fields(alone)), rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_an_update_that_does_not_fit_is_made_in_halves_with_the_same_gradient(tiny, monkeypatch, capsys, stage, dtype):
    """After some micro-batches have added theirs: what they added is dropped. Masters of 16 bits sum gradients too."""
    sets = [f"model.dtype={dtype}", "train_rm.check_items=0", "sft.micro_batch_tokens=200"]
    sets += ["train_rm.micro_batch_tokens=200"] + ["model.lora=null"] * (dtype == "bfloat16")
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    real = StageTraining.update

    def update(self, *batch):
        if self.stage.name == stage and self.updates == 0:
            gradients[self.ctx.run.name] = {
                name: p.grad.clone() for name, p in self.masters.items() if p.grad is not None
            }
        return real(self, *batch)

    for name in ("whole", "halves"):
        if stage == "rm":
            run_stage(tiny, "sft", *sets, name=name)
        with monkeypatch.context() as patch:
            patch.setattr(StageTraining, "update", update)
            failed = run_out(patch, "update", 110, after=2) if name == "halves" else []
            ctx = run_stage(tiny, stage, *sets, name=name)
    assert failed and all(size > 110 for size in failed)
    section = "train_rm" if stage == "rm" else stage
    told = capsys.readouterr().err
    assert (
        told.count("out of memory") == len(failed)
        and f"update: out of memory with {section}.micro_batch_tokens" in told
    )
    assert ctx.recipe.model.dtype == dtype and gradients["whole"].keys() == gradients["halves"].keys()
    for key, one in gradients["whole"].items():
        scale = one.abs().max().clamp(min=1e-12)
        assert (gradients["halves"][key] - one).abs().max() / scale < (1e-5 if dtype == "float32" else 0.05), key
    by_run = [[row["loss"] for row in read_log(ctx.run.path.parent / n / stage / "metrics.jsonl")] for n in gradients]
    assert by_run[0] == pytest.approx(by_run[1], rel=1e-2 if dtype == "bfloat16" else 1e-4)


OBJECTIVES = ["kld", "mse", "grpo", "gspo", "ppo", "gkd", "minillm"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_rl_update_is_made_again_in_parts_of_what_was_scored(tiny, monkeypatch, capsys, objective):
    sets = [f"rl.objective={objective}", "rl.responses_per_prompt=2", "rl.minibatch=8", "rl.eval_every=0"]
    sets += ["rl.whole_groups=true"] * (objective == "gspo") + ["rl.anchor=0.5"] * (objective == "mse")
    sets += ["rl.feedback=dpo_sampled"] * (
        objective in ("grpo", "gspo")
    )  # by rule an untrained model's groups are dead
    made = []
    for name in ("whole", "halves"):
        run_stage(tiny, "rm", "rl.responses_per_prompt=2", name=name)
        with monkeypatch.context() as patch:
            failed = run_out(patch, "update", 80) if name == "halves" else []
            ctx = run_stage(tiny, f"rl-{objective}", *sets, name=name)
        made.append(numbers(ctx, f"rl-{objective}"))
    assert failed
    told = capsys.readouterr().err
    assert (
        told.count("out of memory") == len(failed) <= 3 and "update: out of memory with rl.micro_batch_tokens" in told
    )
    first, again = made[0][0], made[1][0]
    assert first.keys() == again.keys()
    for number, value in first.items():
        assert again[number] == pytest.approx(value, rel=2e-3, abs=1e-5), number
    assert [len(rows) for rows in made] == [len(made[0])] * 2


def test_a_score_phase_that_does_not_fit_is_scored_and_trained_in_halves(tiny, monkeypatch, capsys):
    """Scored and trained in one shape still, so that the first ratio is that of the advantage alone."""
    run_stage(tiny, "rm")
    shapes: list[list[torch.Size]] = [[], []]
    real = rl.accumulate

    def accumulate(models, settings, report, minibatch, tokens):
        shapes[0] += [micro.batch.input_ids.shape for micro in minibatch]
        shapes[1] += [m.batch.input_ids.shape for m in rl.on_device(models, settings, minibatch, tokens)]
        return real(models, settings, report, minibatch, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(rl, "accumulate", accumulate)
        failed = run_out(patch, "score", 60)
        patch.setattr(rl, "evaluate", lambda *_: None)
        halves = run_stage(tiny, "rl-kld")
    assert failed and shapes[0] == shapes[1] and max(b * n for b, n in shapes[0]) <= 60
    assert "score: out of memory with rl.micro_batch_tokens" in capsys.readouterr().err
    assert len(read_log(halves.run.stage("rl-kld").metrics)) == 2


def test_rollouts_go_on_in_smaller_batches_that_are_kept_and_resumed(tiny, monkeypatch, capsys):
    """As if the recipe had asked for the smaller batch: what failed leaves no trace in the random numbers."""
    run_stage(tiny, "rm", name="small")
    small = run_stage(tiny, "rl-kld", "rl.rollout_batch=4", "rl.eval_every=0", name="small")
    for name in ("halves", "cut"):
        run_stage(tiny, "rm", name=name)
    with monkeypatch.context() as patch:
        failed = run_out(patch, "generate", 4 * 28)
        capsys.readouterr()
        halves = run_stage(tiny, "rl-kld", "rl.eval_every=0", name="halves")
        told = capsys.readouterr().err
        assert len(failed) == 1 and told.count("out of memory") == 1
        assert "rollout: out of memory with rl.rollout_batch 8: done again, and from here on, with 4" in told
        assert "random numbers" in told
        with monkeypatch.context() as inner, pytest.raises(Killed):
            stop_in_call(inner, HFEngine, "_generate_batch", 3, "killed")
            run_stage(tiny, "rl-kld", "rl.eval_every=0", name="cut")
        cut = run_stage(tiny, "rl-kld", "rl.eval_every=0", name="cut")
    assert same(trained(halves, "rl-kld"), trained(small, "rl-kld"))
    assert same(trained(cut, "rl-kld"), trained(halves, "rl-kld"))


def test_pairs_and_scores_are_sampled_in_smaller_batches(tiny, monkeypatch, capsys):
    run_stage(tiny, "sft")
    with monkeypatch.context() as patch:
        failed = run_out(patch, "generate", 3 * 28)
        with start(tiny) as ctx:
            run = run_stage(tiny, "rm", name="other")
            score = evaluate_stage(run, recipe_task(run.recipe), "sft")
    told = capsys.readouterr().err
    assert failed and "rl.rollout_batch" in told and "eval.batch_tokens" in told
    assert score["n"] == 8 and ctx.run.name == "tiny"


def test_likelihoods_do_not_depend_on_how_many_questions_fit(tiny, monkeypatch):
    run_stage(tiny, "sft")
    with start(tiny) as ctx:
        asked = []
        monkeypatch.setattr(evaluate, "likeliest_letters", lambda role, some: asked.append(len(some)) or few(some))

        def few(some):
            if len(some) > 2:
                raise MemoryError
            return [q.item for q in some]

        questions = [SimpleNamespace(prompt=[1] * 5, letters=[[2], [3]], item=i) for i in range(7)]
        assert evaluate.likeliest(ctx, None, questions) == list(range(7)) and asked == [7, 3, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("stage", "where", "phase", "helps", "does_not"),
    [
        ("sft", "update", "update of sft", "sft.max_length", "rl."),
        ("rm", "update", "update of rm", "train_rm.max_length", "sft."),
        ("rl-kld", "update", "update of rl-kld", "rl.max_length", "sft."),
        ("rl-kld", "score", "score of rl-kld", "rl.prompts_per_step", "gradient_checkpointing"),
        ("rl-kld", "generate", "rollout of rl-kld", "rl.max_new_tokens", "gradient_checkpointing"),
    ],
)
def test_one_sequence_that_does_not_fit_exits_3_with_what_helps_there(
    tiny, monkeypatch, capsys, stage, where, phase, helps, does_not
):
    before = {"rm": "sft", "rl-kld": "rm"}.get(stage)
    if before:
        run_stage(tiny, before)
    with monkeypatch.context() as patch, pytest.raises(typer.Exit) as e:
        run_out(patch, where, 12)
        run_stage(tiny, stage)
    assert e.value.exit_code == MemoryExhausted.exit_code == 3
    message = capsys.readouterr().err.partition("error: ")[2]
    assert f"out of memory in phase {phase}, peak" in message and helps in message and does_not not in message
    assert "micro_batch_tokens" not in message, "halving it further changes nothing"
    ctx = run_stage(tiny, stage)  # and goes on where there is room
    assert ctx.run.stage(stage).is_done()


def test_the_preflight_tries_the_longest_beside_the_optimisers_states_and_leaves_nothing(tiny, monkeypatch):
    """As on a GPU: what it tries is halved where it does not fit, and the first update is that of a run without it."""
    real, seen = StageTraining.try_longest, list[int]()

    def on_gpu(self, examples, accumulate, group=1):
        before = {name: p.detach().clone() for name, p in self.masters.items()}
        states = self.states_to_come()
        assert [s.nbytes for s in states] == [p.nbytes for p in self.masters.values() for _ in range(2)]

        def tried(some, tokens):
            assert list(some) == sorted(examples, key=len, reverse=True)[: len(some)]
            seen.append(len(some))
            if len(some) > 2:
                raise torch.OutOfMemoryError
            accumulate(some, tokens)
            assert any(p.grad is not None for p in self.masters.values())

        self.ctx.device = torch.device("cuda")
        real(self, examples, tried, group)
        self.ctx.device = torch.device("cpu")
        assert not self.adamw.state and all(p.grad is None for p in self.masters.values())
        assert all(torch.equal(before[name], p) for name, p in self.masters.items())

    sections = ("sft", "train_rm", "rl")
    with monkeypatch.context() as patch:
        patch.setattr(StageTraining, "try_longest", on_gpu)
        tried = run_stage(tiny, "rl-kld", *(f"{s}.micro_batch_tokens=120" for s in sections), name="tried")
    sizes = [tried.room(f"{section}.micro_batch_tokens", 0).size for section in sections]
    assert max(seen) > 2 and sizes[0] < 120 and sizes[2] < 120
    sets = [f"{section}.micro_batch_tokens={size}" for section, size in zip(sections, sizes, strict=True)]
    plain = run_stage(tiny, "rl-kld", *sets, name="plain")
    assert all(same(trained(plain, stage), trained(tried, stage)) for stage in ("sft", "rm", "rl-kld"))
    assert "preflight" in read_log(tried.run.stage("rl-kld").metrics)[0]["seconds"]


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("whole_model", [False, True])
def test_a_stage_with_moments_in_8_bits_goes_on_to_the_same_bits(tiny, monkeypatch, kind, whole_model):
    """Of an adapter, and of 16-bit weights with their masters in fp32."""
    sets = [f"train_rm.optimizer={kind}", "train_rm.lr=1e-3", "train_rm.check_items=0"]
    sets += ["model.dtype=bfloat16", "model.lora=null"] if whole_model else ["model.lora.r=64"]
    kinds = set[torch.dtype]()
    real = StageTraining.save

    def save(self):
        if self.stage.name == "rm":
            kinds.update(state["state1"].dtype for state in self.adamw.state.values())
        real(self)

    monkeypatch.setattr(StageTraining, "save", save)
    whole = run_stage(tiny, "rm", *sets, name="whole")
    with killed_after(monkeypatch, "rm", 1):
        run_stage(tiny, "rm", *sets, name="cut")
    cut = run_stage(tiny, "rm", *sets, name="cut")
    assert torch.uint8 in kinds
    assert same(trained(whole, "rm"), trained(cut, "rm"))


def test_updates_with_moments_in_8_bits_are_near_those_of_exact_ones():
    """Three updates with the same gradients; the first is sign-like, and both take it alike."""
    moved, steps = {}, [torch.randn(96, 64, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    for kind in ("adamw", "adamw_8bit"):
        weight = torch.nn.Parameter(torch.zeros(96, 64))
        optimizer = open_optimizer([weight], TrainRm(optimizer=kind, lr=1e-2))
        for gradient in steps:
            weight.grad = gradient.clone()
            optimizer.step()
        moved[kind] = weight.detach()
    error = (moved["adamw"] - moved["adamw_8bit"]).norm() / moved["adamw"].norm()
    assert 0 < error < 0.05
    assert type(open_optimizer([weight], TrainRm())) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("limit", "fraction", "told"),
    [("6GiB", 0.5, ""), ("6144 MiB", 0.5, ""), ("12GB", 12e9 / (12 * 2**30), ""), ("13GiB", None, "has 12.0 GiB")],
)
def test_a_memory_limit_is_held_by_the_allocator_of_the_device(monkeypatch, capsys, limit, fraction, told):
    """Torch's own code down to its allocator, which takes a device by its index alone."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=12 * 2**30))
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: calls.append(given), raising=False)
    limit_memory(resolve_device("auto"), limit, Console())
    assert calls == ([] if fraction is None else [(pytest.approx(fraction), 0)])
    assert told in capsys.readouterr().out
    limit_memory(torch.device("cpu"), limit, Console())
    assert "no effect on a CPU" in capsys.readouterr().out and len(calls) <= 1


@pytest.mark.parametrize("wrong", ["11.5", "11,5GiB", "lots", "0GiB", "-1GiB", "12gib"])
def test_a_memory_limit_without_number_and_unit_is_refused(tiny, wrong):
    with pytest.raises(RecipeError, match=r"memory_limit \(--set\).*GiB"):
        load_recipe(tiny, [f"memory_limit='{wrong}'"])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_bfloat16_is_refused_below_capability_8_with_what_works(monkeypatch, dtype):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for section, weights in (
        ("model", Model(path="x", dtype=dtype)),
        ("reward_model", RewardModel(path="x", dtype=dtype)),
    ):
        with pytest.raises(ModelError, match=rf"{section}\.dtype: {dtype} .*7\.5.*Set {section}\.dtype: float32"):
            base_dtype(weights, gpu)
    assert base_dtype(Model(path="x", dtype="float32"), gpu) == torch.float32
    assert base_dtype(Model(path="x", dtype=dtype), torch.device("cpu")) == (
        torch.float32 if dtype == "auto" else torch.bfloat16
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert base_dtype(Model(path="x", dtype=dtype), gpu) == torch.bfloat16
