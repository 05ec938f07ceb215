"""Malformed inputs: kind × field × bad value. Each is refused at once by one message that names file or field, or is
accepted knowingly: ``ACCEPTED`` says why.

A case is a text ``KIND FIELD VALUE``; the values are those of ``VALUES`` by name. All run in this process.
"""

from __future__ import annotations

import copy
import json
import math
import re
import time
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel

from lco_lite.errors import LcoError, UsageError
from tests.conftest import TINY
from tests.faults.runs import Failed

SECONDS = 10.0  # of this process, that refusing one input may take

VALUES: dict[str, Any] = {
    "null": None,
    "false": False,
    "minus": -3,
    "huge": 2**70,
    "half": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "empty": "",
    "blank": "  ",
    "text": "no such thing",
    "list": [],
    "numbers": [1, 2, 3],
    "nulls": [None],
    "texts": ["no such thing"],
    "mapping": {},
    "inner": {"a": {"b": [1]}},
    "nested": [[["x"]]],
}
_GONE = object()

# (pattern of a case, why it is taken); everything else is refused
ACCEPTED: list[tuple[str, str]] = []


def _accepts(*patterns: str, because: str) -> None:
    ACCEPTED.extend((pattern, because) for pattern in patterns)


_accepts(r"recipe rl mapping", because="nothing is set")
_accepts(
    r"rows (?!preferences/hh)\S+/(prompt|response|instruction|output|question|chosen|rejected|prediction_[12]) text",
    r"item \S+\.(question|problem|prompt|instruction|output|response) text",
    r"item (math500|aime24|custom|qa_feedback)\.answer text",
    r"item math500\.solution text",
    because="a text is what is wanted there",
)
_accepts(r"rows \S+/input (null|empty|blank|text|gone)", because="Alpaca's rows have it empty")
_accepts(r"rows preferences/fg/passages (null|false|empty|list|mapping|gone)", because="a question without passages")
_accepts(r"item (math500|aime24|custom)\.answer (minus|huge|half)", because="answers are numbers too")
_accepts(r"item math500\.answer gone", because="the solution boxes it")
_accepts(r"item mmlu\.choices numbers", because="a number is written out")
_accepts(r"item mmlu\.subject .*", because="it is read where a template or worked examples name it")
_accepts(r"item custom\.response gone", because="demonstrations are not needed")
_accepts(r"item qa_feedback\.(passages list|answer texts)", because="a list is what is wanted there")
_accepts(r"item alpaca_eval\.output (empty|blank)", because="a reference may say nothing")
_accepts(r"model config\.architectures .*", because="the kind of model follows from model_type")
_accepts(r"model (tokenizer_config|generation_config)\.json gone", because="older models have none")
_accepts(r"adapter no_such_field text", because="PEFT writes new fields with each version")
_accepts(r"judge verdict .*", because="it counts as a tie, and as off the point, which is told")


@cache
def cases() -> dict[str, Callable[[Path], object]]:
    """By name, what is done with the input; it takes a folder of its own."""
    made: dict[str, Callable[[Path], object]] = {}
    for kind in (_recipes, _rows, _items, _models, _adapters, _ggufs, _judges, _names):
        for name, work in kind():
            assert name not in made, name
            made[name] = work
    return made


def names() -> list[str]:
    return list(cases())


def tried(name: str, folder: Path) -> str:
    """``refused`` or ``accepted``. Raises Failed where the input is neither refused well nor known to be taken."""
    place = folder / "malformed"
    place.mkdir(exist_ok=True)
    known = [why for pattern, why in ACCEPTED if re.fullmatch(pattern, name)]
    began = time.process_time()
    try:
        cases()[name](place)
    except LcoError as e:
        _told_well(name, e)
        if known:
            raise Failed(f"{name}: is said to be accepted, and is refused: {e}") from e
        return "refused"
    except Exception as e:
        raise Failed(f"{name}: {type(e).__name__}: {' '.join(str(e).split())[:400]}") from e
    finally:
        if time.process_time() - began > SECONDS:
            raise Failed(f"{name}: took {time.process_time() - began:.0f} s")
    if not known:
        raise Failed(f"{name}: is accepted")
    return "accepted"


