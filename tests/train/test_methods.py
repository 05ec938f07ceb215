"""Every objective with every feedback that makes sense goes through the one loop, with its own defaults."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer

from lco_lite.errors import RecipeError, UsageError
from lco_lite.feedback.advantages import mean_reward_to_go
from lco_lite.metrics import read_log
from lco_lite.objectives import policy_gradient as pg
from lco_lite.objectives.head import Head
from lco_lite.objectives.lco import lco_loss
from lco_lite.objectives.targets import DenseTarget, SparseTarget
from lco_lite.recipe import Rl
from lco_lite.recipe.file import dump, load_recipe, parse_yaml, validate
from lco_lite.recipe.rl import DISTILLATION, LCO, METHOD_DEFAULTS, REGRESSIONS, RewardPart
from lco_lite.rollout.engine import Response
from lco_lite.run import differences, stage_settings
from lco_lite.sequences import Example, collate
from lco_lite.tasks.arithmetic import Arithmetic
from lco_lite.train import methods
from lco_lite.train import rl as rl_stage
from lco_lite.train.pipeline import train
from lco_lite.train.rollouts import Phase, Rollouts
from tests.train.test_chain import killed_after, run_stage, same, start, trained

GRADIENTS = tuple(name for name in METHOD_DEFAULTS if name not in LCO + DISTILLATION)
CLIPPED = tuple(name for name in GRADIENTS if name not in ("reinforce", "raft", *REGRESSIONS))


def sets(objective: str, feedback: str) -> list[str]:
    groups = [] if METHOD_DEFAULTS[objective].get("responses_per_prompt", (1,))[0] < 2 else ["rl.prompts_per_step=4"]
    return [f"rl.objective={objective}", f"rl.feedback={feedback}", *groups]


@pytest.mark.parametrize("objective", METHOD_DEFAULTS)
def test_defaults_come_with_the_objective_carry_a_source_and_can_be_overridden(objective):
    defaults = METHOD_DEFAULTS[objective]
    made = Rl.model_validate({"objective": objective})
    assert all(getattr(made, field) == value and source for field, (value, source) in defaults.items())
    assert Rl.model_validate({"objective": objective, "lr": 1e-3}).lr == 1e-3


@pytest.mark.parametrize(
    ("given", "compounds"),
    [
        ({"steps": 4}, True),
        ({"steps": 3}, False),
        ({"steps": 4, "anchor": 0.5}, False),
        ({"steps": 4, "objective": "mse", "feedback": "dpo + rule"}, True),
        ({"steps": 4, "feedback": "rule"}, False),
        ({"steps": 4, "objective": "grpo"}, False),
        ({"steps": 4, "objective": "gkd"}, False),
    ],
)
def test_a_dense_target_that_is_refreshed_often_without_an_anchor_is_told(given, compounds):
    told = rl_stage.compounding(Rl.model_validate(given))
    assert ("in each of 4 steps" in told and "rl.anchor: 0.5" in told) if compounds else told is None


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A run whose sft and reward model every method shares."""
    import yaml

    from tests.conftest import TINY

    file = tmp_path_factory.mktemp("methods") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    run_stage(file, "rm")
    return file


@pytest.mark.parametrize(
    ("objective", "feedback"),
    [(o, f) for o in LCO for f in ("dpo_sampled", "logprob", "rule", "dpo + rule")]
    + [(o, "dpo_sampled") for o in GRADIENTS]
    + [(o, "rule") for o in ("reinforce", "ppo", "rloo", "grpo", "dapo", "gspo", "raft", "tpo")]
    + [(o, f) for o in DISTILLATION for f in ("dpo", "logprob")],
)
def test_every_objective_takes_every_feedback_that_makes_sense(warm, monkeypatch, objective, feedback):
    real = Rollouts.phase

    def some_right(self, step, stop_if_asked):  # what an untrained model never is
        phase = real(self, step, stop_if_asked)
        rules = {"rule": [1.0 if i % 3 else -1.0 for i in range(len(phase.responses))]}
        return replace(phase, rewards={name: rules.get(name, values) for name, values in phase.rewards.items()})

    monkeypatch.setattr(Rollouts, "phase", some_right)
    with start(warm, *sets(objective, feedback)) as ctx:
        train(ctx, f"rl-{objective}", fresh=True)
    rows = read_log(ctx.run.stage(f"rl-{objective}").metrics)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] is not None and row["entropy"] > 0 for row in rows)
    assert ("clipped" in rows[0]) == (objective in CLIPPED or objective == "minillm")
    for row in rows:
        assert row.get("rewards") == ({"rule": row["reward"]} if "+" in feedback else None)


REWARD = "def early(prompts, responses, rows): return [sum(map(ord, r)) / max(1, len(r)) / 100 - 1 for r in responses]"


