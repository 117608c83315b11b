"""What one layer takes on one device: its matrix products, its attention, the bytes it streams, what it sends.

Two ideas. Time is kept by what it goes to (`COMPONENTS`): an array of shape (K, U), U candidates, which adds up to the
layer's time, so that a step can later be taken apart into reasons. And only what shapes a layer on a device counts
here (`tensor`, `context`, `expert`, `micro_batch`, ...): a search evaluates each such shape once, however many
pipelines, replicas and checkpoint rules it is combined with.

A layer after Shoeybi et al. 2019 (arXiv:1909.08053): column-parallel then row-parallel products with one exchange
behind each pair; with sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198) the exchange is split into an
all-gather and a reduce-scatter of the same bytes. Experts after GShard (arXiv:2006.16668): dispatch, products, combine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from modelworks.plan.collectives import Fabric
from modelworks.plan.kernels import Kernels
from modelworks.plan.layout import PRECISIONS, FloatArray, Layouts
from modelworks.spec.hardware import DeviceSpec, Precision
from modelworks.spec.model import ModelSpec
from modelworks.spec.software import CalibrationSpec, SoftwareSpec

COMPONENTS = ("matmul", "attention", "memory", "tensor", "context", "expert", "launch", "vision")
"""What a layer's time goes to: matrix products; attention's core; streaming activations; the exposed exchanges of
tensor, context and expert parallelism; the device waiting for the host; and all of a vision tower (`vision`)."""
_MATMUL, _ATTENTION, _MEMORY, _TENSOR, _CONTEXT, _EXPERT, _LAUNCH, _ = range(len(COMPONENTS))
SHAPE = ("tensor", "context", "expert", "expert_tensor", "micro_batch", "precision", "sequence_parallel")
"""The fields of `Layouts` that shape a layer on a device."""


_DENSE_KERNELS = 3
"""Of a dense feed-forward network forward: its products and its activation."""


@dataclass(frozen=True)
class Setting:
    """What a step is evaluated on, beside the layout."""

    model: ModelSpec
    seq_len: int
    device: DeviceSpec
    kernels: Kernels
    fabric: Fabric
    software: SoftwareSpec
    calibration: CalibrationSpec
    optimizer: Literal["adamw", "muon"] = "adamw"
    moment_bytes: int = 4
    """Of each of the optimizer's two moments."""

    def sustained(self, precision: str) -> float:
        """The share of a short measurement's rate that matrix products keep up."""
        known = self.calibration.sustained.get("local" if self.device.kind == "cpu" else self.device.name, {})
        precision = "bf16" if precision == "fp16" else precision
        default = self.calibration.sustained_default
        return known.get(precision, default.get(precision, default["bf16"]))


@dataclass(frozen=True)
class Pass:
    """Times of one pass through something, shape (K, U), and the kernels that the host launches for it, (U,)."""

    times: FloatArray
    launches: FloatArray

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.times + other.times, self.launches + other.launches)

    def settled(self, launch_s: float, skew_s: FloatArray | float = 0.0, host_is_device: bool = False) -> FloatArray:
        """Times with the host's: where launching takes longer than the kernels, the device waits for the rest; a
        processor that is its own host does one after the other."""
        host = self.launches * launch_s + skew_s
        waiting = host if host_is_device else np.maximum(0.0, host - self.times.sum(axis=0))
        times = self.times.copy()
        times[_LAUNCH] += waiting
        return times


@dataclass(frozen=True)
class LayerTimes:
    """One layer of one micro batch on one device, each of shape (K, U)."""

    forward: FloatArray
    backward: FloatArray
    recompute: tuple[FloatArray, ...]
    """What each kind of `layout.RECOMPUTE` adds to the backward pass."""
    weight_gradient: FloatArray
    """The part of `backward` that no other stage waits for (Qi et al. 2023, zero-bubble schedules), seconds, (U,)."""

    @cached_property
    def both(self) -> FloatArray:
        """Forward and backward together, (K, U)."""
        return self.forward + self.backward

    @cached_property
    def totals(self) -> tuple[FloatArray, FloatArray]:
        """All of the forward and all of the backward pass, each (U,)."""
        return self.forward.sum(axis=0), self.backward.sum(axis=0)

    @cached_property
    def again(self) -> FloatArray:
        """All that each kind of recomputation adds, (R, U)."""
        return np.stack([kind.sum(axis=0) for kind in self.recompute])


