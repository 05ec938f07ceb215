"""Which recipe fits these rows and this machine? ``lco-lite init FILE`` looks at both, asks nothing, and writes it.

The columns say what there is: pairs, prompts with answers, or prompts alone; with ``--reward`` a function judges too.
What learns from that, and how much of it the machine does in a while, is written down with a comment at every field.
"""

import ast
import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lco_lite.calling import ACCEPTED
from lco_lite.console import Console
from lco_lite.data.prompts import demonstrations, held_out_prompts, preference_rows, recipe_task, rl_prompts
from lco_lite.data.rows import CONVERSATIONS, PROMPTS, RESPONSES
from lco_lite.errors import DataError, ModelError, UsageError
from lco_lite.files import is_there, not_there, write_text
from lco_lite.grading import Item
from lco_lite.grading.choice import LETTERS, answer_index
from lco_lite.messages import Message
from lco_lite.models.chat import ChatFormat
from lco_lite.models.loading import open_tokenizer
from lco_lite.recipe import Recipe
from lco_lite.recipe.file import parse_yaml, unwritten, validate, write_yaml
from lco_lite.recipe.sections import Model
from lco_lite.tables import load_rows, names_in
from lco_lite.tasks.base import HELD_OUT_SHARE
from lco_lite.train.pipeline import tried_rewards
from lco_lite.user_code import names_function
from lco_lite.visible import visible

ASKED = ("prompt", *CONVERSATIONS, *PROMPTS[1:], "query", "input", "text")
ANSWERS = ("answer", "solution", "ground_truth", "label", "gold", "target")
CHOICES = ("choices", "options")
SHORT = 6  # words that an answer may have to be compared as text
LABELS = 12  # different answers that are still a list to choose from
FEW = 100  # prompts under which a tenth is too little to see a change on

# GiB of the GPU from which on, model, quantization: sampling and training with room for responses of 1,024 tokens
GPUS = (
    (20, "Qwen/Qwen2.5-7B-Instruct", "nf4"),
    (10, "Qwen/Qwen2.5-3B-Instruct", "nf4"),
    (6, "Qwen/Qwen2.5-1.5B-Instruct", "nf4"),
    (0, "Qwen/Qwen2.5-0.5B-Instruct", "none"),
)
SMALL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MEASURED = 256  # rows, those with the most characters, of which the one with the most tokens is looked for
WIDEST = 4096  # tokens of prompt and response that a recipe is written for, at most
CPU_TOKENS = 16_384  # of responses: with SmolLM2-135M about five minutes of two cores, of ten that a run may take


@dataclass(frozen=True)
class Looked:
    """What was found: the column of each role, by our name for it; ``grader`` where answers can be graded, with the
    system message that makes a model answer so."""

    rows: Sequence[dict[str, Any]]
    by_role: dict[str, str]
    grader: str | None = None
    system: str | None = None
    why: str = ""

    def values(self, role: str) -> list[Any]:
        return [row[self.by_role[role]] for row in self.rows]


@dataclass(frozen=True)
class Machine:
    """``gib`` of the GPU, None where there is none that CUDA knows."""

    gib: float | None
    told: str
    has_mps: bool = False


@dataclass
class Lines:
    """A recipe as text, a field a line, each with its comment."""

    text: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any, comment: str = "", depth: int = 0) -> None:
        shown = "" if value is None else f" {in_yaml(value)}"
        line = f"{'  ' * depth}{key}:{shown}"
        self.text.append(f"{line:<34}  # {visible(comment, lines=False)}" if comment else line)


