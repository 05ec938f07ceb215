"""The client against a server that fails in every way a server can; nothing here waits for real."""

from __future__ import annotations

import email.utils
import gzip
import socket
import time

import pytest

from lco_lite.errors import LcoError, UsageError
from lco_lite.judging import judge
from lco_lite.judging.judge import LONGEST_WAIT, TRIES, ChatClient, retry_after
from tests.judging.server import Said, chat_server

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hallo, wörld"}]}
NOW = 1_700_000_000.0


def asked(answers: list[Said], key: str | None = None, timeout: float = 20.0, deadline: float = 60.0):
    """What the client makes of these answers, how long it waited each time, and what the server saw."""
    waits: list[float] = []
    with chat_server(lambda request, n: answers[min(n, len(answers) - 1)]) as server:
        client = ChatClient(server.url, key, timeout, deadline)
        client.sleep, client.now = waits.append, lambda: NOW
        try:
            return client.ask(REQUEST), waits, server
        except LcoError as e:
            return e, waits, server


def test_a_request_is_sent_as_it_is_and_its_reply_read_with_its_tokens():
    reply, waits, server = asked([Said("B")])
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("B", 100, 1)
    assert server.requests == [REQUEST]
    assert server.paths == ["/v1/chat/completions"]
    assert waits == []


@pytest.mark.parametrize("end", ["", "/", "/chat/completions"])
def test_the_url_may_name_the_base_or_the_whole_path(end):
    assert ChatClient("http://host/v1" + end).url == "http://host/v1/chat/completions"


@pytest.mark.parametrize(
    "failure",
    [
        Said(status=500),
        Said(status=503),
        Said(status=429),
        Said(status=408),
        Said(hang_up=True),
        Said(body=b"<html>busy</html>"),
    ],
    ids=["500", "503", "429", "408", "hang-up", "html"],
)
def test_what_may_pass_is_asked_again_after_twice_the_time(failure):
    reply, waits, server = asked([failure, failure, failure, Said("tie")])
    assert reply.text == "tie"
    assert waits == [1.0, 2.0, 4.0]
    assert len(server.requests) == 4


def test_a_server_that_is_silent_is_asked_again():
    reply, waits, _ = asked([Said(silent=True), Said("A")], timeout=0.2)
    assert reply.text == "A"
    assert waits == [1.0]


def test_the_time_that_the_server_asks_for_is_waited():
    date = email.utils.formatdate(NOW + 42, usegmt=True)
    limited = [Said(status=429, headers={"Retry-After": value}) for value in ("17", date, "soon")]
    reply, waits, _ = asked([*limited, Said("A")])
    assert reply.text == "A"
    assert waits == [17.0, 42.0, 4.0]


_NO_DATE = "Mon, 99999999999999999999 Jan 2024 00:00:00 GMT"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("-3", 0.0), ("nan", None), ("x y", None), ("0.5", 0.5), (_NO_DATE, None)],
)
def test_a_retry_after_that_means_nothing_is_none(value, seconds):
    assert retry_after(value, NOW) == seconds


def test_a_server_that_asks_for_too_long_a_wait_is_left_alone():
    error, waits, _ = asked([Said(status=429, headers={"Retry-After": str(LONGEST_WAIT + 1)})])
    assert "asks to wait 301 s" in str(error) and waits == []
    assert error.exit_code == 1


def test_it_gives_up_after_so_many_tries_and_says_why():
    error, waits, server = asked([Said(status=502, body=b"bad gateway")])
    assert len(server.requests) == TRIES and len(waits) == TRIES - 1
    assert "HTTP 502" in str(error) and "bad gateway" in str(error)
    assert error.exit_code == 1


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(LcoError, match=f"{url}/chat/completions cannot be reached"):
        client = ChatClient(url)
        client.sleep = lambda seconds: None
        client.ask(REQUEST)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_request_that_is_refused_is_not_repeated(status):
    error, waits, server = asked([Said(status=status, body=b"no model m")])
    assert isinstance(error, UsageError) and "no model m" in str(error)
    assert len(server.requests) == 1 and waits == []


