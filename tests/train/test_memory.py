"""What is too much for the memory is done again in halves, with the same gradient; one sequence alone exits 3."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import typer

from lco_lite.data.prompts import recipe_task
from lco_lite.errors import MemoryExhausted
from lco_lite.evaluation import evaluate
from lco_lite.evaluation.evaluate import evaluate_stage
from lco_lite.metrics import read_log
from lco_lite.models.language_model import LanguageModel
from lco_lite.rollout.hf import HFEngine
from lco_lite.sequences import Example, collate, halved, micro_batches
from lco_lite.train import rl
from lco_lite.train.training import StageTraining
from tests.train.test_chain import Killed, run_stage, same, start, trained
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

    def update(self):
        if self.stage.name == stage and self.updates == 0:
            gradients[self.ctx.run.name] = {
                name: p.grad.clone() for name, p in self.masters.items() if p.grad is not None
            }
        return real(self)

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
