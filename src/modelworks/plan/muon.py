"""What Muon's update takes beyond AdamW's: the products of its Newton-Schulz iterations, once a step.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/): five times X X^T, its square, and the product with X,
for each matrix of the blocks. The trainer gathers matrices that are split, so every rank does all of its stage.
"""

from __future__ import annotations

from modelworks.plan.block import Setting
from modelworks.spec.hardware import Precision

_ITERATIONS = 5


def layer_seconds(setting: Setting, precision: Precision) -> tuple[float, float]:
    """Seconds for the matrices of one dense layer and of one layer with experts."""
    model, moe = setting.model, setting.model.moe
    attention = _attention_matrices(setting)
    inner = 3 if model.gated_mlp else 2
    dense = [*attention, *[(1, model.hidden, model.ffn_hidden)] * inner]
    experts = list(attention)
    if moe is not None:
        shared = moe.shared_hidden or moe.expert_hidden
        experts += [(moe.experts, model.hidden, moe.expert_hidden), (moe.shared_experts, model.hidden, shared)] * inner
    return (
        sum(_seconds(setting, precision, *matrix) for matrix in dense),
        sum(_seconds(setting, precision, *matrix) for matrix in experts),
    )


def _attention_matrices(setting: Setting) -> list[tuple[int, int, int]]:
    """How many matrices of which rows and columns."""
    model, mla = setting.model, setting.model.latent_attention
    if mla is None:
        wide, narrow = model.heads * model.head_dim, model.kv_heads * model.head_dim
        return [(1, model.hidden, wide)] * 2 + [(1, model.hidden, narrow)] * 2
    queries = model.heads * (mla.nope_head_dim + mla.rope_head_dim)
    found = [(1, model.hidden, mla.q_rank), (1, mla.q_rank, queries)] if mla.q_rank else [(1, model.hidden, queries)]
    return [
        *found,
        (1, model.hidden, mla.kv_rank + mla.rope_head_dim),
        (1, mla.kv_rank, model.heads * (mla.nope_head_dim + mla.value_head_dim)),
        (1, model.heads * mla.value_head_dim, model.hidden),
    ]


def _seconds(setting: Setting, precision: Precision, count: int, rows: int, columns: int) -> float:
    """Of `count` matrices: 4 m^2 n + 2 m^3 FLOPs an iteration for each, m the shorter side."""
    short, long = sorted((rows, columns))
    gemm = setting.kernels.gemm
    each = (
        gemm(short, short, long, precision) + gemm(short, short, short, precision) + gemm(short, long, short, precision)
    )
    return float(count * _ITERATIONS * each / setting.sustained(precision))
