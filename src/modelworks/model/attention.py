"""Grouped-query attention with rotary positions, optionally soft-capped, over a key-value cache.

Three ideas: heads that share a key-value head are folded into its rows, so that keys and values are never repeated;
a soft cap `c * tanh(logits / c)` (Grok-1) is computed over blocks of queries that see only the keys before them, and
the backward pass computes a block's probabilities again rather than keep them, so that memory grows with the sequence
and not with its square; without a cap the work is PyTorch's own fused attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelworks.model.layers import Linear, RMSNorm
from modelworks.model.rotary import Rotary, rotate
from modelworks.spec.model import ModelSpec

QUERY_BLOCK = 64
"""Queries per block of soft-capped attention: large enough for the matmuls, small enough to skip most masked keys and
to keep a block's logits in the cache (at 512 positions a third faster than 128 or 256 on a CPU)."""
LARGEST_EXPONENT = 60.0
"""Up to this soft cap the sum of a row's exponentials fits fp32 as it is; beyond it the largest logit is subtracted."""


@dataclass
class KeyValueCache:
    """The keys and values of every layer for the positions so far: room for `length` positions of `batch` sequences."""

    spec: ModelSpec
    batch: int
    length: int
    position: int = 0
    """How many positions every layer holds; moved on by the decoder after each forward pass."""
    _layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, KV, T, D) and return all of its so far (B, KV, position + T, D)."""
        if layer not in self._layers:
            shape = (self.batch, self.spec.kv_heads, self.length, self.spec.head_dim)
            self._layers[layer] = (keys.new_empty(shape), values.new_empty(shape))
        end = self.position + keys.shape[2]
        stored_keys, stored_values = self._layers[layer]
        stored_keys[:, :, self.position : end] = keys
        stored_values[:, :, self.position : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]


class Attention(nn.Module):
    """Attention of one layer: (B, T, H) in, (B, T, H) out."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, spec.heads, spec.kv_heads, spec.head_dim
        self.scale, self.softcap = spec.attention_scale, spec.attention_softcap
        q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.rotary, self.window = spec.has_rotary(layer), spec.sliding_window
        biased = spec.attention_bias or spec.qkv_bias
        self.wq = Linear(spec.hidden, q_width, bias=biased)
        self.wk = Linear(spec.hidden, kv_width, bias=biased)
        self.wv = Linear(spec.hidden, kv_width, bias=biased)
        self.wo = Linear(q_width, spec.hidden, bias=spec.attention_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None

    def forward(self, x: Tensor, rotary: Rotary, cache: KeyValueCache | None = None) -> Tensor:
        """Attend from each position to itself and those before it, the cache's included."""
        batch, length, _ = x.shape
        queries = self.wq(x).view(batch, length, -1, self.head_dim)  # (B, T, heads, D)
        keys = self.wk(x).view(batch, length, -1, self.head_dim)  # (B, T, KV, D)
        values = self.wv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, KV, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
        if self.rotary:
            queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)
        attended = self.attend(queries, keys, values, rotary.temperature)
        output: Tensor = self.wo(attended.transpose(1, 2).reshape(batch, length, -1))  # (B, T, H)
        return output

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, temperature: Tensor | None = None) -> Tensor:
        """Causal attention of the last positions' queries; shapes as in `softcap_attention`."""
        if self.softcap is None:
            if temperature is not None:
                queries = (queries * temperature.unsqueeze(-1)).to(queries.dtype)
            return fused_attention(queries, keys, values, self.scale, self.window)
        return softcap_attention(queries, keys, values, self.scale, self.softcap, temperature)


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention by PyTorch's fused kernel.

    Parameters
    ----------
    queries
        (B, heads, T, D); the last of them stands at the last key's position.
    keys, values
        (B, KV, S, D) with S >= T.
    scale
        What logits are multiplied with.
    window
        How many keys a query sees, its own the last of them; None for all.

    Returns
    -------
    Tensor
        (B, heads, T, D)
    """
    if window is not None and keys.shape[2] > window:
        # Keys that no query sees are left out, so that a cached step costs the window and not the sequence.
        seen = min(keys.shape[2], queries.shape[2] + window - 1)
        keys, values = keys[:, :, -seen:], values[:, :, -seen:]
    length, seen = queries.shape[2], keys.shape[2]
    mask = None
    if length > 1 and (length < seen or (window is not None and window < seen)):
        mask = torch.ones(length, seen, dtype=torch.bool, device=queries.device).tril(seen - length)
        mask = mask if window is None else mask.triu(seen - length - window + 1)
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None and length > 1, scale=scale, enable_gqa=True
    )


def softcap_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float, temperature: Tensor | None = None
) -> Tensor:
    """Causal attention with the logits `temperature * softcap * tanh(scale * q k / softcap)`, in fp32.

    Shapes as in `fused_attention`; a temperature (T) is that of each query, and grows with its position.
    """
    output: Tensor
    output, _ = _softcap_forward(queries, keys, values, scale, softcap, temperature)
    return output


@torch.library.custom_op("modelworks::softcap_attention", mutates_args=())
def _softcap_forward(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float, temperature: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output (B, heads, T, D), and each query's log-sum-exp (B, KV, G, T) in fp32 for the backward pass."""
    folded = _fold(queries, keys.shape[1])  # (B, KV, G, T, D)
    output = torch.empty_like(folded, memory_format=torch.contiguous_format)
    log_sums = folded.new_empty(folded.shape[:-1], dtype=torch.float32)
    offset = keys.shape[2] - queries.shape[2]
    too_large = softcap * (1.0 if temperature is None else float(temperature[-1])) > LARGEST_EXPONENT
    for start, end in _blocks(queries.shape[2]):
        block = folded[..., start:end, :].flatten(2, 3)  # (B, KV, G * t, D)
        weights = _tangents(block, keys[:, :, : offset + end], scale / softcap).mul_(softcap)  # (B, KV, G * t, s)
        if temperature is not None:
            weights.mul_(_of_rows(temperature[start:end], weights))
        largest = weights.amax(-1, keepdim=True) if too_large else weights.new_zeros(())
        if too_large:
            weights.sub_(largest)
        _hide_later(weights.exp_(), end - start)
        sums = weights.sum(-1, keepdim=True)
        attended = (weights.to(values.dtype) @ values[:, :, : offset + end]).div_(sums)
        output[..., start:end, :] = attended.view_as(folded[..., start:end, :])
        log_sums[..., start:end] = sums.log_().add_(largest).view(*log_sums.shape[:3], end - start)
    return output.flatten(1, 2), log_sums


