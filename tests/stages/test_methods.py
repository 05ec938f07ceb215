"""Every objective with every feedback that makes sense goes through the one loop, with its own defaults."""

from __future__ import annotations

import pytest

from lco_lite.errors import RecipeError
from lco_lite.method_defaults import METHOD_DEFAULTS
from lco_lite.recipe import Rl
from lco_lite.recipe_file import load_recipe
from lco_lite.stages.pipeline import train
from lco_lite.telemetry.metrics import read_log
from tests.stages.test_chain import run_stage, same, start, trained

LCO = ("kld", "lch", "mse")
GRADIENTS = tuple(name for name in METHOD_DEFAULTS if name not in LCO)


def sets(objective: str, feedback: str) -> list[str]:
    groups = [] if METHOD_DEFAULTS[objective].get("responses_per_prompt", (1,))[0] < 2 else ["rl.prompts_per_step=4"]
    return [f"rl.objective={objective}", f"rl.feedback={feedback}", *groups]


@pytest.mark.parametrize("objective", METHOD_DEFAULTS)
def test_defaults_come_with_the_objective_carry_a_source_and_can_be_overridden(objective):
    defaults = METHOD_DEFAULTS[objective]
    made = Rl.model_validate({"objective": objective})
    assert all(getattr(made, field) == value and source for field, (value, source) in defaults.items())
    assert Rl.model_validate({"objective": objective, "lr": 1e-3}).lr == 1e-3


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
    [(o, f) for o in LCO for f in ("dpo_sampled", "logprob", "rule")]
    + [(o, f) for o in GRADIENTS for f in ("dpo_sampled", "rule")],
)
def test_every_objective_takes_every_feedback_that_makes_sense(warm, objective, feedback):
    with start(warm, *sets(objective, feedback)) as ctx:
        train(ctx, f"rl-{objective}", fresh=True)
    rows = read_log(ctx.run.stage(f"rl-{objective}").metrics)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] is not None and row["entropy"] > 0 for row in rows)
    if objective not in LCO and objective != "reinforce":
        assert "clipped" in rows[0]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"objective": "grpo", "feedback": "dpo"}, "dpo_sampled or rule"),
        ({"objective": "grpo", "responses_per_prompt": 1}, "at least 2"),
        ({"objective": "ppo", "anchor": 0.5}, "belong to kld"),
        ({"objective": "kld", "kl_coef": 0.1}, "KL regulariser"),
        ({"objective": "mse", "feedback": "rule", "standardise": True}, "dense"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(tiny, given, reason):
    with pytest.raises(RecipeError, match=reason):
        load_recipe(tiny, [f"rl.{key}={value}" for key, value in given.items()])


def test_another_objective_on_a_run_brings_its_own_defaults(warm):
    from lco_lite.command import command

    with command(None, warm.parent / "runs", "tiny", [], {"rl.objective": "grpo"}, quiet=True) as ctx:
        assert ctx.recipe.rl.responses_per_prompt == 4 and ctx.recipe.rl.feedback == "rule"
        assert ctx.recipe.rl.steps == 2, "what the recipe set itself stays"
    with command(None, warm.parent / "runs", "tiny", ["rl.lr=1e-4"], {"rl.objective": "grpo"}, quiet=True) as ctx:
        assert ctx.recipe.rl.lr == 1e-4


def test_ppo_goes_on_to_the_same_bits_with_its_critic(tiny, monkeypatch):
    from lco_lite.stages.training import Progress

    flags = sets("ppo", "rule")
    whole = run_stage(tiny, "rl-ppo", *flags, name="whole")

    class Killed(BaseException):
        pass

    def die_after_one(self: Progress, step: int, every: int) -> None:
        self.save(step)
        if self.stage.name == "rl-ppo":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "checkpoint", die_after_one)
        with pytest.raises(Killed):
            run_stage(tiny, "rl-ppo", *flags, name="cut")
    cut = run_stage(tiny, "rl-ppo", *flags, name="cut")
    assert same(trained(whole, "rl-ppo"), trained(cut, "rl-ppo"))
