"""What a stage made leaves its run in every form: the same weights, a card, and nothing half-written."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lco_lite import weights
from lco_lite.command import command
from lco_lite.console import Console
from lco_lite.context import Context
from lco_lite.errors import LcoError, ModelError, UsageError
from lco_lite.export import forms
from lco_lite.export.card import _sources
from lco_lite.export.forms import export
from lco_lite.export.ollama import ollama_template
from lco_lite.models.chat import PLAIN_TEMPLATE, ChatFormat
from lco_lite.models.loading import byte_tokenizer
from lco_lite.recipe.file import load_recipe, validate
from lco_lite.run import Run, stage_settings
from tests.conftest import TINY
from tests.models.families import save

IDS = torch.tensor([[10, 20, 30, 40, 50]])
CONVERTER = Path(__file__).with_name("convert_hf_to_gguf.py")


def trained(root: Path, name: str, sets: list[str], base: str = "llama") -> Run:
    """A run whose sft is done: weights moved at random, in the files that training leaves."""
    (root / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "chat": {"system": "Add."}}))
    folder = root / "weights"
    if not folder.exists():
        save(base, folder)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    recipe = load_recipe(root / "tiny.yaml", [f"model={{path: {folder}, lora: {{r: 2}}}}", *sets])
    run = Run.open(root / "runs", name)
    ctx = Context(run, recipe, Console(quiet=True), torch.device("cpu"))
    run.write_recipe(recipe)
    stage = run.stage("sft")
    stage.begin(stage_settings(recipe, "sft"), {})
    role = weights.open_sft(ctx)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in weights.trainable(ctx, role, "sft"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights.save(role, stage, {})
    stage.finish({})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("export"), "tiny", [])


def made(run: Run, form: str = "merged", **options) -> tuple[Path, str]:
    """(the folder, the last line on stdout)"""
    said = io.StringIO()
    given = {"policy": None, "out": None, "dtype": "auto", "converter": None, "push": None, "fresh": False} | options
    export(run.name, run.path.parent, form, console=Console(quiet=True, stdout=said), **given)
    return given["out"] or run.path / "export" / f"sft-{form}", said.getvalue().splitlines()[-1]


def logits(folder: Path, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model(IDS).logits


def adapted(run: Run) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(run.path.parents[1] / "weights", dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, run.stage("sft").adapter)(IDS).logits


def test_a_merged_folder_answers_as_the_adapter_does_and_is_rounded_once_if_asked(run, tmp_path):
    folder, line = made(run)
    torch.testing.assert_close(logits(folder), adapted(run), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(folder), logits(run.path.parents[1] / "weights"), atol=0.1)
    assert line == f"{folder}  next: vllm serve {folder} --served-model-name tiny-sft"
    narrow, _ = made(run, out=tmp_path / "narrow", dtype="bfloat16")
    written, wide = (AutoModelForCausalLM.from_pretrained(one, dtype="auto") for one in (narrow, folder))
    assert (written.dtype, wide.dtype) == (torch.bfloat16, torch.float32), "it was trained on a CPU, in float32"
    for (name, ours), exactly in zip(written.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(ours, exactly.bfloat16()), f"{name} is rounded once, from fp32"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert written.generation_config.eos_token_id == [3]


def test_what_was_trained_on_4_bits_is_merged_into_the_unquantised_base_and_tied_embeddings_stay_tied(tmp_path):
    run = trained(tmp_path, "tiny", ["model.quantization=nf4"], base="llama3.2")
    folder, _ = made(run)
    base, merged = (load_file(one / "model.safetensors") for one in (tmp_path / "weights", folder))
    kept = [name for name in base if "proj" not in name]
    assert "lm_head.weight" not in merged and all(torch.equal(base[name].float(), merged[name]) for name in kept)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (logits(folder) - adapted(run)).abs().max() < 0.05 * adapted(run).abs().max()
    assert "on its base in nf4" in (folder / "README.md").read_text()


def test_the_whole_model_of_a_full_fine_tuning_is_exported_and_has_no_adapter(tmp_path):
    run = trained(tmp_path, "tiny", ["model.lora=null"])
    folder, _ = made(run)
    torch.testing.assert_close(logits(folder), logits(run.stage("sft").model))
    with pytest.raises(UsageError, match="trained all weights.*--to merged"):
        made(run, "adapter")


def test_an_exported_adapter_loads_with_plain_peft_and_has_tokenizer_template_and_card(run, tmp_path):
    folder, line = made(run, "adapter", out=tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((run.path.parents[1] / "weights").resolve())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, folder)(IDS).logits, adapted(run))
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert "vllm serve" in line and "--enable-lora --max-lora-rank 8" in line


def test_a_run_can_be_moved_and_its_adapters_load_by_us_and_by_plain_peft(tmp_path):
    inside = tmp_path / "runs/tiny/base"
    save("llama", inside)
    run = trained(tmp_path, "tiny", [f"model.path={inside}"])
    adapter = run.stage("sft").adapter
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "../../base"
    assert AutoTokenizer.from_pretrained(adapter).chat_template == byte_tokenizer(8).chat_template
    shutil.move(run.path, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere/sft/adapter"
    with command(None, tmp_path / "scores", None, [], {}, quiet=True, model=str(moved), tasks=["arithmetic"]) as ctx:
        assert ctx.recipe.model.path == str(tmp_path / "elsewhere/base")
        role = weights.open_stage(ctx, "base")
        with torch.no_grad(), role.model.use(role.adapter):
            ours = role.model.base(IDS).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere/base", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(base, moved)(IDS).logits, ours)


def test_a_gguf_reads_back_equal_within_its_rounding_and_a_modelfile_says_how_the_model_is_asked(run):
    folder, line = made(run, "ollama", dtype="float16", converter=CONVERTER)
    file = folder / "tiny-sft-f16.gguf"
    merged, _ = made(run)
    torch.testing.assert_close(logits(folder, gguf_file=file.name), logits(merged), atol=0.02, rtol=0.01)
    text = (folder / "Modelfile").read_text()
    assert "FROM ./tiny-sft-f16.gguf\n" in text and 'SYSTEM """Add."""' in text
    assert 'PARAMETER stop "<|end|>"' in text and "PARAMETER temperature 0.6\n" in text and "top_k 0\n" in text
    assert "{{ if .System }}{{ .System }}<|user|>{{ else }}<|user|>{{ end }}" in text
    assert line.endswith(f"next: ollama create tiny-sft -f {folder}/Modelfile")
    assert sorted(p.name for p in folder.iterdir()) == [
        "Modelfile",
        "README.md",
        "export.json",
        file.name,
        "training-recipe.yaml",
    ]


def test_an_adapter_as_gguf_has_its_matrices(run):
    folder, line = made(run, "gguf-lora", converter=CONVERTER.parent)
    tensors = GGUFReader(folder / "tiny-sft-lora-f32.gguf").tensors
    assert {t.name for t in tensors} >= {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"}
    assert "llama-server -m BASE.gguf --lora" in line


def test_a_missing_converter_says_exactly_how_to_get_it(run, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="(?s)pip download .*llama-cpp-python==.*LLAMA_CPP=.*--converter PATH") as e:
        made(run, "gguf")
    assert e.value.exit_code == 2 and not (run.path / "export/sft-gguf").exists()
    monkeypatch.setenv("LLAMA_CPP", str(run.path))
    with pytest.raises(UsageError, match=r"\$LLAMA_CPP: .* has no convert_hf_to_gguf.py"):
        made(run, "gguf")


def test_a_converter_that_fails_is_quoted_and_leaves_nothing(run, tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").write_text("import no_such_thing")
    with pytest.raises(LcoError, match=r"(?s)failed with status 1.*no_such_thing.*lco-lite\[export\]") as e:
        made(run, "gguf", out=tmp_path / "here/out", converter=tmp_path)
    assert e.value.exit_code == 1 and "Traceback" not in str(e.value)
    assert list((tmp_path / "here").iterdir()) == []


def test_only_its_own_folder_is_replaced_and_only_if_asked(run, tmp_path, monkeypatch):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(UsageError, match="export did not make it"):
            made(run, "adapter", out=out, fresh=fresh)
    assert (out / "thesis.txt").read_text() == "years of work"
    folder, _ = made(run, "adapter", out=tmp_path / "out")
    written = (folder / "export.json").stat().st_mtime_ns
    made(run, "adapter", out=folder)
    assert (folder / "export.json").stat().st_mtime_ns == written, "made already"
    card = folder / "README.md"
    now = card.read_text()
    with monkeypatch.context() as patch:  # it has been scored since
        patch.setattr(forms, "model_card", lambda job, folder: f"{now}scored: 0.5")
        made(run, "adapter", out=folder)
        assert card.read_text() == f"{now}scored: 0.5"
    card.write_text("by hand")
    made(run, "adapter", out=folder)
    assert card.read_text() == "by hand"
    card.unlink()
    made(run, "adapter", out=folder)
    assert card.read_text() == now
    with pytest.raises(UsageError, match="(?s)form: adapter → merged.*--fresh"):
        made(run, out=folder)
    made(run, out=folder, fresh=True)
    assert (folder / "config.json").exists() and not (folder / "adapter_config.json").exists()


def test_the_card_has_the_runs_own_scores_recipe_data_and_the_licence_of_the_base(run):
    stage = run.stage("sft")
    told = {"mean": 0.4125, "std": 0.01, "stderr": 0.05}
    score = {"task": "arithmetic", "stage": "sft", "metric": "pass@1", **told, "metrics": {"pass@1": told}}
    score |= {"n": 80, "seeds": 4}
    settings = {"made_by": stage.id(), "sampling": {"temperature": 0.6}, "protocol": {}, "items": "i"}
    (run.path / "eval").mkdir(exist_ok=True)
    file = run.eval_path("arithmetic", "sft")
    file.write_text(json.dumps(score | {"settings": settings}))
    before = score | {"stage": "base", "mean": 0.25, "settings": {**settings, "made_by": "base weights"}}
    run.eval_path("arithmetic", "base").write_text(json.dumps(before))
    stale = score | {"mean": 0.9, "settings": {**settings, "made_by": "an earlier training"}}
    run.eval_path("math500", "sft").write_text(json.dumps(stale))
    folder, _ = made(run, fresh=True)
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and "base_model" not in front, "a folder here is no model of the hub"
    assert "| arithmetic | sft | pass@1 | 0.4125 ± 0.0100 | 80 | 4 | 0.6 |" in card and "0.9000" not in card
    assert f"vllm serve {folder}" in card and "> Add." in card and "those of task `arithmetic`" in card
    rows = [line.split(" | ")[1:4] for line in card.splitlines() if line.startswith("| arithmetic")]
    assert rows == [["base", "pass@1", "0.2500 ± 0.0100"], ["sft", "pass@1", "0.4125 ± 0.0100"]], "before, and after"
    assert load_recipe(folder / "training-recipe.yaml") == run.recipe()
    assert Run.known(str(folder), run.path.parent) is None, "it is a model, and no run"
    short = card.split("```yaml")[1].split("```")[0]
    assert validate(yaml.safe_load(short), "card") == run.recipe() and len(short.splitlines()) < 70


@pytest.mark.parametrize(
    ("stage", "upstream", "sets", "lines"),
    [
        ("sft", [], [], ["demonstrations: those of task `arithmetic`", "seed 0, "]),
        ("rl-kld", [], ["model={path: base}", "sft.enabled=false"], ["prompts: those of task `arithmetic`", "seed 0"]),
        (
            "rl-kld",
            ["sft", "rm"],
            ["task=custom", "data.task=own.jsonl", "data.demonstrations=shown.jsonl", "data.prompts=asked.jsonl"],
            [
                "demonstrations: `shown.jsonl`",
                "preference pairs: the policy's own responses to prompts, those of task `custom`, from `own.jsonl`",
                "prompts: `asked.jsonl`",
                "seed 0, ",
            ],
        ),
    ],
)
def test_the_card_has_the_data_of_the_stage_and_of_those_before_it_alone(tiny, tmp_path, stage, upstream, sets, lines):
    recipe = load_recipe(tiny, sets)
    run = Run.open(tmp_path, "r")
    folder = run.stage(stage)
    folder.begin(stage_settings(recipe, stage), dict.fromkeys(upstream, "id"))
    told = _sources(SimpleNamespace(recipe=recipe, stage=folder)).splitlines()
    assert len(told) == len(lines) and all(map(str.startswith, told, [f"- {line}" for line in lines])), told


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_the_cards_python_runs_as_it_stands_on_the_folder_that_vllm_serves(run, tmp_path, form, capsys):
    folder, line = made(run, form, out=tmp_path / "out it")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f"from_pretrained({str(folder)!r}" in code and "do_sample=True, temperature=0.6, top_p=0.95, top_k=0" in code
    assert shlex.quote(str(folder)) in line or f"'tiny-sft={folder}'" in line
    exec(compile(code, "card", "exec"), {})
    assert "'role': 'system', 'content': 'Add.'" in code and capsys.readouterr().out.endswith("\n")


class Hub(BaseHTTPRequestHandler):
    """What an upload asks the hub for; keeps what it was given."""

    given: list[tuple[str, bytes]] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.given.append((self.path, body))
        url = f"http://{self.headers['Host']}/me/it"
        answer: dict[str, Any] = {"url": url, "commitUrl": f"{url}/commit/1", "commitOid": "1"}
        if "/preupload/" in self.path:
            answer = {
                "files": [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            }
        self._send(json.dumps(answer).encode())

    def do_GET(self):
        self.given.append((self.path, b""))
        self._send(b"{}")

    def _send(self, body: bytes):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_the_hub_is_asked_for_nothing_unless_named_and_then_gets_a_private_repository(run, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        folder, _ = made(run, fresh=True)
        assert Hub.given == []
        made(run, push="me/it")
        server.shutdown()
    asked = dict(Hub.given)
    created = json.loads(asked["/api/repos/create"])
    assert created.get("visibility") == "private" or created.get("private") is True  # newer and older clients
    (commit,) = (body for path, body in Hub.given if "/commit/" in path)
    sent = {json.loads(line)["value"].get("path") for line in commit.splitlines()}
    assert sent >= {file.name for file in folder.iterdir()}
    with pytest.raises(LcoError, match="(?s)--push me/it: .*is complete"):
        made(run, push="me/it")


def test_what_cannot_be_exported_is_refused_in_one_message(run):
    for options, message in {
        ("onnx",): "there are adapter, merged",
        ("merged", "policy", "rl-kld"): "has no weights of that name; there are: base, sft",
        ("merged", "dtype", "q4"): "one of auto, float32",
        ("adapter", "push", "me/it"): "others do not have: --to merged",
        ("merged", "push", "it"): "OWNER/NAME",
    }.items():
        form, *rest = options
        with pytest.raises(UsageError, match=message):
            made(run, form, **dict(zip(rest[::2], rest[1::2], strict=True)))


CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (first if loop.first else '') + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + GEMMA
BRACES = "{% for m in messages %}{{ '{{' + m.role + '}} ' + m.content }}{% endfor %}{{ '{{a}}' }}"
THINKS = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
TALK = [{"role": r, "content": c} for r, c in [("user", "2+2?"), ("assistant", "4"), ("user", "sure?")]]


def gone_through(template: str, system: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of ``template``, as far as export writes that language."""
    pieces = re.split(r"(\{\{ .*? \}\})", template)
    out: list[str] = []

    def run_from(i: int, on: bool, turn: dict[str, str], last: bool) -> int:
        while i < len(pieces):
            word = pieces[i][3:-3] if i % 2 else None
            if word is None:
                out.extend([pieces[i]] if on else [])
            elif word.startswith("range"):
                end = i
                for k, m in enumerate(messages):
                    end = run_from(i + 1, on, m, k == len(messages) - 1)
                i = end
            elif word.startswith("if"):
                taken = False
                while True:
                    asked = re.search(r'eq \.Role "(\w+)"', word)
                    holds = {"if .System": bool(system), "if $last": last, "if not $last": not last, "else": True}
                    true = turn["role"] == asked[1] if asked else holds[word]
                    i = run_from(i + 1, on and true and not taken, turn, last)
                    taken, word = taken or true, pieces[i][3:-3]
                    if word == "end":
                        break
            elif word == "end" or word.startswith("else"):
                return i
            elif on and not word.startswith("$last"):
                out.append({".System": system, ".Content": turn.get("content", "")}.get(word) or json.loads(word))
            i += 1
        return i

    run_from(0, True, {}, False)
    return "".join(out)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, NO_SYSTEM, BRACES, THINKS, PLAIN_TEMPLATE])
