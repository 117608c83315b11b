"""The floating-point operations of a network, from its fields alone: what a plan predicts and MFU is measured in.

Two for each weight that a token meets in a matrix product, and those of the attention over the tokens before it. The
backward pass takes twice as much as the forward pass. Recomputed activations are work and not model FLOPs.
"""

from __future__ import annotations

from modelworks.spec.model import ModelSpec


def training_flop_per_token(model: ModelSpec, seq_len: int) -> float:
    """FLOPs of one token's forward and backward pass; parameters as of `forward_flop_per_token`."""
    return 3.0 * forward_flop_per_token(model, seq_len)


def forward_flop_per_token(model: ModelSpec, seq_len: int) -> float:
    """FLOPs of one token's forward pass in a sequence of `seq_len` tokens, averaged over the sequence.

    Narayanan et al. 2021 (arXiv:2104.04473), the forward part of eq. 3, with three changes: the widths of queries,
    keys and values are the model's own (grouped queries, latent attention); only the experts that a token is sent to
    count; and attention counts half of the score matrix, as a causal mask leaves it and as flash kernels compute it.
    A vision tower's FLOPs on the images of a sequence are spread over all its tokens.
    """
    return (
        _layers_flop_per_token(model, seq_len)
        + 2.0 * model.hidden * model.vocab
        + vision_flop_per_sequence(model) / seq_len
    )


def vision_flop_per_sequence(model: ModelSpec) -> float:
    """FLOPs of the forward pass of the vision transformer and its connector over the images of one sequence.

    Two for each weight that a patch meets, and attention over all patches of its tile; none without a tower.
    """
    vision = model.vision
    if vision is None:
        return 0.0
    tile = vision.patches * (
        2.0 * vision.patch_width * vision.hidden + _layers_flop_per_token(vision.transformer, vision.patches)
    )
    connector = 2.0 * sum(out * of for out, of in vision.connector_maps(model.hidden))
    return vision.tiles_per_sequence * tile + vision.tokens_per_sequence * connector


def _layers_flop_per_token(model: ModelSpec, seq_len: int) -> float:
    attention = 2.0 * _attention_weights(model) + attention_flop_per_token(model, seq_len)
    return model.layers * attention + 2.0 * _feed_forward_weights(model)


def attention_flop_per_token(model: ModelSpec, seq_len: int) -> float:
    """FLOPs of one layer's scores and weighted values for one token, over the tokens that it attends to."""
    if model.latent_attention is None:
        widths = 2 * model.head_dim
    else:
        mla = model.latent_attention
        widths = mla.nope_head_dim + mla.rope_head_dim + mla.value_head_dim
    return 2.0 * model.heads * widths * model.attended(seq_len)


def _attention_weights(model: ModelSpec) -> int:
    """Weights of one layer's attention maps, biases left out."""
    if model.latent_attention is None:
        return model.hidden * model.head_dim * 2 * (model.heads + model.kv_heads)
    mla = model.latent_attention
    q_width = model.heads * (mla.nope_head_dim + mla.rope_head_dim)
    queries = mla.q_rank * (model.hidden + q_width) if mla.q_rank else model.hidden * q_width
    latent = model.hidden * (mla.kv_rank + mla.rope_head_dim)
    keys_and_values = mla.kv_rank * model.heads * (mla.nope_head_dim + mla.value_head_dim)
    return queries + latent + keys_and_values + model.heads * mla.value_head_dim * model.hidden


def _feed_forward_weights(model: ModelSpec) -> int:
    """Weights of all feed-forward networks and routers that one token meets, biases left out."""
    matrices = 3 if model.gated_mlp else 2
    weights = model.dense_layers * matrices * model.hidden * model.ffn_hidden
    if model.moe is not None:
        moe = model.moe
        visited = matrices * model.hidden * (moe.top_k * moe.expert_hidden + model.shared_width)
        weights += model.moe_layers * (visited + model.hidden * (moe.experts + moe.shared_gate))
    return weights
