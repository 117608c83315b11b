"""What one device must hold: weights, gradients, optimizer state, activations, buffers; for the stage that needs most.

Parameters are counted per device as the layout shards them; activations after Korthikanti et al. 2022
(arXiv:2205.05198), section 4, tensor by tensor, for the shapes of this model; sharded state after Rajbhandari et al.
2019 (arXiv:1910.02054).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelworks.plan.block import Setting
from modelworks.plan.layout import PRECISIONS, RECOMPUTE, SCHEDULES, BoolArray, FloatArray, IntArray, Layouts
from modelworks.plan.pipeline import Stages, in_flight
from modelworks.plan.vision import tower_layouts, tower_setting
from modelworks.spec.model import ModelSpec, VisionSpec

MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "framework")
"""The components of a device's memory."""
_FRAMEWORK_BYTES = 2.0 * 2**30
"""CUDA's context, NCCL's buffers for a handful of communicators and the libraries' workspaces: what nvidia-smi shows
of a process before it holds a tensor of its own (about 0.5 GiB), and NCCL's and cuBLAS's defaults on top."""
_FRAGMENTATION = 0.03
"""Share of activations and buffers that PyTorch's caching allocator leaves unused between blocks."""


@dataclass(frozen=True)
class DeviceParameters:
    """Parameters of one device, in elements, shape (N,)."""

    layer_dense: FloatArray
    """Of one dense layer, attention and norms included."""
    layer_shared: FloatArray
    """Of one layer with experts: all but its routed experts."""
    layer_experts: FloatArray
    """The routed experts of one layer."""
    embedding: FloatArray
    head: FloatArray
    vision: FloatArray
    """The vision tower and its connector."""


def device_parameters(model: ModelSpec, candidates: Layouts) -> DeviceParameters:
    """A layer's parameters on one device; what tensor parallelism doesn't split is there whole."""
    count, t = model.parameters, candidates.tensor
    layers, moe = model.layers, model.moe
    attention = count.attention / layers / t
    # Key-value heads that are fewer than the ranks stand on several of them.
    copies = np.maximum(0.0, 1.0 - model.kv_heads / t) if model.latent_attention is None else np.zeros(len(t))
    attention = attention + copies * 2 * model.hidden * model.head_dim
    norms = np.full(len(t), count.norms / layers)
    dense = attention + norms
    if model.dense_layers:
        dense = dense + count.dense_ffn / model.dense_layers / t
    shared, experts = attention + norms, np.zeros(len(t))
    if moe is not None:
        shared = shared + (count.shared_experts / t + count.router) / model.moe_layers
        experts = count.experts / model.moe_layers / (candidates.expert * candidates.expert_tensor)
    head = count.head if count.head else count.embedding
    vision = np.zeros(len(t))
    if model.vision is not None:
        # Linear maps are split; the embedding of patches, positions and norms are whole on each rank.
        eyes = model.vision
        whole = (eyes.patch_width + 1 + eyes.patches) * eyes.hidden + eyes.transformer.parameters.norms
        vision = whole + (count.vision - whole) / t
    return DeviceParameters(dense, shared, experts, count.embedding / t, head / t, vision)


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one stage's device, in elements, shape (N,)."""

    plain: FloatArray
    """Replicated over all data- and context-parallel ranks."""
    experts: FloatArray
    """Replicated over the expert-data-parallel ranks."""
    layers: FloatArray
    """How many layers the stage has."""
    ends: FloatArray
    """Of `plain`, those of embedding and head."""
    small: FloatArray
    """Of `plain`, those of the layers' normalisations and routers."""