@pytest.mark.parametrize("objective", ["dr_grpo", "dppo", "raft", *REGRESSIONS])
def test_the_loss_of_the_same_responses_falls(warm, objective):
    """cispo is not among them: its gradient is not that of its loss, whose weights stand still."""
    file = warm.parent / "early.py"
    file.write_text(REWARD)
    group = Rl.model_validate({"objective": objective}).responses_per_prompt
    one = {"steps": 1, "inner_epochs": 12, "lr": 1e-2, "minibatch": 16, "prompts_per_step": 16 // group}
    one |= {"eval_every": 0, "feedback": "function", "reward_function": f"{file}:early"}
    with start(warm, f"rl.objective={objective}", *(f"rl.{key}={value}" for key, value in one.items())) as ctx:
        train(ctx, f"rl-{objective}", fresh=True)
    loss = [row["loss"] for row in read_log(ctx.run.stage(f"rl-{objective}").path / "updates.jsonl")]
    assert len(loss) == 12 and loss[-1] < loss[6] < loss[0]
    assert objective not in REGRESSIONS or loss[-1] >= 0


def test_on_policy_distillation_is_gkds_reverse_kl_on_the_policys_own_responses(warm):
    gkd = ["rl.objective=gkd", "rl.jsd_beta=1", "rl.on_policy=1", "rl.lr=1e-3"]
    both = [(["rl.objective=opd", "rl.lr=1e-3"], "rl-opd"), (gkd, "rl-gkd")]
    opd, gkd = (trained(run_stage(warm, stage, *sets, fresh=True), stage) for sets, stage in both)
    assert same(opd, gkd)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"objective": "grpo", "feedback": "dpo"}, "dpo_sampled, rule"),
        ({"objective": "gkd", "feedback": "rule"}, "follows a teacher"),
        ({"objective": "grpo", "feedback": "dpo + rule"}, "feedback dpo is an advantage over the whole"),
        ({"objective": "gkd", "feedback": "dpo + rule"}, r"follows a teacher.*not dpo \+ rule"),
        (
            {"feedback": "dpo + rul"},
            r"rl\.feedback.*unknown feedback 'rul'; did you mean rule\? Accepted: dpo, logprob",
        ),
        ({"feedback": "dpo + logprob"}, "both advantages over the whole vocabulary"),
        ({"feedback": "dpo_sampled + rule"}, "dpo_sampled stands alone"),
        ({"feedback": "rule + dpo + rule"}, "rule stands twice"),
        ({"feedback": "dpo + function"}, "feedback function and reward_function go together"),
        ({"feedback": "dpo + rule", "baseline": "group"}, "at least 2"),
        ({"feedback": "dpo + rule", "variant.top_k": 5}, r"takes one feedback, not dpo \+ rule"),
        ({"rewards.rule.weight": 4}, r"rewards\.rule is set, and feedback has no rule: dpo \+ rule"),
        ({"feedback": "dpo + rule", "rewards.rule": 4}, r"rl\.rewards\.rule .*should be a mapping"),
        ({"feedback": "dpo + rule", "rewards.rule.wieght": 4}, "did you mean 'rl.rewards.rule.weight'"),
        ({"feedback": "dpo + rule", "rewards.rule.weight": 0}, "greater than 0"),
        ({"objective": "ppo", "rewards.rule.sign": "positive"}, "whose critic learns what is below"),
        (
            {"objective": "ppo", "baseline": "group", "responses_per_prompt": 2},
            "baseline is none for ppo, .* not group",
        ),
        ({"objective": "ppo", "scale_rewards": "true", "responses_per_prompt": 2}, "scale_rewards is false for ppo"),
        (
            {"objective": "reinforce", "feedback": "dpo_sampled", "scale_rewards": "true", "responses_per_prompt": 2},
            "scale_rewards: .*baseline batch of dpo_sampled is that of tokens.*baseline group or leave_one_out",
        ),
        ({"objective": "kld", "scale_rewards": "true"}, "scale_rewards .*feedback dpo has no such reward"),
        ({"objective": "gkd", "scale_rewards": "true"}, "scale_rewards .*feedback dpo has no such reward"),
        ({"objective": "kld", "overlong_buffer": 0.2}, "overlong_buffer .*feedback dpo has no such reward"),
        ({"objective": "minillm", "overlong_buffer": 0.2}, "overlong_buffer .*feedback dpo has no such reward"),
        ({"objective": "kld", "target": "a.py:f", "variant.top_k": 5}, r"variant\.top_k and target both change"),
        (
            {"feedback": "rule", "target": "a.py:f", "variant.negative_beta": 100},
            r"variant\.negative_beta and target both change",
        ),
        (
            {"feedback": "logprob", "target": "a.py:f", "variant.agreement": -0.02},
            r"variant\.agreement and target both change",
        ),
        ({"objective": "kld", "on_policy": 0.5}, "on_policy belongs to gkd"),
        ({"objective": "opd", "on_policy": 0.5}, "on_policy belongs to gkd"),
        ({"objective": "opd", "feedback": "rule"}, "follows a teacher"),
        ({"objective": "opd", "logprob_temperature": 1}, "compares logits"),
        ({"objective": "tpo", "whole_groups": False}, "compares a prompt's responses"),
        ({"objective": "rebel", "responses_per_prompt": 1}, "compares a prompt's responses"),
        ({"objective": "pmd", "anchor": 0.5}, "belong to kld"),
        ({"objective": "gkd", "teacher_mix": 0.5}, "belongs to minillm"),
        ({"objective": "kld", "feedback": "function"}, "go together"),
        ({"objective": "kld", "reward_classifier": "x"}, "go together"),
        ({"objective": "kld", "feedback": "function", "reward_function": "x.txt:f"}, "FILE.py:NAME"),
        (
            {"feedback": "rule + short", "reward_function": "{short: a.py:f}"},
            "unknown feedback 'short'.*`function` stands",
        ),
        (
            {"feedback": "rule", "reward_function": "{short: a.py:f}"},
            "feedback function and reward_function go together",
        ),
        ({"feedback": "function", "reward_function": "{}"}, "has no function in it"),
        ({"feedback": "function", "reward_function": "{short: x.txt:f}"}, "'x.txt:f' is not FILE.py:NAME"),
        ({"feedback": "function", "reward_function": "{rule: a.py:f}"}, "rule is the name of a feedback"),
        ({"feedback": "function", "reward_function": "{function: a.py:f}"}, "function is the name of a feedback"),
        ({"feedback": "function", "reward_function": "{so-so: a.py:f}"}, "'so-so' is no name for a reward"),
        ({"feedback": "function", "reward_function": "{a: a.py:f, a: a.py:g}"}, "'a' stands twice"),
        ({"feedback": "function", "reward_function": "{a: 3}"}, r"rl\.reward_function\.a .*should be text"),
        (
            {"feedback": "function", "reward_function": "{short: a.py:f}", "rewards.shrot.weight": 2},
            r"rewards\.shrot: no reward has this name; did you mean short\?",
        ),
        (
            {"feedback": "function", "reward_function": "{short: a.py:f}", "rewards.function.weight": 2},
            r"rewards\.function: no reward has this name; feedback has short",
        ),
        (
            {"feedback": "function", "reward_function": "{short: a.py:f}", "rewards.short.wieght": 2},
            "did you mean 'rl.rewards.short.weight'",
        ),
        ({"objective": "dapo", "feedback": "dpo_sampled", "dynamic_sampling": True}, "whole responses"),
        ({"objective": "grpo", "variant.top_k": 5}, "variant belongs"),
        ({"objective": "kld", "variant.target": "current"}, "lch and mse"),
        ({"objective": "lch", "variant.negative_beta": 100}, "sparse"),
        ({"objective": "lch", "variant.agreement": -0.02}, "feedback logprob"),
        ({"objective": "lch", "feedback": "rule", "variant.top_k": 5}, "sampled token"),
        ({"objective": "lch", "anchor": 0.5, "variant.top_k": 5}, "no anchor"),
        ({"objective": "grpo", "responses_per_prompt": 1}, "at least 2"),
        ({"objective": "ppo", "anchor": 0.5}, "belong to kld"),
        ({"objective": "kld", "kl_coef": 0.1}, "near another model"),
        ({"objective": "kld", "logprob_temperature": 1}, "compares logits"),
        ({"objective": "grpo", "logprob_temperature": 0}, "greater than 0"),
        ({"objective": "mse", "feedback": "rule", "standardise": True}, "dense"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(tiny, given, reason):
    with pytest.raises(RecipeError, match=reason):
        load_recipe(tiny, [f"rl.{key}={value}" for key, value in given.items()])


def test_what_does_act_is_taken_beside_its_like(tiny):
    """Each of these is one setting away from a combination that is refused."""
    scaled = ["rl.scale_rewards=true", "rl.responses_per_prompt=2"]
    for given in (
        ["rl.feedback=dpo + rule", "rl.overlong_buffer=0.2", *scaled],
        ["rl.feedback=rule", "rl.overlong_buffer=0.2", *scaled],
        ["rl.feedback=dpo_sampled", "rl.overlong_buffer=0.2", "rl.baseline=group", *scaled],
        ["rl.objective=mse", "rl.target=a.py:f", "rl.variant.target=current"],
        ["rl.objective=ppo", "rl.overlong_buffer=0.2"],
    ):
        load_recipe(tiny, given)


def test_defaults_that_could_not_act_give_way(tiny):
    sampled = ["rl.objective=grpo", "rl.feedback=dpo_sampled"]
    assert load_recipe(tiny, sampled).rl.scale_rewards
    assert not load_recipe(tiny, [*sampled, "rl.baseline=batch"]).rl.scale_rewards
    more = (
        "feedback: rule",
        "baseline: group",
        "scale_rewards: true",
        "responses_per_prompt: 2",
        "overlong_buffer: 0.2",
    )
    tiny.write_text(tiny.read_text().replace("\nrl:\n", "\nrl:\n  " + "\n  ".join(more) + "\n"))
    assert load_recipe(tiny).rl.scale_rewards
    for objective, buffer in (("ppo", 0.2), *((name, 0.0) for name in DISTILLATION)):
        rl = load_recipe(tiny, flags={"rl.objective": objective}).rl
        assert (rl.scale_rewards, rl.overlong_buffer) == (False, buffer), objective


def test_rewards_beside_dense_feedback_start_as_measured_and_give_way_with_it(tiny):
    said = []

    def load(*given, **flags):
        said.clear()
        sets = [f"rl.{one}" for one in given]
        return load_recipe(tiny, sets, {f"rl.{name}": value for name, value in flags.items()}, said.append).rl

    assert load(feedback="rule+dpo").feedback == "dpo + rule"
    assert load(feedback="dpo + rule").rewards.rule == RewardPart(weight=4.0, sign="positive")
    assert load("rewards.rule.sign=both", feedback="dpo + rule").rewards.rule == RewardPart(weight=4.0)
    assert load(feedback="rule").rewards.rule == RewardPart()
    tiny.write_text(
        tiny.read_text().replace("rl:\n", "rl:\n  feedback: dpo + rule\n  rewards: {rule: {weight: 2.0}}\n")
    )
    assert load().rewards.rule == RewardPart(weight=2.0, sign="positive")
    assert load(feedback="dpo + rule").rewards == load("objective=mse").rewards == load().rewards and not said
    assert load(feedback="rule").rewards.rule.weight == 1 and "rewards.rule.weight 2.0 → 1.0" in said[0]
    assert load(feedback="dpo").rewards == load(objective="gkd").rewards == load(objective="grpo").rewards
    assert load("rewards.rule.weight=3", feedback="rule").rewards.rule == RewardPart(weight=3.0)


def test_another_objective_on_a_run_brings_its_own_defaults(warm):
    from lco_lite.command import command

    with command(None, warm.parent / "runs", "tiny", [], {"rl.objective": "grpo"}, quiet=True) as ctx:
        assert ctx.recipe.rl.responses_per_prompt == 4 and ctx.recipe.rl.feedback == "rule"
        assert ctx.recipe.rl.steps == 2, "what the recipe set itself stays"
    with command(None, warm.parent / "runs", "tiny", ["rl.lr=1e-4"], {"rl.objective": "grpo"}, quiet=True) as ctx:
        assert ctx.recipe.rl.lr == 1e-4


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        (("both", "both"), [3.5, -3.5, -2, 2]),
        (("positive", "positive"), [3.5, 0, 0, 2]),
        (("positive", "both"), [3.5, -0.5, -2, 2]),
    ],
)
def test_rewards_are_added_up_by_weight_each_on_its_side_of_its_own_baseline(signs, expected):
    """Of two prompts with two responses each."""
    rule, function = [1.0, -1.0, -1.0, -1.0], [3.0, 1.0, 0.0, 8.0]
    phase = Phase([0, 1], 9, [], rule, {"rule": rule, "function": function}, [False] * 4, 4)
    phase.responses.extend([None] * 4)  # type: ignore[list-item]
    rewards = {name: {"weight": w, "sign": s} for name, w, s in zip(phase.rewards, (3, 0.5), signs, strict=True)}
    given = {"feedback": "rule + function", "reward_function": "a.py:f", "rewards": rewards, "baseline": "group"}
    for scaled in (False, True):
        rl = Rl(objective="grpo", responses_per_prompt=2, scale_rewards=scaled, **given)
        advantages = methods.response_advantages(methods.whole_rewards(phase, rl), phase, rl)
        deviation = torch.tensor([3 * 2 + 0.5 * 2, 0.5 * 8]).repeat_interleave(2) / 2**0.5 + 1e-4  # of the sum
        torch.testing.assert_close(advantages, torch.tensor(expected) / (deviation if scaled else 1))
        torch.testing.assert_close(phase.scores(rl), (3 * torch.tensor(rule) + 0.5 * torch.tensor(function)) / 3.5)


