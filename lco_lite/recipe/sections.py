"""What may stand in every section of a recipe but ``rl``: each field with meaning, unit, default and its source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lco_lite.errors import UsageError


def setting(default: Any, what: str, source: str, **bounds: Any) -> Any:
    """A field with its meaning (unit included) and where its default comes from."""
    return Field(default, description=what, json_schema_extra={"source": source}, **bounds)


class Section(BaseModel):
    """A part of a recipe. Unknown keys are refused, and what ``_wrong`` says of keys that do not go together; also what
    ``_idle`` says of those that would do nothing, but of a run's own (context ``OF_RUN``): an earlier version took
    them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    def _wrong(self) -> Iterator[str]:
        yield from ()

    def _idle(self) -> Iterator[str]:
        yield from ()

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes True for 1, and so does pydantic."""
        wanted = str(cls.model_fields[str(info.field_name)].annotation)
        kind = next((kind for kind in ("int", "float") if re.search(rf"\b{kind}\b", wanted)), None)
        if kind and not re.search(r"\b(bool|Any)\b", wanted):
            if isinstance(value, bool):
                raise PydanticCustomError(f"{kind}_type", "a number is needed")  # type: ignore[arg-type]
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if any(isinstance(one, bool) for one in inside):
                raise PydanticCustomError("no_number", "numbers are needed, and true and false are none")
        return value

    @model_validator(mode="after")
    def _makes_sense(self, info: ValidationInfo) -> Section:
        large = [name for name, value in self if isinstance(value, int) and value > MOST and name != "seed"]
        idle = () if info.context == OF_RUN else self._idle()
        if problems := [*(f"{name} is at most {MOST:,}" for name in large), *self._wrong(), *idle]:
            raise ValueError(*problems)
        return self


OF_RUN = {"of": "run"}  # how a recipe is validated that a run was begun with
MOST = 10_000_000  # of whatever is counted, seeds aside: more is a slip of the hand that nobody waits for
LEAST = 1e-6  # of what is divided by: numbers over less leave float32
MOST_LAYERS = 1000
MOST_OF_SCRATCH = 2**31  # numbers of a model from scratch: 8 GiB
Beta = Annotated[float, Field(ge=0, lt=1)]


def greedy_or_warm(value: float) -> float:
    """A temperature. ValueError for one that is neither 0 nor divides logits within float32."""
    if value and not LEAST <= value <= 1 / LEAST:
        raise ValueError(f"a temperature is 0, which is greedy, or from {LEAST:g} to {1 / LEAST:g}; found {value:g}")
    return value


Temperature = Annotated[float, AfterValidator(greedy_or_warm)]
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


def size_in_bytes(text: str) -> int:
    """``11.5GiB`` -> 12348030976. ValueError for anything else than a positive number with a unit."""
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})\s*", text)
    size = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 1 <= size < 2**63:
        raise ValueError(f"{text!r:.80} is no size: write a number with its unit, {', '.join(_UNITS)}, e.g. 11.5GiB")
    return int(size)


def known_size(text: str) -> str:
    size_in_bytes(text)
    return text


class Lora(Section):
    r: int = setting(32, "rank of the update", "QLoRA practice; 16 to 64 are alike", ge=1)
    alpha: float = setting(64, "scale: the update is multiplied by alpha / r", "twice the rank, QLoRA practice", gt=0)
    dropout: float = setting(
        0.0, "share of adapter inputs dropped in sft; train-rm and rl drop none", "TRL: DPO compares passes", ge=0, lt=1
    )
    targets: Literal["all-linear"] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = (
        setting("all-linear", "adapted modules; never the LM head", "QLoRA")
    )


class Init(Section):
    """A Llama-shaped model from scratch with a byte-level tokenizer (256 bytes and 4 specials)."""

    hidden_size: int = setting(128, "width d", "prototype", ge=8)
    layers: int = setting(4, "transformer blocks", "prototype", ge=1, le=MOST_LAYERS)
    heads: int = setting(4, "attention heads", "prototype", ge=1)
    intermediate_size: int = setting(384, "width of the feed-forward layer", "3 x hidden_size", ge=8)
    max_length: int = setting(256, "longest sequence, tokens", "ample for the arithmetic task", ge=16)
    std: float = setting(0.05, "standard deviation of the first weights", "prototype", ge=LEAST, le=1)

    def _wrong(self) -> Iterator[str]:
        numbers = self.layers * self.hidden_size * (4 * self.hidden_size + 3 * self.intermediate_size)
        if numbers > MOST_OF_SCRATCH:
            yield (
                f"hidden_size {self.hidden_size}, intermediate_size {self.intermediate_size} and layers {self.layers} "
                f"make {numbers:.1e} numbers; a model from scratch has at most {MOST_OF_SCRATCH:.1e}"
            )
        if self.hidden_size % self.heads:
            yield f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}"
        elif self.hidden_size // self.heads % 2:
            yield f"hidden_size {self.hidden_size} / heads {self.heads} is odd: rotary positions turn pairs of numbers"


class Weights(Section):
    path: str | None = setting(None, "hub id or local folder", "yours")
    revision: str | None = setting(None, "branch, tag or commit on the hub", "the hub's main")
    gguf_file: str | None = setting(None, "name of a GGUF file under path; converted once into the run", "none")
    quantization: Literal["none", "nf4", "int8"] = setting(
        "none", "storage of the frozen base (bitsandbytes)", "nf4 with double quantisation is what fits 12 GB"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "weights and compute; auto: bfloat16 on a CUDA GPU, float32 elsewhere", "bfloat16 where it is fast"
    )
    lora: Lora | None = setting(Lora(), "the adapter; null trains all weights but the LM head", "keeps the head frozen")
    gradient_checkpointing: bool | Literal["offload"] = setting(
        False,
        "recompute activations: slower, less memory; offload: what they start from waits in the host's memory",
        "off on small models",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting("auto", "attention kernel", "the model")
    trust_remote_code: bool = setting(False, "run Python that comes with the weights", "off: safe by default")


class Model(Weights):
    train_head: bool = setting(False, "full fine-tuning: the head too, slower", "off: a frozen head makes LCO cheap")
    init: Init | None = setting(None, "build a small model, load none; sft then trains all its weights", "none")

    def _wrong(self) -> Iterator[str]:
        if (self.path is None) == (self.init is None):
            yield "give either path (hub id or folder) or init (a model from scratch)"
        if self.init is not None and (self.gguf_file or self.quantization != "none"):
            yield "init builds a small model in plain precision: no gguf_file, no quantization"
        if self.lora is None and self.quantization != "none":
            yield "quantized weights cannot be trained: keep lora, or set quantization: none"


class RewardModel(Weights):
    """φ_DPO on a base of its own; ``reward_model: self`` shares the policy's base instead."""

    streaming: bool = setting(
        False,
        "score and train it with two of its blocks on the GPU, the others in the host's memory. Sampling from it (its "
        "check, its score, π*) copies all of them for every token: train_rm.check_items: 0 leaves the check out",
        "off: slower; lets 6 GB train a 7B",
    )
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None = setting(
        None, "cuda:1: the second of two GPUs in one machine; null: the policy's", "one GPU"
    )

    def _wrong(self) -> Iterator[str]:
        if self.path is None:
            yield "needs path (hub id or folder); write `reward_model: self` to share the policy's base"
        if self.lora is None:
            yield "a reward model of its own is an adapter on its base: lora cannot be null"


