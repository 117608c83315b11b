"""Packed dialogues: whole ones side by side in a sequence, and of each token whether it is the model's to say.

A sequence of length T holds as many dialogues as fit into T + 1 tokens, each followed by a separator that no dialogue
holds, so that the network can keep them apart. Which ones go together is a function of their lengths alone: the longest
first, each into the fullest sequence that has room (best-fit decreasing; Ding et al. 2024, arXiv:2404.10830). One that
is longer than a sequence is cut, and left out if nothing of an answer is left.

Beside what `packed` writes stands ``SPLIT.answers.bin`` with a byte for each token: 1 where it is an answer's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from functools import cached_property
from pathlib import Path

import numpy as np

from modelworks.data.packed import SPLITS, PackedDataset, Split
from modelworks.spec.errors import InputError


class DialogueDataset(PackedDataset):
    """Tokens of prepared dialogues; sequences are (2, seq_len + 1): the tokens, and of each whose answer it is of.

    The dialogues of a sequence are numbered from 1; 0 is no answer's token.
    """

    _nothing_fits = "no dialogue of the {split} split has an answer within its first so many tokens"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for split in SPLITS:
            self._check_size(f"{split}.answers.bin", self.tokens(split))
        self._packed: dict[tuple[Split, int], tuple[list[list[int]], int]] = {}

    @property
    def separator(self) -> int:
        """The token that stands behind each dialogue of a sequence, and fills it up."""
        return int(self.manifest["separator"])

    def tokens_per_byte(self, split: Split) -> float:
        """Tokens of answers for each byte of their text."""
        counts = self.manifest["splits"][split]
        return float(counts["answer_tokens"] / max(1, counts["answer_bytes"]))

    def sequence_count(self, split: Split, seq_len: int) -> int:
        """Sequences in one epoch of a split."""
        return len(self._packing(split, seq_len)[0])

    def cut(self, split: Split, seq_len: int) -> int:
        """Dialogues that are longer than a sequence."""
        return self._packing(split, seq_len)[1]

    def sequence(self, split: Split, item: int, seq_len: int) -> np.ndarray:
        """One sequence of a split, by its number: (2, seq_len + 1)."""
        found = np.zeros((2, seq_len + 2), dtype=np.int64)
        found[0] = self.separator
        starts, place = self.documents(split), 0
        for number, dialogue in enumerate(self._documents_of(self._packing(split, seq_len)[0][item]), start=1):
            start = int(starts[dialogue])
            size = min(int(starts[dialogue + 1]) - start, seq_len + 1)
            found[0, place : place + size] = self.span(split, start, size)
            found[1, place : place + size] = number * self._answers[split][start : start + size].astype(np.int64)
            place += size + 1
        return found[:, :-1]

    def documents(self, split: Split) -> np.ndarray:
        """Where each dialogue of a split starts (uint64), and behind the last where it ends."""
        return self._starts[split]

    def _documents_of(self, items: list[int]) -> list[int]:
        """The documents that packed items are made of."""
        return items

    def _packing(self, split: Split, seq_len: int) -> tuple[list[list[int]], int]:
        """The dialogues of each sequence, and how many are cut."""
        if (split, seq_len) not in self._packed:
            lengths = np.diff(self.documents(split).astype(np.int64))
            long = np.flatnonzero(lengths > seq_len + 1)
            left_out = self._left_out(split, seq_len, [int(one) for one in long])
            sizes = np.minimum(lengths, seq_len + 1) + 1
            self._packed[split, seq_len] = pack(sizes.tolist(), seq_len + 2, left_out), len(long)
        return self._packed[split, seq_len]

    def _left_out(self, split: Split, seq_len: int, long: list[int]) -> set[int]:
        """Which of the dialogues that are longer than a sequence are in none, since no answer would be left."""
        starts, answers = self.documents(split), self._answers[split]
        return {one for one in long if not answers[int(starts[one]) : int(starts[one]) + seq_len + 1].any()}

    @cached_property
    def _answers(self) -> dict[str, np.ndarray]:
        return {
            split: np.memmap(self.folder / f"{split}.answers.bin", dtype=np.uint8, mode="r")
            if self.tokens(split)
            else np.empty(0, dtype=np.uint8)
            for split in SPLITS
        }

    @cached_property
    def _starts(self) -> dict[str, np.ndarray]:
        return {split: PackedDataset.documents(self, split) for split in SPLITS}

    def _too_short(self, split: Split, seq_len: int) -> InputError:
        return InputError(
            f"train.seq_len = {seq_len} is not accepted: {self._nothing_fits.format(split=split)}; a longer one is"
        )


def pack(sizes: list[int], room: int, left_out: set[int] | frozenset[int] = frozenset()) -> list[list[int]]:
    """Deal items into as few bins of a size as best-fit decreasing finds; returns the items of each, in order.

    Parameters
    ----------
    sizes
        Of the items, none larger than `room`.
    room
        Of a bin.
    left_out
        Items that are not dealt.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []
    """The different rooms that are left in bins, in order."""
    by_room: dict[int, list[int]] = {}
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        if item in left_out:
            continue
        place = bisect_left(rooms, sizes[item])
        if place == len(rooms):
            left, chosen = room, len(bins)
            bins.append([])
        else:
            left = rooms[place]
            chosen = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[place]
        bins[chosen].append(item)
        left -= sizes[item]
        if left > 0:
            if left not in by_room:
                insort(rooms, left)
            by_room.setdefault(left, []).append(chosen)
    return [sorted(items) for items in bins]
