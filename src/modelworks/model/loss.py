"""Cross-entropy of a large vocabulary without its logits ever standing in memory whole.

The logits of a chunk of tokens are computed, turned into their own gradient at once, and multiplied into the
gradients of the hidden states and of the head's matrix. The backward pass then only scales what the forward pass
left, so the head's matmul is never computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 512
"""Tokens per chunk: 16 MiB of fp32 logits for a vocabulary of 8,192."""
IGNORED = -1
"""The target of a token that doesn't count."""


def head_logits(hidden: Tensor, weight: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    """Logits (N, V) in fp32 of hidden states (N, H) under the head's matrix (V, H)."""
    logits = (hidden @ weight.t()).float()
    if multiplier != 1.0:
        logits = logits.mul_(multiplier)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


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
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, multiplier, softcap
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float, softcap: float | None
    ) -> Tensor:
        wanted = any(context.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        counted = (targets != IGNORED).sum().clamp(min=1).float()
        to_hidden = torch.empty_like(hidden) if wanted else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        for start in range(0, len(hidden), CHUNK):
            here = slice(start, start + CHUNK)
            counts = targets[here] != IGNORED
            wanted_ids = targets[here].clamp(min=0).unsqueeze(1)  # (n, 1)
            logits = head_logits(hidden[here], weight, multiplier, softcap)  # (n, V)
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted_ids)).squeeze(1).mul(counts).sum()
            if to_hidden is None or to_weight is None:
                continue
            slope = None if softcap is None else 1.0 - (logits / softcap).square_()
            scale = (counts / counted * multiplier).unsqueeze(1)  # (n, 1)
            to_logits = logits.sub_(log_sum).exp_()
            to_logits.scatter_add_(1, wanted_ids, torch.full_like(log_sum, -1.0)).mul_(scale)
            to_logits = (to_logits if slope is None else to_logits.mul_(slope)).to(hidden.dtype)
            torch.mm(to_logits, weight, out=to_hidden[here])
            to_weight += to_logits.t() @ hidden[here]
        if to_hidden is not None and to_weight is not None:
            context.save_for_backward(to_hidden, to_weight.to(weight.dtype))
        return total / counted

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight = context.saved_tensors
        scale = gradients[0]
        return to_hidden * scale.to(to_hidden.dtype), to_weight * scale.to(to_weight.dtype), None, None, None