_ESCAPES = dict(zip("\a\b\t\n\v\f\r\x1b\x85\u2028\u2029", "abtnvfreNLP", strict=True))
# what YAML makes of \boxed and \frac; of \text and \neq, a tab or a newline that no text has before such letters
_READ_AS_ESCAPE = re.compile(
    "([\x00-\x08\v\f\x0e-\x1f\x7f-\x9f\u2028\u2029]|\r(?!\n)|\t(?=ext|imes|heta|frac)|\n(?=eq\\b|abla\\b))([a-zA-Z]*)"
)


def read_as_escape(name: str, text: str | None) -> Iterator[str]:
    """The complaint about a text in which YAML read LaTeX as the escapes of its double quotes."""
    if text is not None and (found := _READ_AS_ESCAPE.search(text)):
        was = "\\" + _ESCAPES[found[1]] if found[1] in _ESCAPES else repr(found[1])[1:-1]
        cause = f"in double quotes YAML reads {was} as an escape"
        remedy = f"Write the text in single quotes, or \\{was}{found[2]}"
        yield f"{name} has the character {found[1]!r} before {found[2]!r}: {cause}. {remedy}"


class Chat(Section):
    system: str | None = setting(None, "system message; null: the task's own", "the task")
    template_args: dict[str, Any] = setting({}, "the chat template's arguments, e.g. {enable_thinking: false}", "none")

    def _wrong(self) -> Iterator[str]:
        yield from read_as_escape("system", self.system)


