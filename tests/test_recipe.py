import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from lco_lite.errors import DataError, RecipeError
from lco_lite.recipe import UNGRADED, Recipe, Section
from lco_lite.recipe.file import dump, dump_short, find_recipe, load_recipe, override, parse_yaml, validate, write_yaml
from lco_lite.recipe.rl import LCO, METHOD_DEFAULTS
from lco_lite.run import Run
from lco_lite.tables import load_rows
from lco_lite.tasks import load_task, task_names

ROOT = Path(__file__).parent.parent
SMALL = "task: arithmetic\nmodel: {init: {}}\n"


def load(tmp_path: Path, text: str = "", sets=None, flags=None) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL + text, encoding="utf-8")
    return load_recipe(path, sets, flags)


def problems(tmp_path: Path, text: str = "", sets=None, flags=None) -> list[str]:
    """The lines of the one error, without its heading and indentation."""
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, sets, flags)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def all_sections(model: type[BaseModel] = Section) -> list[type[BaseModel]]:
    return [m for sub in model.__subclasses__() for m in (sub, *all_sections(sub))]


# --- the settings themselves


@pytest.mark.parametrize("section", all_sections(), ids=lambda s: s.__name__)
def test_every_setting_says_what_it_is_and_where_its_default_comes_from(section):
    for name, field in section.model_fields.items():
        if field.is_required():
            continue  # a setting without a default has none to justify
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict) and field.json_schema_extra["source"], name


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid_and_bears_its_file_name(path):
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("name", ["math", "ultrafeedback"])
def test_the_papers_recipes_cut_nothing_that_the_paper_lets_run(name):
    """Its sequences have 2,048 tokens, prompt and response together."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.rl.max_new_tokens == recipe.eval.max_new_tokens == 2048
    assert recipe.rl.max_length >= 2048 + 1024, "with room for the prompt"
    if recipe.data.preferences == "sampled":
        assert recipe.train_rm.max_length == recipe.rl.max_length, "pairs are sampled at the same length"


@pytest.mark.parametrize("name", ["math", "ultrafeedback", "qa_feedback"])
def test_the_papers_recipes_offer_its_base_models_in_a_line_that_works(name):
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "--set model.path=Qwen/Qwen2.5-3B " in line)
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", line.replace("--set", "").split()[1:])
    assert (recipe.model.path, recipe.reward_model.path) == ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7B")
    assert "Instruct" in load_recipe(ROOT / "recipes" / f"{name}.yaml").model.path


@pytest.mark.parametrize("name", ["smollm2_arithmetic", "gemma3"])
def test_recipes_of_real_models_for_one_core_give_every_method_the_same_samples_and_hold_500_items_out(name):
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = load_recipe(path)
    assert (recipe.device, recipe.threads, recipe.model.dtype) == ("cpu", 1, "float32")
    assert recipe.eval.items is not None and recipe.eval.items >= 500
    samples = recipe.rl.prompts_per_step * recipe.rl.responses_per_prompt
    for objective in ("grpo", "raft", "gkd"):
        rl = load_recipe(path, flags={"rl.objective": objective}).rl
        prompts, left = divmod(samples, rl.responses_per_prompt)
        assert not left and prompts * rl.responses_per_prompt % rl.minibatch == 0, objective


# --- another objective than the recipe's


def shipped_recipes():
    return sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("objective", METHOD_DEFAULTS)
@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_every_objective_works_on_every_shipped_recipe_with_its_own_defaults(path, objective):
    written, said = load_recipe(path), []
    made = load_recipe(path, flags={"rl.objective": objective}, say=said.append)
    expected = {field: value for field, (value, _) in METHOD_DEFAULTS[objective].items()}
    if "lr" in expected:
        expected["lr"] = pytest.approx(10 * expected["lr"])  # all of them train adapters
    if objective not in LCO:
        expected["anchor"] = 0.0
    if written.task in UNGRADED and expected.get("feedback") == "rule":
        expected |= {"feedback": "dpo_sampled", "dynamic_sampling": False}
    if written.data.prompts and "on_policy" in expected:
        expected["on_policy"] = 1.0
    assert {field: getattr(made.rl, field) for field in expected} == expected
    changed = {field for field, value in made.rl if value != getattr(written.rl, field)}
    assert changed <= {*expected, "objective"}, "what the objective has no default of stays"
    if objective == "kld":
        assert made == written and not said
    named = [line.split(" → ")[0].split()[0] for line in said[0].split(": ")[1].split(", ")] if said else []
    text = parse_yaml(path.read_text(encoding="utf-8"))[0]["rl"]
    assert sorted(named) == sorted(field for field in text if field in expected and text[field] != expected[field])


def test_what_is_set_beside_a_new_objective_wins_and_is_not_said_to_give_way(tmp_path):
    text, said = "rl: {lr: 5e-6, responses_per_prompt: 1, feedback: dpo, steps: 9}\n", []
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL + text)
    rl = load_recipe(path, ["rl.objective=grpo", "rl.lr=1e-4"], {"rl.feedback": "dpo_sampled"}, said.append).rl
    assert (rl.lr, rl.responses_per_prompt, rl.feedback, rl.steps) == (1e-4, 4, "dpo_sampled", 9)
    assert said == ["grpo brings its own defaults in place of the recipe's, unless set: responses_per_prompt 1 → 4"]


def test_values_that_were_written_for_a_policy_gradient_give_way_to_lco_too(tmp_path):
    text = "rl: {objective: rloo, lr: 2e-6, kl_coef: 0.1, responses_per_prompt: 8, minibatch: 8}\n"
    assert load(tmp_path, text).rl.kl_coef == 0.1
    rl = load(tmp_path, text, flags={"rl.objective": "kld"}).rl
    assert (rl.lr, rl.kl_coef, rl.responses_per_prompt, rl.feedback) == (5e-5, 0.0, 1, "dpo")
    assert rl.minibatch == 8
    assert load(tmp_path, text, flags={"rl.objective": "rloo"}).rl.lr == 2e-6, "the same objective is no other"


def test_a_reward_with_a_source_of_its_own_does_not_give_way(tmp_path):
    text = "rl: {feedback: function, reward_function: mine.py:score, lr: 5e-6}\n"
    rl = load(tmp_path, text, flags={"rl.objective": "grpo"}).rl
    assert (rl.feedback, rl.lr) == ("function", 1e-5)


# --- learning rates that are not set

PRETRAINED = "task: arithmetic\nmodel: {path: x%s}\nreward_model: %s\n"


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        (PRETRAINED % ("", "self"), (2e-4, 1e-5, 5e-5)),
        (PRETRAINED % (", lora: {r: 4}", "self"), (2e-4, 1e-5, 5e-5)),
        (PRETRAINED % (", lora: null", "self"), (2e-5, 1e-6, 5e-6)),
        (PRETRAINED % (", lora: null", "{path: y}"), (2e-5, 1e-5, 5e-6)),
        (SMALL, (2e-5, 1e-5, 5e-5)),
        (SMALL + "rl: {objective: ppo}\n", (2e-5, 1e-5, 3e-5)),
        (SMALL + "rl: {objective: 'mine.py:loss'}\n", (2e-5, 1e-5, 5e-5)),
        (SMALL + "rl: {objective: gkd, lr: 2e-5}\nsft: {lr: 1e-3}\ntrain_rm: {lr: 1e-6}\n", (1e-3, 1e-6, 2e-5)),
    ],
)
def test_a_rate_that_is_not_set_is_that_of_what_the_stage_trains_and_stands_in_the_resolved_recipe(text, rates):
    recipe = validate(parse_yaml(text)[0], "here")
    assert (recipe.sft.lr, recipe.train_rm.lr, recipe.rl.lr) == rates
    assert validate(parse_yaml(dump(recipe))[0], "here") == recipe
    older = recipe.model_dump(mode="json")  # a run of version 0.4 holds its rates
    older["sft"]["lr"], older["train_rm"]["lr"], older["rl"]["lr"] = 2e-5, 1e-6, 5e-6
    kept = validate(older, "here")
    assert (kept.sft.lr, kept.train_rm.lr, kept.rl.lr) == (2e-5, 1e-6, 5e-6)


@pytest.mark.parametrize(
    ("sets", "rates", "told"),
    [
        (
            ["model.lora=null"],
            (2e-5, 1e-6, 5e-6),
            "sft.lr 0.0002 → 2e-05, train_rm.lr 1e-05 → 1e-06, rl.lr 5e-05 → 5e-06",
        ),
        (
            ["model.lora=null", "reward_model={path: y}"],
            (2e-5, 1e-5, 5e-6),
            "sft.lr 0.0002 → 2e-05, rl.lr 5e-05 → 5e-06",
        ),
        (["model.lora=null", "sft.lr=3e-4", "rl={steps: 3}"], (3e-4, 1e-6, 5e-6), "train_rm.lr 1e-05 → 1e-06"),
        (["model.lora=null", "rl.objective=grpo", "sft.lr=1", "train_rm.lr=1"], (1, 1, 1e-6), None),
        (["model.lora.r=4", "reward_model={path: y}"], (2e-4, 1e-5, 5e-5), None),
    ],
)
def test_rates_that_were_written_for_an_adapter_give_way_where_all_weights_are_trained_and_the_other_way(
    tmp_path, sets, rates, told
):
    """A run's own recipe has every default written out; the recipe file that it came from has none."""
    path, said = tmp_path / "recipe.yaml", list[str]()

    def read(text, sets):
        path.write_text(text)
        said.clear()
        recipe = load_recipe(path, sets, say=said.append)
        return recipe, (recipe.sft.lr, recipe.train_rm.lr, recipe.rl.lr)

    short = PRETRAINED % ("", "self")
    whole = dump(read(short, [])[0])
    assert read(short, sets)[1] == rates
    now = read(whole, sets)[1]
    brought = [text for text in said if "what is trained brings its own default rates" in text]
    assert now == rates and [text.rpartition("set: ")[2] for text in brought] == ([told] if told else [])
    full = dump(read(short, ["model.lora=null"])[0])
    assert read(full, ["model.lora={}"])[1] == (2e-4, 1e-5, 5e-5)
    tuned = whole.replace("lr: 0.0002", "lr: 0.0003")
    assert read(tuned, ["model.lora=null"])[1] == (3e-4, 1e-6, 5e-6), "a rate of the user's own stays"