def _told_well(name: str, error: LcoError) -> None:
    kind, field, _ = name.split(" ", 2)
    wanted = 1 if kind == "judge" else 2
    text = str(error)
    if error.exit_code != wanted:
        raise Failed(f"{name}: status {error.exit_code}: {text[:400]}")
    if len(text) > 5000 or not text.strip():
        raise Failed(f"{name}: a message of {len(text)} characters")
    named = (
        field.split(".")[-1]
        if kind == "recipe" and not field.startswith("rl.rewards.")
        else "rewards"
        if kind == "recipe"
        else {"rows": "line 2", "item": "line 2"}.get(kind, "")
    )
    if named not in text:
        raise Failed(f"{name}: the message does not name {named}: {text[:400]}")


# recipes: every field of every section


def _leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        inner = next((a for a in _parts(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if inner is None:
            yield prefix + name, field.annotation
        else:
            yield from _leaves(inner, f"{prefix}{name}.")


def _parts(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for one in typing.get_args(annotation):
            yield from _parts(one)
    else:
        yield annotation


def _taken(kinds: set[Any]) -> set[str]:
    """The values that are of one of these kinds."""
    by_kind = {bool: "false", float: "huge", list: "list", dict: "mapping"}
    return {value for kind, value in by_kind.items() if kind in kinds}


_OF_A_NUMBER = ("minus", "huge", "nan", "inf", "text", "empty", "list", "mapping", "nested")
_OF_A_TEXT = ("minus", "false", "nan", "list", "numbers", "mapping", "nested")


def _recipes() -> Iterator[tuple[str, Callable[[Path], object]]]:
    from lco_lite.recipe import Recipe

    for field, annotation in _leaves(Recipe):
        kinds = {typing.get_origin(one) or one for one in _parts(annotation)}
        values = [v for v in (_OF_A_NUMBER if kinds & {int, float} else _OF_A_TEXT) if v not in _taken(kinds)]
        if field.startswith("reward_model."):
            continue  # as model's
        for value in values:
            yield f"recipe {field} {value}", lambda folder, f=field, v=value: _load_recipe(folder, f, VALUES[v])
    for value in VALUES:
        yield f"recipe rl {value}", lambda folder, v=value: _load_recipe(folder, "rl", VALUES[v])
        yield (
            f"recipe rl.no_such_field {value}",
            lambda folder, v=value: _load_recipe(folder, "rl.no_such_field", VALUES[v]),
        )
    for name, text in _TEXTS.items():
        yield f"recipe  {name}", lambda folder, t=text: _load_text(folder, t)


_TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "nul": b"\0",
    "no-utf8": b"name: \xff\xfe\n",
    "utf16": "name: x\n".encode("utf-16"),
    "a-list": b"- a\n- b\n",
    "a-number": b"3\n",
    "a-text": b"hello\n",
    "unclosed": b"rl: {lr: 1",
    "tabs": b"rl:\n\tlr: 1\n",
    "a-tag": b"rl: !!python/object/apply:os.system ['true']\n",
    "an-alias-of-none": b"rl: *x\n",
    "an-alias-of-itself": b"rl: &x\n  a: *x\n",
    "two-documents": b"name: a\n---\nname: b\n",
    "twice": b"name: a\nname: b\n",
    "a-key-of-a-list": b"? [a, b]\n: 1\n",
    "a-key-of-a-number": b"3: 1\n",
    "deep": b"rl: " + b"[" * 3000 + b"]" * 3000,
    "only-a-comment": b"# nothing\n",
    "a-byte-order-mark-alone": b"\xef\xbb\xbf",
    "json-with-nan": b'{"rl": {"lr": NaN}}',
    "binary": bytes(range(256)),
}


def _load_recipe(folder: Path, field: str, value: Any) -> None:
    from lco_lite.recipe.file import validate

    tree: dict[str, Any] = copy.deepcopy(TINY)
    at, (*path, last) = tree, field.split(".")
    for part in path:
        at = at.setdefault(part, {})
    at[last] = value
    validate(tree, "r.yaml")


def _load_text(folder: Path, text: bytes) -> None:
    from lco_lite.recipe.file import load_recipe

    file = folder / "r.yaml"
    file.write_bytes(text)
    load_recipe(file)


# rows of demonstrations, preferences and prompts; the first line is good, the second is not

_TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
_ROWS: dict[str, dict[str, Any]] = {
    "demonstrations/prompt-response": {"prompt": "a", "response": "b"},
    "demonstrations/instruction-output": {"instruction": "a", "input": "c", "output": "b"},
    "demonstrations/messages": {"messages": _TURNS},
    "demonstrations/conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "preferences/plain": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "preferences/whole": {"chosen": _TURNS, "rejected": [_TURNS[0], {"role": "assistant", "content": "c"}]},
    "preferences/hh": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "preferences/fg": {
        "question": "a",
        "passages": [["t", "s"]],
        "prediction 1": "b",
        "prediction 2": "c",
        "preference": [1],
    },
    "prompts/prompt": {"prompt": "a"},
    "prompts/question": {"question": "a"},
    "prompts/messages": {"messages": _TURNS[:1]},
}
_BAD_TURNS: dict[str, Any] = {
    "no-role": [{"content": "a"}],
    "no-content": [{"role": "user"}],
    "a-role-of-ones-own": [{"role": "wizard", "content": "a"}],
    "content-of-parts": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "a-null-turn": [_TURNS[0], None, _TURNS[1]],
    "a-number-as-content": [{"role": "user", "content": 3}, _TURNS[1]],
}
_LINES: dict[str, bytes] = {
    "no-json": b"{",
    "a-word": b"hello",
    "a-list": b"[1]",
    "a-number": b"3",
    "null": b"null",
    "a-text": b'"a"',
    "no-utf8": b'{"prompt": "\xff"}',
    "half-a-pair": b'{"prompt": "\\ud800", "response": "b"}',
    "two-objects": b'{"prompt": "a"} {"prompt": "b"}',
    "single-quotes": b"{'prompt': 'a'}",
    "a-trailing-comma": b'{"prompt": "a",}',
    "nul": b'\0{"prompt": "a"}',
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "many-digits": b'{"prompt": ' + b"9" * 5000 + b"}",
    "an-empty-object": b"{}",
    "an-empty-line": b"\n" + b'{"prompt": "a", "response": "b"}',
    "a-control-character": b'{"prompt": "a\x01"}',
}


def _rows() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for shape, row in _ROWS.items():
        for field in row:
            bad = {**VALUES, "gone": _GONE, **(_BAD_TURNS if isinstance(row[field], list) else {})}
            for name, value in bad.items():
                changed = {k: v for k, v in row.items() if k != field} if value is _GONE else {**row, field: value}
                label = f"{shape}/{field.replace(' ', '_')}"
                yield f"rows {label} {name}", lambda folder, s=shape, r=row, c=changed: _read_rows(folder, s, r, c)
    good = _ROWS["demonstrations/prompt-response"]
    for name, line in _LINES.items():
        yield f"rows line {name}", lambda folder, x=line: _read_rows(folder, "demonstrations/", good, x)
    for name, content in _FILES.items():
        yield f"file {name} -", lambda folder, n=name, c=content: _read_file(folder, n, c)


_FILES: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n \n",
    "bom.jsonl": b"\xef\xbb\xbf",
    "empty.json": b"",
    "open.json": b"[",
    "list.json": b"[]",
    "numbers.json": b"[1, 2]",
    "mixed.json": b'[{"prompt": "a", "response": "b"}, 3]',
    "utf16.json": '[{"prompt": "a"}]'.encode("utf-16"),
    "deep.json": b"[" * 100_000,
    "empty.csv": b"",
    "header.csv": b"prompt,response\n",
    "binary.csv": bytes(range(256)) * 9,
    "empty.parquet": b"",
    "text.parquet": b"PAR1 hello PAR1",
    "plain.txt": b"hello",
    "pickle.pkl": b"\x80\x04.",
}


def _read_rows(folder: Path, shape: str, good: dict[str, Any], second: dict[str, Any] | bytes) -> None:
    from lco_lite.data import rows

    file = folder / "d.jsonl"
    line = second if isinstance(second, bytes) else json.dumps(second).encode()
    file.write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
    getattr(rows, f"read_{shape.partition('/')[0]}")(str(file))


def _read_file(folder: Path, name: str, content: bytes) -> None:
    from lco_lite.data.rows import read_demonstrations

    (folder / name).write_bytes(content)
    read_demonstrations(str(folder / name))


# evaluation items

_ITEMS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "a", "answer": "so\n#### 3"},
    "math500": {"problem": "a", "solution": r"\boxed{3}", "answer": "3"},
    "minervamath": {"problem": "a", "solution": r"\boxed{3}"},
    "aime24": {"problem": "a", "answer": 3},
    "mmlu": {"question": "a", "choices": ["b", "c", "d", "e"], "answer": 1, "subject": "law"},
    "custom": {"prompt": "a", "answer": "3", "response": "b"},
    "qa_feedback": {"question": "a", "passages": [["t", "s"]], "answer": ["b"]},
    "alpaca_eval": {"instruction": "a", "output": "b"},
}


