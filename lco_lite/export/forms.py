"""``lco-lite export``: what a stage made, as a folder for other programs.

    --to adapter      plain PEFT
    --to merged       an ordinary model folder: the base, never in 4 bits, with the adapter added in fp32
    --to gguf         that, by llama.cpp's own converter
    --to gguf-lora    the adapter alone, for a GGUF of its base
    --to ollama       the GGUF with a Modelfile

Each has a model card and is made whole or not at all; ``export.json`` in it says what it was made from.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from lco_lite import __version__
from lco_lite.console import Console
from lco_lite.errors import LcoError, ModelError, UsageError
from lco_lite.evaluation.summary import read_scores
from lco_lite.export import FORMS
from lco_lite.export.card import following, model_card
from lco_lite.export.job import Export, adapter_config
from lco_lite.export.ollama import modelfile
from lco_lite.files import read_json, write_folder, write_json, write_text
from lco_lite.models.language_model import LanguageModel
from lco_lite.models.loading import load_base, load_config
from lco_lite.recipe.file import dump
from lco_lite.run import Run, base_name, no_run
from lco_lite.weights import base_of, named_policy

DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # and what they are called in GGUF
CONVERTERS = {"model": "convert_hf_to_gguf.py", "lora": "convert_lora_to_gguf.py"}
SOURCE = "llama-cpp-python==0.3.36"  # llama.cpp 0c1e570, with which this was tested


def export(
    name: str | None,
    runs: Path,
    form: str,
    policy: str | None,
    out: Path | None,
    dtype: str,
    converter: Path | None,
    push: str | None,
    fresh: bool,
    console: Console,
) -> None:
    """The verb. Raises UsageError for what is not there, cannot be had in this form, or would be overwritten; LcoError
    where the converter or the hub fails."""
    if form not in FORMS:
        raise UsageError(f"export --to {form}: there are {', '.join(FORMS)}")
    accepted = ["auto", *DTYPES, *(["q8_0"] if form != "merged" else [])]
    if dtype not in accepted or (form == "adapter" and dtype != "auto"):
        what = f"one of {', '.join(accepted)}" if form != "adapter" else "none: an adapter is kept as it was trained"
        raise UsageError(f"export --to {form} --dtype {dtype}: {what}")
    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise UsageError(f"export --push {push}: a repository of the hub is needed, OWNER/NAME")
    run = Run.known(name, runs)
    if run is None:
        raise no_run(str(name), runs)
    recipe = run.recipe()
    with run.lock():
        policy = _policy(run, policy)
        stage = run.stage(policy.removesuffix("@best"))
        stage.verify_best() if "@" in policy else stage.verify("adapter", "model")
        out = out or run.path / "export" / f"{policy.replace('@', '-')}-{form}"
        job = Export(
            run, recipe, stage, policy, form, dtype, out, *base_of(run, recipe, stage.name), converter, console
        )
        if job.whole:
            job.folder = job.files.model
        _refuse_form(job, push)
        if _is_made(job, fresh):
            console.note(f"{out}: exported already{_card_anew(job)}")
        else:
            write_whole(job)
    if push is not None:
        push_folder(out, push, console)
    console.done(out, following(job))


def write_whole(job: Export) -> None:
    """The folder in its form, with card and record."""
    write = {"adapter": _adapter, "merged": _merged, "gguf-lora": _gguf_lora, "ollama": _ollama}.get(job.form, _gguf)
    if job.form not in ("adapter", "merged"):
        converter_for(job)  # that there is none is said before hours of work
    read_scores(job.run.path)  # and so is one that is damaged, which the card would have
    with write_folder(job.out) as new:
        write(job, new)
        card = model_card(job, new)
        write_text(new / "README.md", card)
        write_text(new / "training-recipe.yaml", dump(job.recipe))  # recipe.yaml is what makes a folder a run
        record = {**job.made_from(), "run": job.run.name, "lco_lite": __version__, "card": _sum(card)}
        write_json(new / "export.json", record)


def _card_anew(job: Export) -> str:
    """The card of a folder that is made already is as the run is now; one that somebody has written in stays."""
    record, card, new = job.out / "export.json", job.out / "README.md", model_card(job, job.out)
    made = read_json(record, dict[str, str], f"Delete {job.out} and export it again")
    now = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if now == new:
        return ""
    if now and _sum(now) != made.get("card"):
        return "; its README.md has been edited, and stays as it is: the card of now is written where it is deleted"
    write_text(card, new)
    write_json(record, {**made, "card": _sum(new)})
    return "; its README.md is made anew, with the scores that there are now"


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _policy(run: Run, policy: str | None) -> str:
    """As ``weights.named_policy``. Raises UsageError for what no stage has made, and for a step in a checkpoint."""
    name = named_policy(run, policy)
    if name in ("base", "optimal"):
        untrained = policy is None
        told = "nothing is trained yet: `lco-lite run` trains its stages" if untrained else "no stage has made it"
        raise UsageError(f"export: {name} of run {run.name}: {told}")
    if "@" in name and not name.endswith("@best"):
        raise UsageError(f"export: {name} is a checkpoint to go on from; a stage's end or STAGE@best can be exported")
    return name


def _refuse_form(job: Export, push: str | None) -> None:
    if job.whole and job.form in ("adapter", "gguf-lora"):
        raise UsageError(f"export --to {job.form}: {job.policy} trained all weights, there is no adapter: --to merged")
    if push is not None and job.form == "adapter" and job.is_local:
        raise UsageError(f"export --push: the adapter's base is {job.base_path}, which others do not have: --to merged")
    if job.form in ("adapter", "gguf-lora"):
        return
    if (stored := getattr(load_config(job.base, job.folder), "quantization_config", None)) is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise ModelError(
            f"export --to {job.form}: the base {job.base.path} is itself stored quantised ({method}), and nothing is "
            "merged into that: --to adapter, or train on its full-precision original"
        )


def _is_made(job: Export, fresh: bool) -> bool:
    """Whether ``out`` is this very export. Raises UsageError where it is anything else that must not be replaced."""
    out, record = job.out, job.out / "export.json"
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not record.is_file():
        raise UsageError(f"{out} is there already, and export did not make it: choose another --out")
    before, now = read_json(record, dict[str, str], f"Choose another --out, or delete {out}"), job.made_from()
    if fresh:
        return False
    if all(before.get(key) == value for key, value in now.items()):
        return True
    lines = [f"{key}: {before.get(key)} → {value}" for key, value in now.items() if before.get(key) != value]
    listed = "\n  ".join([f"{out} holds another export (then → now):", *lines])
    raise UsageError(f"{listed}\nReplace it with --fresh, or choose another --out.")


# the forms


def _adapter(job: Export, new: Path) -> None:
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(job.files.adapter / file, new / file)
    config = adapter_config(new)
    base = base_name(job.base_path, job.out, job.run.path)
    write_json(new / "adapter_config.json", {**config, "base_model_name_or_path": base})
    job.tokenizer.save_pretrained(new)


def _merged(job: Export, new: Path) -> str:
    """An ordinary model folder; returns its dtype. What ends a response ends it in other programs too."""
    dtype = _dtype(job)
    plain = job.base.model_copy(update={"quantization": "none", "dtype": dtype, "attention": "auto"})
    base, tokenizer, chat = load_base(plain, torch.device("cpu"), job.folder), job.tokenizer, job.chat
    ends = {chat.end}
    if job.whole:
        listed = base.generation_config.eos_token_id
        ends |= {i for i in (listed if isinstance(listed, list) else [listed]) if i is not None}
        model: Any = base
    else:
        opened = LanguageModel(base, tokenizer)
        ends |= opened.eos_ids
        opened.load_adapter("merged", job.files.adapter)
        with job.console.progress(10, f"merge {job.policy}") as line:
            model = opened.merge("merged", lambda done, total: line.update(10 * done // total))
    model.generation_config.eos_token_id = sorted(ends)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    return dtype


def _gguf(job: Export, new: Path) -> Path:
    folder = new / "merged"
    folder.mkdir()
    dtype = _merged(job, folder)
    write_text(folder / "README.md", model_card(job, new))  # its licence goes into the file
    kind = job.dtype if job.dtype == "q8_0" else DTYPES.get(dtype, "f32")
    file = new / f"{job.name}-{kind}.gguf"
    _convert(job, [str(folder), "--outfile", str(file), "--outtype", kind, "--model-name", job.name])
    shutil.rmtree(folder)
    _one_file(job, file)
    return file


def _gguf_lora(job: Export, new: Path) -> None:
    kind = "q8_0" if job.dtype == "q8_0" else DTYPES.get(job.dtype, "f32")
    config = adapter_config(job.files.adapter)
    odd = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if odd:
        raise UsageError(f"export --to gguf-lora: llama.cpp has no {', '.join(odd)} of this adapter: --to gguf")
    about, file = new / "base", new / f"{job.name}-lora-{kind}.gguf"
    about.mkdir()
    load_config(job.base, job.folder).save_pretrained(about)
    job.tokenizer.save_pretrained(about)
    _convert(job, [str(job.files.adapter), "--base", str(about), "--outfile", str(file), "--outtype", kind])
    shutil.rmtree(about)
    _one_file(job, file)


def _ollama(job: Export, new: Path) -> None:
    file = _gguf(job, new)
    write_text(new / "Modelfile", modelfile(job, file))


def _dtype(job: Export) -> str:
    """In which the weights are written unless asked for: as the adapter saw its base (rounded further, a small update
    drowns), or as the whole model lies in the run."""
    if job.dtype in DTYPES:
        return job.dtype
    if job.whole:
        config = load_config(job.base, job.folder)
        return str(config.dtype or config.get_text_config().dtype or torch.float32).removeprefix("torch.")
    if job.base.dtype != "auto":
        return job.base.dtype
    made_on = job.run.made_on()["device"]["kind"]
    return "bfloat16" if job.recipe.device != "cpu" and made_on == "cuda" else "float32"


# llama.cpp's converter


def converter_for(job: Export) -> Path:
    """llama.cpp's own script: of ``--converter`` (a file or its folder), of $LLAMA_CPP, or on the PATH. Raises
    UsageError that says how to get it."""
    script = CONVERTERS["lora" if job.form == "gguf-lora" else "model"]
    named = job.converter or (Path(os.environ["LLAMA_CPP"]) if os.environ.get("LLAMA_CPP") else None)
    if named is not None:
        folder = named.parent if named.is_file() else named
        if named.is_file() and job.form != "gguf-lora":
            return named
        if not (folder / script).is_file():
            raise UsageError(f"{'--converter' if job.converter else '$LLAMA_CPP'}: {folder} has no {script}")
        return folder / script
    if (found := shutil.which(script)) is not None:
        return Path(found).resolve()
    source = SOURCE.replace("==", "-").replace("-", "_", 2)
    raise UsageError(
        f"export --to {job.form}: llama.cpp's {script} is needed, and is neither in $LLAMA_CPP nor on the PATH. No "
        "package installs it; it lies in the source of one:\n"
        f"  pip download --no-deps --no-binary llama-cpp-python {SOURCE} && tar xf {source}.tar.gz\n"
        "  pip install 'lco-lite[export]'\n"
        f"  export LLAMA_CPP=$PWD/{source}/vendor/llama.cpp\n"
        "A checkout of https://github.com/ggml-org/llama.cpp does too; --converter PATH names it for once."
    )


def _convert(job: Export, arguments: Sequence[str]) -> None:
    """Runs it with this Python. Raises LcoError with its last words where it fails."""
    script, tail = converter_for(job), list[str]()
    words = [sys.executable, str(script), *arguments]
    with (
        job.console.progress(10, script.name) as line,
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for text in process.stdout:  # its bars end in \r, which ends a line here
            if percent := re.match(r"\s*Writing:\s+(\d+)%", text):
                line.update(int(percent[1]) // 10)
            elif text.strip():
                tail = [*tail[-7:], text.rstrip()]
    if process.returncode:
        lacking = re.search(r"No module named '(\w+)'", tail[-1] if tail else "")
        hint = "\nIt needs more packages: pip install 'lco-lite[export]'" if lacking else ""
        traces = any(line.startswith("Traceback (") for line in tail)
        listed = "\n  ".join(tail[-1:] if traces else tail)
        raise LcoError(f"{script} failed with status {process.returncode}:\n  {listed}{hint}")


def _one_file(job: Export, file: Path) -> None:
    if not file.is_file():
        raise LcoError(f"{converter_for(job)} ended well and wrote no {file.name}: is it llama.cpp's?")


# the hub


def push_folder(folder: Path, repository: str, console: Console) -> None:
    """Uploads it to ``OWNER/NAME``, which is made, private, where it is not there. Raises LcoError where the hub
    refuses or cannot be reached."""
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        url = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"lco-lite export: {folder.name}"
        )
    except Exception as e:  # the client raises its own kinds, and those of the HTTP library that it uses
        reason = " ".join(str(e).split())[:400]
        raise LcoError(f"--push {repository}: {type(e).__name__}: {reason}\n{folder} is complete; push it again") from e
    console.note(f"pushed: {url}")
