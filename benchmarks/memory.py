"""Peak memory of each phase, measured beside what ``lco-lite plan`` says; and the longest sequence that fits.

    python benchmarks/memory.py                                  # 3B + 7B in NF4, seq 2,048: sft, pairs, train-rm, rl
    python benchmarks/memory.py --phase "rl update" --set memory_limit=11.5GiB --json FILE
    python benchmarks/memory.py --policy gemma-3-1b --reward-model self --quantization none
    python benchmarks/memory.py longest --shape gemma-3-1b --limit 79GiB

Models of the stated shapes with random weights are written as ordinary folders and read like any other; the stages are
the trainers' own, with ``--set`` for any field of the recipe. Every sequence is as long as the recipe lets in, and a
random policy ends no response before its limit. On a GPU the peak is torch's, allocated and reserved, from the
beginning of each phase; on a CPU the bytes of living tensors are counted, which slows it. Phases that are done in
several parts show the largest. Seconds are of the last time a phase ran. Where ``memory_limit`` is too little for a
micro-batch, the trainers halve it, as they would anywhere, and the size that was left is shown.

``longest`` trains a model with an adapter on one sequence (forward, loss, backward; activations are made again) and
looks for the longest that fits: with LCO-KLD, and with what its peers have for it, a KL between two sources.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer

from lco_lite.command import command
from lco_lite.context import Clock, out_of_memory
from lco_lite.models.language_model import LanguageModel, Role
from lco_lite.models.loading import byte_tokenizer, load_base, quiet_libraries
from lco_lite.objectives.lco import lco_loss
from lco_lite.objectives.targets import DenseTarget
from lco_lite.plan import LiveBytes, peaks
from lco_lite.recipe.sections import Lora, Model, size_in_bytes
from lco_lite.sequences import Example, collate
from lco_lite.train.pipeline import train

GIB = 2**30
WINDOW = 262144


def qwen2(d: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool) -> Any:
    return transformers.Qwen2Config(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=WINDOW,
    )


def gemma3(d: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, head: int, window: int) -> Any:
    return transformers.Gemma3TextConfig(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        intermediate_size=inner,
        vocab_size=vocabulary,
        sliding_window=window,
        query_pre_attn_scalar=head,
        max_position_embeddings=WINDOW,
    )


# as in the models' config.json on the hub
SHAPES: dict[str, Callable[[], Any]] = {
    "qwen2.5-0.5b": lambda: qwen2(896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": lambda: qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-3b": lambda: qwen2(2048, 36, 16, 2, 11008, 151936, True),
    "qwen2.5-7b": lambda: qwen2(3584, 28, 28, 4, 18944, 152064, False),
    "gemma-3-1b": lambda: gemma3(1152, 26, 4, 1, 6912, 262144, 256, 512),
    "tiny": lambda: qwen2(64, 4, 4, 2, 128, 512, True),
    "tiny-7b": lambda: qwen2(128, 4, 4, 2, 256, 512, False),
    "tiny-gemma": lambda: gemma3(64, 6, 2, 1, 128, 512, 32, 16),
}
# pairs are sampled from a task that grades; its prompts are short
SAMPLED = ["task=arithmetic", "data.preferences=sampled", "data.demonstrations=null", "data.prompts=null"]
SAMPLED += ["train_rm.samples_per_prompt=2", "train_rm.demonstrations_as_chosen=true", "sft.examples=8"]
ARITHMETIC_PROMPT = 16  # tokens, about
# stage and the clock's phase -> plan's
PHASES = {
    ("sft", "update"): "sft",
    ("rm", "rollout"): "pair sampling",
    ("rm", "update"): "train-rm",
    ("rl", "rollout"): "rl rollout",
    ("rl", "score"): "rl score",
    ("rl", "update"): "rl update",
}


def tokenizer_of(config: Any) -> Any:
    """One token a byte, and tokens that no text has, as many as the family's tokenizer knows: the loss is over them."""
    tokens = min(config.vocab_size, 151665) if config.model_type == "qwen2" else config.vocab_size
    made = byte_tokenizer(WINDOW)
    told = json.loads(made.backend_tokenizer.to_str())
    known = told["model"]["vocab"]
    # transformers would add these to a tokenizer of these families
    for name in ("<|endoftext|>", "<bos>", "<eos>", "<unk>", "<pad>"):
        known.setdefault(name, len(known))
    known |= {f"<unused {i}>": i for i in range(len(known), tokens)}
    made._tokenizer = Tokenizer.from_str(json.dumps(told))
    return made


