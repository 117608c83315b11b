"""What one optimizer step takes under many layouts at once: time by reason, memory, model FLOPs utilisation.

`evaluate` puts the parts together: layers (`block`), the pipeline over them (`pipeline`), the reduction of gradients and
the gathering of sharded weights over replicas, the optimizer, and what the slowest of many ranks costs. It is pure and
vectorised: candidates are arrays, and layers are worked out once for each different shape among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelworks.plan.block import COMPONENTS, BlockTimes, LayerTimes, Setting, block_times, shape_keys
from modelworks.plan.layout import PRECISIONS, BoolArray, FloatArray, IntArray, Layouts, fits_model
from modelworks.plan.memory import (
    MEMORY,
    StageParameters,
    dense_layers_of,
    device_parameters,
    memory_bytes,
    stage_parameters,
)
from modelworks.plan.pipeline import Stages, bubble, deal_layers
from modelworks.spec.flops import training_flop_per_token

REASONS = (*COMPONENTS, "recompute", "bubble", "pipeline", "data", "optimizer", "host", "jitter")
"""What a step's time goes to: a layer's components, work done again, idle stages, activations between stages, exposed
communication over replicas, the optimizer, the host once a step, waiting for the slowest rank."""
_RECOMPUTE = len(COMPONENTS)


@dataclass(frozen=True)
class Evaluation:
    """Steps under N layouts."""

    layouts: Layouts
    step_time_s: FloatArray
    reasons: FloatArray
    """Seconds by `REASONS`, shape (K, N); they add up to the step."""
    memory: FloatArray
    """Bytes by `memory.MEMORY` on a device of the fullest stage, shape (K, N)."""
    fits: BoolArray
    """Whether a candidate divides model and batch, and its memory is there."""
    mfu: FloatArray
    """Model FLOPs over what the devices' peak would do in the step's time; recomputation isn't counted."""
    tokens_per_s: FloatArray

    @property
    def memory_bytes(self) -> FloatArray:
        """All of a device's memory, shape (N,)."""
        total: FloatArray = self.memory.sum(axis=0)
        return total


