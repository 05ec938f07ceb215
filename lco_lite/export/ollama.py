"""A Modelfile: what Ollama needs beside a GGUF to answer as the model was trained and scored."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFReader

from lco_lite.errors import ModelError
from lco_lite.export.job import Export
from lco_lite.messages import Message
from lco_lite.models.chat import ChatFormat


def modelfile(job: Export, file: Path) -> str:
    """FROM the GGUF, the chat template as Ollama's, what ends a response, and the sampling of the recipe's scores."""
    field = GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    chat = job.chat
    adds_bos = field is not None and bool(field.contents())
    template = ollama_template(chat, chat.tokenizer.bos_token or "" if adds_bos else "")
    system, scored = job.system, job.recipe.eval
    stops = [chat.tokenizer.decode([chat.end]), chat.tokenizer.eos_token]
    lines = [f"# ollama create {job.name.lower()} -f Modelfile    (-q q4_K_M: in 4 bits)", f"FROM ./{file.name}"]
    lines += [f"TEMPLATE {_quoted(template)}", *([f"SYSTEM {_quoted(system)}"] if system else [])]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in dict.fromkeys(stops) if stop]
    # Ollama's own top_k, min_p and repeat_penalty would make another policy of it than was scored
    settings = {"temperature": scored.temperature, "top_p": scored.top_p, "top_k": 0, "min_p": 0, "repeat_penalty": 1}
    lines += [f"PARAMETER {name} {value}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def ollama_template(chat: ChatFormat, bos: str = "") -> str:
    """The chat template in Go's language, from what it writes before, between and after the turns of a conversation.
    ``bos``: what the program that reads it writes at the beginning by itself.

    Raises ModelError where the template does more than put such texts around turns.
    """
    start, with_system, asked, answered, following = _around_turns(chat)
    first = _literal(start.removeprefix(bos))
    if with_system is not None:
        before, after = (_literal(text) for text in (with_system[0].removeprefix(bos), with_system[1]))
        first = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{first}{{{{ end }}}}"
    return (
        first
        + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + '{{ if eq .Role "user" }}{{ .Content }}'
        + f"{{{{ if $last }}}}{_literal(asked)}{{{{ else }}}}{_literal(answered)}{{{{ end }}}}"
        + '{{ else if eq .Role "assistant" }}{{ .Content }}'
        + f"{{{{ if not $last }}}}{_literal(following)}{{{{ end }}}}"
        + "{{ end }}{{ end }}"
    )


def _around_turns(chat: ChatFormat) -> tuple[str, tuple[str, str] | None, str, str, str]:
    """What the template writes (before the first user turn, around a system text or None where it takes none, after a
    user turn that is to be answered, after one that was, after an answer). Proved on longer conversations."""
    talk = [{"role": role, "content": f"lcolite{i}"} for i, role in enumerate(["user", "assistant"] * 2 + ["user"])]
    system = {"role": "system", "content": "lcolitesystem"}
    pieces = _between(chat, talk[:3])
    if pieces is None:
        raise ModelError("export --to ollama: the chat template does not write the turns of a conversation one by one")
    start, answered, following, asked = pieces
    try:
        found = _between(chat, [system, *talk[:1]])
    except ModelError:  # what a template without such a role says of it
        found = None
    with_system = None if found is None else (found[0], found[1])
    for turns in (talk[:1], talk[:3], talk):
        for first in ([], [system]) if with_system else ([],):
            head = start if not first else with_system[0] + system["content"] + with_system[1]  # type: ignore[index]
            body = "".join(m["content"] + (answered if m["role"] == "user" else following) for m in turns[:-1])
            written, expected = head + body + turns[-1]["content"] + asked, chat.prompt_text([*first, *turns])
            if written != expected:
                at = len(os.path.commonprefix([written, expected]))
                raise ModelError(
                    "export --to ollama: the chat template does more than put texts around turns: with "
                    f"{len(turns)} turns it writes {expected[at:][:60]!r} where {written[at:][:60]!r} was expected. "
                    "--to gguf carries the template itself, which llama.cpp's server reads"
                )
    return start, with_system, asked, answered, following


def _between(chat: ChatFormat, messages: Sequence[Message]) -> list[str] | None:
    """What the template writes before, between and after the contents; None where it leaves one out."""
    rest, pieces = chat.prompt_text(messages), list[str]()
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found:
            return None
        pieces.append(before)
    return [*pieces, rest]


def _literal(text: str) -> str:
    """Text as it is outside of Go's actions; one that has their marks, as a string inside of one."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{{" in text or "}}" in text else text


def _quoted(text: str) -> str:
    if '"""' in text:
        raise ModelError("export --to ollama: a Modelfile cannot hold a template or system text with three quotes")
    return f'"""{text}"""'
