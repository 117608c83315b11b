"""Silent corruption: processes that hold the same weights compare them, and the odd one out is named.

Two ideas. A processor or a memory that computes wrongly without a word shows where two processes should hold the same
bits and don't. What can be compared depends on the layout: with ``zero_stage = 0``, or several copies of the shards
(HSDP), every weight; where FSDP splits the weights over all data-parallel ranks without a copy, only what is small and
held whole, or nothing. The majority is right; of two, neither can be told to be.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from modelworks.model.decoder import Decoder
from modelworks.train.parallelize import Parallel, local

logger = logging.getLogger(__name__)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as an element."""


class ReplicasDiffer(Exception):  # noqa: N818 - says what is
    """Processes that should hold the same weights don't. Another attempt from the last checkpoint may go well."""


class Agreement:
    """The comparison of a run's processes. All construct and check together."""

    def __init__(self, decoder: Decoder, parallel: Parallel) -> None:
        self._ranks = parallel.ranks
        self._held: dict[Hashable, list[Tensor]] = {}
        for name, parameter in decoder.named_parameters():
            self._held.setdefault(parallel.part(name), []).append(parameter)
        compared, numbers = 0, sum(local(parameter).numel() for parameter in decoder.parameters())
        for part, holders in self._holders().items():
            if len(holders) > 1 and part in self._held:
                compared += sum(local(parameter).numel() for parameter in self._held[part])
        self.share = compared / max(1, numbers)
        """The share of this process's weights that another one holds as well."""
        if not compared and self._ranks.first:
            logger.warning(
                "guard.agreement_every: no two processes hold the same weights (%s), so none are compared; "
                "parallel.zero_stage = 0 or a parallel.shard below the data-parallel degree makes copies",
                parallel.layout.describe(),
            )

    def check(self, step: int) -> None:
        """Compare all copies.

        Raises
        ------
        ReplicasDiffer
            On every process, naming those that differ.
        """
        words = disagreement(self._gathered({part: fingerprint(tensors) for part, tensors in self._held.items()}))
        if words is not None:
            raise ReplicasDiffer(f"at step {step} {words}")

    def _holders(self) -> dict[Hashable, list[int]]:
        found: dict[Hashable, list[int]] = {}
        for rank, parts in enumerate(self._gathered(dict.fromkeys(self._held, 0))):
            for part in parts:
                found.setdefault(part, []).append(rank)
        return found

    def _gathered(self, mine: dict[Hashable, int]) -> list[dict[Hashable, int]]:
        if self._ranks.world == 1:
            return [mine]
        parts: list[dict[Hashable, int]] = [{} for _ in range(self._ranks.world)]
        dist.all_gather_object(parts, mine)
        return parts


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A number that follows from every bit of the tensors: of each the sum of its elements' bits, as integers modulo
    2^64, in the order of the tensors. One changed element always changes it."""
    mixed = 0
    for tensor in tensors:
        bits = local(tensor).detach().contiguous().view(_BITS[tensor.element_size()])
        mixed = (mixed * 0x9E3779B97F4A7C15 + int(bits.sum(dtype=torch.int64))) % (1 << 64)
    return mixed


def disagreement(fingerprints: list[dict[Hashable, int]]) -> str | None:
    """Who differs, in words; nothing if all copies are equal.

    Parameters
    ----------
    fingerprints
        By process, the fingerprint of each part of the weights that it holds.
    """
    copies: dict[Hashable, dict[int, int]] = {}
    for rank, parts in enumerate(fingerprints):
        for part, number in parts.items():
            copies.setdefault(part, {})[rank] = number
    odd: set[int] = set()
    for holders in copies.values():
        number, count = Counter(holders.values()).most_common(1)[0]
        if count == len(holders):
            continue
        if 2 * count <= len(holders):
            return (
                f"processes {_listed(holders)} should hold the same weights and don't; which of them is wrong can't be "
                "told, since no majority agrees"
            )
        odd |= {rank for rank, other in holders.items() if other != number}
    if not odd:
        return None
    who = f"process {min(odd)} holds" if len(odd) == 1 else f"processes {_listed(odd)} hold"
    return f"{who} other weights than the majority of those that should hold the same"


def _listed(ranks: Iterable[int]) -> str:
    *others, last = map(str, sorted(ranks))
    return f"{', '.join(others)} and {last}" if others else last
