"""The floating-point operations that training a network takes, from its spec alone.

Model FLOPs as Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B) count them for MFU: 6 per parameter of the
matrices that a token passes through, and 12 per layer, head dimension and attended position; recomputation isn't
counted. Here attention counts only the positions that causality lets a token see, half of them on average.
"""

from __future__ import annotations

from modelworks.spec.model import ModelSpec


def matmul_parameters(model: ModelSpec) -> int:
    """Parameters of the matrices that one token is multiplied with: the active experts' and the head's (also where
    it is tied), and neither the embedding's, which are looked up, nor those of normalisations."""
    count = model.parameters
    head = model.vocab * model.hidden
    return count.attention + count.dense_ffn + count.active_experts + count.shared_experts + count.router + head


def flop_per_token(model: ModelSpec, seq_len: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq_len` tokens."""
    attention = 12 * model.layers * model.heads * model.head_dim * seq_len / 2
    return 6 * matmul_parameters(model) + attention
