"""Grouped-query attention with rotary positions, optionally soft-capped, over a key-value cache.

Three ideas: heads that share a key-value head are folded into its rows, so that keys and values are never repeated;
a soft cap `c * tanh(logits / c)` (Grok-1) is computed over blocks of queries that see only the keys before them, and
the backward pass computes a block's probabilities again rather than keep them, so that memory grows with the sequence
and not with its square; without a cap the work is PyTorch's own fused attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelworks.model.layers import Linear, RMSNorm
from modelworks.model.support import rope_scaling_kind
from modelworks.spec.model import ModelSpec

QUERY_BLOCK = 64
"""Queries per block of soft-capped attention: large enough for the matmuls, small enough to skip most masked keys and
to keep a block's logits in the cache (at 512 positions a third faster than 128 or 256 on a CPU)."""


class Rotary(NamedTuple):
    """The rotation of each position: two tables (T, D) in fp32."""

    cosine: Tensor
    sine: Tensor


def rotary_frequencies(spec: ModelSpec, device: torch.device) -> Tensor:
    """The angle per position of each pair of a head's dimensions (D / 2), in fp32.

    `base ** (-2 i / D)` as in RoFormer (arXiv:2104.09864, eq. 15); `linear` divides by the factor; `llama3` divides
    the slow frequencies only, with a smooth passage between (Llama 3.1's release).
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    frequencies = 1.0 / spec.rope_base**exponents
    kind, scaling = rope_scaling_kind(spec), spec.rope_scaling or {}
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * frequencies / float(scaling["factor"])
    return frequencies


def rotary_tables(spec: ModelSpec, start: int, length: int, device: torch.device) -> Rotary:
    """The rotations of the positions `start` to `start + length`."""
    positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rotary_frequencies(spec, device)).repeat(1, 2)  # (T, D)
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the heads (B, heads, T, D) by their positions, in fp32, pairing dimension i with i + D / 2 (rotate-half)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * rotary.cosine + turned * rotary.sine).to(x.dtype)


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
        self.wq = Linear(spec.hidden, q_width, bias=spec.attention_bias)
        self.wk = Linear(spec.hidden, kv_width, bias=spec.attention_bias)
        self.wv = Linear(spec.hidden, kv_width, bias=spec.attention_bias)
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
        queries, keys = rotate(queries.transpose(1, 2), rotary), rotate(keys.transpose(1, 2), rotary)
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)
        if self.softcap is None:
            attended = fused_attention(queries, keys, values, self.scale)
        else:
            attended = softcap_attention(queries, keys, values, self.scale, self.softcap)
        output: Tensor = self.wo(attended.transpose(1, 2).reshape(batch, length, -1))  # (B, T, H)
        return output


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention by PyTorch's fused kernel.

    Parameters
    ----------
    queries
        (B, heads, T, D); the last of them stands at the last key's position.
    keys, values
        (B, KV, S, D) with S >= T.
    scale
        What logits are multiplied with.

    Returns
    -------
    Tensor
        (B, heads, T, D)
    """
    length, seen = queries.shape[2], keys.shape[2]
    mask = None
    if 1 < length < seen:
        mask = torch.ones(length, seen, dtype=torch.bool, device=queries.device).tril(seen - length)
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=length == seen and length > 1, scale=scale, enable_gqa=True
    )


def softcap_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> Tensor:
    """Causal attention with the logits `softcap * tanh(scale * q k / softcap)`, in fp32.

    Shapes as in `fused_attention`.
    """
    output: Tensor = _SoftcapAttention.apply(queries, keys, values, scale, softcap)  # type: ignore[no-untyped-call]
    return output


