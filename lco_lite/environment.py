"""What a run was made with: versions, device and memory, the git commit. The same facts that a bug report needs."""

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ["lco-lite", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers"]
PACKAGES += ["safetensors", "gguf", "math-verify", "numpy", "pydantic", "rich", "typer"]


def environment() -> dict[str, Any]:
    """Versions by package (None: not installed), devices (memory in MiB), the commit of the working directory."""
    packages: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**system, "packages": packages, "device": _device(), "git": _git()}


def _device() -> dict[str, Any]:
    import torch

    cpu = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if not torch.cuda.is_available():
        mps = {"mps": "there, for device: mps"} if torch.backends.mps.is_available() else {}
        return {"kind": "cpu", **mps, **cpu}
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    gpus = [{"name": d.name, "memory_mib": d.total_memory >> 20, "capability": f"{d.major}.{d.minor}"} for d in cards]
    return {"kind": "cuda", "cuda": torch.version.cuda, "gpus": gpus, **cpu}


def _git() -> dict[str, Any] | None:
    """None: no git, or the working directory is in no repository."""

    def output(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], stderr=subprocess.DEVNULL, text=True, timeout=10).strip()

    try:
        return {"commit": output("rev-parse", "HEAD"), "changed": bool(output("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