def _items() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for task, row in _ITEMS.items():
        for field in row:
            for name, value in {**VALUES, "gone": _GONE}.items():
                changed = {k: v for k, v in row.items() if k != field} if value is _GONE else {**row, field: value}
                yield (
                    f"item {task}.{field} {name}",
                    lambda folder, t=task, r=row, c=changed: _read_item(folder, t, r, c),
                )


def _read_item(folder: Path, task: str, good: dict[str, Any], second: dict[str, Any]) -> None:
    from lco_lite.tasks import load_task

    file = folder / "items.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(second) + "\n")
    load_task(task, file).items("test")


# models: a config with one bad field, and files beside it that are none


@cache
def _llama() -> Path:
    import tempfile

    from tests.models.families import save

    held = tempfile.TemporaryDirectory()
    _HELD.append(held)
    return save("llama", Path(held.name) / "llama")


_HELD: list[Any] = []
_SHAPES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "intermediate_size",
    "num_key_value_heads",
)
_BROKEN = {"empty": b"", "no-json": b"{", "list": b"[]", "null": b"null", "binary": bytes(range(256)), "number": b"3"}


def _models() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for field in _SHAPES:
        for name in ("null", "minus", "huge", "half", "nan", "text", "list", "mapping"):
            yield f"model config.{field} {name}", lambda folder, f=field, v=VALUES[name]: _open_model(folder, f, v)
    for field, values in {
        "model_type": ("null", "text", "list", "minus"),
        "architectures": ("text", "minus", "inner"),
    }.items():
        for name in values:
            yield f"model config.{field} {name}", lambda folder, f=field, v=VALUES[name]: _open_model(folder, f, v)
    for file in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    ):
        for name, content in _BROKEN.items():
            yield f"model {file} {name}", lambda folder, f=file, c=content: _open_model(folder, f, c)
        yield f"model {file} gone", lambda folder, f=file: _open_model(folder, f, _GONE)
        yield f"model {file} half", lambda folder, f=file: _open_model(folder, f, "half")