def evaluate(
    setting: Setting, global_batch: int | IntArray, candidates: Layouts, memory_limit: float | None = None
) -> Evaluation:
    """Evaluate one optimizer step of `global_batch` sequences (one number, or one for each) under each candidate.

    Candidates that don't divide the model or the batch get a time as if they did, and `fits` is false.
    """
    model, c = setting.model, candidates
    shapes, which = shape_keys(c)
    block = block_times(setting, shapes)
    micro_batches = np.maximum(1, global_batch // np.maximum(1, c.data * c.micro_batch))
    stages = deal_layers(model.layers, c)
    times = _Stages(setting, c, block, which, stages)

    slowest, per_batch = times.slowest()
    m = micro_batches.astype(np.float64)
    reasons = np.zeros((len(REASONS), len(c)))
    reasons[: _RECOMPUTE + 1] = slowest * m
    totals = [forward.sum(axis=0) + backward.sum(axis=0) for forward, backward in times.each]
    idle = bubble(c, totals[0], totals[1], totals[2], times.weight_gradient)
    reasons[REASONS.index("bubble")] = idle
    reasons[REASONS.index("pipeline")] = _sends(setting, c, block.boundary_bytes[which], m)
    parameters = stage_parameters(model, c, stages)
    reasons[REASONS.index("data")] = _data_parallel(setting, c, parameters, times, m)
    reasons[REASONS.index("optimizer")] = _optimizer(setting, c, parameters)
    reasons[REASONS.index("host")] = setting.software.step_host_s
    before = reasons.sum(axis=0)
    jitter = setting.calibration.jitter_per_doubling if setting.device.kind == "gpu" else 0.0
    reasons[REASONS.index("jitter")] = before * jitter * np.log2(np.maximum(c.devices, 1))
    step = reasons.sum(axis=0)

    memory = memory_bytes(setting, c, stages, micro_batches)
    limit = setting.device.memory_bytes if memory_limit is None else memory_limit
    fits = fits_model(model, setting.seq_len, global_batch, c) & (memory.sum(axis=0) <= limit)
    tokens = np.asarray(global_batch, dtype=np.float64) * setting.seq_len
    flop = training_flop_per_token(model, setting.seq_len) * tokens
    peaks = np.array([setting.device.peak_flops.get(name, np.nan) for name in PRECISIONS])
    mfu = flop / step / (peaks[c.precision] * c.devices)
    return Evaluation(c, step, reasons, memory, fits, mfu, tokens / step)


class _Stages:
    """Times of a micro batch in the first, a middle and the last stage, gathered from the shapes' layers."""

    def __init__(self, setting: Setting, c: Layouts, block: BlockTimes, which: IntArray, stages: Stages) -> None:
        self.setting, self.c, self.block, self.which = setting, c, block, which
        model = setting.model
        alone = c.pipeline == 1
        self.parts: list[tuple[FloatArray, FloatArray]] = []
        """Per stage: times by component with recomputation as a last row, and the forward part's sum."""
        self.each: list[tuple[FloatArray, FloatArray]] = []
        for kind, layers in (("first", stages.first), ("middle", stages.middle), ("last", stages.last)):
            dense = dense_layers_of(model, c, kind, layers)
            forward = self._layers("forward", dense, layers - dense)
            backward = self._layers("backward", dense, layers - dense)
            again = self._recomputed(dense, layers - dense)
            if kind == "first":
                forward = forward + block.embedding[:, which]
            if kind == "last":
                forward = forward + block.head_forward[:, which] + np.where(alone, block.embedding[:, which], 0.0)
                backward = backward + block.head_backward[:, which]
            elif kind == "first":
                forward = forward + np.where(alone, block.head_forward[:, which], 0.0)
                backward = backward + np.where(alone, block.head_backward[:, which], 0.0)
            both = np.concatenate([forward + backward, again[None, :]])
            self.parts.append((both, forward.sum(axis=0)))
            self.each.append((forward, np.concatenate([backward, again[None, :]])))
        middle = stages.middle.astype(np.float64)
        layer = block.experts or block.dense
        assert layer is not None
        self.weight_gradient = middle * layer.weight_gradient[which]

    def _layers(self, what: str, dense: IntArray, experts: IntArray) -> FloatArray:
        out = np.zeros((len(COMPONENTS), len(self.c)))
        if self.block.dense is not None:
            out += getattr(self.block.dense, what)[:, self.which] * dense
        if self.block.experts is not None:
            out += getattr(self.block.experts, what)[:, self.which] * experts
        return out

    def _recomputed(self, dense: IntArray, experts: IntArray) -> FloatArray:
        out = np.zeros(len(self.c))
        for layer, count in ((self.block.dense, dense), (self.block.experts, experts)):
            if layer is not None:
                again = np.stack([kind.sum(axis=0) for kind in layer.recompute])
                out += again[self.c.recompute, self.which] * count
        return out * self.c.recompute_share

    def slowest(self) -> tuple[FloatArray, FloatArray]:
        """The slowest stage's time for one micro batch, by component with recomputation last, and in all."""
        totals = np.stack([both.sum(axis=0) for both, _ in self.parts])
        position = np.argmax(totals, axis=0)
        parts = [both for both, _ in self.parts]
        chosen = np.where(position == 0, parts[0], np.where(position == 1, parts[1], parts[2]))
        return chosen, totals.max(axis=0)

    def layer_times(self) -> tuple[FloatArray, FloatArray]:
        """Forward and backward time of one layer (recomputation included), averaged over the network's layers."""
        model = self.setting.model
        forward, backward = np.zeros(len(self.c)), np.zeros(len(self.c))
        for layer, share in (
            (self.block.dense, model.dense_layers / model.layers),
            (self.block.experts, model.moe_layers / model.layers),
        ):
            if layer is not None:
                again = np.stack([kind.sum(axis=0) for kind in layer.recompute])[self.c.recompute, self.which]
                forward += share * layer.forward.sum(axis=0)[self.which]
                backward += share * (layer.backward.sum(axis=0)[self.which] + again * self.c.recompute_share)
        return forward, backward


def _sends(setting: Setting, c: Layouts, sent_bytes: FloatArray, m: FloatArray) -> FloatArray:
    """Exposed time of activations and their gradients between stages.

    Overlapped, the hops of the first micro batch's way in and the last one's way out stand in the critical path, and of
    the others what the calibration found (the transfers take cores and memory bandwidth from the computation).
    """
    stride = c.tensor * c.context * c.data
    each = setting.fabric.send(sent_bytes, stride)
    hops = 2.0 * (c.pipeline - 1)
    exposed = setting.calibration.pipeline_exposure if setting.software.pipeline_overlap else 1.0
    steady = exposed * 2.0 * m * c.virtual_stages
    return np.where(c.pipeline > 1, (hops + steady) * each, 0.0)


def _data_parallel(
    setting: Setting, c: Layouts, parameters: tuple[StageParameters, ...], times: _Stages, m: FloatArray
) -> FloatArray:
    """Exposed communication over replicas: gradients reduced, sharded weights gathered.

    Replicated weights (DDP): one all-reduce of the gradients. Sharded optimizer state: a reduce-scatter of the
    gradients and an all-gather of the weights (Rajbhandari et al. 2019). Overlapped, the reduction runs beside the
    backward pass of the last micro batch and the gathering beside the forward pass of the first; what is longer
    stays, and at least one layer's share of each does. Sharded weights (FSDP, Zhao et al. 2023): each layer gathers
    its weights before its forward and its backward pass and reduces its gradients behind it, in every micro batch.
    """
    software, fabric, model = setting.software, setting.fabric, setting.model
    replicas = c.data * c.context
    first, middle, last = parameters
    plain = np.maximum(np.maximum(first.plain, middle.plain), last.plain)
    experts = np.maximum(np.maximum(first.experts, middle.experts), last.experts)
    layers = np.maximum(middle.layers, 1.0)
    expert_replicas = np.maximum(1, replicas * c.tensor // (c.expert * c.expert_tensor))
    expert_stride = c.expert * c.expert_tensor
    gradient = float(software.gradient_bytes)
    fp32 = c.precision == PRECISIONS.index("fp32")
    gradient_bytes = np.where(fp32, 4.0, gradient)
    weight_bytes = np.where(fp32, 4.0, min(2.0, float(software.parameter_bytes)))
    shards, groups = np.minimum(c.shards, replicas), np.maximum(1, replicas // np.maximum(1, c.shards))

    def reduce(size: FloatArray, ranks: IntArray, stride: IntArray) -> FloatArray:
        return np.where(
            c.zero_stage == 0, fabric.all_reduce(size, ranks, stride), fabric.reduce_scatter(size, ranks, stride)
        )

    reduced = reduce(plain * gradient_bytes, shards, c.tensor)
    reduced = reduced + fabric.all_reduce(plain * gradient_bytes / shards, groups, c.tensor * shards)
    reduced = reduced + np.where(
        experts > 0, reduce(experts * gradient_bytes, expert_replicas, expert_stride), 0.0
    )
    gathered = fabric.all_gather(plain * weight_bytes, shards, c.tensor)
    gathered = gathered + np.where(
        experts > 0, fabric.all_gather(experts * weight_bytes, expert_replicas, expert_stride), 0.0
    )
    gathered = np.where(c.zero_stage == 0, 0.0, gathered)
    layer_forward, layer_backward = times.layer_times()
    slow = 1.0 + setting.calibration.overlap_slowdown
    if software.data_overlap:
        # Interleaved, a chunk's gradients are ready while p micro batches go through each of the chunks before it.
        window = np.where(c.virtual_stages > 1, c.pipeline, 1) * layers
        hidden_reduced = np.minimum(reduced * (1.0 - 1.0 / layers), layer_backward * window)
        hidden_gathered = np.minimum(gathered * (1.0 - 1.0 / layers), layer_forward * window)
        hidden = hidden_reduced + hidden_gathered
        once = reduced + gathered - hidden + (slow - 1.0) * hidden
    else:
        once = reduced + gathered
    # Sharded weights: layer by layer, in every micro batch.
    forward_gap = gathered / layers - layer_forward
    backward_gap = (gathered + reduced) / layers - layer_backward
    moved = 2.0 * gathered + reduced
    if software.data_overlap:
        exposed = layers * (np.maximum(forward_gap, 0.0) + np.maximum(backward_gap, 0.0)) + moved / layers
        always = m * (exposed + (slow - 1.0) * np.maximum(0.0, moved - exposed))
    else:
        always = m * moved
    data = np.where(c.zero_stage == 3, always, once)
    # Tied embeddings stand in the first and the last stage, and their gradients are summed over both.
    if model.tied_embeddings:
        table = device_parameters(model, c).embedding * gradient_bytes
        stride = c.tensor * c.context * c.data
        pair = np.full(len(c), 2, dtype=np.int64)
        data = data + np.where(c.pipeline > 1, fabric.all_reduce(table, pair, stride * (c.pipeline - 1)), 0.0)
    return data


def _optimizer(setting: Setting, c: Layouts, parameters: tuple[StageParameters, ...]) -> FloatArray:
    """AdamW's update on the fullest stage: what it reads and writes of each parameter, at memory bandwidth.

    Norm of the gradients (read), scaling (read, write), update (gradient, two moments and master weight read, the
    latter three written), weights written in the precision of the forward pass, gradients zeroed.
    """
    software = setting.software
    shards = np.maximum(1, np.minimum(c.shards, c.data * c.context))
    expert_shards = np.maximum(1, c.shards * c.tensor // (c.expert * c.expert_tensor))
    largest = np.zeros(len(c))
    for stage in parameters:
        local = np.where(
            c.zero_stage >= 1, stage.plain / shards + stage.experts / expert_shards, stage.plain + stage.experts
        )
        everywhere = stage.plain + stage.experts
        update = local * (4 * software.gradient_bytes + 24.0 + software.parameter_bytes)
        largest = np.maximum(largest, update + everywhere * software.gradient_bytes)
    return setting.kernels.memory_bound(largest / setting.calibration.memory_efficiency)