def write_model(folder: Path, shape: str) -> Path:
    """Random weights in bfloat16, a file a layer; the numbers are drawn once and used over and over. The index comes
    last: a folder with one is whole."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    config = SHAPES[shape]()
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 3, 0, None
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    tokenizer_of(config).save_pretrained(folder)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    places = {name: f"model-{(re.findall(r'layers.([0-9]+)', name) or ['rest'])[0]}.safetensors" for name in shapes}
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    for file in sorted(set(places.values())):
        tensors = {}
        for name in (name for name in shapes if places[name] == file):
            size = shapes[name].numel()
            many = (
                torch.ones(size, dtype=drawn.dtype) if "norm" in name else drawn.repeat(-(-size // len(drawn)))[:size]
            )
            tensors[name] = many.view(shapes[name]).clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def write_recipe(folder: Path, options: argparse.Namespace) -> Path:
    """Texts fill the lengths: a token a byte, and three around a prompt and a response."""
    longest, new, n = options.length, options.new, options.responses
    prompt = longest - new
    shown = [{"prompt": f"{i:04}".ljust(prompt - 3, "x"), "response": "y" * (new - 1)} for i in range(n)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "n" * (new - 1)} for row in shown]
    data = {}
    for name, rows in (("demonstrations", shown), ("preferences", pairs), ("prompts", shown)):
        data[name] = str(folder / f"{name}.jsonl")
        Path(data[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {"quantization": options.quantization, "lora": {"r": options.rank, "alpha": 2 * options.rank}}
    base["gradient_checkpointing"] = True
    models = folder if options.models is None else options.models
    stage = {"batch_size": options.minibatch, "micro_batch_tokens": options.micro, "max_length": longest}
    rl = {"steps": options.steps, "prompts_per_step": n, "minibatch": options.minibatch, "eval_every": 0}
    rl |= {"max_new_tokens": new, "max_length": longest, "micro_batch_tokens": options.micro}
    rl |= {"rollout_batch": options.slots, "temperature": 1.0, "top_p": 1.0, "guard": "off"}
    recipe: dict[str, Any] = {"name": "memory", "device": options.device, "data": data, "rl": rl, "threads": 1}
    recipe["model"] = {"path": str(write_model(models / options.policy, options.policy)), **base}
    if options.reward_model != "self":
        recipe["reward_model"] = {"path": str(write_model(models / options.reward_model, options.reward_model)), **base}
    recipe["sft"] = {**stage, "max_steps": 2}
    recipe["train_rm"] = {**stage, "max_steps": 2, "held_out": 0.0, "check_items": 0}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@contextlib.contextmanager
def watched(stage: str, device: str) -> Iterator[dict[str, dict[str, float]]]:
    """Phase -> its peak in bytes and its seconds, of what the trainers do inside."""
    found: dict[str, dict[str, float]] = {}
    clock = Clock.__call__
    live = LiveBytes() if device == "cpu" else None

    @contextlib.contextmanager
    def measured(self: Clock, phase: str) -> Iterator[None]:
        gc.collect()
        if live is None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            count_what_lives(live)
        start = time.perf_counter()
        with clock(self, phase):
            yield
        if (name := PHASES.get((stage, phase))) is not None:
            if live is None:
                peak = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
            else:
                peak = {"allocated": live.here.peak}
            before = found.get(name, {})
            found[name] = {key: max(float(value), before.get(key, 0.0)) for key, value in peak.items()}
            found[name]["seconds"] = time.perf_counter() - start

    Clock.__call__ = measured  # type: ignore[method-assign]
    try:
        with live or contextlib.nullcontext():
            yield found
    finally:
        Clock.__call__ = clock  # type: ignore[method-assign]


def count_what_lives(live: LiveBytes) -> None:
    """Tensors that were made out of sight, as a loader's are."""
    for one in [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]:
        live.add(one)
        if (state := getattr(one, "quant_state", None)) is not None:
            nested = (state.state2.absmax, state.state2.code) if state.state2 else ()
            for held in (state.absmax, state.code, state.offset, *nested):
                if held is not None:
                    live.add(held)
    live.restart()


