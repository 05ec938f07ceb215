"""Choices by log-likelihood: which letter does the model find likeliest as the whole of its answer?

The prompt ends where the response begins, and the letter alone is the response: log π(letter | prompt), summed over its
tokens where the tokenizer needs several. Nothing is sampled, and no more logits are formed than tokens are scored.
Legend: N items, C choices, d hidden width.
"""

from collections.abc import Sequence

import torch

from lco_lite.evaluation.summary import Graded, graded
from lco_lite.grading import Grade, Item
from lco_lite.grading.choice import LETTERS, answer_index
from lco_lite.models.chat import ChatFormat
from lco_lite.models.language_model import Role
from lco_lite.objectives.logprobs import token_logprobs
from lco_lite.sequences import Example, collate


def likeliest_letters(role: Role, chat: ChatFormat, questions: Sequence[tuple[Item, list[int]]]) -> list[Graded]:
    """Each item's likeliest letter, graded; an item comes with the token ids of its prompt.

    What the template has a model write before its answer (a channel, an empty thought) belongs to the prompt here.
    """
    letters, lead = letter_ids(chat), chat.ids(chat.lead())
    choices = [letters[: len(item.row["choices"])] for item, _ in questions]
    logprobs = choice_logprobs(role, [ids + lead for _, ids in questions], choices)
    return [likeliest_letter(item, values) for (item, _), values in zip(questions, logprobs, strict=True)]


def letter_ids(chat: ChatFormat) -> list[list[int]]:
    """The tokens of each letter as the beginning of an answer."""
    return [chat.response(letter, closed=False) for letter in LETTERS]


@torch.no_grad()
def choice_logprobs(
    role: Role, prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]
) -> list[list[float]]:
    """log π(choice | prompt), nats, for each of an item's choices: N prompts, and for each of them C token lists.

    One forward pass over the prompts where every choice is one token, else over every prompt with every choice.
    """
    counts = [len(some) for some in choices]
    if all(len(choice) == 1 for some in choices for choice in some):
        batch = collate([Example(p, some[0]) for p, some in zip(prompts, choices, strict=True)], role.model.pad_id)
        hidden = role.hidden(batch)  # [N, d]: the position after which a letter comes
        hidden = hidden.repeat_interleave(torch.tensor(counts, device=hidden.device), 0)  # [N·C, d]
        actions = torch.tensor([choice[0] for some in choices for choice in some], device=hidden.device)
        values = token_logprobs(hidden, role.model.head, actions)[0].tolist()
    else:
        pairs = zip(prompts, choices, strict=True)
        batch = collate([Example(p, choice) for p, some in pairs for choice in some], role.model.pad_id)
        tokens, _ = token_logprobs(role.hidden(batch), role.model.head, batch.actions.to(role.model.device))
        sums = torch.zeros(sum(counts), dtype=tokens.dtype, device=tokens.device)
        values = sums.index_add(0, batch.rows.to(tokens.device), tokens).tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [values[end - n : end] for n, end in zip(counts, ends, strict=True)]


def likeliest_letter(item: Item, logprobs: Sequence[float]) -> Graded:
    """The likeliest letter, the first of equals, graded; ``logprobs`` by letter."""
    by_letter = dict(zip(LETTERS, logprobs, strict=False))
    letter = max(by_letter, key=by_letter.__getitem__)
    right = LETTERS.index(letter) == answer_index(item)
    grade = Grade(right, letter, "the likeliest letter" if right else f"the answer is {item.gold}")
    return graded(item, letter, grade, truncated=False) | {"logprobs": by_letter}
