"""Which key a judge's host is given. A file names a host, or a variable, but never sends the one to the other: they
belong together by ``KNOWN``, or by ``--judge-key VARIABLE@HOST`` on the command line."""

import os

import httpx

from lco_lite.errors import UsageError
from lco_lite.recipe import Eval

KNOWN = {
    "api.openai.com": "OPENAI_API_KEY",
    "api.anthropic.com": "ANTHROPIC_API_KEY",
    "api.deepseek.com": "DEEPSEEK_API_KEY",
    "api.fireworks.ai": "FIREWORKS_API_KEY",
    "api.groq.com": "GROQ_API_KEY",
    "api.mistral.ai": "MISTRAL_API_KEY",
    "api.together.xyz": "TOGETHER_API_KEY",
    "api.x.ai": "XAI_API_KEY",
    "generativelanguage.googleapis.com": "GEMINI_API_KEY",
    "openrouter.ai": "OPENROUTER_API_KEY",
    "router.huggingface.co": "HF_TOKEN",
}
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def judge_key(settings: Eval) -> str | None:
    """The key for ``judge_url``; None: none is sent. Of a known host it is optional, until the server asks for it.

    Raises UsageError for a variable that is not bound to this host, is not set, or would travel unencrypted.
    """
    try:
        url = httpx.URL(settings.judge_url or "")
    except httpx.InvalidURL as e:
        raise UsageError(f"eval.judge_url: {settings.judge_url!r}: {e}") from e
    named, (variable, host) = settings.judge_key_variable, settings.confirmed_key or (None, None)
    if variable is None:
        known = KNOWN.get(url.host)
        if named is None:
            return _held(known) if known and url.scheme == "https" else None
        if named != known:
            raise UsageError(
                f"eval.judge_key_variable: {named} is not known to belong to {url.host}, and a recipe alone sends no "
                f"variable anywhere: confirm it with `lco-lite eval --judge-key {named}@{url.host}`, or leave it out"
            )
        variable = named
    elif host not in (url.host, f"{url.host}:{url.port}"):
        raise UsageError(f"--judge-key {variable}@{host}: the judge is at {url.host} (eval.judge_url)")
    elif named not in (None, variable):
        raise UsageError(f"--judge-key {variable}@{host}: eval.judge_key_variable names another variable, {named}")
    if url.scheme != "https" and url.host not in _THIS_MACHINE:
        raise UsageError(f"eval.judge_url: {variable} would go over the network in the clear: https is needed")
    if key := _held(variable):
        return key
    raise UsageError(f"eval.judge_key_variable: the environment variable {variable} is not set")


def _held(variable: str) -> str | None:
    """Without the line end that a file of variables leaves. Raises UsageError, which does not show it, for characters
    that no header takes: the HTTP library would."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the environment variable {variable} has characters that no key has")
    return key or None