def test_the_rates_of_a_section_that_is_wrong_hide_no_problem(tmp_path):
    assert problems(tmp_path, "sft:\nrl: 3\n") == [
        "sft (line 3): is empty: give it a value, or delete the line",
        "rl (line 4): should be a mapping of settings, found 3",
    ]


def test_the_note_of_another_objective_names_the_rate_that_an_adapter_gets(tmp_path):
    path, said = tmp_path / "recipe.yaml", []
    path.write_text(SMALL + "rl: {lr: 3e-3, anchor: 0.5, steps: 9}\n")
    load_recipe(path, flags={"rl.objective": "grpo"}, say=said.append)
    assert "lr 0.003 → 1e-05" in said[0] and "anchor 0.5 → 0.0" in said[0]
    said.clear()
    assert load_recipe(path, flags={"rl.objective": "mse"}, say=said.append).rl.anchor == 0.5 and not said


def test_shipped_recipes_that_refresh_more_than_three_times_have_an_anchor():
    for path in shipped_recipes():
        assert (rl := load_recipe(path).rl).steps <= 3 or rl.anchor == 0.5, path.stem


def test_where_no_rule_can_grade_a_policy_gradient_starts_from_the_reward_model(tmp_path):
    text = "task: alpaca_eval\nmodel: {path: x}\ndata: {preferences: pairs.jsonl}\nrl: {objective: dapo}\n"
    recipe = validate(parse_yaml(text)[0], "here")
    assert recipe.rl.feedback == "dpo_sampled" and recipe.stages == ["sft", "rm", "rl-dapo"]
    with pytest.raises(RecipeError, match="rule needs a task that grades"):
        validate(parse_yaml(text.replace("dapo}", "dapo, feedback: rule}"))[0], "here")


