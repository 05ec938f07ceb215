import pytest

from lco_lite.data.check import recipe_sources
from lco_lite.data.prompts import demonstrations, recipe_task, rl_prompts, sft_examples
from lco_lite.errors import DataError, RecipeError, UsageError
from lco_lite.models.chat import ChatFormat
from lco_lite.models.loading import open_tokenizer
from lco_lite.recipe.file import load_recipe
from lco_lite.run import stage_settings
from lco_lite.tasks.arithmetic import arithmetic
from lco_lite.tasks.custom import custom


def recipe_of(tmp_path, *sets, task="arithmetic"):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"task: {task}\nmodel: {{init: {{}}}}\nsft: {{examples: 50}}\n")
    return load_recipe(path, list(sets))


def asked(recipe):
    return [(d.messages[-1]["content"], d.response) for d in demonstrations(recipe, recipe_task(recipe))]


MIXED = "sft.more_tasks=[subtraction]"


def test_as_many_demonstrations_of_the_other_task_are_mixed_in_and_its_own_stay_as_they_are(tmp_path):
    own, mixed = asked(recipe_of(tmp_path)), asked(recipe_of(tmp_path, MIXED))
    assert mixed[:50] == own and len(mixed) == 100
    assert mixed[50:] == asked(recipe_of(tmp_path, task="subtraction"))
    for prompt, response in mixed[50:]:
        a, b = map(int, prompt.split("-"))
        assert response.endswith(f" #{a - b}")


def test_which_demonstrations_are_mixed_in_depends_on_the_seed_alone(tmp_path):
    one, again, other = (asked(recipe_of(tmp_path, MIXED, f"seed={seed}"))[50:] for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_all_of_both_tasks_are_mixed_where_examples_is_null(tmp_path):
    assert len(asked(recipe_of(tmp_path, MIXED, "sft.examples=null"))) == 5_000 + 3_095


def test_rl_and_pairs_see_nothing_of_the_other_task(tmp_path):
    own, mixed = (recipe_of(tmp_path, *sets) for sets in ((), (MIXED,)))
    assert rl_prompts(mixed, recipe_task(mixed)) == rl_prompts(own, recipe_task(own))


def test_sft_trains_on_the_tokens_of_both_tasks(tmp_path):
    recipe = recipe_of(tmp_path, MIXED)
    chat = ChatFormat(open_tokenizer(recipe.model, recipe.seed), {}, print)
    assert len(sft_examples(recipe, recipe_task(recipe), chat)) == 100


def test_other_tasks_are_mixed_with_a_file_too(tmp_path):
    file = tmp_path / "shown.jsonl"
    file.write_text('{"prompt": "1+1", "response": "2"}\n')
    made = asked(recipe_of(tmp_path, MIXED, f"data.demonstrations={file}"))
    assert made[0] == ("1+1", "2") and len(made) == 51
    recipe = recipe_of(tmp_path, MIXED, f"data.demonstrations={file}")
    assert len(recipe_sources(recipe, recipe_task(recipe))[0].samples) == 51


def test_the_data_report_counts_them_and_names_their_task(tmp_path):
    recipe = recipe_of(tmp_path, MIXED)
    source = recipe_sources(recipe, recipe_task(recipe))[0]
    assert len(source.samples) == 100
    assert source.name == "training items of arithmetic, subtraction"


@pytest.mark.parametrize("names", ["[arithmetic]", "[subtraction, subtraction]"])
def test_a_task_that_is_there_already_is_refused(tmp_path, names):
    with pytest.raises(RecipeError, match="sft.more_tasks.*is there already"):
        recipe_of(tmp_path, f"sft.more_tasks={names}")


def test_an_unknown_task_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UsageError, match="did you mean subtraction"):
        asked(recipe_of(tmp_path, "sft.more_tasks=[substraction]"))


def test_a_task_without_demonstrations_is_refused_by_the_field(tmp_path, monkeypatch):
    (tmp_path / "qa.jsonl").write_text('{"prompt": "q", "answer": "a", "split": "train"}\n')
    opened = custom(tmp_path / "qa.jsonl")
    monkeypatch.setattr("lco_lite.data.prompts.load_task", lambda name, *given: opened)
    recipe = recipe_of(tmp_path, "sft.more_tasks=[custom]")
    with pytest.raises(DataError, match=r"sft.more_tasks: task custom has no demonstrations"):
        demonstrations(recipe, arithmetic())


def test_a_run_that_mixed_nothing_goes_on_as_before(tmp_path):
    assert "sft.more_tasks" not in str(stage_settings(recipe_of(tmp_path), "sft"))
    assert "sft.more_tasks" in str(stage_settings(recipe_of(tmp_path, MIXED), "sft"))