def test_the_key_is_in_one_header_and_in_no_message():
    error, _, server = asked([Said(status=401, body=b"wrong key: sk-secret")], key="sk-secret")
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(error) and "[key]" in str(error)
    assert error.__cause__ is None
    assert isinstance(error, UsageError)


def test_without_a_key_no_such_header_is_sent_and_a_refusal_says_what_is_missing():
    error, _, server = asked([Said(status=401)])
    assert "Authorization" not in server.headers[0]
    assert "--judge-key VARIABLE@HOST" in str(error)


def test_a_redirect_is_not_followed():
    error, _, server = asked([Said(status=302, headers={"Location": "http://127.0.0.1:9/"})], key="sk-secret")
    assert isinstance(error, UsageError) and "HTTP 302" in str(error)
    assert len(server.requests) == 1


def test_a_stopped_client_neither_waits_nor_asks():
    with chat_server(lambda request, n: Said()) as server:
        client = ChatClient(server.url)
        client.stopped.set()
        with pytest.raises(LcoError, match="stopped"):
            client.ask(REQUEST)
        assert server.requests == []


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[]", "no list of choices"),
        (b'{"choices": []}', "no list of choices"),
        (b'{"choices": {"0": {}}}', "no list of choices"),
        (b'{"choices": [{"message": null}]}', "no message"),
        (b'{"choices": [["A"]]}', "no message"),
        (b'{"choices": [{"message": {"content": ["A"]}}]}', "content is a list, not text"),
        (b'{"choices": [{"message": {"content": 1}}]}', "content is a int, not text"),
        (b'{"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": NaN}}', "NaN is no JSON"),
        (b'{"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": -1}}', "numbers of tokens"),
        (b'{"choices": [{"message": {"content": "A"}}], "usage": {"completion_tokens": "9"}}', "numbers of tokens"),
        (b'{"choices": [{"message": {"content": "A"}}], "usage": 7}', "numbers of tokens"),
        (b"[" * 200_000, "nested without end"),
        (b'"\xff"', "no UTF-8"),
        (b"\x1b]0;mine\x07", r"\x1b]0;mine"),
        (b'{"choices": [', "no chat completion: "),
    ],
)
def test_an_answer_that_is_no_completion_is_asked_for_again_and_then_named(body, told):
    reply, waits, _ = asked([Said(body=body), Said("A")])
    assert reply.text == "A" and waits == [1.0]
    error, _, _ = asked([Said(body=body)])
    assert told in str(error) and "no chat completion" in str(error) and "\x1b" not in str(error)


def test_an_answer_without_text_or_usage_is_one():
    reply, _, _ = asked([Said(body=b'{"choices": [{"message": {"content": null}}], "usage": null}')])
    assert tuple(reply) == (None, 0, 0)


def test_a_body_without_end_is_left_at_its_limit(monkeypatch):
    monkeypatch.setattr(judge, "LARGEST", 2**20)
    monkeypatch.setattr(judge, "TRIES", 1)
    error, _, server = asked([Said(endless=b"x" * 2**16)])
    assert "longer than 1 MiB" in str(error) and server.sent < 2**24


@pytest.mark.parametrize("said", [Said(endless=b"x", pause=0.1), Said(drips=True)], ids=["body", "headers"])
def test_an_answer_that_comes_byte_by_byte_is_left_when_its_time_is_over(said, monkeypatch):
    monkeypatch.setattr(judge, "TRIES", 1)
    began = time.monotonic()
    error, _, _ = asked([said], deadline=1.0)
    assert "no whole answer within 1 s" in str(error) and time.monotonic() - began < 20


def test_an_encoding_that_was_not_asked_for_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(judge, "TRIES", 1)
    error, _, server = asked([Said(body=gzip.compress(b"0" * 2**20), headers={"Content-Encoding": "gzip"})])
    assert "encoded (gzip)" in str(error) and server.headers[0]["Accept-Encoding"] == "identity"


def test_a_key_that_stands_where_a_message_is_cut_does_not_show():
    error, _, _ = asked([Said(status=400, body=b"x" * 295 + b" sk-secret")], key="sk-secret")
    assert "sk" not in str(error)