class Columns(Section):
    prompt: str | None = setting(None, "column of the prompt: text or turns", "the usual names")
    system: str | None = setting(None, "column of the system message", "system")


class PromptColumns(Columns):
    messages: str | None = setting(None, "column of whole conversations", "the usual names")


class DemonstrationColumns(PromptColumns):
    response: str | None = setting(None, "column of the response", "the usual names")


class PreferenceColumns(Columns):
    chosen: str | None = setting(None, "column of the better response", "chosen")
    rejected: str | None = setting(None, "column of the worse response", "rejected")


class TaskColumns(Section):
    prompt: str | None = setting(None, "column of the prompt: text or turns", "the usual names")
    answer: str | None = setting(None, "column of the right answer: text or a number", "answer")
    response: str | None = setting(None, "column of a worked response, a demonstration", "response")
    choices: str | None = setting(None, "column of the choices, a list", "choices")
    split: str | None = setting(None, "column that says train; all else is held out", "split")


class AllColumns(Section):
    demonstrations: DemonstrationColumns = setting(DemonstrationColumns(), "names in data.demonstrations", "usual ones")
    preferences: PreferenceColumns = setting(PreferenceColumns(), "names in data.preferences", "usual ones")
    prompts: PromptColumns = setting(PromptColumns(), "names in data.prompts", "usual ones")
    task: TaskColumns = setting(TaskColumns(), "names in data.task of task custom", "usual ones")


class Data(Section):
    """Each is a file (.jsonl, .json, .parquet, .csv) or ``hub-id[:split]``; null takes the task's training items."""

    demonstrations: str | None = setting(None, "prompts with responses to imitate, for sft", "the task's own")
    preferences: str = setting("sampled", "pairs for train-rm; `sampled`: the policy's responses", "paper: sampled")
    prompts: str | None = setting(None, "prompts for rl", "the task's training items")
    task: str | None = setting(None, "file with the task's items instead of its hub set", "the task's own")
    held_out: float | None = setting(
        None,
        "task null, or custom without a split: share of the prompts that nothing is trained on, for the score; drawn "
        "by the seed. null: a tenth, at most 200",
        "enough to see a change, little of the data",
        ge=0,
        lt=1,
    )
    columns: AllColumns = setting(AllColumns(), "columns of the files above that have other names", "the usual names")
    allow_overlap: list[str] = setting(
        [], "TASK: near twins may be trained on; TASK:same: its items themselves too", "none: such a score says little"
    )


class RewardModels(Section):
    """Token- or sequence-classification models that read a question, its passages and an answer."""

    relevance: str | None = setting(None, "hub id or folder", "yours")
    factuality: str | None = setting(None, "hub id or folder", "yours")
    completeness: str | None = setting(None, "hub id or folder", "yours")


