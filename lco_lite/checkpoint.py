"""Checkpoints without pickle: tensors in safetensors, the rest in JSON, every random state included.

``checkpoints/step-00000100/`` holds ``tensors.safetensors`` (what the stage trains), ``optimizer.safetensors`` (its
state and the random states) and ``state.json`` (step, positions in the data, sha256 of both). A stage resumed from
one ends with the same weights as one that was never stopped, bit for bit on a CPU.
"""

import contextlib
import hashlib
import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from lco_lite import ranks
from lco_lite.errors import Diverged, UsageError
from lco_lite.files import remove, sha256, write_folder, write_json
from lco_lite.finite import not_finite_in

FORMAT = 1
TENSORS, OPTIMIZER = "tensors.safetensors", "optimizer.safetensors"
_DAMAGED = (OSError, ValueError, LookupError, TypeError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """What the stage saved: ``step`` updates done, its ``tensors`` by name, and its own JSON ``state``."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


@ranks.once
def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], optimizer: Optimizer | None, state: dict[str, Any]
) -> Path:
    """Writes ``folder/step-N`` whole, prunes all but the newest two, and returns its path.

    Tensors may live anywhere and share memory. ``state`` is nested JSON (data positions, scheduler, counters). Raises
    Diverged where a number of them, or of the optimizer, is not finite, LcoError on a full disk, UsageError without
    permission; the checkpoints before stay as they were.
    """
    rng_tensors, rng = capture_rng()
    optimizer_tensors: dict[str, Tensor] = {}
    tree = None if optimizer is None else pack(optimizer.state_dict(), optimizer_tensors, "optimizer")
    path = folder / f"step-{step:08d}"
    if (name := not_finite_in({**tensors, **optimizer_tensors})) is not None:
        raise Diverged(f"after step {step} {name} is not finite: no checkpoint is made of it")
    with write_folder(path) as new:
        for name, saved in ((TENSORS, tensors), (OPTIMIZER, optimizer_tensors | rng_tensors)):
            # copies: safetensors refuses tensors that share memory
            own = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in saved.items()}
            save_file(own, new / name)
        sums = {name: sha256(new / name) for name in (TENSORS, OPTIMIZER)}
        content = {"format": FORMAT, "step": step, "state": state, "optimizer": tree, "rng": rng, "sha256": sums}
        write_json(new / "state.json", {"sha256": _digest(content), "content": content})
    # those after it were damaged when the stage went back before them; left there they would be tried again
    made = checkpoints(folder)
    kept = made[: made.index(path) + 1][-2:]
    for other in set(made).difference(kept):
        remove(other)
    return path


def load_latest(
    folder: Path,
    optimizer: Optimizer | None = None,
    device: torch.device | str = "cpu",
    owner: str | None = None,
    like: Mapping[str, Tensor] | None = None,
) -> Checkpoint | None:
    """The newest checkpoint, tensors on ``device``; puts ``optimizer`` and all random states back. None: none was made.

    Call it last before the loop: whatever draws random numbers in between would move the states on. A damaged
    checkpoint is named in a warning and the one before is taken; UsageError when all are damaged. ``owner``, ``like``:
    see ``load_checkpoint``.
    """
    paths, damaged = checkpoints(folder), list[str]()
    for path in reversed(paths):
        try:
            content, tensors, extra = _read(path, device)
        except _DAMAGED as e:
            damaged.append(f"{path.name}: {e}")
            warnings.warn(f"checkpoint {path} is damaged ({e}): going back to the one before", stacklevel=2)
            continue
        _refuse_strange(path, content["state"], tensors, owner, like)
        if optimizer is not None:
            if content["optimizer"] is None:
                raise UsageError(f"checkpoint {path} holds no optimizer state")
            optimizer.load_state_dict(unpack(content["optimizer"], extra))
        restore_rng(extra, content["rng"])
        for older in paths[:-2] if path == paths[-1] else ():  # a kill came between a save and this removal
            remove(older)
        return Checkpoint(path, content["step"], tensors, content["state"])
    if paths:
        why = "; ".join(damaged)
        raise UsageError(f"every checkpoint under {folder} is damaged ({why}): --fresh starts this stage again")
    return None


def load_checkpoint(
    path: Path, device: torch.device | str, owner: str | None, like: Mapping[str, Tensor]
) -> Checkpoint:
    """The weights of one checkpoint, tensors on ``device``; no random state is touched. UsageError where it is damaged,
    is of another ``owner`` than this stage, or has not the tensors that ``like`` has by name and shape."""
    try:
        content, tensors, _ = _read(path, device)
    except _DAMAGED as e:
        raise UsageError(f"checkpoint {path} is damaged ({e})") from e
    _refuse_strange(path, content["state"], tensors, owner, like)
    return Checkpoint(path, content["step"], tensors, content["state"])


def checkpoint_id(path: Path) -> str:
    """Of its weights: another wherever they differ. UsageError where it is damaged."""
    try:
        return str(_content(path)["sha256"][TENSORS])[:12]
    except _DAMAGED as e:
        raise UsageError(f"checkpoint {path} is damaged ({e})") from e


def _refuse_strange(
    path: Path,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    owner: str | None,
    like: Mapping[str, Tensor] | None,
) -> None:
    """UsageError for a checkpoint that another stage made."""
    remedy = "move it away, or start this stage again with --fresh"
    if (whose := state.get("owner")) != owner:
        found, accepted = whose or "one of an older version", owner or "those of an older version"
        raise UsageError(f"checkpoint {path}: found that of {found}, accepted is that of {accepted}: {remedy}")
    for name, tensor in (like or {}).items():
        found = list(tensors[name].shape) if name in tensors else "nothing"
        if found != list(tensor.shape):
            accepted = f"{list(tensor.shape)} is accepted"
            raise UsageError(f"checkpoint {path}: found {found} for {name}, {accepted}: {remedy}")


def newest_good(folder: Path) -> Path | None:
    """The checkpoint that ``load_latest`` would take: the newest that is whole, and finite."""
    for path in reversed(checkpoints(folder)):
        with contextlib.suppress(*_DAMAGED):
            _read(path, "cpu")
            return path
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def seed_rng(seed: int) -> None:
    """Python, numpy and torch draw from ``seed`` on, whatever was drawn in this process before."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The random states of Python, numpy, torch on the CPU and on every CUDA device, as tensors and JSON."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    tensors = {"rng.torch": torch.get_rng_state(), **{f"rng.cuda.{i}": state for i, state in enumerate(on_gpus)}}
    kind, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"python": pack(random.getstate(), {}, "python"), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def restore_rng(tensors: dict[str, Tensor], states: dict[str, Any]) -> None:
    """Puts back what ``capture_rng`` took; CUDA devices that are absent now are passed over."""
    random.setstate(unpack(states["python"], {}))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(tensors["rng.torch"].cpu())
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"].cpu(), i)


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """``value`` as JSON, its tensors put into ``tensors`` under names that start with ``name``; see ``unpack``.

    Tuples, numbers, None and dicts with any scalar keys come back as they were. Raises TypeError on anything else.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, pack(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    if isinstance(value, float):
        return {"float": value.hex()}  # exact, and JSON has no infinities
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved in a checkpoint")


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that ``pack`` took apart. Raises KeyError where a tensor is missing."""
    if not isinstance(packed, dict):
        return packed
    ((kind, inner),) = packed.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {k: unpack(v, tensors) for k, v in inner}
    if kind == "float":
        return float.fromhex(inner)
    return {"list": list, "tuple": tuple}[kind](unpack(v, tensors) for v in inner)


def _read(path: Path, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    content = _content(path)
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
    for name, expected in content["sha256"].items():
        if sha256(path / name) != expected:
            raise ValueError(f"{name} is not what was written")
    # optimizer and random states stay on the CPU: load_state_dict moves each where its parameter is
    tensors, extra = load_file(path / TENSORS, str(device)), load_file(path / OPTIMIZER)
    if (name := not_finite_in({**tensors, **extra})) is not None:
        raise ValueError(f"{name} is not finite")
    return content, tensors, extra


def _content(path: Path) -> dict[str, Any]:
    try:
        file = json.loads((path / "state.json").read_bytes())
        content, written = dict(file["content"]), file["sha256"]
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise ValueError(f"state.json is not what was written: {e}") from e
    if _digest(content) != written:
        raise ValueError("state.json is not what was written")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