def stage_parameters(model: ModelSpec, candidates: Layouts, stages: Stages) -> tuple[StageParameters, ...]:
    """Parameters of a device of the first, a middle and the last stage."""
    of = device_parameters(model, candidates)
    alone = candidates.pipeline == 1
    found = []
    for kind, layers in (("first", stages.first), ("middle", stages.middle), ("last", stages.last)):
        dense = dense_layers_of(model, candidates, kind, layers)
        experts = layers - dense
        inside = plain = dense * of.layer_dense + experts * of.layer_shared
        if kind == "first":
            plain = plain + of.embedding + of.vision
            plain = plain + np.where(alone & (model.parameters.head > 0), of.head, 0.0)
        elif kind == "last":
            embedding = of.embedding + of.vision
            plain = plain + np.where(alone, embedding + (of.head if model.parameters.head else 0.0), of.head)
        router = 0.0 if model.moe is None else model.parameters.router / model.moe_layers
        small = layers * (model.parameters.norms / model.layers) + experts * router
        found.append(
            StageParameters(plain, experts * of.layer_experts, layers.astype(np.float64), plain - inside, small)
        )
    return tuple(found)


def dense_layers_of(model: ModelSpec, candidates: Layouts, stage: str, layers: IntArray) -> IntArray:
    """How many of a stage's layers are dense: the model's first ones stand in the first stage."""
    if model.moe is None:
        return layers
    dense = np.minimum(model.dense_layers, layers)
    return np.where((candidates.pipeline == 1) | (stage == "first"), dense, 0)


STAGES = ("first", "middle", "last")


def memory_bytes(
    setting: Setting, candidates: Layouts, state: tuple[FloatArray, IntArray], kept: tuple[KeptBytes, IntArray]
) -> FloatArray:
    """Bytes on a device of the stage that needs most, by component of `MEMORY`, shape (K, N).

    Parameters
    ----------
    state
        What `state_bytes` gives for the different ways to shard, and for each candidate the position of its own.
    kept
        The same of `kept_bytes`.
    """
    bytes_of, of_state = state
    tables, of_kept = kept
    framework, fragmentation = _framework(setting)
    activations, logits, totals = [], [], []
    for stage in range(len(STAGES)):
        activations.append(tables.activations(stage, of_kept, candidates))
        logits.append(tables.logits[stage].take(of_kept))
        total = activations[stage] + logits[stage] + bytes_of[stage, -1].take(of_state)
        totals.append(total * (1.0 + fragmentation) + bytes_of[stage, :-1].sum(axis=0).take(of_state))
    fullest = np.where(totals[1] > totals[0], 1, 0)
    fullest = np.where(totals[2] > np.maximum(totals[0], totals[1]), 2, fullest)
    out = np.empty((len(MEMORY), len(candidates)))
    here = fullest * bytes_of.shape[2] + of_state
    for row, component in ((0, 0), (1, 1), (2, 2), (5, 3)):
        np.take(np.ascontiguousarray(bytes_of[:, component]).reshape(-1), here, out=out[row], mode="clip")
    out[3], out[4] = choose(fullest, activations), choose(fullest, logits)
    out[6] = framework + fragmentation * (out[3] + out[4] + out[5])
    return out


def stages_memory(
    setting: Setting, candidates: Layouts, stages: Stages, micro_batches: IntArray
) -> dict[str, FloatArray]:
    """Bytes on a device of the first, a middle and the last stage, by component of `MEMORY`, each of shape (K, N)."""
    every = np.arange(len(candidates))
    state = state_bytes(setting, candidates, stage_parameters(setting.model, candidates, stages))
    kept = kept_bytes(setting, candidates, stages, micro_batches)
    found = {}
    for index, kind in enumerate(STAGES):
        one = KeptBytes(
            *(np.repeat(table[[index]], len(STAGES), axis=0) for table in (kept.base, kept.saved, kept.logits))
        )
        found[kind] = memory_bytes(
            setting, candidates, (np.repeat(state[[index]], len(STAGES), axis=0), every), (one, every)
        )
    return found


def choose(stage: IntArray, of_stages: Sequence[FloatArray]) -> FloatArray:
    """Of one array for each stage, the values of the given stages."""
    return np.where(stage == 0, of_stages[0], np.where(stage == 1, of_stages[1], of_stages[2]))


