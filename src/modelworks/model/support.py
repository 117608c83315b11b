"""Which fields of a model spec the decoder implements, and one sentence for each that it doesn't.

A spec describes more networks than the decoder builds, since the planner sizes them all. What isn't implemented is
refused here by name, before a parameter is made: a field that was quietly left out would give a different network.
"""

from __future__ import annotations

from collections.abc import Iterator

from modelworks.spec.errors import InputError
from modelworks.spec.model import ModelSpec


def refuse_unsupported(spec: ModelSpec) -> None:
    """Raise an `InputError` that names the first field of `spec` which the decoder doesn't implement."""
    for field, value, accepted in _unsupported(spec):
        raise InputError(f"model.{field} = {value!r} is not implemented by the decoder: {accepted} is accepted")


def _unsupported(spec: ModelSpec) -> Iterator[tuple[str, object, str]]:
    """Each field that stands in the way: its name, its value and what would be accepted instead."""
    if spec.vision is not None:
        yield "vision", spec.vision.model_dump(exclude_none=True), "leaving it out"
    if spec.latent_attention is not None:
        yield "latent_attention", spec.latent_attention.model_dump(), "leaving it out"
    if spec.position != "rope":
        yield "position", spec.position, "'rope'"
    if spec.norm != "rms":
        yield "norm", spec.norm, "'rms'"
    if not spec.gated_mlp:
        yield "gated_mlp", spec.gated_mlp, "true"
    if spec.moe is None:
        return
    if spec.mlp_bias:
        yield "mlp_bias", spec.mlp_bias, "false beside experts"
    if spec.moe.shared_experts:
        yield "moe.shared_experts", spec.moe.shared_experts, "0"
    if spec.moe.scoring != "softmax":
        yield "moe.scoring", spec.moe.scoring, "'softmax'"
    if spec.moe.routed_multiplier != 1.0:
        yield "moe.routed_multiplier", spec.moe.routed_multiplier, "1.0"
