import io
import json
import re

import pytest

from lco_lite.console import Console, clock_time, progress_line, visible


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def screen(terminal=False, **options):
    out, err, clock = Terminal() if terminal else io.StringIO(), io.StringIO(), Clock()
    return Console(stdout=out, stderr=err, clock=clock, **options), out, err, clock


def test_without_a_terminal_each_step_is_one_plain_line():
    console, out, _, clock = screen()
    with console.progress(4, "rl-kld") as line:
        for step in (1, 2):
            clock.now += 10
            line.update(step, reward=0.25, grad_norm=1.5, entropy=0.4, kl_to_old=0.01, tokens_per_second=321.4)
    first, second = out.getvalue().splitlines()
    assert first.startswith("rl-kld 1/4  reward 0.250  grad 1.5  entropy 0.400  KL(old) 0.0100  tok/s 321  MiB ")
    assert first.endswith("  0:30 left") and second.endswith("  0:20 left")
    assert "\x1b" not in out.getvalue()


def test_a_step_that_is_updated_many_times_is_still_one_line():
    console, out, _, clock = screen()
    with console.progress(2, "rl") as line:
        for _ in range(50):
            line.update(1, loss=1.0)
        line.update(2, loss=0.5)
    assert len(out.getvalue().splitlines()) == 2


def test_a_phase_inside_a_step_shows_life_only_now_and_then():
    console, out, _, clock = screen()
    with console.progress(2, "rl"), console.progress(100, "rollout") as inner:
        for done in range(1, 101):
            clock.now += 1
            inner.update(done)
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == [
        "rollout 30/100",
        "rollout 60/100",
        "rollout 90/100",
    ]


def test_the_time_left_counts_only_what_was_done_here():
    console, out, _, clock = screen()
    with console.progress(100, "sft", done=90) as line:
        clock.now += 10
        line.update(95)
    assert out.getvalue().rstrip().endswith("0:10 left")


