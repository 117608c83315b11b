"""Collectives that gradients pass through, for the parts of a network that several processes compute together.

Each is its own adjoint's inverse in kind: what gathers forward scatters sums backward, and the other way round; what
exchanges forward sends the gradients back the way they came. A group of one process exchanges nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather(part: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The parts of all processes, put together along a dimension; backward, the sum of the gradients of one's part."""
    if group.size() == 1:
        return part
    whole: Tensor = _Gather.apply(part, dim, group)  # type: ignore[no-untyped-call]
    return whole


def scatter_sum(whole: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """One's part, along a dimension, of the sum over all processes; backward, all parts' gradients."""
    if group.size() == 1:
        return whole
    part: Tensor = _ScatterSum.apply(whole, dim, group)  # type: ignore[no-untyped-call]
    return part


def exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """Send the first `sent[0]` rows to process 0 and so on; returns the rows that came, in their senders' order."""
    if group.size() == 1:
        return rows
    came: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return came


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself; backward, its gradient times a factor."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, part: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        context.dim, context.group = dim, group
        return _gathered(part, dim, group)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _summed_part(gradients[0], context.dim, context.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, whole: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        context.dim, context.group = dim, group
        return _summed_part(whole, dim, group)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(gradients[0], context.dim, context.group), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        context.sent, context.received, context.group = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _exchanged(gradients[0], context.received, context.sent, context.group), None, None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] * context.factor, None


def _gathered(part: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """All parts along `dim`. The collective puts them along the first dimension."""
    count = group.size()
    flat = part.contiguous()
    whole = flat.new_empty((count, *flat.shape))
    dist.all_gather_single(whole.view(-1), flat.view(-1), group=group)
    return whole.movedim(0, dim).flatten(dim, dim + 1) if dim else whole.flatten(0, 1)


def _summed_part(whole: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    parts = torch.stack(whole.chunk(group.size(), dim))
    part: Tensor = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_single(part.view(-1), parts.view(-1), group=group)
    return part


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    came = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(came, rows.contiguous(), received, sent, group=group)
    return came
