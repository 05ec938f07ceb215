"""Tokens a second of each engine on the same prompts: python benchmarks/rollout.py [--json FILE]

A Llama of the stated shape with random weights, sampled from at temperature 1. One token in ``--mean`` ends a response,
so that they end apart, as in practice; prompts have from a quarter of ``--prompt`` tokens to all of them. One run: the
contenders take turns, the first turn warms up, and the median of the others is shown. Contenders:

    generate    transformers' generate, called on one batch of prompts after the other in their order
    static      the same with a static cache, which transformers compiles on a GPU
    hf          transformers' generate, a batch that shrinks as its responses end: ``rollout.engine: hf``
    hf whole    the same, where a row that has ended stays until all have
    paged       continuous batching: ``rollout.engine: paged``
    vllm        where it is installed: ``rollout.engine: vllm``

Memory is the most that torch had allocated on the GPU; vLLM takes its share beforehand and is not seen. On a GPU the
model is a 3B in NF4 with an adapter, 64 responses at once, 128 + 512 tokens.
"""

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.models.loading import byte_tokenizer, load_base, quiet_libraries
from lco_lite.recipe.sections import Lora, Model, Rollout
from lco_lite.rollout.engine import Sampling, finished, in_order, left_padded, open_engine
from lco_lite.rollout.hf import HFEngine
from lco_lite.sequences import seeded

SHAPES = {  # d, layers, heads, key-value heads, feed-forward, V
    "20m": (384, 8, 6, 3, 1024, 16384),
    "135m": (576, 30, 9, 3, 1536, 49152),
    "3b": (3072, 28, 24, 8, 8192, 128256),
}
CPU = {"shape": "20m", "quantization": "none", "prompts": 32, "slots": 8, "prompt": 32, "new": 64, "mean": 24}
GPU = {"shape": "3b", "quantization": "nf4", "prompts": 256, "slots": 64, "prompt": 128, "new": 512, "mean": 256}
Contender = Callable[[int], int]
"""Samples once, at most so many tokens a response; returns how many were made, ends included."""
SLOW = ("generate", "hf", "hf whole")  # nothing is compiled or captured: a few tokens warm them up


class WholeHFEngine(HFEngine):
    shrinks_from = sys.maxsize


def build(folder: Path, options: argparse.Namespace) -> LanguageModel:
    """Random weights, stored, and read as a recipe's would be; with an adapter that changes them."""
    width, layers, heads, kv_heads, inner, vocabulary = SHAPES[options.shape]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    with torch.device(options.device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    byte_tokenizer(8192).save_pretrained(folder)
    del model
    gc.collect()
    weights = Model(path=str(folder), quantization=options.quantization)
    loaded = LanguageModel(load_base(weights, torch.device(options.device)), byte_tokenizer(8192))
    loaded.head = replace(loaded.head, rows=vocabulary)  # the tokenizer knows fewer
    loaded.add_adapter("policy", Lora(), 0)
    with torch.no_grad():
        for _, parameter in loaded.trainable("policy"):
            parameter.normal_(std=0.01)
    return loaded


def of_generate(model: LanguageModel, prompts: list[list[int]], stops: list[int], slots: int, **more: Any) -> Contender:
    base: Any = model.base
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": stops, "pad_token_id": 0}

    @torch.no_grad()
    def sample(new: int) -> int:
        made = 0
        with seeded(0, "benchmark"), model.use("policy"):
            for start in range(0, len(prompts), slots):
                part = prompts[start : start + slots]
                ids, mask = (tensor.to(model.device) for tensor in left_padded(part, 0))
                rows = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **how, **more)
                ends = set(stops)
                found = [finished(p, row, ends) for p, row in zip(part, rows[:, ids.shape[1] :].tolist(), strict=True)]
                made += sum(len(response.example.response) for response in found)
        return made

    return sample


def of_engine(engine: Any, prompts: list[list[int]], sampling: Sampling, stops: list[int]) -> Contender:
    engine.stop_ids = set(stops)

    def sample(new: int) -> int:
        with seeded(0, "benchmark"):
            made = in_order(engine.generate(prompts, replace(sampling, max_new_tokens=new)))
        return sum(len(response.example.response) for response in made)

    return sample


