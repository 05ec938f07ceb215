"""What ``samples.jsonl`` keeps of a step for people to read: responses, and of the first of them what each policy held
of every token.

Legend: T response tokens of a micro-batch, V vocabulary, K candidates a token: the sampled one and the likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lco_lite import ranks
from lco_lite.models.chat import ChatFormat
from lco_lite.objectives.chunks import spans
from lco_lite.objectives.distillation import Teacher
from lco_lite.objectives.head import Head
from lco_lite.objectives.targets import DenseTarget, SparseTarget
from lco_lite.recipe import Rl
from lco_lite.train.methods import MicroBatch, Models
from lco_lite.train.rollouts import Phase, Rollouts

RESPONSES = 8  # of a step, as text
TOKENS = 512  # of a response that are looked at: its first
LIKELIEST = 5  # tokens of each policy
RARE = 0.0005  # a token that no policy finds likelier is left out; 0.001 is the least that is seen

Candidate = list[Any]
"""[token id, A, π_old, π*, π_θ]; A and π* are None where the method has none of this token."""


def readable(phase: Phase, rollouts: Rollouts, rl: Rl) -> list[dict[str, Any]]:
    """Rows of the first responses of a step."""
    scores, rows = phase.scores(rl), list[dict[str, Any]]()
    for i, response in enumerate(phase.responses[: max(RESPONSES, rl.samples)]):
        asked, said = rollouts.prompts[phase.chosen[i // rl.responses_per_prompt]], response.example.response
        row: dict[str, Any] = {"prompt": asked.messages[-1]["content"], "response": rollouts.chat.text(said)}
        row |= {"truncated": response.truncated, "right": None if phase.grades is None else phase.grades[i] > 0}
        row |= {"reward": None if scores is None else scores[i].item()}
        rows.append(row | {"shown": phase.shown[i], "response_tokens": len(said)})
    return rows


def with_tokens(rows: list[dict[str, Any]], looks: dict[int, list[list[Candidate]]], chat: ChatFormat) -> None:
    """Adds to the rows what was ``looked_at``, each token as text."""
    for i, tokens in looks.items():
        rows[i]["tokens"] = [[[chat.piece(token), *numbers] for token, *numbers in of] for of in tokens]


@torch.no_grad()
def looked_at(
    models: Models, rl: Rl, minibatches: Sequence[Sequence[MicroBatch]], micro_batch_tokens: int
) -> dict[int, list[list[Candidate]]]:
    """Response -> a list a token, of the first ``rl.samples`` responses of the phase and their first ``TOKENS`` tokens.

    π_old and A are those of the step, π_θ the policy as it is now. No random number is drawn.
    """
    policy, found = models.policy, dict[int, list[list[Candidate]]]()
    for micro in (micro for minibatch in minibatches for micro in minibatch):
        rows = micro.batch.rows[micro.responses < rl.samples].unique().tolist()
        for part in micro.only(rows).within(micro_batch_tokens, 1) if rows else ():
            here = part.to(policy.model.device)
            hidden = policy.hidden(here.batch)
            place = torch.arange(len(part.responses)) - torch.searchsorted(part.batch.rows, part.batch.rows)
            seen = (place < TOKENS).nonzero().flatten()
            told = candidates(here, hidden, policy.model.head, seen.to(hidden.device), rl)
            for response, of_token in zip(part.responses[seen].tolist(), told, strict=True):
                found.setdefault(response, []).append(of_token)
    return {response: tokens for of_rank in ranks.gather(found) for response, tokens in of_rank.items()}


def candidates(micro: MicroBatch, hidden: Tensor, head: Head, seen: Tensor, rl: Rl) -> list[list[Candidate]]:
    """Of the tokens at ``seen``: the sampled one, then by π_old those among the likeliest of π_old, π* or π_θ.

    π* is softmax(z*); of a distillation its teacher. A of the sampled token is that of the feedback, A of the others
    that of the target, β (z* − z_base) centred, where the advantage is dense.
    """
    target, old_head, made = micro.target, micro.old_head or head, list[list[Candidate]]()
    if isinstance(target, DenseTarget | SparseTarget):
        head, target = target.fit(head)
    elif isinstance(target, Teacher):
        head = head.prefix(min(head.rows, target.head.rows))
    old_head = old_head.prefix(head.rows)
    for part in spans(len(seen), None, 6 * head.rows, hidden.device):
        at = seen[part]
        now, sampled = head.logits(hidden[at]), micro.batch.actions[at].unsqueeze(-1)  # [C, V], [C, 1]
        logits, dense = {"old": old_head.logits(micro.old[at])}, None
        if isinstance(target, DenseTarget | SparseTarget):
            residual, _ = target[at].residual(hidden[at], head, now, rl.standardise)
            logits["target"] = now + residual
            if isinstance(target, DenseTarget):
                dense = target.beta * (residual - target[at].gap(hidden[at], head, now))
                dense -= dense.mean(-1, keepdim=True)
        elif isinstance(target, Teacher):
            logits["target"] = target.head.prefix(head.rows).logits(target.hidden[at])
        p = {name: z.softmax(-1) for name, z in (logits | {"now": now}).items()}
        ids = torch.cat([sampled, *(of.topk(min(LIKELIEST, head.rows)).indices for of in p.values())], -1)  # [C, K]
        columns = {name: of.gather(-1, ids).tolist() for name, of in p.items()}
        advantages = micro.advantages[at].tolist() if len(micro.advantages) else [None] * len(at)
        of_others = None if dense is None else dense.gather(-1, ids).tolist()
        for t, tokens in enumerate(ids.tolist()):
            of_token: dict[int, Candidate] = {}
            for k, token in enumerate(tokens):
                a = advantages[t] if k == 0 else None if of_others is None else of_others[t][k]
                old, new = columns["old"][t][k], columns["now"][t][k]
                star = columns["target"][t][k] if "target" in columns else None
                if k == 0 or max(old, star or 0.0, new) >= RARE:
                    numbers = [None if p is None else round(p, 4) for p in (old, star, new)]
                    of_token.setdefault(token, [token, None if a is None else float(f"{a:.4g}"), *numbers])
            first, *rest = of_token.values()
            made.append([first, *sorted(rest, key=lambda one: -one[2])])
    return made
