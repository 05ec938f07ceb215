"""Verdicts in both orders, each asked once and for all."""

from __future__ import annotations

import io
import json
import re
import threading

import pytest

from lco_lite.console import Console
from lco_lite.errors import LcoError, UsageError
from lco_lite.judging.judge import ANSWERS, ChatClient, Comparison, Judge, read_verdict, refuse_unconfirmed
from lco_lite.recipe import Eval
from tests.judging.server import Said, chat_server

PAIRS = [Comparison("Name a fruit", "an apple", "fruit"), Comparison("Say hi", "no", "hello there")]


def settings(url: str = "http://localhost/v1", **more) -> Eval:
    return Eval(judge_url=url, judge_model="m", judge_parallel=2, **more)


def quiet() -> Console:
    return Console(quiet=True, stdout=io.StringIO(), stderr=io.StringIO())


def answers_of(request) -> tuple[str, str]:
    """The texts of A and B in what the judge is asked first."""
    found = re.search(
        r"<answer A>\n(.*)\n</answer A>\n\n<answer B>\n(.*)\n</answer B>", request["messages"][0]["content"], re.S
    )
    return found[1], found[2]


def prefers_longer(request, n) -> Said:
    a, b = answers_of(request)
    return Said("A" if len(a) > len(b) else "B")


def judge_of(server, folder, **more) -> Judge:
    client = ChatClient(server.url)
    client.sleep = lambda seconds: None
    return Judge(client, settings(server.url, **more), folder / "judge.jsonl")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("**Tie**", "tie"),
        ("a tie", "tie"),
        ("[[B]]", "B"),
        ("Answer A is better.", "A"),
        ("Verdict: B", "B"),
        ("The better answer is Answer B.", "B"),
        ("A\n\nBecause it is right.", "A"),
        ("Both name a fruit.\nB", "B"),
        ("<think>A? B?</think>\nA", "A"),
        ("A\nB", None),
        ("A and B are alike", None),
        ("An apple", None),
        ("", None),
    ],
)
def test_a_verdict_is_one_word_first_or_last(reply, verdict):
    assert read_verdict(reply) == verdict


def test_every_pair_is_judged_in_both_orders_and_the_mean_is_its_score(tmp_path):
    with chat_server(prefers_longer) as server:
        found = judge_of(server, tmp_path).scores(PAIRS, quiet())
        assert sorted(map(answers_of, server.requests)) == sorted(
            [(p.answer, p.reference) for p in PAIRS] + [(p.reference, p.answer) for p in PAIRS]
        )
    assert [one.score for one in found] == [1.0, 0.0]
    assert [one.in_order for one in found] == [(1.0, 1.0), (0.0, 0.0)]


def test_a_judge_that_always_prefers_the_first_scores_one_half(tmp_path):
    with chat_server(lambda request, n: Said("A")) as server:
        found = judge_of(server, tmp_path).scores(PAIRS, quiet())
    assert [(one.score, one.in_order) for one in found] == [(0.5, (1.0, 0.0))] * 2


def test_a_second_run_asks_nothing_and_finds_the_same(tmp_path):
    with chat_server(prefers_longer) as server:
        first = judge_of(server, tmp_path).scores(PAIRS, quiet())
        again = judge_of(server, tmp_path)
        assert again.estimate(PAIRS).requests == 0 and again.estimate(PAIRS).known == 4
        assert again.scores(PAIRS, quiet()) == first
        assert len(server.requests) == 4


def test_another_model_or_option_is_asked_anew(tmp_path):
    with chat_server(prefers_longer) as server:
        judge_of(server, tmp_path).scores(PAIRS[:1], quiet())
        judge_of(server, tmp_path, judge_options={"temperature": 1}).scores(PAIRS[:1], quiet())
        assert [request.get("temperature") for request in server.requests] == [0, 0, 1, 1]


def test_an_answer_off_the_point_is_asked_again_with_a_reminder(tmp_path):
    def vague_once(request, n):
        return prefers_longer(request, n) if len(request["messages"]) > 1 else Said("Hard to say.")

    with chat_server(vague_once) as server:
        found = judge_of(server, tmp_path).scores(PAIRS[:1], quiet())
        longest = max(server.requests, key=lambda request: len(request["messages"]))
    assert [m["role"] for m in longest["messages"]] == ["user", "assistant", "user"]
    assert found[0].score == 1.0 and found[0].off_point == 0


def test_a_judge_that_never_comes_to_the_point_is_a_tie_that_is_counted_and_kept(tmp_path):
    with chat_server(lambda request, n: Said(None if n % 2 else "As an AI model, I like both")) as server:
        found = judge_of(server, tmp_path).scores(PAIRS[:1], quiet())
        assert len(server.requests) == 2 * ANSWERS
        assert (found[0].score, found[0].off_point) == (0.5, 2)
        assert judge_of(server, tmp_path).scores(PAIRS[:1], quiet()) == found
        assert len(server.requests) == 2 * ANSWERS


