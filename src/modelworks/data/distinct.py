"""Telling texts that were seen before, in 16 bytes each, and which of them belong to a share of all.

Recent hashes stand in a set; when it is full they are sorted into an array, and arrays of like size are merged, so that
there are few of them however many texts there are.
"""

from __future__ import annotations

import hashlib

import numpy as np

_RECENT = 2**17


def digest_of(utf8: bytes) -> bytes:
    """A text's hash, of 16 bytes."""
    return hashlib.blake2b(utf8, digest_size=16).digest()


def in_share(digest: bytes, share: float) -> bool:
    """Whether a text's hash falls into the given share of all."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


class DistinctTexts:
    """A growing set of 16-byte hashes."""

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._sorted: list[np.ndarray] = []

    def add(self, digest: bytes) -> bool:
        """Add a hash; whether it is new."""
        if digest in self._recent or any(_holds(run, digest) for run in self._sorted):
            return False
        self._recent.add(digest)
        if len(self._recent) >= _RECENT:
            self._settle()
        return True

    def _settle(self) -> None:
        run = np.sort(np.array(list(self._recent), dtype="S16"))
        self._recent.clear()
        while self._sorted and len(self._sorted[-1]) <= len(run):
            run = np.sort(np.concatenate([self._sorted.pop(), run]), kind="stable")
        self._sorted.append(run)


def _holds(run: np.ndarray, digest: bytes) -> bool:
    # Compared as an array of one: a scalar would lose the zero bytes at its end.
    wanted = np.array([digest], dtype=run.dtype)
    place = int(np.searchsorted(run, wanted)[0])
    return bool((run[place : place + 1] == wanted).any())
