"""What one device must hold: weights, gradients, optimizer state, activations, buffers; for the stage that needs most.

Parameters are counted per device as the layout shards them; activations after Korthikanti et al. 2022
(arXiv:2205.05198), section 4, tensor by tensor, for the shapes of this model; sharded state after Rajbhandari et al.
2019 (arXiv:1910.02054).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelworks.plan.block import Setting
from modelworks.plan.layout import PRECISIONS, FloatArray, IntArray, Layouts
from modelworks.plan.pipeline import Stages, in_flight
from modelworks.spec.model import ModelSpec

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
    return DeviceParameters(dense, shared, experts, count.embedding / t, head / t)


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one stage's device, in elements, shape (N,)."""

    plain: FloatArray
    """Replicated over all data- and context-parallel ranks."""
    experts: FloatArray
    """Replicated over the expert-data-parallel ranks."""
    layers: FloatArray
    """How many layers the stage has."""


def stage_parameters(model: ModelSpec, candidates: Layouts, stages: Stages) -> tuple[StageParameters, ...]:
    """Parameters of a device of the first, a middle and the last stage."""
    of = device_parameters(model, candidates)
    alone = candidates.pipeline == 1
    found = []
    for kind, layers in (("first", stages.first), ("middle", stages.middle), ("last", stages.last)):
        dense = dense_layers_of(model, candidates, kind, layers)
        experts = layers - dense
        plain = dense * of.layer_dense + experts * of.layer_shared
        if kind == "first":
            plain = plain + of.embedding
            plain = plain + np.where(alone & (model.parameters.head > 0), of.head, 0.0)
        elif kind == "last":
            plain = plain + np.where(alone, of.embedding + (of.head if model.parameters.head else 0.0), of.head)
        found.append(StageParameters(plain, experts * of.layer_experts, layers.astype(np.float64)))
    return tuple(found)


def dense_layers_of(model: ModelSpec, candidates: Layouts, stage: str, layers: IntArray) -> IntArray:
    """How many of a stage's layers are dense: the model's first ones stand in the first stage."""
    if model.moe is None:
        return layers
    dense = np.minimum(model.dense_layers, layers)
    return np.where((candidates.pipeline == 1) | (stage == "first"), dense, 0)


def memory_bytes(setting: Setting, candidates: Layouts, stages: Stages, micro_batches: IntArray) -> FloatArray:
    """Bytes on a device of the stage that needs most, by component of `MEMORY`, shape (K, N)."""
    first, middle, last = stages_memory(setting, candidates, stages, micro_batches).values()
    totals = np.stack([first.sum(axis=0), middle.sum(axis=0), last.sum(axis=0)])
    largest = np.argmax(totals, axis=0)
    return np.where(largest == 0, first, np.where(largest == 1, middle, last))


def stages_memory(
    setting: Setting, candidates: Layouts, stages: Stages, micro_batches: IntArray
) -> dict[str, FloatArray]:
    """Bytes on a device of the first, a middle and the last stage, by component of `MEMORY`, each of shape (K, N)."""
    return {
        kind: _stage_memory(setting, candidates, parameters, kind, micro_batches)
        for kind, parameters in zip(
            ("first", "middle", "last"), stage_parameters(setting.model, candidates, stages), strict=True
        )
    }


def _stage_memory(
    setting: Setting, candidates: Layouts, parameters: StageParameters, kind: str, micro_batches: IntArray
) -> FloatArray:
    model, software, c = setting.model, setting.software, candidates
    plain, experts = parameters.plain, parameters.experts
    plain_shards = np.maximum(1, c.shards)
    expert_shards = np.maximum(1, c.shards * c.tensor // (c.expert * c.expert_tensor))
    sharded = lambda stage: (  # noqa: E731
        np.where(c.zero_stage >= stage, plain / plain_shards + experts / expert_shards, plain + experts)
    )
    out = np.zeros((len(MEMORY), len(c)))
    fp32 = c.precision == PRECISIONS.index("fp32")
    weight = np.where(fp32, 4.0, float(software.parameter_bytes))
    out[0] = sharded(3) * weight
    out[1] = sharded(2) * np.where(fp32, 4.0, float(software.gradient_bytes))
    masters = 4.0 if software.master_weights and software.parameter_bytes < 4 else 0.0
    out[2] = sharded(1) * np.where(fp32, 8.0, 8.0 + masters)
    held = np.ones(len(c))
    alone = c.pipeline == 1
    if kind == "first":
        held = in_flight(c, micro_batches)
    elif kind == "middle":
        held = np.maximum(1.0, in_flight(c, micro_batches) * (c.pipeline - 1) / c.pipeline)
    if kind != "middle":
        held = np.where(alone, 1.0, held)
    kept, working = activation_bytes(setting, candidates, kind, parameters.layers)
    out[3] = held * kept + working
    if kind == "last":
        out[4] = logits_bytes(setting, candidates)
    elif kind == "first":
        out[4] = np.where(alone, logits_bytes(setting, candidates), 0.0)
    # Sharded weights are gathered two layers at a time; reductions go through a bucket of gradients.
    layer = (plain + experts) / np.maximum(parameters.layers, 1.0)
    out[5] = np.where(c.zero_stage == 3, 2.0 * layer * weight + layer * software.gradient_bytes, 0.0)
    cpu = setting.device.kind == "cpu"
    out[6] = 0.3 * 2**30 if cpu else _FRAMEWORK_BYTES + _FRAGMENTATION * (out[3] + out[4] + out[5])
    return out


def activation_bytes(
    setting: Setting, candidates: Layouts, kind: str, layers: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Bytes that one micro batch keeps in a stage for its backward pass, and those of the layer being worked on.

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
        written = model.heads / t * setting.seq_len * (2 * e + (1 + e if software.dropout else 0)) / 2 * 1.0
        written = model.heads / t * setting.seq_len * (5.0 if software.dropout else 4.0)
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
        experts = experts + moe.shared_experts * moe.expert_hidden / t * (inner * e + low)
    whole_dense, whole_experts = norm_inputs + masks + attention + written + dense, 0.0 * tokens
    whole_experts = norm_inputs + masks + attention + written + experts
    ffn_share = (whole_dense - dense, whole_experts - experts)
    input_only = hidden * e / s
    kept = []
    for whole, rest, ffn in ((whole_dense, ffn_share[0], dense), (whole_experts, ffn_share[1], experts)):
        choices = np.stack(
            [
                whole,
                whole - written,
                rest - written - result + result - core * 0.0 - linear_input,
                np.broadcast_to(input_only, whole.shape),
            ]
        )
        recomputed = np.take_along_axis(choices, c.recompute[None, :], axis=0)[0]
        kept.append(c.recompute_share * recomputed + (1.0 - c.recompute_share) * whole)
    dense_layers = dense_layers_of(model, c, kind, layers.astype(np.int64))
    total = dense_layers * kept[0] + (layers - dense_layers) * kept[1]
    working = np.where(dense_layers > 0, whole_dense, whole_experts) - np.where(dense_layers > 0, kept[0], kept[1])
    return total * tokens, np.maximum(working, 0.0) * tokens


def logits_bytes(setting: Setting, candidates: Layouts) -> FloatArray:
    """Logits and their gradient: bf16 and its gradient where the loss is fused, fp32 beside them where it isn't."""
    tokens = candidates.micro_batch * setting.seq_len / candidates.context
    each = 6.0 if setting.software.cross_entropy == "fused" else 10.0
    if setting.device.kind == "cpu":
        return np.zeros(len(candidates))
    return tokens * setting.model.vocab / candidates.tensor * each