class _SoftcapAttention(torch.autograd.Function):
    """The forward pass keeps each query's log-sum-exp; the backward pass rebuilds a block's probabilities from it."""

    @staticmethod
    def forward(context: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> Tensor:
        folded = _fold(queries, keys.shape[1])  # (B, KV, G, T, D)
        output = torch.empty_like(folded)
        log_sums = folded.new_empty(folded.shape[:-1], dtype=torch.float32)  # (B, KV, G, T)
        offset = keys.shape[2] - queries.shape[2]
        for start, end in _blocks(queries.shape[2]):
            capped, _ = _capped_logits(folded[..., start:end, :], keys, offset + start, scale, softcap)
            largest = capped.amax(-1, keepdim=True)  # (B, KV, G * t, 1)
            weights = capped.sub_(largest).exp_()
            sums = weights.sum(-1, keepdim=True)
            block = (weights.to(values.dtype) @ values[:, :, : offset + end]).div_(sums)  # (B, KV, G * t, D)
            output[..., start:end, :] = block.view_as(folded[..., start:end, :])
            log_sums[..., start:end] = sums.log_().add_(largest).view(*log_sums.shape[:3], end - start)
        context.save_for_backward(queries, keys, values, output, log_sums)
        context.scale, context.softcap = scale, softcap
        return output.flatten(1, 2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, output, log_sums = context.saved_tensors
        folded, upstream = _fold(queries, keys.shape[1]), _fold(gradients[0], keys.shape[1])
        to_queries = torch.empty_like(folded)
        to_keys = torch.zeros_like(keys, memory_format=torch.contiguous_format, dtype=torch.float32)
        to_values = torch.zeros_like(to_keys)
        offset = keys.shape[2] - queries.shape[2]
        for start, end in _blocks(queries.shape[2]):
            seen = offset + end
            block = folded[..., start:end, :]
            capped, tangent = _capped_logits(block, keys, offset + start, context.scale, context.softcap)
            weights = capped.sub_(log_sums[..., start:end].flatten(2, 3).unsqueeze(-1)).exp_()  # (B, KV, G * t, s)
            above = upstream[..., start:end, :].flatten(2, 3)  # (B, KV, G * t, D)
            along = (above.float() * output[..., start:end, :].flatten(2, 3)).sum(-1, keepdim=True)
            to_values[:, :, :seen] += weights.to(above.dtype).transpose(-1, -2) @ above
            to_logits = (above @ values[:, :, :seen].transpose(-1, -2)).float().sub_(along).mul_(weights)
            # d tanh = 1 - tanh^2, and masked logits have no weight.
            to_logits.mul_(tangent.square_().neg_().add_(1.0)).mul_(context.scale)
            to_logits = to_logits.to(keys.dtype)
            to_block = to_logits @ keys[:, :, :seen]
            to_queries[..., start:end, :] = to_block.view_as(folded[..., start:end, :])
            to_keys[:, :, :seen] += to_logits.transpose(-1, -2) @ block.flatten(2, 3)
        return to_queries.flatten(1, 2), to_keys.to(keys.dtype), to_values.to(values.dtype), None, None


def _fold(heads: Tensor, kv_heads: int) -> Tensor:
    """(B, heads, T, D) as (B, KV, G, T, D): the G heads that share one key-value head stand together."""
    batch, count, length, width = heads.shape
    return heads.reshape(batch, kv_heads, count // kv_heads, length, width)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _capped_logits(block: Tensor, keys: Tensor, position: int, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """The capped and masked logits of a block of queries, and the hyperbolic tangents in them.

    Parameters
    ----------
    block
        Queries (B, KV, G, t, D), the first of which stands at `position`.
    keys
        (B, KV, S, D)

    Returns
    -------
    tuple
        Both (B, KV, G * t, position + t) in fp32.
    """
    groups, length = block.shape[2:4]
    seen = position + length
    logits = (block.flatten(2, 3) @ keys[:, :, :seen].transpose(-1, -2)).float()
    tangent = logits.mul_(scale / softcap).tanh_()
    hidden = torch.ones(length, length, dtype=torch.bool, device=block.device).triu(1)
    capped = tangent * softcap
    capped.view(*capped.shape[:2], groups, length, seen)[..., position:].masked_fill_(hidden, -torch.inf)
    return capped, tangent
