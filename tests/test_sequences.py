"""Padding, micro-batches and the response positions that losses see."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lco_lite.sequences import Example, collate, endless, micro_batches

EXAMPLES = [Example([1, 2, 3], [4, 5]), Example([6], [7]), Example([8, 9], [10, 11, 12])]


def test_selected_positions_are_those_that_predict_the_response_tokens():
    batch = collate(EXAMPLES, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [8, 9, 10, 11, 12]]
    assert batch.attention_mask.sum(1).tolist() == [5, 2, 5]
    seen = batch.select(batch.input_ids.unsqueeze(-1)).squeeze(-1)
    assert seen.tolist() == [3, 4, 6, 9, 10, 11], "the token before each response token"
    assert batch.actions.tolist() == [4, 5, 7, 10, 11, 12]
    assert batch.rows.tolist() == [0, 0, 1, 2, 2, 2]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_micro_batches_hold_every_sequence_once_within_the_limit(lengths, limit):
    groups = micro_batches(lengths, limit)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= limit for g in groups)


@given(st.integers(1, 20), st.integers(0, 3), st.integers(0, 60), st.integers(1, 45))
def test_the_endless_order_is_the_same_however_it_is_cut(n, seed, start, count):
    whole = endless(n, seed, 0, start + count)
    assert endless(n, seed, start, count) == whole[start:]
    assert sorted(whole[:n]) == list(range(n))[: len(whole[:n])] or len(whole) < n


def test_each_pass_is_shuffled_anew():
    order = endless(50, 0, 0, 100)
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert order[:50] != order[50:]
    assert torch.tensor(order).max() == 49
