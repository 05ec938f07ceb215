"""Cost and accuracy of one loss, forward and backward, beside the alternatives: python benchmarks/loss.py [--json FILE]

One run, side by side: the contenders take turns, and the median of the turns is shown. Contenders:

    naive ...   full logits of policy, π_old, φ_DPO and φ_ref, and autograd: what a first version does
    trl kl      TRL's chunked divergence, forward KL of two sources: its closest loss, with two distributions, not four
    liger kl    Liger's fused linear JSD at beta 0: the same two-source KL
    lco ...     this project
    floor n     n bare products of the same shape, T x V x d, over 512 tokens at a time

Time in ms. Extra memory is the peak above the inputs and the returned gradient: torch's counter on a GPU; on a CPU the
high-water mark of a separate process (Linux). Error: of ∂loss/∂hidden, relative to float64. The covariance of LCO-MSE
is made once for each head; its time is shown separately. A line says which peers are not installed (extra `bench`).
"""

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lco_lite.objectives import reference
from lco_lite.objectives.head import Head, row_covariance
from lco_lite.objectives.lco import lco_loss
from lco_lite.objectives.targets import DenseTarget

SHAPES = {"cpu": [(1024, 576, 49152)], "cuda": [(8192, 2048, 151936), (8192, 640, 262144)]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OBJECTIVES = ("kld", "lch", "mse")
BETA = 1.0
CHECKED_TOKENS = 128
FLOOR_CHUNK = 512
Loss = Callable[["Problem", Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Hidden states [T, d] and a head [V, d] whose logits are about as wide as a small model's."""

    head: Head
    hidden: Tensor
    old: Tensor
    dpo: Tensor
    ref: Tensor

    @classmethod
    def make(cls, tokens: int, width: int, vocabulary: int, device: str, dtype: torch.dtype) -> "Problem":
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            return torch.randn(rows, width, generator=generator, device=device).mul_(scale)

        old, ref = normal(tokens, 2.0), normal(tokens, 2.0)
        states = [normal(tokens, 0.05).add_(old), old, normal(tokens, 0.2).add_(ref), ref]
        return cls(Head(normal(vocabulary, 0.02).to(dtype)), *(h.to(dtype) for h in states))

    def first(self, tokens: int) -> "Problem":
        return Problem(self.head, *(h[:tokens] for h in (self.hidden, self.old, self.dpo, self.ref)))

    def double(self) -> "Problem":
        states = (h.double() for h in (self.hidden, self.old, self.dpo, self.ref))
        return Problem(Head(self.head.weight.double()), *states)


def naive(objective: str) -> Loss:
    def loss(problem: Problem, hidden: Tensor) -> Tensor:
        weight = problem.head.weight
        logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        with torch.no_grad():
            old, dpo, ref = ((h @ weight.T).to(logits.dtype) for h in (problem.old, problem.dpo, problem.ref))
            advantages = torch.log_softmax(dpo, -1) - torch.log_softmax(ref, -1)
            target = reference.optimal_logits(old, advantages, BETA)
        return {"kld": reference.kld, "lch": reference.lch, "mse": reference.mse}[objective](logits, target).mean()

    return loss


def lco(objective: str) -> Loss:
    def loss(problem: Problem, hidden: Tensor) -> Tensor:
        target = DenseTarget(problem.old, BETA, problem.dpo.float() - problem.ref.float())
        return lco_loss(objective, hidden, problem.head, target)[0]

    return loss


def two_source_kl(problem: Problem, hidden: Tensor) -> Tensor:
    """What the peers compute: KL(softmax(W h_ref) ‖ softmax(W h))."""
    return reference.kld(hidden @ problem.head.weight.T, problem.ref @ problem.head.weight.T).mean()


def trl_loss() -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(problem: Problem, hidden: Tensor) -> Tensor:
        weight = problem.head.weight
        return ChunkedDivergenceFunction.apply(hidden, weight, None, problem.ref, weight, None, 0.0)[0].mean()

    return loss


def liger_loss() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    on_gpu = torch.cuda.is_available()
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=on_gpu)

    def loss(problem: Problem, hidden: Tensor) -> Tensor:
        weight, labels = problem.head.weight, torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        return module(hidden, weight, problem.ref, weight, labels)

    return loss


def floor(products: int) -> Loss:
    def loss(problem: Problem, hidden: Tensor) -> Tensor:
        weight, grad = problem.head.weight, torch.empty_like(hidden)
        with torch.no_grad():
            logits = hidden.new_empty(min(FLOOR_CHUNK, len(hidden)), len(weight))
            for start in range(0, len(hidden), FLOOR_CHUNK):
                h = hidden[start : start + FLOOR_CHUNK]
                for _ in range(products - 1):
                    torch.mm(h, weight.T, out=logits[: len(h)])
                torch.mm(logits[: len(h)], weight, out=grad[start : start + FLOOR_CHUNK])
        return (hidden * grad).sum()

    return loss


def contenders(console: Console | None = None) -> dict[str, tuple[Loss, Loss | None]]:
    """Name -> (loss, what it should equal in float64)."""
    found: dict[str, tuple[Loss, Loss | None]] = {}
    for objective in OBJECTIVES:
        found[f"naive {objective}"] = naive(objective), naive(objective)
    for name, package, make in (("trl kl", "trl", trl_loss), ("liger kl", "liger-kernel", liger_loss)):
        try:
            found[name] = make(), two_source_kl
        except ImportError as error:
            if console:
                console.print(f"{name} is left out: {package} is not installed ({error})")
    for objective in OBJECTIVES:
        found[f"lco {objective}"] = lco(objective), naive(objective)
    return found | {"floor 2": (floor(2), None), "floor 3": (floor(3), None)}


def gradient(loss: Loss, problem: Problem) -> Tensor:
    hidden = problem.hidden.clone().requires_grad_()
    loss(problem, hidden).backward()
    assert hidden.grad is not None
    return hidden.grad


def error(loss: Loss, exact: Loss, problem: Problem) -> float:
    """Relative error of the gradient on the first tokens."""
    problem = problem.first(CHECKED_TOKENS)
    want, got = gradient(exact, problem.double()), gradient(loss, problem).double()
    return ((got - want).norm() / want.norm()).item()


def milliseconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def extra_mib_on_gpu(loss: Loss, problem: Problem) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradient(loss, problem)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - problem.hidden.nbytes) / 2**20


def extra_mib_here(loss: Loss, problem: Problem) -> float:
    """Peak resident memory of one call above what the process held before (Linux)."""
    gradient(loss, problem.first(2))  # load the libraries, make the covariance
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    gradient(loss, problem)
    return (_status("VmHWM") - before) / 2**10 - problem.hidden.nbytes / 2**20


def _status(field: str) -> int:
    """A field of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def extra_mib_in_child(name: str, shape: tuple[int, int, int], options: argparse.Namespace) -> float:
    tokens, width, vocabulary = (str(n) for n in shape)
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        name,
        "--dtype",
        options.dtype,
        "--threads",
        str(options.threads),
    ]
    command += ["--device", "cpu", "--tokens", tokens, "--width", width, "--vocabulary", vocabulary]
    # without a fixed threshold the allocator keeps freed buffers, and the next ones would not be seen
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def measure(shape: tuple[int, int, int], options: argparse.Namespace, console: Console) -> dict[str, dict[str, float]]:
    problem = Problem.make(*shape, options.device, DTYPES[options.dtype])
    entries = contenders(console)
    seconds = milliseconds(functools.partial(row_covariance, problem.head), options.device)
    times: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(options.repeats + 1):
        for name, (loss, _) in entries.items():
            took = milliseconds(lambda: gradient(loss, problem), options.device)  # noqa: B023
            if turn:  # the first turn warms up
                times[name].append(took)
    results = {}
    for name, (loss, exact) in entries.items():
        row = {"ms": statistics.median(times[name])}
        if exact:
            on_gpu = options.device == "cuda"
            row["mib"] = extra_mib_on_gpu(loss, problem) if on_gpu else extra_mib_in_child(name, shape, options)
            row["error"] = error(loss, exact, problem)
        results[name] = row
    results["covariance, once"] = {"ms": seconds}
    return results


def with_ratios(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Adds time and memory relative to the naive loss, and time relative to the floor."""
    for objective, products in (("kld", 3), ("lch", 2), ("mse", 2)):
        ours, other = results[f"lco {objective}"], results[f"naive {objective}"]
        ours["time_to_naive"] = ours["ms"] / other["ms"]
        ours["memory_to_naive"] = ours["mib"] / other["mib"]
        if objective != "mse":
            ours["time_to_floor"] = ours["ms"] / results[f"floor {products}"]["ms"]
    return results


def table(title: str, results: dict[str, dict[str, float]]) -> Table:
    columns = {"ms": "{:,.1f}", "mib": "{:,.0f}", "error": "{:.1e}"}
    columns |= {"time_to_naive": "{:.3f}", "memory_to_naive": "{:.3f}", "time_to_floor": "{:.2f}"}
    headings = ("", "time, ms", "extra memory, MiB", "gradient error", "time ÷ naive", "memory ÷ naive", "time ÷ floor")
    out = Table(*headings, title=title)
    for name, row in results.items():
        out.add_row(name, *(form.format(row[key]) if key in row else "" for key, form in columns.items()))
    return out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the child process of one contender
    options = parser.parse_args()
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    return options


def shapes(options: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    for tokens, width, vocabulary in SHAPES[options.device][: 1 if options.tokens else None]:
        yield options.tokens or tokens, options.width or width, options.vocabulary or vocabulary


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        loss, _ = contenders()[options.memory_of]
        print(extra_mib_here(loss, Problem.make(*next(shapes(options)), "cpu", DTYPES[options.dtype])))
        return
    console, report = Console(), []
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    for shape in shapes(options):
        results = with_ratios(measure(shape, options, console))
        title = "T {:,} · d {:,} · V {:,}".format(*shape) + f" · {options.dtype} · {device} · torch {torch.__version__}"
        console.print(table(title, results))
        report.append({"shape": shape, "dtype": options.dtype, "device": device, "results": results})
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
