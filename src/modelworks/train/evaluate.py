"""Validation: how many bits the network needs per byte of text that it hasn't seen.

Bits per byte compares networks whatever their tokenizers, since bytes are the text's own unit:
``nats per token / ln 2 * tokens per byte`` (Gao et al. 2020, The Pile, arXiv:2101.00027, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from modelworks.data.packed import PackedDataset


class Validation:
    """A fixed part of the validation split, measured again and again.

    Parameters
    ----------
    data
        The packed text.
    tokens
        About how many tokens to measure on; at least one sequence is taken, where there is one.
    seq_len
        Length of a sequence.
    batch
        Sequences per forward pass.
    """

    def __init__(self, data: PackedDataset, tokens: int, seq_len: int, batch: int) -> None:
        self.count = min(data.sequence_count("validation", seq_len), max(1, tokens // seq_len))
        self._data, self._seq_len, self._batch = data, seq_len, batch
        self._tokens_per_byte = data.tokens("validation") / max(1, data.bytes("validation"))

    def bits_per_byte(self, cross_entropy: Callable[[torch.Tensor], float]) -> float | None:
        """Measure.

        Parameters
        ----------
        cross_entropy
            From sequences (B, T + 1) of tokens to the mean nats per predicted token.

        Returns
        -------
        float or None
            Nothing where the validation split is shorter than one sequence.
        """
        nats = 0.0
        for start in range(0, self.count, self._batch):
            size = min(self._batch, self.count - start)
            sequences = self._data.sequences("validation", start, size, self._seq_len, 0)
            nats += cross_entropy(torch.from_numpy(sequences)) * size
        return nats / self.count / math.log(2) * self._tokens_per_byte if self.count > 0 else None
