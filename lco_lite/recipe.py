"""The typed recipe: every setting once, with unit, default and source.

A recipe is a YAML file; ``--set a.b=c`` overrides it, and named flags override both. Unknown keys, wrong types and
combinations that make no sense are refused, all at once, each with its key path, line and value. Imports no torch.

"paper" is arXiv 2603.00963; "prototype" the settings that were found to learn in this project's first experiments.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lco_lite.method_defaults import DISTILLATION, LCO, METHOD_DEFAULTS, method_defaults
from lco_lite.user_code import names_function


def setting(default: Any, what: str, source: str, **bounds: Any) -> Any:
    """A field with its meaning (unit included) and where its default comes from."""
    return Field(default, description=what, json_schema_extra={"source": source}, **bounds)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)


class Lora(Section):
    r: int = setting(32, "rank of the update", "QLoRA practice; 16 to 64 are alike", ge=1)
    alpha: float = setting(64, "scale: the update is multiplied by alpha / r", "twice the rank, QLoRA practice", gt=0)
    dropout: float = setting(
        0.0, "share of adapter inputs dropped", "0: h_old and h must come from the same numerics", ge=0, lt=1
    )
    targets: Literal["all-linear"] | list[str] = setting(
        "all-linear", "modules that get an adapter; never the LM head", "QLoRA: all linear layers"
    )


class Init(Section):
    """A Llama-shaped model from scratch with a byte-level tokenizer (256 bytes and 4 specials)."""

    hidden_size: int = setting(128, "width d", "prototype", ge=8)
    layers: int = setting(4, "transformer blocks", "prototype", ge=1)
    heads: int = setting(4, "attention heads", "prototype", ge=1)
    intermediate_size: int = setting(384, "width of the feed-forward layer", "3 x hidden_size", ge=8)
    max_length: int = setting(256, "longest sequence, tokens", "ample for the arithmetic task", ge=16)
    std: float = setting(0.05, "standard deviation of the first weights", "prototype", gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Init:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of heads {self.heads}")
        return self


class Weights(Section):
    """Base weights and the adapter on them."""

    path: str | None = setting(None, "hub id or local folder", "yours")
    revision: str | None = setting(None, "branch, tag or commit on the hub", "the hub's main")
    gguf_file: str | None = setting(None, "name of a GGUF file under path; converted once into the run", "none")
    quantization: Literal["none", "nf4", "int8"] = setting(
        "none", "storage of the frozen base (bitsandbytes)", "nf4 with double quantisation is what fits 12 GB"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "weights and compute; auto: bfloat16 on a GPU, float32 on a CPU", "bfloat16 where it is fast"
    )
    lora: Lora | None = setting(
        Lora(), "the adapter; null trains all weights but the LM head", "LoRA keeps the head frozen"
    )
    gradient_checkpointing: bool = setting(
        False,
        "recompute activations in the backward pass: about a third more time, far less memory",
        "off on small models",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting(
        "auto", "attention kernel", "the model's own default"
    )
    trust_remote_code: bool = setting(False, "run Python that comes with the weights", "off: safe by default")


class Model(Weights):
    train_head: bool = setting(
        False,
        "full fine-tuning trains the LM head too: a slower loss path",
        "off: a frozen linear head is what makes LCO cheap",
    )
    init: Init | None = setting(
        None, "build a small model instead of loading one; sft then trains all its weights", "none"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.path is None) == (self.init is None):
            raise ValueError("give either path (hub id or folder) or init (a model from scratch)")
        if self.init is not None and (self.gguf_file or self.quantization != "none"):
            raise ValueError("init builds a small model in plain precision: no gguf_file, no quantization")
        if self.lora is None and self.quantization != "none":
            raise ValueError("quantized weights cannot be trained: keep lora, or set quantization: none")
        return self


class RewardModel(Weights):
    """φ_DPO on a base of its own; ``reward_model: self`` shares the policy's base instead."""

    @model_validator(mode="after")
    def _has_path(self) -> RewardModel:
        if self.path is None:
            raise ValueError("needs path (hub id or folder); write `reward_model: self` to share the policy's base")
        if self.lora is None:
            raise ValueError("a reward model of its own is an adapter on its base: lora cannot be null")
        return self


