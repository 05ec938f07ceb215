"""One batch, many updates: what each loss does to the gradient, by the sign of A (Figs 3 to 5, 8, 9; claims C1, C2).

As the authors' code has it: responses that are all wrong (A = −1 at every token) or all right (A = +1), the same batch
for a hundred updates of Adam without clipping of the gradient, π_old and with it z* fixed. All weights are trained, the
head's too, unless ``full`` is false or the policy before RL is an adapter. The losses are those of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lco_lite import weights
from lco_lite.context import Context
from lco_lite.data.prompts import longest_response, rewarding_task, rl_prompts
from lco_lite.errors import UsageError
from lco_lite.models.chat import ChatFormat
from lco_lite.recipe import Rl
from lco_lite.rollout.engine import Response, Sampling, in_order, open_engine
from lco_lite.sequences import endless, seeded
from lco_lite.study.base import Cell, Claim, Findings, Plot, Results, Row, Study, Table, Verdict, against
from lco_lite.study.statistics import mean_std
from lco_lite.train import rl as training
from lco_lite.train.methods import Models, score
from lco_lite.train.rollouts import Phase
from lco_lite.train.training import open_optimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lco_lite.recipe import Recipe

# thresholds of the claims; of each the 95 % interval over seeds of a mean log ratio must lie on the right side
GROWS = 2.0  # C1: PPO's largest gradient norm over its first, A < 0
SHRINKS = 1.0  # C1: its last over its first, A > 0
DECAYS = 0.5  # C2: LCO's last gradient norm over its first is below this
SMOOTH = 1.5  # C2: its largest over its first is below this
ENTROPY = (0.5, 2.0)  # C2: the last entropy over the first is between these
PROBABILITY = 0.25  # C2, sparse A < 0: the last probability of sampled tokens over the first is above this

LABEL = "dynamics"
SIGNS = ("neg", "pos")
TITLES = {"neg": "A < 0: wrong responses", "pos": "A > 0: right responses"}
OPTIONS: dict[str, Any] = {
    "updates": 100,  # the authors' code
    "responses": 6,  # of each sign; the authors' code
    "prompts": 1024,  # asked for them; the authors' code
    "lr": 2e-5,  # where all weights are trained: chosen on seed 0, as slow as theirs
    "adapter_lr": None,  # where an adapter is; None: the recipe's
    "full": None,  # train all weights; None: where the policy before RL is a whole model
    "strategies": None,  # names; None: all of them
}


@dataclass(frozen=True)
class Strategy:
    """``rl``: fields of the recipe's rl section. ``no_clip``: ρ goes where it will."""

    name: str
    rl: Mapping[str, Any]
    signs: Sequence[str] = SIGNS
    no_clip: bool = False

    def settings(self, lr: float) -> Rl:
        """One response is one sample: no baseline, no groups, Adam as torch has it."""
        rule = {"feedback": "rule", "baseline": "none", "responses_per_prompt": 1, "beta": 1.0}
        adam = {"lr": lr, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": None, "temperature": 1.0}
        rl = Rl.model_validate({**rule, **adam, "top_p": 1.0, **self.rl})
        return rl.model_copy(update={"clip_low": math.inf, "clip_high": math.inf}) if self.no_clip else rl


# dapo's loss is PPO's surrogate, eq 5, without a critic; this is what is left when its choice of groups is off
_SURROGATE = {"objective": "dapo", "scale_rewards": False, "dynamic_sampling": False, "overlong_buffer": 0.0}
STRATEGIES = (
    Strategy("sft", {"objective": "raft"}, ("pos",)),  # A = 1: cross-entropy, eq 4
    Strategy("reinforce", {"objective": "reinforce"}),
    Strategy("ppo, no clip", _SURROGATE, no_clip=True),
    Strategy("ppo, clip 0.2", {**_SURROGATE, "clip_low": 0.2, "clip_high": 0.2}),
    Strategy("ppo, no clip, max_grad_norm 1", {**_SURROGATE, "max_grad_norm": 1.0}, no_clip=True),
    Strategy("kld", {"objective": "kld"}),
    Strategy("lch", {"objective": "lch"}),
    Strategy("mse", {"objective": "mse"}),
    Strategy("kld, dense", {"objective": "kld", "feedback": "dpo"}),  # A is φ's, whatever the response is worth
)
FREE, CLIPPED, HELD = "ppo, no clip", "ppo, clip 0.2", "ppo, no clip, max_grad_norm 1"
LCO = ("kld", "lch", "mse", "kld, dense")
NUMBERS = {
    "qkv_grad_norm": "mean norm of the gradients of q, k and v",
    "grad_norm": "norm of the whole gradient",
    "logit_grad_sampled": "gradient in the sampled token's logit",
    "logit_grad_others": "gradient in the other tokens' logits",
    "sampled_prob": "probability of the sampled token",
    "entropy": "entropy, nats",
    "clipped": "share of tokens that are clipped",
    "loss": "loss",
}


class Dynamics(Study):
    name = "dynamics"
    asks = "How does the gradient develop on one batch, update after update, by the sign of A?"
    labels = (LABEL,)

    def cells(self, recipe: Recipe, seeds: Sequence[int], done: Results) -> list[Cell]:
        return [Cell(LABEL, seed, work="study.dynamics:probe", options=OPTIONS) for seed in seeds]

    def report(self, results: Results) -> Findings:
        ran = [s for s in STRATEGIES if any(curve(row, s.name, sign) for row in results.of(LABEL) for sign in SIGNS)]
        claims = [ppo_grows(results), ppo_shrinks(results), clip_stops(results), *(decays(results, n) for n in LCO)]
        plots = [
            Plot("gradient-norm", NUMBERS["qkv_grad_norm"], partial(draw, results, ran, ["qkv_grad_norm"]), (10, 4.5)),
            Plot(
                "logit-gradients",
                "Gradients in the logits",
                partial(draw, results, ran, ["logit_grad_sampled", "logit_grad_others"]),
                (10, 8),
            ),
            Plot(
                "policy",
                "Probability of the sampled token, and entropy",
                partial(draw, results, ran, ["sampled_prob", "entropy"]),
                (10, 8),
            ),
        ]
        return Findings(claims, [table(results, ran)], plots if ran else [], notes(results))


# the work of a cell


def probe(ctx: Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """The curves of every strategy and sign, a number an update, on this seed's policy before RL and its responses.

    ``trained`` says which weights; ``responses`` and ``tokens`` how many of each sign there were. A sign without
    responses has no curves; a curve ends where the gradient's norm is not finite.
    """
    how = OPTIONS | dict(options)
    with ctx.clock("loading"):
        models, parameters = open_models(ctx, how["full"])
    whole = models.policy.adapter is None
    lr = how["lr"] if whole else how["adapter_lr"] or ctx.recipe.rl.lr
    with ctx.clock("rollout"):
        batches, accuracy = batches_by_sign(ctx, models, how["prompts"], how["responses"])
    start = [(p, p.detach().clone()) for _, p in parameters]
    curves: dict[str, dict[str, Any]] = {}
    with ctx.clock("update"):
        for strategy, sign in product(STRATEGIES, batches):
            asked = how["strategies"] is None or strategy.name in how["strategies"]
            if asked and sign in strategy.signs:
                rl = strategy.settings(lr)
                curves.setdefault(strategy.name, {})[sign] = updates(
                    models, parameters, batches[sign], rl, how["updates"]
                )
                restore(start)
    return {
        "trained": "all weights" if whole else "adapter",
        "lr": lr,
        "accuracy": accuracy,
        "responses": {sign: len(phase.responses) for sign, phase in batches.items()},
        "tokens": {sign: sum(len(e.response) for e in phase.examples) for sign, phase in batches.items()},
        "curves": curves,
    }


def open_models(ctx: Context, full: bool | None) -> tuple[Models, list[tuple[str, Parameter]]]:
    """Who takes part, and what is trained: all weights of a copy of the policy before RL, or an adapter on it.

    Raises UsageError where all are asked for and the policy is an adapter itself.
    """
    start = weights.open_start(ctx)
    reward_model, reference = weights.open_reward_model(ctx, start)
    if full and start.adapter is not None:
        raise UsageError("full: the policy before RL is an adapter on its base; set full: false to train a copy of it")
    if full is False or start.adapter is not None:
        policy = weights.open_policy(ctx, start)
        parameters = weights.trainable(ctx, policy, "rl")
    else:
        policy = weights.open_start(ctx)
        parameters = policy.model.trainable_full(freeze_head=False)
    return Models(policy, start, reward_model, reference), parameters


def batches_by_sign(ctx: Context, models: Models, prompts: int, each: int) -> tuple[dict[str, Phase], float]:
    """The first ``each`` wrong and right responses of the policy at temperature 1, and the share that was right."""
    recipe, model = ctx.recipe, models.start.model
    task = rewarding_task(recipe)
    if task is None or not task.graded:
        raise UsageError("dynamics: responses are split into right and wrong, and this recipe has no task that grades")
    chat = ChatFormat(model.tokenizer, recipe.chat.template_args, ctx.console.warn)
    known = [prompt for prompt in rl_prompts(recipe, task) if prompt.item is not None]
    asked = [known[i] for i in endless(len(known), recipe.seed, 0, prompts)]
    engine = open_engine([models.start], chat.end, settings=recipe.rollout, say=ctx.console.note)
    sampling = Sampling(1.0, 1.0, longest_response(recipe), recipe.rl.rollout_batch)
    with seeded(recipe.seed, "dynamics"):
        responses = in_order(engine.generate([chat.prompt(prompt.messages) for prompt in asked], sampling))
    texts = [chat.text(response.example.response) for response in responses]
    right = [task.grade(text, p.item).right for text, p in zip(texts, asked, strict=True) if p.item is not None]
    chosen = {
        sign: [r for r, is_right in zip(responses, right, strict=True) if is_right == (sign == "pos")][:each]
        for sign in SIGNS
    }
    limit = sampling.max_new_tokens
    return {sign: phase_of(some, sign, limit) for sign, some in chosen.items() if some}, fmean(right)


def phase_of(responses: Sequence[Response], sign: str, limit: int) -> Phase:
    """A phase of these responses alone, each worth +1 or −1."""
    n, grades = len(responses), [1.0 if sign == "pos" else -1.0] * len(responses)
    return Phase(list(range(n)), limit, list(responses), grades, {"rule": [*grades]}, [False] * n, n)


def updates(
    models: Models, parameters: Sequence[tuple[str, Parameter]], phase: Phase, rl: Rl, n: int
) -> dict[str, list[float]]:
    """``n`` updates on the phase as one minibatch. Of each the numbers before it is made; norms are before clipping."""
    trained = [p for _, p in parameters]
    attention = [p for name, p in parameters if is_attention(name)]
    if not rl.reward_parts:
        phase = Phase(phase.chosen, phase.limit, phase.responses, phase.grades, {}, phase.shown, phase.drawn)
    (minibatch,) = score(models, phase, [[list(range(len(phase.responses)))]], rl)
    report, adamw = training.Report(phase, rl), open_optimizer(trained, rl)
    with models.policy.model.training_mode():
        for _ in range(n):
            adamw.zero_grad()
            training.accumulate(models, rl, report, minibatch, rl.micro_batch_tokens)
            norms = {"qkv_grad_norm": fmean(norm(p) for p in attention)} if attention else {}
            limit = math.inf if rl.max_grad_norm is None else rl.max_grad_norm
            norms["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, limit).item()
            if not math.isfinite(norms["grad_norm"]):
                break
            report.update(norms)
            adamw.step()
    adamw.zero_grad()
    return {name: [rounded(u[name]) for u in report.updates] for name in NUMBERS if name in (report.updates or [{}])[0]}


def is_attention(name: str) -> bool:
    """Whether these are weights of a projection to queries, keys or values, or of its adapter."""
    return any(f".{which}_proj." in name for which in "qkv") and name.endswith("weight")


def norm(parameter: Parameter) -> float:
    return 0.0 if parameter.grad is None else parameter.grad.norm().item()


def rounded(x: float) -> float:
    return float(f"{x:.5g}")


@torch.no_grad()
def restore(start: Sequence[tuple[Parameter, Tensor]]) -> None:
    for parameter, value in start:
        parameter.copy_(value)


# what the numbers say


def curve(row: Row, strategy: str, sign: str, number: str = "qkv_grad_norm") -> list[float] | None:
    """A number update by update; the norm of the whole gradient where there are no projections by these names."""
    numbers = row["curves"].get(strategy, {}).get(sign, {})
    found = numbers.get(number) or (numbers.get("grad_norm") if number == "qkv_grad_norm" else None)
    return found or None


def log_ratio(
    results: Results,
    strategy: str,
    sign: str,
    over_first: Callable[[list[float]], float],
    number: str = "qkv_grad_norm",
) -> dict[int, float]:
    """Seed -> log of ``over_first`` of a curve over its first value; a curve that begins or ends with 0 has its log
    taken at 1e-12."""

    def of(row: Row) -> float | None:
        values = curve(row, strategy, sign, number)
        return None if values is None else math.log(max(over_first(values), 1e-12) / max(values[0], 1e-12))

    return results.by_seed(LABEL, of)


def last(values: list[float]) -> float:
    return values[-1]


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim that has several parts."""
    if "not reproduced" in verdicts:
        return "not reproduced"
    return "reproduced" if set(verdicts) == {"reproduced"} else "unclear"


def ppo_grows(results: Results) -> Claim:
    verdict, ratio = against(log_ratio(results, FREE, "neg", max), GROWS, above=True)
    says = "On negative advantages PPO's gradient norm grows where nothing clips it."
    return Claim("C1 grows", says, f"largest over first above {GROWS:g}", verdict, f"largest over first {ratio}")


def ppo_shrinks(results: Results) -> Claim:
    verdict, ratio = against(log_ratio(results, FREE, "pos", last), SHRINKS, above=False)
    says = "On positive advantages PPO's gradient norm shrinks."
    return Claim("C1 shrinks", says, f"last over first below {SHRINKS:g}", verdict, f"last over first {ratio}")


def clip_stops(results: Results) -> Claim:
    """Of the largest norm with the clip over that without."""
    with_clip, without = (log_ratio(results, name, "neg", max) for name in (CLIPPED, FREE))
    both = {seed: with_clip[seed] - without[seed] for seed in with_clip.keys() & without.keys()}
    verdict, ratio = against(both, 1.0, above=False)
    why = f"largest norm with clip 0.2 over that without {ratio}"
    return Claim("C1 clip", "The clip stops that growth.", "largest norm below that without clip", verdict, why)


def decays(results: Results, name: str) -> Claim:
    """C2 of one LCO objective, for both signs."""
    verdicts, told = list[Verdict](), list[str]()
    for sign in SIGNS:
        sparse = "dense" not in name and sign == "neg"
        checks = [
            ("last norm over first", log_ratio(results, name, sign, last), DECAYS, False),
            ("largest norm over first", log_ratio(results, name, sign, max), SMOOTH, False),
            ("last entropy over first", log_ratio(results, name, sign, last, "entropy"), ENTROPY[0], True),
            ("", log_ratio(results, name, sign, last, "entropy"), ENTROPY[1], False),
        ]
        if sparse:
            probability = log_ratio(results, name, sign, last, "sampled_prob")
            checks.append(("last sampled probability over first", probability, PROBABILITY, True))
        parts = list[str]()
        for what, ratios, bound, above in checks:
            verdict, ratio = against(ratios, bound, above)
            verdicts.append(verdict)
            if what:
                parts.append(f"{what} {ratio}")
        told.append(f"{TITLES[sign]}: {'; '.join(parts)}")
    bounds = (
        f"last norm over first below {DECAYS:g}, largest over first below {SMOOTH:g}, last entropy over first from "
    )
    bounds += f"{ENTROPY[0]:g} to {ENTROPY[1]:g}"
    if "dense" not in name:
        bounds += f", for A < 0 last probability of sampled tokens over first above {PROBABILITY:g}"
    says = f"With {name} the gradient norm decays smoothly for both signs; probability and entropy stay sane."
    return Claim(f"C2 {name}", says, bounds, all_of(verdicts), ". ".join(told))


def table(results: Results, strategies: Sequence[Strategy]) -> Table:
    """First, largest and last of what matters, mean ± std over seeds."""
    shown = {"q, k, v norm": "qkv_grad_norm", "norm": "grad_norm", "probability": "sampled_prob", "entropy": "entropy"}
    columns = ["strategy", "A", *(f"{title}, {which}" for title in shown for which in ("first", "largest", "last"))]
    columns.append("clipped, last")
    rows = []
    for strategy, sign in product(strategies, SIGNS):
        if sign not in strategy.signs:
            continue
        row = [strategy.name, {"neg": "−", "pos": "+"}[sign]]
        for number in shown.values():
            found = [c for r in results.of(LABEL) if (c := curve(r, strategy.name, sign, number))]
            row += [significant([c[0] for c in found]), significant([max(c) for c in found])]
            row.append(significant([c[-1] for c in found]))
        clipped = [c[-1] for r in results.of(LABEL) if (c := curve(r, strategy.name, sign, "clipped"))]
        rows.append([*row, mean_std(clipped, 2)])
    return Table("dynamics", "First, largest and last value over the updates, mean ± std over seeds", columns, rows)


def significant(values: Sequence[float]) -> str:
    """Mean ± std; norms of losses that are a mean over the vocabulary are small."""
    small = bool(values) and 0 < fmean(values) < 0.01
    if not small:
        return mean_std(values)
    return f"{mean_std([1e3 * x for x in values])} e-3"


def notes(results: Results) -> list[str]:
    rows = results.of(LABEL)
    if not rows:
        return []
    seeds, row = len(rows), rows[0]
    n = max(len(c) for r in rows for s in r["curves"] for sign in SIGNS if (c := curve(r, s, sign)))
    what = f"{n} updates of Adam at {row['lr']:g} on one batch of {row['responses'].get('neg', 0)} wrong or "
    what += (
        f"{row['responses'].get('pos', 0)} right responses ({row['trained']} trained), seeds: {seeds}. Gradients are "
    )
    what += "not clipped unless a strategy's name says so. A norm is that of the loss as it is: of lch and mse it is a "
    what += "mean over the vocabulary, so compare a curve with its own start, not with another objective's."
    said = [what]
    held = log_ratio(results, HELD, "neg", max)
    if held:
        _, grown = against(held, 1.0, above=True)
        _, probability = against(log_ratio(results, HELD, "neg", last, "sampled_prob"), 1.0, above=True)
        _, without = against(log_ratio(results, FREE, "neg", last, "sampled_prob"), 1.0, above=True)
        text = "Does max_grad_norm 1 alone do what LCO does? PPO without clip on wrong responses: largest norm (before "
        text += f"clipping) over first {grown}; last probability of sampled tokens over first {probability}, and "
        said.append(text + f"{without} without max_grad_norm.")
    return said


def draw(results: Results, strategies: Sequence[Strategy], numbers: Sequence[str], figure: Figure) -> None:
    """A row of panels a number, wrong responses on the left; norms and gradients on a log scale."""
    from lco_lite.study.figures import band

    panels = figure.subplots(len(numbers), len(SIGNS), squeeze=False, sharex=True, sharey="row")
    for (row, number), (column, sign) in product(enumerate(numbers), enumerate(SIGNS)):
        axes = panels[row][column]
        for i, strategy in enumerate(strategies):
            found = [c for r in results.of(LABEL) if (c := curve(r, strategy.name, sign, number))]
            if found:
                n = min(map(len, found))
                band(axes, strategy.name, list(range(1, n + 1)), [c[:n] for c in found], color=f"C{i}")
        if "grad" in number:
            axes.set_yscale("log")
        if row == 0:
            axes.set_title(TITLES[sign])
        if row == len(numbers) - 1:
            axes.set_xlabel("update")
        if column == 0:
            axes.set_ylabel(NUMBERS[number])
    handles = {label: h for a in panels.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, max(1, len(handles))))
