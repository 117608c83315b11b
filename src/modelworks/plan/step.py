"""What one optimizer step takes under many layouts at once: time by reason, memory, model FLOPs utilisation.

`evaluate` puts the parts together: layers (`block`), the pipeline over them (`pipeline`), the reduction of gradients
and the gathering of sharded weights over replicas, the optimizer, and what the slowest of many ranks costs. It is pure
and vectorised: candidates are arrays, and layers are worked out once for each different shape among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modelworks.plan import muon
from modelworks.plan.block import COMPONENTS, SHAPE, BlockTimes, LayerTimes, Setting, block_times
from modelworks.plan.layout import PRECISIONS, BoolArray, FloatArray, IntArray, Layouts, distinct, fits_model, runs
from modelworks.plan.memory import (
    StageParameters,
    choose,
    dense_layers_of,
    device_parameters,
    gathered_bytes,
    gathered_width,
    kept_bytes,
    memory_bytes,
    stage_parameters,
    state_bytes,
)
from modelworks.plan.pipeline import Stages, bubble, deal_layers
from modelworks.plan.vision import tower_times
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


_ROW = (*SHAPE, "pipeline", "virtual_stages", "schedule", "data")
"""What a stage's times and activations depend on, but for what is recomputed."""
_STATE = (
    "tensor", "pipeline", "context", "expert", "expert_tensor", "data", "virtual_stages", "precision", "zero_stage",
    "shards", "schedule",
)  # fmt: skip
"""What the model's state depends on, and the exchanges over replicas that keep it the same."""


@dataclass(frozen=True)
class Blocks:
    """Layers that are known already, for candidates that share their shapes."""

    times: BlockTimes
    which: IntArray
    """For each candidate the position of its shape, (N,)."""


def known_blocks(setting: Setting, candidates: Layouts) -> Blocks:
    """The layers of candidates, each different shape worked out once."""
    first, which = distinct(candidates, SHAPE)
    shapes = candidates.take(first)
    return Blocks(replace(block_times(setting, shapes), vision=tower_times(setting, shapes)), which)


def evaluate(
    setting: Setting,
    global_batch: int | IntArray,
    candidates: Layouts,
    memory_limit: float | None = None,
    blocks: Blocks | None = None,
) -> Evaluation:
    """Evaluate one optimizer step of `global_batch` sequences (one number, or one for each) under each candidate.

    Candidates that don't divide the model or the batch get a time as if they did, and `fits` is false. Layers that
    `blocks` has are not worked out again.

    Three levels keep the work for a candidate small: layers depend on its shape (`block.SHAPE`); stages on that and
    the pipeline (`_ROW`); exchanges over replicas and the model's state on how it is sharded (`_STATE`). Each level is
    worked out once for neighbours that share it (layers for all), and a candidate gathers its own: the order of a
    search, in which neighbours differ in the last choices, is the fast one, and any order is right.
    """
    c = candidates
    blocks = blocks or known_blocks(setting, c)
    batch = np.broadcast_to(np.asarray(global_batch, dtype=np.int64), (len(c),))
    first_row, of_row = runs(c, _ROW, batch)
    first_state, of_state = runs(c, _STATE)
    rows = _Rows(setting, c.take(first_row), batch[first_row], blocks.times, blocks.which[first_row])
    states = _States(setting, c.take(first_state))

    m = rows.micro_batches.take(of_row)
    reasons = np.empty((len(REASONS), len(c)))
    stages = rows.totals(c, of_row)
    rows.slowest(c, of_row, stages, out=reasons[: _RECOMPUTE + 1])
    reasons[: _RECOMPUTE + 1] *= m
    weight_gradient = rows.weight_gradient.take(of_row)
    reasons[REASONS.index("bubble")] = bubble(c, stages[0], stages[1], stages[2], weight_gradient)
    reasons[REASONS.index("pipeline")] = rows.sends.take(of_row)
    reasons[REASONS.index("data")] = _exposed(setting, c, states, of_state, *rows.layer_times(c, of_row), m)
    reasons[REASONS.index("optimizer")] = states.optimizer.take(of_state)
    reasons[REASONS.index("host")] = setting.software.step_host_s
    before = reasons[:-1].sum(axis=0)
    reasons[REASONS.index("jitter")] = before * rows.jitter.take(of_row)
    step = before + reasons[-1]

    memory = memory_bytes(setting, c, (states.bytes, of_state), (rows.kept, of_row))
    limit = setting.device.memory_bytes if memory_limit is None else memory_limit
    fits = rows.divides.take(of_row) & (memory.sum(axis=0) <= limit)
    mfu = rows.ideal.take(of_row) / step
    return Evaluation(c, step, reasons, memory, fits, mfu, rows.tokens.take(of_row) / step)