def test_reading_recipes_does_not_import_torch():
    code = "import sys, lco_lite.recipe, lco_lite.recipe.file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# --- problems


def test_an_unknown_key_is_refused_with_the_nearest_one_and_its_line(tmp_path):
    assert problems(tmp_path, "rl:\n  betta: 1\n") == ["rl.betta (line 4): unknown key; did you mean 'rl.beta'?"]
    assert problems(tmp_path, "RL: {}\n") == ["RL (line 3): unknown key; here it is rl"]


def test_an_unknown_key_that_is_like_none_is_told_what_is_accepted(tmp_path):
    assert problems(tmp_path, "chat: {xyz: 1}\n") == ["chat.xyz (line 3): unknown key; accepted: system, template_args"]


def test_all_problems_are_reported_at_once_each_with_line_key_and_value(tmp_path):
    text = "seed: x\nrl:\n  objective: kdl\n  beta: -1\n  steps: 1.5\nsft:\n  lerning_rate: 1\ndata: [1]\n"
    assert sorted(problems(tmp_path, text)) == [
        "data (line 10): should be a mapping of settings, found [1]",
        "rl.beta (line 6): should be greater than or equal to 0.000001, found -1",
        "rl.objective (line 5): unknown objective 'kdl'; did you mean kld? Accepted: "
        + f"{', '.join(METHOD_DEFAULTS)}, or FILE.py:NAME",
        "rl.steps (line 7): should be a whole number, found 1.5",
        "seed (line 3): should be a whole number, found 'x'",
        "sft.lerning_rate (line 9): unknown key; accepted: "
        + ", ".join(Recipe.model_fields["sft"].annotation.model_fields),
    ]


