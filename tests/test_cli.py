"""The command line as a user meets it: quick to answer, one message for a mistake, the promised exit status."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from lco_lite.cli import app
from lco_lite.errors import RecipeError
from lco_lite.recipe.file import override, shipped, validate
from lco_lite.recipe.peers import NOTHING, PEERS, all_keys, answered
from lco_lite.recipe.rl import METHOD_DEFAULTS
from lco_lite.run import Run
from lco_lite.shell import EXAMPLES, GROUPS

runner = CliRunner()


def call(*args: object):
    return runner.invoke(app, [str(a) for a in args])


def edited(recipe: Path, **changes: object) -> Path:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | changes))
    return recipe


def test_help_and_recipe_errors_load_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom lco_lite.cli import app\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['run', 'no-such-recipe']).exit_code == 2\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_command_has_help_and_version_is_told():
    for command in ("run", "sft", "train-rm", "rl", "eval", "recipes", "env"):
        assert call(command, "-h").exit_code == 0, command
    assert call("--version").output.startswith("lco-lite 0.")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["run", "quikstart"], "did you mean 'quickstart'"),
        (["run", "none.yaml"], "no such recipe file"),
        (["sft", "quickstart", "--set", "rl.objectiv=kld"], "did you mean 'rl.objective'"),
        (["sft", "quickstart", "--set", "rl.lr"], "--set key.path=value"),
        (["rl", "--objective", "nope"], f"Accepted: {', '.join(METHOD_DEFAULTS)}"),
        (["rl", "quickstart", "-s", "rl.objective=nope"], f"Accepted: {', '.join(METHOD_DEFAULTS)}"),
        (["rl", "quickstart", "--beta", "0"], "rl.beta"),
        (["rl", "quickstart", "-s", "rl.learning_rate=1e-5"], "unknown key; here it is rl.lr"),
        (["rl", "quickstart", "-s", "learning_rate=1e-5"], "here it is rl.lr; also sft.lr, train_rm.lr"),
        (["rl", "quickstart", "-s", "lr=1e-5"], "here it is rl.lr; also sft.lr, train_rm.lr"),
        (["rl", "quickstart", "-s", "max_steps=5"], "here it is rl.steps; also sft.max_steps, train_rm.max_steps"),
        (["rl", "quickstart", "-s", "seeds=2"], "did you mean 'seed' or 'eval.seeds'?"),
        (["rl", "quickstart", "-s", "report_to=wandb"], "unknown key; here it is trackers"),
        (["rl", "quickstart", "-s", "rl.bf16=true"], "here it is model.dtype; also reward_model.dtype (bfloat16)"),
        (["rl", "quickstart", "-s", "rl.logging_steps=1"], "there is nothing to set: every step is logged"),
        (["rl", "quickstart", "-s", "model.lora.rank=8"], "unknown key; here it is model.lora.r"),
        (["rl", "quickstart", "-s", "model.model=x"], "unknown key; here it is model.path"),
        (["rl", "quickstart", "-s", "rl.max_prompt_length=9"], "rl.max_length (which is of prompt and response"),
        (["rl", "quickstart", "--learning-rate", "1e-5"], "given by -s KEY=VALUE; here it is rl.lr"),
        (["train-rm", "quickstart", "--lr", "1e-5"], "given by -s KEY=VALUE; here it is train_rm.lr"),
        (["rl", "quickstart", "--logging-steps=1"], "there is nothing to set: every step is logged"),
        (["rl", "quickstart", "--sed", "1"], "Possible options: --seed"),
        (["rl", "quickstart", "-s", "num_generations=4"], "unknown key; here it is rl.responses_per_prompt"),
        (
            ["sft", "quickstart", "-s", "sft.per_device_train_batch_size=4"],
            "here it is sft.batch_size or sft.micro_batch_tokens",
        ),
        (["sft", "quickstart", "-s", "model.load_in_4bit=true"], "here it is model.quantization"),
        (["rl", "quickstart", "-s", "rl.weighting=policy"], "no meaning for kld"),
        (["eval", "math5000", "--model", "x"], "did you mean math500"),
        (["eval", "--model", "x"], "name at least one task"),
        (["recipes", "nope"], "shipped recipes"),
    ],
)
def test_a_mistake_gets_one_message_on_stderr_and_status_2(tmp_path, args, told):
    flags = ["--runs", tmp_path] if args[0] != "recipes" else []
    result = call(*args, *flags)
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("*/sft"))


def test_without_a_run_rl_and_eval_say_what_to_type(tmp_path):
    for args in (["rl"], ["eval", "arithmetic"], ["sft"]):
        result = call(*args, "--runs", tmp_path)
        assert result.exit_code == 2
        assert "lco-lite run recipes/quickstart.yaml" in result.stderr


def test_all_problems_of_a_recipe_come_at_once_with_lines(tiny):
    tiny.write_text("task: arithmetic\nmodel: {init: {}}\nrl:\n  lr: fast\n  stepps: 3\nseed: -1\n")
    result = call("run", tiny)
    assert result.exit_code == 2
    assert "3 problems" in result.stderr
    assert "line 4" in result.stderr and "line 5" in result.stderr and "line 6" in result.stderr


def test_dry_run_shows_recipe_example_and_counts_and_makes_nothing(tiny):
    result = call("run", tiny, "--dry-run", "--runs", tiny.parent / "runs")
    assert result.exit_code == 0, result.output
    assert "objective: kld" in result.output and len(result.stdout.splitlines()) <= 13
    assert "[" in result.output and "<|end|>]" in result.output
    assert "2 steps of 8 responses and 4 updates" in result.output
    assert "64 demonstrations of 27 to 30" in result.output and "each used 1.0 times" in result.output
    assert "16 of them used, once" in result.output, "of rl's prompts"
    assert "arithmetic: 8 items, 2 passes" in result.output and "free under" in result.output
    assert "optimizer" not in result.output, "of the recipe only what matters"
    assert not (tiny.parent / "runs").exists()
    whole = call("run", tiny, "--dry-run", "--full", "--runs", tiny.parent / "runs").output
    assert whole.startswith("name: tiny\n") and "optimizer: adamw" in whole
    assert call("run", tiny, "--full").exit_code == 2


def test_a_dry_run_refuses_what_the_run_would(tiny):
    own = tiny.parent / "own.py"
    own.write_text("def loss(batch, clip): ...")
    for setting, told in (("model.dtype=float16", "too narrow"), (f"rl.objective={own}:loss", "whole vocabulary")):
        sets = ("--set", setting, "--set", "rl.feedback=dpo")
        dry, run = (call("run", tiny, *sets, "--runs", tiny.parent / "runs", *more) for more in (["--dry-run"], []))
        assert dry.exit_code == run.exit_code == 2 and told in " ".join(dry.stderr.split())
        assert dry.stderr == run.stderr and not (tiny.parent / "runs/tiny/sft").exists()


@pytest.mark.parametrize("objective", METHOD_DEFAULTS)
def test_a_dry_run_of_any_objective_says_which_of_the_recipes_values_gave_way(objective, tmp_path):
    result = call("rl", "quickstart", "--objective", objective, "--dry-run", "--runs", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"objective: {objective}" in result.output
    lr = METHOD_DEFAULTS[objective].get("lr")
    told = f"{objective} brings its own defaults in place of the recipe's, unless set"
    assert (told in result.output) == (lr is not None)
    of_adapters = lr and float(f"{10 * lr[0]:.6g}")
    assert lr is None or f"lr 0.003 → {of_adapters}" in " ".join(result.output.split())


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_is_valid_and_explains_itself(name):
    from lco_lite.recipe.file import load_recipe

    text = shipped()[name].read_text(encoding="utf-8")
    assert text.startswith("# ") and "lco-lite" in text.split("name:")[0], "opens with what it is and a launch line"
    assert load_recipe(shipped()[name]).name == name


def test_recipes_are_listed_shown_and_copied_but_never_over_a_file(tmp_path):
    assert all(name in call("recipes").output for name in shipped())
    assert call("recipes", "quickstart").output == shipped()["quickstart"].read_text(encoding="utf-8")
    assert call("recipes", "quickstart", "--copy", tmp_path).exit_code == 0
    again = call("recipes", "quickstart", "--copy", tmp_path)
    assert again.exit_code == 2 and "nothing was overwritten" in again.stderr
    (tmp_path / "file").write_text("")
    nowhere = call("recipes", "--copy", tmp_path / "file" / "folder")
    assert nowhere.exit_code == 2 and "cannot be written there" in nowhere.stderr and "--runs" not in nowhere.stderr


def test_env_tells_versions_for_people_and_machines():
    assert "transformers" in call("env").output
    assert json.loads(call("env", "--json").output)["packages"]["torch"]


def test_eval_json_is_one_object_on_stdout(tiny):
    runs = tiny.parent / "runs"
    assert call("sft", tiny, "--runs", runs, "-q").exit_code == 0
    result = call("eval", "arithmetic", "--runs", runs, "--json", "--limit", "4", "--seeds", "2")
    assert result.exit_code == 0, result.output
    score = json.loads(result.stdout)["arithmetic"]
    assert {"metric": "pass@1", "n": 4, "seeds": 2, "stage": "sft"}.items() <= score.items()
    greedy = call("eval", "--runs", runs, "--json", "--limit", "4", "--greedy")
    assert json.loads(greedy.stdout)["arithmetic"]["seeds"] == 1
    refused = call("eval", "--runs", runs, "--policy", "rl-kld")
    assert refused.exit_code == 2 and "base, sft" in refused.stderr


def test_eval_scores_any_model_folder_and_any_adapter_folder(tiny):
    runs = tiny.parent / "runs"
    assert call("rl", tiny, "--runs", runs, "-q").exit_code == 0
    for made in ("sft/model", "rl-kld/adapter"):
        result = call("eval", "arithmetic", "--model", runs / "tiny" / made, "--runs", runs, "--limit", "4", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["arithmetic"]["n"] == 4
    assert Run.newest(runs).name == "tiny", "scores of other weights are no run"


def test_the_reward_model_and_the_optimal_policy_are_scored_as_policies(tiny):
    runs = tiny.parent / "runs"
    assert call("train-rm", tiny, "--runs", runs, "-q").exit_code == 0
    for policy, flags in (("rm", []), ("optimal", ["--beta", "0.5"])):
        result = call("eval", "--runs", runs, "--policy", policy, *flags, "--json", "--limit", "4", "--seeds", "1")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["arithmetic"]["stage"] == policy


def test_the_last_line_on_stdout_is_the_path_made(tiny):
    result = call("sft", tiny, "--runs", tiny.parent / "runs", "-q")
    assert result.stdout.splitlines()[-1].startswith(str(tiny.parent / "runs" / "tiny" / "sft"))


def test_two_processes_on_one_run_are_kept_apart(tiny):
    run = Run.open(tiny.parent / "runs", "tiny")
    with run.lock():
        code = f"import sys; sys.argv = ['lco-lite', 'sft', {str(tiny)!r}, '--runs', {str(tiny.parent / 'runs')!r}]"
        code += "; from lco_lite.__main__ import main; main()"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert other.returncode == 2
    assert "Traceback" not in other.stderr and "process" in other.stderr


def test_a_malformed_row_stops_with_its_line(tiny):
    data = tiny.parent / "demos.jsonl"
    data.write_text('{"prompt": "1+1", "completion": "2"}\n{"prompt": "1+2",\n')
    result = call("sft", tiny, "--runs", tiny.parent / "runs", "-s", f"data.demonstrations={data}")
    assert result.exit_code == 2
    assert "demos.jsonl" in result.stderr and "2" in result.stderr


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ({"device": "cuda"}, "CUDA"),
        ({"model": {"path": "/nowhere/model"}}, "/nowhere/model"),
        ({"data": {"demonstrations": "/nowhere/demos.jsonl"}}, "/nowhere/demos.jsonl"),
    ],
)
def test_what_cannot_be_had_is_named(tiny, sets, told):
    import torch

    if "device" in sets and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    result = call("sft", edited(tiny, **sets), "--runs", tiny.parent / "runs")
    assert result.exit_code == 2, result.output
    assert told in result.stderr and "Traceback" not in result.output


def test_a_failure_while_running_leaves_its_traceback_in_the_runs_log(tiny, monkeypatch):
    from lco_lite.train import pipeline

    def fail(ctx, stage):
        raise RuntimeError("the sky fell")

    monkeypatch.setattr(pipeline, "train_sft", fail)
    result = call("sft", tiny, "--runs", tiny.parent / "runs")
    assert result.exit_code == 1
    assert "the sky fell" in result.stderr and "Traceback" not in result.output
    assert "Traceback" in (tiny.parent / "runs" / "tiny" / "error.log").read_text()


def test_out_of_memory_exits_3_with_what_to_change_in_order(tiny, monkeypatch):
    import torch

    from lco_lite.train import pipeline

    def exhaust(ctx, stage):
        with ctx.clock("update"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(pipeline, "train_sft", exhaust)
    result = call("sft", tiny, "--runs", tiny.parent / "runs")
    assert result.exit_code == 3
    assert "phase update of sft" in result.stderr
    assert result.stderr.index("sft.max_length") < result.stderr.index("a smaller model")


def test_a_gradient_that_is_not_finite_exits_4(tiny, monkeypatch):
    from lco_lite.train import sft

    real = sft.accumulate

    def blow_up(policy, examples, tokens):
        metrics = real(policy, examples, tokens)
        next(p for p in policy.model.base.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return metrics

    monkeypatch.setattr(sft, "accumulate", blow_up)
    result = call("sft", tiny, "--runs", tiny.parent / "runs")
    assert result.exit_code == 4
    assert "gradient" in result.stderr and "checkpoint" in result.stderr


# a recipe with every section
WHOLE = {"task": "gsm8k", "model": {"path": "x"}, "reward_model": {"path": "y"}}
SECTIONS = sorted({key.rpartition(".")[0] for key in all_keys()})


@pytest.mark.parametrize("section", sorted(set(SECTIONS) - {"rl.rewards", "model.init"}))  # any name; no path beside it
def test_what_a_peers_name_is_answered_with_is_taken_wherever_it_was_written(section):
    whole = validate(WHOLE, "whole").model_dump(mode="json")
    own = {key.removeprefix(f"{section}.") for key in all_keys() if key.rpartition(".")[0] == section}
    for peer in {*PEERS, *NOTHING} - own:
        with pytest.raises(RecipeError) as caught:
            validate(override(whole, [f"{section}.{peer}=1".lstrip(".")], None), "here")
        (_, told) = str(caught.value).splitlines()
        if peer in NOTHING:
            assert "there is nothing to set: " in told
            continue
        hint = told.partition("unknown key; here it is ")[2].partition(" (")[0]
        keys = re.split(r" or |; also |, ", hint)
        assert keys[0], (peer, told)
        for key in keys:
            value = reduce(getitem, key.split("."), whole)
            validate(override(whole, None, {key: value}), "here")
            assert key in all_keys(), (peer, key)


def test_what_from_trl_says_of_a_name_is_what_an_unknown_key_is_answered_with():
    text = (Path(__file__).parent.parent / "docs" / "from-trl.md").read_text(encoding="utf-8")
    table = text.partition("| `GRPOConfig` |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) > 15
    for row in table:
        theirs, ours = (re.findall(r"`([\w.]+)`", cell) for cell in row.split("|")[1:3])
        ours = [key for key in ours if key in all_keys()]
        told = {name: answered(name) for name in theirs}
        for name, hint in told.items():
            of_row = [key for key in ours if re.search(rf"\b{re.escape(key)}\b", hint)]
            assert of_row or (not ours and name in NOTHING), (name, hint)
        assert not theirs or all(re.search(rf"\b{re.escape(key)}\b", " ".join(told.values())) for key in ours), row


def test_commands_stand_in_four_groups_on_one_screen_and_each_help_has_an_example():
    shown = runner.invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert len(shown.splitlines()) <= 45 and all(len(line) <= 80 for line in shown.splitlines())
    assert "..." not in shown.partition("Train:")[2], "what a command does is told in a line"
    assert [shown.index(f"{group}:") for group in GROUPS] == sorted(shown.index(f"{group}:") for group in GROUPS)
    commands = [*get_command(app).commands, *(["data", name] for name in get_command(app).commands["data"].commands)]
    grouped = {name for names in GROUPS.values() for name in names}
    assert {name for name in commands if isinstance(name, str)} == grouped
    for name in commands:
        if name != "data":
            words = [name] if isinstance(name, str) else name
            told = call(*words, "--help").output
            assert f"lco-lite {' '.join(words)}" in told.partition("Example:")[2], name


def test_what_an_example_says_is_taken():
    for example in EXAMPLES.values():
        _, *words = shlex.split(example)
        found, words = get_command(app).commands[words[0]], words[1:]
        if hasattr(found, "commands"):
            found, words = found.commands[words[0]], words[1:]
        found.make_context(found.name, list(words), resilient_parsing=True)
        options = {option for p in found.params for option in p.opts}
        assert {word for word in words if word.startswith("--")} <= options, example


@pytest.mark.parametrize(
    "words, env, told",
    [
        (["export", "--out", b"\xff"], {}, "is not in UTF-8"),
        (["chat", "--system", b"a\xff"], {}, "is not in UTF-8"),
        ([], {"_LCO_LITE_COMPLETE": "complete_bash", "COMP_WORDS": "lco-lite", "COMP_CWORD": "x"}, "COMP_CWORD"),
        ([], {"_LCO_LITE_COMPLETE": "complete_bash"}, "COMP_WORDS"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="bytes as arguments")
def test_what_no_shell_types_is_one_message(words, env, told):
    done = subprocess.run([sys.executable, "-m", "lco_lite", *words], env=os.environ | env, capture_output=True)
    assert done.returncode in (1, 2) and told in done.stderr.decode()
    assert b"Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("name", ["bin.yaml", "none.yaml", "folder.yaml", "", "none", "x" * 300, "n" * 300 + "/x"])
def test_a_recipe_that_cannot_be_shown_is_one_message(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "folder.yaml").mkdir()
    told = call("recipes", name)
    assert told.exit_code == 2 and told.stderr.count("error: ") == 1, told.output


def test_a_card_beyond_any_is_no_size(tiny):
    told = call("plan", tiny, "--gpu", "9" * 400 + "GiB")
    assert told.exit_code == 2 and "is no size" in told.stderr and len(told.stderr) < 500


def test_items_in_a_file_that_no_file_system_names_are_one_message(tmp_path):
    words = ["eval", "gsm8k", "--model", tmp_path, "--runs", tmp_path / "runs", "--data", "n" * 300]
    told = call(*words)
    assert told.exit_code == 2 and "no such file or folder" in told.stderr, told.output


def test_tab_offers_recipes_objectives_tasks_runs_and_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("LCO_LITE_RUNS", str(tmp_path))
    (tmp_path / "mine" / "rl-kld").mkdir(parents=True)
    (tmp_path / "mine" / "recipe.yaml").write_text("x")
    (tmp_path / "mine" / "rl-kld" / "done.json").write_text("{}")

    def offered(*words: str) -> str:
        env = {"_LCO_LITE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["lco-lite", *words]), "COMP_CWORD": ""}
        return runner.invoke(app, prog_name="lco-lite", env=env | {"COMP_CWORD": str(len(words))}).output

    assert "quickstart" in offered("run", "qui").split()
    assert offered("rl", "--objective", "min").split() == ["minillm"]
    assert offered("eval", "math5").split() == ["math500"]
    assert offered("sft", "--name", "m").split() == ["mine"]
    (tmp_path / "mine" / "rl-kld" / "best").mkdir()
    (tmp_path / "mine" / "rl-kld" / "best" / "best.json").write_text("{}")
    assert offered("eval", "--policy", "rl-").split() == ["rl-kld", "rl-kld@best"]
    assert offered("export", "--to", "gguf").split() == ["gguf", "gguf-lora"]
    assert offered("eval", "--compare", "mine/").split() == ["mine/rl-kld", "mine/rl-kld@best"]
    assert offered("eval", "--compare", "base", "rl-").split() == ["rl-kld", "rl-kld@best"]


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_stream_that_whoever_starts_it_has_closed_is_as_an_empty_one(tmp_path, closed):
    for words in ("runs --json", "runs --clean", "chat"):
        command = f"{shlex.quote(sys.executable)} -m lco_lite {words} --runs . {closed}"
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (words, done.stderr)


@pytest.mark.skipif(os.name == "nt", reason="has no such pipes")
def test_a_recipe_from_a_pipe_is_read_once(tiny, tmp_path):
    words = f"<(cat {shlex.quote(str(tiny))}) --runs {shlex.quote(str(tmp_path))} --name piped --dry-run"
    command = f"{shlex.quote(sys.executable)} -m lco_lite sft {words}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "from scratch (1 layers)" in done.stdout, done.stderr


def test_a_number_beyond_reason_is_refused_at_once(tiny):
    for words in (["plan", tiny, "--prompt", 10**24], ["plan", tiny, "--rate", "inf"]):
        assert call(*words).exit_code == 2
    assert call("study", "convexity", "--seeds", 3_000_000, "--dry-run").exit_code == 2
