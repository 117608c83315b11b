"""Adapters: narrow matrices beside a network's frozen ones, put on from outside and merged into them at the end.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds `alpha / rank * B A` to a matrix, with A (rank, in) drawn and B (out, rank)
zero, so that the network begins as it was. DoRA (Liu et al. 2024, arXiv:2402.09353) moreover gives each row of the sum
a length of its own, which begins as what it is; as there (section 4.3) the length that is divided by is a constant to
the backward pass. It follows from narrow products alone, without the sum ever standing in memory.

The frozen weights get no gradient, and those of the adapted maps are kept in the precision that they are multiplied in.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelworks.model.decoder import Decoder
from modelworks.model.layers import Linear, to_compute_dtype
from modelworks.spec.run import AdapterSpec

PARTS = {
    "q": "attn.wq", "k": "attn.wk", "v": "attn.wv", "o": "attn.wo",
    "gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down",
}  # fmt: skip
"""The blocks' linear maps by the names that `AdapterSpec.targets` has for them."""
_NAMES = ("lora_a", "lora_b", "magnitude")


class AdaptedLinear(Linear):
    """A frozen linear map with an adapter; a `Linear` is made one in place, so that its weight keeps its name."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    magnitude: nn.Parameter | None
    scale: float
    dropout: float
    aside: bool
    """Whether the map does without its adapter for now."""
    _squares: Tensor | None
    """The squared length of each row of the frozen matrix, reckoned once."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        weight = to_compute_dtype(self.weight)
        mapped = F.linear(to_compute_dtype(x), weight)
        if self.aside:
            return mapped if self.bias is None else mapped + self.bias.to(mapped.dtype)
        seen = F.dropout(x, self.dropout, self.training) if self.dropout else x
        added = F.linear(F.linear(seen, self.lora_a), self.lora_b) * self.scale
        total = mapped + added
        if self.magnitude is not None:
            total = total * (self.magnitude / self.lengths()).to(total.dtype)
        return total if self.bias is None else total + self.bias.to(total.dtype)

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """The length (out) of each row of the sum, in fp32."""
        weight, down, up = self.weight.float(), self.lora_a.float(), self.lora_b.float()
        if self._squares is None:
            self._squares = weight.square().sum(1)
        with torch.autocast(weight.device.type, enabled=False):
            crossed = ((weight @ down.t()) * up).sum(1)
            narrow = ((up @ (down @ down.t())) * up).sum(1)
            squares = self._squares + 2.0 * self.scale * crossed + self.scale**2 * narrow
        return squares.clamp(min=1e-12).sqrt()

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The matrix (out, in) in fp32 that does what this map with its adapter does."""
        total = self.weight.float() + self.scale * (self.lora_b.float() @ self.lora_a.float())
        return total if self.magnitude is None else total * (self.magnitude / self.lengths()).unsqueeze(1)


def adapt(decoder: Decoder, spec: AdapterSpec) -> None:
    """Freeze a network and put an adapter on it, in place; on the meta device, or anywhere.

    The adapter's values are then to be filled in (`fill`), or loaded.
    """
    decoder.requires_grad_(False)
    for block in decoder.blocks:
        for target in spec.targets:
            try:
                part = block.get_submodule(PARTS[target])
            except AttributeError:  # a layer with experts has no feed-forward network beside them
                continue
            assert isinstance(part, Linear)
            _adapt(part, spec)


def adapted(decoder: Decoder) -> Iterator[tuple[str, AdaptedLinear]]:
    """The maps of a network that have adapters, by name."""
    for name, part in decoder.named_modules():
        if isinstance(part, AdaptedLinear):
            yield name, part


@contextlib.contextmanager
def set_aside(decoder: Decoder) -> Iterator[None]:
    """Within the context, a network computes what it did before it got its adapter."""
    parts = [part for _, part in adapted(decoder)]
    try:
        for part in parts:
            part.aside = True
        yield
    finally:
        for part in parts:
            part.aside = False


def is_of_adapter(name: str) -> bool:
    """Whether a parameter, by its name, is an adapter's."""
    return name.rpartition(".")[2] in _NAMES


@torch.no_grad()
def fill(part: Tensor, seed: int, name: str) -> None:
    """Give an adapter's parameter the values that it begins with; magnitudes take theirs from the weights later.

    A is uniform with the bound of `torch.nn.Linear`'s own weights, as in PEFT.
    """
    if part.is_meta:
        return
    if name.endswith("lora_a"):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        drawn = np.random.default_rng(int.from_bytes(digest, "little")).random(tuple(part.shape), dtype=np.float32)
        part.copy_(torch.from_numpy((2.0 * drawn - 1.0) / math.sqrt(part.shape[1])))
    else:
        part.zero_()


@torch.no_grad()
def settle(decoder: Decoder, dtype: torch.dtype = torch.float32, begins: bool = True) -> None:
    """Once the weights are there: magnitudes begin as their rows' lengths, and frozen maps go over to a precision.

    Parameters
    ----------
    decoder
        With its adapter on.
    dtype
        What products are computed in.
    begins
        Whether magnitudes are to be set, which a checkpoint brings otherwise.
    """
    for _, part in adapted(decoder):
        if begins and part.magnitude is not None:
            part.magnitude.copy_(part.lengths())
        if part.magnitude is None:  # DoRA's lengths are reckoned from the whole precision
            part.weight.data = part.weight.data.to(dtype)


@torch.no_grad()
def merge(decoder: Decoder) -> None:
    """Make an adapted network a plain one of the same function, in place."""
    for _, part in list(adapted(decoder)):
        part.weight.data = part.merged()
        for name in _NAMES:
            part._parameters.pop(name, None)
        part.__class__ = Linear  # type: ignore[assignment]


def _adapt(part: Linear, spec: AdapterSpec) -> None:
    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=part.weight.device))

    part.__class__ = AdaptedLinear
    assert isinstance(part, AdaptedLinear)
    part.lora_a, part.lora_b = parameter(spec.rank, part.in_features), parameter(part.out_features, spec.rank)
    part.magnitude = parameter(part.out_features) if spec.kind == "dora" else None
    part._squares, part.aside = None, False
    part.scale, part.dropout = spec.alpha / spec.rank, spec.dropout
