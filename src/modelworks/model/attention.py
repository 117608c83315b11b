"""Grouped-query attention with rotary positions, optionally soft-capped, over a key-value cache.

Three ideas: heads that share a key-value head are folded into its rows, so that keys and values are never repeated;
what PyTorch's own fused attention doesn't know (a soft cap `c * tanh(logits / c)` as in Grok-1, a window, documents
that don't see each other) is computed over blocks of queries and of the keys that they see, and the backward pass
computes a block's probabilities again rather than keep them, so that memory grows with the sequence and not with its
square; and whatever is hidden from a query stands before the first key that it sees or behind itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelworks.model.layers import Linear, RMSNorm
from modelworks.model.rotary import Rotary, rotate
from modelworks.spec.model import ModelSpec

QUERY_BLOCK = 64
"""Queries per block: large enough for the matmuls, small enough to skip most masked keys and to keep a block's logits
in the cache (at 512 positions a third faster than 128 or 256 on a CPU)."""
KEY_BLOCK = 4096
"""Keys per block, beyond which a block's logits would take more memory the longer the sequence is."""
MASKED = 512
"""Keys up to which PyTorch's fused kernel, with a mask for all, is faster where documents share keys, so that there is
little to skip (``benchmarks/attention_shared.py``)."""
LEAST = 1e30
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
        attended = self.attend(queries, keys, values, rotary.first, rotary.temperature, rotary.shared)
        output: Tensor = self.wo(attended.transpose(1, 2).reshape(batch, length, -1))  # (B, T, H)
        return output

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        first: Tensor | None = None,
        temperature: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of the last positions' queries; shapes as in `attention`."""
        return attention(queries, keys, values, self.scale, self.softcap, self.window, first, temperature, shared)


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    first: Tensor | None = None,
    temperature: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """Causal attention, by PyTorch's fused kernel where that knows the task, else in blocks (`blockwise_attention`).

    Parameters
    ----------
    queries
        (B, heads, T, D); the last of them stands at the last key's position.
    keys, values
        (B, KV, S, D) with S >= T.
    scale
        What logits are multiplied with.
    softcap
        `c` in `c * tanh(logits / c)`; None for none.
    window
        How many keys a query sees, its own the last of them; None for all.
    first
        (B, T) int64: the first key that a query sees, where that is not the sequence's: its document's.
    temperature
        (T) in fp32: what a query's logits are multiplied with after the cap; None for 1.
    shared
        (B, T, 2) int64: the keys before `first`, from one up to another, that a query sees as well; None for none.

    Returns
    -------
    Tensor
        (B, heads, T, D)
    """
    if window is not None and keys.shape[2] > window:
        # Keys that no query sees are left out, so that a cached step costs the window and not the sequence.
        seen = min(keys.shape[2], queries.shape[2] + window - 1)
        first, shared = (
            None if places is None else (places - (keys.shape[2] - seen)).clamp(min=0) for places in (first, shared)
        )
        keys, values = keys[:, :, -seen:], values[:, :, -seen:]
    length, seen = queries.shape[2], keys.shape[2]
    unlimited = first is None and (window is None or window >= seen or length == 1)
    if softcap is None and temperature is None and unlimited and length in (1, seen):
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=length > 1, scale=scale, enable_gqa=True)
    plain = softcap is None and temperature is None and window is None
    if plain and shared is not None and first is not None and length == seen <= MASKED:
        mask = _visible(first, shared)
        return F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=True)
    return blockwise_attention(queries, keys, values, scale, softcap, window, first, temperature, shared)


def blockwise_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    first: Tensor | None = None,
    temperature: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """Attention over blocks of queries and of the keys that they see, its softmax in fp32; arguments as in `attention`.

    The sums of a row's exponentials are kept up from block to block of keys (Rabe & Staats 2021, arXiv:2112.05682;
    FlashAttention, arXiv:2205.14135), forward and backward, so that memory grows with the sequence.
    """
    output: Tensor
    output, _ = _forward(queries, keys, values, scale, softcap, window, first, temperature, shared)
    return output


def _visible(first: Tensor, shared: Tensor) -> Tensor:
    """Which keys a query sees (B, 1, T, T), of sequences whose queries and keys are the same positions."""
    places = torch.arange(first.shape[1], device=first.device)
    own = places >= first[:, :, None]
    since, until = shared[..., None].unbind(2)
    return ((own | (places >= since) & (places < until)) & (places <= places[:, None]))[:, None]


