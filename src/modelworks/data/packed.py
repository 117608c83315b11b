"""Packed tokens on disk: shards that are mapped into memory, an index of documents, a manifest.

::

    HASH/
      manifest.json               what it was made of: source, documents, bytes, tokens, bad records
      tokenizer.json              Hugging Face tokenizers
      train-00000.bin ...         tokens, uint16 or uint32, little-endian, documents one after the other
      train.documents.bin         where each document starts in its split (uint64)
      validation-00000.bin ...

A split is one long line of tokens in which each document ends with the separator. Sequence i of length T is the tokens
[i T, i T + T], T + 1 of them, so that each token but the first is predicted once an epoch.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from modelworks.data.order import shuffled
from modelworks.spec.errors import InputError, OperationError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
SHARD_TOKENS = 2**27


class PackedDataset:
    """Tokens of a prepared source; opened in no time whatever its size.

    Raises
    ------
    OperationError
        If the folder isn't a prepared dataset, or a file of it has another size than it was written with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OperationError(f"{self.folder} holds no prepared data: {error}") from None
        self._dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        for split in SPLITS:
            for name, tokens in self._shards_of(split):
                self._check_size(name, tokens * self._dtype.itemsize)

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, as a Hugging Face ``tokenizer.json``."""
        return self.folder / "tokenizer.json"

    def tokens(self, split: Split) -> int:
        """Number of tokens in a split, separators included."""
        return int(self.manifest["splits"][split]["tokens"])

    def bytes(self, split: Split) -> int:
        """UTF-8 bytes of the text that a split's tokens stand for."""
        return int(self.manifest["splits"][split]["bytes"])

    def tokens_per_byte(self, split: Split) -> float:
        """Tokens that are predicted for each byte of a split's text."""
        return self.tokens(split) / max(1, self.bytes(split))

    def sequence_count(self, split: Split, seq_len: int) -> int:
        """Sequences in one epoch of a split."""
        return max(0, (self.tokens(split) - 1) // seq_len)

    def sequences(self, split: Split, position: int, count: int, seq_len: int, seed: int) -> np.ndarray:
        """The next sequences of a run.

        Parameters
        ----------
        split
            ``"train"`` or ``"validation"``.
        position
            How many sequences were taken before. Beyond an epoch it goes on with the next, shuffled anew.
        count
            How many to take.
        seq_len
            Tokens that are predicted in each.
        seed
            Of the shuffle.

        Returns
        -------
        np.ndarray of int64
            (count, seq_len + 1)

        Raises
        ------
        InputError
            If the split is shorter than one sequence.
        """
        items = self.items(split, position, count, seq_len, seed)
        return (
            np.stack([self.sequence(split, int(item), seq_len) for item in items])
            if count
            else (np.empty((0, seq_len + 1), dtype=np.int64))
        )

    def items(self, split: Split, position: int, count: int, seq_len: int, seed: int) -> np.ndarray:
        """The numbers of the next sequences of a run; see `sequences`."""
        size = self.sequence_count(split, seq_len)
        if size == 0:
            raise self._too_short(split, seq_len)
        places = np.arange(position, position + count, dtype=np.int64)
        epochs, within = np.divmod(places, size)
        items = np.empty_like(places)
        # Not `np.unique`, for which each process would import masked arrays: a fifth of a second.
        for epoch in sorted(set(epochs.tolist())):
            items[epochs == epoch] = shuffled(within[epochs == epoch], size, seed, epoch)
        return items

    def sequence(self, split: Split, item: int, seq_len: int) -> np.ndarray:
        """One sequence of a split, by its number."""
        return self.span(split, item * seq_len, seq_len + 1)

    def span(self, split: Split, start: int, length: int) -> np.ndarray:
        """`length` tokens (int64) of a split from `start` on, across shards."""
        shards = self._maps[split]
        parts = []
        index = start // self.manifest["shard_tokens"]
        offset = start % self.manifest["shard_tokens"]
        while length > 0 and index < len(shards):
            part = shards[index][offset : offset + length]
            parts.append(part.astype(np.int64))
            length -= len(part)
            index, offset = index + 1, 0
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def documents(self, split: Split) -> np.ndarray:
        """Where each document of a split starts (uint64), and behind the last where it ends."""
        starts = np.fromfile(self.folder / f"{split}.documents.bin", dtype="<u8")
        return np.append(starts, np.uint64(self.tokens(split)))

    def _too_short(self, split: Split, seq_len: int) -> InputError:
        return InputError(
            f"train.seq_len = {seq_len} is not accepted: the {split} split has {self.tokens(split)} tokens, and a "
            f"sequence takes {seq_len + 1}; give more text or a shorter train.seq_len"
        )

    @cached_property
    def _maps(self) -> dict[str, list[np.ndarray]]:
        return {
            split: [np.memmap(self.folder / name, dtype=self._dtype, mode="r") for name, _ in self._shards_of(split)]
            for split in SPLITS
        }

    def _shards_of(self, split: Split) -> list[tuple[str, int]]:
        shard, total = self.manifest["shard_tokens"], self.tokens(split)
        return [(shard_name(split, index), min(shard, total - index * shard)) for index in range(-(-total // shard))]

    def _check_size(self, name: str, expected: int) -> None:
        try:
            size = (self.folder / name).stat().st_size
        except OSError as error:
            raise OperationError(f"{self.folder / name} cannot be read: {error.strerror}") from None
        if size != expected:
            raise OperationError(f"{self.folder / name} has {size} bytes and was written with {expected}")


class SplitWriter:
    """Appends the documents of one split to its shards."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._split = folder, split
        self._dtype, self._shard_tokens = np.dtype(dtype).newbyteorder("<"), shard_tokens
        self._index = (folder / f"{split}.documents.bin").open("wb")
        self._shard: BinaryIO | None = None
        self.documents = self.tokens = self.bytes = 0

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Append a document of `text_bytes` bytes of text, its separator included in `ids`."""
        self._index.write(np.uint64(self.tokens).astype("<u8").tobytes())
        rest = np.asarray(ids, dtype=self._dtype)
        while rest.size:
            used = self.tokens % self._shard_tokens
            if used == 0:
                self._next_shard()
            part, rest = np.split(rest, [min(rest.size, self._shard_tokens - used)])
            assert self._shard is not None
            self._shard.write(part.tobytes())
            self.tokens += part.size
        self.documents += 1
        self.bytes += text_bytes

    def close(self) -> None:
        """Write out what is buffered."""
        self._index.close()
        if self._shard is not None:
            self._shard.close()

    def _next_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard = (self._folder / shard_name(self._split, self.tokens // self._shard_tokens)).open("wb")


def shard_name(split: Split, index: int) -> str:
    """A shard's file name."""
    return f"{split}-{index:05d}.bin"
