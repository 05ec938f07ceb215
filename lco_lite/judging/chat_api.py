"""A client of the chat-completions API that OpenAI defined and most servers speak: one request, retried until answered.

Written on the standard library: no HTTP client is a dependency that every supported version of the others shares.
The key goes into one header. It is in no message, no file and, since redirects are refused, on no other host.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lco_lite.errors import LcoError, UsageError

TIMEOUT = 120.0  # seconds until a request counts as lost
TRIES = 6  # 1 + 2 + 4 + 8 + 16 s of waiting between them, unless the server says otherwise
LONGEST_WAIT = 300.0  # seconds; who asks for more is better asked again another day


@dataclass(frozen=True)
class Reply:
    """``text``: None where the server answered without one (a refusal); tokens as the server counts them, 0 if not."""

    text: str | None
    tokens_in: int
    tokens_out: int


class _Again(Exception):
    """What may pass by itself; ``wait``: seconds the server asks for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class ChatClient:
    """``url`` is the API's base, such as ``http://localhost:8000/v1``. Safe to use from several threads.

    ``sleep`` waits so many seconds, ``now`` is the time since 1970; tests give their own.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout: float = TIMEOUT,
        sleep: Callable[[float], Any] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._key, self._timeout, self._now = key, timeout, now
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, request: Mapping[str, Any]) -> Reply:
        """The reply to one request. Waits and tries again on 408, 429, 5xx, timeouts and broken connections.

        Raises UsageError where the server refuses the request, LcoError where it stays out of reach.
        """
        why = "stopped"
        for i in range(TRIES):
            if self._stopped.is_set():
                break
            try:
                return self._once(request)
            except _Again as e:
                why = str(e)
                wait = 2.0**i if e.wait is None else e.wait
                if wait > LONGEST_WAIT:
                    raise LcoError(f"{self.url} asks to wait {wait:.0f} s: {why}; start again later") from e
                if i < TRIES - 1:
                    self._sleep(wait)
        raise LcoError(f"{self.url} cannot be reached ({TRIES} tries): {why}")

    def stop(self) -> None:
        """Ends waiting in all threads; what is under way is still answered."""
        self._stopped.set()

    def _once(self, request: Mapping[str, Any]) -> Reply:
        headers = {"Content-Type": "application/json", "User-Agent": "lco-lite"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        body = json.dumps(request).encode()
        try:
            asked = urllib.request.Request(self.url, body, headers, method="POST")
            with self._opener.open(asked, timeout=self._timeout) as answer:
                return self._reply(answer.read())
        except urllib.error.HTTPError as e:
            raise self._failure(e) from None  # its text may hold the key's beginning
        except (OSError, http.client.HTTPException) as e:  # refused, reset, unknown host, timed out, cut short
            raise _Again(self._safe(str(e) or type(e).__name__)) from None

    def _failure(self, e: urllib.error.HTTPError) -> Exception:
        with e:
            try:
                said = e.read(2_000).decode("utf-8", "replace")
            except (OSError, http.client.HTTPException):
                said = ""
        text = f"HTTP {e.code} {e.reason}: {self._safe(' '.join(said.split())[:300])}"
        if e.code in (408, 429) or e.code >= 500:
            return _Again(text, retry_after(e.headers.get("Retry-After"), self._now()))
        if e.code in (401, 403):
            held = "the key is not accepted" if self._key else "it wants a key, and eval.judge_key_variable gives none"
            return UsageError(f"{self.url}: {held}: {text}")
        return UsageError(f"{self.url} refuses the request: {text}")

    def _reply(self, body: bytes) -> Reply:
        try:
            found = json.loads(body)
            text = found["choices"][0]["message"].get("content")
            usage = found.get("usage") or {}
            counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Again(f"no chat completion: {self._safe(repr(body[:100]))}") from None
        return Reply(text if isinstance(text, str) else None, *counts)

    def _safe(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, with the key, on a host that nobody named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date; None where it has neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None