def contenders(folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Contender]:
    model, vocabulary = build(folder, options), SHAPES[options.shape][-1]
    role, stops = Role(model, "policy"), list(range(3, vocabulary, options.mean))
    lengths = [options.prompt - i * (options.prompt * 3 // 4) // options.prompts for i in range(options.prompts)]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    sampling = Sampling(1.0, 1.0, options.new, options.slots)
    makers: dict[str, Callable[[], Contender]] = {
        "generate": lambda: of_generate(model, prompts, stops, options.slots),
        "static": lambda: of_generate(model, prompts, stops, options.slots, cache_implementation="static"),
        "hf": lambda: of_engine(HFEngine(role, 3, vocabulary), prompts, sampling, stops),
        "hf whole": lambda: of_engine(WholeHFEngine(role, 3, vocabulary), prompts, sampling, stops),
        "paged": lambda: of_engine(
            open_engine([role], 3, settings=Rollout(engine="paged"), say=console.print), prompts, sampling, stops
        ),
        "vllm": lambda: of_engine(open_engine([role], 3, settings=Rollout(engine="vllm")), prompts, sampling, stops),
    }
    left_out = {} if options.device == "cuda" else {"static": "it is for GPUs here", "vllm": "it is for GPUs here"}
    if importlib.util.find_spec("vllm") is None:
        left_out["vllm"] = "it is not installed"
    entries = {}
    for name in options.contenders.split(","):
        if name in left_out:
            console.print(f"{name}: left out, {left_out[name]}")
        else:
            entries[name] = makers[name]()
    return entries


def measure(entries: dict[str, Contender], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    on_gpu = options.device == "cuda"
    rates: dict[str, list[float]] = {name: [] for name in entries}
    tokens, peaks = dict[str, int](), dict[str, float]()
    for name, sample in entries.items():
        sample(min(8, options.new) if name in SLOW else options.new)
    for _ in range(options.repeats):
        for name, sample in entries.items():
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            tokens[name] = sample(options.new)
            if on_gpu:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            rates[name].append(tokens[name] / (time.perf_counter() - start))
    first = rates[next(iter(entries))]
    return {
        name: {
            "tokens": tokens[name],
            "tokens_per_second": statistics.median(rates[name]),
            "lowest": min(rates[name]),
            "highest": max(rates[name]),
            "ratio": statistics.median(a / b for a, b in zip(rates[name], first, strict=True)),
            **({"peak_gib": peaks[name]} if name in peaks and name != "vllm" else {}),
        }
        for name in entries
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--quantization", choices=("none", "nf4"))
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--slots", type=int, help="responses at once")
    parser.add_argument("--prompt", type=int, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, help="tokens of the longest response")
    parser.add_argument("--mean", type=int, help="tokens of a response, were there no limit")
    names = "generate,static,hf,hf whole,paged,vllm"
    parser.add_argument("--contenders", default=names, help=f"of {names}; the ratio is to the first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    for name, value in (CPU if options.device == "cpu" else GPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    quiet_libraries()
    options, console = parse(), Console()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(contenders(Path(folder), options, console), options)
    on_gpu = options.device == "cuda"
    device = (
        torch.cuda.get_device_name() if on_gpu else f"CPU, {options.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    title = (
        f"Llama {options.shape} {SHAPES[options.shape]} · {options.quantization} + LoRA · {options.prompts} prompts, "
    )
    title += (
        f"{options.slots} at once, {options.prompt} + {options.new} tokens · {device} · torch {torch.__version__}, "
    )
    title += f"transformers {transformers.__version__}"
    heads = ("", "tokens", "tokens/s", "lowest", "highest", f"÷ {next(iter(results))}", "GiB")
    table = Table(*heads, title=title)
    for name, row in results.items():
        rates = (f"{row[key]:,.1f}" for key in ("tokens_per_second", "lowest", "highest"))
        peak = f"{row['peak_gib']:.2f}" if "peak_gib" in row else ""
        table.add_row(name, f"{row['tokens']:,}", *rates, f"{row['ratio']:.2f}", peak)
    console.print(table)
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name != "json"}
        report = {"title": title, "options": asked, "shape": SHAPES[options.shape], "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
