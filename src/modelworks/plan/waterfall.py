"""Where a step's time goes, from the devices' peak down to what is achieved, in points of MFU.

One idea: a step is a hundred points of what the devices could do in its time at their peak. The model's own FLOPs take
MFU of them; each reason takes the share of the step that it takes the time of. So the points add up to a hundred, and
no order of taking reasons away has to be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelworks.plan.planner import Candidate
from modelworks.spec.flops import attention_flop_per_token, forward_flop_per_token
from modelworks.spec.model import ModelSpec

REASON_NAMES: Mapping[str, tuple[str, str]] = {
    "matmul": ("matrix products below peak", "What matrix products take beyond their FLOPs at peak."),
    "attention": ("attention below peak", "What attention takes beyond its FLOPs at peak."),
    "compute": ("kernels below peak", "What matrix products and attention take beyond their FLOPs at peak."),
    "memory": ("memory traffic", "Norms, activations, residuals and embeddings, streamed at memory bandwidth."),
    "tensor": ("tensor-parallel exchange", "Exposed all-gathers and reduce-scatters inside layers."),
    "context": ("context-parallel exchange", "Exposed exchange of keys and values, or of heads."),
    "expert": ("expert exchange", "Exposed all-to-alls that take tokens to their experts and back."),
    "launch": ("kernel launches", "Devices waiting for the host to launch kernels."),
    "recompute": ("recomputation", "Activations computed again in the backward pass."),
    "bubble": ("pipeline bubble", "Stages that stand idle while the pipeline fills and drains."),
    "pipeline": ("sends between stages", "Exposed sends of activations and their gradients."),
    "data": ("data-parallel exchange", "Exposed reduction of gradients and gathering of weights over replicas."),
    "optimizer": ("optimizer", "Reading and writing weights, gradients and optimizer state."),
    "host": ("host, once a step", "What the host does once a step: data, logging, synchronisation."),
    "jitter": ("slowest rank", "All ranks waiting for the slowest of them."),
    "other": ("all other reasons", "Reasons of less than 0.1 points each."),
}
"""What a reason is called, and what it means."""
MEMORY_NAMES: Mapping[str, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits",
    "buffers": "gathered weights, buffers",
    "framework": "framework, fragmentation",
}


@dataclass(frozen=True)
class Loss:
    """One reason why a step isn't as fast as the devices' peak allows."""

    reason: str
    seconds: float
    points: float
    """Of a hundred: the share of the step."""

    @property
    def name(self) -> str:
        """What it is called."""
        return REASON_NAMES.get(self.reason, (self.reason, ""))[0]

    @property
    def meaning(self) -> str:
        """What it is, in a sentence."""
        return REASON_NAMES.get(self.reason, ("", ""))[1]


def waterfall(candidate: Candidate, model: ModelSpec, seq_len: int) -> list[Loss]:
    """The losses of a layout, the largest first; their points and the layout's MFU in per cent add up to 100.

    Matrix products and attention lose what they take beyond their own FLOPs at peak (`spec.flops`). Where the two
    cannot be told apart, since one of them takes less than it is counted for (a sliding window), they are one loss.
    """
    step, reasons = candidate.step_time_s, dict(candidate.reasons)
    ideal = candidate.mfu * step
    share = model.layers * attention_flop_per_token(model, seq_len) / forward_flop_per_token(model, seq_len)
    matmul, attention = reasons.pop("matmul") - ideal * (1 - share), reasons.pop("attention") - ideal * share
    if matmul >= 0 and attention >= 0:
        reasons |= {"matmul": matmul, "attention": attention}
    else:
        reasons["compute"] = matmul + attention
    losses = [Loss(reason, seconds, 100 * seconds / step) for reason, seconds in reasons.items() if seconds]
    return sorted(losses, key=lambda loss: -loss.points)


def differences(best: Candidate, other: Candidate) -> list[tuple[str, float]]:
    """What another layout spends more (or, negative, less) seconds on than the best one, the largest first."""
    found = [(reason, seconds - best.reasons.get(reason, 0.0)) for reason, seconds in other.reasons.items()]
    return sorted(found, key=lambda item: -abs(item[1]))


def folded(losses: Sequence[Loss], least: float = 0.1) -> list[Loss]:
    """Losses with those of fewer points than `least` put together as one, at the end; the sum stays."""
    large = [loss for loss in losses if abs(loss.points) >= least]
    small = [loss for loss in losses if abs(loss.points) < least]
    if len(small) < 2:
        return list(losses)
    return [*large, Loss("other", sum(loss.seconds for loss in small), sum(loss.points for loss in small))]