def _framework(setting: Setting) -> tuple[float, float]:
    """Bytes of the framework itself, and the share of activations and buffers that lies idle between blocks."""
    return (0.3 * 2**30, 0.0) if setting.device.kind == "cpu" else (_FRAMEWORK_BYTES, _FRAGMENTATION)


def state_bytes(setting: Setting, candidates: Layouts, parameters: tuple[StageParameters, ...]) -> FloatArray:
    """Bytes of weights, gradients, optimizer state and buffers on a device of each stage, shape (3, 4, N)."""
    software, c = setting.software, candidates
    plain_shards = np.maximum(1, c.shards)
    expert_shards = np.maximum(1, c.shards * c.tensor // (c.expert * c.expert_tensor))
    fp32 = c.precision == PRECISIONS.index("fp32")
    weight = np.where(fp32, 4.0, float(software.parameter_bytes))
    gradient = np.where(fp32, 4.0, float(software.gradient_bytes))
    masters = 4.0 if software.master_weights and software.parameter_bytes < 4 else 0.0
    moments = 2.0 * setting.moment_bytes
    optimizer = np.where(fp32, moments, moments + masters)
    fsdp = software.sharding == "fsdp"
    whole_gradients = (c.zero_stage < 2) | (fsdp & (c.pipeline > 1))
    out = np.empty((len(STAGES), 4, len(c)))
    for index, stage in enumerate(parameters):
        plain, experts = stage.plain, stage.experts
        small = np.where(_parts_in_fp32(setting, c), stage.small, 0.0)
        split = (plain - small) / plain_shards + small + experts / expert_shards
        out[index, 0] = np.where(c.zero_stage >= 3, split, plain + experts) * weight
        if fsdp:
            gathers = (c.zero_stage > 0) & _splits(c)
            layer_by_layer = (c.zero_stage >= 3) & (c.schedule != SCHEDULES.index("zero-bubble"))
            inside, outside = gathered_bytes(setting, c, stage)
            standing = outside + np.where(layer_by_layer, 0.0, inside)
            out[index, 0] = np.where(gathers, split * weight + standing, out[index, 0])
        out[index, 1] = np.where(whole_gradients, plain + experts, split) * gradient
        out[index, 2] = np.where(c.zero_stage >= 1, split, plain + experts) * optimizer
        if setting.optimizer == "muon":
            # It keeps one moment of the layers' matrices.
            inside = plain - stage.ends - stage.small
            matrices = np.where(c.zero_stage >= 1, inside / plain_shards + experts / expert_shards, inside + experts)
            out[index, 2] -= matrices * setting.moment_bytes
        # Sharded weights are gathered two layers at a time; reductions go through a bucket of gradients.
        layer = (plain + experts) / np.maximum(stage.layers, 1.0)
        out[index, 3] = np.where(c.zero_stage == 3, 2.0 * layer * weight + layer * software.gradient_bytes, 0.0)
    return out


def gathered_bytes(setting: Setting, candidates: Layouts, stage: StageParameters) -> tuple[FloatArray, FloatArray]:
    """Bytes of what ranks gather of a stage whose weights are sharded, (N,): of its layers, and of what is outside."""
    each, low = gathered_width(setting, candidates), _parts_in_fp32(setting, candidates)
    layers = stage.plain - stage.ends - np.where(low, stage.small, 0.0) + stage.experts
    return layers * each, stage.ends * np.where(low, 4.0, each)


def gathered_width(setting: Setting, candidates: Layouts) -> FloatArray:
    """Bytes of an element of the layers' matrices as ranks gather them, (N,)."""
    software, c = setting.software, candidates
    whole = c.precision == PRECISIONS.index("fp32")
    if software.fp32_parts:
        # Its second backward pass would add up gradients in what was gathered.
        whole = whole | (c.schedule == SCHEDULES.index("zero-bubble"))
    return np.where(whole, 4.0, float(software.gathered_bytes or min(2, software.parameter_bytes)))


def _parts_in_fp32(setting: Setting, c: Layouts) -> BoolArray:
    """Where embedding and head are gathered in fp32, and normalisations and routers stand whole."""
    low: BoolArray = (gathered_width(setting, c) < 4.0) & setting.software.fp32_parts
    return low


def _splits(c: Layouts) -> BoolArray:
    """Whether there are ranks that could split weights: replicas, or experts apart from the rest."""
    splits: BoolArray = (c.data * c.context > 1) | (c.expert > 1) | ((c.tensor > 1) & (c.expert_tensor != c.tensor))
    return splits


@dataclass(frozen=True)
class KeptBytes:
    """What the stages keep of micro batches until their backward pass, for W layouts without their recomputation."""

    base: FloatArray
    """With nothing recomputed, for all micro batches under way; shape (3, W)."""
    saved: FloatArray
    """What each kind of recomputation takes off that if it applies to all layers, shape (3, R, W)."""
    logits: FloatArray
    """Shape (3, W)."""

    def activations(self, stage: int, of_kept: IntArray, candidates: Layouts) -> FloatArray:
        """Bytes of a stage for each candidate."""
        place = candidates.recompute * self.base.shape[1] + of_kept
        saved = self.saved[stage].reshape(-1).take(place)
        held: FloatArray = self.base[stage].take(of_kept) - candidates.recompute_share * saved
        return held


def kept_bytes(setting: Setting, candidates: Layouts, stages: Stages, micro_batches: IntArray) -> KeptBytes:
    """What the stages of W layouts keep, whatever they recompute."""
    c, alone = candidates, candidates.pipeline == 1
    flying = in_flight(c, micro_batches)
    held = {
        "first": np.where(alone, 1.0, flying),
        "middle": np.maximum(1.0, flying * (c.pipeline - 1) / c.pipeline),
        "last": np.ones(len(c)),
    }
    head = logits_bytes(setting, c)
    logits = np.stack([np.where(alone, head, 0.0), np.zeros(len(c)), head])
    base, saved = np.empty((len(STAGES), len(c))), np.empty((len(STAGES), len(RECOMPUTE), len(c)))
    for index, (kind, layers) in enumerate(zip(STAGES, (stages.first, stages.middle, stages.last), strict=True)):
        whole, less, working = activation_bytes(setting, c, kind, layers)
        if kind == "first" and setting.model.vision is not None:
            tower, tower_less, tower_working = tower_bytes(setting, c, setting.model.vision)
            whole, less, working = whole + tower, less + tower_less, np.maximum(working, tower_working)
        base[index] = held[kind] * whole
        saved[index] = held[kind] * less - working
    return KeptBytes(base, saved, logits)


def activation_bytes(
    setting: Setting, candidates: Layouts, kind: str, layers: IntArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Bytes that one micro batch keeps in a stage for its backward pass, (N,); what each kind of recomputation of all
    layers takes off that, (R, N); and what it then needs for the layer being worked on, (R, N).

    Per token of a layer, with `e` bytes an element: two inputs of normalisations (four in sandwich placement), two
    inputs of linear maps (the normalisations' outputs), queries, keys and values, attention's result, the
    feed-forward's inner width before and after its activation; with dropout two masks; with written-out attention the
    scores, their softmax and its mask. Tensor parallelism splits the inner widths, sequence parallelism the rest too.
    """
    model, software, c = setting.model, setting.software, candidates
    e = np.where(c.precision == PRECISIONS.index("fp32"), 4.0, 2.0)
    # What fp8 products keep of their inputs for the backward pass has one byte an element.
    low = np.where(c.precision == PRECISIONS.index("fp8"), 1.0, e)
    tokens = c.micro_batch * setting.seq_len / c.context
    t = c.tensor
    s = np.where(c.sequence_parallel, t, 1)
    hidden, mla = model.hidden, model.latent_attention
    norm_inputs = (4 if model.norm_placement == "sandwich" else 2) * hidden * e / s
    linear_input = hidden * low / s
    masks = 2.0 * hidden / s if software.dropout else 0.0 * tokens
    if mla is None:
        q_width, kv_width = model.heads * model.head_dim / t, 2 * np.maximum(1, model.kv_heads / t) * model.head_dim
        out_width, latent = q_width, 0.0 * tokens
    else:
        q_width = model.heads * (mla.nope_head_dim + mla.rope_head_dim) / t
        kv_width = model.heads * (mla.nope_head_dim + mla.rope_head_dim + mla.value_head_dim) / t
        out_width = model.heads * mla.value_head_dim / t
        latent = (2 * (mla.q_rank + mla.kv_rank) + mla.rope_head_dim) * e
    core = (q_width + kv_width) * e
    written = 0.0 * tokens
    if software.attention == "unfused":
        # Softmax's result, and with dropout its own and a mask of a byte an element.
        written = model.heads / t * setting.seq_len * (2 * e + 1.0 if software.dropout else e)
    result = out_width * np.where(c.precision == PRECISIONS.index("fp8"), e + low, e)
    inner = 2 if model.gated_mlp else 1
    attention = linear_input + core + latent + result
    norm_outputs = linear_input
    dense = norm_outputs + model.ffn_hidden / t * (inner * e + low)
    experts = 0.0 * tokens
    if model.moe is not None:
        moe = model.moe
        factor = software.capacity_factor or 1.0
        rows = moe.top_k * factor * c.expert_tensor / t
        width = moe.expert_hidden / c.expert_tensor
        experts = norm_outputs + rows * (hidden * (low + e) + width * (inner * e + low))
        experts = experts + model.shared_width / t * (inner * e + low)
    outside = norm_inputs + masks
    input_only = hidden * e / s
    wholes, less = [], []
    for feed_forward in (dense, experts):
        whole = outside + attention + written + feed_forward
        kept = (whole, whole - written, outside + core + latent, np.broadcast_to(input_only, whole.shape))
        wholes.append(whole)
        less.append(whole - np.stack(kept))
    dense_layers = dense_layers_of(model, c, kind, layers)
    expert_layers = layers - dense_layers
    total = dense_layers * wholes[0] + expert_layers * wholes[1]
    working = np.where(dense_layers > 0, less[0], less[1])
    saved = dense_layers * less[0] + expert_layers * less[1]
    return total * tokens, saved * tokens, np.maximum(working, 0.0) * tokens


def tower_bytes(setting: Setting, candidates: Layouts, vision: VisionSpec) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The same as `activation_bytes` of a vision tower: of its layers, and beside them the inputs of its last norm and
    of the connector's maps, which nothing computes again."""
    c = tower_layouts(vision, candidates)
    layers = np.full(len(c), vision.layers, dtype=np.int64)
    whole, less, working = activation_bytes(tower_setting(setting, vision), c, "first", layers)
    e = np.where(c.precision == PRECISIONS.index("fp32"), 4.0, 2.0)
    ends = 2.0 * c.micro_batch * vision.patches * vision.hidden
    ends = ends + candidates.micro_batch * vision.tokens_per_sequence * 2.0 * (vision.connector_hidden or 0) / c.tensor
    return whole + ends * e, less, working


def logits_bytes(setting: Setting, candidates: Layouts) -> FloatArray:
    """Logits and their gradient: bf16 and its gradient where the loss is fused, fp32 beside them where it isn't."""
    tokens = candidates.micro_batch * setting.seq_len / candidates.context
    each = 6.0 if setting.software.cross_entropy == "fused" else 10.0
    if setting.device.kind == "cpu":
        return np.zeros(len(candidates))
    return tokens * setting.model.vocab / candidates.tensor * each
