"""Malformed input ends in one message that names file and field, at once: nothing is built, looked up or repaired."""

from __future__ import annotations

import json
import logging
import os
import time

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.command import _base_and_adapter
from lco_lite.data.rows import read_demonstrations, read_prompts
from lco_lite.errors import DataError, ModelError, RecipeError, UsageError
from lco_lite.judging.classifiers import classifier_config
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import LanguageModel, adapted_layers
from lco_lite.models.loading import (
    build_scratch,
    byte_tokenizer,
    load_base,
    load_config,
    load_tokenizer,
    tried_tokenizer,
)
from lco_lite.recipe import Model
from lco_lite.recipe.file import load_recipe
from lco_lite.recipe.sections import Init, Lora, PromptColumns
from lco_lite.run import Run
from lco_lite.tables import load_rows
from lco_lite.tasks import load_task
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
    "a number of 65 bits": (f"model: {{init: {{}}}}\nrl: {{steps: {2**64}}}", "steps is at most 10,000,000"),
    "a phase without end": (
        "model: {init: {}}\nrl: {prompts_per_step: 2000000}",
        "prompts_per_step × responses_per_prompt is 2,000,000",
    ),
    "a model from scratch that fills no memory": (
        "model: {init: {hidden_size: 8192, intermediate_size: 9000000}}",
        "a model from scratch has at most 2.1e+09",
    ),
    "weights beyond float32": ("model:\n  init: {std: 1e308}", "model.init.std (line 2): should be less than"),
    "threads without end": ("threads: 100000000000000", "threads (line 1): should be less than or equal to 1024"),
    "a name that no folder has": ("name: " + "x" * 300, "name (line 1): string should match pattern"),
    "a size beyond any machine": (f"memory_limit: {'9' * 400}GiB", "is no size: write a number with its unit"),
    "a size under a byte": ("memory_limit: 0.0000001KiB", "is no size"),
    "a timeout without end": ("rl: {reward_timeout: 1e308}", "rl.reward_timeout (line 1): should be less than"),
    "a temperature that is not quite 0": ("rl: {temperature: 1e-320}", "rl.temperature (line 1): a temperature is 0"),
    "a temperature without end": ("eval: {temperature: 1e300}", "eval.temperature (line 1): a temperature is 0"),
    "a beta that is not quite 0": ("rl: {beta: 1e-300}", "rl.beta (line 1): should be greater"),
    "no targets": ("model: {path: x, lora: {targets: []}}", "model.lora.targets"),
    "a target without a name": ("model: {path: x, lora: {targets: ['']}}", "model.lora.targets"),
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
@pytest.mark.parametrize("open_run", [Run.open, Run.named])
def test_a_name_of_a_run_is_a_short_plain_one(tmp_path, name, open_run):
    with pytest.raises(UsageError, match="is no name for a run"):
        open_run(tmp_path, name)


def test_dry_run_refuses_the_name_that_the_run_does(tiny, tmp_path):
    told = CliRunner().invoke(app, ["run", str(tiny), "--dry-run", "--name", "x" * 300, "--runs", str(tmp_path)])
    assert told.exit_code == 2 and "is no name for a run" in told.stderr


@pytest.mark.parametrize("name", ["rows.txt", "rows.pkl", "rows.arrow", "rows.jsonl.gz", "./none", "none.TXT"])
def test_a_local_file_of_another_kind_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name.startswith("rows"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"of a kind that is not read|no such file"):
        load_rows(name)


@pytest.mark.parametrize("source", ["here", "here:train", "json", "pandas:train", "text"])
def test_what_datasets_would_read_here_is_no_hub_set(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for file in ("here/a.jsonl", "a.json", "a.pkl", "a.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"is a folder; name a file|is the name of a kind of file"):
        load_rows(source)


@pytest.mark.parametrize("name", ["wide.csv", "wide.parquet"])
def test_a_table_of_very_many_columns_is_refused_at_once(tmp_path, name):
    columns = {f"c{i}": [1] for i in range(20_000)}
    if name.endswith("csv"):
        (tmp_path / name).write_text(",".join(columns) + "\n" + ",".join("1" for _ in columns) + "\n")
    else:
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
    with pytest.raises(DataError, match="has 20,000 columns; at most 1,000"):
        load_rows(str(tmp_path / name))


def test_a_broken_table_is_one_message_and_no_library_speaks_of_it(tmp_path):
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    datasets.logging.set_verbosity_warning()
    logging.getLogger("datasets").addHandler(handler)
    for name, content in (("a\x1b[2Jb.parquet", b"PAR1xxxxxxxx"), ("a.csv", bytes(range(256))), ("b.parquet", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be loaded|line 1: has byte|line 2: has byte"):
            load_rows(str(tmp_path / name))
    logging.getLogger("datasets").removeHandler(handler)
    assert not said


@pytest.mark.parametrize("row", [{f"c{i}": i for i in range(20_000)}, {"k" * 100_000: 1}], ids=["many", "long"])
def test_a_message_names_neither_very_many_columns_nor_a_very_long_one_whole(tmp_path, row):
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    file = str(tmp_path / "d.jsonl")
    reads = [
        lambda: read_demonstrations(file),
        lambda: read_prompts(file),
        lambda: read_prompts(file, columns=PromptColumns(prompt="no")),
        lambda: load_task("custom", file).items("test"),
        lambda: load_task("gsm8k", file).items("test"),
    ]
    for read in reads:
        with pytest.raises(DataError, match="found ") as e:
            read()
        assert len(str(e.value)) < 3000


def test_a_source_without_end_is_not_repeated_whole(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda **given: 1 / 0)
    with pytest.raises(DataError, match="cannot be loaded as a hub set") as e:
        load_rows("x" * 5000)
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize("answer", [10**400, 2.5, -3, 1e308])
def test_an_answer_may_be_any_number(tmp_path, answer):
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a", "answer": answer}) + "\n")
    task = load_task("custom", tmp_path / "d.jsonl")
    (item,) = task.items("test")
    assert task.grade(f"The answer is {item.gold}.", item).right


@pytest.mark.parametrize("folder", ["n" * 5000, "n" * 300, "\udcff"])
def test_a_folder_of_data_that_no_file_system_names_is_one_message(monkeypatch, folder):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: 1 / 0)
    monkeypatch.setenv("LCO_LITE_DATA", folder)
    for name in ("gsm8k", "qa_feedback"):
        with pytest.raises(DataError) as e:
            load_task(name).items("test")
        assert len(str(e.value)) < 1000


def test_a_hub_set_of_a_benchmark_is_not_read_from_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LCO_LITE_DATA", raising=False)
    (tmp_path / "HuggingFaceH4" / "MATH-500").mkdir(parents=True)
    with pytest.raises(DataError, match="HuggingFaceH4/MATH-500: is a folder"):
        load_task("math500").items("test")


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


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_that_names_a_kernel_of_others_runs_nothing(llama, tmp_path, key):
    config = json.loads((llama / "config.json").read_text())
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "some-one/flash-attn@main"}))
    for load in (load_config, lambda weights: load_base(weights, torch.device("cpu"))):
        with pytest.raises(ModelError, match=r"config\.json: attn_implementation 'some-one/flash-attn@main' is code"):
            load(Model(path=str(tmp_path)))
    with pytest.raises(ModelError, match="is code of others"):
        classifier_config(str(tmp_path), ("sequence",))
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "eager"}))
    assert load_config(Model(path=str(tmp_path)))._attn_implementation == "eager"


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


