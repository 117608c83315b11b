"""Gradients that several processes add up, in buckets, while the backward pass that completes them still goes on.

Two ideas, both of PyTorch's own data parallelism (Li et al. 2020, arXiv:2006.15704). Many small sums take longer than
a few large ones, so gradients are views of buckets of some megabytes each, and a bucket is summed where it stands. And
the last layers' gradients are complete long before the first ones', so a bucket's sum begins as soon as the bucket is
complete, in an order that is the same on all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
"""What PyTorch's own data parallelism takes, too."""
_FIRST_BYTES = 2**20
"""The first bucket of each group is small, so that exchanges begin early."""


@dataclass(frozen=True)
class Summed:
    """A parameter whose gradient is added up over processes, and scaled."""

    parameter: nn.Parameter
    group: dist.ProcessGroup
    factor: float


class Buckets:
    """The gradients of parameters that are held whole, or their parts, by several processes.

    Parameters
    ----------
    summed
        In the order in which a forward pass uses them.
    """

    def __init__(self, summed: Sequence[Summed]) -> None:
        self._buckets = [_Bucket(members) for members in _filled(summed)]
        self._begun, self._last = 0, False
        for bucket in self._buckets:
            for member in bucket.members:
                member.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, bucket=bucket: self._complete(bucket)
                )

    def expect(self, first: bool, last: bool) -> None:
        """Before the backward pass of a step's `first`, or `last`, micro batch.

        With the first one gradients become zeros. In the last one sums begin; without it they begin with `finish`.
        """
        if first:
            self._wait()
            for bucket in self._buckets:
                bucket.clear()
        self._last = last

    def finish(self) -> None:
        """Sum what hasn't been yet, and wait for all sums."""
        for bucket in self._buckets[self._begun :]:
            bucket.begin()
        self._wait()

    def _complete(self, bucket: _Bucket) -> None:
        """One more gradient of a bucket is complete, if this is the last micro batch's backward pass."""
        if not self._last:
            return
        bucket.missing -= 1
        while self._begun < len(self._buckets) and self._buckets[self._begun].missing == 0:
            self._buckets[self._begun].begin()
            self._begun += 1

    def _wait(self) -> None:
        for bucket in self._buckets:
            bucket.wait()
        self._begun, self._last = 0, False


class _Bucket:
    def __init__(self, members: Sequence[Summed]) -> None:
        self.members, self.missing = members, len(members)
        self._flat: Tensor | None = None
        self._views: Sequence[Tensor] = ()
        self._work: dist.Work | None = None

    def clear(self) -> None:
        """Make the parameters' gradients zeros, in this bucket."""
        self.missing = len(self.members)
        if self._flat is None:
            parameters = [member.parameter for member in self.members]
            self._flat = parameters[0].new_zeros(sum(parameter.numel() for parameter in parameters))
            parts = torch.split(self._flat, [parameter.numel() for parameter in parameters])
            self._views = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        else:
            self._flat.zero_()
        for member, view in zip(self.members, self._views, strict=True):
            member.parameter.grad = view

    def begin(self) -> None:
        """Begin to add up what all processes have."""
        assert self._flat is not None
        self._flat.mul_(self.members[0].factor)
        self._work = dist.all_reduce(self._flat, group=self.members[0].group, async_op=True)

    def wait(self) -> None:
        """Wait for the sum, if there is one under way."""
        if self._work is not None:
            self._work.wait()
            self._work = None


def _filled(summed: Sequence[Summed]) -> list[list[Summed]]:
    """Members of each bucket, which have a group and a factor in common; in the order in which backward passes complete
    them."""
    filled: list[list[Summed]] = []
    filling: dict[tuple[str, float], tuple[list[Summed], int]] = {}
    begun: set[tuple[str, float]] = set()
    for member in reversed(summed):
        key = (member.group.group_name, member.factor)
        members, size = filling.pop(key, ([], 0))
        members.append(member)
        size += member.parameter.nbytes
        if size >= (BUCKET_BYTES if key in begun else _FIRST_BYTES):
            filled.append(members)
            begun.add(key)
        else:
            filling[key] = (members, size)
    return filled + [members for members, _ in filling.values()]
