"""What one training step takes on one device: its arithmetic, its time and its memory.

Two ideas. The model's FLOPs follow from its fields alone: two for each weight that a token meets in a matrix product,
and those of the attention over the tokens before it. Time is a roofline of two terms: the matrix products at a share
of the device's matrix rate, and the optimizer, which does little with every byte it moves, at its memory bandwidth.

Recomputed activations count as work (they take time) and not as model FLOPs, so MFU stays comparable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from modelworks.spec.errors import InputError
from modelworks.spec.flops import attention_flop_per_token, forward_flop_per_token
from modelworks.spec.hardware import DeviceSpec, Precision
from modelworks.spec.model import ModelSpec
from modelworks.spec.run import RunSpec

MATMUL_EFFICIENCY = 0.5
"""Share of a device's dense peak that the matrix products of a training step reach, launches, normalisations and all
that is not a matrix product included. Published dense runs on A100 and H100 reach 0.38 to 0.57 of the peak
(Narayanan et al. 2021, table 1: 44 to 52 %; Korthikanti et al. 2022, table 5: 41.5 to 57 %; Llama 3, arXiv:2407.21783,
table 4: 38 to 43 %); half is their middle."""

_WEIGHT_BYTES = 4
"""Master weights, gradients and both moments of AdamW stand in fp32."""
_NEWTON_SCHULZ_ITERATIONS = 5
"""Muon's orthogonalisation (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""


@dataclass(frozen=True)
class StepPrediction:
    """What one optimizer step takes on one device."""

    step_time_s: float
    tokens_per_s: float
    mfu: float
    """Model FLOPs over what the device's peak would do in the step's time, 0 to 1; recomputation isn't counted."""
    flop_per_step: float
    """Model FLOPs: forward and backward, recomputation not counted."""
    memory_bytes: int
    """Weights, gradients, optimizer state and the activations of one micro batch."""
    precision: Precision
    """What the matrix products run in; `auto` resolved."""
    micro_batch: int
    """Sequences per forward pass; `auto` resolved."""
    steps: int
    run_time_s: float
    """All steps; validation and checkpoints are not counted."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


def predict(run: RunSpec, device: DeviceSpec) -> StepPrediction:
    """Predict one optimizer step of `run` on one `device`.

    Raises
    ------
    InputError
        If the run is laid out over several devices, or the device has no rate for the run's precision.
    """
    if run.cluster.gpus > 1:
        raise InputError(
            f"cluster.gpus = {run.cluster.gpus} is not accepted: layouts over several devices are not planned yet, "
            "a run on one device is"
        )
    train = run.train
    precision = step_precision(run, device)
    peak_flops = device.peak_flops[precision]
    tokens = train.tokens_per_step
    forward = forward_flop_per_token(run.model, train.seq_len)
    flop_per_step = 3.0 * forward * tokens
    work = flop_per_step + _recomputed_flop_per_token(run) * tokens
    if train.optimizer == "muon":
        work += _orthogonalisation_flop(run.model)
    step_time_s = work / (peak_flops * MATMUL_EFFICIENCY) + optimizer_bytes(run.model) / device.memory_bandwidth_bytes
    micro_batch = _micro_batch(run, device, precision)
    return StepPrediction(
        step_time_s=step_time_s,
        tokens_per_s=tokens / step_time_s,
        mfu=flop_per_step / step_time_s / peak_flops,
        flop_per_step=flop_per_step,
        memory_bytes=memory_bytes(run, micro_batch, precision),
        precision=precision,
        micro_batch=micro_batch,
        steps=train.steps,
        run_time_s=train.steps * step_time_s,
    )


def step_precision(run: RunSpec, device: DeviceSpec) -> Precision:
    """The precision of the run's matrix products on a device; `auto` is bf16 where that is faster than fp32."""
    rates = device.peak_flops
    chosen: Precision
    if run.train.precision == "auto":
        chosen = "bf16" if rates.get("bf16", 0.0) > rates.get("fp32", 0.0) else "fp32"
    else:
        chosen = run.train.precision
    if chosen not in rates:
        raise InputError(
            f"train.precision = {run.train.precision!r} is not accepted on {device.name}: "
            f"its rates are known for {', '.join(rates)}"
        )
    return chosen


