"""Validation: how many bits the network needs per byte of text that it hasn't seen.

Bits per byte compares networks whatever their tokenizers, since bytes are the text's own unit:
``nats per token / ln 2 * tokens per byte`` (Gao et al. 2020, The Pile, arXiv:2101.00027, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from modelworks.data.packed import PackedDataset
from modelworks.train.layout import Layout
from modelworks.train.parallelize import Parallel
from modelworks.train.ranks import Ranks


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
    parallel
        The processes that measure together, each on its share; this one alone if unset.
    """

    def __init__(
        self, data: PackedDataset, tokens: int, seq_len: int, batch: int, parallel: Parallel | None = None
    ) -> None:
        self.count = min(data.sequence_count("validation", seq_len), max(1, tokens // seq_len))
        self._data, self._seq_len, self._batch = data, seq_len, batch
        self._parallel = parallel or Parallel(Layout(), Ranks())
        self._tokens_per_byte = data.tokens("validation") / max(1, data.bytes("validation"))

    def bits_per_byte(self, cross_entropy: Callable[[torch.Tensor], float]) -> float | None:
        """Measure.

        Parameters
        ----------
        cross_entropy
            From sequences (B, T + 1) of tokens to the mean nats per predicted token, or a stage's summand of that.

        Returns
        -------
        float or None
            Nothing where the validation split is shorter than one sequence.
        """
        if self.count == 0:
            return None
        nats = torch.zeros((), dtype=torch.float64)
        ranks, mine = self._parallel.layout.data, self._parallel.data_rank
        for start in range(0, self.count, ranks * self._batch):
            # Every process makes as many forward passes as the others, which gather weights together; one that is
            # past the end makes them on the first sequence, for nothing.
            begin = start + mine * self._batch
            size = min(self._batch, max(0, self.count - begin))
            sequences = self._data.sequences("validation", begin if size else 0, max(1, size), self._seq_len, 0)
            nats += cross_entropy(torch.from_numpy(sequences)) * size
        total = float(self._parallel.mean(nats)) * ranks
        return total / self.count / math.log(2) * self._tokens_per_byte