def in_yaml(value: Any, inside: bool = False) -> str:
    """On one line; ``inside`` braces more texts need quotes, and one of several lines does everywhere."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{in_yaml(key, True)}: {in_yaml(inner, True)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and ("\n" in value or (inside and not re.fullmatch(r"[\w./:-]*\w", value))):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.1e}".replace("e-0", "e-") if 0 < value < 1e-2 else f"{value:g}"
    return write_yaml([value]).removeprefix("- ").removesuffix("\n").replace("\n  ", " ")


def write_recipe(file: str, rewards: Sequence[str], model: str | None, out: Path | None, console: Console) -> None:
    """Writes the recipe beside ``file``, or to ``out``. Raises UsageError where something is there, or the data say
    nothing of good and bad and no reward does; DataError for data that cannot be read."""
    path = unwritten(file, out)
    functions = dict[str, str]()
    for name, spec in (one for given in rewards for one in functions_of(given)):
        if functions.setdefault(name, spec) != spec:
            raise UsageError(f"--reward: {functions[name]} and {spec} have one name: rename one of the functions")
    found = look(file, load_rows(file), bool(functions))
    if found.grader and len(found.rows) == 1:
        raise DataError(f"{file}: has 1 row; answers that are graded need 2, one to train on and one for the score")
    machine = this_machine()
    weights = chosen_model(model, machine)
    lengths, unit = measure(found, weights)
    new_tokens = response_tokens(found, lengths, unit, machine.gib is None)
    words = [file, *(word for spec in rewards for word in ("--reward", spec))]
    words += [*(["--model", model] if model else []), *(["--out", str(out)] if out else [])]
    typed = shlex.join(["lco-lite", "init", *words])
    rest = (typed, file, path, found, functions, machine, weights, new_tokens)
    draft = validate(parse_yaml(recipe_text(*rest, WIDEST))[0], str(path))
    text = recipe_text(*rest, window_of(draft, new_tokens))
    recipe = validate(parse_yaml(text)[0], str(path))
    task = recipe_task(recipe)
    held = len(held_out_prompts(recipe, None) if task is None else task.items("test"))
    told = tried_rewards(recipe, task)
    write_text(path, text)
    if not held:
        console.warn(f"{file}: of {_rows(len(found.rows))} none can be held out: there will be no held-out score")
    console.note(f"{file}: {_rows(len(found.rows))}, {held} {'prompts' if task is None else 'items'} of them held out")
    for role, column in found.by_role.items():
        size = f", {lengths[role][0]} to {lengths[role][1]} {unit}" if role in lengths else ""
        console.note(f"  {role:<9} column {column}{size}" + (f": {found.why}" if role == "answer" else ""))
    console.note(f"  machine   {machine.told}: {weights.path}" + (" (your model)" if model else ""))
    for line in told:
        console.note(f"  {line}")
    console.done(path, f"lco-lite run {path}")


# what the rows are

_EMPTY: tuple[Any, ...] = (None, "", [])


def look(file: str, rows: Sequence[dict[str, Any]], has_reward: bool) -> Looked:
    """Raises DataError where no column is a prompt, UsageError where nothing tells a good response from a bad one."""
    full = [n for n in rows[0] if all(row.get(n) not in _EMPTY for row in rows)]
    roles = {role: n for role, names in (("prompt", ASKED), ("choices", CHOICES)) if (n := _first(names, full))}
    pairs = {"chosen", "rejected"} <= set(full)
    if "prompt" not in roles and not pairs:
        partly = next((n for n in ASKED if any(n in row for row in rows)), None)
        why = _gap(rows, partly) if partly else f"one of {', '.join(ASKED)} is needed"
        raise DataError(f"{file}: no column for the prompt: {why}; found {names_in(rows[0])}")
    if pairs:
        return Looked(
            rows, {n: c for n, c in roles.items() if n == "prompt"} | {"chosen": "chosen", "rejected": "rejected"}
        )
    if response := _first(RESPONSES, full):
        roles["response"] = response
    answer = _first(ANSWERS, full)
    if answer is not None:
        if not _pick_choices(file, rows, roles, answer):
            roles.pop("choices", None)
        grader, system, why = grader_for([row[answer] for row in rows], roles, rows)
        if grader:
            if all("####" in str(row[answer]) for row in rows):  # GSM8K's: the working, and the answer after it
                roles.setdefault("response", answer)
            return Looked(rows, roles | {"answer": answer}, grader, system, why)
        roles.setdefault("response", answer)  # whole texts, to be imitated
    roles.pop("choices", None)
    asked = [row[roles["prompt"]] for row in rows]
    if "response" not in roles and all(isinstance(v, list) and _is_answer(v[-1]) for v in asked):
        roles["response"] = roles["prompt"]
    if not has_reward:
        if partly := next((n for n in (*ANSWERS, "chosen", "rejected") if n in rows[0] and n not in full), None):
            raise DataError(f"{file}: {_gap(rows, partly)}: fill it in, or leave the row out")
        has = "prompts and responses to imitate" if "response" in roles else "prompts"
        raise UsageError(
            f"{file}: has {has}, and nothing that tells a good response from a bad one. Give --reward FILE.py with a "
            f"function {ACCEPTED}, a column of short answers ({', '.join(ANSWERS)}), or chosen and rejected"
        )
    return Looked(rows, roles)


def _pick_choices(file: str, rows: Sequence[dict[str, Any]], roles: dict[str, str], answer: str) -> bool:
    """Whether the answers pick from the choices; not those that are whole texts and none of them. Raises DataError
    where they do and the choices are one text, as in a CSV file, or an answer is none of them."""
    if "choices" not in roles:
        return False
    column, golds = roles["choices"], [_gold(row[answer]) for row in rows]
    pairs = [(gold, row[column]) for gold, row in zip(golds, rows, strict=True)]
    if any(isinstance(choices, str) for _, choices in pairs):
        if all(str(gold) in (*LETTERS, *"0123456789") or str(gold) in str(choices) for gold, choices in pairs):
            needed = "a list is needed, as .jsonl, .json and .parquet files hold it; or leave the column out"
            raise DataError(f"{file}: column {column} is text, from which {answer} picks: {needed}")
        return False
    picked = [
        answer_index(Item("", "", "", None, {"choices": choices, "answer": gold})) is not None
        for gold, choices in pairs
    ]
    if all(picked):
        return True
    if not any(picked) and _are_long([str(gold) for gold in golds]):
        return False
    i = picked.index(False)
    raise DataError(
        f"{file}: row {i + 1}: {answer} is {golds[i]!r:.60}, with {column} {pairs[i][1]!r:.80}: the letter, the index "
        f"or the text of one of 2 to {len(LETTERS)} choices is needed; or leave the column out"
    )


def _gold(answer: Any) -> Any:
    """Without the working that GSM8K has before it."""
    return answer.rpartition("####")[2].strip() if isinstance(answer, str) else answer


def _are_long(answers: Sequence[str]) -> bool:
    return median(len(answer.split()) for answer in answers) > SHORT


def _gap(rows: Sequence[dict[str, Any]], column: str) -> str:
    empty = [i for i, row in enumerate(rows, 1) if row.get(column) in _EMPTY]
    more = f", as in {len(empty) - 1} more" if len(empty) > 1 else ""
    return f"{column} is empty or missing in row {empty[0]} of {len(rows)}{more}"


def _rows(n: int) -> str:
    return f"{n} row{'s' * (n != 1)}"


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("assistant", "gpt")


def _first(names: Sequence[str], present: Sequence[str]) -> str | None:
    return next((name for name in names if name in present), None)


_NUMBER = re.compile(r"[-+]?\s*[$€£]?\s*\d[\d,]*(\.\d+)?(/\d+)?\s*%?")


def grader_for(
    answers: Sequence[Any], roles: dict[str, str], rows: Sequence[dict[str, Any]]
) -> tuple[str | None, str | None, str]:
    """(grader, system message, what it was told by); no grader where the answers are whole texts."""
    texts = [str(answer).strip() for answer in answers]
    if "choices" in roles:
        return "choice", None, "the letter, index or text of a choice, so graded by `choice`"
    if all(len(text) == 1 and text in LETTERS for text in texts):
        return "choice", None, "letters, so graded by `choice`"
    if all(_NUMBER.fullmatch(t) or "\\boxed" in t or "####" in t for t in texts):
        told = all(re.search(r"(?i)boxed|answer", _plain(row[roles["prompt"]])) for row in rows)
        system = None if told else 'Work it out in a few words, and end with "The answer is" and the answer.'
        return "math", system, "numbers, so graded by `math`"
    if _are_long(texts):
        return None, None, ""
    kinds = list(dict.fromkeys(texts))
    if len(kinds) <= LABELS and len(kinds) <= len(texts) / 2:
        return (
            "exact",
            f"Answer with one of these and nothing else: {', '.join(kinds)}.",
            "labels, so graded by `exact`",
        )
    return "exact", "Answer with the answer alone, in a few words.", "short texts, so graded by `exact`"


def functions_of(spec: str) -> Iterator[tuple[str, str]]:
    """(name, FILE.py:NAME) of the reward functions that ``FILE.py`` or ``FILE.py:NAME`` says; the file is read, not
    run. Raises UsageError where there is none."""
    if names_function(spec):
        yield spec.rpartition(":")[2], spec
        return
    file = Path(spec)
    if file.suffix == ".py" and not file.exists():
        raise UsageError(f"--reward {spec}: {not_there(file)}")
    if file.suffix != ".py" or not file.is_file():
        raise UsageError(f"--reward {spec}: a Python file with a reward function is needed, FILE.py or FILE.py:NAME")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise UsageError(f"{file}: is not Python: {str(e) or 'nested too deeply'}") from e
    defined = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    judges = [node.name for node in defined if not node.name.startswith("_") and _may_judge(node.args)]
    if not judges:
        names = names_in({node.name: node for node in defined}) if defined else "no function"
        raise UsageError(f"{file}: has no reward function, {ACCEPTED}; found {names}")
    yield from ((name, f"{spec}:{name}") for name in judges)


def _may_judge(arguments: ast.arguments) -> bool:
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    needed = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    ours = needed == 3 and "responses" in names
    return ours or bool({"completions", "completion_ids"} & set(names)) or (not needed and arguments.kwarg is not None)


# the machine, the model, the lengths


def this_machine() -> Machine:
    if not torch.cuda.is_available() and torch.backends.mps.is_available():
        return Machine(None, "an Apple GPU, which is used where the recipe says `device: mps`; else the CPU", True)
    if not torch.cuda.is_available():
        return Machine(None, "no GPU")
    card = torch.cuda.get_device_properties(0)
    return Machine(card.total_memory / 2**30, f"{card.name}, {card.total_memory / 2**30:.0f} GiB")


def chosen_model(asked: str | None, machine: Machine) -> Model:
    """The user's, a folder, a GGUF file or a hub id; else one that fits. Raises UsageError for an adapter, or for a
    folder with several GGUF files and no model."""
    options: dict[str, Any] = {"quantization": "none"}
    path = asked
    if path is None:
        path, quantization = SMALL, "none"
        if machine.gib is not None:
            path, quantization = next((name, kind) for least, name, kind in GPUS if machine.gib >= least)
        options["quantization"] = quantization
    elif not is_there(Path(path)):
        try:
            validate_repo_id(path)
        except HFValidationError as e:
            raise UsageError(f"--model {path!r:.200}: no such folder or file, and no hub id, OWNER/NAME") from e
    elif Path(path).suffix == ".gguf" and Path(path).is_file():
        options["gguf_file"], path = Path(path).name, str(Path(path).parent)
    elif Path(path).is_dir() and (Path(path) / "adapter_config.json").is_file():
        raise UsageError(f"--model {path}: is an adapter; name the model that it belongs to")
    elif Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        ggufs = sorted(file.name for file in Path(path).glob("*.gguf"))
        if len(ggufs) > 1:
            raise UsageError(f"--model {path}: has {len(ggufs)} GGUF files; name one: {', '.join(ggufs)}")
        options |= {"gguf_file": ggufs[0]} if ggufs else {}
    elif not Path(path).is_dir():
        raise UsageError(f"--model {path}: is no folder; name a model's folder, a GGUF file or a hub id")
    return Model(path=path, **options)


def measure(found: Looked, weights: Model) -> tuple[dict[str, tuple[int, int]], str]:
    """(shortest, longest) of each role's texts, and the unit: tokens where the model is here, else characters."""
    texts = {role: [_plain(v) for v in found.values(role)] for role in found.by_role if role != "choices"}
    if not is_here(str(weights.path)):
        return {role: (min(map(len, ts)), max(map(len, ts))) for role, ts in texts.items()}, "characters"
    tokenizer = open_tokenizer(weights, 0)
    sizes = {r: [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in ts] for r, ts in texts.items()}
    return {role: (min(ns), max(ns)) for role, ns in sizes.items()}, "tokens"


