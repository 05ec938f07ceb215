"""Base weights and tokenizers from a hub id, a local folder or a GGUF file, in the precision that the recipe asks for.

Only safetensors are read. A model from scratch and a GGUF file become ordinary model folders first. Whatever cannot be
loaded is one ModelError that says what was found and what is accepted.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers as hf
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import dynamic_module_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lco_lite import ranks
from lco_lite.console import Console
from lco_lite.errors import ModelError, UsageError
from lco_lite.files import is_there, read_json, seal, write_folder, write_json
from lco_lite.finite import not_finite_in
from lco_lite.models.fingerprint import fingerprint, local_base
from lco_lite.recipe.sections import MOST_LAYERS, Init, Model, RewardModel, Weights, size_in_bytes

# what a config may say, and how large the files beside the weights may be, MiB: far beyond any model's
_MOST = {"num_hidden_layers": MOST_LAYERS, "hidden_size": 2**17, "num_attention_heads": 2**12, "vocab_size": 2**24}
_MOST_MIB = {".jinja": 4, ".json": 64, "tokenizer.json": 1024}


def resolve_device(asked: str) -> torch.device:
    """``auto`` is CUDA where there is one; each of several processes has a GPU of its own. Raises UsageError where the
    recipe asks for CUDA or MPS and there is none, or too few."""
    if asked == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("device: mps, and torch finds no Apple GPU (MPS); use device: cpu or auto")
        if ranks.world() > 1:
            raise UsageError("device: mps is one GPU, for one process; start one, or use device: cpu")
        return torch.device("mps")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: cuda, and torch finds no CUDA device; use device: cpu or auto")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if (place := ranks.local_rank()) is None:
        return current_gpu()
    if place >= torch.cuda.device_count():
        raise UsageError(
            f"{place + 1} processes or more on this machine, and torch finds {torch.cuda.device_count()} CUDA devices: "
            "each process needs its own; start fewer, or use device: cpu"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def current_gpu() -> torch.device:
    """With its index, by which torch's allocator and comparisons know it. Nobody has chosen another than the first
    where CUDA has not started, and asking torch would start it."""
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def reward_device(asked: str | None, policy: torch.device) -> torch.device:
    """Where a reward model of its own base is. Raises UsageError for a device that is not there, and where several
    processes share the work."""
    if asked is None:
        return policy
    device, found = current_gpu() if asked == "cuda" else torch.device(asked), torch.cuda.device_count()
    if device.type == "cuda" and device.index >= found:
        there = ", ".join(f"cuda:{i}" for i in range(found)) or "none"
        raise UsageError(f"reward_model.device: {asked} is not there; CUDA devices: {there}")
    if ranks.world() > 1:
        raise UsageError(
            f"reward_model.device: {asked}: each of several processes has a GPU of its own for all models; leave it "
            "out, or start one process"
        )
    return device


def limit_memory(device: torch.device, limit: str | None, console: Console) -> None:
    """No more than ``limit`` (``11.5GiB``) is allocated on ``device`` by this process."""
    if limit is None:
        return
    if device.type == "cpu":
        console.note(f"memory_limit: {limit} has no effect on a CPU")
        return
    held, there = size_in_bytes(limit), torch.cuda.get_device_properties(device).total_memory
    if held >= there:
        console.note(f"memory_limit: {limit} has no effect: the device has {there / 2**30:.1f} GiB")
        return
    torch.cuda.set_per_process_memory_fraction(held / there, device)


def load_base(
    weights: Weights, device: torch.device, folder: Path | None = None, on_host: bool = False
) -> hf.PreTrainedModel:
    """The model on ``device``, or for it ``on_host``, in eval mode, frozen; its own sampling defaults are dropped: the
    recipe's count."""
    source, origin = str(folder or weights.path), _origin(weights)
    refuse_unusable_folder(Path(source))
    dtype = base_dtype(weights, device)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    options["device_map"] = {"": "cpu" if on_host else device}
    if weights.attention != "auto":
        options["attn_implementation"] = weights.attention
    if weights.quantization != "none":
        options["quantization_config"] = _quantization(weights, dtype)
    try:
        config = hf.AutoConfig.from_pretrained(source, **origin)
        refuse_implausible(config, source)
        if not weights.trust_remote_code:
            refuse_foreign_kernels(config, source)
        kind = language_model_class(config)
        refuse_unknown_quantisation(source, config)
        model, loaded = kind.from_pretrained(source, config=config, output_loading_info=True, **origin, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # transformers raises OSError, ValueError, KeyError, ImportError, and what remote code does
        raise unloadable("model", source, e) from e
    if loaded["missing_keys"]:  # transformers draws them at random
        missing = sorted(loaded["missing_keys"])
        raise ModelError(
            f"{source}: is {_architecture(config)}, and lacks {len(missing)} weights of {type(model).__name__}, e.g. "
            f"{missing[0]}: a causal language model with its LM head is needed"
        )
    refuse_homeless(source, model, loaded["unexpected_keys"])
    if (name := not_finite_in(dict(model.named_parameters()))) is not None:
        raise ModelError(f"{source}: {name} has a number that is not finite: the weights are damaged")
    keep = model.generation_config
    model.generation_config = hf.GenerationConfig(
        eos_token_id=keep.eos_token_id, pad_token_id=keep.pad_token_id, bos_token_id=keep.bos_token_id
    )
    # On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit layers in their first forward without gradients, for a
    # product that has no gradient and rounds the scales to bfloat16: training after scoring goes wrong without a word.
    # Layers with a bias, or narrower than a block of 64, fail there. So they stay as they were loaded.
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def refuse_unknown_quantisation(source: str, config: Any) -> None:
    """Raises ModelError for a kind that transformers does not know: it reads such weights as if they were plain."""
    quantised = getattr(config, "quantization_config", None) or {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    method = getattr(method, "value", method)
    kinds = {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"}
    if method is not None and method not in kinds:
        known = ", ".join(sorted(kinds))
        raise ModelError(
            f"{source}/config.json: quantization_config.quant_method: {method!r} is unknown to transformers "
            f"{hf.__version__}, which would read the weights as plain ones; known: {known}"
        )


def refuse_homeless(source: str, model: hf.PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Raises ModelError where the folder has weights of the model's own modules that the config has no place for: a
    layer or an expert more, a bias. Other heads and towers, which a language model leaves aside, are named in a
    warning."""
    homeless, modules = sorted(unexpected), dict(model.named_modules())
    alike = {re.sub(r"\.\d+\.", ".#.", name) for name in model.state_dict()}

    def belongs(key: str) -> bool:
        owner, _, name = key.rpartition(".")
        absent = owner in modules and getattr(modules[owner], name, None) is None  # no buffer that is made anew
        return absent or re.sub(r"\.\d+\.", ".#.", key) in alike

    lost = [key for key in homeless if belongs(key)]
    if lost:
        config = model.config.get_text_config()
        raise ModelError(
            f"{source}: {len(lost)} of its weights have no place in the model that its config.json describes "
            f"({config.num_hidden_layers} layers), e.g. {lost[0]}: config.json is of another model, or has a wrong "
            "num_hidden_layers or the like"
        )
    if homeless:
        warnings.warn(f"{source}: {len(homeless)} weights are not used, e.g. {homeless[0]}", stacklevel=2)


def weight_not_finite(folder: Path) -> str | None:
    """The first tensor of a folder's safetensors with a number that is not finite; None where all are. One tensor at a
    time is in memory."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if not_finite_in({name: tensors.get_tensor(name)}):
                    return str(name)
    return None


def load_config(weights: Weights, folder: Path | None = None) -> Any:
    """What the weights' shapes follow from, without them; of ``folder`` if given. Raises ModelError where it cannot be
    had."""
    if folder is not None:
        return hf.AutoConfig.from_pretrained(str(folder), **_origin(weights))
    if isinstance(weights, Model) and weights.init is not None:
        return _scratch_config(weights.init, byte_tokenizer(weights.init.max_length))
    file = {} if weights.gguf_file is None else {"gguf_file": weights.gguf_file}
    if not file:
        refuse_unusable_folder(Path(str(weights.path)))
    try:
        config = hf.AutoConfig.from_pretrained(str(weights.path), **file, **_origin(weights))
    except Exception as e:  # see load_base
        raise unloadable("model's config", str(weights.path), e) from e
    refuse_implausible(config, str(weights.path))
    if not weights.trust_remote_code:
        refuse_foreign_kernels(config, str(weights.path))
    return config


def language_model_class(config: Any) -> Any:
    """The auto class whose models predict the next token: of text alone, or of text inside a multimodal wrapper.

    Raises ModelError naming the architecture where there is none.
    """
    own = getattr(config, "auto_map", None) or {}
    if not getattr(config, "is_encoder_decoder", False):
        for kind in (hf.AutoModelForCausalLM, hf.AutoModelForImageTextToText):
            if type(config) in kind._model_mapping or kind.__name__ in own:
                return kind
    raise ModelError(f"{_architecture(config)} is no causal language model: it is not supported")


def base_dtype(weights: Weights, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 on a CUDA GPU, float32 elsewhere. Raises ModelError for bfloat16 on a GPU without it."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    name = auto if weights.dtype == "auto" else weights.dtype
    if name == "bfloat16" and device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 0):
        section = "reward_model" if isinstance(weights, RewardModel) else "model"
        raise ModelError(
            f"{section}.dtype: {weights.dtype} asks for bfloat16, and this GPU's compute capability is {found[0]}."
            f"{found[1]}: it computes in bfloat16 from 8.0 (Ampere) on. Set {section}.dtype: float32 for training, "
            "which takes twice the memory; eval also takes float16."
        )
    return getattr(torch, name)


def _quantization(weights: Weights, dtype: torch.dtype) -> hf.BitsAndBytesConfig:
    """NF4 with double quantisation, computing in ``dtype``; or LLM.int8. The LM head is never quantised."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization: {weights.quantization} needs bitsandbytes: pip install bitsandbytes")
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    kind = {"load_in_8bit": True} if weights.quantization == "int8" else {"load_in_4bit": True, **nf4}
    return hf.BitsAndBytesConfig(**kind, llm_int8_skip_modules=["lm_head"])


def _architecture(config: Any) -> str:
    return ", ".join(config.architectures or []) or type(config).__name__


def _origin(weights: Weights) -> dict[str, Any]:
    return {"trust_remote_code": weights.trust_remote_code, "revision": weights.revision or "main"}


def refuse_unusable_folder(folder: Path) -> None:
    """Raises ModelError for a folder without a config or with pickled weights only."""
    if not is_there(folder) or not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json: a model folder as save_pretrained writes it is needed")
    refuse_huge_files(folder)
    sampling = folder / "generation_config.json"
    try:  # transformers passes over a broken one, and the tokens that end a response are others
        found = json.loads(sampling.read_text(encoding="utf-8")) if sampling.is_file() else {}
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{sampling}: damaged: {e}") from e
    if not isinstance(found, dict):
        raise ModelError(f"{sampling}: damaged: an object with named fields is needed, found {found!r:.80}")
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: only pickled weights ({pickled[0]}); safetensors are needed, for pickle runs code")


def refuse_without_weights(folder: Path) -> None:
    """Raises ModelError for a folder that has a config and no weights."""
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no weights: *.safetensors are needed beside config.json")


def refuse_huge_files(folder: Path) -> None:
    """Raises ModelError where a file beside the weights has a size that no such file has."""
    for file in (*folder.glob("*.json"), *folder.glob("*.jinja")):
        most = _MOST_MIB.get(file.name, _MOST_MIB[file.suffix])
        if (found := file.stat().st_size) > most * 2**20:
            raise ModelError(f"{file}: has {found / 2**20:,.0f} MiB; more than {most} are not read")


def refuse_implausible(config: Any, source: str) -> None:
    """Raises ModelError for shapes that no model has, and that would take for ever to build."""
    text = config.get_text_config()
    for name, most in _MOST.items():
        found = getattr(text, name, 1)
        if not isinstance(found, int) or not 1 <= found <= most:
            raise ModelError(f"{source}/config.json: {name} is a whole number from 1 to {most:,}, found {found!r:.80}")


def refuse_foreign_kernels(config: Any, source: str) -> None:
    """Raises ModelError for an attention kernel that is a repository on the hub: its code would be fetched and run."""
    for part in (config, config.get_text_config()):
        named = getattr(part, "_attn_implementation", None)
        if named is not None and not re.fullmatch(r"[\w|]+", str(named)):
            raise ModelError(
                f"{source}/config.json: attn_implementation {named!r:.80} is code of others; one of transformers "
                "is accepted, as sdpa or eager. model.trust_remote_code: true runs it with all your rights."
            )


def unloadable(what: str, source: str, error: BaseException) -> ModelError:
    """The message for whatever transformers raised while it loaded ``what``."""
    if isinstance(error, ModelError):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    if not is_there(Path(source)):
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            return ModelError(f"{source:.200}: no such folder")
        reason += " (no local folder of this name; a hub id needs the network or a cached copy)"
    if len(reason) > 400:
        reason = f"{reason[:200]} … {reason[-200:]}"
    return ModelError(f"{source}: this {what} cannot be loaded: {reason}")


def load_tokenizer(weights: Weights, folder: Path | None = None) -> hf.PreTrainedTokenizerBase:
    """From ``folder`` if given, else ``weights.path``; padding is chosen here, tokenizers are stored without."""
    source = str(folder or weights.path)
    refuse_huge_files(Path(source))
    tokenizer = tried_tokenizer(source, lambda: hf.AutoTokenizer.from_pretrained(source, **_origin(weights)))
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        _choose_pad(tokenizer)
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{source}: its tokenizer has neither a padding token nor one that ends a response")
    return tokenizer


PROBE = "What is 3 + 4? \n\tÄ 7"


def tried_tokenizer(source: str, load: Callable[[], Any]) -> Any:
    """What ``load`` gives, once it has encoded and decoded a text. Raises ModelError for what cannot: a damaged
    tokenizer.json may load, and it may end in a panic of Rust's, which is no Exception."""
    try:
        with _panics_unsaid():
            tokenizer = load()
            longest = tokenizer.model_max_length
            if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not 1 <= longest < math.inf:
                raise ValueError(f"model_max_length: a number of tokens is needed, found {longest!r:.80}")
            ids = tokenizer(PROBE)["input_ids"]
            if not ids or not tokenizer.get_vocab():
                raise ValueError(f"the text {PROBE!r} has no tokens")
            tokenizer.decode(ids)
            tokenizer.decode(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # each tokenizer class raises its own kinds
        raise unloadable("tokenizer", source, e) from e
    return tokenizer


@contextlib.contextmanager
def _panics_unsaid() -> Iterator[None]:
    """A panic writes itself on the process's stderr before it is raised: that is left out, and what else is written
    there inside the block comes after it."""
    with tempfile.TemporaryFile() as said:
        stderr, panicked = os.dup(2), False
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException as e:
            panicked = type(e).__name__ == "PanicException"
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            if not panicked:
                os.write(2, said.read())


def _choose_pad(tokenizer: hf.PreTrainedTokenizerBase) -> None:
    """A token that never ends a response: one made for padding, unk, a reserved one. EOS where there is nothing else:
    attention masks are explicit everywhere and responses are cut by length, so padding is never read."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    usable = [t for t in special if t not in (tokenizer.eos_token, tokenizer.bos_token)]
    padding = [t for t in usable if "pad" in t.lower()]
    unknown = [t for t in usable if t == tokenizer.unk_token]
    reserved = [t for t in usable if "reserved" in t.lower() or "unused" in t.lower()]
    tokenizer.pad_token = [*padding, *unknown, *reserved, tokenizer.eos_token][0]


def window_of(weights: Weights, tokenizer: Any) -> int:
    """How many tokens the model takes, before it is loaded. Raises ModelError as ``load_config``."""
    most = getattr(load_config(weights).get_text_config(), "max_position_embeddings", 0)
    return int(most or tokenizer.model_max_length)


def open_tokenizer(model: Model, seed: int) -> Any:
    """The policy's tokenizer before there is a run."""
    if model.gguf_file is not None:
        return _tokenizer_of_gguf(model)
    if model.init is None:
        return load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer(model.init.max_length).save_pretrained(folder)
        return load_tokenizer(model, Path(folder))


@ranks.once
def converted_gguf(weights: Weights, folder: Path) -> Path | None:
    """``folder`` with the GGUF's weights and tokenizer as an ordinary bfloat16 model, made the first time, whole or not
    at all; None where the weights are no GGUF. Raises UsageError where ``folder`` was made from another one."""
    if weights.gguf_file is None or weights.path is None:
        return None
    origin = {"path": weights.path, "revision": weights.revision, "gguf_file": weights.gguf_file}
    source, record = local_base(weights), folder / "converted_from.json"
    content = None if source is None else fingerprint(source)
    if folder.exists():
        remedy = f"Delete {folder}: it is made again"
        known = read_json(record, dict[str, str | None], remedy) if record.exists() else {}
        was = known.pop("fingerprint", None)  # earlier versions noted none
        if known != origin or (was and content and was != content):
            raise UsageError(
                f"{folder}: was converted from another GGUF file than {weights.gguf_file} is now: put that back, "
                f"delete {folder}, or choose another --name"
            )
        return folder
    tokenizer = _tokenizer_of_gguf(weights)
    model, loaded = _from_gguf(hf.AutoModelForCausalLM, weights, dtype=torch.bfloat16, output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):  # see load_base
        raise ModelError(
            f"{weights.gguf_file}: lacks {len(missing)} weights of {type(model).__name__}, e.g. {missing[0]}"
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now; save_pretrained refuses them with the marks
    model.hf_quantizer = None
    with write_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_json(new / record.name, origin | ({"fingerprint": content} if content else {}))
        seal(new)
    return folder


def _tokenizer_of_gguf(weights: Weights) -> Any:
    file = Path(str(weights.path)) / str(weights.gguf_file)
    return tried_tokenizer(str(file), lambda: _from_gguf(hf.AutoTokenizer, weights))


def _from_gguf(kind: Any, weights: Weights, **options: Any) -> Any:
    file = Path(str(weights.path)) / str(weights.gguf_file)
    if file.parent.is_dir() and not file.is_file():
        raise ModelError(f"{file}: no such GGUF file")
    try:
        return kind.from_pretrained(weights.path, gguf_file=weights.gguf_file, **_origin(weights), **options)
    except Exception as e:  # transformers raises many kinds
        raise unloadable("GGUF file", str(file), e) from e


PAD, USER, ASSISTANT, END = SPECIALS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>"
    "{% elif m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_scratch(init: Init, folder: Path, seed: int) -> None:
    """Writes model and tokenizer to ``folder``, whole or not at all. The weights depend on ``seed`` alone."""
    tokenizer = byte_tokenizer(init.max_length)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = hf.LlamaForCausalLM(_scratch_config(init, tokenizer))
    except (RuntimeError, ValueError, MemoryError) as e:
        raise ModelError(f"model.init: this model cannot be built: {' '.join(str(e).split())[:400]}") from e
    with write_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        seal(new)


def _scratch_config(init: Init, tokenizer: hf.PreTrainedTokenizerFast) -> hf.LlamaConfig:
    return hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=init.hidden_size,
        intermediate_size=init.intermediate_size,
        num_hidden_layers=init.layers,
        num_attention_heads=init.heads,
        max_position_embeddings=init.max_length,
        initializer_range=init.std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def byte_tokenizer(max_length: int) -> hf.PreTrainedTokenizerFast:
    """One token a byte, a chat template, and a padding token that is not EOS."""
    bytes_as_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *bytes_as_text])}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def quiet_libraries() -> None:
    """No progress bars of transformers and datasets; no warnings that a user can do nothing about, and no questions.
    Errors stay."""
    import datasets
    from transformers import modeling_gguf_pytorch_utils as gguf

    gguf.tqdm = hf.logging.tqdm  # else a plain bar, which heeds none of these
    huggingface_hub.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    hf.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*kernels.*", module="bitsandbytes.*")
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # no library asks on the terminal whether to run a model's code
