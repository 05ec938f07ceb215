"""The model card: what it is, how it is served, its scores, data, licence and recipe, from the run's own files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from huggingface_hub import hf_hub_download

from lco_lite.evaluation.summary import read_scores
from lco_lite.export.job import Export, adapter_config
from lco_lite.recipe.file import dump_short, write_yaml
from lco_lite.weights import policy_id


def model_card(job: Export, folder: Path) -> str:
    """README.md: what it is, how it is used, what was scored, and what the recipe sets; from the run's files alone, but
    for the licence, which is the base's."""
    recipe, run, stage = job.recipe, job.run, job.stage
    on_hub, base = not job.is_local, _base_title(job)
    licence = licence_of(job)
    front: dict[str, Any] = {"library_name": "peft" if job.form == "adapter" else "transformers"}
    front |= {"base_model": base} if on_hub else {}
    front |= {"license": licence} if licence else {}
    front |= {"pipeline_tag": "text-generation", "tags": ["lco-lite", *(["lora"] if job.form == "adapter" else [])]}
    ended = (stage.record("done.json") or {"finished": "not yet"})["finished"]
    versions = run.made_on()["packages"]
    with_ = ", ".join(f"{k} {versions[k]}" for k in ("lco-lite", "torch", "transformers", "peft") if versions.get(k))
    what = {"adapter": "A LoRA adapter (PEFT)", "gguf-lora": "A LoRA adapter as GGUF"}.get(job.form, "A language model")
    how = "all weights" if job.whole else "a LoRA adapter"
    if job.form not in ("adapter", "gguf-lora") and not job.whole:
        of = f" (dequantised from {job.base.gguf_file})" if job.base.gguf_file else ""
        how += f", merged in fp32 into the unquantised base{of}"
    sections = [
        f"---\n{write_yaml(front)}---\n\n# {job.name}",
        f"{what}, trained from {base} with lco-lite: policy `{job.policy}` of run `{run.name}` ({how}); finished "
        f"{ended}, with {with_ or 'versions unknown'}.",
    ]
    if job.base.quantization != "none" and not job.whole:
        sections.append(
            f"It was trained, and scored below, on its base in {job.base.quantization}. On the full-precision base it "
            "answers otherwise: score it again where it will run."
        )
    sections += ["## Use\n\n" + _usage(job, folder), "## Scores\n\n" + _scores(job), "## Data\n\n" + _sources(job)]
    sections.append(
        "## Licence\n\n"
        + (
            f"The base's licence ({licence}) holds for what is made from it."
            if licence
            else f"The licence of {base} holds for what is made from it; it is not stated beside these weights."
        )
    )
    told = "What differs from the defaults; `training-recipe.yaml` has every setting."
    sections.append(f"## Recipe\n\n{told}\n\n```yaml\n{dump_short(recipe)}```")
    return "\n\n".join(sections) + "\n"


def _usage(job: Export, folder: Path) -> str:
    """Commands and, for Python, the call; what the model was asked with."""
    lines = [f"```sh\n{following(job, folder)}\n```"]
    if job.form in ("adapter", "merged"):
        lines.insert(0, f"```python\n{_snippet(job)}\n```")
    elif job.form != "gguf-lora":
        lines.append("In 4 bits, with llama.cpp's own tool: `llama-quantize FILE.gguf OUT.gguf Q4_K_M`.")
    s = job.recipe.eval
    asked = f"The recipe samples answers with temperature {s.temperature} and top_p {s.top_p}"
    lines.append(asked + (f"; asked with the system message\n\n> {_indented(job.system)}" if job.system else "."))
    if job.recipe.chat.template_args:
        lines.append(
            f"Arguments of its chat template: `{json.dumps(job.recipe.chat.template_args, ensure_ascii=False)}`."
        )
    return "\n\n".join(lines)