def test_the_heading_names_the_file_and_counts_the_problems(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml: 2 problems in the recipe\n") as caught:
        load(tmp_path, "seed: x\nthreads: y\n")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("reward_model: {pth: x}", "reward_model.pth (line 3): unknown key; did you mean 'reward_model.path'?"),
        ("reward_model: slef", "reward_model (line 3): should be 'self' or a mapping of settings, found 'slef'"),
        (
            "reward_model: {}",
            "reward_model (line 3): "
            "needs path (hub id or folder); write `reward_model: self` to share the policy's base",
        ),
        (
            "reward_model: {path: x, lora: {targets: all}}",
            "reward_model.lora.targets (line 3): should be 'all-linear' or a list, found 'all'",
        ),
        (
            "reward_model: {path: x, lora: {targets: [1]}}",
            "reward_model.lora.targets.0 (line 3): should be text, found 1",
        ),
        (
            "reward_model: {path: x, lora: {rank: 3, r: 0}}",
            "reward_model.lora.r (line 3): should be greater than or equal to 1, found 0",
        ),
    ],
)
def test_of_a_value_that_may_be_several_things_only_the_branch_that_is_meant_complains(tmp_path, text, problem):
    found = problems(tmp_path, text + "\n")
    assert problem in found and not any("literal" in line or "RewardModel" in line for line in found)
    assert len(found) == (2 if "rank" in text else 1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: true", "seed (line 3): should be a whole number, found True"),
        ("threads: false", "threads (line 3): should be a whole number, found False"),
        ("rl: {beta: true}", "rl.beta (line 3): should be a number, found True"),
        ("rl: {rewards: {rule: {weight: true}}}", "rl.rewards.rule.weight (line 3): should be a number, found True"),
        (
            "sft: {adam_betas: [0.9, true]}",
            "sft.adam_betas (line 3): numbers are needed, and true and false are none, found [0.9, True]",
        ),
    ],
)
def test_true_is_no_number(tmp_path, text, problem):
    assert problem in problems(tmp_path, text + "\n")


