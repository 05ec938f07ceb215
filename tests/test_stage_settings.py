import pytest

from lco_lite.errors import UsageError
from lco_lite.recipe import Recipe
from lco_lite.run import differences, stage_settings

BASE = {"model": {"path": "some/model"}, "task": "math"}


def changed_stages(**changes) -> set[str]:
    """The stages whose settings are not those of BASE."""
    base, changed = Recipe.model_validate(BASE), Recipe.model_validate({**BASE, **changes})
    return {s for s in ("sft", "rm", "rl-kld") if stage_settings(base, s) != stage_settings(changed, s)}


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"task": "gsm8k"},
        {"model": {"path": "another/model"}},
        {"model": {"path": "some/model", "quantization": "nf4"}},
        {"model": {"path": "some/model", "lora": {"r": 8}}},
        {"model": {"path": "some/model", "lora": None}},
        {"chat": {"system": "Be brief."}},
        {"data": {"demonstrations": "x.jsonl"}},
        {"data": {"columns": {"demonstrations": {"prompt": "q"}}}},
        {"data": {"task": "x.jsonl"}},
        {"sft": {"lr": 1e-4}},
    ],
)
def test_what_decides_sft_decides_everything_after_it(changes):
    assert changed_stages(**changes) == {"sft", "rm", "rl-kld"}


@pytest.mark.parametrize(
    "changes",
    [
        {"reward_model": {"path": "big/model"}},
        {"data": {"preferences": "pairs.jsonl"}},
        {"data": {"columns": {"preferences": {"chosen": "best"}}}},
        {"train_rm": {"temperature": 0.8}},
        {"rollout": {"engine": "paged"}},
    ],
)
def test_what_decides_the_reward_model_leaves_sft_alone(changes):
    assert changed_stages(**changes) == {"rm", "rl-kld"}


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"prompts": "x.jsonl"}},
        {"data": {"columns": {"prompts": {"prompt": "q"}}}},
        {"rl": {"beta": 2.0}},
        {"rl": {"steps": 9}},
        {"rl": {"target": "mine.py:sharper"}},
        {"rl": {"target": "mine.py:sharper", "settings": {"guard": 1}}},
        {"rl": {"whole_groups": True}},
    ],
)
def test_what_decides_rl_leaves_the_stages_before_alone(changes):
    assert changed_stages(**changes) == {"rl-kld"}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"device": "cpu"},
        {"threads": 2},
        {"model": {"path": "some/model", "gradient_checkpointing": True, "attention": "eager"}},
        {"sft": {"micro_batch_tokens": 64, "save_every": 3}},
        {"train_rm": {"micro_batch_tokens": 64, "check_items": 0}},
        {"rl": {"rollout_batch": 2, "save_every": 3, "eval_every": 0, "eval_items": 2, "guard": "off"}},
        {"data": {"allow_overlap": ["math500"]}},
        {"eval": {"seeds": 1, "tasks": ["gsm8k"]}},
    ],
)
def test_what_does_not_decide_the_result_may_change_between_two_starts(changes):
    assert changed_stages(**changes) == set()


def test_rl_on_a_rule_does_not_depend_on_a_reward_model():
    rule = {"rl": {"feedback": "rule"}}
    a = stage_settings(Recipe.model_validate({**BASE, **rule}), "rl-kld")
    b = stage_settings(Recipe.model_validate({**BASE, **rule, "train_rm": {"lr": 1e-4}}), "rl-kld")
    assert a == b


def test_the_engine_decides_nothing_of_a_reward_model_that_samples_nothing():
    pairs = {"data": {"preferences": "pairs.jsonl"}}
    both = [Recipe.model_validate({**BASE, **pairs, "rollout": {"engine": engine}}) for engine in ("auto", "paged")]
    assert stage_settings(both[0], "rm") == stage_settings(both[1], "rm")
    assert differences(*(stage_settings(one, "rl-kld") for one in both)) == ["rollout.engine: unset → paged"]


def test_settings_of_ones_own_count_under_any_name():
    own = [{"rl": {"objective": "mine.py:loss", "settings": {"guard": n}}} for n in (1, 2)]
    before, after = (stage_settings(Recipe.model_validate({**BASE, **rl}), "rl-loss") for rl in own)
    assert differences(before, after) == ["rl.settings.guard: 1 → 2"]


def test_a_setting_that_older_recipes_did_not_have_counts_once_it_is_set():
    names = set(stage_settings(Recipe.model_validate(BASE), "rl-kld"))
    assert not names & {"rl.settings", "rl.target", "rl.whole_groups", "rollout.engine"}
    assert not any(name.startswith("rl.rewards") for name in names)
    mixed = [Recipe.model_validate({**BASE, "rl": {"feedback": f}}) for f in ("dpo", "dpo + rule")]
    assert differences(*(stage_settings(one, "rl-kld") for one in mixed)) == [
        "rl.feedback: dpo → dpo + rule",
        "rl.rewards.rule.weight: unset → 4.0",
        "rl.rewards.rule.sign: unset → positive",
    ]


@pytest.mark.parametrize(
    ("rl", "counts"),
    [
        ({"objective": "kld"}, False),
        ({"objective": "gkd"}, False),
        ({"objective": "grpo", "temperature": 1.0}, False),
        ({"objective": "grpo", "logprob_temperature": 1.0}, False),
        ({"objective": "grpo"}, True),
        ({"objective": "minillm"}, True),
    ],
)
def test_older_runs_go_on_but_for_policy_gradients_that_would_go_on_at_another_temperature(rl, counts):
    """Version 0.1 had log-probabilities at 1 and no such field."""
    settings = stage_settings(Recipe.model_validate({**BASE, "rl": rl}), f"rl-{rl['objective']}")
    assert ("rl.logprob_temperature" in settings) == counts


def test_an_unknown_stage_is_refused():
    with pytest.raises(UsageError, match="no stage 'rlhf'"):
        stage_settings(Recipe.model_validate(BASE), "rlhf")


def test_differences_name_each_key_with_both_values_also_where_one_is_absent():
    before = {"a": 1.0, "b": "self", "c": None}
    after = {"a": 0.5, "b.path": "x", "c": None}
    assert differences(before, after) == ["a: 1.0 → 0.5", "b: self → unset", "b.path: unset → x"]


@pytest.mark.parametrize("feedback", ["logprob", "logprob + rule"])
def test_with_the_log_probabilities_of_a_model_as_feedback_that_model_counts(feedback):
    rl = {"rl": {"feedback": feedback}}
    before, after = (
        stage_settings(Recipe.model_validate({**BASE, **rl, "reward_model": {"path": path}}), "rl-kld")
        for path in ("small", "large")
    )
    assert differences(before, after) == ["reward_model.path: small → large"]