class Chat(Section):
    system: str | None = setting(None, "system message; null: the task's own", "the task")
    template_args: dict[str, Any] = setting(
        {}, "arguments for the chat template, e.g. {enable_thinking: false}", "none"
    )


class Data(Section):
    """Each is a file (.jsonl, .json, .parquet, .csv) or ``hub-id[:split]``; null takes the task's training items."""

    demonstrations: str | None = setting(
        None, "prompts with responses to imitate, for sft", "the task's demonstrations"
    )
    preferences: str = setting(
        "sampled",
        "prompt/chosen/rejected for train-rm; `sampled`: made from the policy's own responses",
        "paper: sampled and graded",
    )
    prompts: str | None = setting(None, "prompts for rl", "the task's training items")
    task: str | None = setting(None, "file with the task's items instead of its hub set", "the task's own")


class Training(Section):
    """What every training stage shares."""

    lr: float = setting(2e-5, "peak learning rate of AdamW", "TRL 1.16 SFT", gt=0)
    schedule: Literal["constant", "cosine"] = setting("cosine", "learning rate after warm-up", "common practice")
    warmup_steps: int = setting(0, "updates of linear warm-up", "TRL", ge=0)
    adam_betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's betas", "TRL")
    weight_decay: float = setting(0.0, "AdamW's decoupled decay", "TRL", ge=0)
    max_grad_norm: float | None = setting(
        1.0, "clip the gradient's 2-norm here; null: never. Logged before clipping", "TRL", gt=0
    )
    micro_batch_tokens: int = setting(
        8192,
        "padded tokens in one forward pass; smaller needs less memory and gives the same gradient",
        "fits 12 GB with a 3B policy",
        ge=16,
    )
    max_length: int = setting(2048, "prompt and response, tokens; longer ones are skipped and counted", "paper", ge=8)
    save_every: int = setting(50, "updates between checkpoints (in rl: steps)", "minutes of work at risk", ge=1)


class Sft(Training):
    enabled: bool = setting(True, "false: RL starts from the base as it is", "paper: SFT warm-up")
    examples: int | None = setting(1000, "demonstrations used; null: all", "paper", ge=1)
    epochs: float = setting(1.0, "passes over the examples", "paper", gt=0)
    max_steps: int | None = setting(None, "updates; overrides epochs", "none", ge=1)
    batch_size: int = setting(16, "responses an update", "common practice", ge=1)


class TrainRm(Training):
    lr: float = setting(1e-6, "peak learning rate of AdamW", "paper", gt=0)
    epochs: float = setting(1.0, "passes over the pairs", "paper", gt=0)
    max_steps: int | None = setting(None, "updates; overrides epochs", "none", ge=1)
    batch_size: int = setting(16, "pairs an update", "common practice", ge=1)
    beta: float = setting(0.1, "DPO's beta", "paper", gt=0)
    sft_weight: float = setting(
        0.0, "weight of the chosen responses' mean token likelihood beside DPO", "0: plain DPO (paper)", ge=0
    )
    prompts: int | None = setting(None, "sampled pairs: prompts to sample for; null: all that sft left", "all", ge=1)
    samples_per_prompt: int = setting(4, "sampled pairs: responses a prompt", "two of four differ often enough", ge=2)
    pairs_per_prompt: int = setting(1, "sampled pairs: at most so many a prompt", "every prompt counts alike", ge=1)
    temperature: float = setting(1.0, "sampled pairs: temperature", "1: varied mistakes", gt=0)
    top_p: float = setting(1.0, "sampled pairs: nucleus", "1: varied mistakes", gt=0, le=1)
    demonstrations_as_chosen: bool = setting(
        False,
        "sampled pairs: where no sample is right, take the item's demonstration as chosen",
        "off: on-policy pairs",
    )
    cut_rejected: bool = setting(
        True,
        "cut a rejected response after its first wrong token, where the task knows it",
        "prototype: this decides what φ_DPO teaches",
    )
    held_out: float = setting(0.05, "share of pairs kept for measuring accuracy", "common practice", ge=0, lt=1)
    check_items: int = setting(
        200, "held-out items on which φ_DPO is scored as a policy; 0: no check", "std error 0.035", ge=0
    )