def phases(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, dict[str, Any]]:
    """Runs the stages up to the last that is asked for."""
    wanted = set(options.phase or PHASES.values())
    recipe, found = write_recipe(folder, options), dict[str, dict[str, Any]]()
    order, filled = ["sft", "rm", "rl"], options.length - options.new
    last = max(order.index(stage) for (stage, _), phase in PHASES.items() if phase in wanted)
    runs: list[tuple[str, str, list[str], int]] = []
    if "pair sampling" in wanted:
        runs.append(("pairs", "rm", [*SAMPLED, f"train_rm.prompts={options.slots}"], ARITHMETIC_PROMPT))
    if wanted != {"pair sampling"}:
        runs += [("memory", stage, [], filled) for stage in order[: last + 1]]
    for name, stage, more, prompt in runs:
        sets = [*more, *options.set]
        with command(str(recipe), folder / "runs", name, sets, {}, quiet=True) as ctx:
            if stage != "sft":
                train(ctx, "sft")  # of the pairs' run; the others are done by now
            with watched(stage, options.device) as seen:
                train(ctx, ctx.recipe.rl.stage if stage == "rl" else stage)
            resolved, rooms = ctx.recipe, {room.setting: room.size for room in ctx._rooms.values()}
        del ctx
        mine = {
            phase: row
            for phase, row in seen.items()
            if phase in wanted and (phase == "pair sampling") == (name == "pairs")
        }
        said = peaks(resolved, stage, options.device == "cuda", prompt)[0] if mine else {}
        for phase, row in mine.items():
            section = {"sft": "sft", "rm": "train_rm"}.get(stage, "rl")
            size = rooms.get(f"{section}.micro_batch_tokens", options.micro)  # smaller where memory ran out
            columns = {column: size for column, size in said[phase].items() if column != "host"}
            row |= {"planned": sum(columns.values()), "columns": columns, "micro_batch_tokens": size}
            found[phase] = row
            console.print(f"{phase}: {row['allocated'] / GIB:.3f} GiB, planned {found[phase]['planned'] / GIB:.3f}")
    return found


# the longest sequence


def lco_kld(hidden: torch.Tensor, head: Any) -> torch.Tensor:
    target = DenseTarget(hidden.detach(), 1.0, 0.1 * hidden.detach())
    return lco_loss("kld", hidden, head, target)[0]


def trl_kl(hidden: torch.Tensor, head: Any) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher = 1.1 * hidden.detach()
    return ChunkedDivergenceFunction.apply(hidden, head.weight, None, teacher, head.weight, None, 0.0)[0].mean()


def liger_kl(hidden: torch.Tensor, head: Any) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=hidden.is_cuda)
    return loss(hidden, head.weight, 1.1 * hidden.detach(), head.weight, labels)


CONTENDERS = {"lco kld": (lco_kld, None), "trl kl": (trl_kl, "trl"), "liger kl": (liger_kl, "liger_kernel")}