def _snippet(job: Export) -> str:
    """Python that runs as it stands: it asks the model as the recipe does."""
    settings, out, adapts = job.recipe.eval, str(job.out), job.form == "adapter"
    messages = [{"role": "system", "content": job.system}] if job.system else []
    messages.append({"role": "user", "content": "What is 12 + 34?"})
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens or 512, "do_sample": settings.temperature > 0}
    if settings.temperature:
        options |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    if adapts:
        options["eos_token_id"] = job.chat.end
    template = "".join(f", {name}={value!r}" for name, value in job.recipe.chat.template_args.items())
    lines = [
        *(["from peft import PeftModel"] if adapts else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained({job.base_path if adapts else out!r}, dtype="auto")',
        *([f"model = PeftModel.from_pretrained(model, {out!r})"] if adapts else []),
        f"tokenizer = AutoTokenizer.from_pretrained({out!r})",
        f"messages = {messages!r}",
        "prompt = tokenizer.apply_chat_template(",
        f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{template}',
        ")",
        f"answer = model.generate(**prompt, {', '.join(f'{name}={value!r}' for name, value in options.items())})",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _scores(job: Export) -> str:
    """A row a score, before and after: of the base, of sft, and of this policy, as they are now."""
    rows, made_by = list[list[Any]](), {"base": "base", job.policy: policy_id(job.run, job.policy)}
    if job.run.stage("sft").is_done():
        made_by["sft"] = policy_id(job.run, "sft")
    order = ["base", "sft", job.policy]
    scores = [score for score in read_scores(job.run.path).values() if score["stage"] in made_by]
    for score in sorted(scores, key=lambda score: (score["task"], order.index(score["stage"]))):
        settings = score["settings"]
        if score["stage"] == "base" or settings["made_by"] == made_by[score["stage"]]:
            spread = f" ± {score['std']:.4f}" if score["std"] is not None else ""
            temperature = settings["sampling"]["temperature"] or "greedy"
            mean = f"{score['mean']:.4f}{spread}"
            rows.append([score["task"], score["stage"], score["metric"], mean, score["n"], score["seeds"], temperature])
    if not rows:
        return f"None yet: `lco-lite eval --name {job.run.name} --policy {job.policy}`."
    without = [name for name in ("base", job.policy) if name not in {row[1] for row in rows}]
    asked = [f"`lco-lite eval --name {job.run.name} --policy {name}`" for name in without]
    lacking = f"\n\nNot scored: {', '.join(without)} ({', '.join(asked)})." if without else ""
    head = ["task", "stage", "metric", "mean ± std over seeds", "items", "seeds", "temperature"]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]) + lacking


def _sources(job: Export) -> str:
    """What the stage was trained on, and those before it that it was started on."""
    recipe, data, stages = job.recipe, job.recipe.data, [*job.stage.upstream(), job.stage.name]
    own = f"those of task `{recipe.task}`" + (f", from `{data.task}`" if data.task else "")
    lines = list[str]()
    if "sft" in stages:
        more = "".join(f", and those of task `{name}`" for name in recipe.sft.more_tasks)
        lines.append(f"demonstrations: {f'`{data.demonstrations}`' if data.demonstrations else own}{more}")
    if "rm" in stages:
        sampled = f"the policy's own responses to prompts, {own}"
        lines.append(f"preference pairs: {sampled if data.preferences == 'sampled' else f'`{data.preferences}`'}")
    if any(name.startswith("rl-") for name in stages):
        lines.append(f"prompts: {f'`{data.prompts}`' if data.prompts else own}")
    most = f", {recipe.sft.examples or 'all'} demonstrations at most" if "sft" in stages else ""
    return "\n".join(f"- {line}" for line in [*lines, f"seed {recipe.seed}{most}"])


def licence_of(job: Export) -> str | None:
    """Of the base: what its model card or GGUF file states, on disk or on the hub; None where neither can be had."""
    if job.base.gguf_file is not None and (file := Path(str(job.base.path)) / job.base.gguf_file).is_file():
        field = GGUFReader(file).get_field("general.license")
        return None if field is None else str(field.contents())
    if job.base.path is None:
        return None
    card = Path(job.base.path) / "README.md"
    try:
        if not Path(job.base.path).is_dir():
            card = Path(hf_hub_download(job.base.path, "README.md", revision=job.base.revision))
        found = re.search(r"\A---\n.*?^license: *([\w.-]+) *$.*?^---", card.read_text(encoding="utf-8"), re.M | re.S)
    except Exception:  # no card, or no network, of which each HTTP library has its own: the card says so
        return None
    return found and found[1]


def _base_title(job: Export) -> str:
    if job.base.path is None:
        return "a model from scratch"
    return (job.base.gguf_file or Path(job.base.path).name) if job.is_local else job.base.path


def _indented(text: str) -> str:
    return text.replace("\n", "\n> ")


def following(job: Export, folder: Path | None = None) -> str:
    """The command that serves what was made, which lies in ``out`` (while it is made, in ``folder``)."""
    out = job.out
    base = job.base_path
    gguf = out / next((file.name for file in sorted((folder or out).glob("*.gguf"))), f"{job.name}.gguf")
    if job.form == "adapter":
        rank = adapter_config(folder or out)["r"]
        room = next((r for r in (8, 16, 32, 64, 128, 256) if r >= rank), 512)  # those that vLLM takes
        words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(room)]
        words += ["--tokenizer", str(out), "--lora-modules", f"{job.name}={out}"]
    elif job.form == "merged":
        words = ["vllm", "serve", str(out), "--served-model-name", job.name]
    elif job.form == "gguf-lora":
        own = Path(str(job.base.path)) / str(job.base.gguf_file)
        words = ["llama-server", "-m", str(own) if own.is_file() else "BASE.gguf", "--lora", str(gguf)]
    elif job.form == "gguf":
        words = ["llama-server", "-m", str(gguf)]
    else:
        words = ["ollama", "create", job.name.lower(), "-f", str(out / "Modelfile")]
    return shlex.join(words)