@dataclass(frozen=True)
class BlockTimes:
    """Layers, embedding and head of one micro batch on one device."""

    dense: LayerTimes | None
    experts: LayerTimes | None
    embedding: FloatArray
    """Forward and backward, (K, U)."""
    head_forward: FloatArray
    head_backward: FloatArray
    boundary_bytes: FloatArray
    """What one stage sends to the next, (U,)."""
    vision: LayerTimes | None = None
    """The vision tower before the embedding, if there is one (`vision.tower_times`)."""

    @cached_property
    def head(self) -> FloatArray:
        """The head's forward and backward pass together, (K, U)."""
        return self.head_forward + self.head_backward


def block_times(setting: Setting, shapes: Layouts) -> BlockTimes:
    """Times of the parts of a decoder for U different shapes."""
    work = Work(setting, shapes)
    model = setting.model
    attention = work.attention_block()
    dense = work.layer(attention, work.dense_ffn()) if model.dense_layers else None
    experts = work.layer(attention, work.expert_ffn()) if model.moe is not None else None
    head_forward, head_backward = work.head()
    # Each tensor-parallel rank sends its share, gathered again beyond (Narayanan et al. 2021, section 4.1).
    sent = work.tokens * model.hidden * work.activation_bytes / work.tensor
    return BlockTimes(dense, experts, work.embedding(), head_forward, head_backward, sent)


@dataclass(frozen=True)
class _Half:
    """Half a layer (attention or feed-forward): its passes and what each kind of recomputation repeats."""

    forward: Pass
    backward: Pass
    selective: Pass
    projections: Pass
    weight_gradient: FloatArray