NONE_APPLIES = [0.04, 0.67, None, 0.89]  # filled with the mean of the others, that one is 6e-8 above their mean


def phase_of(rewards, lengths=None):
    """Of one prompt, responses of 2 tokens unless ``lengths`` says; at most 4."""
    n = len(next(iter(rewards.values())))
    responses = [Response(Example([1], [2] * length), False) for length in lengths or [2] * n]
    return Phase([0], 4, responses, None, rewards, [False] * n, n)


@pytest.mark.parametrize(
    ("rewards", "given"),
    [
        ({"function": NONE_APPLIES}, {}),
        ({"function": NONE_APPLIES}, {"rewards": {"function": {"sign": "positive", "weight": 3.0}}}),
        ({"function": NONE_APPLIES}, {"scale_rewards": True}),
        ({"function": NONE_APPLIES}, {"baseline": "leave_one_out"}),
        ({"function": NONE_APPLIES}, {"baseline": "batch"}),
        ({"function": NONE_APPLIES}, {"overlong_buffer": 0.5, "lengths": [4] * 4}),
        ({"rule": [1.0] * 4, "function": NONE_APPLIES}, {"rewards": {"function": {"weight": 0.3}}}),
    ],
)
def test_a_response_that_a_reward_does_not_apply_to_has_exactly_none_of_its_advantage(rewards, given):
    """raft imitates whatever is above 0, however little."""
    phase = phase_of(rewards, given.get("lengths"))
    given = {"baseline": "group"} | {name: value for name, value in given.items() if name != "lengths"}
    feedback = {"feedback": " + ".join(rewards), "reward_function": "a.py:f"}
    rl = Rl(objective="raft", responses_per_prompt=4, **feedback, **given)
    advantages = methods.response_advantages(methods.whole_rewards(phase, rl), phase, rl)
    assert advantages[2] == 0 and (advantages[[1, 3]] > 0).all()


