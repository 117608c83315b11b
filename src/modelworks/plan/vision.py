"""What a vision tower adds to the first pipeline stage: the time of its passes and what it keeps for the backward pass.

Two ideas. A vision transformer is a transformer, so its layers are worked out as the decoder's are, over the tiles of a
micro batch as sequences of their own. And it shares the decoder's devices: tensor parallelism splits its heads, its
feed-forward networks and its connector as it does the decoder's; data parallelism splits the images with their
sequences; pipeline stages beyond the first have none of it; context-parallel ranks each do all of their sequences'
images (as Megatron-LM's multimodal models do), and what lies between its parallel regions is whole on every rank.
It is trained in bf16 where the decoder is in something narrower, whatever the decoder recomputes is recomputed in it
too, and Muon's own work for its matrices is not counted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from modelworks.plan.block import COMPONENTS, LayerTimes, Setting, Work
from modelworks.plan.layout import PRECISIONS, FloatArray, Layouts
from modelworks.spec.model import VisionSpec

_VISION = COMPONENTS.index("vision")
_NARROW = [PRECISIONS.index(name) for name in ("fp8", "fp4")]


def tower_setting(setting: Setting, vision: VisionSpec) -> Setting:
    """The setting of the vision transformer: its sequences are the patches of a tile."""
    return replace(setting, model=vision.transformer, seq_len=vision.patches)


def tower_layouts(vision: VisionSpec, layouts: Layouts) -> Layouts:
    """Layouts of the decoder as the vision transformer has them."""
    one = np.ones(len(layouts), dtype=np.int64)
    return layouts.with_(
        micro_batch=layouts.micro_batch * vision.tiles_per_sequence,
        context=one,
        expert=one,
        expert_tensor=one,
        sequence_parallel=np.zeros(len(layouts), dtype=np.bool_),
        precision=np.where(np.isin(layouts.precision, _NARROW), PRECISIONS.index("bf16"), layouts.precision),
    )


def tower_times(setting: Setting, shapes: Layouts) -> LayerTimes | None:
    """Times of a vision tower and its connector for one micro batch, for U shapes; None without a tower.

    All of them stand in the component `vision`.
    """
    vision = setting.model.vision
    if vision is None:
        return None
    work = Work(tower_setting(setting, vision), tower_layouts(vision, shapes))
    layer = work.layer(work.attention_block(), work.dense_ffn())
    forward, backward = _ends(work, vision, shapes, setting.model.hidden)

    def counted(seconds: FloatArray) -> FloatArray:
        times = work.empty()
        times[_VISION] = seconds
        return times

    return LayerTimes(
        forward=counted(vision.layers * layer.totals[0] + forward),
        backward=counted(vision.layers * layer.totals[1] + backward),
        recompute=tuple(counted(vision.layers * kind) for kind in layer.again),
        weight_gradient=vision.layers * layer.weight_gradient,
    )


def _ends(work: Work, vision: VisionSpec, shapes: Layouts, width: int) -> tuple[FloatArray, FloatArray]:
    """Seconds forward and backward of the patch embedding, the last normalisation and the connector.

    Pixels need no gradient. The connector's maps are split over the tensor-parallel ranks, which exchange its result
    once in each direction.
    """
    patches, e = work.tokens, work.activation_bytes
    hidden, pixels = np.full(work.size, float(vision.hidden)), np.full(work.size, float(vision.patch_width))
    forward, backward = work.product(patches, hidden, pixels), work.product(hidden, pixels, patches)
    tokens = shapes.micro_batch * vision.tokens_per_sequence / work.one
    for out, of in vision.connector_maps(width):
        n, k = np.full(work.size, float(out)) / work.tensor, np.full(work.size, float(of))
        forward = forward + work.product(tokens, n, k)
        backward = backward + work.product(tokens, k, n) + work.product(n, k, tokens)
    exchange = work.fabric.all_reduce(tokens * width * e, work.tensor, work.one)
    moved = patches * vision.hidden * e
    # Positions: one read, one written. Norm: the same, and backward three. Joining patches: read and written.
    forward_pass = work.of(8, matmul=forward, memory=work.stream(6 * moved, 3.0), tensor=exchange)
    backward_pass = work.of(12, matmul=backward, memory=work.stream(7 * moved, 3.0), tensor=exchange)
    launch, own = work.software.launch_s, work.kernels.host_is_device
    return forward_pass.settled(launch, 0.0, own).sum(axis=0), backward_pass.settled(launch, 0.0, own).sum(axis=0)
