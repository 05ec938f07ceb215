"""The recipe's ``eval``: what is scored, how responses are drawn, who judges."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from lco_lite.recipe.section import Section, setting


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