def longest(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, dict[str, Any]]:
    """Contender -> tokens of the longest sequence that fits, its peak in bytes and seconds; to a grain of tokens."""
    weights = Model(path=str(write_model((options.models or folder) / options.shape, options.shape)))
    weights = weights.model_copy(update={"quantization": options.quantization, "attention": options.attention})
    device, limit = torch.device(options.device), size_in_bytes(options.limit) if options.limit else None
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        limit = min(limit or total, total)
        torch.cuda.set_per_process_memory_fraction(limit / total)
    elif limit is None:
        raise SystemExit("longest: a CPU needs --limit, e.g. 100MiB")
    base = load_base(weights, device)
    model = LanguageModel(base, tokenizer_of(base.config), checkpointing=True)
    model.add_adapter("policy", Lora(r=options.rank, alpha=2 * options.rank), 0)
    model.trainable("policy")
    role, found = Role(model, "policy"), dict[str, dict[str, Any]]()

    def attempt(loss: Any, tokens: int) -> dict[str, Any] | None:
        """Its peak and seconds; None where it does not fit."""
        batch = collate([Example([5], [6] * (tokens - 1))], 0)
        gc.collect()
        live = LiveBytes() if device.type == "cpu" else None
        start = time.perf_counter()
        try:
            with live or contextlib.nullcontext(), model.training_mode():
                if live is None:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                else:
                    count_what_lives(live)
                loss(role.hidden(batch), model.head).backward()
                if live is None:
                    torch.cuda.synchronize()
        except Exception as e:
            if not out_of_memory(e):
                raise
            return None
        finally:
            base.zero_grad()
        peak = live.here.peak if live is not None else torch.cuda.max_memory_allocated()
        return {"bytes": peak, "seconds": time.perf_counter() - start} if peak <= limit else None

    for name, (loss, package) in CONTENDERS.items():
        if package and importlib.util.find_spec(package) is None:
            console.print(f"{name}: left out, {package} is not installed")
            continue
        fits, too_long, best = 0, None, None
        tokens = 8 * options.grain
        while too_long is None or too_long - fits > options.grain:
            made = attempt(loss, tokens)
            console.print(f"{name}: {tokens} tokens {'fit' if made else 'do not fit'}")
            fits, too_long, best = (tokens, too_long, made) if made else (fits, tokens, best)
            middle = (fits + (too_long or 4 * fits)) // 2 // options.grain * options.grain
            tokens = max(options.grain, middle)
            if too_long is not None and tokens in (fits, too_long):
                break
        found[name] = {"tokens": fits, **(best or {})}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("phases", "longest", "write"), default="phases")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    small = default == "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--policy", choices=SHAPES, default="tiny" if small else "qwen2.5-3b")
    parser.add_argument("--reward-model", choices=(*SHAPES, "self"), default="tiny-7b" if small else "qwen2.5-7b")
    parser.add_argument("--quantization", choices=("none", "nf4"), help="default: nf4; of `longest` none")
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--length", type=int, default=64 if small else 2048, help="tokens of prompt and response")
    parser.add_argument("--new", type=int, default=32 if small else 512, help="tokens of the response")
    parser.add_argument("--responses", type=int, default=8 if small else 32, help="of a step")
    parser.add_argument("--minibatch", type=int, default=4 if small else 16)
    parser.add_argument("--micro", type=int, help="micro_batch_tokens; default: twice the length")
    parser.add_argument("--slots", type=int, default=4 if small else 32, help="responses at once")
    parser.add_argument("--steps", type=int, default=1, help="of rl")
    parser.add_argument("--phase", choices=list(PHASES.values()), action="append", help="only this one; may come again")
    parser.add_argument("--set", "-s", action="append", default=[], help="any field of the recipe: rl.beta=0.5")
    parser.add_argument("--models", type=Path, help="folder that keeps the models, and has them next time")
    parser.add_argument("--out", type=Path, help="of `write`: folder for models, data and recipe.yaml")
    parser.add_argument("--shape", choices=SHAPES, default="tiny-gemma" if small else "gemma-3-1b", help="of `longest`")
    parser.add_argument("--limit", help="of `longest`: 79GiB; default: the card's memory")
    parser.add_argument("--grain", type=int, default=32 if small else 4096, help="of `longest`: tokens")
    parser.add_argument("--attention", default="auto", help="of `longest`: as model.attention")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    options.micro = options.micro or 2 * options.length
    options.quantization = options.quantization or ("none" if options.what == "longest" else "nf4")
    return options


def main() -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    options, console = parse(), Console()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, living tensors counted"
    about = f"{device} · torch {torch.__version__}, transformers {transformers.__version__}"
    if options.device == "cuda":
        torch.cuda.init()  # its counters are asked before anything is there
    if options.what == "write":
        options.out.mkdir(parents=True, exist_ok=True)
        print(write_recipe(options.out.resolve(), options))
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = {"phases": phases, "longest": longest}[options.what](options, Path(folder), console)
        except typer.Exit as e:  # the message stands on stderr
            raise SystemExit(e.exit_code) from None
    if options.what == "phases":
        shape = f"{options.policy} + {options.reward_model} · {options.quantization} + LoRA r {options.rank} · "
        shape += f"{options.length} tokens, {options.slots} at once" + "".join(f" · {item}" for item in options.set)
        heads = ("", "allocated, GiB", "reserved", "planned", "÷ planned", "micro-batch", "s")
        table = Table(*heads, title=f"{shape} · {about}")
        for phase, row in results.items():
            sizes = [f"{row[key] / GIB:.3f}" if key in row else "" for key in ("allocated", "reserved", "planned")]
            ratio = f"{row['allocated'] / row['planned']:.2f}"
            table.add_row(phase, *sizes, ratio, str(row["micro_batch_tokens"]), f"{row['seconds']:.1f}")
    else:
        limit = f"in {options.limit or 'all memory'}"
        shape = f"{options.shape} · {options.quantization} + LoRA r {options.rank}, one sequence, {limit}"
        table = Table("", "tokens", "GiB", "s", title=f"{shape} · {about}")
        for name, row in results.items():
            numbers = [f"{row['bytes'] / GIB:.3f}", f"{row['seconds']:.1f}"] if row["tokens"] else ["", ""]
            table.add_row(name, f"{row['tokens']:,}", *numbers)
    console.print(table)
    if options.json:
        asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        report = {"title": shape, "about": about, "options": asked, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
