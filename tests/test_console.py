import io
import json
import re

import pytest

from lco_lite.console import Console
from lco_lite.progress import clock_time, compact, sparkline
from lco_lite.visible import visible


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


NUMBERS = {"reward": 0.25, "grad_norm": 1.5, "entropy": 0.4, "kl_to_old": 0.01, "tokens_per_second": 321.4}


def test_without_a_terminal_each_step_is_one_plain_line_and_begins_with_the_time_left():
    console, out, _, clock = screen()
    with console.progress(4, "rl-kld") as line:
        for step in (1, 2):
            clock.now += 10
            line.step(step, {"rollout": 9.0}, NUMBERS)
    first, second = out.getvalue().splitlines()
    numbers = "reward 0.250  grad 1.50  KL 0.0100  entropy 0.400  tok/s overall 321  memory "
    assert first.startswith(f"0:30 left  rl-kld 1/4  {numbers}") and second.startswith("0:20 left  rl-kld 2/4  ")
    assert re.search(r"memory [\d.]+ of [\d.]+ GiB, peak [\d.]+$", first)
    assert "\x1b" not in out.getvalue()


def test_a_step_that_is_updated_many_times_is_still_one_line():
    console, out, _, clock = screen()
    with console.progress(2, "rl") as line:
        for step in (1, 2):
            for _ in range(50):
                line.update(step - 1, metrics={"loss": 1.0})
            line.step(step, {}, {"loss": 0.5})
    assert len(out.getvalue().splitlines()) == 2


def test_other_work_says_a_line_at_its_end_and_now_and_then():
    console, out, _, clock = screen()
    with console.progress(70, "eval") as line:
        for done in range(1, 71):
            clock.now += 1
            line.update(done)
    assert [line.split("  memory")[0] for line in out.getvalue().splitlines()] == [
        "0:40 left  eval 30/70",
        "0:10 left  eval 60/70",
        "eval 70/70",
    ]


def test_a_phase_inside_a_step_shows_life_only_now_and_then():
    console, out, _, clock = screen()
    with console.progress(2, "rl"), console.progress(100, "rollout") as inner:
        for done in range(1, 101):
            clock.now += 1
            inner.update(done)
    assert [line.split("  memory")[0] for line in out.getvalue().splitlines()] == [
        "1:10 left  rollout 30/100",
        "0:40 left  rollout 60/100",
        "0:10 left  rollout 90/100",
    ]


def test_a_batch_under_way_moves_the_count_and_the_time_left():
    console, _, _, clock = screen()
    with console.progress(64, "rollout") as line:
        assert line.seconds_left() is None
        shown = []
        for second in range(1, 40):
            clock.now += 1
            line.update(0, part=1.6 * second)
            shown.append(line.seconds_left())
            assert line.line().split("  ")[1] == f"rollout {int(1.6 * second)}/64"
        assert shown == [pytest.approx(40 - second) for second in range(1, 40)]
        line.update(64)
        assert line.seconds_left() == 0


def test_batches_that_end_early_do_not_make_the_time_left_rise():
    """The first of four takes a fifth of the tokens that it might: what is under way is an estimate from below."""
    console, _, _, clock = screen()
    shown = []
    with console.progress(64, "rollout") as line:
        for batch in range(4):
            for second in range(1, 11):
                clock.now += 1
                line.update(16 * batch, part=16 * 0.02 * second)
                shown.append(line.seconds_left())
            line.update(16 * (batch + 1))
    assert shown == sorted(shown, reverse=True) and shown[10] < 30


def test_the_time_left_is_there_in_the_first_step_as_soon_as_every_phase_of_it_is_known():
    console, _, _, clock = screen(terminal=True)
    every = {"rollout": 1, "score": 1, "update": 1, "eval": 4}

    def head() -> str:
        return next(line.plain for line in console._area().renderables).split(" left")[0]

    with console.progress(4, "rl", every=every) as line:
        for phase, parts in {"rollout": 10, "score": 4, "update": 6}.items():
            console.phase(phase)
            with console.progress(parts, phase) as inner:
                for done in range(1, parts + 1):
                    clock.now += 1
                    inner.update(done)
                    expected = f"≥{clock_time(80 - clock.now)}" if phase == "update" else "…"
                    assert head() == expected, (phase, done)
            console.phase("")
        line.step(1, {"rollout": 10.0, "score": 4.0, "update": 6.0}, {})
        assert head() == "1:00"