@dataclass(frozen=True)
class _Task:
    """What attention is asked for, beside its tensors; shapes as in `attention`."""

    scale: float
    softcap: float | None
    window: int | None
    first: Tensor | None
    temperature: Tensor | None
    shared: Tensor | None
    length: int
    seen: int

    @property
    def bounded(self) -> bool:
        """Whether a row's exponentials can be summed as they are, without its largest logit being subtracted."""
        return self.softcap is not None and self.temperature is None and self.softcap <= LARGEST_EXPONENT

    def blocks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Blocks of queries, each with the blocks of keys that any of its queries sees."""
        offset = self.seen - self.length
        for start in range(0, self.length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, self.length)
            begin = 0 if self.window is None else max(0, offset + start + 1 - self.window)
            if self.first is not None:
                begins = self.first[:, start:end]
                if self.shared is not None:
                    since, until = self.shared[:, start:end].unbind(-1)
                    begins = torch.where(since < until, torch.minimum(begins, since), begins)
                begin = max(begin, int(begins.min()))
            stop = offset + end
            keys = [slice(left, min(left + KEY_BLOCK, stop)) for left in range(begin, stop, KEY_BLOCK)]
            yield slice(start, end), keys

    def hidden(self, rows: slice, keys: slice) -> Tensor | None:
        """Which keys of a block stand outside of what its queries see: (1 or B, 1, 1, t, s); None where none does."""
        offset = self.seen - self.length
        device = None if self.first is None else self.first.device
        found = None
        causal = keys.stop > offset + rows.start + 1
        windowed = self.window is not None and keys.start < offset + rows.stop - self.window
        if causal or windowed:
            apart = torch.arange(offset + rows.start, offset + rows.stop, device=device)[:, None] - torch.arange(
                keys.start, keys.stop, device=device
            )  # (t, s): how far back a key stands
            found = apart < 0
            if self.window is not None:
                found = found | (apart >= self.window)
            found = found[None]
        if self.first is not None:
            begins = self.first[:, rows]
            if int(begins.max()) > keys.start:
                places = torch.arange(keys.start, keys.stop, device=device)
                earlier = places < begins[:, :, None]  # (B, t, s)
                if self.shared is not None:
                    since, until = self.shared[:, rows, :, None].unbind(2)
                    earlier &= (places < since) | (places >= until)
                found = earlier if found is None else found | earlier
        return None if found is None else found[:, None, None]

    def logits(self, block: Tensor, keys: Tensor, rows: slice, keep: bool = False) -> tuple[Tensor, Tensor | None]:
        """The logits (B, KV, G * t, s) in fp32 of a block of queries (B, KV, G * t, D); `keep` gives tangents too."""
        products = (block @ keys.transpose(-1, -2)).float()
        if self.softcap is None:
            return self.tempered(products.mul_(self.scale), rows), None
        tangents = products.mul_(self.scale / self.softcap).tanh_()
        logits = tangents * self.softcap if keep else tangents.mul_(self.softcap)
        return self.tempered(logits, rows), tangents if keep else None

    def tempered(self, logits: Tensor, rows: slice) -> Tensor:
        """Rows of a block multiplied with their temperatures, in place."""
        if self.temperature is None:
            return logits
        by_query = _by_query(logits, rows)
        return by_query.mul_(self.temperature[rows, None]).flatten(2, 3)

    def hide(self, weights: Tensor, rows: slice, keys: slice, value: float) -> Tensor:
        """Put a value, in place, where a block of (B, KV, G * t, s) stands for keys that aren't seen."""
        hidden = self.hidden(rows, keys)
        if hidden is not None:
            _by_query(weights, rows).masked_fill_(hidden.to(weights.device), value)
        return weights


