"""A phase's responses are on disk before its first update: whatever stops a step costs updates, never samples."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer

from lco_lite.checkpoint import save_checkpoint
from lco_lite.evaluation.evaluate import evaluate_stage, respond
from lco_lite.evaluation.prompts import Question
from lco_lite.files import JsonLines
from lco_lite.metrics import METRICS, read_log
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import Role
from lco_lite.models.loading import open_tokenizer
from lco_lite.recipe import Rl
from lco_lite.recipe.sections import Rollout
from lco_lite.rollout import paged
from lco_lite.rollout.engine import Engine, Response, Sampling, open_engine
from lco_lite.rollout.hf import HFEngine
from lco_lite.rollout.paged import PagedEngine
from lco_lite.sequences import Example
from lco_lite.tasks import load_task
from lco_lite.train.pipeline import train
from lco_lite.train.reward_model import pair_up
from lco_lite.train.rollouts import Phase, Rollouts, plan_minibatches, sample
from lco_lite.train.training import StageTraining
from tests.models.families import load, save
from tests.train.test_chain import Killed, run_stage, same, start, trained

FOUR_BATCHES = "rl.rollout_batch=2"  # of the eight responses of a phase


def stop_in_call(patch: pytest.MonkeyPatch, kind: type, name: str, number: int, how: str) -> list[int]:
    """Ctrl-C, or death, in call ``number`` of a method. Returns a list with one entry, the calls so far."""
    real, calls = getattr(kind, name), [0]

    def method(self, *args, **kw):
        calls[0] += 1
        if calls[0] == number:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kw)

    patch.setattr(kind, name, method)
    return calls


def stopped(how: str) -> type[BaseException]:
    return Killed if how == "killed" else typer.Exit


STOPS = [
    (HFEngine, "_generate_batch", 3),  # inside the rollouts of the first phase
    (HFEngine, "_generate_batch", 7),  # inside those of the second, after the held-out score of the first
    (StageTraining, "update", 1),
    (StageTraining, "update", 3),
    (StageTraining, "update", 6),
]


@pytest.mark.parametrize(
    ("kind", "name", "number", "how"),
    [
        *((*stop, "killed") for stop in STOPS),
        *(pytest.param(*stop, "interrupted", marks=[pytest.mark.long] * (stop[2] != 3)) for stop in STOPS),
    ],
)
def test_a_step_that_is_stopped_anywhere_is_scored_and_updated_again_from_its_responses(
    tiny, monkeypatch, capsys, kind, name, number, how
):
    sets = [FOUR_BATCHES, "rl.anchor=0.5", "rl.objective=mse", "rl.eval_every=0"]
    batches: dict[str, int] = {}
    for run in ("whole", "cut"):
        run_stage(tiny, "rm", *sets, name=run)
    with monkeypatch.context() as patch:
        calls = stop_in_call(patch, HFEngine, "_generate_batch", -1, how)
        whole = run_stage(tiny, "rl-mse", *sets, name="whole")
        batches["whole"] = calls[0]
    with monkeypatch.context() as patch:
        counted = stop_in_call(patch, HFEngine, "_generate_batch", -1, how)
        with monkeypatch.context() as inner, pytest.raises(stopped(how)):
            stop_in_call(inner, kind, name, number, how)
            run_stage(tiny, "rl-mse", *sets, name="cut")
        if how == "interrupted":
            assert "the same command goes on" in capsys.readouterr().err
        cut = run_stage(tiny, "rl-mse", *sets, name="cut")
        batches["cut"] = counted[0]
    assert same(trained(whole, "rl-mse"), trained(cut, "rl-mse"))
    assert batches["whole"] == 8 and batches["cut"] == 8, "no batch is sampled twice, none is left out"
    folders = [run.run.stage("rl-mse") for run in (whole, cut)]
    losses = [[row["loss"] for row in read_log(folder.metrics)] for folder in folders]
    assert losses[0] == losses[1]
    updates = [[(r["step"], r["update"]) for r in read_log(folder.path / "updates.jsonl")] for folder in folders]
    assert updates[0] == updates[1] == [(step, update) for step in (1, 2) for update in (1, 2, 3, 4)]
    assert not list((folders[1].path / "rollouts").glob("*")), "responses go once they are no longer needed"


def test_a_phase_is_on_disk_before_its_first_update(tiny, monkeypatch):
    seen: list[list[dict]] = []
    real = StageTraining.update

    def update(self, *batch):
        if self.stage.name == "rl-kld":
            file = self.stage.path / f"rollouts/step-{self.done + 1:06d}.jsonl"
            seen.append([json.loads(line) for line in file.read_text().splitlines()])
        return real(self, *batch)

    monkeypatch.setattr(StageTraining, "update", update)
    run_stage(tiny, "rl-kld", FOUR_BATCHES)
    assert sorted(place for line in seen[0] for place in line.get("places", [])) == list(range(8))
    assert len(seen[0][-1]["grades"]) == 8


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_pairs_that_are_sampled_go_on_where_they_were(tiny, monkeypatch, capsys, how):
    whole = run_stage(tiny, "rm", "rl.rollout_batch=4", name="whole")
    run_stage(tiny, "sft", name="cut")
    with monkeypatch.context() as patch:
        calls = stop_in_call(patch, HFEngine, "_generate_batch", 4, how)
        with pytest.raises(stopped(how)):
            run_stage(tiny, "rm", "rl.rollout_batch=4", "train_rm.check_items=0", name="cut")
        cut = run_stage(tiny, "rm", "rl.rollout_batch=4", "train_rm.check_items=0", name="cut")
    assert calls[0] == 6 + (how == "killed"), "24 responses, four at a time; a batch that died is made again"
    if how == "interrupted":
        assert "the same command goes on" in capsys.readouterr().err
    pairs = [(run.run.stage("rm").path / "pairs.jsonl").read_text() for run in (whole, cut)]
    assert pairs[0] == pairs[1]
    assert not (cut.run.stage("rm").path / "responses.jsonl").exists()


def test_responses_for_pairs_are_not_taken_for_other_prompts_or_of_another_length(tiny, monkeypatch, capsys):
    sets = ("rl.rollout_batch=4", "train_rm.check_items=0")
    whole = run_stage(tiny, "rm", *sets, "rl.max_new_tokens=10", name="whole")
    run_stage(tiny, "sft", name="cut")
    with monkeypatch.context() as patch:
        stop_in_call(patch, HFEngine, "_generate_batch", 4, "killed")
        with pytest.raises(Killed):
            run_stage(tiny, "rm", *sets, name="cut")
    cut = run_stage(tiny, "rm", *sets, "rl.max_new_tokens=10", name="cut")
    assert "or of another length: they are sampled anew" in " ".join(capsys.readouterr().err.split())
    pairs = [(run.run.stage("rm").path / "pairs.jsonl").read_text() for run in (whole, cut)]
    assert pairs[0] == pairs[1]


def test_of_a_response_that_was_cut_the_grade_decides_alike_in_rewards_scores_and_pairs(tiny):
    """Right but cut: rewarded as right, right in a score, and in pairs neither chosen nor rejected."""
    with start(tiny, "rl.objective=grpo", "train_rm.samples_per_prompt=4", "train_rm.pairs_per_prompt=4") as ctx:
        chat = ChatFormat(open_tokenizer(ctx.recipe.model, 0), {})
        rollouts = Rollouts(ctx, 999, None, chat, ctx.run.stage("rl-grpo"))  # type: ignore[arg-type]
        prompt, task, rm = rollouts.prompts[0], rollouts.task, ctx.recipe.train_rm
        assert task is not None and prompt.item is not None
        right, wrong = prompt.item.demonstration, "1+1=2 #999"

        def response(text, cut):
            ids = chat.response(text)
            return Response(Example(chat.prompt(prompt.messages), ids[:-1] if cut else ids), cut)

        made = [response(text, cut) for text in (right, wrong) for cut in (False, True)]
        judged = rollouts._judge([prompt] * 4, made)
        assert judged["grades"] == judged["rewards"]["rule"] == [1, 1, -1, -1]
        engine = SimpleNamespace(generate=lambda prompts, sampling: iter([(list(range(4)), made)]))
        rows = respond(ctx, engine, chat, task, [Question(prompt.item, [], [])] * 4, rollouts.sampling, 0)  # type: ignore[arg-type]
        assert [row["right"] for row in rows] == [True, True, False, False]
        assert [row["truncated"] for row in rows] == [False, True, False, True]
        whole = rm.model_copy(update={"cut_rejected": False})
        (pair,) = pair_up(chat, task, [prompt], made, whole)
        assert (pair.chosen, pair.rejected) == (made[0].example, made[2].example)
        only_cut = [made[1], made[1], made[2], made[3]]
        assert not pair_up(chat, task, [prompt], only_cut, whole.model_copy(update={"demonstrations_as_chosen": False}))
        (pair,) = pair_up(chat, task, [prompt], [made[0], made[3], made[1], made[1]], whole)
        assert (pair.chosen, pair.rejected) == (made[0].example, made[3].example)


@pytest.mark.parametrize("version", ["now", "0.3"])
def test_a_reward_function_is_asked_once_for_a_phase(tiny, monkeypatch, version):
    """Version 0.3 kept the rewards of the one feedback without its name."""
    file = tiny.parent / "rewards.py"
    file.write_text(
        "import random\n"
        "def drawn(prompts, responses, rows):\n"
        "    with open(__file__ + '.calls', 'a') as calls:\n"
        "        calls.write('x' * (len(responses) > 1))\n"  # one alone is the trial before training
        "    return [random.random() for _ in responses]\n"
    )
    sets = ["rl.objective=reinforce", "rl.feedback=function", f"rl.reward_function={file}:drawn"]
    run_stage(tiny, "sft")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_in_call(patch, StageTraining, "update", 2, "killed")
        run_stage(tiny, "rl-reinforce", *sets)
    (kept,) = tiny.parent.glob("runs/tiny/rl-reinforce/rollouts/step-000001.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    if version == "0.3":
        for line in lines:
            del line["seal"]
            if "rewards" in line:
                line["rewards"] = line["rewards"]["function"]
        kept.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    ctx = run_stage(tiny, "rl-reinforce", *sets)
    assert (tiny.parent / "rewards.py.calls").read_text() == "xx", "once a phase"
    assert len(read_log(ctx.run.stage("rl-reinforce").metrics)) == 2


def test_a_stage_that_version_0_1_left_inside_a_step_is_refused(tiny, monkeypatch, capsys):
    def as_version_0_1_did(folder, step, tensors, optimizer, state):
        return save_checkpoint(folder, step, tensors, optimizer, {"phase": {}, "history": [], **state})

    run_stage(tiny, "rm")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("lco_lite.train.training.save_checkpoint", as_version_0_1_did)
        stop_in_call(patch, StageTraining, "update", 6, "killed")
        run_stage(tiny, "rl-kld")
    with pytest.raises(typer.Exit):
        run_stage(tiny, "rl-kld")
    assert "version 0.1 stopped here inside a step" in capsys.readouterr().err


def numbers(ctx, stage: str) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if isinstance(value, float) and name in METRICS}
        for row in read_log(ctx.run.stage(stage).path / "updates.jsonl")
    ]


@pytest.mark.parametrize("objective", ["kld", "lch", "mse", "grpo", "gspo", "ppo", "gkd", "minillm"])
def test_no_number_of_an_update_depends_on_how_it_is_split(tiny, objective):
    sets = [f"rl.objective={objective}", "rl.responses_per_prompt=2", "rl.teacher_mix=0"]
    if objective != "minillm":
        sets.pop()
    if objective in ("grpo", "gspo"):
        sets.append("rl.feedback=dpo_sampled")  # by rule an untrained model's groups are all dead
    made = []
    for tokens in (8192, 40):
        ctx = run_stage(tiny, f"rl-{objective}", *sets, f"rl.micro_batch_tokens={tokens}", name=f"t{tokens}")
        made.append(numbers(ctx, f"rl-{objective}"))
        (metrics, *_) = read_log(ctx.run.stage(f"rl-{objective}").metrics)
        assert 0 <= metrics["kl_to_old"] < 1 and 0 < metrics["sampled_prob"] < 1
    for one, other in zip(*made, strict=True):
        assert one.keys() == other.keys() >= {"entropy", "sampled_prob", "logit_grad_sampled", "logit_grad_others"}
        for name in one.keys() - {"clipped", "loss", "grad_norm"}:
            assert one[name] == pytest.approx(other[name], rel=2e-2, abs=2e-4), name
    first, again = made[0][0], made[1][0]
    assert first["entropy"] == pytest.approx(again["entropy"], rel=1e-5)
    assert first["loss"] == pytest.approx(again["loss"], rel=1e-3, abs=1e-5)


def test_whole_groups_stay_together_in_a_minibatch_and_in_a_micro_batch():
    examples = [Example([1] * (3 + i % 5), [2] * (1 + i % 7)) for i in range(24)]
    rl = Rl(objective="grpo", responses_per_prompt=4, minibatch=8, micro_batch_tokens=60, whole_groups=True)
    plan = plan_minibatches(examples, rl, seed=0, step=0)
    assert [sum(map(len, minibatch)) for minibatch in plan] == [8, 8, 8]
    micro_batches = [places for minibatch in plan for places in minibatch]
    assert sorted(i for places in micro_batches for i in places) == list(range(24))
    for places in micro_batches:
        groups = {i // 4 for i in places}
        assert sorted(places) == sorted(4 * group + k for group in groups for k in range(4))


def test_a_phase_keeps_the_groups_that_are_asked_for():
    numbers = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    phase = Phase([5, 7, 9], 4, list(range(6)), numbers, {"function": numbers}, [False] * 6, 6)  # type: ignore[arg-type]
    kept = phase.only([2, 0], 2)
    assert kept.chosen == [9, 5] and kept.responses == [4, 5, 0, 1] and kept.drawn == 6
    assert kept.grades == kept.rewards["function"] == [4, 5, 0, 1]
    both = kept.and_also(phase)
    assert both.chosen == [9, 5, 5, 7, 9] and both.drawn == 12 and both.rewards["function"] == [4, 5, 0, 1, *numbers]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("live", "rounds", "prompts"),
    [
        ([[1, 1, 1, 1]], 1, [0, 1, 2, 3]),
        ([[1, 0, 1, 0], [0, 1, 1, 1]], 2, [0, 2, 11, 12]),  # no more than are asked for
        ([[0, 0, 0, 0], [1, 1, 1, 1]], 2, [10, 11, 12, 13]),  # where none had a signal at first, too
        ([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], 4, [0, 32, 33]),  # of the last round as of others
        ([[0, 0, 0, 0]] * 4, 4, [0, 1, 2, 3]),
    ],
)
def test_dynamic_sampling_keeps_groups_with_a_signal_alone(tmp_path, monkeypatch, live, rounds, prompts):
    """Yu et al. 2025, eq 11: 0 < right responses of a group < G."""
    made = []

    def one_round(self, step, again, kept, stop_if_asked):
        made.append(again)
        grades = [grade for has_signal in live[again] for grade in (1.0, -1.0 if has_signal else 1.0)]
        responses = [Response(Example([10 * again + i // 2], [1]), False) for i in range(8)]
        chosen = [10 * again + i for i in range(4)]
        return Phase(chosen, 1, responses, grades, {"rule": [*grades]}, [False] * 8, 8)

    monkeypatch.setattr(Rollouts, "_round", one_round)
    rollouts = object.__new__(Rollouts)
    rl = Rl(objective="dapo", prompts_per_step=4, responses_per_prompt=2)
    rollouts.ctx, rollouts.folder = SimpleNamespace(recipe=SimpleNamespace(rl=rl)), tmp_path
    phase = rollouts.phase(0, lambda: None)
    assert made == list(range(rounds)) and phase.drawn == 8 * rounds
    assert phase.chosen == prompts and [r.example.prompt[0] for r in phase.responses[::2]] == prompts


def test_the_chain_goes_through_paged_rollouts_and_goes_on_from_those_that_are_kept(tiny, monkeypatch):
    """Pairs, rollouts and scores; eight responses a phase are two batches, four times as many as are made at once."""
    how = "killed"
    sets = ["rollout.engine=paged", "rl.rollout_batch=1", "rl.eval_every=0", "eval.batch=2"]
    by_generate = stop_in_call(monkeypatch, HFEngine, "_generate_batch", -1, how)
    for run in ("whole", "cut"):
        run_stage(tiny, "rm", *sets, name=run)
    batches = stop_in_call(monkeypatch, PagedEngine, "_generate_batch", -1, how)
    whole = run_stage(tiny, "rl-kld", *sets, name="whole")
    assert batches[0] == 2 * 2, "two steps of two batches"
    with monkeypatch.context() as patch, pytest.raises(stopped(how)):
        stop_in_call(patch, PagedEngine, "_generate_batch", 2, how)
        run_stage(tiny, "rl-kld", *sets, name="cut")
    cut = run_stage(tiny, "rl-kld", *sets, name="cut")
    assert batches[0] == 2 * 4, "no batch is sampled twice"
    assert same(trained(whole, "rl-kld"), trained(cut, "rl-kld"))
    with start(tiny, *sets, name="cut") as ctx:
        score = evaluate_stage(ctx, load_task("arithmetic"), "rl-kld")
    assert score["settings"]["engine"] == "paged" and score["n"] == 8
    assert batches[0] == 2 * 4 + 2, "two passes over eight items, two at once"
    assert by_generate[0] == 0


# the sampler's log-probabilities


def told_by_paged(monkeypatch, shift: float) -> None:
    """``paged``, as if it sampled in numerics that are off by ``shift`` nats a token."""
    real = PagedEngine._generate_batch

    def shifted(self, prompts, sampling):
        made = real(self, prompts, sampling)
        return [replace(r, logprobs=r.logprobs and [x + shift for x in r.logprobs]) for r in made]

    monkeypatch.setattr(PagedEngine, "_generate_batch", shifted)


GRPO = ["rl.objective=grpo", "rollout.engine=paged", "rl.responses_per_prompt=2", "rl.baseline=none", "rl.steps=1"]
GRPO += ["rl.scale_rewards=false", "sft.max_steps=1", "rl.eval_every=0", "rl.prompts_per_step=4", "rl.warmup_steps=0"]


@pytest.mark.slow
def test_a_sampler_of_the_trainers_numerics_has_weights_of_one_and_another_is_measured_and_corrected(tiny, monkeypatch):
    """At temperature 0.6 and top-p 0.95, whose nucleus is no mismatch. A token drawn with a quarter of its probability
    counts four times, at most three; one drawn with twice of it counts half, too little for a mask from 0.6."""
    rows = {}
    for name, shift, *sets in (
        ("alike", 0.0, "rl.mismatch=truncate"),
        ("rarer", -math.log(4), "rl.mismatch=truncate"),
        ("likelier", math.log(2), "rl.mismatch=mask", "rl.mismatch_low=0.6"),
        ("uncorrected", math.log(2)),
    ):
        with monkeypatch.context() as patch:
            told_by_paged(patch, shift)
            ctx = run_stage(tiny, "rl-grpo", *GRPO, *sets, name=name)
        rows[name] = read_log(ctx.run.stage("rl-grpo").path / "updates.jsonl")[0]
    plain = rows["uncorrected"]["grad_norm"]
    assert plain > 0 and rows["alike"]["grad_norm"] == pytest.approx(plain, rel=1e-3)
    assert rows["alike"]["mismatch"] < 1e-4 and rows["alike"]["mismatch_kl"] < 1e-6
    assert rows["rarer"]["grad_norm"] == pytest.approx(3 * plain, rel=1e-3)
    assert rows["rarer"]["mismatch"] == pytest.approx(math.log(4), rel=1e-3)
    assert rows["likelier"]["grad_norm"] == 0
    assert rows["likelier"]["mismatch_kl"] == pytest.approx(0.5 - 1 + math.log(2), rel=1e-3)


@pytest.mark.slow
def test_lco_is_told_of_the_mismatch_too(tiny):
    sets = ["rl.steps=1", "rl.eval_every=0", "sft.max_steps=1", "train_rm.check_items=0", "rollout.engine=paged"]
    (row,) = read_log(run_stage(tiny, "rl-kld", *sets).run.stage("rl-kld").metrics)
    assert row["mismatch"] < 1e-4


def test_that_hf_needs_no_correction_is_said(tiny):
    said: list[str] = []
    with start(tiny, *GRPO, "rollout.engine=hf", "rl.mismatch=mask") as ctx:
        ctx.console.note = lambda text, **kw: said.append(text)  # type: ignore[method-assign]
        train(ctx, "rl-grpo")
    assert "rl.mismatch mask: hf samples in the trainer's own numerics, and every weight is 1" in said
    assert "mismatch" not in read_log(ctx.run.stage("rl-grpo").metrics)[0]


def test_responses_that_were_kept_without_log_probabilities_still_load(tiny, tmp_path):
    kept = JsonLines(tmp_path / "step.jsonl")
    lines = [[[5, 6], True], [[7, 3], False, [-0.5, -0.25]]]
    kept.append({"sampled": "rollout:0", "places": [1, 0], "responses": lines, "rng": []})
    with start(tiny) as ctx:
        sampling = Sampling(1.0, 1.0, 4, 2, logprobs=True)
        made = sample(ctx, Engine(), [[1], [2]], sampling, kept, ("rollout", 0), lambda: None)
    assert [r.example for r in made] == [Example([1], [7, 3]), Example([2], [5, 6])]
    assert [r.logprobs for r in made] == [[-0.5, -0.25], None] and [r.truncated for r in made] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cache", "pass"])
def test_where_pages_or_a_pass_run_out_of_memory_smaller_batches_go_on(tiny, tmp_path, monkeypatch, where):
    model = load(save("llama", tmp_path / "m"))
    engine = open_engine([Role(model)], 3, settings=Rollout(engine="paged"))
    real, slots = paged.run, []

    def out_of_memory(**kw):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def run(model, prompts, sampled, at_once, seed, way, **kw):
        slots.append(at_once)
        pages = 2**40 if at_once > 2 and where == "cache" else None
        with monkeypatch.context() as patch:
            if at_once > 2 and where == "pass":
                patch.setattr(model.base, "forward", out_of_memory)
            return real(model, prompts, sampled, at_once, seed, way, pages, **kw)

    monkeypatch.setattr(paged, "run", run)
    with start(tiny) as ctx:
        kept, sampling = JsonLines(tmp_path / "kept.jsonl"), Sampling(1.0, 1.0, 4, 8, logprobs=True)
        made = sample(ctx, engine, [[1 + i] for i in range(10)], sampling, kept, ("rollout", 0), lambda: None)
    assert [r.example.prompt for r in made] == [[1 + i] for i in range(10)] and slots == [8, 4, 2, 2]
    assert all(len(r.logprobs) == len(r.example.response) for r in made)
