"""What is done with a finished run: talking to it, looking over what there is, deleting what can go."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console as RichConsole
from typer.testing import CliRunner

from lco_lite import chat as talk
from lco_lite.cli import app
from lco_lite.command import reading
from lco_lite.console import Console
from lco_lite.data.prompts import held_out, recipe_task
from lco_lite.data.rows import read_demonstrations
from lco_lite.evaluation.evaluate import open_policy
from lco_lite.files import read_jsonl, write_json
from lco_lite.rollout.engine import Sampling, in_order
from lco_lite.run import Run
from lco_lite.runs import describe, spare
from tests.conftest import TINY


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has gone through everything; nobody writes there."""
    folder = tmp_path_factory.mktemp("after")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    result = call("run", folder / "tiny.yaml", "--runs", folder / "runs", "-q")
    assert result.exit_code == 0, result.output
    return folder / "runs"


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Run:
    """A run of its own for who writes."""
    shutil.copytree(runs / "tiny", tmp_path / "runs" / "tiny")
    return Run(tmp_path / "runs" / "tiny")


def call(*args: object, said: str | None = None):
    return CliRunner().invoke(app, [str(a) for a in args], input=said)


def answers(runs: Path, said: str, *args: object) -> list[str]:
    result = call("chat", *args, "--runs", runs, "--max", 4, said=said)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


# chat


def test_without_a_terminal_a_line_is_a_turn_and_stdout_has_the_answers_alone(runs):
    again = (
        "12 + 34 = ?\n/reset\n12 + 34 = ?\n/reset\n/seed 5\n12 + 34 = ?\n/seed 0\n/temperature 0\n/reset\n12 + 34 = ?\n"
    )
    first, second, reseeded, _ = answers(runs, again)
    assert first == second != reseeded
    assert answers(runs, again, "tiny", "--policy", "rl-kld") == answers(runs, again, runs / "tiny")


def test_greedy_answers_are_those_of_eval_and_turns_are_written_as_in_training(runs):
    with reading(Run(runs / "tiny"), runs, None, {}, Console(quiet=True)) as ctx:
        task = recipe_task(ctx.recipe)
        (asked,) = held_out(ctx.recipe, task, 1)
        voice = talk.open_voice(ctx, "rl-kld", talk.open_roles(ctx, ["rl-kld"])[0])
        conversation = talk.Conversation(ctx, [voice], Console(quiet=True), False)
        conversation.temperature, conversation.longest = 0.0, 12
        conversation.console = Console(quiet=True, stdout=io.StringIO())
        conversation.turn(asked.messages[-1]["content"])
        _, form, engine = open_policy(ctx, "rl-kld")
        (response,) = in_order(engine.generate([form.prompt(asked.messages)], Sampling(0.0, 1.0, 12, 1)))
    assert voice.messages[:-1] == [dict(message) for message in asked.messages]
    assert voice.turns[-1]["content"] == form.text(response.example.response) != ""


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (("tiny", "--policy", "pi-star", "--beside", "sft"), ["π* (β 1)", "sft"]),
        (("--beside", "base"), ["rl-kld", "base"]),
        (("--policy", "rm", "--beside", "optimal"), ["rm", "π* (β 1)"]),
    ],
)
def test_two_policies_answer_beside_each_other(runs, args, names):
    lines = answers(runs, "hello\n", *args)
    assert [line for line in lines if line.startswith("[")] == [f"[{name}]" for name in names]
    assert len(lines) >= 4


def test_an_adapter_talks_beside_its_base_or_another_folder_and_makes_no_run(runs):
    adapter, model = runs / "tiny/rl-kld/adapter", runs / "tiny/sft/model"
    assert f"[{adapter}]" in (lines := answers(runs, "a\n", adapter, "--beside", "base")) and "[base]" in lines
    assert answers(runs, "a\n", adapter, "--beside", model)[2] == f"[{model}]"
    assert [path.name for path in runs.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("tiny", "--policy", "rl-lch"), "there are: base, sft, "),
        (("tiny", "--beside", "rl-lch"), "there are: base, sft, "),
        (("no/such", "--policy", "sft"), "no run under"),
        (("tiny", "--temperature", "-1"), "eval.temperature"),
        (("tiny", "--beside", "x" * 5000), "there are: base, sft, "),
        (("tiny", "--policy", "optimal", "-s", "rl.beta=1e-300"), "rl.beta"),
    ],
)
def test_a_policy_that_is_not_there_is_one_message(runs, args, told):
    result = call("chat", *args, "--runs", runs, said="a\n")
    assert result.exit_code == 2 and told in " ".join(result.stderr.split())