def test_a_response_that_no_reward_applies_to_keeps_its_own_penalty():
    phase = phase_of({"function": NONE_APPLIES}, [2, 2, 4, 4])
    given = {"feedback": "function", "reward_function": "a.py:f", "overlong_buffer": 0.5, "baseline": "group"}
    rl = Rl(objective="grpo", scale_rewards=False, **given)
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4])
    advantages = methods.response_advantages(methods.whole_rewards(phase, rl) - kl, phase, rl)
    torch.testing.assert_close(advantages[2], torch.tensor(-1.0 - 0.3 + 0.5 + 0.25))


TWO = (
    "def long(prompts, responses, rows): return [len(r) / 10 for r in responses]\n"
    "def early(prompts, responses, rows): return [sum(map(ord, r)) / max(1, len(r)) / 100 - 1 for r in responses]\n"
    "def both(*asked): return [0.5 * a + 2 * b for a, b in zip(long(*asked), early(*asked))]\n"
)


def test_two_functions_by_weight_train_as_one_that_returns_their_sum_and_have_a_column_each(warm, monkeypatch):
    file = warm.parent / "two.py"
    file.write_text(TWO)
    group = ["rl.objective=dr_grpo", "rl.feedback=function", "rl.prompts_per_step=4", "rl.lr=1e-3"]
    one = trained(run_stage(warm, "rl-dr_grpo", *group, f"rl.reward_function={file}:both", fresh=True), "rl-dr_grpo")
    two = [*group, f"rl.reward_function={{guard: {file}:long, early: {file}:early}}"]
    two += ["rl.rewards={guard: {weight: 0.5}, early: {weight: 2}}"]
    with killed_after(monkeypatch, "rl-dr_grpo", 1):
        run_stage(warm, "rl-dr_grpo", *two, fresh=True)
    ctx = run_stage(warm, "rl-dr_grpo", *two)
    weights = trained(ctx, "rl-dr_grpo")
    assert all(torch.allclose(one[name], weights[name], atol=1e-5) for name in one)
    rows = read_log(ctx.run.stage("rl-dr_grpo").metrics)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row["rewards"]) == {"guard", "early"}
        assert row["reward"] == pytest.approx((0.5 * row["rewards"]["guard"] + 2 * row["rewards"]["early"]) / 2.5)


