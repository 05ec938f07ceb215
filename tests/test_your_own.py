"""docs/your-own.md from top to bottom: its files are written and its commands run, on a model that takes seconds."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.models.loading import build_scratch
from lco_lite.recipe.sections import Init
from lco_lite.run import Run

TEXT = (Path(__file__).resolve().parent.parent / "docs/your-own.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
FILES = {body.partition("\n")[0].lstrip("# "): body.partition("\n")[2] for kind, body in BLOCKS if kind == "python"}
BLOCK = next(body for kind, body in BLOCKS if not kind)
COMMANDS = [line.partition(" #")[0].strip() for line in BLOCK.splitlines()]
SMALL = ["rl.steps=1", "rl.prompts_per_step=2", "rl.max_new_tokens=8", "rl.inner_epochs=1", "rl.lr=1e-2"]


def test_the_page_goes_from_prompts_and_a_reward_to_an_adapter_and_a_score_before_and_after(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_scratch(Init(hidden_size=32, layers=1, heads=2, intermediate_size=64), tmp_path / "model", seed=0)
    for name, body in FILES.items():
        Path(name).write_text(body)
    said = {}
    for command in COMMANDS:
        if command.startswith("python "):
            script, _, target = command.removeprefix("python ").partition(" > ")
            Path(target).write_bytes(subprocess.check_output([sys.executable, script]))
            continue
        program, verb, *words = shlex.split(command)
        assert program == "lco-lite"
        more = {"init": ["--model", str(tmp_path / "model")], "run": [w for s in SMALL for w in ("--set", s)]}
        result = CliRunner().invoke(app, [verb, *words, *more.get(verb, [])], input="What is rain?\n")
        assert result.exit_code == 0, f"{command}\n{result.output}"
        said[command] = result.output
    assert len(Path("prompts.jsonl").read_text().splitlines()) == 40
    assert len(FILES["rewards.py"].splitlines()) == 3
    run = Run(Path("runs/prompts"))
    assert (run.stage("rl-kld").adapter / "adapter_model.safetensors").exists()
    scores = {stage: json.loads(run.eval_path("held_out", stage).read_text()) for stage in ("base", "rl-kld")}
    assert {one["n"] for one in scores.values()} == {8} and scores["base"]["metric"] == "reward"
    assert all(one["mean"] < 0 for one in scores.values())
    page = Path("runs/prompts/report.html").read_text(encoding="utf-8")
    assert "What is " in page and "http://" not in page.replace("http://www.w3.org", "")
    merged = Path("runs/prompts/export/rl-kld-merged")
    assert AutoModelForCausalLM.from_pretrained(merged).num_parameters() > 1000
    last = [text for command, text in said.items() if command.endswith("run prompts.yaml")][0].strip().splitlines()[-1]
    assert last.endswith("next: lco-lite eval --compare base rl-kld")
    assert "called by TRL's signature" in said["lco-lite run prompts.yaml --dry-run"]
    held = {json.loads(line)["prompt"] for line in Path("runs/prompts/held_out.jsonl").read_text().splitlines()}
    samples = [json.loads(line) for line in run.stage("rl-kld").samples.read_text().splitlines()]
    assert len(held) == 8 and not held & {row["prompt"].casefold() for row in samples}