def test_settings_that_may_be_true_still_may(tmp_path):
    made = load(tmp_path, "chat: {template_args: {enable_thinking: true}}\nsft: {enabled: true}\n")
    assert made.chat.template_args == {"enable_thinking": True} and made.sft.enabled


def test_an_empty_section_is_told_from_a_wrong_one(tmp_path):
    assert problems(tmp_path, "rl:\n") == ["rl (line 3): is empty: give it a value, or delete the line"]


def test_checks_across_sections_point_to_their_keys(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {path: x}\ndata:\n  demonstrations: null\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "  data.demonstrations (line 3): needed where task is null" in str(caught.value)
    assert "  data.prompts (line 2): needed where task is null" in str(caught.value)


@pytest.mark.parametrize("task", UNGRADED)
def test_without_right_and_wrong_there_is_no_rule_and_no_sampled_pair(tmp_path, task):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"task: {task}\nmodel: {{path: x}}\n")
    with pytest.raises(RecipeError, match="data.preferences.*grades no response right or wrong.*file or hub set"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="rl.feedback.*grades no response right or wrong"):
        load_recipe(path, ["rl.objective=grpo"])
    assert load_recipe(path, ["data.preferences=pairs.jsonl"]).data.preferences == "pairs.jsonl"


def test_tasks_without_right_and_wrong_are_those_that_make_their_own_metrics():
    of_a_users_own = {"custom"}  # has a grader by construction, and needs a file
    names = set(task_names()) - of_a_users_own
    assert {name for name in names if not load_task(name).graded} == set(UNGRADED)


def test_a_long_value_is_shown_in_part(tmp_path):
    (line,) = problems(tmp_path, f"seed: {'x' * 500}\n")
    assert len(line) < 150


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "line 4: the key 'seed' stands twice"),
        ("rl: {beta: 1, beta: 2}\n", "line 3: the key 'beta' stands twice"),
        ("rl:\n  settings: {a: [{b: 1, b: 2}]}\n", "line 4: the key 'b' stands twice"),
        ("rl: [\n", "line 4: "),
        ("\tseed: 1\n", "line 3: "),
        ("sft: &x {enabled: *x}\n", "nested without end"),
        ("? [1, 2]\n: 3\n", "line 3: "),
    ],
)
def test_what_is_not_yaml_is_said_with_its_line(tmp_path, text, message):
    with pytest.raises(RecipeError, match="not valid YAML") as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(("content", "found"), [(b"", "nothing"), (b"- a\n", "a list"), (b"text", "a str")])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, content, found):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=f"a mapping of settings, found {found}"):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.yaml: no such recipe file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "latin.yaml")


def test_files_that_lie_beside_the_recipe_and_not_in_the_working_folder_are_told_with_what_to_type(
    tmp_path, monkeypatch
):
    (tmp_path / "sub").mkdir()
    text = "data: {prompts: p.jsonl}\nrl: {feedback: function, reward_function: {a: 'r.py:f'}}\n"
    for name in ("p.jsonl", "r.py"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "recipe.yaml").write_text(SMALL + text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("../recipe.yaml"))
    assert str(caught.value).splitlines() == [
        f"../recipe.yaml: files are found from the working folder, {tmp_path / 'sub'}",
        "  data.prompts: p.jsonl is not there; it lies beside the recipe: `cd ..` first, or -s data.prompts=../p.jsonl",
        "  rl.reward_function.a: r.py is not there; it lies beside the recipe: `cd ..` first, or "
        "-s rl.reward_function.a=../r.py:f",
    ]
    assert load_recipe(Path("../recipe.yaml"), ["data.prompts=../p.jsonl", "rl.reward_function.a=../r.py:f"])
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("recipe.yaml"))
    with pytest.raises(DataError, match=f"absent.jsonl: no such file in {tmp_path}"):
        load_rows("absent.jsonl")