class Variant(Section):
    """What the authors' public code does where it departs from the paper. All off."""

    top_k: int | None = setting(
        None, "kld, lch, mse see only the k likeliest tokens of π_old, their A standardised; sparse: 1", "5 there", ge=1
    )
    target: Literal["old", "current"] = setting(
        "old", "lch, mse: current starts z* from the logits of each update instead of π_old's", "current there"
    )
    negative_beta: float | None = setting(None, "sparse: β times this where A ≤ 0", "100 there", gt=0)
    agreement: float | None = setting(
        None,
        "logprob: β times 100 where π_old and φ both give the sampled token a log-probability above this",
        "-0.02 there",
        lt=0,
    )

    @property
    def is_on(self) -> bool:
        return self != Variant()


class Rl(Training):
    objective: str = setting(
        "kld",
        f"the loss, which brings its own defaults (method_defaults.py): {', '.join(METHOD_DEFAULTS)}; or FILE.py:NAME",
        "paper eqs 8 to 10; KLD is the steadiest",
    )
    beta: float = setting(1.0, "strength of the KL regulariser, in units of the advantage", "paper", gt=0)
    feedback: Literal["dpo", "dpo_sampled", "logprob", "rule", "function", "reward_model"] = setting(
        "dpo",
        "dpo: dense, eq 13; dpo_sampled: that of the sampled token; logprob: dense, eq 12; rule: +1 right, -1 wrong; "
        "function: yours; reward_model: a sequence classifier. For gkd and minillm φ of dpo or logprob is the teacher",
        "paper",
    )
    reward_function: str | None = setting(None, "feedback function: FILE.py:NAME", "yours")
    reward_timeout: float = setting(60.0, "seconds that reward_function may take for 32 responses", "a minute", gt=0)
    reward_classifier: str | None = setting(
        None, "feedback reward_model: hub id or folder of a sequence-classification model", "yours"
    )
    baseline: Literal["none", "batch", "group", "leave_one_out"] = setting(
        "batch",
        "what is subtracted from a reward: the mean of the phase, of the prompt's responses, of its other ones",
        "prototype: none collapses",
    )
    scale_rewards: bool = setting(False, "divide by the deviation of the prompt's rewards", "off: paper; on: GRPO")
    kl_coef: float = setting(
        0.0, "policy gradients: coefficient of log π/π_ref, taken off the reward", "paper: none", ge=0
    )
    clip_low: float = setting(0.2, "policy gradients: the ratio's lower clip, 1 less this", "TRL 1.16", gt=0, lt=1)
    clip_high: float = setting(0.2, "policy gradients: the ratio's upper clip, 1 plus this", "TRL 1.16", gt=0)
    gamma: float = setting(1.0, "ppo: discount a token", "TRL 1.10", gt=0, le=1)
    gae_lambda: float = setting(0.95, "ppo: GAE's λ", "TRL 1.10", ge=0, le=1)
    value_coef: float = setting(0.1, "ppo: weight of the value loss", "TRL 1.10", gt=0)
    value_clip: float = setting(0.2, "ppo: values move at most so far from the old ones", "TRL 1.10", gt=0)
    overlong_buffer: float = setting(
        0.0, "the last share of max_new_tokens, over which the reward falls by 1", "off; DAPO 0.2", ge=0, lt=1
    )
    dynamic_sampling: bool = setting(
        False, "sample other prompts for groups without signal, three times at most", "off; DAPO on"
    )
    jsd_beta: float = setting(
        0.5, "gkd: β of the divergence; 0 is KL(φ ‖ π_θ), 1 is KL(π_θ ‖ φ)", "TRL 1.16", ge=0, le=1
    )
    on_policy: float = setting(
        1.0, "gkd: share of prompts answered by the policy; the rest take their demonstration", "GKD 0.5", ge=0, le=1
    )
    teacher_mix: float = setting(
        0.0, "minillm: share of the teacher in the mixture that responses are drawn from", "MiniLLM 0.2", ge=0, lt=1
    )
    variant: Variant = setting(Variant(), "the public code's choices", "see Variant")
    weighting: Literal["mean", "sum", "policy"] = setting(
        "mean", "mse, lch: weights over the vocabulary; policy: by π_old", "mean: paper eqs 8 and 9"
    )
    anchor: float = setting(
        0.0, "λ in z* = (1-λ) z_old + λ z_ref + A/β", "0: paper; 0.5 stops the compounding", ge=0, le=1
    )
    standardise: bool = setting(
        False, "dpo: divide A by its standard deviation over the vocabulary, per token", "off: paper"
    )
    lr: float = setting(5e-6, "peak learning rate of AdamW", "paper", gt=0)
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate after warm-up", "paper's public code")
    warmup_steps: int = setting(10, "updates of linear warm-up", "prototype: Adam's first steps are sign-like", ge=0)
    steps: int = setting(4, "rollout phases; π_old and the target are fixed within one", "prototype", ge=1)
    prompts_per_step: int = setting(512, "prompts a phase", "prototype: hundreds; paper's public code: 3,072", ge=1)
    responses_per_prompt: int = setting(1, "responses a prompt", "paper: 1 for LCO", ge=1)
    minibatch: int = setting(64, "responses an update", "prototype", ge=1)
    inner_epochs: int = setting(1, "passes over a phase's responses", "paper's public code", ge=1)
    temperature: float = setting(0.6, "of rollouts; 0 is greedy", "paper", ge=0)
    top_p: float = setting(0.95, "of rollouts", "paper", gt=0, le=1)
    max_new_tokens: int | None = setting(None, "longest response, tokens; null: the task's", "the task", ge=1)
    rollout_batch: int = setting(128, "responses generated at once", "fits 12 GB with a 3B policy", ge=1)
    save_every: int = setting(1, "steps between checkpoints", "a phase is minutes of work", ge=1)
    eval_every: int = setting(1, "steps between held-out evaluations; 0: none", "one a phase", ge=0)
    eval_items: int = setting(256, "held-out items of such an evaluation", "std error 0.03", ge=1)
    guard: Literal["warn", "stop", "off"] = setting(
        "warn", "on collapse of entropy, reward or length", "say it in words; stop exits 4"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        usual = method_defaults(str(given.get("objective", "kld")))
        if given.get("feedback") == "dpo_sampled":
            usual.pop("dynamic_sampling", None)  # sums of log-ratios never tie: every group has a signal
        return {**usual, **given}

    @field_validator("objective")
    @classmethod
    def _known(cls, objective: str) -> str:
        if objective in METHOD_DEFAULTS or names_function(objective):
            return objective
        near = difflib.get_close_matches(objective, METHOD_DEFAULTS, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"unknown objective {objective!r}{hint} Accepted: {', '.join(METHOD_DEFAULTS)}, or FILE.py:NAME"
        )

    @property
    def stage(self) -> str:
        """The name of the stage that trains with this objective."""
        return f"rl-{self.objective.rpartition(':')[2]}"

    @property
    def is_lco(self) -> bool:
        return self.objective in LCO

    @property
    def is_distillation(self) -> bool:
        """Whether the objective follows a teacher's distribution."""
        return self.objective in DISTILLATION

    @property
    def is_policy_gradient(self) -> bool:
        return not self.is_lco and not self.is_distillation

    @property
    def is_dense(self) -> bool:
        """Whether the feedback is an advantage for every token of the vocabulary."""
        return self.feedback in ("dpo", "logprob")

    @property
    def rewards_responses(self) -> bool:
        """Whether the feedback is one number a response."""
        return self.feedback in ("rule", "function", "reward_model")

    @property
    def needs_reward_model(self) -> bool:
        """Whether the feedback is the φ_DPO that train-rm makes."""
        return self.feedback in ("dpo", "dpo_sampled")

    @model_validator(mode="after")
    def _makes_sense(self) -> Rl:
        problems = [*self._wrong_for_the_objective(), *self._wrong_for_the_feedback(), *self._wrong_variant()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _wrong_for_the_objective(self) -> Iterator[str]:
        name = self.objective
        if self.is_policy_gradient and self.is_dense:
            yield (
                f"feedback {self.feedback} is an advantage over the whole vocabulary, and {name} takes that of sampled "
                "tokens: dpo_sampled, rule, function or reward_model"
            )
        if self.is_distillation and not self.is_dense:
            yield f"{name} follows a teacher: feedback dpo (φ_DPO) or logprob, not {self.feedback}"
        if not self.is_lco and (self.weighting != "mean" or self.anchor):
            yield f"weighting and anchor belong to kld, lch and mse, not to {name}"
        if not self.is_policy_gradient and self.kl_coef:
            yield f"kl_coef is for policy gradients: {name} stays near another model by itself"
        if self.weighting != "mean" and name == "kld":
            yield f"weighting {self.weighting!r} has no meaning for kld: it is an expectation already (use mse or lch)"
        if self.on_policy < 1 and name != "gkd":
            yield f"on_policy belongs to gkd: {name} learns from the policy's own responses"
        if self.teacher_mix and name != "minillm":
            yield f"teacher_mix belongs to minillm: {name} does not correct for another sampler"

    def _wrong_for_the_feedback(self) -> Iterator[str]:
        grouped = self.baseline in ("group", "leave_one_out") or self.scale_rewards or self.dynamic_sampling
        if not self.is_dense and grouped and self.responses_per_prompt < 2:
            yield (
                f"baseline {self.baseline}, scale_rewards and dynamic_sampling compare a prompt's responses: "
                "responses_per_prompt must be at least 2"
            )
        if self.dynamic_sampling and not self.rewards_responses:
            yield f"dynamic_sampling looks at rewards of whole responses, and feedback {self.feedback} has none"
        if self.standardise and (not self.is_dense or not self.is_lco):
            yield "standardise needs kld, lch or mse with the dense advantages of feedback dpo or logprob"
        for feedback, field in (("function", "reward_function"), ("reward_model", "reward_classifier")):
            if (self.feedback == feedback) != (getattr(self, field) is not None):
                yield f"feedback {feedback} and {field} go together"
        if self.reward_function is not None and not names_function(self.reward_function):
            yield f"reward_function {self.reward_function!r} is no FILE.py:NAME"

    def _wrong_variant(self) -> Iterator[str]:
        v = self.variant
        if v.is_on and not self.is_lco:
            yield f"variant belongs to kld, lch and mse, not to {self.objective}"
        if v.top_k and (self.anchor or self.weighting != "mean" or self.standardise):
            yield "variant.top_k standardises by itself and sums over its tokens: no anchor, weighting or standardise"
        if v.top_k and not self.is_dense and (v.top_k > 1 or self.objective == "kld"):
            yield "variant.top_k with sparse feedback is 1, the sampled token, and for lch and mse"
        if v.target == "current" and self.objective == "kld":
            yield "variant.target current is for lch and mse"
        if v.negative_beta and self.is_dense:
            yield "variant.negative_beta looks at the sign of a sampled token's advantage: feedback must be sparse"
        if v.agreement and self.feedback != "logprob":
            yield "variant.agreement compares π_old with φ of feedback logprob"


class RewardModels(Section):
    """Token- or sequence-classification models that read a question, its passages and an answer."""

    relevance: str | None = setting(None, "hub id or folder", "yours")
    factuality: str | None = setting(None, "hub id or folder", "yours")
    completeness: str | None = setting(None, "hub id or folder", "yours")


class Eval(Section):
    tasks: list[str] | None = setting(None, "tasks scored at the end of a run; null: the recipe's task", "the task")
    seeds: int = setting(4, "sampling passes over all items", "paper: mean ± std over 4", ge=1)
    temperature: float = setting(0.6, "0 is greedy, and then one pass", "paper", ge=0)
    top_p: float = setting(0.95, "nucleus", "paper", gt=0, le=1)
    items: int | None = setting(None, "first so many items; null: all", "all", ge=1)
    max_new_tokens: int | None = setting(None, "longest response, tokens; null: the task's", "the task", ge=1)
    samples: int = setting(1, "responses an item and pass: pass@1, pass@k and maj@k for k of them", "paper: 1", ge=1)
    scoring: Literal["generation", "likelihood"] = setting(
        "generation", "likelihood: of each choice's letter, for items with choices", "small chat models need generation"
    )
    template: str | None = setting(None, "the user's turn around {problem}; null: the task's", "the task")
    system: str | None = setting(None, "system message; null: chat.system, else the task's", "the task")
    few_shot: int = setting(0, "worked examples as earlier turns, of the dev split, else of train", "paper: none", ge=0)
    batch: int = setting(128, "responses generated at once, at most", "fits 12 GB with a 3B policy", ge=1)
    batch_tokens: int = setting(
        65_536, "padded tokens at once, responses of full length: fewer where they are long", "7 GB of Llama 3B", ge=16
    )
    judge_url: str | None = setting(
        None, "alpaca_eval: base of a chat-completions API, e.g. http://localhost:8000/v1; or alpaca-eval", "none"
    )
    judge_model: str | None = setting(None, "the judge's name there; of alpaca-eval its annotator", "yours")
    judge_key_variable: str | None = setting(
        None, "environment variable with the API's key; null: OPENAI_API_KEY for https and this machine", "OpenAI's"
    )
    judge_options: dict[str, Any] = setting(
        {"temperature": 0, "max_tokens": 1024}, "more fields of the judge's requests", "one word is asked for"
    )
    judge_price: tuple[float, float] | None = setting(
        None, "dollars a million tokens, in and out: shown before judging starts", "unknown"
    )
    judge_limit: int = setting(100, "requests a pass that are sent without --yes", "cents", ge=0)
    judge_confirmed: bool = setting(False, "--yes: any number of requests may be sent", "off")
    judge_parallel: int = setting(8, "requests at once", "common rate limits", ge=1, le=64)
    reward_models: RewardModels = setting(RewardModels(), "qa_feedback: what scores the answers", "yours")

    @model_validator(mode="after")
    def _makes_sense(self) -> Eval:
        if self.template is not None and "{problem}" not in self.template:
            raise ValueError("template has no {problem}, so that every prompt would be the same")
        if self.scoring == "likelihood" and self.samples > 1:
            raise ValueError("samples: likelihood makes no responses")
        if self.judge_url is not None and self.judge_url != "alpaca-eval":
            _need_plain_url(self.judge_url)
            if self.judge_model is None:
                raise ValueError("judge_url needs judge_model, the name of the model that judges there")
        return self


def _need_plain_url(url: str) -> None:
    """It goes into results and messages, so it must hold no secret."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"judge_url {url!r} is neither http://… nor https://… nor alpaca-eval")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("judge_url holds more than host and path: a key belongs into an environment variable")


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = setting(
        "run", "the run's folder under --runs", "the recipe's"
    )
    seed: int = setting(0, "of weights, data order and sampling", "0", ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one", "the machine")
    threads: int | None = setting(None, "CPU threads; null: torch's choice", "the machine", ge=1)
    task: str | None = setting(None, "prompts, grader and held-out items; null: your data only", "none")
    model: Model
    reward_model: Literal["self"] | RewardModel = setting(
        "self", "`self`: an adapter on the policy's base", "one base fits small cards"
    )
    chat: Chat = setting(Chat(), "how prompts are written", "see Chat")
    data: Data = setting(Data(), "where rows come from", "see Data")
    sft: Sft = setting(Sft(), "supervised warm-up", "see Sft")
    train_rm: TrainRm = setting(TrainRm(), "the reward model φ_DPO", "see TrainRm")
    rl: Rl = setting(Rl(), "the policy", "see Rl")
    eval: Eval = setting(Eval(), "the score", "see Eval")

    @model_validator(mode="after")
    def _hangs_together(self) -> Recipe:
        problems = []
        if self.task is None:
            if self.sft.enabled and self.data.demonstrations is None:
                problems.append("data.demonstrations: needed where task is null (or set sft.enabled: false)")
            if self.data.prompts is None:
                problems.append("data.prompts: needed where task is null")
            if self.rl.needs_reward_model and self.data.preferences == "sampled":
                problems.append(
                    "data.preferences: `sampled` pairs are graded by a task, and task is null: name a file or hub set"
                )
            if self.rl.feedback == "rule":
                problems.append("rl.feedback: rule asks a task's grader, and task is null")
        if self.model.init is not None and not self.sft.enabled:
            problems.append("sft.enabled: a model from scratch has learnt nothing yet: it needs sft")
        if self.model.train_head and self.rl.variant.is_on:
            problems.append("rl.variant: needs a frozen head, and model.train_head is true")
        if (
            self.model.lora is None
            and self.reward_model == "self"
            and self.rl.needs_reward_model
            and self.model.quantization != "none"
        ):
            problems.append("reward_model: self with lora: null needs unquantized weights")
        if problems:
            raise ValueError("; ".join(problems))
        return self
