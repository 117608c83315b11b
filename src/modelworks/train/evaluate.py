"""Validation: how many bits the network needs per byte of text that it hasn't seen.

Bits per byte compares networks whatever their tokenizers, since bytes are the text's own unit:
``nats per token / ln 2 * tokens per byte`` (Gao et al. 2020, The Pile, arXiv:2101.00027, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from modelworks.data.packed import PackedDataset
from modelworks.train.batching import Batch, take, targets
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
    signs
        Whether what is written in drawn pictures is measured.
    """

    def __init__(
        self,
        data: PackedDataset,
        tokens: int,
        seq_len: int,
        batch: int,
        parallel: Parallel | None = None,
        signs: bool = False,
    ) -> None:
        self.count = min(data.sequence_count("validation", seq_len), max(1, tokens // seq_len))
        self._data, self._seq_len, self._batch, self._signs = data, seq_len, batch, signs
        self._parallel = parallel or Parallel(Layout(), Ranks())
        self._tokens_per_byte = data.tokens_per_byte("validation")

    def bits_per_byte(self, cross_entropy: Callable[[Batch], float]) -> float | None:
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

        def nats_and_tokens(batch: Batch) -> torch.Tensor:
            mean, count = cross_entropy(batch), targets(batch)
            return torch.tensor((mean * count, float(count)), dtype=torch.float64)

        sums = self.mean(nats_and_tokens)
        if sums is None:
            return None
        nats, counted = sums.tolist()
        # The stages of a pipeline each know a summand of the nats and all of the tokens.
        return self.in_bits_per_byte(nats / (counted / self._parallel.layout.pipeline))

    def in_bits_per_byte(self, nats_per_token: float) -> float:
        """Bits per byte of the validation split's text."""
        return nats_per_token / math.log(2) * self._tokens_per_byte

    def mean(self, figures: Callable[[Batch], torch.Tensor]) -> torch.Tensor | None:
        """The mean over the processes of what the sums of figures are on each one's share.

        Parameters
        ----------
        figures
            From sequences (B, T + 1) to figures (N) in fp64 that add up over sequences.

        Returns
        -------
        Tensor or None
            (N); nothing where the validation split is shorter than one sequence.
        """
        if self.count == 0:
            return None
        sums: torch.Tensor | None = None
        ranks, mine = self._parallel.layout.data, self._parallel.data_rank
        for start in range(0, self.count, ranks * self._batch):
            # Every process makes as many forward passes as the others, which gather weights together; one that is
            # past the end makes them on the first sequence, for nothing.
            begin = start + mine * self._batch
            size = min(self._batch, max(0, self.count - begin))
            place = begin if size else 0
            found = figures(take(self._data, "validation", place, max(1, size), self._seq_len, 0, self._signs))
            found = found if size else torch.zeros_like(found)
            sums = found if sums is None else sums + found
        assert sums is not None
        return self._parallel.mean(sums)