@torch.library.custom_op("modelworks::blockwise_attention", mutates_args=())
def _forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    first: Tensor | None,
    temperature: Tensor | None,
    shared: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output (B, heads, T, D), and each query's log-sum-exp (B, KV, G, T) in fp32 for the backward pass."""
    task = _Task(scale, softcap, window, first, temperature, shared, queries.shape[2], keys.shape[2])
    folded = _fold(queries, keys.shape[1])  # (B, KV, G, T, D)
    output = torch.empty_like(folded, memory_format=torch.contiguous_format)
    log_sums = folded.new_empty(folded.shape[:-1], dtype=torch.float32)
    for rows, parts in task.blocks():
        block = folded[..., rows, :].flatten(2, 3)  # (B, KV, G * t, D)
        total: Tensor | None = None
        sums = largest = block.new_zeros((), dtype=torch.float32)
        for part in parts:
            weights, _ = task.logits(block, keys[:, :, part], rows)  # (B, KV, G * t, s)
            if task.bounded:
                task.hide(weights.exp_(), rows, part, 0.0)
            else:
                task.hide(weights, rows, part, -math.inf)
                # A row of which no key of this block is seen has no largest logit; 0 stands for it.
                now = weights.amax(-1, keepdim=True).clamp_(min=-LEAST)
                now = now if total is None else torch.maximum(now, largest)
                weights.sub_(now).exp_()
                if total is not None:
                    shrunk = (largest - now).exp_()
                    total.mul_(shrunk)
                    sums = sums * shrunk
                largest = now
            attended = (weights.to(values.dtype) @ values[:, :, part]).float()
            total = attended if total is None else total.add_(attended)
            sums = sums + weights.sum(-1, keepdim=True)
        assert total is not None
        output[..., rows, :] = total.div_(sums).view_as(folded[..., rows, :])
        log_sums[..., rows] = sums.log().add_(largest).view(*log_sums.shape[:3], -1)
    return output.flatten(1, 2), log_sums


@torch.library.custom_op("modelworks::blockwise_attention_backward", mutates_args=())
def _backward_op(
    gradient: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    log_sums: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    first: Tensor | None,
    temperature: Tensor | None,
    shared: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values; a block's probabilities are rebuilt from its log-sum-exp."""
    task = _Task(scale, softcap, window, first, temperature, shared, queries.shape[2], keys.shape[2])
    folded, upstream, attended = (_fold(tensor, keys.shape[1]) for tensor in (queries, gradient, output))
    to_queries = torch.empty_like(folded, memory_format=torch.contiguous_format)
    to_keys = torch.zeros_like(keys, memory_format=torch.contiguous_format, dtype=torch.float32)
    to_values = torch.zeros_like(to_keys)
    for rows, parts in task.blocks():
        block, above, result, sums = (
            tensor[..., rows, :].flatten(2, 3) for tensor in (folded, upstream, attended, log_sums.unsqueeze(-1))
        )  # (B, KV, G * t, D), and (B, KV, G * t, 1)
        along = (above.float() * result).sum(-1, keepdim=True)
        to_block = torch.zeros_like(block, dtype=torch.float32)
        for part in parts:
            logits, tangents = task.logits(block, keys[:, :, part], rows, keep=True)  # (B, KV, G * t, s)
            weights = task.hide(logits.sub_(sums).exp_(), rows, part, 0.0)
            to_values[:, :, part] += weights.to(above.dtype).transpose(-1, -2) @ above
            to_logits = (above @ values[:, :, part].transpose(-1, -2)).float().sub_(along).mul_(weights)
            to_logits = task.tempered(to_logits, rows)
            if tangents is not None:
                # d tanh = 1 - tanh^2; the logits' scale is applied to the products, which are smaller.
                to_logits = to_logits.sub_(tangents.square_().mul_(to_logits))
            to_logits = to_logits.to(keys.dtype)
            to_block += to_logits @ keys[:, :, part]
            to_keys[:, :, part] += to_logits.transpose(-1, -2) @ block
        to_queries[..., rows, :] = to_block.mul_(scale).view_as(folded[..., rows, :])
    return to_queries.flatten(1, 2), to_keys.mul_(scale).to(keys.dtype), to_values.to(values.dtype)


@_forward.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _width = queries.shape
    log_sums = queries.new_empty(batch, keys.shape[1], heads // keys.shape[1], length, dtype=torch.float32)
    return torch.empty_like(queries, memory_format=torch.contiguous_format), log_sums


@_backward_op.register_fake
def _(gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    empty = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (queries, keys, values)]
    return empty[0], empty[1], empty[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[6:])  # PyTorch passes these three by name
    ctx.numbers = inputs[3:6]


def _backward(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *kept, first, temperature, shared = context.saved_tensors
    found = _backward_op(gradient, *kept, *context.numbers, first, temperature, shared)
    return *found, None, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_keep)


def _by_query(block: Tensor, rows: slice) -> Tensor:
    """(B, KV, G * t, s) of t queries as (B, KV, G, t, s), in the same memory."""
    return block.view(*block.shape[:2], -1, rows.stop - rows.start, block.shape[-1])


def _fold(heads: Tensor, kv_heads: int) -> Tensor:
    """(B, heads, T, D) as (B, KV, G, T, D): the G heads that share one key-value head stand together."""
    batch, count, length, width = heads.shape
    return heads.reshape(batch, kv_heads, count // kv_heads, length, width)