class Work:
    """The parts of a layer for U shapes; each method one of them."""

    def __init__(self, setting: Setting, shapes: Layouts) -> None:
        self.setting, self.shapes = setting, shapes
        self.model, self.software, self.calibration = setting.model, setting.software, setting.calibration
        self.kernels, self.fabric = setting.kernels, setting.fabric
        self.size = len(shapes)
        self.tokens = shapes.micro_batch * setting.seq_len / shapes.context
        self.tensor = shapes.tensor
        self.sharded = np.where(shapes.sequence_parallel, shapes.tensor, 1)
        """Ranks that split what lies between the parallel regions."""
        self.activation_bytes = np.where(shapes.precision == PRECISIONS.index("fp32"), 4.0, 2.0)
        self.one = np.ones(self.size, dtype=np.int64)

    # --- building bricks ----------------------------------------------------------------------------------------------

    def empty(self) -> FloatArray:
        return np.zeros((len(COMPONENTS), self.size))

    def of(self, launches: float, **seconds: FloatArray | float) -> Pass:
        times = self.empty()
        for name, value in seconds.items():
            times[COMPONENTS.index(name)] += value
        return Pass(times, np.full(self.size, float(launches)))

    def stream(self, moved_bytes: FloatArray, kernels: float = 1.0) -> FloatArray:
        """Seconds of `kernels` kernels that move so many bytes together."""
        moved_bytes = moved_bytes * self.software.stream_factor
        each = self.kernels.memory_bound(moved_bytes / (kernels * self.calibration.memory_efficiency))
        return kernels * each

    def product(self, m: FloatArray, n: FloatArray, k: FloatArray, low: bool = True) -> FloatArray:
        """Seconds of a matrix product (m, k) x (k, n); in fp8 only where `low` allows."""
        return self._sustained(lambda precision: self.kernels.gemm(m, n, k, precision), low)

    def grouped(self, groups: FloatArray, m: FloatArray, n: FloatArray, k: FloatArray) -> FloatArray:
        """Seconds of as many products of that shape, side by side or one after the other."""
        if self.software.experts == "sequential":
            return groups * self.product(m, n, k)
        return self._sustained(lambda precision: self.kernels.grouped_gemm(groups, m, n, k, precision), True)

    def _sustained(self, timed: Callable[[Precision], FloatArray], low: bool) -> FloatArray:
        """Seconds of products in each shape's precision, at the rate that a device keeps up.

        Power bounds what narrower numbers gain: none is faster than bf16 by more than `low_precision_gain` for each
        halving, however fast a short measurement was.
        """

        def kept_up(precision: Precision) -> FloatArray:
            time = timed(precision) / self.setting.sustained(precision)
            halvings = {"fp8": 1, "fp4": 2}.get(precision, 0)
            if halvings:
                time = np.maximum(time, kept_up("bf16") / self.calibration.low_precision_gain**halvings)
            return time

        return self.by_precision(kept_up, low)

    def by_precision(self, timed: Callable[[Precision], FloatArray], low: bool) -> FloatArray:
        """Each shape's time in its precision; in bf16 instead of what is narrower where `low` is false."""
        out = np.zeros(self.size)
        for code in np.unique(self.shapes.precision):
            name: Precision = PRECISIONS[code]
            if not low and name in ("fp8", "fp4"):
                name = "bf16"
            out = np.where(self.shapes.precision == code, timed(name), out)
        return out

    def exchange(self, passes: int = 1) -> FloatArray:
        """An all-reduce of the tokens over the tensor-parallel ranks, or an all-gather and a reduce-scatter."""
        size = self.tokens * self.model.hidden * self.activation_bytes
        whole = self.fabric.all_reduce(size, self.tensor, self.one)
        split = self.fabric.all_gather(size, self.tensor, self.one)
        split = split + self.fabric.reduce_scatter(size, self.tensor, self.one)
        return passes * np.where(self.shapes.sequence_parallel, split, whole)

    def regather(self) -> FloatArray:
        """The second all-gather of a layer half's input, which its weights' gradients need."""
        size = self.tokens * self.model.hidden * self.activation_bytes
        return np.where(
            self.shapes.sequence_parallel & (self.tensor > 1), self.fabric.all_gather(size, self.tensor, self.one), 0.0
        )

    def tensor_times(self) -> tuple[FloatArray, FloatArray]:
        """Exposed exchanges of half a layer, forward and backward."""
        forward = self.exchange() * (1.0 - self.software.tensor_overlap_forward)
        backward = (self.exchange() + self.regather()) * (1.0 - self.software.tensor_overlap_backward)
        return forward, backward

    def norms(self, count: float) -> tuple[FloatArray, FloatArray, float]:
        """Seconds forward and backward of normalisations and residual sums, and their kernels.

        A normalisation reads and writes the tokens; backward it reads its input and the gradient and writes one. A
        residual sum reads two and writes one (with dropout also a mask), and its gradient is the same tensor again.
        """
        rows = self.tokens * self.model.hidden / self.sharded
        if self.software.operator_traffic:
            norm, sums = self.traffic("norm"), self.traffic("residual")
            passes = [self.stream(rows * (norm[i] * count + sums[i])) for i in (0, 1)]
            return passes[0], passes[1], count + 1
        e = self.activation_bytes
        residual = 3 * e + (1 if self.software.dropout else 0)
        forward = rows * (2 * e * count + residual)
        backward = rows * (4 * e * count + residual + (3 if self.software.dropout else 0))
        kernels = count + 1
        if self.software.elementwise == "unfused":
            backward = backward + rows * 2 * e
        return self.stream(forward, kernels), self.stream(backward, kernels), kernels

    def accumulation(self, weights: FloatArray, kind: str = "fused") -> FloatArray:
        """Adding a micro batch's weight gradients to their running sum, where the product doesn't do it."""
        if "unfused" not in (self.software.gradient_accumulation, kind):
            return np.zeros(self.size)
        return self.stream(weights * (2 + 2 * self.software.gradient_bytes), 2.0)

    def traffic(self, operators: str) -> tuple[FloatArray, FloatArray]:
        """Bytes per element of operators that the software counts itself, forward and backward."""
        counted = self.software.operator_traffic
        forward, backward = np.zeros(self.size), np.zeros(self.size)
        for code in np.unique(self.shapes.precision):
            of_precision = counted.get(PRECISIONS[code], counted.get("fp32"))
            each = getattr(of_precision, operators) if of_precision is not None else (0.0, 0.0)
            here = self.shapes.precision == code
            forward, backward = np.where(here, each[0], forward), np.where(here, each[1], backward)
        return forward, backward

    def operators(self, operators: str, elements: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Seconds of such operators, forward and backward; none where the software doesn't count them."""
        if not self.software.operator_traffic:
            return np.zeros(self.size), np.zeros(self.size)
        forward, backward = (elements * each for each in self.traffic(operators))
        return (
            np.where(forward > 0.0, self.stream(forward), 0.0),
            np.where(backward > 0.0, self.stream(backward), 0.0),
        )

    def precision_casts(self, elements: FloatArray) -> FloatArray:
        """Casting and transposing what fp8 products read: two bytes in, one out, and that once more."""
        eight = self.shapes.precision == PRECISIONS.index("fp8")
        return np.where(eight, self.stream(elements * self.calibration.cast_bytes, 1.0), 0.0)

    # --- attention ----------------------------------------------------------------------------------------------------

    def attention_block(self) -> _Half:
        model, tokens = self.model, self.tokens
        heads = model.heads / self.tensor
        kv_heads = np.maximum(1.0, model.kv_heads / self.tensor)
        products, q_width = self._attention_products(heads, kv_heads)
        forward_matmul = sum((self.product(tokens, n, k) for n, k in products), np.zeros(self.size))
        data_gradient = sum((self.product(tokens, k, n) for n, k in products), np.zeros(self.size))
        weight_gradient = sum((self.product(n, k, tokens) for n, k in products), np.zeros(self.size))
        weights = sum((n * k for n, k in products), np.zeros(self.size))
        core_forward, core_backward, scores_forward, scores_backward = self._core(heads, kv_heads)
        context = self._context_exchange(kv_heads, core_forward)
        norm_forward, norm_backward, norm_kernels = self.norms(
            1 + (model.norm_placement == "sandwich") + (0.5 if model.qk_norm else 0.0)
        )
        e = self.activation_bytes
        rotary = tokens * (q_width + kv_heads * model.head_dim) * 2 * e if model.position == "rope" else 0.0 * tokens
        shuffled = rotary
        if self.software.elementwise == "unfused":
            # Queries, keys and values are split and laid out by head, the result is laid out by token again.
            shuffled = rotary + tokens * 2 * e * (2 * q_width + 2 * kv_heads * model.head_dim)
        layout = layout_backward = self.stream(shuffled + 1.0, 3.0)
        if self.software.operator_traffic:
            layout, layout_backward = self.operators("rotary", tokens * (q_width + kv_heads * model.head_dim))
        cast_forward, cast_backward = self.operators("weight", weights)
        tensor_forward, tensor_backward = self.tensor_times()
        casts = self.precision_casts(tokens * (model.hidden + q_width)) + cast_forward
        gradient_casts = self.precision_casts(tokens * sum(n for n, _ in products)) + cast_backward
        count = self.software.kernels_per_layer
        core = self.of(2, attention=core_forward, memory=scores_forward)
        forward = core + self.of(
            count / 2 - 2, matmul=forward_matmul, memory=norm_forward + layout + casts, tensor=tensor_forward,
            context=context,
        )  # fmt: skip
        backward = self.of(
            count,
            matmul=data_gradient + weight_gradient,
            attention=core_backward,
            memory=norm_backward + layout_backward + gradient_casts + scores_backward + self.accumulation(weights),
            tensor=tensor_backward,
            context=2.0 * context,
        )
        projections = core + self.of(norm_kernels, memory=norm_forward + layout)
        return _Half(forward, backward, core, projections, weight_gradient)

    def _attention_products(
        self, heads: FloatArray, kv_heads: FloatArray
    ) -> tuple[list[tuple[FloatArray, FloatArray]], FloatArray]:
        """The (n, k) of the products of attention's linear maps on one device, and the width of its queries."""
        model = self.model
        hidden = np.full(self.size, float(model.hidden))
        mla = model.latent_attention
        if mla is None:
            width = heads * model.head_dim
            joined = width + 2 * kv_heads * model.head_dim
            return [(joined, hidden), (hidden, width)], width
        q_width = heads * (mla.nope_head_dim + mla.rope_head_dim)
        v_width = heads * mla.value_head_dim
        latent = np.full(self.size, float(mla.kv_rank))
        rank = np.full(self.size, float(mla.q_rank))
        products = [(rank, hidden), (q_width, rank)] if mla.q_rank else [(q_width, hidden)]
        products += [
            (np.full(self.size, float(mla.kv_rank + mla.rope_head_dim)), hidden),
            (heads * (mla.nope_head_dim + mla.value_head_dim), latent),
            (hidden, v_width),
        ]
        return products, q_width

    def _core(self, heads: FloatArray, kv_heads: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Attention's core: products forward and backward, and the scores' traffic where they are written out."""
        model, seq_len = self.model, self.setting.seq_len
        batch, context = self.shapes.micro_batch, self.shapes.context
        mla = model.latent_attention
        key_dim = mla.nope_head_dim + mla.rope_head_dim if mla else model.head_dim
        value_dim = mla.value_head_dim if mla else model.head_dim
        zero = np.zeros(self.size)
        if self.software.attention != "unfused":
            seq = np.full(self.size, float(seq_len))
            dim = np.full(self.size, (key_dim + value_dim) / 2)
            ratio, capped = self.calibration.attention_backward, model.attention_softcap is not None

            def passes(precision: Precision) -> tuple[FloatArray, FloatArray]:
                return self.kernels.attention_passes(batch, seq, heads, kv_heads, dim, precision, ratio, capped)

            slowdown = self.setting.device.flash_2_slowdown if self.software.attention == "flash-2" else 1.0
            # A window leaves that share of the causal half, which fused kernels skip by blocks.
            window = model.attended(seq_len) / (seq_len / 2)
            share = slowdown * window / context
            forward = self.by_precision(lambda precision: passes(precision)[0], False) * share
            backward = self.by_precision(lambda precision: passes(precision)[1], False) * share
            return forward, backward, zero, zero
        scores = batch * heads * seq_len * (seq_len / context)
        rows = np.full(self.size, float(seq_len))
        # A batched product, one for each head: a product of as many rows as all heads have, with a head's depth.
        forward = self.product(batch * heads * rows / context, rows, np.full(self.size, float(key_dim)), False)
        forward = forward + self.product(
            batch * heads * rows / context, np.full(self.size, float(value_dim)), rows, False
        )
        dropout = 5 if self.software.dropout else 0
        return (
            forward,
            2.0 * forward,
            self.stream(scores * (4 + dropout), 2.0),
            self.stream(scores * (6 + dropout), 2.0),
        )

    def _context_exchange(self, kv_heads: FloatArray, core_forward: FloatArray) -> FloatArray:
        """Exposed part of a ring of keys and values (Liu et al. 2023, arXiv:2310.01889): each of its steps hides
        behind the attention of a block, and what is longer than that stays."""
        model, context = self.model, self.shapes.context
        mla = model.latent_attention
        width = (
            kv_heads * 2 * model.head_dim
            if mla is None
            else np.full(self.size, 1.0) * model.heads / self.tensor * (2 * mla.nope_head_dim + mla.rope_head_dim)
        )
        block = self.tokens * width * self.activation_bytes
        each = self.fabric.send(block, self.tensor)
        hidden = core_forward / context
        return np.where(context > 1, (context - 1) * np.maximum(each - hidden, 0.0), 0.0)

    # --- feed-forward -------------------------------------------------------------------------------------------------

    def dense_ffn(self) -> _Half:
        """Half a layer with a dense feed-forward network: norm, network, exchange."""
        inside = self._dense(self.model.ffn_hidden / self.tensor)
        norm_forward, norm_backward, norm_kernels = self.norms(1 + (self.model.norm_placement == "sandwich"))
        tensor_forward, tensor_backward = self.tensor_times()
        count = self.software.kernels_per_layer
        return _Half(
            inside.forward + self.of(count / 2 - _DENSE_KERNELS, memory=norm_forward, tensor=tensor_forward),
            inside.backward + self.of(count - 2 * _DENSE_KERNELS, memory=norm_backward, tensor=tensor_backward),
            inside.selective,
            inside.projections + self.of(norm_kernels, memory=norm_forward),
            inside.weight_gradient,
        )

    def _dense(self, width: FloatArray) -> _Half:
        """The products and the activation of a dense feed-forward network, without its norm and its exchanges."""
        model, tokens = self.model, self.tokens
        hidden = np.full(self.size, float(model.hidden))
        inner = width * (2 if model.gated_mlp else 1)
        up, down = self.product(tokens, inner, hidden), self.product(tokens, hidden, width)
        data_gradient = self.product(tokens, hidden, inner) + self.product(tokens, width, hidden)
        weight_gradient = self.product(inner, hidden, tokens) + self.product(hidden, width, tokens)
        e = self.activation_bytes
        gate = self.stream(tokens * (inner + width) * e, 1.0)
        gate_backward = self.stream(tokens * (2 * inner + width) * e, 1.0)
        if self.software.operator_traffic:
            gate, gate_backward = self.operators("gate", tokens * width)
        cast_forward, cast_backward = self.operators("weight", hidden * (inner + width))
        casts = self.precision_casts(tokens * (hidden + width)) + cast_forward
        gradient_casts = self.precision_casts(tokens * (hidden + inner)) + cast_backward
        return _Half(
            self.of(_DENSE_KERNELS, matmul=up + down, memory=gate + casts),
            self.of(
                2 * _DENSE_KERNELS,
                matmul=data_gradient + weight_gradient,
                memory=gate_backward + gradient_casts + self.accumulation(hidden * (inner + width)),
            ),
            self.of(0),
            self.of(2, matmul=up, memory=gate),
            weight_gradient,
        )

    def expert_ffn(self) -> _Half:
        """Router, dispatch, experts, combine; shared experts as a dense network beside them."""
        model, shapes, moe = self.model, self.shapes, self.model.moe
        assert moe is not None
        hidden = np.full(self.size, float(model.hidden))
        e = self.activation_bytes
        # With fewer ranks inside an expert than in attention, each rank brings its own share of the tokens.
        tokens = self.tokens * shapes.expert_tensor / self.tensor
        factor = self.software.capacity_factor or 1.0
        rows = tokens * moe.top_k * factor
        local_experts = moe.experts / shapes.expert
        per_expert = rows / local_experts
        width = moe.expert_hidden / shapes.expert_tensor
        inner = width * (2 if model.gated_mlp else 1)
        up, down = (
            self.grouped(local_experts, per_expert, inner, hidden),
            self.grouped(local_experts, per_expert, hidden, width),
        )
        data_gradient = self.grouped(local_experts, per_expert, hidden, inner) + self.grouped(
            local_experts, per_expert, width, hidden
        )
        weight_gradient = self.grouped(local_experts, inner, hidden, per_expert) + self.grouped(
            local_experts, hidden, width, per_expert
        )
        routed = self.tokens / self.sharded
        router = self.product(routed, np.full(self.size, float(moe.experts)), hidden, False)
        shuffled = shuffled_backward = self.stream(rows * model.hidden * 2 * e * 2, 2.0)
        gate = self.stream(rows * (inner + width) * e, 1.0)
        gate_backward = self.stream(rows * (2 * inner + width) * e, 1.0)
        if self.software.operator_traffic:
            shuffled, shuffled_backward = self.operators("routed_row", rows * model.hidden)
            gate, gate_backward = self.operators("routed_gate", rows * width)
        cast_forward, cast_backward = self.operators("weight", local_experts * hidden * (inner + width))
        casts = self.precision_casts(rows * (hidden + width)) + cast_forward
        gradient_casts = self.precision_casts(rows * (hidden + inner)) + cast_backward
        norm_forward, norm_backward, _ = self.norms(1 + (model.norm_placement == "sandwich"))
        # Each way, each rank sends the rows of its own tokens; with tensor parallelism inside experts its group has
        # gathered them first and reduces them afterwards.
        sent = tokens / shapes.expert_tensor * moe.top_k * factor * model.hidden * e
        dispatch = self.fabric.all_to_all(sent, shapes.expert, shapes.expert_tensor)
        expert_exchange = 2.0 * dispatch * (1.0 - self.software.expert_overlap)
        gathered = rows * model.hidden * e
        inside = self.fabric.all_gather(gathered, shapes.expert_tensor, self.one)
        inside = inside + self.fabric.reduce_scatter(gathered, shapes.expert_tensor, self.one)
        eight = self.shapes.precision == PRECISIONS.index("fp8")
        host = self.software.expert_host_s * np.where(eight, 2.0, 1.0)
        launches = self.software.kernels_per_layer / 2 + 24
        if self.software.experts == "sequential":
            launches = launches + self.software.kernels_per_expert * float(np.max(local_experts, initial=0.0))
        forward = self.of(
            launches,
            matmul=up + down + router,
            memory=norm_forward + shuffled + gate + casts,
            expert=expert_exchange,
            tensor=inside,
            launch=host,
        )
        backward = self.of(
            2 * launches,
            matmul=data_gradient + weight_gradient + 2 * router,
            memory=norm_backward
            + shuffled_backward
            + gate_backward
            + gradient_casts
            + self.accumulation(local_experts * hidden * (inner + width), self.software.expert_gradient_accumulation),
            expert=expert_exchange,
            tensor=inside,
            launch=host,
        )
        projections = self.of(
            launches, matmul=up, memory=norm_forward + shuffled / 2 + gate, expert=expert_exchange / 2
        )
        half = _Half(forward, backward, self.of(0), projections, weight_gradient)
        if not model.shared_width:
            return half
        # Shared experts or a residual network: a dense one beside the routed ones, under their norm, with exchanges of
        # its own.
        shared = self._dense(model.shared_width / self.tensor)
        tensor_forward, tensor_backward = self.tensor_times()
        return _Half(
            half.forward + shared.forward + self.of(0, tensor=tensor_forward),
            half.backward + shared.backward + self.of(0, tensor=tensor_backward),
            half.selective,
            half.projections + shared.projections,
            half.weight_gradient + shared.weight_gradient,
        )

    # --- whole layers, and what stands before and behind them ---------------------------------------------------------

    def layer(self, attention: _Half, ffn: _Half) -> LayerTimes:
        launch, own = self.software.launch_s, self.kernels.host_is_device
        # Hosts that launch as fast as they can meet at each exchange of the tensor-parallel ranks, two a pass.
        skew = np.where(2 * self.tensor > self.fabric.node_devices, 2.0 * self.software.socket_skew_s, 0.0)
        forward, backward = attention.forward + ffn.forward, attention.backward + ffn.backward
        selective = attention.selective + ffn.selective
        projections = attention.projections + ffn.projections
        plain = backward.settled(launch, skew, own)
        recompute = [np.zeros_like(plain)]
        for again, exchanges in ((selective, 0.0), (projections, 0.0), (forward, skew)):
            recompute.append((backward + again).settled(launch, skew + exchanges, own) - plain)
        return LayerTimes(
            forward.settled(launch, skew, own), plain, tuple(recompute), attention.weight_gradient + ffn.weight_gradient
        )

    def embedding(self) -> FloatArray:
        """Reading rows of the table and adding their gradients, (K, U)."""
        rows = self.tokens * self.model.hidden / self.sharded
        times = self.empty()
        times[_MEMORY] = self.stream(rows * 3 * self.activation_bytes, 2.0)
        times[_MEMORY] += self.stream(rows * (self.activation_bytes + 8), 2.0)
        times[_TENSOR] = np.where(self.tensor > 1, self.exchange(), 0.0)
        return times

    def head(self) -> tuple[FloatArray, FloatArray]:
        """Final normalisation, logits and loss, forward and backward, (K, U)."""
        model, tokens = self.model, self.tokens
        vocab = np.full(self.size, float(model.vocab)) / self.tensor
        hidden = np.full(self.size, float(model.hidden))
        logits = tokens * vocab
        # Fused: logits are read twice and their gradient written once. Unfused, in fp32 (the vocabulary-parallel loss
        # of Shoeybi et al. 2019): cast, maximum, difference, exponential, sum, quotient; backward copy, scale, cast.
        fused = self.software.cross_entropy == "fused"
        forward_bytes, backward_bytes = (8.0, 6.0) if fused else (46.0, 30.0)
        forward, backward = self.empty(), self.empty()
        forward[_MATMUL] = self.product(tokens, vocab, hidden, False)
        backward[_MATMUL] = self.product(tokens, hidden, vocab, False) + self.product(vocab, hidden, tokens, False)
        forward[_MEMORY] = self.stream(logits * forward_bytes, 3.0)
        backward[_MEMORY] = self.stream(logits * backward_bytes, 3.0)
        if self.software.operator_traffic:
            forward[_MEMORY], backward[_MEMORY] = self.operators("logits", logits)
        backward[_MEMORY] += self.accumulation(vocab * hidden)
        size = tokens * model.hidden * self.activation_bytes
        gathered = self.fabric.all_gather(size, self.tensor, self.one)
        forward[_TENSOR] = np.where(self.shapes.sequence_parallel, gathered, 0.0)
        backward[_TENSOR] = np.where(
            self.shapes.sequence_parallel,
            self.fabric.reduce_scatter(size, self.tensor, self.one),
            self.fabric.all_reduce(size, self.tensor, self.one),
        )
        return forward, backward
