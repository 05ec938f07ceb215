"""A GGUF file's weights as an ordinary model folder inside the run, so that everything else loads them as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lco_lite.errors import ModelError, UsageError
from lco_lite.files import write_folder, write_json
from lco_lite.models.loading import unloadable
from lco_lite.recipe import Weights


def converted_gguf(weights: Weights, folder: Path) -> Path | None:
    """``folder`` with the GGUF's weights and tokenizer as an ordinary bfloat16 model, made the first time, whole or not
    at all; None where the weights are no GGUF. Raises UsageError where ``folder`` was made from another one."""
    if weights.gguf_file is None or weights.path is None:
        return None
    origin = {"path": weights.path, "revision": weights.revision, "gguf_file": weights.gguf_file}
    record = folder / "converted_from.json"
    if folder.exists():
        if not record.exists() or json.loads(record.read_text(encoding="utf-8")) != origin:
            raise UsageError(f"{folder}: was converted from another GGUF file: delete it, or choose another --name")
        return folder
    model, tokenizer = _load_gguf(weights)
    with write_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_json(new / record.name, origin)
    return folder


def gguf_tokenizer(weights: Weights) -> Any:
    """The tokenizer inside the GGUF file. Raises ModelError where it cannot be read."""
    return _from_gguf(AutoTokenizer, weights)


def _load_gguf(weights: Weights) -> tuple[Any, Any]:
    tokenizer = gguf_tokenizer(weights)
    model = _from_gguf(AutoModelForCausalLM, weights, dtype=torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now; save_pretrained refuses them with the marks
    model.hf_quantizer = None
    return model, tokenizer


def _from_gguf(kind: Any, weights: Weights, **options: Any) -> Any:
    file = Path(str(weights.path)) / str(weights.gguf_file)
    if file.parent.is_dir() and not file.is_file():
        raise ModelError(f"{file}: no such GGUF file")
    if weights.revision:
        options["revision"] = weights.revision
    try:
        return kind.from_pretrained(weights.path, gguf_file=weights.gguf_file, **options)
    except Exception as e:  # transformers raises many kinds
        raise unloadable("GGUF file", str(file), e) from e
