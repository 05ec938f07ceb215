"""Padding, micro-batches and the response positions that losses see; random numbers by name."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lco_lite.sequences import Example, collate, endless, micro_batches, rng_state, seeded

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


@given(st.lists(st.lists(st.integers(1, 50), min_size=3, max_size=3), min_size=1, max_size=10), st.integers(1, 400))
def test_micro_batches_keep_groups_together_within_the_limit(groups, limit):
    lengths = [n for group in groups for n in group]
    batches = micro_batches(lengths, limit, group=3)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(
        b[k : k + 3] == [b[k], b[k] + 1, b[k] + 2] and b[k] % 3 == 0 for b in batches for k in range(0, len(b), 3)
    )
    assert all(len(b) == 3 or max(lengths[i] for i in b) * len(b) <= limit for b in batches)
    longest = [max(lengths[i] for i in b) for b in batches]
    assert longest == sorted(longest, reverse=True)


def test_a_group_is_as_long_as_its_longest_and_shares_a_micro_batch_where_there_is_room():
    lengths = [2, 9, 10, 1, 3, 3]
    assert micro_batches(lengths, 40, group=2) == [[2, 3, 0, 1], [4, 5]]
    assert micro_batches(lengths, 39, group=2) == [[2, 3], [0, 1, 4, 5]]


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


def draws(device):
    return torch.rand(3, device=device).tolist() + torch.multinomial(torch.ones(9, device=device), 4).tolist()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_drawing_that_broke_off_goes_on_with_exactly_the_same_numbers(device):
    torch.ones(1, device=device)
    with seeded(0, "rollout", 3):
        whole = [draws(device) for _ in range(4)]
    with seeded(0, "rollout", 3):
        parts = [draws(device) for _ in range(2)]
        state = rng_state()
        torch.randn(5)  # what was begun and lost
    torch.manual_seed(99)
    with seeded(0, "rollout", 3, state=json.loads(json.dumps(state))):
        parts += [draws(device) for _ in range(2)]
    assert parts == whole


def test_numbers_drawn_by_name_do_not_move_those_outside_on():
    torch.manual_seed(1)
    expected = torch.rand(2).tolist()
    torch.manual_seed(1)
    first = torch.rand(()).item()
    with seeded(0, "inside"):
        state = rng_state()
        inside = torch.rand(())
    with seeded(5, state=state):
        assert torch.rand(()) == inside
    assert [first, torch.rand(()).item()] == pytest.approx(expected, abs=0)