def test_what_was_answered_before_a_failure_is_not_asked_again(tmp_path):
    with chat_server(lambda request, n: prefers_longer(request, n) if n < 2 else Said(status=403)) as server:
        judge = judge_of(server, tmp_path)
        judge.settings = settings(server.url).model_copy(update={"judge_parallel": 1})
        with pytest.raises(UsageError, match="HTTP 403"):
            judge.scores(PAIRS, quiet())
        server.answer = prefers_longer
        assert judge_of(server, tmp_path).estimate(PAIRS).requests == 2
        assert [one.score for one in judge_of(server, tmp_path).scores(PAIRS, quiet())] == [1.0, 0.0]
        server.answer = lambda request, n: Said(status=403)
        assert [one.score for one in judge_of(server, tmp_path).scores(PAIRS, quiet())] == [1.0, 0.0]


def test_a_failure_ends_the_waiting_of_the_other_threads(tmp_path):
    """One request is told to wait an hour-like time, another is refused: the refusal is what is raised, at once."""
    both = threading.Barrier(2, timeout=10)

    class Two:
        url = "http://host"
        stopped = threading.Event()

        def ask(self, request):
            first = both.wait() == 0
            if first:
                raise UsageError("refused")
            assert self.stopped.wait(10), "the waiting thread is told"
            raise UsageError("woken")

        def stop(self):
            self.stopped.set()

    judge = Judge(Two(), settings(), tmp_path / "judge.jsonl")
    with pytest.raises(UsageError, match="refused"):
        judge.scores(PAIRS[:1], quiet())
    assert Two.stopped.is_set()


def test_a_line_that_a_kill_cut_short_is_asked_again_and_spoils_no_other(tmp_path):
    with chat_server(prefers_longer) as server:
        judge_of(server, tmp_path).scores(PAIRS, quiet())
        file = tmp_path / "judge.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        judge_of(server, tmp_path).scores(PAIRS, quiet())
        assert len(server.requests) == 5
        judge_of(server, tmp_path).scores(PAIRS, quiet())
        assert len(server.requests) == 5


def test_answers_kept_have_the_words_and_tokens_but_neither_key_nor_texts(tmp_path):
    with chat_server(prefers_longer) as server:
        client = ChatClient(server.url, "sk-secret")
        Judge(client, settings(server.url), tmp_path / "judge.jsonl").scores(PAIRS, quiet())
    content = (tmp_path / "judge.jsonl").read_text()
    line = json.loads(content.splitlines()[0])
    assert sorted(line) == ["key", "said", "seal", "tokens_in", "tokens_out", "verdict"]
    assert line["tokens_in"] == 100
    assert "sk-secret" not in content and "apple" not in content


def test_pairs_that_are_equal_are_asked_once(tmp_path):
    with chat_server(prefers_longer) as server:
        found = judge_of(server, tmp_path).scores([PAIRS[0]] * 3, quiet())
        assert len(server.requests) == 2
    assert [one.score for one in found] == [1.0] * 3


def test_the_cost_counts_requests_tokens_and_dollars(tmp_path):
    priced = settings(judge_price=(10.0, 100.0))
    cost = Judge(ChatClient("http://host"), priced, tmp_path / "judge.jsonl").estimate(
        [Comparison("i" * 4_000, "a" * 8_000, "r" * 4_000)]
    )
    assert cost.requests == 2 and cost.known == 0
    assert 2 * 4_000 < cost.tokens_in < 2 * 4_200
    assert cost.dollars == pytest.approx(cost.tokens_in / 1e5 + cost.tokens_out / 1e4)
    assert "2 requests" in str(cost) and "$0.08" in str(cost)


def test_more_requests_than_the_limit_need_a_yes_and_the_message_has_the_cost_of_all_passes(tmp_path):
    judge = Judge(ChatClient("http://host"), settings(judge_price=(1e4, 0)), tmp_path / "judge.jsonl")
    cost = judge.estimate(PAIRS)
    refuse_unconfirmed(cost, settings(judge_limit=4))
    refuse_unconfirmed(cost, settings(judge_limit=3, judge_confirmed=True))
    with pytest.raises(UsageError) as caught:
        refuse_unconfirmed(cost, settings(judge_limit=3, seeds=4))
    told = str(caught.value)
    assert caught.value.exit_code == 2
    assert "4 requests" in told and "16 requests" in told and "--yes" in told and f"${4 * cost.dollars:.2f}" in told


def test_the_pair_whose_answer_cannot_be_had_is_named(tmp_path, monkeypatch):
    with chat_server(lambda request, n: Said(body=b"{}" if "no" in answers_of(request) else None)) as server:
        judge = judge_of(server, tmp_path)
        with pytest.raises(LcoError, match="pair 2 of 2: .*cannot be reached .*no list of choices"):
            judge.scores(PAIRS, quiet())
