"""How good is a policy where there is no task? By the user's own rewards, and by likelihood, on data held out.

The rewards of ``rl.feedback`` that are a number a response, on responses to the prompts that nothing was trained on:
their mean is the score, with the same passes, rows and comparisons as a task's (``HeldOut`` is one). Of demonstrations
held out, the loss; of pairs, how much likelier the chosen answer is than the rejected one.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lco_lite import ranks, weights
from lco_lite.console import Console
from lco_lite.context import Context
from lco_lite.data.prompts import held_out_rows, longest_response, pair_of
from lco_lite.errors import DataError, UsageError
from lco_lite.evaluation.prompts import made_by, rows_digest
from lco_lite.evaluation.summary import LIKELIHOODS, LikelihoodsKept, read_score
from lco_lite.feedback.rewards import Answers, RewardFunction, columns_of, reward_sources
from lco_lite.files import write_json
from lco_lite.grading import Item
from lco_lite.models.chat import ChatFormat
from lco_lite.models.fingerprint import known_by
from lco_lite.models.language_model import Role
from lco_lite.models.loading import open_tokenizer
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.recipe import Eval, Recipe
from lco_lite.sequences import Example, collate, own_micro_batches
from lco_lite.tasks.base import Task
from lco_lite.user_code import file_digest

HELD_OUT = "held_out"


@dataclass
class HeldOut(Task):
    """The prompts of ``data.prompts`` that are held out. What scores a response is its reward."""

    recipe: Recipe | None = None
    device: torch.device = torch.device("cpu")

    def items(self, split: str) -> Sequence[Item]:
        if split not in self._items:
            assert self.recipe is not None, "held_out_task makes it"
            asked = held_out_rows(self.recipe)["prompts"]
            self._items[split] = tuple(
                Item(f"{HELD_OUT}/{i}", p.messages[-1]["content"], "", None, p.row, p.messages)
                for i, p in enumerate(asked)
            )
        return self._items[split]

    def scored_by(self, settings: Eval) -> dict[str, Any]:
        """The functions with digests of their files and of the columns that they read, and the classifier with what is
        in its folder: an edited one makes another score of the same responses."""
        assert self.recipe is not None, "held_out_task makes it"
        rl = self.recipe.rl
        functions = {name: [spec, file_digest(spec)] for name, spec in rl.reward_functions.items()}
        weights_of = {name: part.weight for name, part in rl.reward_parts.items()}
        rested_on = {"rows": rows_digest(self.items("test"))} if functions else {}
        if rl.reward_classifier is not None:
            rested_on["classifier"] = known_by(rl.reward_classifier)
        return {"functions": functions, "weights": weights_of} | rested_on

    def aggregate(self, rows: list[dict[str, Any]], settings: Eval, folder: Path, console: Console) -> dict[str, Any]:
        """``reward``, of several the mean by weight of those that apply, and then each by its name."""
        assert self.recipe is not None, "held_out_task makes it"
        rl, items = self.recipe.rl, {item.id: item for item in self.items("test")}
        sources = reward_sources(rl, self.device)
        functions = [source for source in sources.values() if isinstance(source, RewardFunction)]
        texts, ids = [row["response"] for row in rows], [list[int]() for _ in rows]
        if any(function.takes_ids for function in functions):
            ids = [ChatFormat(open_tokenizer(self.recipe.model, self.recipe.seed)).ids(text) for text in texts]
        messages = [items[row["id"]].messages or [] for row in rows]
        columns = columns_of([item.row for item in items.values()])
        answers = Answers(messages, [row["row"] for row in rows], texts, ids, columns=columns)
        by_name = {name: source(answers).tolist() for name, source in sources.items()}
        for function in functions:
            function.close()
        scores = [_mean({n: v[i] for n, v in by_name.items()}, rl.reward_parts) for i in range(len(rows))]
        if all(score is None for score in scores):
            raise DataError(f"no reward applies to any of the {len(rows)} responses to the prompts held out")
        several = {n: [None if math.isnan(v) else v for v in values] for n, values in by_name.items()}
        known = {n: values if any(v is not None for v in values) else None for n, values in several.items()}
        own = {name if name != "reward" else "reward (function)": v for name, v in known.items()}  # not in its place
        return {"reward": scores} | (own if len(known) > 1 else {})


def _mean(rewards: dict[str, float], parts: Any) -> float | None:
    known = {name: value for name, value in rewards.items() if not math.isnan(value)}
    total = sum(parts[name].weight for name in known)
    return sum(parts[name].weight * value for name, value in known.items()) / total if known else None


def held_out_task(recipe: Recipe, device: torch.device) -> HeldOut:
    """Raises UsageError where the recipe has a task, whose items are its score."""
    if recipe.task is not None:
        raise UsageError(f"{HELD_OUT} is the score of runs without a task, and this one has {recipe.task}")
    longest = longest_response(recipe)
    return HeldOut(
        HELD_OUT, {}, lambda row: None, grader=None, template="{problem}", max_new_tokens=longest, recipe=recipe,
        device=device,
    )  # fmt: skip


def likelihoods(ctx: Context, stage: str) -> dict[str, Any]:
    """``loss``: -log π a token of the demonstrations held out, nats; ``margin``: mean log π(chosen) - log π(rejected)
    of the pairs held out, nats. Each with how many there are; kept while stage and data are the same."""
    recipe = ctx.recipe
    rows = held_out_rows(recipe)
    shown, pairs = rows["demonstrations"], rows["preferences"]
    if not shown and not pairs:
        return {}
    file = ctx.run.eval_path(LIKELIHOODS, stage)
    digest = hashlib.sha256(json.dumps([repr(row) for row in (*shown, *pairs)]).encode()).hexdigest()[:16]
    template_args = json.dumps(recipe.chat.template_args, default=str)
    asked = {"made_by": made_by(ctx, stage), "items": digest, "template_args": template_args}
    known = ranks.from_main(read_score(file, LikelihoodsKept) if file.exists() else {})
    if known.get("settings") == asked:
        return dict(known)
    with ctx.clock("loading"):
        role = weights.open_stage(ctx, stage)
        chat = ChatFormat(role.model.tokenizer, recipe.chat.template_args, ctx.console.warn)
    result: dict[str, Any] = {"stage": stage, "settings": asked}
    with ctx.clock("eval"):
        if examples := [e for d in shown if len(e := chat.example(d.messages, d.response)) <= role.model.max_length]:
            logprobs = response_logprobs(role, examples, recipe.sft.micro_batch_tokens)
            result["loss"] = -sum(logprobs) / sum(len(e.response) for e in examples)
            result["demonstrations"] = len(examples)
        if fitting := [p for row in pairs if (p := pair_of(row, chat)).longest() <= role.model.max_length]:
            both = [p.chosen for p in fitting] + [p.rejected for p in fitting]
            logprobs = response_logprobs(role, both, recipe.train_rm.micro_batch_tokens)
            n = len(fitting)
            result["margin"] = (sum(logprobs[:n]) - sum(logprobs[n:])) / n
            result["pairs"] = n
    ranks.once(write_json)(file, result)
    return result


@torch.no_grad()
def response_logprobs(role: Role, examples: Sequence[Example], micro_batch_tokens: int) -> list[float]:
    """log π(response | prompt) of each, summed over its tokens, nats."""
    sums = torch.zeros(len(examples), dtype=torch.float64)
    for places in own_micro_batches([len(e) for e in examples], micro_batch_tokens):
        batch = collate([examples[i] for i in places], role.model.pad_id).to(role.model.device)
        logprobs, _ = token_logprobs(role.hidden(batch), role.model.head, batch.actions)
        sums.index_add_(0, torch.tensor(places)[batch.rows.cpu()], logprobs.double().cpu())
    return torch.stack(ranks.gather(sums)).sum(0).tolist()


def show_held_out(console: Console, results: Sequence[dict[str, Any]], labels: Mapping[str, str] | None = None) -> None:
    """A row a stage: rewards as mean ± std over seeds, loss and margin in nats; what they rest on below."""
    names = list(dict.fromkeys(name for r in results for name in r.get("metrics", {})))
    columns = ["stage", *names, *(name for name in ("loss", "margin") if any(name in r for r in results))]
    lines = []
    for r in results:
        told = {"stage": (labels or {}).get(r["stage"], r["stage"])} | {
            n: f"{r[n]:.3f}" for n in ("loss", "margin") if n in r
        }
        for name, metric in r.get("metrics", {}).items():
            told[name] = " ± ".join(f"{metric[key]:.3f}" for key in ("mean", "std") if metric[key] is not None)
        lines.append([told.get(name, "") for name in columns])
    several = any(r.get("seeds", 1) > 1 for r in results)
    console.table("held out" + ": mean ± std over seeds" * several, columns, lines, result=True)
    for r in results[-1:]:
        rests = []
        if "metrics" in r:
            error = "" if r["stderr"] is None else f" (standard error over prompts {r['stderr']:.3f})"
            rests.append(f"reward: {r['n']} prompts, {r['seeds']} seed{'s' * (r['seeds'] > 1)}{error}")
        rests += [f"loss: of {r['demonstrations']} demonstrations, nats a token"] if "loss" in r else []
        rests += [f"margin: log chosen/rejected of {r['pairs']} pairs, nats"] if "margin" in r else []
        console.result("; ".join(rests))
