"""The shuffle is a permutation, whatever its size, and differs by seed and epoch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from modelworks.data.order import shuffled


@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 2**20))
def test_a_shuffle_holds_each_item_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(np.arange(size), size, seed, epoch)) == list(range(size))


@given(st.integers(2**40, 2**61), st.integers(0, 1000))
def test_places_of_a_huge_shuffle_are_had_at_once_and_differ(size: int, seed: int) -> None:
    places = np.arange(size - 500, size)
    items = shuffled(places, size, seed, 0)
    assert len(np.unique(items)) == 500
    assert items.min() >= 0
    assert items.max() < size


def test_a_place_gives_the_same_item_whatever_is_asked_beside_it() -> None:
    whole = shuffled(np.arange(1000), 1000, 3, 1)
    assert [int(shuffled(np.array([place]), 1000, 3, 1)[0]) for place in range(0, 1000, 37)] == whole[::37].tolist()


def test_seeds_and_epochs_have_shuffles_of_their_own() -> None:
    orders = {tuple(shuffled(np.arange(50), 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_items_are_spread_evenly_over_places() -> None:
    """Each of 8 items stands at each of 8 places about equally often (chi-squared with 49 degrees of freedom)."""
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), shuffled(np.arange(8), 8, 0, epoch)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 100