class Eval(Section):
    tasks: list[str] | None = setting(None, "tasks scored at the end of a run; null: the recipe's task", "the task")
    seeds: int = setting(4, "sampling passes over all items", "paper: mean ± std over 4", ge=1)
    temperature: Temperature = setting(0.6, "0 is greedy, and then one pass", "paper", ge=0)
    top_p: float = setting(0.95, "nucleus", "paper", gt=0, le=1)
    items: int | None = setting(None, "only the first N items; null: all", "all", ge=1)
    max_new_tokens: int | None = setting(None, "longest response, tokens; null: the task's", "the task", ge=1)
    samples: int = setting(1, "responses per item and pass, k: pass@1, pass@k, maj@k", "paper: 1", ge=1)
    scoring: Literal["generation", "likelihood"] = setting(
        "generation", "likelihood: of each choice's letter, for items with choices", "small chat models need generation"
    )
    grader: str | None = setting(
        None, "math, rounded, string (the public code's), choice, exact, FILE.py:NAME; null: the task's", "the task"
    )
    tolerance: float | None = setting(None, "mathematics: share that a number may be off; null: the task's", "0", ge=0)
    evaluated: bool = setting(
        False, "mathematics: where gold is a number, a formula to work out is wrong", "off: peers"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = setting([], "texts that end a response, left out of it", "none")
    format: Literal["chat", "text"] = setting(
        "chat", "text: system, worked examples and problem as one plain text, for base models", "the model's template"
    )
    template: str | None = setting(
        None, "the problem's turn: {problem}, or {question}, {choices}, {subject}; null: the task's", "the task"
    )
    system: str | None = setting(None, "system message, may hold {subject}; null: chat.system, else the task's", "none")
    few_shot: int = setting(0, "worked examples before the problem, of the dev split, else of train", "none", ge=0)
    examples: str | None = setting(None, "JSONL with the worked examples instead; few_shot 0: all of it", "the task's")
    batch: int = setting(128, "responses generated at once, at most", "fits 12 GB with a 3B policy", ge=1)
    batch_tokens: int = setting(65_536, "padded tokens at once, responses at full length", "7 GB of Llama 3B", ge=16)
    judge_url: str | None = setting(None, "base of a chat-completions API (http://HOST/v1), or alpaca-eval", "none")
    judge_model: str | None = setting(None, "the judge's name there; of alpaca-eval its annotator", "yours")
    judge_key_variable: str | None = setting(
        None,
        "environment variable with the API's key; to other than known hosts --judge-key sends it",
        "the host's own",
    )
    judge_options: dict[str, Any] = setting(
        {"temperature": 0, "max_tokens": 1024}, "more fields of the judge's requests", "the judge answers in one word"
    )
    judge_price: tuple[float, float] | None = setting(None, "dollars per million tokens, in and out", "unknown")
    judge_limit: int = setting(100, "requests per pass that are sent without --yes", "cents", ge=0)
    judge_confirmed: bool = setting(False, "--yes: any number of requests may be sent", "off")
    judge_parallel: int = setting(8, "requests at once", "common rate limits", ge=1, le=64)
    reward_models: RewardModels = setting(RewardModels(), "qa_feedback: what scores the answers", "yours")
    _confirmed_key: tuple[str, str] | None = PrivateAttr(None)  # of the command line: no file can hold it

    @property
    def confirmed_key(self) -> tuple[str, str] | None:
        """(variable, host): where ``--judge-key`` lets the environment variable go."""
        return self._confirmed_key

    def confirm_key(self, text: str | None) -> None:
        """``VARIABLE@HOST``. Raises UsageError for another form, and where there is no judge."""
        if text is None:
            return
        found = re.fullmatch(r"([A-Za-z_]\w*)@([^\s@/]+)", text)
        if found is None:
            raise UsageError(f"--judge-key {text:.200}: write VARIABLE@HOST, e.g. MY_KEY@llm.example.com")
        if self.judge_url is None:
            raise UsageError("--judge-key: there is no judge; name it with --judge-url")
        self._confirmed_key = (found[1], found[2].lower())

    def _wrong(self) -> Iterator[str]:
        yield from read_as_escape("template", self.template)
        yield from read_as_escape("system", self.system)
        if self.template is not None and not any(name in self.template for name in ("{problem}", "{question}")):
            yield "template has no {problem} or {question}, so that every prompt would be the same"
        if self.scoring == "likelihood" and self.samples > 1:
            yield "samples: likelihood makes no responses"
        if self.judge_url is not None and self.judge_url != "alpaca-eval":
            url = urlsplit(self.judge_url)
            if url.scheme not in ("http", "https") or not url.hostname:
                yield f"judge_url {self.judge_url!r} is neither http://… nor https://… nor alpaca-eval"
            elif url.username or url.password or url.query or url.fragment:  # results and messages show it
                yield "judge_url holds more than host and path: a key belongs into an environment variable"
            if self.judge_model is None:
                yield "judge_url needs judge_model, the name of the model that judges there"


class Rollout(Section):
    engine: Literal["auto", "hf", "paged", "vllm"] = setting(
        "auto", "what samples; auto: paged on a GPU of capability 8.0 and up, else hf", "the machine"
    )
    gpu_share: float = setting(
        0.3, "vllm: share of the GPU's memory that it takes while it samples", "TRL 1.16, colocated", gt=0, le=1
    )


WITH_LORA = "×10 with LoRA (TRL's lora_without_regret.md; measured: docs/methods.md)"


class Training(Section):
    lr: float = setting(
        2e-5, "peak learning rate of AdamW; not set with LoRA: 2e-4", f"TRL 1.16 SFT; {WITH_LORA}", gt=0
    )
    schedule: Literal["constant", "cosine"] = setting("cosine", "learning rate after warm-up", "common practice")
    warmup_steps: int = setting(0, "updates of linear warm-up", "TRL", ge=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = setting(
        "adamw", "8bit: moments in 8 bits (bitsandbytes); paged: they leave a full GPU for the host", "exact moments"
    )
    adam_betas: tuple[Beta, Beta] = setting((0.9, 0.999), "AdamW's betas, at least 0 and less than 1", "TRL")
    adam_eps: float | None = setting(
        None, "AdamW's ε; null: 1e-8, and 1e-14 where mse or lch of sparse feedback are a mean over V", "TRL", gt=0
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled decay", "TRL", ge=0)
    max_grad_norm: float | None = setting(1.0, "clip the gradient's 2-norm; null: never. Logged unclipped", "TRL", gt=0)
    micro_batch_tokens: int = setting(8192, "padded tokens a pass; fewer need less memory", "fits 3B in 12 GB", ge=16)
    max_length: int = setting(2048, "prompt and response, tokens; longer ones are skipped and counted", "paper", ge=8)
    skip_batches: int = setting(
        3, "batches that may be left out since a number of theirs is not finite; one more: status 4", "a few", ge=0
    )
    save_every: int = setting(50, "updates between checkpoints (in rl: steps)", "minutes of work at risk", ge=1)

    @property
    def eps(self) -> float:
        return 1e-8 if self.adam_eps is None else self.adam_eps


class Sft(Training):
    enabled: bool = setting(True, "false: RL starts from the base as it is", "paper: SFT warm-up")
    examples: int | None = setting(1000, "demonstrations used; null: all", "paper", ge=1)
    more_tasks: list[str] = setting([], "other tasks: as many demonstrations of each are mixed in", "none: paper")
    epochs: float = setting(1.0, "passes over the examples", "paper", gt=0)
    max_steps: int | None = setting(None, "updates; overrides epochs", "none", ge=1)
    batch_size: int = setting(16, "responses per update", "common practice", ge=1)


class TrainRm(Training):
    lr: float = setting(1e-6, "peak learning rate of AdamW; not set with LoRA: 1e-5", f"paper; {WITH_LORA}", gt=0)
    epochs: float = setting(1.0, "passes over the pairs", "paper", gt=0)
    max_steps: int | None = setting(None, "updates; overrides epochs", "none", ge=1)
    batch_size: int = setting(16, "pairs per update", "common practice", ge=1)
    beta: float = setting(0.1, "DPO's beta", "paper", ge=LEAST)
    sft_weight: float = setting(0.0, "weight of the chosen responses' mean token NLL beside DPO", "paper: none", ge=0)
    prompts: int | None = setting(None, "sampled pairs: prompts to sample for; null: all that sft left", "all", ge=1)
    samples_per_prompt: int = setting(4, "sampled pairs: responses per prompt", "two of four differ often enough", ge=2)
    pairs_per_prompt: int = setting(1, "sampled pairs: at most this many per prompt", "every prompt counts alike", ge=1)
    temperature: Temperature = setting(1.0, "sampled pairs: temperature", "1: varied mistakes", gt=0)
    top_p: float = setting(1.0, "sampled pairs: nucleus", "1: varied mistakes", gt=0, le=1)
    demonstrations_as_chosen: bool = setting(False, "the item's demonstration if none is right", "off: on-policy pairs")
    cut_rejected: bool = setting(
        True, "cut a rejected response after its first wrong token", "prototype: this decides what φ_DPO teaches"
    )
    held_out: float = setting(
        0.05,
        "share of pairs, whole prompts, kept to measure accuracy; without a task those of data.held_out are",
        "common practice",
        ge=0,
        lt=1,
    )
    check_items: int = setting(200, "held-out items to score φ_DPO on as a policy; 0: none", "std error 0.035", ge=0)