def test_ollamas_template_writes_what_the_models_own_does(template):
    tokenizer = byte_tokenizer(128)
    tokenizer.chat_template, tokenizer.bos_token = template, "<|user|>"
    chat = ChatFormat(tokenizer)
    go = ollama_template(chat)
    for messages in (TALK[:1], TALK, TALK[:2] * 3 + TALK[:1]):
        assert gone_through(go, "", messages) == chat.prompt_text(messages)
        if template is not NO_SYSTEM:
            with_system = [{"role": "system", "content": "Add."}, *messages]
            assert gone_through(go, "Add.", messages) == chat.prompt_text(with_system)
    without = gone_through(ollama_template(chat, "<|user|>"), "", TALK)
    assert without == chat.prompt_text(TALK).removeprefix("<|user|>")


@pytest.mark.parametrize("dropped", ["{{ messages|length }}", "{{ messages[-1].content }}"])
def test_a_template_that_does_more_than_put_texts_around_turns_is_refused(dropped):
    tokenizer = byte_tokenizer(128)
    tokenizer.chat_template = CHATML + dropped
    with pytest.raises(ModelError, match="--to ollama: the chat template"):
        ollama_template(ChatFormat(tokenizer))


def test_the_plain_format_as_a_template_is_the_plain_format():
    tokenizer = byte_tokenizer(128)
    tokenizer.chat_template, tokenizer.bos_token = None, "<|user|>"
    plain = ChatFormat(tokenizer).prompt_text(TALK)
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert ChatFormat(tokenizer).prompt_text(TALK) == plain