def test_a_line_end_in_a_name_adds_no_line_to_the_table_of_runs(runs, tmp_path):
    shutil.copytree(runs / "tiny", tmp_path / "a\nforged")
    (tmp_path / "a\nforged" / "b\nforged").write_bytes(b"." * 10_000_000)
    for args in ([], ["a\nforged"], ["a\nforged", "--clean"]):
        said = call("runs", *args, "--runs", tmp_path).output
        assert "\\nforged" in said.replace("\n", ""), args
        assert not any(line.strip("│ ").startswith("forged") for line in said.splitlines()), args


@pytest.mark.parametrize("command", ["chat", "report", "export", "runs"])
def test_a_mistyped_run_is_told_at_once_with_those_there_are_the_nearest_first(tmp_path, command):
    for name in ("alpha", "tiny", "tin"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    result = call(command, "tinny", "--runs", tmp_path)
    assert result.exit_code == 2 and "HTTP" not in result.output
    told = " ".join(result.stderr.split())
    assert "no run 'tinny' under" in told and "there are: tiny, tin, alpha" in told
    assert ("openai-community/gpt2" in told) == (command == "chat"), "how a model of the hub is named"


def test_the_chat_says_of_which_run_and_model_it_is(runs):
    said = call("chat", "--beside", "base", "--runs", runs, "--max", 2, said="/quit\n").stderr
    assert "rl-kld of tiny (from scratch) | base of tiny (from scratch) temperature" in " ".join(said.split())


def test_commands_that_are_wrong_are_told_in_a_line_and_the_chat_goes_on(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("no JSON")
    wrong = [
        "/foo",
        "/seed x",
        "/seed -1",
        "/temperature -1",
        "/temperature nan",
        "/max 0",
        "/save",
        "/save none.jsonl",
        "/temperature 1e-320",
        "/save ~nobody-of-this-name/x.jsonl",
        "/save a\0b",
    ]
    saves = [f"/save {tmp_path / one}" for one in ("notes.txt", "", "x" * 300)]
    said = "\n".join([*wrong, "x" * 400, "hi", *saves, "/quit", "unheard"])
    result = call("chat", "--runs", runs, "--max", 4, said=said)
    assert result.exit_code == 0 and "Traceback" not in result.output
    told = result.stderr.splitlines()
    assert len([line for line in told if line.startswith("/") or "no command /foo" in line]) == len(wrong) + 2
    assert any("fills the window of 256" in line for line in told)
    assert any("notes.txt, line 1: is not JSON" in line for line in told)
    assert any("File name too long" in line for line in told)
    assert (tmp_path / "notes.txt").read_text() == "no JSON"
    assert "unheard" not in result.output


def test_a_saved_conversation_is_a_demonstration_for_sft(runs, tmp_path):
    file = tmp_path / "kept.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')  # no \n
    answers(runs, f"/system Be brief.\nhello\n/save {file}\n")
    assert len(read_jsonl(file)) == 2
    kept, made = read_demonstrations(str(file))
    assert kept.response == "b"
    assert [m["content"] for m in made.messages] == ["Be brief.", "hello"] and made.response


def test_model_output_reaches_the_terminal_without_control_characters(runs):
    said = "".join(f"{i} + {i}\n/reset\n/seed {i}\n" for i in range(4))
    raw = call("chat", "--runs", runs, "--max", 12, "--temperature", 1.5, said=said).stdout
    assert not {c for c in raw if ord(c) < 32 and c not in "\n\t"} and "\\x" in raw


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said_of_it(runs, monkeypatch):
    written = []

    def write(self: Console, text: str) -> None:
        written.append(text)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Console, "write", write)
    handler = signal.getsignal(signal.SIGINT)
    result = call("chat", "--runs", runs, "--max", 40, said="hello\nagain\n")
    assert result.exit_code == 0
    assert written[3] == "\n" and written.count("\n") == 2 and len(written) > 10
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_at_the_prompt_ctrl_c_and_ctrl_d_end(monkeypatch, end):
    def prompt(text: str) -> str:
        raise end

    monkeypatch.setattr("builtins.input", prompt)
    assert list(talk.from_terminal(Console(stdout=io.StringIO()))) == []


def terminal(width: int) -> tuple[Console, io.StringIO]:
    console, out = Console(), io.StringIO()
    console._stdout, console._screen = out, RichConsole(file=out, force_terminal=True, width=width, height=10)
    return console, out


def test_columns_stand_beside_each_other_whole_where_the_terminal_is_wide_enough():
    console, out = terminal(100)
    assert console.is_wide and not terminal(79)[0].is_wide
    with console.beside(["left", "right"]) as draw:
        draw(["one", "two \x1b[2J"])
        draw(["\n".join(f"a{i}" for i in range(20)), "end"])
    last = out.getvalue().rpartition("left")[2]
    assert all(f"a{i}" in last for i in range(20)) and "right" in last and "end" in last
    assert "\x1b[2J" not in out.getvalue()


def test_two_voices_grow_in_turns_in_columns(runs):
    console, out = terminal(100)
    with reading(Run(runs / "tiny"), runs, None, {}, Console(quiet=True)) as ctx:
        names = ["rl-kld", "sft"]
        voices = [talk.open_voice(ctx, n, of) for n, of in zip(names, talk.open_roles(ctx, names), strict=True)]
        talk.Conversation(ctx, voices, console, columns=True).turn("hello")
    assert all(len(voice.turns) == 2 for voice in voices)
    assert voices[0].engine.roles[0].model is voices[1].engine.roles[0].model  # one base in memory
    assert "rl-kld" in out.getvalue() and "sft" in out.getvalue()


# runs


def test_runs_are_listed_whole_at_80_columns_and_as_json(runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown, detail = call("runs", "--runs", runs), call("runs", "tiny", "--runs", runs)
    assert shown.exit_code == detail.exit_code == 0
    assert all(word in shown.stdout for word in ("tiny", "sft", "rl-kld", "done", "arithmetic", "can go"))
    assert "rm/pairs.jsonl" in detail.stdout and "sft/checkpoints" in detail.stdout
    assert "…" not in shown.stdout + detail.stdout and max(map(len, detail.stdout.splitlines())) <= 80
    (told,) = json.loads(call("runs", "--runs", runs, "--json").stdout)
    assert told == json.loads(call("runs", "tiny", "--runs", runs, "--json").stdout)
    assert [(s["name"], s["state"], s["step"], s["steps"]) for s in told["stages"]] == [
        ("sft", "done", 4, 4),
        ("rm", "done", 3, 3),
        ("rl-kld", "done", 2, 2),
    ]
    assert told["stages"][2]["scores"]["arithmetic"]["n"] == 8
    assert 0 < told["can_go_bytes"] < told["bytes"] and not told["running"]


def test_no_run_and_an_unknown_one_are_said(tmp_path, runs):
    assert "no run under" in call("runs", "--runs", tmp_path).stdout
    result = call("runs", "other", "--runs", runs)
    assert result.exit_code == 2 and "there are: tiny" in result.stderr


def test_after_clean_a_done_run_says_so_and_eval_chat_and_the_logs_are_as_before(copied):
    root, kept = copied.path.parent, {}
    for name in (
        "sft/metrics.jsonl",
        "rl-kld/samples.jsonl",
        "rl-kld/updates.jsonl",
        "eval/arithmetic--sft.rows.jsonl",
    ):
        kept[name] = (copied.path / name).read_bytes()
    before = describe(copied)
    result = call("runs", "tiny", "--clean", "--yes", "--runs", root, "--json")
    assert result.exit_code == 0, result.output
    gone = json.loads(result.stdout)
    assert gone["bytes"] == before["can_go_bytes"] == before["bytes"] - describe(copied)["bytes"] > 0
    paths = {str(Path(one["path"]).relative_to(copied.path)) for one in gone["deleted"]}
    assert paths == {"sft/checkpoints", "rm/checkpoints", "rm/pairs.jsonl", "rl-kld/checkpoints"}
    assert not spare(copied) and all((copied.path / name).read_bytes() == old for name, old in kept.items())
    again = call("run", copied.path / "recipe.yaml", "--runs", root)
    assert again.exit_code == 0 and again.stdout.count("done already") >= 3
    assert again.stdout.count("has been scored already") == 3
    assert call("eval", "--greedy", "--policy", "optimal", "--runs", root).exit_code == 0
    assert answers(root, "hello\n", "--policy", "rl-kld", "--beside", "optimal")


def test_clean_asks_first_and_leaves_which_run_is_the_newest(copied, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no path is folded
    root = copied.path.parent
    shutil.copytree(copied.path, root / "older")
    older = (root / "older" / "recipe.yaml", root / "older" / ".lock")
    for file in older:
        os.utime(file, (1e9, 1e9))
    result = call("runs", "--clean", "--runs", root)
    assert result.exit_code == 2 and "--yes" in result.stderr and "checkpoints" in result.stdout
    assert spare(copied) and spare(Run(root / "older"))
    assert call("runs", "older", "--clean", "--yes", "--runs", root).exit_code == 0
    assert spare(copied) and not spare(Run(root / "older"))
    assert Run.newest(root).name == "tiny"


@pytest.mark.parametrize(("answer", "left"), [("n", True), ("y", False)])
def test_on_a_terminal_the_answer_decides(copied, monkeypatch, answer, left):
    monkeypatch.setattr("lco_lite.runs.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setattr("lco_lite.runs.typer.confirm", lambda text, err: answer == "y")
    assert call("runs", "--clean", "--runs", copied.path.parent).exit_code == 0
    assert bool(spare(copied)) is left


def test_a_run_in_use_is_told_and_never_touched(copied):
    root = copied.path.parent
    shutil.copytree(copied.path, root / "other")
    with copied.lock():
        assert describe(copied)["running"]
        shutil.copytree(copied.stage("rl-kld").path, copied.path / "rl-mse")
        for stage, at in (("rl-kld", 2e9), ("rl-mse", 1e9)):
            (copied.path / stage / "done.json").unlink()
            for file in (copied.path / stage).rglob("*"):
                os.utime(file, (at, at))
        states = {one["name"]: one["state"] for one in describe(copied)["stages"]}
        assert states["rl-kld"] == "running" and states["rl-mse"] == "stopped", "the one that was written last"
        named = call("runs", "tiny", "--clean", "--yes", "--runs", root)
        assert named.exit_code == 2 and "in use by process" in named.stderr
        every = call("runs", "--clean", "--yes", "--runs", root)
        assert every.exit_code == 0 and "in use by process" in every.stderr
    assert spare(copied) and not spare(Run(root / "other"))
    assert not describe(copied)["running"]


@pytest.fixture
def stopped(copied: Run) -> Iterator[Run]:
    """Its rl stage stands after step 2 of 5."""
    stage = copied.stage("rl-kld")
    (stage.path / "done.json").unlink()
    shutil.rmtree(stage.adapter)
    begun = json.loads((stage.path / "stage.json").read_text())
    (stage.path / "stage.json").write_text(json.dumps(begun | {"steps": 5}))
    for step in (1, 2, 3):
        (stage.path / f"rollouts/step-{step:06d}.jsonl").write_text("{}\n")
    yield copied


def test_of_a_stage_under_way_only_what_no_kept_checkpoint_goes_back_to_can_go(stopped, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    can_go = {str(one.path.relative_to(stopped.path)) for one in spare(stopped)}
    assert {name for name in can_go if name.startswith("rl-kld")} == {"rl-kld/rollouts/step-000001.jsonl"}
    assert "stopped at 2/5" in " ".join(call("runs", "--runs", stopped.path.parent).stdout.split())


def test_a_stage_that_failed_or_is_damaged_is_said_to_have(stopped):
    log = stopped.path / "error.log"
    log.write_text("Traceback")
    os.utime(log, (2e9, 2e9))
    assert describe(stopped)["stages"][2]["state"] == "failed"
    (stopped.path / "rl-kld/stage.json").write_text("{")
    assert describe(stopped)["stages"][2]["state"] == "damaged"


def test_a_damaged_score_is_named_beside_the_others_and_a_lock_that_is_no_process_is_nobodys(copied):
    score = copied.eval_path("arithmetic", "rl-kld")
    write_json(score, json.loads(score.read_text()) | {"mean": "x"})
    (copied.path / ".lock").write_text("9" * 30)
    assert " damaged" in call("runs", "--runs", copied.path.parent).stdout
    told = describe(copied)
    found = {stage["name"]: stage["scores"] for stage in told["stages"] if stage["scores"]}
    assert found.pop("rl-kld")["arithmetic"]["damaged"].startswith(f"{score}: damaged: mean: found 'x'")
    assert found and not told["running"]


def test_one_damaged_run_leaves_the_others_in_the_list(copied):
    broken = Run(Path(shutil.copytree(copied.path, copied.path.parent / "broken")))
    shutil.rmtree(broken.stage("rl-kld").adapter)
    told = call("runs", "--runs", copied.path.parent, "--json")
    assert told.exit_code == 0
    states = {one["name"]: one["stages"][-1]["state"] for one in json.loads(told.stdout)}
    assert states == {"tiny": "done", "broken": "damaged"}
    assert not [one for one in spare(broken) if "rl-kld" in one.path.parts], "of a damaged stage nothing goes"
    assert call("runs", copied.path, "--runs", copied.path.parent.parent).exit_code == 0, "a run is named by folder too"