def optimizer_bytes(model: ModelSpec) -> int:
    """Memory traffic of one AdamW update: weight, gradient and two moments read, all but the gradient written."""
    return 7 * _WEIGHT_BYTES * model.parameters.total


def memory_bytes(run: RunSpec, micro_batch: int, precision: Precision) -> int:
    """Memory of one process: four fp32 numbers per parameter, and the activations of one micro batch."""
    state = 4 * _WEIGHT_BYTES * run.model.parameters.total
    return state + micro_batch * run.train.seq_len * activation_bytes_per_token(run, precision)


def activation_bytes_per_token(run: RunSpec, precision: Precision) -> int:
    """Bytes that the forward pass keeps of one token for the backward pass.

    The tensors that Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1, list for a layer, without dropout and
    with flash attention (no score matrix): the inputs of the normalisations and linear maps, queries, keys, values,
    and the widths inside the feed-forward networks, once for each expert that the token visits. With full
    recomputation only each layer's input is kept, and one layer's tensors at a time. Loss and logits, which are
    computed in chunks, are not counted.
    """
    model, moe = run.model, run.model.moe
    bytes_each = 4 if precision in {"fp32", "tf32"} else 2
    inner = 3 if model.gated_mlp else 2
    norms = 4 if model.norm_placement == "sandwich" else 2
    if model.latent_attention is None:
        heads_width = 2 * (model.heads + model.kv_heads) * model.head_dim
    else:
        mla = model.latent_attention
        heads_width = mla.q_rank + mla.kv_rank + mla.rope_head_dim
        heads_width += 2 * model.heads * (mla.nope_head_dim + mla.rope_head_dim + mla.value_head_dim)
    shared_by_layers = (2 + norms) * model.hidden + heads_width
    dense = inner * model.ffn_hidden
    experts = (moe.top_k + moe.shared_experts) * (inner * moe.expert_hidden + 2 * model.hidden) if moe else 0
    if run.parallel.recompute == "full":
        kept = model.layers * model.hidden + shared_by_layers + max(dense if model.dense_layers else 0, experts)
    else:
        kept = model.layers * shared_by_layers + model.dense_layers * dense + model.moe_layers * experts
    return bytes_each * kept


def _recomputed_flop_per_token(run: RunSpec) -> float:
    """FLOPs of the second forward pass: the layers' with full recomputation, the attention's with selective."""
    model, seq_len = run.model, run.train.seq_len
    if run.parallel.recompute == "full":
        return forward_flop_per_token(model, seq_len) - 2.0 * model.hidden * model.vocab
    if run.parallel.recompute == "selective":
        return model.layers * attention_flop_per_token(model, seq_len)
    return 0.0


def _orthogonalisation_flop(model: ModelSpec) -> float:
    """FLOPs of Muon's Newton-Schulz iterations over all matrices of the blocks, once per step."""
    matrices = [(1, model.hidden, model.heads * model.head_dim)] * 2
    matrices += [(1, model.hidden, model.kv_heads * model.head_dim)] * 2
    total = model.layers * sum(count * _newton_schulz_flop(rows, columns) for count, rows, columns in matrices)
    inner = 3 if model.gated_mlp else 2
    total += model.dense_layers * inner * _newton_schulz_flop(model.hidden, model.ffn_hidden)
    if model.moe is not None:
        each = inner * _newton_schulz_flop(model.hidden, model.moe.expert_hidden)
        total += model.moe_layers * (model.moe.experts + model.moe.shared_experts) * each
    return total


def _newton_schulz_flop(rows: int, columns: int) -> float:
    short, long = sorted((rows, columns))
    return _NEWTON_SCHULZ_ITERATIONS * (4.0 * short**2 * long + 2.0 * short**3)


def _micro_batch(run: RunSpec, device: DeviceSpec, precision: Precision) -> int:
    """The run's micro batch; `auto` is the largest divisor of the global batch that the device's memory holds."""
    if run.train.micro_batch != "auto":
        return run.train.micro_batch
    divisors = (size for size in range(run.train.global_batch, 0, -1) if run.train.global_batch % size == 0)
    return next((size for size in divisors if memory_bytes(run, size, precision) <= device.memory_bytes), 1)