def test_functions_with_names_start_beside_dense_feedback_as_one_without_and_read_back(tiny):
    sets = ["rl.reward_function={short: a.py:f, copy: a.py:g}", "rl.rewards.copy.sign=both"]
    recipe = load_recipe(tiny, [*sets, "rl.feedback=function + rule + dpo"])
    parts = {name: (part.weight, part.sign) for name, part in recipe.rl.reward_parts.items()}
    assert parts == {"rule": (4, "positive"), "short": (1, "positive"), "copy": (1, "both")}
    assert validate(parse_yaml(dump(recipe))[0], "here") == recipe
    plain = [
        load_recipe(tiny, [*sets[:1], "rl.feedback=function", *more]) for more in ([], ["rl.rewards.copy.weight=1"])
    ]
    assert stage_settings(plain[0], "rl-kld") == stage_settings(plain[1], "rl-kld")
    guard = [load_recipe(tiny, [f"rl.reward_function={{guard: a.py:{f}}}", "rl.feedback=function"]) for f in "gh"]
    changed = differences(*(stage_settings(one, "rl-kld") for one in guard))
    assert changed == ["rl.reward_function.guard: a.py:g → a.py:h"], "whatever settings of that name are"


@pytest.mark.parametrize("sign", ["positive", "both"])
def test_a_mixed_target_has_the_reward_models_advice_and_the_responses_advantage(warm, monkeypatch, sign):
    file = warm.parent / "lengths.py"
    file.write_text("def long(prompts, responses, rows): return [float(len(r)) for r in responses]")
    looked, score = [], methods.score

    def looking(models, phase, plan, rl, *told):
        scored = score(models, phase, plan, rl)
        dense = score(models, replace(phase, rewards={}), plan, rl.model_copy(update={"feedback": "dpo"}))
        reward = torch.tensor(phase.rewards["function"])
        advantage = 0.5 * (reward - reward.mean())
        advantage = advantage.clamp(min=0) if sign == "positive" else advantage
        for micro, plain in zip(sum(scored, []), sum(dense, []), strict=True):
            assert torch.equal(micro.target.shift, plain.target.shift)
            assert torch.equal(micro.target.reference, plain.target.reference) and "reference" not in micro.per_token
            assert torch.equal(micro.target.actions, micro.batch.actions)
            torch.testing.assert_close(micro.target.advantages, advantage[micro.responses])
            torch.testing.assert_close(micro.advantages, plain.advantages + advantage[micro.responses])
            looked.append(advantage.max() > 0)
        return scored

    monkeypatch.setattr(rl_stage, "score", looking)
    sets = ["feedback=dpo + function", f"reward_function={file}:long", "anchor=0.5", "micro_batch_tokens=60"]
    sets += ["rewards.function.weight=0.5", f"rewards.function.sign={sign}"]
    with start(warm, *(f"rl.{one}" for one in sets)) as ctx:
        train(ctx, "rl-kld", fresh=True)
    assert all(looked) and len(looked) > 4, "minibatches in parts"
    for row in read_log(ctx.run.stage("rl-kld").metrics):
        assert row["rewards"] == {"function": row["reward"]} and row["reward"] > 0 <= row["accuracy"]