def text(written: str) -> str:
    """What is to be read of it: no codes, and no bars."""
    return re.sub(r" *[━╸╺]+ *", " | ", re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", written))


def test_on_a_terminal_one_bar_is_redrawn_and_its_last_state_stays():
    console, out, _, _ = screen(terminal=True)
    with console.progress(2, "rl") as line, console.progress(10, "rollout") as inner:
        inner.update(5)
        line.update(1, reward=0.1)
        console.note("said in between")
        line.update(2, reward=0.2)
    written = out.getvalue()
    assert "\x1b[2K" in written and "rollout | 5/10" in text(written) and "said in between" in written
    last = text(written.rpartition("\x1b[2K")[2])
    assert last.startswith("rl | 2/2") and "  reward 0.200" in last and "rollout" not in last


def test_a_bar_on_a_terminal_says_the_time_spent_and_the_time_left():
    console, out, _, clock = screen(terminal=True)
    with console.progress(100, "sft", done=90) as line:
        clock.now += 60
        line.update(95)
    assert "sft | 95/100 0:01:00 1:00 left" in text(out.getvalue())


def test_a_terminal_that_cannot_redraw_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console, out, _, _ = screen(terminal=True)
    with console.progress(2, "rl") as line:
        line.update(1, reward=0.1)
    assert out.getvalue().startswith("rl 1/2  reward 0.100") and "\x1b" not in out.getvalue()


def test_the_screen_works_again_after_an_error_inside_a_progress():
    console, out, _, _ = screen(terminal=True)
    with pytest.raises(KeyboardInterrupt), console.progress(2, "rl"), console.progress(2, "rollout"):
        raise KeyboardInterrupt
    with console.progress(3, "again") as line:
        line.update(3)
    assert "again | 3/3" in text(out.getvalue())


@pytest.mark.parametrize("label", ["rl", "x" * 100])
def test_a_line_longer_than_the_terminal_does_not_wrap(monkeypatch, label):
    monkeypatch.setenv("COLUMNS", "40")
    console, out, _, _ = screen(terminal=True)
    with console.progress(2, label) as line:
        line.update(1, loss=1.0, reward=0.5, grad_norm=1.0, entropy=2.0)
    frames = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-JL-Z]", "", out.getvalue()).rstrip().split("\x1b[2K")
    assert len(frames) > 2 and all(len(frame.strip("\r\n")) <= 40 and "\n" not in frame.strip() for frame in frames)


def test_a_label_with_control_characters_or_markup_does_not_steer_the_terminal():
    console, out, _, _ = screen(terminal=True)
    with console.progress(2, "[red]a\x1b[2Jb[/red]") as line:
        line.update(1)
    assert "[red]a\\x1b[2Jb[/red] | 1/2" in text(out.getvalue()) and "\x1b[2J" not in out.getvalue()


def test_what_a_model_says_is_neither_markup_nor_a_terminal_command():
    hostile = "[red]x[/red] [/] :smile: \x1b[2J\x07 \\[b]"
    console, out, err, _ = screen()
    console.note(hostile)
    console.warn(hostile)
    console.table("t", ["response"], [[hostile]])
    for text in (out.getvalue(), err.getvalue()):
        assert "[red]x[/red] [/] :smile: \\x1b[2J\\x07 \\[b]" in text
        assert "\x1b" not in text and "\x07" not in text


def test_long_notes_are_not_broken_into_lines():
    console, out, _, _ = screen()
    console.note("word " * 100)
    assert len(out.getvalue().splitlines()) == 1


def test_the_last_line_is_the_path_and_the_next_command_on_one_line():
    console, out, _, _ = screen()
    console.note("before")
    console.done("runs/" + "very-" * 40 + "long/sft/adapter", "lco-lite train-rm")
    assert out.getvalue().splitlines()[-1] == "runs/" + "very-" * 40 + "long/sft/adapter  next: lco-lite train-rm"


def test_quiet_leaves_only_warnings_and_the_last_line():
    console, out, err, _ = screen(quiet=True)
    console.stage("sft", "62 updates")
    console.note("a note")
    console.table("t", ["a"], [[1]])
    with console.progress(1, "sft") as line:
        line.update(1, loss=1.0)
    console.warn("mind this")
    console.done("runs/a/sft/adapter", "lco-lite train-rm")
    assert out.getvalue() == "runs/a/sft/adapter  next: lco-lite train-rm\n"
    assert err.getvalue() == "warning: mind this\n"


def test_quiet_shows_no_live_line_on_a_terminal():
    console, out, _, _ = screen(terminal=True, quiet=True)
    with console.progress(1, "sft") as line:
        line.update(1)
    assert out.getvalue() == ""


def test_json_leaves_stdout_to_json():
    console, out, err, _ = screen(json=True)
    console.stage("eval")
    console.note("a note")
    console.table("t", ["a"], [[1]])
    with console.progress(1, "eval") as line:
        line.update(1)
    console.emit({"math500": {"mean": 0.5, "text": "ü\n"}})
    console.done("runs/a/eval", "lco-lite report")
    assert json.loads(out.getvalue()) == {"math500": {"mean": 0.5, "text": "ü\n"}}
    for said in ("eval", "a note", "next: lco-lite report"):
        assert said in err.getvalue()


def test_a_table_sets_numbers_right_and_shows_what_is_missing_as_empty():
    console, out, _, _ = screen()
    console.table("scores", ["stage", "score"], [["sft", 0.25], ["rl-kld", "0.700 ± 0.010"], ["x", None]])
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "scores"
    assert any("sft" in line and line.rstrip(" │|").endswith("0.250") for line in lines)


def test_text_that_the_stream_cannot_encode_is_replaced_and_not_fatal():
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    console = Console(stdout=out, stderr=io.StringIO())
    console.note("β → 0.5 \ud800")
    console.table("β", ["→"], [["中"]])
    console.done("runs/β")
    out.flush()
    assert b"? ? 0.5 ?" in out.buffer.getvalue()


def test_a_progress_line_leaves_out_what_is_absent():
    assert progress_line("sft", 1, 2, {"loss": 0.5, "reward": None}, None) == "sft 1/2  loss 0.5000"
    assert progress_line("sft", 2, 2, {}, 0.0) == "sft 2/2"


def test_a_progress_line_has_each_of_several_rewards():
    numbers = {"reward": 0.5, "rewards": {"rule": 1.0, "short": -0.25}}
    assert progress_line("rl-grpo", 1, 2, numbers, None) == "rl-grpo 1/2  reward 0.500  rule 1.000  short -0.250"
    assert progress_line("rl-grpo", 1, 2, {"reward": 0.5, "rewards": {"short": 0.5}}, None).endswith("reward 0.500")


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (750, "12:30"), (3723, "1:02:03"), (59.9, "1:00")])
def test_times_read_as_on_a_clock(seconds, text):
    assert clock_time(seconds) == text


def test_line_ends_and_tabs_stay_while_other_controls_are_written_out():
    assert visible("a\tb\nc\r\x00\x9b") == "a\tb\nc\\x0d\\x00\\x9b"
