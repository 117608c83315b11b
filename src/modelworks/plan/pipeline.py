"""What a pipeline adds to its slowest stage: layers dealt to stages, bubbles, activations that travel and that wait.

Stages take micro batches one after the other, so a step lasts as long as the slowest stage needs for all of them, and
longer by the bubble: the time that the first micro batch takes to come to that stage and the last one to leave it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelworks.plan.layout import FloatArray, IntArray, Layouts

_INTERLEAVED, _ZERO_BUBBLE = 1, 2


@dataclass(frozen=True)
class Stages:
    """Layers of the first, of a middle, and of the last stage, each of shape (N,)."""

    first: IntArray
    middle: IntArray
    last: IntArray


def deal_layers(layers: int, candidates: Layouts) -> Stages:
    """Deal layers to stages in equal chunks; what is short of a multiple is taken from the ends.

    The ends have the embedding and the head to do as well, which is why engines give them fewer
    (`num_layers_in_first_pipeline_stage` and its twin in Megatron-Core). A stage of its own has all layers.
    """
    p, v = candidates.pipeline, candidates.virtual_stages
    middle = -(-layers // (p * v)) * v
    short = p * middle - layers
    from_first = np.minimum(short // 2, middle - 1)
    from_last = np.minimum(short - from_first, middle - 1)
    # With a remainder that the ends cannot give, inner stages stand empty of it; their time is not the slowest.
    first, last = middle - from_first, middle - from_last
    alone = p == 1
    return Stages(np.where(alone, layers, first), np.where(alone, layers, middle), np.where(alone, layers, last))


def bubble(
    candidates: Layouts, first: FloatArray, middle: FloatArray, last: FloatArray, weight_gradient: FloatArray
) -> FloatArray:
    """Seconds that the slowest stage of a step stands idle.

    Parameters
    ----------
    first, middle, last
        Forward and backward time of one micro batch on such a stage, shape (N,).
    weight_gradient
        The part of a middle stage's backward time that only its own weights need.

    Notes
    -----
    1F1B (Narayanan et al. 2019): every other stage's time once. Interleaved (Narayanan et al. 2021, section 2.2): that
    over the number of virtual stages. Zero bubble (Qi et al. 2023, arXiv:2401.10241, ZB-H1): less the weight
    gradients, twice, which fill the gaps.
    """
    p, v = candidates.pipeline, candidates.virtual_stages
    alone = p == 1
    both = first + last + (p - 2) * middle
    slowest = np.maximum(np.maximum(first, last), middle)
    others = np.where(alone, 0.0, np.maximum(both - slowest, 0.0))
    others = np.where(
        candidates.schedule == _ZERO_BUBBLE, np.maximum(others - 2 * (p - 1) * weight_gradient, 0.0), others
    )
    return others / v


def in_flight(candidates: Layouts, micro_batches: IntArray) -> FloatArray:
    """Micro batches whose activations the first stage holds at once, in units of its layers' whole activations.

    1F1B holds p of them; interleaving adds (p - 1) / (p v) of that (Korthikanti et al. 2022, section 4.2.3);
    zero-bubble H1 holds as many as 1F1B.
    """
    p, v = candidates.pipeline, candidates.virtual_stages
    held = np.where(v > 1, p * (1.0 + (p - 1.0) / (p * v)), p)
    return np.minimum(held, np.where(v > 1, np.maximum(micro_batches, 1), micro_batches))