def test_mixed_feedback_with_a_target_of_ones_own_goes_on_to_the_same_bits(warm, monkeypatch):
    file = warm.parent / "halved.py"
    file.write_text(
        "from dataclasses import replace\n"
        "def long(prompts, responses, rows): return [float(len(r)) for r in responses]\n"
        "def half(target, head, batch): return replace(target, advantages=target.advantages / 2)\n"
    )
    sets = ["rl.feedback=dpo + rule + function", f"rl.reward_function={file}:long", f"rl.target={file}:half"]
    whole = trained(run_stage(warm, "rl-kld", *sets, fresh=True), "rl-kld")
    with killed_after(monkeypatch, "rl-kld", 1):
        run_stage(warm, "rl-kld", *sets, fresh=True)
    cut = run_stage(warm, "rl-kld", *sets)
    assert same(whole, trained(cut, "rl-kld"))
    for row in read_log(cut.run.stage("rl-kld").metrics):
        assert row["reward"] == pytest.approx((4 * row["rewards"]["rule"] + row["rewards"]["function"]) / 5)


@pytest.mark.parametrize(
    ("objective", "given", "expected"),
    [
        ("ppo", {"feedback": "dpo_sampled"}, 0.6),
        ("ppo", {"feedback": "dpo_sampled", "logprob_temperature": 1.0}, 1.0),
        ("rloo", {"feedback": "dpo_sampled", "temperature": 0.0, "baseline": "batch"}, 1.0),
        ("OWN:spy", {"feedback": "dpo_sampled"}, 0.6),
        ("minillm", {}, 0.6),
        ("kld", {"feedback": "rule", "target": "OWN:same"}, 1.0),
    ],
)
def test_policies_are_compared_at_the_temperature_of_the_rollouts_and_rewarded_at_1(
    warm, monkeypatch, objective, given, expected
):
    file = warm.parent / "own.py"
    file.write_text("def spy(batch, clip): raise NotImplementedError\ndef same(target, head, batch): return target")
    looked, ratios = [], []

    def spy(batch, clip):
        ratios.append(batch.log_ratio.detach().abs().max().item())
        return pg.ppo(batch, clip)

    def looking(models, phase, plan, rl, *told):
        scored = score(models, phase, plan, rl)
        for micro in (micro for minibatch in scored for micro in minibatch):
            index = micro.batch.actions.unsqueeze(-1)

            def says(role, t, micro=micro, index=index):
                logits = role.model.head.logits(role.hidden(micro.batch))
                return (logits / t).log_softmax(-1).gather(-1, index).squeeze(-1).detach()

            want = {"old_logprobs": says(models.policy, expected)}
            if rl.kl_coef:
                want["kl"] = want["old_logprobs"] - says(models.start, expected)
            if rl.feedback == "dpo_sampled":
                want["token_rewards"] = says(models.reward_model, 1) - says(models.reference, 1)
            if objective == "minillm":
                policy, teacher = want["old_logprobs"].exp(), says(models.reward_model, expected).exp()
                want["importance"] = policy / (0.2 * teacher + 0.8 * policy)
                gain = says(models.reward_model, 1) - says(models.policy, 1)
                torch.testing.assert_close(micro.advantages, mean_reward_to_go(gain, micro.batch.rows))
            if "OWN" in objective or "target" in given:
                want["reference_logprobs"] = says(models.start, expected)
            for name, value in want.items():
                torch.testing.assert_close(micro.per_token[name], value, rtol=1e-4, atol=1e-5, msg=name)
            looked.append(len(index))
        return scored

    score = methods.score
    monkeypatch.setattr(rl_stage, "score", looking)
    if objective.startswith("OWN"):
        monkeypatch.setattr(methods, "load_function", lambda spec: spy)
    else:
        monkeypatch.setitem(pg.POLICY_GRADIENTS, objective, spy)
    sets = [f"rl.{key}={value}".replace("OWN", str(file)) for key, value in given.items()]
    with start(warm, f"rl.objective={objective.replace('OWN', str(file))}", *sets, "rl.inner_epochs=1") as ctx:
        train(ctx, ctx.recipe.rl.stage, fresh=True)
    assert sum(looked) > 8
    if objective not in ("minillm", "kld"):
        assert ratios[0] < 1e-4, "the policy has not moved yet"


def test_ppo_goes_on_to_the_same_bits_with_its_critic(tiny, monkeypatch):
    flags = sets("ppo", "rule")
    whole = run_stage(tiny, "rl-ppo", *flags, name="whole")
    with killed_after(monkeypatch, "rl-ppo", 1):
        run_stage(tiny, "rl-ppo", *flags, name="cut")
    cut = run_stage(tiny, "rl-ppo", *flags, name="cut")
    assert same(trained(whole, "rl-ppo"), trained(cut, "rl-ppo"))


