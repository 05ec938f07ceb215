"""Malformed input ends in one message that names file and field, at once: nothing is built, looked up or repaired."""

from __future__ import annotations

import json
import time

import pytest

from lco_lite.command import _base_and_adapter
from lco_lite.data.rows import read_demonstrations
from lco_lite.errors import DataError, ModelError, RecipeError, UsageError
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import LanguageModel
from lco_lite.models.loading import byte_tokenizer, load_base, load_config, load_tokenizer
from lco_lite.recipe import Model
from lco_lite.recipe.file import load_recipe
from lco_lite.recipe.sections import Lora
from lco_lite.run import Run
from lco_lite.tables import load_rows
from lco_lite.user_code import bounded
from tests.models.families import save

BOMB = "a: &a {" + ", ".join(f"k{i}: 1" for i in range(9)) + "}\n"
BOMB += "".join(
    f"{b}: &{b} {{{', '.join(f'k{i}: *{a}' for i in range(9))}}}\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
RECIPES = {
    "an empty tagged number": ('seed: !!int ""', "line 1: the tag !!int"),
    "a tagged float": ("seed: 0\nrl:\n  lr: !!float x", "line 3: the tag !!float"),
    "a tagged bool": ("seed: !!bool maybe", "the tag !!bool"),
    "a tagged time": ("seed: !!timestamp x", "the tag !!timestamp"),
    "a tagged mapping": ("rl: !!map [a]", "the tag !!map"),
    "a tag of one's own": ("rl: !python/object:os.system {}", "the tag !python/object:os.system"),
    "a bomb of mappings": (BOMB, "more than 10,000 values"),
    "a bomb of merges": (BOMB.replace("{k0: *", "{<<: [*a, *a], k0: *"), "more than 10,000 values"),
    "many unknown keys": ("\n".join(f"key{i}: 1" for i in range(4000)), "4001 problems"),
    "too many keys": ("\n".join(f"key{i}: 1" for i in range(20000)), "more than 10,000 values"),
    "a number without end": ("seed: " + "9" * 4400, "line 1: a whole number of 4400 digits"),
    "a number of 65 bits": (f"model: {{init: {{}}}}\nrl: {{steps: {2**64}}}", "steps is of more than 64 bits"),
    "half a surrogate pair": ('task: "\\ud800"', "line 1: text with the character U+D800"),
    "NUL in a path": ('task: arithmetic\nmodel:\n  path: "a\\0b"', "line 3: text with the character U+0000"),
    "NUL in a key": ('"a\\0b": 1', "line 1: text with the character U+0000"),
    "a beta of 1": ("rl:\n  adam_betas: [1.0, 0.9]", "rl.adam_betas"),
    "a negative beta": ("sft:\n  adam_betas: [0.9, -0.1]", "sft.adam_betas"),
    "layers without end": ("model:\n  init: {layers: 100000}", "model.init.layers"),
    "an odd head": ("model:\n  init: {hidden_size: 12, heads: 4}", "is odd"),
}


@pytest.mark.parametrize("text, told", RECIPES.values(), ids=RECIPES)
def test_a_malformed_recipe_is_one_message_at_once(tmp_path, text, told):
    (tmp_path / "r.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(RecipeError) as e:
        load_recipe(tmp_path / "r.yaml")
    assert told in str(e.value) and str(e.value).startswith(str(tmp_path / "r.yaml"))
    assert len(str(e.value)) < 5000 and time.process_time() - began < 3


def test_aliases_that_stand_for_little_are_taken(tmp_path):
    (tmp_path / "r.yaml").write_text("task: arithmetic\nmodel: {init: {}}\nsft: &o {lr: 1e-4}\ntrain_rm:\n  <<: *o\n")
    assert load_recipe(tmp_path / "r.yaml").train_rm.lr == 1e-4


@pytest.mark.parametrize("name", ["x" * 300, "", "../up", "a\0b", "-x", "a b"])
def test_a_name_of_a_run_is_a_short_plain_one(tmp_path, name):
    with pytest.raises(UsageError, match="is no name for a run"):
        Run.open(tmp_path, name)


@pytest.mark.parametrize("name", ["rows.txt", "rows.pkl", "rows.arrow", "rows.jsonl.gz", "./none", "none.TXT"])
def test_a_local_file_of_another_kind_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name.startswith("rows"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"of a kind that is not read|no such file"):
        load_rows(name)


ROWS = {
    "a role that is a list": ({"messages": [{"role": ["user"], "content": "x"}]}, "role: user"),
    "a role that is a mapping": ({"messages": [{"role": {}, "content": "x"}]}, "role: user"),
    "content that is a list": ({"messages": [{"role": "user", "content": ["x"]}]}, "content: text"),
    "turns that are numbers": ({"messages": [1, 2]}, "role: user"),
}


@pytest.mark.parametrize("row, told", ROWS.values(), ids=ROWS)
def test_a_malformed_row_is_named_by_its_line(tmp_path, row, told):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError, match="line 2") as e:
        read_demonstrations(str(tmp_path / "d.jsonl"))
    assert told in str(e.value)


@pytest.mark.parametrize(
    "line, told", [('{"prompt": "\\ud800"}', "half of a surrogate pair"), ('{"n": ' + "9" * 5000 + "}", "digits")]
)
def test_what_json_takes_and_no_text_or_number_is(tmp_path, line, told):
    (tmp_path / "d.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2.*" + told):
        load_rows(str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"base_model_name_or_path": [1]}', "[" * 100000])
def test_an_adapter_config_that_is_none(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UsageError, match="adapter_config.json"):
        _base_and_adapter(str(tmp_path))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "llama"
    return save("llama", folder)


CONFIGS = {
    "layers without end": ({"num_hidden_layers": 100_000}, "num_hidden_layers"),
    "a negative width": ({"hidden_size": -8}, "hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "cannot be loaded"),
    "an odd head": ({"head_dim": 7}, "head_dim.*7"),
}


@pytest.mark.parametrize("changed, told", CONFIGS.values(), ids=CONFIGS)
def test_a_config_of_shapes_that_no_model_has(llama, tmp_path, changed, told):
    config = json.loads((llama / "config.json").read_text()) | changed
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(ModelError, match=told):
        load_config(Model(path=str(folder)))
    assert time.process_time() - began < 3


def test_files_that_are_too_large_to_be_what_they_are_called(tmp_path):
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate(4 * 2**30)  # sparse
    with pytest.raises(ModelError, match=r"chat_template.jinja: has 4,096 MiB"):
        load_tokenizer(Model(path=str(tmp_path)))


def test_a_chat_template_that_loops_is_stopped(monkeypatch):
    monkeypatch.setattr("lco_lite.models.chat.TEMPLATE_SECONDS", 0.2)
    tokenizer = byte_tokenizer(64)
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match=r"takes over 0.2 s"):
        ChatFormat(tokenizer)


ADAPTERS = {
    "of another kind": ({"peft_type": "IA3"}, "peft_type LORA is needed, found 'IA3'"),
    "of no kind": ({"peft_type": [1]}, "peft_type LORA is needed"),
    "with a pattern without end": ({"target_modules": "(a|aa|[a-z._]+)+$!"}, "takes over"),
    "with a broken pattern": ({"target_modules": "("}, "damaged"),
}


@pytest.mark.parametrize("changed, told", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_is_none_of_ours(llama, tmp_path, monkeypatch, changed, told):
    monkeypatch.setattr("lco_lite.models.language_model.PATTERN_SECONDS", 0.3)
    import torch

    settings = Model(path=str(llama))
    model = LanguageModel(load_base(settings, torch.device("cpu")), load_tokenizer(settings))
    model.add_adapter("a", Lora(r=2), 0)
    model.save_adapter("a", tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ModelError) as e:
        model.load_adapter("b", tmp_path / "a")
    assert told in str(e.value) and str(file) in str(e.value)


def test_a_deadline_leaves_no_alarm_behind():
    with bounded(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TimeoutError), bounded(0.05):
        while True:
            pass
