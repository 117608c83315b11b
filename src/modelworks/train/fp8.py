"""Matrix products in fp8, for the linear maps and experts of the blocks.

Three ideas. Both factors of a product are scaled by one number each, such that the largest element just fits, at every
product anew (Micikevicius et al. 2022, arXiv:2209.05433; no history is kept, so a resumed run needs none). Activations
and weights are rounded to E4M3, which has more precision, gradients to E5M2, which has more range; the product is
accumulated and scaled back by `torch.nn.functional.scaled_mm`, and comes in bf16. And the backward pass uses what the
forward pass has rounded, of a byte an element; a weight's gradient is added up in fp32 as everywhere else.

Everything else is what it is in bf16: attention's core, embedding, head, normalisations, routers. A map whose widths
the tensor cores don't take stays in bf16, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from modelworks.model.decoder import Block, Decoder
from modelworks.model.experts import grouped_experts

MULTIPLE = 16
"""What the tensor cores want the summed width and the result's last width to be a multiple of."""
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def multiply_in_fp8(decoder: Decoder) -> None:
    """Let the blocks' linear maps and experts multiply in fp8; in place, before anything is put around the blocks."""
    for block in cast(Sequence[Block], decoder.blocks):
        for name, part in block.named_modules():
            if isinstance(part, nn.Linear) and not name.endswith("router") and _fits(part.weight):
                # A map whose bias is added elsewhere has another forward pass already, which is without it.
                biased = "forward" not in part.__dict__
                part.forward = partial(_linear, part, biased)  # type: ignore[method-assign]
        if hasattr(block, "moe") and all(map(_fits, (block.moe.gate, block.moe.up, block.moe.down))):
            block.moe.mix = partial(grouped_experts, multiply=grouped_linear)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T` of x (..., I) and a weight (O, I), multiplied in fp8; the result (..., O) is bf16."""
    rows = x.flatten(0, -2).to(torch.bfloat16)
    product: Tensor = _Product.apply(rows, weight.to(torch.bfloat16))  # type: ignore[no-untyped-call]
    return product.view(*x.shape[:-1], len(weight))


def grouped_linear(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """As `model.experts.grouped_linear`, in fp8: each group has a scale of its own."""
    groups = torch.split(rows, counts.tolist())
    return torch.cat([linear(group, weight) for group, weight in zip(groups, weights, strict=True)])


def quantized(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in an fp8 type, and what they are to be multiplied with (a scalar in fp32)."""
    largest = torch.finfo(dtype).max
    peak = values.abs().amax().float() if values.numel() else values.new_zeros((), dtype=torch.float32)
    scale = torch.where(peak > 0, peak / largest, 1.0)
    return (values.float() / scale).clamp(-largest, largest).to(dtype), scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor) -> Tensor:
        (low_rows, of_rows), (low_weight, of_weight) = quantized(rows, _E4M3), quantized(weight, _E4M3)
        context.save_for_backward(low_rows, of_rows, low_weight, of_weight)
        return _multiply(low_rows, low_weight.t(), of_rows, of_weight)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, of_rows, weight, of_weight = context.saved_tensors
        above, of_above = quantized(gradients[0], _E5M2)
        to_rows = to_weight = None
        if context.needs_input_grad[0]:
            to_rows = _multiply(above, _by_columns(weight), of_above, of_weight)
        if context.needs_input_grad[1]:
            # Zeros make up what the rows, which are summed here, are short of a multiple.
            missing = -len(rows) % MULTIPLE
            above, rows = (_padded(each, missing) for each in (above, rows))
            to_weight = _multiply(above.t().contiguous(), _by_columns(rows), of_above, of_rows)
        return to_rows, to_weight


def _multiply(left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor) -> Tensor:
    """The product in bf16 of fp8 matrices (N, K), whose rows are contiguous, and (K, M), whose columns are."""
    if len(left) == 0:
        return left.new_zeros(0, right.shape[1], dtype=torch.bfloat16)
    by_tensor = ScalingType.TensorWise
    return F.scaled_mm(left, right, of_left, by_tensor, of_right, by_tensor, output_dtype=torch.bfloat16)


def _by_columns(matrix: Tensor) -> Tensor:
    """The same matrix with contiguous columns."""
    return matrix.t().contiguous().t()


def _padded(matrix: Tensor, rows: int) -> Tensor:
    """With so many rows of zeros more."""
    if rows == 0:
        return matrix
    padded = torch.zeros(len(matrix) + rows, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    padded[: len(matrix)] = matrix
    return padded


def _linear(part: nn.Linear, biased: bool, x: Tensor) -> Tensor:
    product = linear(x, part.weight)
    return product + part.bias.to(product.dtype) if biased and part.bias is not None else product


def _fits(weight: Tensor) -> bool:
    return all(width % MULTIPLE == 0 for width in weight.shape[-2:])