def _bpe(vocab, merges):
    return {"type": "BPE", "vocab": vocab, "merges": merges}


_TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
TOKENIZERS = {
    "two tokens of one id": {"model": _bpe({"a": 0, "b": 0}, ["a b"])},
    "nothing in its vocabulary": {"model": _bpe({}, [])},
    "Unigram without a vocabulary": {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
    "WordLevel without its UNK": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "z"}},
    "a broken map of characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a pattern of nothing": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "bbbbbbbb"},
    },
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a template of nothing": {"post_processor": _TEMPLATE | {"single": []}},
    "a template with an unknown token": {
        "post_processor": _TEMPLATE | {"single": [{"SpecialToken": {"id": "no", "type_id": 0}}]}
    },
    "a decoder that goes out of bounds": {
        "decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 10**9},
    },
}


@pytest.mark.parametrize("changed", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_loads_and_does_not_work_is_one_message_and_no_panic(tmp_path, capfd, changed):
    byte_tokenizer(64).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ModelError, match="this tokenizer cannot be loaded"):
        load_tokenizer(Model(path=str(tmp_path)))
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"model_max_length": "x"}, "model_max_length: a number of tokens is needed, found 'x'"),
        ({"model_max_length": []}, "model_max_length"),
        ({"model_max_length": -1}, "model_max_length"),
        ({"tokenizer_class": "BertTokenizer"}, "cannot be loaded"),
        ({"pad_token": None, "eos_token": None}, None),
    ],
)
def test_what_a_tokenizer_says_of_itself(tmp_path, changed, told):
    byte_tokenizer(64).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    if told is None:  # tokens that are made for padding are found by their names
        assert load_tokenizer(Model(path=str(tmp_path))).pad_token == "<|pad|>"
        return
    with pytest.raises(ModelError) as e:
        load_tokenizer(Model(path=str(tmp_path)))
    assert told in str(e.value)


def test_what_is_said_while_a_tokenizer_loads_is_kept(tmp_path, capfd):
    def load():
        os.write(2, b"a warning\n")
        return byte_tokenizer(64)

    tried_tokenizer("x", load)
    assert capfd.readouterr().err == "a warning\n"
    with pytest.raises(KeyboardInterrupt):
        tried_tokenizer("x", lambda: (_ for _ in ()).throw(KeyboardInterrupt))


@pytest.mark.parametrize("targets", [["mlp"], ["lm_head"], ["proj"], ["q_proj", "nope"], ["embed_tokens"]])
def test_a_target_is_a_linear_layer_of_the_decoder_by_its_whole_name(targets):
    linear = {"model.layers.0.attn.q_proj": True, "model.layers.0.mlp.up_proj": True, "lm_head": False}
    linear |= {"vision.mlp.up_proj": False}
    with pytest.raises(ModelError, match="no linear layer named"):
        adapted_layers(linear, Lora(targets=targets))
    assert adapted_layers(linear, Lora(targets=["mlp.up_proj"])) == (["mlp.up_proj"], ["vision.mlp.up_proj"])


def test_a_model_from_scratch_that_cannot_be_built_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr("lco_lite.models.loading._scratch_config", lambda init, tokenizer: torch.empty(2**62))
    with pytest.raises(ModelError, match=r"model.init: this model cannot be built"):
        build_scratch(Init(), tmp_path / "m", 0)
    assert not (tmp_path / "m").exists()


ADAPTERS = {
    "of another kind": ({"peft_type": "IA3"}, "peft_type LORA is needed, found 'IA3'"),
    "of no kind": ({"peft_type": [1]}, "peft_type LORA is needed"),
    "with a pattern without end": ({"target_modules": "(a|aa|[a-z._]+)+$!"}, "takes over"),
    "with a broken pattern": ({"target_modules": "("}, "damaged"),
}


@pytest.mark.parametrize("changed, told", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_is_none_of_ours(llama, tmp_path, monkeypatch, changed, told):
    monkeypatch.setattr("lco_lite.models.language_model.PATTERN_SECONDS", 0.3)
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
