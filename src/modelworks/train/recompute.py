"""Activation recomputation: what the backward pass needs and the forward pass didn't keep is computed again.

With ``full`` a block keeps its input alone, for one more forward pass of the block (Chen et al. 2016,
arXiv:1604.06174). ``projections`` moreover keeps what attention's projections return, so that these matmuls are not
done twice. ``selective`` computes the attention between them again, and no other part (Korthikanti et al. 2022,
arXiv:2205.05198): its scores are never kept anyway, which both of the network's attention kernels see to, so that what
it saves is the rotated queries and keys and the attended values. Of a share of the layers, every so-manieth is taken,
which is the same share of every stage of a pipeline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from modelworks.model.decoder import Block, Decoder
from modelworks.spec.run import ParallelSpec

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def recompute_activations(decoder: Decoder, spec: ParallelSpec) -> None:
    """Let blocks keep what the spec says; in place, before anything is put around the blocks."""
    kind, share = spec.recompute, 1.0 if spec.recompute_share == "auto" else spec.recompute_share
    if kind in ("auto", "none"):
        return
    for name, block in cast(Iterable[tuple[str, Block]], decoder.blocks.named_children()):
        layer, attention = int(name), block.attn
        if round((layer + 1) * share) == round(layer * share):
            continue
        if kind == "full":
            _recompute(block, [])
        elif kind == "projections":
            _recompute(block, [attention.wq, attention.wk, attention.wv, attention.wo])
        else:
            _recompute(attention, [attention.wq, attention.wk, attention.wv])


def _recompute(part: nn.Module, kept: Sequence[nn.Linear]) -> None:
    """Let a part of the network keep its inputs and the products of some of its linear maps."""
    # Nothing in a block is drawn at random, so no state of a generator is kept with it.
    again = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
    if kept:
        passing: list[_Products] = []
        for linear in kept:
            linear.forward = partial(_multiply, linear.forward, passing)  # type: ignore[method-assign]

        def contexts() -> tuple[_Pass, _Pass]:
            products: list[Tensor] = []
            return _Pass(passing, products, again=False), _Pass(passing, products, again=True)

        again = partial(again, context_fn=contexts)
    part.forward = again


def _multiply(forward: Any, passing: list[_Products], x: Tensor) -> Tensor:
    """A linear map's forward pass, whose product is kept or taken from what was."""
    with passing[-1] if passing else contextlib.nullcontext():
        product: Tensor = forward(x)
    return product


class _Pass:
    """The context of a forward pass that keeps products, or of one that is made again; it may be made twice."""

    def __init__(self, passing: list[_Products], products: list[Tensor], again: bool) -> None:
        self._passing, self._products, self._again = passing, products, again

    def __enter__(self) -> None:
        self._passing.append(_Products(self._products, self._again))

    def __exit__(self, *_: object) -> None:
        self._passing.pop()


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Below autograd, which sees the same operations in both passes: keeps matrix products, or gives them back."""

    def __init__(self, products: list[Tensor], again: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products, self._next = products, iter(products) if again else None

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation not in _PRODUCTS:
            return operation(*args, **(kwargs or {}))
        if self._next is not None:
            return next(self._next).detach()
        product = operation(*args, **(kwargs or {}))
        self._products.append(product.detach())
        return product