@pytest.mark.parametrize("typed", ["tinny.yaml", "tinny"])
def test_a_recipe_file_that_is_nearly_named_is_offered(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(SMALL)
    with pytest.raises(RecipeError, match="did you mean 'tiny.yaml'"):
        load_recipe(find_recipe(typed))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_what_differs_from_the_defaults_is_short_and_reads_back_to_the_same_recipe(path):
    recipe = load_recipe(path)
    text = dump_short(recipe)
    assert validate(parse_yaml(text)[0], "short") == recipe
    assert len(text.splitlines()) < len(dump(recipe).splitlines()) / 2 and "null" not in text.replace("lora: null", "")


def test_a_byte_order_mark_is_no_part_of_the_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(SMALL, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "r.yaml").task == "arithmetic"


# --- code of the user's own


def test_an_objective_of_ones_own_may_be_a_policy_gradient_or_one_over_the_vocabulary(tmp_path):
    own = "rl.objective=mine.py:loss"
    assert load(tmp_path, sets=[own]).rl.feedback == "rule"
    assert load(tmp_path, sets=[own, "rl.kl_coef=0.1"]).rl.is_policy_gradient
    for feedback in ("dpo", "logprob"):
        dense = load(tmp_path, sets=[own, f"rl.feedback={feedback}"]).rl
        assert dense.is_own and dense.is_dense and not dense.is_policy_gradient
    assert "feedback dpo is an advantage over the whole vocabulary" in str(
        problems(tmp_path, sets=["rl.objective=grpo", "rl.feedback=dpo"])
    )


def test_settings_reach_an_objective_or_a_target_of_ones_own_as_they_were_written(tmp_path):
    text = "rl: {objective: mine.py:loss, settings: {clip: 1e-3, guard: {deep: [no, 2]}}}\n"
    assert load(tmp_path, text).rl.settings == {"clip": 1e-3, "guard": {"deep": ["no", 2]}}
    assert load(tmp_path, sets=["rl.target=mine.py:sharper", "rl.settings.power=2"]).rl.settings == {"power": 2}
    (problem,) = problems(tmp_path, sets=["rl.settings.power=2"])
    assert "settings are for an objective or target of your own (FILE.py:NAME): kld takes none" in problem


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (["rl.target=mine.txt:sharper"], "target 'mine.txt:sharper' is not FILE.py:NAME"),
        (["rl.objective=grpo", "rl.target=mine.py:sharper"], "target belongs to kld, lch and mse, not to grpo"),
        (
            ["rl.responses_per_prompt=3", "rl.whole_groups=true"],
            "whole_groups: minibatch 64 is not a multiple of responses_per_prompt 3",
        ),
    ],
)
def test_a_target_is_for_lco_and_whole_groups_need_minibatches_that_hold_them(tmp_path, sets, reason):
    (problem,) = problems(tmp_path, sets=sets)
    assert reason in problem
    assert load(tmp_path, sets=["rl.responses_per_prompt=4", "rl.whole_groups=true", "rl.target=mine.py:sharper"])


# --- YAML as one expects it


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-5", ".00001", "0.00001", "1_0e-6"])
def test_a_number_is_a_number_in_a_file_and_behind_set(tmp_path, text):
    assert parse_yaml(text)[0] == pytest.approx(1e-5) and isinstance(parse_yaml(text)[0], float)
    assert load(tmp_path, f"rl: {{lr: {text}}}\n").rl.lr == pytest.approx(1e-5)
    assert load(tmp_path, sets=[f"rl.lr={text}"]).rl.lr == pytest.approx(1e-5)


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "y", "2026-01-31", "e5", "1.2.3"])
def test_words_and_dates_stay_text(tmp_path, text):
    assert parse_yaml(f"a: {text}")[0] == {"a": text}
    assert load(tmp_path, f"chat: {{system: {text}}}\n").chat.system == text
    assert load(tmp_path, sets=[f"chat.system={text}"]).chat.system == text