@pytest.mark.parametrize(
    ("objective", "given"),
    [
        ("kld", {"variant.top_k": 5}),
        ("mse", {"variant.top_k": 5, "variant.target": "current"}),
        ("lch", {"variant.target": "current"}),
        ("lch", {"feedback": "logprob", "variant.agreement": -0.02, "variant.top_k": 5}),
        ("lch", {"feedback": "dpo_sampled", "variant.top_k": 1, "variant.negative_beta": 100}),
        ("kld", {"feedback": "dpo_sampled", "variant.negative_beta": 100}),
    ],
)
def test_the_public_codes_variants_run_and_change_what_is_learnt(warm, objective, given):
    asked = [f"rl.objective={objective}", *(f"rl.{key}={value}" for key, value in given.items())]
    plain = [text for text in asked if "variant" not in text]
    varied, paper = (
        trained(run_stage(warm, f"rl-{objective}", *sets, fresh=True), f"rl-{objective}") for sets in (asked, plain)
    )
    assert not same(varied, paper)


def test_gkd_shows_demonstrations_and_reports_only_the_policys_own_responses(warm):
    for share, sampled in (("0.5", True), ("0", False)):
        with start(warm, "rl.objective=gkd", f"rl.on_policy={share}") as ctx:
            train(ctx, "rl-gkd", fresh=True)
        (row, _) = read_log(ctx.run.stage("rl-gkd").metrics)
        assert ("reward" in row) == sampled and row["response_tokens"] > 0


def test_gkd_refuses_prompts_without_demonstrations(warm, monkeypatch, capsys):
    prompts = warm.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "3+4"}\n')
    with pytest.raises(RecipeError, match=r"those of data\.prompts have none: set rl\.on_policy: 1"):
        load_recipe(warm, ["rl.objective=gkd", "rl.on_policy=0.5", f"data.prompts={prompts}"])
    assert load_recipe(warm, ["rl.objective=gkd", f"data.prompts={prompts}"]).rl.on_policy == 1
    shown = Arithmetic.items
    monkeypatch.setattr(Arithmetic, "items", lambda *a: [replace(i, demonstration=None) for i in shown(*a)])
    with pytest.raises(typer.Exit), start(warm, "rl.objective=gkd") as ctx:
        train(ctx, "rl-gkd", fresh=True)
    assert "has none; set rl.on_policy: 1" in capsys.readouterr().err


def test_a_function_of_the_users_gives_the_rewards(warm):
    file = warm.parent / "rewards.py"
    file.write_text("def short(prompts, responses, rows): return [-float(len(r)) for r in responses]")
    with start(warm, "rl.objective=grpo", "rl.feedback=function", f"rl.reward_function={file}:short") as ctx:
        train(ctx, "rl-grpo", fresh=True)
    rows = read_log(ctx.run.stage("rl-grpo").metrics)
    assert all(row["reward"] < 0 <= row["accuracy"] for row in rows)


def test_a_sequence_classifier_gives_the_rewards(warm):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = warm.parent / "classifier"
    AutoTokenizer.from_pretrained(warm.parent / "runs/tiny/base").save_pretrained(folder)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=260, num_labels=1, **size)).save_pretrained(folder)
    with start(warm, "rl.objective=reinforce", "rl.feedback=reward_model", f"rl.reward_classifier={folder}") as ctx:
        train(ctx, "rl-reinforce", fresh=True)
    assert len({row["reward"] for row in read_log(ctx.run.stage("rl-reinforce").metrics)}) == 2


def test_a_language_model_is_no_sequence_classifier(warm, capsys):
    base = warm.parent / "runs/tiny/base"
    sets = ["rl.objective=reinforce", "rl.feedback=reward_model", f"rl.reward_classifier={base}"]
    with pytest.raises(typer.Exit), start(warm, *sets) as ctx:
        train(ctx, "rl-reinforce", fresh=True)
    assert "is LlamaForCausalLM; a sequence-classification model is needed" in capsys.readouterr().err


def test_feedback_logprob_is_log_phi_with_the_bias_of_its_head():
    torch.manual_seed(0)
    batch = collate([Example([1, 2], [3, 4]), Example([1], [5])], 0)
    head, old, phi = Head(torch.randn(7, 4), 3 * torch.randn(7)), torch.randn(3, 4), torch.randn(3, 4)

    def role(head: Head) -> SimpleNamespace:
        return SimpleNamespace(model=SimpleNamespace(head=head, device=torch.device("cpu")), hidden=lambda b: phi)

    policy = Head(torch.randn(7, 4))
    models = methods.Models(role(policy), None, role(head), None)  # type: ignore[arg-type]
    micro = methods.score_dense(models, methods.MicroBatch(batch, batch.rows, 3, 2, old), Rl(feedback="logprob"))
    a = head.logits(phi).log_softmax(-1)
    sampled = (a - a.mean(-1, keepdim=True)).gather(-1, batch.actions[:, None]).squeeze(-1)
    torch.testing.assert_close(micro.advantages, sampled)
    residual, mean = micro.target.residual(old, policy, None, False)
    torch.testing.assert_close(residual - mean, a - a.mean(-1, keepdim=True))


