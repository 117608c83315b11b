"""How a sequence's positions are shared by context-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from modelworks.train.split_network import in_order, of_rank


@dataclass
class Group:
    """As much of a process group as sharing positions takes."""

    number: int
    ranks: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_have_every_position_once_and_as_many_keys_to_attend_to(ranks: int) -> None:
    positions = torch.arange(24).repeat(2, 1)
    groups: list[Any] = [Group(rank, ranks) for rank in range(ranks)]
    parts = [of_rank(positions, 1, group) for group in groups]
    # Under a causal mask a position attends to itself and to those before it.
    assert {int((part[0] + 1).sum()) for part in parts} == {25 * 24 // 2 // ranks}
    if ranks > 1:
        assert torch.equal(in_order(torch.cat(parts, 1), 1, ranks), positions)