def test_true_false_and_null_are_what_they_say():
    assert parse_yaml("[true, False, null, ~]")[0] == [True, False, None, None]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=8,
)


@given(
    values | st.sampled_from(["1e-5", "1e5", "no", "null", "~", "0x1f", "1:30", "2026-01-31", ".5", "1_000", "=", "<<"])
)
def test_what_is_written_reads_back_to_the_same_value(value):
    again = parse_yaml(write_yaml({"value": value}))[0]
    assert again == {"value": value} and repr(again) == repr({"value": value})


def test_a_resolved_recipe_reads_back_with_every_default_written_out(tmp_path):
    recipe = load(
        tmp_path,
        "name: 1e5x\nreward_model: {path: a/b, lora: {targets: [q_proj]}}\nrl: {lr: 1e-6}\nsft: {max_steps: 3}\n",
    )
    text = dump(recipe)
    (tmp_path / "resolved.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert dump(load_recipe(tmp_path / "resolved.yaml")) == text
    for name in Recipe.model_fields:
        assert f"\n{name}:" in f"\n{text}"
    assert "max_grad_norm: 1.0" in text


@pytest.mark.parametrize("name", ["1e5", "123", "2026-01-31", "true", "1_0"])
def test_a_name_that_looks_like_something_else_survives_the_round_trip(tmp_path, name):
    recipe = load(tmp_path, flags={"name": name})
    (tmp_path / "resolved.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "resolved.yaml").name == name


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (r"{problem} in \boxed{}", r"'\x08' before 'oxed': in double quotes YAML reads \b as an escape"),
        (r"{problem}: \frac{1}{2}", r"'\x0c' before 'rac': in double quotes YAML reads \f"),
        (r"{problem} as \text{x}", r"'\t' before 'ext': in double quotes YAML reads \t"),
        (r"{problem} \times 2", r"'\t' before 'imes'"),
        (r"{problem} \right)", r"'\r' before 'ight'"),
        (r"{problem} \alpha", r"'\x07' before 'lpha'"),
        (r"{problem} \vec x", r"'\x0b' before 'ec'"),
        (r"{problem} \neq 3", r"'\n' before 'eq'"),
        (r"{problem} \Nabla", r"'\x85' before 'abla'"),
    ],
)
def test_latex_that_yaml_read_as_an_escape_is_refused_with_the_way_to_write_it(tmp_path, written, told):
    command = re.search(r"\\[a-zA-Z]+", written)[0]
    (problem,) = problems(tmp_path, f'eval:\n  template: "{written}"\n')
    assert problem.startswith("eval (line 3): template has the character") and told in problem
    assert problem.endswith(f"Write the text in single quotes, or \\{command}")
    for section, key in (("eval", "system"), ("chat", "system")):
        (problem,) = problems(tmp_path, sets=[f'{section}.{key}="{written}"'])
        assert told in problem and f"{key} has the character" in problem
    for quoted in (f"'{written}'", f'"{written}"'.replace("\\", "\\\\")):
        assert load(tmp_path, f"eval:\n  template: {quoted}\n").eval.template == written


def test_newlines_and_tabs_that_are_meant_are_kept(tmp_path):
    assert load(tmp_path, 'eval: {template: "\\tQ: {problem}\\n\\nequal?\\r\\nA:"}\n').eval.template == (
        "\tQ: {problem}\n\nequal?\r\nA:"
    )


def test_only_policy_gradients_are_corrected_for_another_sampler(tmp_path):
    for objective, why in (("kld", "its responses only supply states"), ("minillm", "has a weight of its own")):
        (line,) = problems(tmp_path, sets=[f"rl.objective={objective}", "rl.mismatch=truncate"])
        assert why in line
    assert load(tmp_path, sets=["rl.objective=grpo", "rl.mismatch=mask"]).rl.mismatch_cap == 3


