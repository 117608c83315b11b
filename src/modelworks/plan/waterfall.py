"""How a plan's waterfall and memory are told: names, meanings, the largest loss first, small ones together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelworks.plan.planner import Loss

MEANINGS: Mapping[str, str] = {
    "matmul": "What matrix products take beyond their FLOPs at peak.",
    "attention": "What attention takes beyond its FLOPs at peak.",
    "memory": "Norms, activations, residuals and embeddings, streamed at memory bandwidth.",
    "tensor": "All-gathers and reduce-scatters inside layers that nothing hides.",
    "context": "Exchange of keys and values, or of heads, that nothing hides.",
    "expert": "All-to-alls that take tokens to their experts and back, as far as nothing hides them.",
    "launch": "Devices waiting for the host to launch kernels.",
    "vision": "What the vision tower takes beyond its FLOPs at peak, stages without it included.",
    "recompute": "Activations computed again in the backward pass.",
    "bubble": "Stages that stand idle while the pipeline fills and drains.",
    "pipeline": "Sends of activations and their gradients that nothing hides.",
    "data": "Reduction of gradients and gathering of weights over replicas, as far as nothing hides them.",
    "optimizer": "Reading and writing weights, gradients and optimizer state.",
    "host": "What the host does once a step: data, logging, synchronisation.",
    "jitter": "All ranks waiting for the slowest of them.",
}
"""What each loss is."""
MEMORY_NAMES: Mapping[str, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits",
    "buffers": "gathered weights, buffers",
    "framework": "framework, fragmentation",
}
"""What each component of memory is called."""
_LEAST = 0.001


def largest_first(losses: Sequence[Loss]) -> list[Loss]:
    """Losses in the order of their size; several below a tenth of a point are one, at the end. Their sum stays."""
    large = sorted((loss for loss in losses if abs(loss.share) >= _LEAST), key=lambda loss: -loss.share)
    small = [loss for loss in losses if 0 < abs(loss.share) < _LEAST]
    if len(small) > 1:
        return [*large, Loss("other", "all other reasons", sum(loss.share for loss in small))]
    return large + small