class _Rows:
    """Times of a micro batch in the first, a middle and the last stage of W layouts, gathered from layers.

    What is recomputed is left open: `totals`, `slowest` and `layer_times` add it for candidates, whose positions among
    the W layouts are `of_row`.
    """

    def __init__(self, setting: Setting, c: Layouts, batch: IntArray, block: BlockTimes, which: IntArray) -> None:
        model, self.size = setting.model, len(c)
        self.block, self.which = block, which
        micro_batches = np.maximum(1, batch // np.maximum(1, c.data * c.micro_batch))
        self.micro_batches = micro_batches.astype(np.float64)
        stages = deal_layers(model.layers, c)
        alone = c.pipeline == 1
        parts, again = [], []
        for kind, layers in (("first", stages.first), ("middle", stages.middle), ("last", stages.last)):
            dense = dense_layers_of(model, c, kind, layers)
            both = self._layers(lambda layer: layer.both, dense, layers - dense)
            head = block.head[:, which]
            if kind == "first":
                both += block.embedding[:, which] + np.where(alone, head, 0.0)
            if kind == "last":
                both += head + np.where(alone, block.embedding[:, which], 0.0)
            repeated = self._layers(lambda layer: layer.again, dense, layers - dense)
            if block.vision is not None and kind != "middle":
                here = alone | (kind == "first")
                both += block.vision.both[:, which] * here
                repeated += block.vision.again[:, which] * here
            parts.append(both)
            again.append(repeated)
        self.times = np.stack(parts, axis=1).reshape(len(COMPONENTS), -1)
        """By component and, flat, by stage and layout: (K, 3 W)."""
        self.plain = [both.sum(axis=0) for both in parts]
        self.again = [kinds.reshape(-1) for kinds in again]
        """By stage what each kind of recomputation of all layers adds, flat: (R W,)."""
        layer = block.experts or block.dense
        assert layer is not None
        self.weight_gradient = stages.middle * layer.weight_gradient[which]
        shares = (model.dense_layers / model.layers, model.moe_layers / model.layers)
        self.layer_forward = self._layers(lambda layer: layer.totals[0], *shares)
        self.layer_backward = self._layers(lambda layer: layer.totals[1], *shares)
        self.layer_again = self._layers(lambda layer: layer.again, *shares).reshape(-1)
        self.sends = _sends(setting, c, block.boundary_bytes[which], self.micro_batches)
        jitter = setting.calibration.jitter_per_doubling if setting.device.kind == "gpu" else 0.0
        self.jitter = jitter * np.log2(np.maximum(c.devices / setting.fabric.node_devices, 1.0))
        self.kept = kept_bytes(setting, c, stages, micro_batches)
        self.divides = fits_model(model, setting.seq_len, batch, c)
        self.tokens = batch.astype(np.float64) * setting.seq_len
        flop = training_flop_per_token(model, setting.seq_len) * self.tokens
        peaks = np.array([setting.device.peak_flops.get(name, np.nan) for name in PRECISIONS])
        self.ideal = flop / (peaks[c.precision] * c.devices)
        """Seconds of the model's FLOPs at the devices' peak."""

    def _layers(
        self, what: Callable[[LayerTimes], FloatArray], dense: IntArray | float, experts: IntArray | float
    ) -> FloatArray:
        """So many dense layers and layers with experts of each layout, of something of shape (..., U)."""
        out: FloatArray = np.zeros(self.size)
        if self.block.dense is not None:
            out = out + what(self.block.dense)[..., self.which] * dense
        if self.block.experts is not None:
            out = out + what(self.block.experts)[..., self.which] * experts
        return out

    def totals(self, c: Layouts, of_row: IntArray) -> tuple[FloatArray, ...]:
        """Each stage's time for one micro batch, forward, backward and what is computed again."""
        place = c.recompute * self.size + of_row
        return tuple(
            plain.take(of_row) + again.take(place) * c.recompute_share
            for plain, again in zip(self.plain, self.again, strict=True)
        )

    def slowest(self, c: Layouts, of_row: IntArray, stages: Sequence[FloatArray], out: FloatArray) -> None:
        """The slowest stage's time for one micro batch: by component, recomputation as a last row."""
        position = np.where(stages[1] > stages[0], 1, 0)
        position = np.where(stages[2] > np.maximum(stages[0], stages[1]), 2, position)
        here = position * self.size + of_row
        for component, times in enumerate(self.times):
            np.take(times, here, out=out[component], mode="clip")
        place = c.recompute * self.size + of_row
        again = choose(position, [kinds.take(place) for kinds in self.again])
        np.multiply(again, c.recompute_share, out=out[-1])

    def layer_times(self, c: Layouts, of_row: IntArray) -> tuple[FloatArray, FloatArray]:
        """Forward and backward time of one layer (recomputation included), averaged over the network's layers."""
        again = self.layer_again.take(c.recompute * self.size + of_row) * c.recompute_share
        return self.layer_forward.take(of_row), self.layer_backward.take(of_row) + again


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


class _States:
    """The model's state under S ways to shard it: its bytes, its update, and the exchanges that keep replicas equal."""

    def __init__(self, setting: Setting, c: Layouts) -> None:
        stages = deal_layers(setting.model.layers, c)
        parameters = stage_parameters(setting.model, c, stages)
        self.layers = np.maximum(parameters[1].layers, 1.0)
        self.reduced, self.gathered, self.tied = _exchanges(setting, c, parameters)
        self.optimizer = _optimizer(setting, c, parameters)
        if setting.optimizer == "muon":
            self.optimizer = self.optimizer + _muon(setting, c, stages)
        self.bytes = state_bytes(setting, c, parameters)


def _exchanges(
    setting: Setting, c: Layouts, parameters: tuple[StageParameters, ...]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds to reduce the gradients over replicas, to gather sharded weights, and to sum tied embeddings.

    Replicated weights (DDP): one all-reduce of the gradients. Sharded optimizer state: a reduce-scatter of the
    gradients and an all-gather of the weights (Rajbhandari et al. 2019). Shards among fewer ranks than replicas (HSDP):
    their sums are all-reduced over the others.
    """
    software, fabric, model = setting.software, setting.fabric, setting.model
    replicas = c.data * c.context
    first, middle, last = parameters
    plain = np.maximum(np.maximum(first.plain, middle.plain), last.plain)
    experts = np.maximum(np.maximum(first.experts, middle.experts), last.experts)
    expert_replicas = np.maximum(1, replicas * c.tensor // (c.expert * c.expert_tensor))
    expert_stride = c.expert * c.expert_tensor
    gradient = float(software.gradient_bytes)
    fp32 = c.precision == PRECISIONS.index("fp32")
    gradient_bytes = np.where(fp32, 4.0, gradient)
    weight_bytes = gathered_width(setting, c)
    outside = [sum(gathered_bytes(setting, c, stage)) - stage.experts * weight_bytes for stage in parameters]
    plain_weights, expert_weights = np.maximum.reduce(outside), experts * weight_bytes
    shards, groups = np.minimum(c.shards, replicas), np.maximum(1, replicas // np.maximum(1, c.shards))

    def reduce(size: FloatArray, ranks: IntArray, stride: IntArray) -> FloatArray:
        return np.where(
            c.zero_stage == 0, fabric.all_reduce(size, ranks, stride), fabric.reduce_scatter(size, ranks, stride)
        )

    if software.data_messages == "layer":
        # One exchange for each layer and one for what stands beside the layers; experts go with their layer.
        together = c.expert * c.expert_tensor == 1
        messages = 1.0 + np.maximum(1.0, middle.layers)
        plain, experts = np.where(together, plain + experts, plain), np.where(together, 0.0, experts)
        plain_weights = np.where(together, plain_weights + expert_weights, plain_weights)
        expert_weights = np.where(together, 0.0, expert_weights)
    else:
        messages = np.ones(len(c))
    plain, experts = plain / messages, experts / messages
    plain_weights, expert_weights = plain_weights / messages, expert_weights / messages
    reduced = reduce(plain * gradient_bytes, shards, c.tensor)
    reduced = reduced + fabric.all_reduce(plain * gradient_bytes / shards, groups, c.tensor * shards)
    reduced = messages * (
        reduced + np.where(experts > 0, reduce(experts * gradient_bytes, expert_replicas, expert_stride), 0.0)
    )
    gathered = fabric.all_gather(plain_weights, shards, c.tensor)
    gathered = messages * (
        gathered + np.where(experts > 0, fabric.all_gather(expert_weights, expert_replicas, expert_stride), 0.0)
    )
    several = np.where(replicas > 1, messages, 0.0)
    if software.exchange_copies:
        copies = several * software.exchange_copies
        reduced = reduced + setting.kernels.memory_bound(copies * (plain + experts) * gradient_bytes)
        gathered = gathered + setting.kernels.memory_bound(copies * (plain_weights + expert_weights))
    launched = several * software.exchange_kernels * software.launch_s
    reduced, gathered = reduced + launched, gathered + launched
    gathered = np.where(c.zero_stage == 0, 0.0, gathered)
    tied = np.zeros(len(c))
    # Tied embeddings stand in the first and the last stage, and their gradients are summed over both.
    if model.tied_embeddings:
        table = device_parameters(model, c).embedding * gradient_bytes
        stride = c.tensor * c.context * c.data
        pair = np.full(len(c), 2, dtype=np.int64)
        tied = np.where(c.pipeline > 1, fabric.all_reduce(table, pair, stride * (c.pipeline - 1)), 0.0)
    return reduced, gathered, tied


def _exposed(
    setting: Setting,
    c: Layouts,
    states: _States,
    of_state: IntArray,
    layer_forward: FloatArray,
    layer_backward: FloatArray,
    m: FloatArray,
) -> FloatArray:
    """What stays exposed of the exchanges over replicas.

    Overlapped, the reduction runs beside the backward pass of the last micro batch and the gathering beside the forward
    pass of the first; what is longer stays, and at least one layer's share of each does. Sharded weights (FSDP, Zhao et
    al. 2023): each layer gathers its weights before its forward and its backward pass and reduces its gradients behind
    it, in every micro batch.
    """
    software = setting.software
    reduced, gathered = states.reduced.take(of_state), states.gathered.take(of_state)
    layers = states.layers.take(of_state)
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
    # Sharded weights: layer by layer, in every micro batch; a pipeline's stages keep them through the step.
    rounds = np.where(c.pipeline > 1, 1.0, m)
    forward_gap = gathered / layers - layer_forward
    backward_gap = (gathered + reduced) / layers - layer_backward
    moved = 2.0 * gathered + reduced
    if software.data_overlap:
        exposed = layers * (np.maximum(forward_gap, 0.0) + np.maximum(backward_gap, 0.0)) + moved / layers
        always = rounds * (exposed + (slow - 1.0) * np.maximum(0.0, moved - exposed))
    else:
        always = rounds * moved
    exposed_s: FloatArray = np.where(c.zero_stage == 3, always, once) + states.tied.take(of_state)
    return exposed_s


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
        update = local * (4 * software.gradient_bytes + 8.0 + 4 * setting.moment_bytes + software.parameter_bytes)
        largest = np.maximum(largest, update + everywhere * software.gradient_bytes)
    return setting.kernels.memory_bound(largest / setting.calibration.memory_efficiency)


def _muon(setting: Setting, c: Layouts, stages: Stages) -> FloatArray:
    """What Muon adds on the stage with most layers; in each candidate's own precision, fp8 runs in bf16."""
    out = np.zeros(len(c))
    for code in np.unique(c.precision):
        name = PRECISIONS[code]
        dense_s, experts_s = muon.layer_seconds(setting, "bf16" if name in ("fp8", "fp4") else name)
        for kind, layers in (("first", stages.first), ("middle", stages.middle), ("last", stages.last)):
            dense = dense_layers_of(setting.model, c, kind, layers)
            seconds = dense * dense_s + (layers - dense) * experts_s
            out = np.where(c.precision == code, np.maximum(out, seconds), out)
    return out