def _open_model(folder: Path, what: str, value: Any) -> None:
    import shutil

    import torch

    from lco_lite.models.language_model import LanguageModel
    from lco_lite.models.loading import load_base, load_config, load_tokenizer
    from lco_lite.recipe import Model

    place = folder / "m"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(_llama(), place)
    file = place / what
    if not file.exists():
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {what: value}))
    elif value is _GONE:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if value == "half" else value)
    settings = Model(path=str(place))
    load_config(settings)
    LanguageModel(load_base(settings, torch.device("cpu")), load_tokenizer(settings))


# adapters


@cache
def _model_and_adapter() -> tuple[Any, Path]:
    import torch

    from lco_lite.models.language_model import LanguageModel
    from lco_lite.models.loading import load_base, load_tokenizer
    from lco_lite.recipe import Model
    from lco_lite.recipe.sections import Lora

    settings = Model(path=str(_llama()))
    model = LanguageModel(load_base(settings, torch.device("cpu")), load_tokenizer(settings))
    model.add_adapter("a", Lora(r=2), 0)
    folder = _llama().parent / "adapter"
    model.save_adapter("a", folder)
    return model, folder


def _adapters() -> Iterator[tuple[str, Callable[[Path], object]]]:
    fields = {
        "peft_type": ("null", "text", "list", "minus", "mapping"),
        "r": ("minus", "text", "list", "half", "huge"),
        "lora_alpha": ("text", "list", "mapping", "nan", "null"),
        "target_modules": ("empty", "text", "texts", "numbers", "inner", "minus"),
        "rank_pattern": ("text", "numbers", "inner"),
        "no_such_field": ("text",),
    }
    for field, values in fields.items():
        for name in values:
            yield f"adapter {field} {name}", lambda folder, f=field, v=VALUES[name]: _load_adapter(folder, f, v)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        for name, content in {**_BROKEN, "half": "half", "gone": _GONE}.items():
            yield f"adapter {file} {name}", lambda folder, f=file, c=content: _load_adapter(folder, f, c)