TARGETS = """
from dataclasses import replace
def fewer(target, head, batch): return target[batch.rewards > 0]
def narrower(target, head, batch): return replace(target, shift=target.shift[:, :2])
def one_more_axis(target, head, batch): return replace(target, shift=target.shift.unsqueeze(1))
def none(target, head, batch): return replace(target, shift=None)
def halved(target, head, batch): return replace(target, shift=target.shift / 2, beta=3.0)
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fewer", "old needs shape [3, 4], as it was given; it gave shape [2, 4]"),
        ("narrower", "shift needs shape [3, 4], as it was given; it gave shape [3, 2]"),
        ("one_more_axis", "shift needs shape [3, 4], as it was given; it gave shape [3, 1, 4]"),
        ("none", "shift needs shape [3, 4], as it was given; it gave None"),
        ("halved", None),
    ],
)
def test_a_target_of_ones_own_keeps_the_shapes_it_was_given(tmp_path, name, told):
    file = tmp_path / "targets.py"
    file.write_text(TARGETS)
    batch = collate([Example([1, 2], [3, 4]), Example([1], [5])], 0)
    head = Head(torch.randn(7, 4))
    model = SimpleNamespace(head=head, device=torch.device("cpu"))
    models = methods.Models(SimpleNamespace(model=model), None, None, None)  # type: ignore[arg-type]
    rewards = {"rewards": torch.tensor([1.0, 1.0, -1.0])}
    micro = methods.MicroBatch(batch, batch.rows, 3, 2, torch.randn(3, 4), per_token=rewards)
    target, rl = DenseTarget(micro.old, 1.0, torch.ones(3, 4), shift_head=head), Rl(target=f"{file}:{name}")
    if told is None:
        assert methods.with_target(models, micro, target, rl).target.shift.unique().item() == 0.5
    else:
        with pytest.raises(UsageError) as caught:
            methods.with_target(models, micro, target, rl)
        assert str(caught.value) == f"rl.target, {file}:{name}: {told}"


@pytest.mark.parametrize("name", ["step", "update", "lr", "grad_norm", "eval", "rewards.rule", "tokens"])
def test_an_objective_of_ones_own_tells_no_number_that_the_log_has_itself(name):
    loss = torch.ones(3, requires_grad=True).sum()
    with pytest.raises(UsageError) as caught:
        methods.users_loss("own.py:f", (loss, {"entropy": torch.ones(3), name: torch.ones(3)}), 3)
    assert f"own.py:f: {name!r} is no number that an objective tells of its tokens; accepted: loss, logprob" in str(
        caught.value
    )


def test_what_our_own_losses_tell_of_tokens_a_users_may_tell_too():
    target, head = SparseTarget(torch.randn(3, 4), 1.0, torch.arange(3), torch.ones(3)), Head(torch.randn(7, 4))
    hidden = torch.randn(3, 4).requires_grad_()
    told = lco_loss("kld", hidden, head, target, actions=target.actions)
    assert "kl_to_old" in methods.users_loss("own.py:f", told, 3)[1]
    logprobs = torch.zeros(3, requires_grad=True)
    batch = pg.PolicyBatch(logprobs, torch.zeros(3), torch.ones(3), torch.zeros(3, dtype=torch.long), 3, 1)
    for objective in pg.POLICY_GRADIENTS.values():
        if objective.__name__ not in ("gspo", "rloo", "rebel", "tpo"):  # of sequences; of several responses
            methods.users_loss("own.py:f", objective(batch, pg.Clip(0.2, 0.2)), 3)


def test_of_a_reward_model_elsewhere_the_states_and_a_copy_of_the_head_come_to_the_policys_device():
    """The policy is on a device without numbers: whatever stayed behind would not go together with it."""
    policy, elsewhere = torch.device("meta"), Head(torch.randn(7, 4), softcap=5.0)
    batch = collate([Example([1, 2], [3, 4]), Example([1], [5])], 0)
    old = torch.zeros(len(batch.actions), 4)  # on the host, as scored micro-batches are

    def role(head: Head) -> SimpleNamespace:
        return SimpleNamespace(
            model=SimpleNamespace(head=head, device=head.weight.device), hidden=lambda b: torch.randn(len(b.actions), 4)
        )

    phi = role(elsewhere)
    models = methods.Models(role(Head(torch.zeros(7, 4, device=policy))), None, phi, phi)
    fresh = methods.MicroBatch(batch, batch.rows, 3, 2, old)
    scored = [methods.score_dense(models, fresh, Rl()).to("cpu") for _ in range(2)]
    for micro in (micro.to(policy) for micro in scored):
        target = micro.target
        places = (micro.old, target.shift, target.shift_base, target.shift_head.weight, micro.advantages)
        assert all(tensor.device == policy for tensor in places)
    assert scored[0].target.shift_head is scored[1].target.shift_head, "one copy"
    assert elsewhere.weight.device.type == "cpu"