@torch.library.custom_op("modelworks::softcap_attention_backward", mutates_args=())
def _softcap_backward(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    log_sums: Tensor,
    scale: float,
    softcap: float,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values; a block's probabilities are rebuilt from its log-sum-exp."""
    folded, upstream, attended = (_fold(tensor, keys.shape[1]) for tensor in (queries, gradient, output))
    to_queries = torch.empty_like(folded, memory_format=torch.contiguous_format)
    to_keys = torch.zeros_like(keys, memory_format=torch.contiguous_format, dtype=torch.float32)
    to_values = torch.zeros_like(to_keys)
    offset = keys.shape[2] - queries.shape[2]
    for start, end in _blocks(queries.shape[2]):
        seen = offset + end
        block, above, result, sums = (
            tensor[..., start:end, :].flatten(2, 3) for tensor in (folded, upstream, attended, log_sums.unsqueeze(-1))
        )  # (B, KV, G * t, D), and (B, KV, G * t, 1)
        tangents = _tangents(block, keys[:, :, :seen], scale / softcap)  # (B, KV, G * t, s)
        if temperature is None:
            weights = torch.sub(tangents, sums, alpha=1 / softcap).mul_(softcap).exp_()
        else:
            warmth = _of_rows(temperature[start:end], tangents)
            weights = (tangents * (softcap * warmth)).sub_(sums).exp_()
        weights = _hide_later(weights, end - start)
        along = (above.float() * result).sum(-1, keepdim=True)
        to_values[:, :, :seen] += weights.to(above.dtype).transpose(-1, -2) @ above
        to_capped = (above @ values[:, :, :seen].transpose(-1, -2)).float().sub_(along).mul_(weights)
        if temperature is not None:
            to_capped.mul_(warmth)
        # d tanh = 1 - tanh^2; the logits' scale is applied to the products, which are smaller.
        to_logits = to_capped.sub_(tangents.square_().mul_(to_capped)).to(keys.dtype)
        to_queries[..., start:end, :] = (to_logits @ keys[:, :, :seen]).view_as(folded[..., start:end, :])
        to_keys[:, :, :seen] += to_logits.transpose(-1, -2) @ block
    return to_queries.mul_(scale).flatten(1, 2), to_keys.mul_(scale).to(keys.dtype), to_values.to(values.dtype)


@_softcap_forward.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _width = queries.shape
    log_sums = queries.new_empty(batch, keys.shape[1], heads // keys.shape[1], length, dtype=torch.float32)
    return torch.empty_like(queries, memory_format=torch.contiguous_format), log_sums


@_softcap_backward.register_fake
def _(gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    empty = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (queries, keys, values)]
    return empty[0], empty[1], empty[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)  # PyTorch passes these three by name
    ctx.scale, ctx.softcap, ctx.temperature = inputs[3:]


def _backward(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    constants = (context.scale, context.softcap, context.temperature)
    return *_softcap_backward(gradient, *context.saved_tensors, *constants), None, None, None


_softcap_forward.register_autograd(_backward, setup_context=_keep)


def _fold(heads: Tensor, kv_heads: int) -> Tensor:
    """(B, heads, T, D) as (B, KV, G, T, D): the G heads that share one key-value head stand together."""
    batch, count, length, width = heads.shape
    return heads.view(batch, kv_heads, count // kv_heads, length, width)


def _of_rows(temperature: Tensor, logits: Tensor) -> Tensor:
    """The temperature of a block's queries (t) beside its logits (B, KV, G * t, s): (G * t, 1)."""
    return temperature.repeat(logits.shape[2] // len(temperature)).unsqueeze(-1)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _tangents(block: Tensor, keys: Tensor, factor: float) -> Tensor:
    """`tanh(factor * q k)` in fp32 of a block of queries (B, KV, G * t, D) with the keys (B, KV, s, D) up to it."""
    return (block @ keys.transpose(-1, -2)).float().mul_(factor).tanh_()


def _hide_later(weights: Tensor, length: int) -> Tensor:
    """Zero, in place, the weights (B, KV, G * t, s) of the keys that stand after their query: of the last t keys."""
    later = torch.ones(length, length, dtype=torch.bool, device=weights.device).triu(1)
    by_query = weights.view(*weights.shape[:2], -1, length, weights.shape[-1])
    by_query[..., -length:].masked_fill_(later, 0.0)
    return weights