_LOADED = [0]


def _load_adapter(folder: Path, what: str, value: Any) -> None:
    import shutil

    model, good = _model_and_adapter()
    place = folder / "a"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good, place)
    file = place / what
    if not file.exists():
        config = place / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {what: value}))
    elif value is _GONE:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if value == "half" else value)
    _LOADED[0] += 1
    model.load_adapter(f"b{_LOADED[0]}", place)


# GGUF


@cache
def _gguf() -> bytes:
    from tests.models.test_loading import empty_gguf

    file = _llama().parent / "m.gguf"
    empty_gguf(file)
    return file.read_bytes()


def _ggufs() -> Iterator[tuple[str, Callable[[Path], object]]]:
    yield "gguf file gone", lambda folder: _convert(folder, _GONE)
    yield "gguf file without-weights", lambda folder: _convert(folder, lambda good: good)
    for name, content in _BROKEN.items():
        yield f"gguf file {name}", lambda folder, c=content: _convert(folder, lambda good: c)
    for share in (3, 8, 20, 50, 80, 95):
        yield f"gguf cut {share}%", lambda folder, s=share: _convert(folder, lambda good: good[: len(good) * s // 100])
    for at in (0, 4, 8, 12, 16, 20, 24, 32, 40):
        yield (
            f"gguf byte {at}",
            lambda folder, a=at: _convert(folder, lambda good: good[:a] + b"\xff" * 8 + good[a + 8 :]),
        )


def _convert(folder: Path, change: Any) -> None:
    from lco_lite.models.loading import converted_gguf
    from lco_lite.recipe import Model

    file = folder / "m.gguf"
    file.unlink(missing_ok=True)
    if change is not _GONE:
        file.write_bytes(change(_gguf()))
    converted_gguf(Model(path=str(folder), gguf_file=file.name), folder / "converted")


# a judge's answers


def _completion(**message: Any) -> bytes:
    return json.dumps({"choices": [{"message": message}]}).encode()


_ANSWERS: dict[str, tuple[int, bytes]] = {
    "empty": (200, b""),
    "html": (200, b"<html>busy</html>"),
    "no-utf8": (200, b'{"choices": "\xff"}'),
    "list": (200, b"[]"),
    "null": (200, b"null"),
    "no-choices": (200, b"{}"),
    "choices-null": (200, b'{"choices": null}'),
    "choices-empty": (200, b'{"choices": []}'),
    "choices-text": (200, b'{"choices": "A"}'),
    "choices-mapping": (200, b'{"choices": {"0": "A"}}'),
    "choice-null": (200, b'{"choices": [null]}'),
    "choice-text": (200, b'{"choices": ["A"]}'),
    "no-message": (200, b'{"choices": [{}]}'),
    "message-text": (200, b'{"choices": [{"message": "A"}]}'),
    "content-number": (200, _completion(content=3)),
    "content-list": (200, _completion(content=[{"type": "text", "text": "A"}])),
    "content-mapping": (200, _completion(content={"text": "A"})),
    "usage-text": (200, b'{"choices": [{"message": {"content": "A"}}], "usage": "many"}'),
    "usage-negative": (200, b'{"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": -1}}'),
    "usage-huge": (200, b'{"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": 1e300}}'),
    "nan": (200, b'{"choices": NaN}'),
    "deep": (200, b"[" * 100_000),
    "many-digits": (200, b'{"choices": ' + b"9" * 5000 + b"}"),
    "cut-short": (200, _completion(content="A")[:-9]),
    "two": (200, _completion(content="A") * 2),
    "status-500": (500, b"\xff\x00\x1b[2J"),
    "status-429": (429, b""),
    "status-418-json": (503, b'{"error": {"message": null}}'),
}
_VERDICTS = (
    "",
    " ",
    "C",
    "A B",
    "A\nB",
    "neither",
    "\x00",
    "A\ud800B",
    "A" * 10_000,
    "</think>",
    "<think>A",
    "🅰",
    "[[A]]x",
)


def _judges() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for name, (status, body) in _ANSWERS.items():
        yield f"judge answer {name}", lambda folder, s=status, b=body: _ask(s, b)
    for i, text in enumerate(_VERDICTS):
        yield f"judge verdict {i}", lambda folder, t=text: _verdict(t)


def _ask(status: int, body: bytes) -> None:
    from lco_lite.judging.judge import ChatClient

    client = ChatClient("http://localhost:9/v1")
    client.sleep = lambda seconds: None

    async def answer(content: bytes) -> tuple[httpx.Response, bytes]:
        return httpx.Response(status), body

    client._answer = answer  # type: ignore[method-assign]
    client.ask({"model": "m", "messages": []})


def _verdict(text: str) -> None:
    from lco_lite.judging.judge import read_verdict

    if read_verdict(text) is not None:
        raise UsageError(f"{text!r:.60} is a verdict")


# names: of runs, tasks, graders, recipes, functions, overrides, keys, sizes

_NAMES: dict[str, str] = {
    "empty": "",
    "blank": " ",
    "up": "../up",
    "root": "/etc/passwd",
    "dash": "-x",
    "dot": ".",
    "dots": "..",
    "hidden": ".hidden",
    "space": "a b",
    "newline": "a\nb",
    "nul": "a\0b",
    "tab": "a\tb",
    "escape": "a\x1b[2Jb",
    "slash": "a/b",
    "backslash": "a\\b",
    "colon": "a:b",
    "star": "a*b",
    "umlaut": "ä",
    "emoji": "🙂",
    "surrogate": "a\ud800",
    "right-to-left": "a\u202eb",
    "long": "x" * 300,
    "very-long": "x" * 100_000,
    "equals": "=",
    "percent": "%s{0}",
}


def _names() -> Iterator[tuple[str, Callable[[Path], object]]]:
    from lco_lite.judging.keys import judge_key
    from lco_lite.recipe import Eval
    from lco_lite.recipe.file import find_recipe, load_recipe, override
    from lco_lite.run import Run
    from lco_lite.tables import load_rows
    from lco_lite.tasks import load_task
    from lco_lite.tasks.custom import grader_named
    from lco_lite.user_code import function_file

    def key(name: str) -> None:
        settings = Eval(judge_url="https://host/v1", judge_model="m")
        settings.confirm_key(name)
        judge_key(settings)

    readers: dict[str, Callable[[Path, str], object]] = {
        "run": lambda folder, name: Run.open(folder / "runs", name),
        "task": lambda folder, name: load_task(name),
        "task-file": lambda folder, name: load_task("custom", folder / "none" / name).items("test"),
        "grader": lambda folder, name: grader_named(name),
        "recipe": lambda folder, name: load_recipe(find_recipe(name)),
        "function": lambda folder, name: function_file(name),
        "function-file": lambda folder, name: function_file(f"{name}.py:f"),
        "set": lambda folder, name: override({}, [name], {}),
        "judge-key": lambda folder, name: key(name),
        "rows": lambda folder, name: load_rows(f"/no/such/folder/{name}.jsonl"),
        "model": lambda folder, name: _open_named(name),
    }
    for what, read in readers.items():
        for label, name in _NAMES.items():
            yield f"name {what} {label}", lambda folder, r=read, n=name: r(folder, n)


def _open_named(name: str) -> None:
    from lco_lite.models.loading import load_config
    from lco_lite.recipe import Model

    load_config(Model(path=f"/no/such/folder/{name}"))


assert issubclass(UsageError, LcoError)
