"""The small parts of a block: linear maps, RMSNorm and the dense feed-forward network.

Linear maps and norms come into being without values: `Decoder.initialize` draws them all, in one place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelworks.spec.model import ModelSpec


class Linear(nn.Linear):
    """PyTorch's linear map, weight (out, in), whose values `Decoder.initialize` draws."""

    def reset_parameters(self) -> None:
        """Leave the values to the decoder."""


class Embedding(nn.Embedding):
    """PyTorch's embedding (V, H), whose values `Decoder.initialize` draws."""

    def reset_parameters(self) -> None:
        """Leave the values to the decoder."""


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in fp32 (Zhang & Sennrich, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., width); the result has `x`'s dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """The dense feed-forward network `down(act(gate(x)) * up(x))` (Shazeer, arXiv:2002.05202)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = Linear(spec.hidden, spec.ffn_hidden, bias=spec.mlp_bias)
        self.up = Linear(spec.hidden, spec.ffn_hidden, bias=spec.mlp_bias)
        self.down = Linear(spec.ffn_hidden, spec.hidden, bias=spec.mlp_bias)
        self.activation = spec.activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) in and out."""
        lowered: Tensor = self.down(gated_activation(self.gate(x), self.up(x), self.activation))
        return lowered


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up` of one shape."""
    return activate(gate, activation) * up


def activate(x: Tensor, activation: str) -> Tensor:
    """`silu`, or `gelu` by its tanh approximation."""
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def activate_backward(gradient: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient with respect to the activation's argument `x`."""
    backward: Tensor = (
        torch.ops.aten.silu_backward(gradient, x)
        if activation == "silu"
        else torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
    )
    return backward


def to_compute_dtype(tensor: Tensor) -> Tensor:
    """A tensor as a matmul under autocast takes it, for matmuls that autocast doesn't see; unchanged without it."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