def window_of(recipe: Recipe, new_tokens: int) -> int:
    """The ``max_length`` in which the longest prompt has room for ``new_tokens``, and demonstrations and pairs have
    theirs: as the stages write them, with choices, system message and template. At most ``WIDEST``."""
    task = recipe_task(recipe)
    asked: list[tuple[Sequence[Message], str | None]] = [(p.messages, None) for p in rl_prompts(recipe, task)]
    if "sft" in recipe.stages:
        asked += [(d.messages, d.response) for d in demonstrations(recipe, task)]
    if "rm" in recipe.stages and recipe.data.preferences != "sampled":
        asked += [(p.messages, said) for p in preference_rows(recipe, task) for said in (p.chosen, p.rejected)]

    def characters(one: tuple[Sequence[Message], str | None]) -> int:
        messages, said = one
        return sum(len(turn["content"]) for turn in messages) + (2 * new_tokens if said is None else len(said))

    def tokens(chat: ChatFormat, messages: Sequence[Message], said: str | None) -> int:
        return len(chat.prompt(messages)) + new_tokens if said is None else len(chat.example(messages, said))

    sizes = [characters(one) // 2 for one in asked]
    if is_here(str(recipe.model.path)):
        tokenizer = open_tokenizer(recipe.model, 0)
        with contextlib.suppress(ModelError):  # a template that refuses them is told where they are used
            chat = ChatFormat(tokenizer, recipe.chat.template_args, lambda told: None)
            sizes = [tokens(chat, *one) for one in nlargest(MEASURED, asked, characters)]
    return min(-(-(max(sizes) + 64) // 64) * 64, WIDEST)


def is_here(model: str) -> bool:
    """Whether its tokenizer can be had without the network."""
    if Path(model).is_dir():
        return True
    return isinstance(try_to_load_from_cache(model, "tokenizer_config.json"), str)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(str(turn.get("content", turn.get("value", ""))) for turn in value if isinstance(turn, dict))
    return str(value)


# the recipe


def recipe_text(
    typed: str,
    file: str,
    path: Path,
    found: Looked,
    functions: dict[str, str],
    machine: Machine,
    weights: Model,
    new_tokens: int,
    window: int,
) -> str:
    n, on_cpu, pairs = len(found.rows), machine.gib is None, "chosen" in found.by_role
    graded = found.grader is not None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "own"
    share = 0.5 if n == 2 else 0.2 if n < FEW else HELD_OUT_SHARE
    y = Lines(
        [
            visible(line, lines=False)
            for line in (
                f"# {name}: written by `{typed}` from {_rows(n)}. Files are found from where it is run.",
                "#",
                f"#   lco-lite run {path} --dry-run     # what would happen",
                f"#   lco-lite run {path}",
            )
        ]
    )
    if machine.has_mps:
        y.text.append("# device: mps  would train on this machine's Apple GPU, in float32; that is not tested by us")
    y.add("name", name, "the run's folder under runs/")
    y.add("seed", 0, "of data order, sampling, and what is held out")
    if graded:
        y.add("task", f"custom:{found.grader}" if found.grader != "math" else "custom", found.why)
    y.add("model", None)
    y.add("path", weights.path, "hub id or folder" if is_here(str(weights.path)) else "from the hub the first time", 1)
    if weights.gguf_file:
        y.add("gguf_file", weights.gguf_file, "converted once into the run", 1)
    if weights.quantization != "none":
        y.add("quantization", weights.quantization, "4 bits a weight: a third of the memory", 1)
    if on_cpu:
        y.add("dtype", "float32", "many CPUs are slow in bfloat16", 1)
    y.add("lora", {"r": 16, "alpha": 32}, "only an adapter of this rank is trained", 1)
    if pairs:
        y.add("reward_model", "self", "φ is a second adapter on the same model")
    if found.system:
        y.add("chat", None)
        y.add("system", found.system, "so that the grader finds the answer", 1)
    _add_data(y, file, found, share)
    _add_sft(y, found, on_cpu, window)
    learns_phi = pairs or _learns_phi(graded, on_cpu, n)
    if learns_phi:
        _add_reward_model(y, found, on_cpu, window, n)
    _add_rl(y, found, functions, on_cpu, learns_phi, new_tokens, window, round(n * (1 - share)))
    y.add("eval", None)
    y.add("seeds", 2 if on_cpu else 4, "times that each held-out prompt is answered", 1)
    y.add("temperature", 0.6, "of those answers; 0 is greedy", 1)
    if graded:
        y.add("max_new_tokens", new_tokens, "as in rl", 1)
    y.add("batch", 32 if on_cpu else 64, "answers at once", 1)
    return "\n".join(y.text) + "\n"


def response_tokens(found: Looked, lengths: dict[str, tuple[int, int]], unit: str, on_cpu: bool) -> int:
    """What a response may take: as long as those in the data, else as a grader's answers need."""
    if known := [lengths[role][1] for role in ("response", "chosen") if role in lengths]:
        tokens = max(known) if unit == "tokens" else max(known) // 3
        return min(max(32, -(-tokens // 32) * 32), 96 if on_cpu else 1024)
    if found.grader == "exact":
        longest = lengths["answer"][1] if unit == "tokens" else lengths["answer"][1] // 2
        return min(max(16, -(-(longest + 2) // 16) * 16), 96 if on_cpu else 1024)  # with what ends the answer
    if found.grader == "choice":
        return 48 if on_cpu else 256
    return (96 if found.grader == "math" else 64) if on_cpu else 1024


def _learns_phi(graded: bool, on_cpu: bool, n: int) -> bool:
    """Answers and time enough: a reward model is made of the policy's own right and wrong responses."""
    return graded and not on_cpu and n >= FEW


def _add_data(y: Lines, file: str, found: Looked, share: float) -> None:
    roles, columns = found.by_role, dict[str, dict[str, str]]()
    y.add("data", None)
    if found.grader:
        y.add("task", file, "prompts and answers: trained on, and of those held out the score", 1)
        usual = {
            "prompt": (*PROMPTS, "messages"),
            "answer": ("answer",),
            "response": ("response",),
            "choices": ("choices",),
        }
        columns["task"] = {r: c for r, c in roles.items() if c not in usual[r]}
    else:
        y.add("prompts", file, "what the policy answers in rl", 1)
        if "response" in roles or "chosen" in roles:
            y.add("demonstrations", file, "what sft imitates: " + roles.get("response", "chosen"), 1)
        if "chosen" in roles:
            y.add("preferences", file, "what the reward model learns from", 1)
        asked = roles.get("prompt", "prompt")
        own = {"prompt": asked} if asked not in (*PROMPTS, *CONVERSATIONS) else {}
        columns["prompts"] = own
        if "response" in roles:
            reply = roles["response"]
            known = reply in RESPONSES or reply == asked
            columns["demonstrations"] = own | ({} if known else {"response": reply})
        elif "chosen" in roles:
            columns["demonstrations"] = columns["preferences"] = own
    if columns := {kind: names for kind, names in columns.items() if names}:
        y.add("columns", columns, "our name: the file's", 1)
    if not (found.grader and any("split" in row for row in found.rows)):
        y.add("held_out", share, "of the prompts, drawn by the seed: never trained on, for the score", 1)


def _add_sft(y: Lines, found: Looked, on_cpu: bool, window: int) -> None:
    y.add("sft", None)
    if not {"response", "chosen"} & set(found.by_role):
        y.add("enabled", False, "no responses to imitate: rl starts from the model as it is", 1)
        return
    if found.grader:
        y.add("examples", max(1, len(found.rows) // 2), "demonstrations; rl takes the other prompts", 1)
    if on_cpu:
        y.add("max_steps", min(16, max(4, len(found.rows) // 4)), "updates", 1)
        y.add("batch_size", 8, "responses an update", 1)
    else:
        y.add("epochs", 1, "passes over them", 1)
    y.add("lr", 2e-4, "of an adapter; ten times that of full fine-tuning", 1)
    y.add("max_length", window, "tokens of prompt and response; longer ones are left out, and counted", 1)


def _add_reward_model(y: Lines, found: Looked, on_cpu: bool, window: int, n: int) -> None:
    y.add("train_rm", None)
    if "chosen" not in found.by_role:
        y.add("samples_per_prompt", 4, "the policy's own responses, right ones paired with wrong ones", 1)
    if on_cpu:
        y.add("max_steps", min(20, max(5, n // 3)), "updates", 1)
        y.add("batch_size", 8, "pairs an update", 1)
    y.add("lr", 1e-4 if on_cpu else 1e-5, "few pairs take a higher one" if on_cpu else "of an adapter", 1)
    y.add("sft_weight", 1.0, "keeps the chosen responses likely as well", 1)
    y.add("max_length", window, "tokens of prompt and response", 1)


def _add_rl(
    y: Lines,
    found: Looked,
    functions: dict[str, str],
    on_cpu: bool,
    learns_phi: bool,
    new_tokens: int,
    window: int,
    n: int,
) -> None:
    """LCO-KLD throughout: of the objectives here the steadiest, and any other can be tried with --objective."""
    pairs, group = "chosen" in found.by_role, 8
    parts = ["dpo"] * learns_phi + ["rule"] * (found.grader is not None) + ["function"] * bool(functions)
    why = {
        "dpo": "the reward model's word on every token",
        "rule": "+1 right, -1 wrong",
        "function": "your reward",
    }
    told = f"{group} responses to each prompt are compared by a number each: there is nothing to make a reward model of"
    if learns_phi:
        made = "the pairs" if pairs else "the policy's own right and wrong responses"
        told = f"a reward model of {made} speaks on every token: more to learn from than a number a response"
    y.add("rl", None)
    y.text.append(f"  # {told}.")
    y.add("objective", "kld", "the steadiest of the paper's; --objective grpo and others compare", 1)
    y.add("feedback", " + ".join(parts), "; ".join(why[part] for part in parts), 1)
    if functions:
        several = len(functions) > 1
        y.add(
            "reward_function",
            functions if several else next(iter(functions.values())),
            "called once before training",
            1,
        )
        if several:
            y.add("rewards", {name: {"weight": 1.0} for name in functions}, "what each counts", 1)
    y.add("beta", 1.0 if learns_phi else 0.5, "smaller: the advantage moves the policy further", 1)
    if learns_phi:
        y.add("anchor", 0.5, "holds the target: without it each step compounds the reward model's errors", 1)
    if len(parts) > 1 or not learns_phi:
        y.add("responses_per_prompt", group, "compared with each other", 1)
        y.add("baseline", "group", "what is better than the prompt's other responses is reinforced", 1)
        y.add("scale_rewards", True, "in units of their spread: a reward may have any scale", 1)
    else:
        group = 1
    at_once = max(1, min(64 // group, n)) if on_cpu else min(max(16, 512 // group), n)
    steps = max(2, round(CPU_TOKENS / new_tokens / group / at_once)) if on_cpu else 4 if learns_phi else 20
    y.add("steps", min(steps, 16), "times that the policy answers anew", 1)
    y.add("prompts_per_step", at_once, "prompts each time", 1)
    y.add("minibatch", 16 if on_cpu else 64, "responses an update", 1)
    y.add("inner_epochs", 2 if on_cpu else 1, "passes over them", 1)
    y.add("lr", 2e-4 if on_cpu else 5e-5, "few updates take a higher one" if on_cpu else "of an adapter", 1)
    y.add("warmup_steps", 2 if on_cpu else 10, "updates until it is reached", 1)
    y.add("temperature", 1.0, "varied responses, so that some are better than others", 1)
    y.add("top_p", 1.0, "the same", 1)
    y.add("max_new_tokens", new_tokens, "a response is cut here", 1)
    y.add("max_length", window, "tokens of prompt and response; longer prompts are left out, and counted", 1)
    y.add("rollout_batch", 64, "responses at once; halved where memory runs out", 1)
    y.add("micro_batch_tokens", 2048 if on_cpu else 8192, "tokens a pass; halved where memory runs out", 1)
    if found.grader is not None and on_cpu:
        y.add("eval_every", 0, "steps between held-out scores; the run ends with one", 1)