def test_an_engine_that_is_not_there_is_told_which_are(tmp_path):
    (line,) = problems(tmp_path, "rollout:\n  engine: sglang\n")
    assert line.endswith("should be 'auto', 'hf', 'paged' or 'vllm', found 'sglang'") and line.startswith(
        "rollout.engine (line"
    )


def test_a_stop_string_has_letters(tmp_path):
    assert load(tmp_path, sets=['eval.stop=["\\n\\n", "Q:"]']).eval.stop == ["\n\n", "Q:"]
    assert "eval.stop.0" in problems(tmp_path, sets=['eval.stop=[""]'])[0]


# --- overriding


def test_set_overrides_the_file_and_a_flag_overrides_both(tmp_path):
    text = "rl: {beta: 1.0, lr: 1e-6, steps: 3}\n"
    recipe = load(tmp_path, text, sets=["rl.beta=2", "rl.lr=2e-6"], flags={"rl.beta": 3.0, "rl.steps": None})
    assert (recipe.rl.beta, recipe.rl.lr, recipe.rl.steps) == (3.0, 2e-6, 3)


def test_the_last_set_of_a_key_counts(tmp_path):
    assert load(tmp_path, sets=["seed=1", "seed=2"]).seed == 2


def test_set_reaches_into_sections_that_the_file_does_not_have(tmp_path):
    recipe = load(tmp_path, sets=["reward_model.path=a/b", "reward_model.lora.r=8", "eval.tasks=[gsm8k, math500]"])
    assert recipe.reward_model.lora.r == 8 and recipe.eval.tasks == ["gsm8k", "math500"]


def test_overriding_leaves_the_data_it_was_given_alone():
    data = {"rl": {"beta": 1}}
    override(data, ["rl.beta=2"], {"rl.lr": 1.0})
    assert data == {"rl": {"beta": 1}}


def test_a_problem_names_the_override_it_comes_from_and_not_the_line_of_the_file(tmp_path):
    text = "rl: {beta: 1, lr: 1e-6}\n"
    assert problems(tmp_path, text, sets=["rl.beta=x"], flags={"rl.lr": -1.0, "sft.lrr": 3}) == [
        "sft.lrr (flag): unknown key; did you mean 'sft.lr'?",
        "rl.lr (flag): should be greater than 0, found -1.0",
        "rl.beta (--set): should be a number, found 'x'",
    ]


@pytest.mark.parametrize(
    ("item", "message"),
    [("rl.lr", "write --set key.path=value"), ("=3", "write --set key.path=value"), ("rl.lr=[1", "not valid YAML")],
)
def test_a_malformed_set_says_how_to_write_it(tmp_path, item, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load(tmp_path, sets=[item])
    assert f"--set {item}" in str(caught.value)


def test_problems_of_a_recipe_that_came_from_no_file_have_no_lines():
    with pytest.raises(RecipeError) as caught:
        validate({"model": {"path": "x"}, "task": "math", "sed": 1}, "given")
    assert str(caught.value) == "given: 1 problem in the recipe\n  sed: unknown key; did you mean 'seed'?"


@pytest.mark.parametrize(
    "rl",
    [
        {"objective": "grpo", "feedback": "dpo_sampled", "baseline": "batch", "scale_rewards": True},
        {"objective": "kld", "scale_rewards": True},
        {"objective": "kld", "overlong_buffer": 0.2},
        {"objective": "ppo", "feedback": "rule", "baseline": "batch"},
        {"objective": "kld", "target": "f.py:g", "variant": {"agreement": -0.02}, "feedback": "logprob"},
    ],
)
def test_settings_that_do_nothing_are_refused_and_pass_in_a_run_that_an_earlier_version_began(tmp_path, rl):
    text = yaml.safe_dump({"name": "r", "task": "arithmetic", "model": {"path": "x"}, "rl": rl})
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "recipe.yaml")
    recipe = Run(tmp_path).recipe()
    assert all(getattr(recipe.rl, name) is not None for name in rl)
    kept = Run(tmp_path / "again")
    kept.path.mkdir()
    kept.write_recipe(recipe)
    assert kept.recipe() == recipe
