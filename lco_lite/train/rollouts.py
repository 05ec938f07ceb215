"""A rollout phase: prompts to responses of π_old, their grades and rewards, all on disk before the first update.

``STAGE/rollouts/step-000001.jsonl`` holds a line a batch of responses, and one with their grades and rewards. Whatever
stops a step costs updates, never samples: only what is missing is made, with the random numbers it would have had.

Legend: N responses, G of them to a prompt, in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lco_lite import ranks
from lco_lite.context import Context
from lco_lite.data.prompts import Prompt, longest_response, rewarding_task, rl_prompts
from lco_lite.feedback.advantages import fill_inapplicable, live_groups
from lco_lite.feedback.rewards import Answers, columns_of, reward_sources
from lco_lite.files import JsonLines, remove
from lco_lite.metrics import finite
from lco_lite.models.chat import ChatFormat
from lco_lite.recipe import Rl
from lco_lite.rollout.engine import OTHER_NUMBERS, Engine, Made, Response, Sampling
from lco_lite.run import StageFolder
from lco_lite.sequences import Example, derive, endless, micro_batches, rng_state, seeded
from lco_lite.tasks.base import Item, Task
from lco_lite.train.training import fitting

DYNAMIC_ROUNDS = 3  # how often a step samples again for groups without signal; the rest of the phase is smaller


@dataclass(frozen=True)
class Phase:
    """Responses in the order of their prompts, which stand at ``chosen`` among all; none is over ``limit`` tokens long.

    Of each: its grade of ±1 where a task can tell, its reward by each part of the feedback that is a number a response
    (None where it does not apply), and whether it is a demonstration ``shown`` to the policy, not its own. ``drawn``:
    how many were sampled, dropped ones too. ``errors``, where the rule's word is placed: of each the index of its first
    wrong token, None where it is right or the task cannot tell."""

    chosen: list[int]
    limit: int
    responses: list[Response]
    grades: list[float] | None
    rewards: dict[str, list[float | None]]
    shown: list[bool]
    drawn: int
    errors: list[int | None] | None = None
    _told: list[Tensor] = field(default_factory=list)

    @property
    def examples(self) -> list[Example]:
        return [response.example for response in self.responses]

    def scores(self, rl: Rl) -> Tensor | None:
        """[N]: the rewards, of several the mean by their weights, else the grades."""
        if not self.rewards:
            return None if self.grades is None else torch.tensor(self.grades)
        parts, total = rl.reward_parts, sum(part.weight for part in rl.reward_parts.values())
        weighted = [parts[name].weight / total * self.reward(name, rl) for name in self.rewards]
        return torch.stack(weighted).sum(0)

    def reward(self, name: str, rl: Rl) -> Tensor:
        """[N]: the rewards of this name; one that does not apply is what its baseline takes off, and says nothing."""
        given = self.given(name)
        if None not in self.rewards[name]:
            return given
        return fill_inapplicable(given, rl.baseline, rl.responses_per_prompt)

    def given(self, name: str) -> Tensor:
        """[N]: the rewards of this name as they came, nan where there is none."""
        return torch.tensor([math.nan if value is None else value for value in self.rewards[name]])

    def of_ranks(self, values: Tensor) -> list[Tensor]:
        """What each rank has of the phase. Told once: one whose memory ran out scores again without the others."""
        if ranks.world() == 1:
            return [values]
        if not self._told:
            self._told.extend(ranks.gather(values))
        return self._told

    def only(self, places: Sequence[int], group: int) -> Phase:
        """The groups at these places."""

        def of(values: Any) -> Any:
            return None if values is None else [values[i * group + k] for i in places for k in range(group)]

        chosen, responses, shown = [self.chosen[i] for i in places], of(self.responses), of(self.shown)
        rewards = {name: of(values) for name, values in self.rewards.items()}
        return Phase(chosen, self.limit, responses, of(self.grades), rewards, shown, self.drawn, of(self.errors))

    def and_also(self, other: Phase) -> Phase:
        def both(mine: Any, theirs: Any) -> Any:
            return None if mine is None or theirs is None else mine + theirs

        grades, errors = both(self.grades, other.grades), both(self.errors, other.errors)
        rewards = {name: values + other.rewards[name] for name, values in self.rewards.items()}
        responses, shown = self.responses + other.responses, self.shown + other.shown
        chosen, drawn = self.chosen + other.chosen, self.drawn + other.drawn
        return Phase(chosen, self.limit, responses, grades, rewards, shown, drawn, errors)


def _live(phase: Phase, rl: Rl) -> Phase:
    """The groups whose responses differ in their reward."""
    scores = phase.scores(rl)
    assert scores is not None, "the recipe makes sure of rewards"
    return phase.only(
        live_groups(scores, rl.responses_per_prompt).nonzero().flatten().tolist(), rl.responses_per_prompt
    )


def room_for(rl: Rl, chat: ChatFormat, prompt: Prompt, ids: Sequence[int], longest: int) -> int:
    """Tokens of a prompt, ``ids``, with a response of the ``longest`` or the demonstration that may stand in for it."""
    shown = prompt.item.demonstration if prompt.item and rl.on_policy < 1 else None
    return len(ids) + max(longest, len(chat.answer(prompt.messages, shown)) if shown else 0)


class Rollouts:
    """Where the phases of a stage come from. Every prompt is tokenised once. ``window``: the tokens that all models
    take which read the responses."""

    def __init__(self, ctx: Context, window: int, engine: Engine, chat: ChatFormat, stage: StageFolder) -> None:
        recipe, rl = ctx.recipe, ctx.recipe.rl
        self.ctx, self.engine, self.chat, self.folder = ctx, engine, chat, stage.path / "rollouts"
        self.task = rewarding_task(recipe)
        longest = longest_response(recipe)
        self.sampling = Sampling(rl.temperature, rl.top_p, longest, rl.rollout_batch, logprobs=True)
        asked = [(prompt, chat.prompt(prompt.messages)) for prompt in rl_prompts(recipe, self.task)]

        def room(one: tuple[Prompt, list[int]]) -> int:
            return room_for(rl, chat, *one, longest)

        asked = fitting(ctx, asked, window, rl.max_length, "prompts", room)
        self.prompts, self.ids = [prompt for prompt, _ in asked], [ids for _, ids in asked]
        self.rewards = reward_sources(rl, ctx.device) if ranks.rank() == 0 else {}  # which asks for all
        self.columns = columns_of([prompt.row for prompt in self.prompts])

    def phase(self, step: int, stop_if_asked: Callable[[], None]) -> Phase:
        """The step's responses, of the policy as it is now. With dynamic sampling (DAPO) groups without signal make
        room for those of other prompts; where no group has one, they are those that were sampled first."""
        rl, kept = self.ctx.recipe.rl, JsonLines(self.folder / f"step-{step + 1:06d}.jsonl")
        phase = self._round(step, 0, kept, stop_if_asked)
        if not rl.dynamic_sampling:
            return phase
        live = _live(phase, rl)
        for again in range(1, DYNAMIC_ROUNDS + 1):
            if len(live.chosen) >= rl.prompts_per_step:
                break
            live = live.and_also(_live(self._round(step, again, kept, stop_if_asked), rl))
        if not live.chosen:
            return replace(phase, drawn=live.drawn)
        return live.only(range(min(rl.prompts_per_step, len(live.chosen))), rl.responses_per_prompt)

    def forget(self, step: int) -> None:
        """The responses of the first ``step`` steps are no longer needed."""
        for file in self.folder.glob("step-*.jsonl"):
            if int(file.stem.removeprefix("step-")) <= step:
                remove(file)

    def _round(self, step: int, again: int, kept: JsonLines, stop_if_asked: Callable[[], None]) -> Phase:
        """Responses to the step's prompts; ``again`` counts how often the step has sampled before."""
        recipe, n, group = self.ctx.recipe, self.ctx.recipe.rl.prompts_per_step, self.ctx.recipe.rl.responses_per_prompt
        seed = derive(recipe.seed, "prompts", again) if again else recipe.seed
        chosen = endless(len(self.prompts), seed, step * n, n)
        places = [i for i in chosen for _ in range(group)]
        shown = self._shown(step, len(places))
        asked = [self.ids[i] for i, is_shown in zip(places, shown, strict=True) if not is_shown]
        names = ("rollout", step, *([again] if again else []))
        sampled = iter(sample(self.ctx, self.engine, asked, self.sampling, kept, names, stop_if_asked))
        responses = [
            self._demonstration(i) if is_shown else next(sampled) for i, is_shown in zip(places, shown, strict=True)
        ]
        judged = next((line for line in kept.rows if line.get("judged") == again), None)
        if judged is None:
            judged = {"judged": again} | ranks.once(self._judge)([self.prompts[i] for i in places], responses)
            kept.append(judged)  # a reward function is asked once
        grades, rewards, longest = judged["grades"], judged["rewards"] or {}, self.sampling.max_new_tokens
        if isinstance(rewards, list):  # a phase that version 0.3 began
            rewards = {recipe.rl.feedback: rewards}
        rewards = {  # None of a function is one that does not apply, of others one that is not finite
            name: told if name in recipe.rl.reward_functions else [math.nan if x is None else x for x in told]
            for name, told in rewards.items()
        }
        return Phase(chosen, longest, responses, grades, rewards, shown, shown.count(False), judged.get("errors"))

    def _judge(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> dict[str, Any]:
        """``grades`` by the task, or None; ``rewards`` by each part of the feedback that gives them, [N] each;
        ``errors`` where the rule's word is placed."""
        texts = [self.chat.text(response.example.response) for response in responses]
        items = [p.item for p in prompts if p.item is not None]
        grades = None
        with self.ctx.clock("score"):
            self.ctx.console.phase("rewards")
            if self.task is not None and self.task.graded and len(items) == len(prompts):
                right = [self.task.grade(text, item).right for text, item in zip(texts, items, strict=True)]
                grades = torch.tensor([1.0 if r else -1.0 for r in right])
            ids = [response.example.response for response in responses]
            asked = Answers(
                [p.messages for p in prompts], [p.row for p in prompts], texts, ids, grades, columns=self.columns
            )
            rewards = finite({name: source(asked).tolist() for name, source in self.rewards.items()})
            judged: dict[str, Any] = {"grades": None if grades is None else grades.tolist(), "rewards": rewards}
            if self.ctx.recipe.rl.places_rule:
                assert self.task is not None and grades is not None, "the recipe makes sure of a task"
                wrong = zip(responses, items, judged["grades"], strict=True)
                judged["errors"] = [
                    None if grade > 0 else first_wrong_token(self.chat, self.task, item, one.example, one.truncated)
                    for one, item, grade in wrong
                ]
        return judged

    def _shown(self, step: int, n: int) -> list[bool]:
        """Which responses are demonstrations: GKD's off-policy share."""
        generator = torch.Generator().manual_seed(derive(self.ctx.recipe.seed, "on_policy", step))
        return (torch.rand(n, generator=generator) >= self.ctx.recipe.rl.on_policy).tolist()

    def _demonstration(self, place: int) -> Response:
        prompt = self.prompts[place]
        assert prompt.item is not None and prompt.item.demonstration, "looked at before the first stage"
        shown = self.chat.answer(prompt.messages, prompt.item.demonstration)
        return Response(Example(self.ids[place], shown), False)


def first_wrong_token(
    chat: ChatFormat, task: Task, item: Item, example: Example, truncated: bool = False
) -> int | None:
    """Index of the response's token that holds its first wrong character; None where the task cannot tell. One that
    ends too early has it at its end, and one ``truncated`` before anything was wrong past its last token."""
    error, response = task.first_error(chat.text(example.response), item), example.response
    if error is None:
        return None
    for i in range(len(response)):
        if len(chat.text(response[: i + 1])) > error:
            return i
    return len(response) if truncated else len(response) - 1


def sample(
    ctx: Context,
    engine: Engine,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    kept: JsonLines,
    names: tuple[Any, ...],
    stop_if_asked: Callable[[], None],
) -> list[Response]:
    """One response a prompt. Each batch is in ``kept`` before the next begins; what is there is not sampled again.

    ``names`` say what the random numbers are for (``seeded``), and tell these lines from others in the file.
    ``stop_if_asked`` is called between batches and may raise. Where memory runs out, what is left is made in smaller
    batches. Several ranks make a batch each, with numbers that depend on who makes it and on what is there already; a
    line has those of all.
    """
    label = ":".join(map(str, names))
    responses: dict[int, Response] = {}
    state: list[str] | None = None
    for line in kept.rows:
        if line.get("sampled") == label:
            for place, (ids, truncated, *told) in zip(line["places"], line["responses"], strict=True):
                responses[place] = Response(Example(prompts[place], ids), truncated, *told)
            state = line["rng"]
    room, size, left = ctx.room("rl.rollout_batch", sampling.batch), 0, list[int]()
    batches: Iterator[Made] = iter(())
    own = [place for place in range(len(prompts)) if place not in responses]
    if ranks.world() > 1:
        own = ranks.share(sorted(own, key=lambda place: (len(prompts[place]), place)))

    def unmade() -> list[int]:
        return [place for place in own if place not in responses]

    def tell(share: float) -> None:
        """Of the batches under way, one a rank."""
        of_all = min(engine.ahead * size * ranks.world(), len(prompts) - len(responses))
        progress.update(len(responses), part=share * of_all)

    def next_batch(at_once: int) -> tuple[list[int], list[Response], list[str]]:
        nonlocal size, batches, left
        if not unmade():
            return [], [], []  # other ranks have some left
        if at_once != size:
            left, size = unmade(), at_once
            told = replace(sampling, batch=at_once, tell=tell)
            batches = engine.generate([prompts[place] for place in left], told)
        mine = () if ranks.world() == 1 else (f"rank {ranks.rank()} of {ranks.world()}", len(responses))
        with seeded(ctx.recipe.seed, *names, *mine, state=None if mine else state):
            chosen, made = next(batches)
            return [left[i] for i in chosen], made, rng_state()

    def half(at_once: int) -> tuple[int, int] | None:
        at_once = min(at_once, len(unmade()))
        return (at_once, at_once // 2) if at_once > 1 else None

    with ctx.clock("rollout"), ctx.console.progress(len(prompts), str(names[0]), len(responses)) as progress:
        while len(responses) < len(prompts):
            of_ranks = ranks.gather(room.do(next_batch, half, OTHER_NUMBERS))
            places, made = [p for b in of_ranks for p in b[0]], [r for b in of_ranks for r in b[1]]
            state = of_ranks[0][2]
            responses.update(zip(places, made, strict=True))
            ids = [[r.example.response, r.truncated] + [r.logprobs] * (r.logprobs is not None) for r in made]
            kept.append({"sampled": label, "places": places, "responses": ids, "rng": state})
            progress.update(len(responses))
            stop_if_asked()
    return [responses[place] for place in range(len(prompts))]


def plan_minibatches(
    examples: Sequence[Example], rl: Rl, seed: int, step: int, micro_batch_tokens: int | None = None
) -> list[list[list[int]]]:
    """Response indices: minibatches of micro-batches, of several ranks every N-th each. Every response is in exactly
    one; with ``rl.whole_groups`` the responses to a prompt are in the same."""
    group = rl.unit
    generator = torch.Generator().manual_seed(derive(seed, "minibatches", step))
    units = torch.randperm(len(examples) // group, generator=generator).tolist()
    order = [i * group + k for i in units for k in range(group)]
    minibatches = [order[i : i + rl.minibatch] for i in range(0, len(order), rl.minibatch)]
    return [
        [
            [chosen[k] for k in places]
            for places in micro_batches(
                [len(examples[i]) for i in chosen], micro_batch_tokens or rl.micro_batch_tokens, group, ranks.world()
            )
        ]
        for chosen in minibatches
    ]


def order_of_updates(minibatches: int, rl: Rl, seed: int, step: int) -> Iterator[int]:
    """Which minibatch each update of the phase takes: every one once an inner epoch, in a new order."""
    generator = torch.Generator().manual_seed(derive(seed, "order", step))
    for _ in range(rl.inner_epochs):
        yield from torch.randperm(minibatches, generator=generator).tolist()