def test_the_places_of_the_live_lines_are_fixed():
    console, _, _, clock = screen(terminal=True)
    places, rows = set(), []
    with console.progress(20, "rl-kld") as line:
        for metrics in ({}, {"loss": 1e-7, "entropy": 1.0, "reward": -1.0, "dead_groups": 1.0, "kl_to_old": 1.0}, {}):
            for phase, total in (("rollout", 640), ("score", 4), ("held-out", 64)):
                with console.progress(total, phase) as inner:
                    inner.update(total // 2)
                    clock.now += 1
                    shown = [part.plain for part in console._area().renderables]
                    places.add((shown[0].index("rl-kld"), shown[0].index(phase), shown[0].rindex(" ━")))
                    rows.append(len(shown))
            line.step(line.done + 1, {}, metrics)
    assert len(places) == 1 and rows == sorted(rows), "lines do not become fewer"


def test_a_phase_by_itself_is_alive_until_it_ends_also_by_an_error():
    console, out, _, _ = screen(terminal=True)
    with pytest.raises(ValueError), console.waiting("loading"):
        console.note("said")
        assert [line.plain for line in console._area().renderables] == ["loading 0:00"]
        raise ValueError
    assert text(out.getvalue()).strip() == "said"
    assert out.getvalue().rstrip().endswith("\x1b[2K") and out.getvalue().count("\x1b[?25h") == 1
    console, out, _, _ = screen()
    with console.waiting("loading"):
        pass
    assert not out.getvalue()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00"), (-0.0, "0.00"), (1.23e-5, "1.2e-5"), (-7.1e-7, "-7.1e-7"), (0.0056, "0.0056"), (0.1464, "0.146"),
        (-0.01234, "-0.0123"), (5.6209, "5.62"), (12.34, "12.3"), (99.96, "100"), (1234.5, "1234"), (2e6, "2.0e+6"),
        (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_small_numbers_are_told_from_none(value, shown):
    assert compact(value) == shown and len(shown) <= 7


def test_the_title_of_a_narrow_table_is_one_line():
    console, out, _, _ = screen()
    console.table("mean ± std over seeds, %", ["a"], [[1]])
    assert out.getvalue().splitlines()[0] == "mean ± std over seeds, %"


def times_left(steps, total, every=None, done=0):
    """Seconds left as shown after each step and each second within, of steps given as {phase: seconds}."""
    console, _, _, clock = screen()
    shown = []
    with console.progress(total, "rl", done, every) as line:
        for step, seconds in enumerate(steps, done + 1):
            for _ in range(round(sum(seconds.values()))):
                clock.now += 1
                shown.append(line.seconds_left())
            line.step(step, seconds, {})
            shown.append(line.seconds_left())
    return [left for left in shown if left is not None]


def test_the_time_left_counts_only_what_was_done_here():
    assert times_left([{"update": 2.0}], 100, done=90)[-1] == 18


def test_the_time_left_never_rises_for_the_noise_of_steps():
    steps = [{"rollout": 10.0 + (7 * i) % 4, "update": 3.0 + (5 * i) % 3} for i in range(20)]
    shown = times_left(steps, 20)
    assert shown == sorted(shown, reverse=True) and shown[-1] == 0 and shown[0] > 200


def test_one_slow_step_says_little_about_the_time_left():
    shown = times_left([{"rollout": 10.0}] * 5 + [{"rollout": 60.0}], 100)
    assert shown[-1] == 94 * 10


def test_held_out_scores_to_come_are_in_the_time_left_at_their_own_price():
    steps = [{"rollout": 10.0} | ({"eval": 30.0} if i % 5 == 4 else {}) for i in range(10)]
    shown = times_left(steps, 20, {"eval": 5})
    assert shown[-1] == 10 * 10 + 2 * 30
    after_first_eval = shown[shown.index(15 * 10 + 3 * 30) :]
    assert after_first_eval == sorted(after_first_eval, reverse=True)


def test_the_time_left_rises_where_steps_really_become_slower():
    shown = times_left([{"rollout": 10.0}] * 4 + [{"rollout": 30.0}] * 16, 40)
    assert shown[-1] == 20 * 30


def test_a_stage_that_goes_on_knows_the_time_left_before_its_first_step():
    console, _, _, _ = screen()
    with console.progress(10, "rl", 4) as line:
        line.recall([{"reward": 0.5, "seconds": {"rollout": 8.0, "update": 2.0, "loading": 100.0}}] * 4)
        assert line.seconds_left() == 60
        assert "▄▄▄▄" not in "".join(item.plain for item in line.items())  # it has no reward yet
        line.update(4, metrics={"reward": 0.5})
        assert "reward 0.500 ▄▄▄▄" in [item.plain for item in line.items()]


def text(written: str) -> str:
    """What is to be read of it: no codes, and no bars."""
    return re.sub(r" *[━╸╺]+ *", " | ", re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", written))


def test_on_a_terminal_the_live_lines_go_and_a_row_of_each_step_stays():
    console, out, _, _ = screen(terminal=True)
    with console.progress(2, "rl") as line, console.progress(10, "rollout") as inner:
        inner.update(5)
        line.step(1, {}, {"reward": 0.1})
        console.note("said in between")
        line.step(2, {}, {"reward": 0.2, "eval": 0.5})
    rows = [line.split() for line in text(out.getvalue()).splitlines() if line.strip()]
    assert rows[:6] == [
        ["step", "reward", "s"],
        ["1/2", "0.100", "0.0"],
        ["said", "in", "between"],
        ["step", "reward", "held-out", "s"],  # which is new
        ["2/2", "0.200", "0.500", "0.0"],
        ["0:00", "left", "rl", "2/2", "|"],
    ]
    assert out.getvalue().rstrip().endswith("\x1b[2K"), "the live lines are taken away"


@pytest.mark.parametrize("variable", [("TERM", "dumb"), ("TTY_INTERACTIVE", "0")])
def test_a_terminal_that_cannot_redraw_gets_plain_lines(monkeypatch, variable):
    monkeypatch.setenv(*variable)
    console, out, _, _ = screen(terminal=True)
    with console.progress(2, "rl") as line:
        line.step(1, {}, {"reward": 0.1})
    assert "rl 1/2  reward 0.100" in out.getvalue() and "\x1b" not in out.getvalue()


def test_no_lines_are_redrawn_in_a_file_whose_colours_are_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console, out, _, _ = screen()
    with console.progress(2, "rl") as line:
        line.step(1, {}, {"reward": 0.1})
    assert "rl 1/2  reward 0.100" in out.getvalue() and "\x1b[2K" not in out.getvalue()


def test_the_screen_works_again_after_an_error_inside_a_progress():
    console, out, _, _ = screen(terminal=True)
    with pytest.raises(KeyboardInterrupt), console.progress(2, "rl"), console.progress(2, "rollout"):
        raise KeyboardInterrupt
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1  # the cursor is back
    with console.progress(3, "again") as line:
        line.update(3)
    assert text(out.getvalue()).rstrip().endswith("again 3/3 in 0:00")


def test_a_label_with_control_characters_or_markup_does_not_steer_the_terminal():
    console, out, _, _ = screen(terminal=True)
    with console.progress(2, "[red]a\x1b[2J\nb[/red]") as line:
        line.update(1)
    assert "[red]a\\x1b[2J\\nb[/red] 1/2 | " in text(out.getvalue()) and "\x1b[2J" not in out.getvalue()


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


def test_quiet_leaves_only_warnings_results_and_the_last_line():
    console, out, err, _ = screen(quiet=True)
    console.stage("sft", "62 updates")
    console.note("a note")
    console.table("t", ["a"], [[1]])
    with console.progress(1, "sft") as line:
        line.update(1, metrics={"loss": 1.0})
    console.warn("mind this")
    console.result("a score")
    console.table("of", ["a"], [[1]], result=True)
    console.done("runs/a/sft/adapter", "lco-lite train-rm")
    lines = out.getvalue().splitlines()
    assert lines[0] == "a score" and lines[1] == "of" and lines[-1] == "runs/a/sft/adapter  next: lco-lite train-rm"
    assert "a note" not in out.getvalue() and "loss" not in out.getvalue()
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
    console.emit({"math500": {"mean": 0.5, "text": "ü\n\x1b\x7f\u202e"}})
    console.done("runs/a/eval", "lco-lite report")
    assert json.loads(out.getvalue()) == {"math500": {"mean": 0.5, "text": "ü\n\x1b\x7f\u202e"}}
    assert out.getvalue().rstrip().isprintable()
    for said in ("eval", "a note", "next: lco-lite report"):
        assert said in err.getvalue()


def test_a_table_sets_numbers_right_and_shows_what_is_missing_as_empty():
    console, out, _, _ = screen()
    console.table("scores", ["stage", "score"], [["sft", 0.25], ["rl-kld", "0.700 ± 0.010"], ["x", None]])
    lines = out.getvalue().splitlines()
    assert lines[0] == "scores"
    assert any("sft" in line and line.rstrip(" │|").endswith("0.250") for line in lines)


def test_text_that_the_stream_cannot_encode_is_replaced_and_not_fatal():
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    console = Console(stdout=out, stderr=io.StringIO())
    console.note("β → 0.5 \ud800")
    console.table("β", ["→"], [["中"]])
    console.done("runs/β")
    out.flush()
    assert b"? ? 0.5 \\ud800" in out.buffer.getvalue()


def line_of(metrics):
    console, out, _, _ = screen()
    with console.progress(1, "rl") as line:
        line.step(1, {}, metrics)
    return out.getvalue().split("  memory")[0]


def test_a_line_leaves_out_what_is_absent_and_what_says_the_same():
    assert line_of({"loss": 0.5, "reward": None, "skipped_updates": 0}) == "rl 1/1  loss 0.500"
    assert line_of({"reward": -0.4, "accuracy": 0.3}) == "rl 1/1  reward -0.400"
    assert line_of({"reward": 0.5, "accuracy": 0.3}) == "rl 1/1  reward 0.500  accuracy 0.300"


def test_a_line_has_each_of_several_rewards():
    numbers = {"reward": 0.5, "rewards": {"rule": 1.0, "short": -0.25}}
    assert line_of(numbers) == "rl 1/1  reward 0.500  rule 1.000  short -0.250"
    assert line_of({"reward": 0.5, "rewards": {"short": 0.5}}).endswith("reward 0.500")


def test_a_trend_goes_from_the_least_to_the_greatest():
    assert sparkline([0.0, 0.5, 1.0, 0.25]) == "▁▅█▃" and sparkline([2.0, 2.0]) == "▄▄"


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (750, "12:30"), (3723, "1:02:03"), (59.9, "1:00")])
def test_times_read_as_on_a_clock(seconds, text):
    assert clock_time(seconds) == text


def test_line_ends_and_tabs_stay_while_other_controls_are_written_out():
    assert visible("a\tb\nc\r\x00\x9b") == "a\tb\nc\\x0d\\x00\\x9b"
    assert visible("a\nb", lines=False) == "a\\nb"


def test_what_hides_or_turns_text_around_is_written_out():
    assert visible("a\u202eb\u2066c\u200bd\ufeff\ud800\U000e0041") == (
        "a\\u202eb\\u2066c\\u200bd\\ufeff\\ud800\\U000e0041"
    )
    assert visible("naïve 中文 עברית 😀 β") == "naïve 中文 עברית 😀 β"


def test_on_a_terminal_warnings_are_wrapped_at_words_and_paths_stay_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    console, out, _, _ = screen(terminal=True)
    path = "/a/" + "long-" * 12 + "path"
    console.note(f"  1. some words that are too many for one line {path}\n\nand more")
    assert text(out.getvalue()).split("\n")[:6] == [
        "  1. some words that are too many for",
        "  one line",
        f"  {path}",
        "",
        "and more",
        "",
    ]
