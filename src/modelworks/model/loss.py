"""Cross-entropy of a large vocabulary without its logits ever standing in memory whole.

The logits of a chunk of tokens are computed, turned into their own gradient at once, and multiplied into the
gradients of the hidden states and of the head's matrix. The backward pass then only scales what the forward pass
left, so the head's matmul is never computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 512
"""Tokens per chunk: 16 MiB of fp32 logits for a vocabulary of 8,192."""
IGNORED = -1
"""The target of a token that doesn't count."""


def head_logits(hidden: Tensor, weight: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    """Logits (N, V) in fp32 of hidden states (N, H) under the head's matrix (V, H)."""
    return _scaled((hidden @ weight.t()).float(), multiplier, softcap)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Mean cross-entropy, in nats, of the targets that count.

    Parameters
    ----------
    hidden
        (N, H)
    weight
        The head's matrix (V, H), of the same dtype.
    targets
        (N) int64; `IGNORED` doesn't count. With no target that counts the loss is 0.
    multiplier, softcap
        What the logits are multiplied with, and then capped by (`softcap * tanh(logits / softcap)`).

    Returns
    -------
    Tensor
        A scalar in fp32.
    """
    counts = targets != IGNORED
    if not bool(counts.all()):  # The head is computed where something is to be learnt, and nowhere else.
        hidden, targets = hidden[counts], targets[counts]
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, multiplier, softcap
    )
    return loss


def chunked_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    multiplier: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability (N) in fp32, in nats, of each target (N) after the hidden states (N, H) under the head (V, H).

    For losses that weigh tokens one by one, such as of preferences. The backward pass computes a chunk's logits anew.
    """
    chunks = [
        checkpoint(_log_probabilities, *parts, weight, multiplier, softcap, temperature, use_reentrant=False)
        for parts in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    ]
    return torch.cat(chunks)


def _log_probabilities(
    hidden: Tensor, targets: Tensor, weight: Tensor, multiplier: float, softcap: float | None, temperature: float
) -> Tensor:
    logits = (hidden @ weight.t()).float() * multiplier
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if temperature != 1.0:
        logits = logits / temperature
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float, softcap: float | None
    ) -> Tensor:
        for_hidden, for_weight = context.needs_input_grad[:2]
        wanted = for_hidden or for_weight
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        counted = (targets != IGNORED).sum().clamp(min=1).float()
        to_hidden = torch.empty_like(hidden) if for_hidden else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        room = hidden.new_empty(min(CHUNK, len(hidden)), len(weight))
        for start in range(0, len(hidden), CHUNK):
            here = slice(start, start + CHUNK)
            rows, ids = hidden[here], targets[here].clamp(min=0).unsqueeze(1)  # (n, H), (n, 1)
            counts = (targets[here] != IGNORED).unsqueeze(1)  # (n, 1)
            logits = _scaled(torch.mm(rows, weight.t(), out=room[: len(rows)]).float(), multiplier, softcap)  # (n, V)
            slope = 1.0 - (logits / softcap).square_() if wanted and softcap is not None else None
            of_targets, largest = logits.gather(1, ids), logits.amax(1, keepdim=True)
            sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += (sums.log() + largest - of_targets).mul_(counts).sum()
            if not wanted:
                continue
            scale = counts * (multiplier / counted)
            logits.mul_(scale / sums).scatter_add_(1, ids, -scale)
            to_logits = (logits if slope is None else logits.mul_(slope)).to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(to_logits, weight, out=to_hidden[here])
            if to_weight is not None:
                _add_product(to_weight, to_logits.t(), rows)
        context.save_for_backward(to_hidden, None if to_weight is None else to_weight.to(weight.dtype))
        return total / counted

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight = context.saved_tensors
        scale = gradients[0]
        by_scale = [None if part is None else part * scale.to(part.dtype) for part in (to_hidden, to_weight)]
        return *by_scale, None, None, None


def _scaled(logits: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    """Logits multiplied and capped, in their place."""
    logits = logits if multiplier == 1.0 else logits.mul_(multiplier)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to an fp32 total, in its place where the factors are fp32 too."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
