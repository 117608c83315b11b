"""The order in which sequences are seen: a shuffle that is calculated instead of stored.

A permutation of n items is had from a balanced Feistel network over the next even power of two, walked along its
cycles until it lands inside n (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 3). It takes no
memory, whatever n is, and any place of it is had at once.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8


def shuffled(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where the items at `positions` of a shuffled sequence of `size` items come from.

    Parameters
    ----------
    positions
        Integers in [0, size), of any shape.
    size
        Number of items.
    seed, epoch
        Non-negative; each pair gives a shuffle of its own.

    Returns
    -------
    np.ndarray of int64
        Items, of the shape of `positions`; over all positions, each item occurs once.
    """
    half_bits = np.uint64((max(size - 1, 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    items = _feistel(np.asarray(positions).astype(np.uint64).ravel(), half_bits, keys)
    outside = np.flatnonzero(items >= size)
    while outside.size:
        items[outside] = _feistel(items[outside], half_bits, keys)
        outside = outside[items[outside] >= size]
    return items.astype(np.int64).reshape(np.shape(positions))


def _feistel(values: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over values of twice `half_bits` bits."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half_bits) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser: every bit of the result depends on every bit given (Steele et al. 2014, SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
