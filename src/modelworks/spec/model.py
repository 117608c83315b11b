"""What a network is: the fields that select one decoder, and the parameters that follow from them.

One class covers the Grok family and its open cousins (Llama, Mixtral, GPT-3, DeepSeek-V3). A field that a network
doesn't have is left at its default. `ModelSpec.parameters` counts from the fields alone, so that a network of
hundreds of billions of parameters is counted without building it; `model/` builds the same count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from modelworks.spec.fields import PositiveFloat, PositiveInt, Section

NonNegativeInt = Annotated[int, Field(ge=0)]


class MoESpec(Section):
    """The mixture of experts that stands in place of a layer's feed-forward network."""

    experts: PositiveInt
    top_k: PositiveInt
    expert_hidden: PositiveInt
    """Width of one expert."""
    shared_experts: NonNegativeInt = 0
    """Experts of the same width that every token passes through (DeepSeek)."""
    residual: bool = False
    """Whether a dense feed-forward network of the model's `ffn_hidden` stands beside the experts (Grok-2)."""
    dense_layers: NonNegativeInt = 0
    """How many of the first layers keep a dense feed-forward network of the model's `ffn_hidden`."""
    renormalize: bool = False
    """Whether the chosen experts' gates are rescaled to sum to one (Mixtral: yes; Grok-1: no)."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    routed_multiplier: PositiveFloat = 1.0
    router_softcap: PositiveFloat | None = None

    @model_validator(mode="after")
    def _top_k_within_experts(self) -> MoESpec:
        if self.top_k > self.experts:
            raise ValueError(
                f"moe.top_k = {self.top_k} needs at least as many experts, and moe.experts = {self.experts}"
            )
        return self


class LatentAttentionSpec(Section):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values through a low-rank bottleneck."""

    q_rank: NonNegativeInt
    """Rank of the queries' bottleneck; 0 for none."""
    kv_rank: PositiveInt
    rope_head_dim: PositiveInt
    """Dimensions of a head that carry the rotary position, beside `nope_head_dim` that do not."""
    nope_head_dim: PositiveInt
    value_head_dim: PositiveInt


class ModelSpec(Section):
    """A decoder-only transformer.

    Sizes are in elements. `heads`, `kv_heads` and `head_dim` give the attention's widths, which need not multiply
    to `hidden`.
    """

    name: str = "model"
    preset: str | None = None
    """The catalog entry that the fields came from, if any; fields given beside it win."""

    layers: PositiveInt
    hidden: PositiveInt
    ffn_hidden: PositiveInt
    """Width of a dense feed-forward network; with experts in every layer, only stated."""
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab: PositiveInt
    context: PositiveInt
    """Longest sequence, in tokens."""

    activation: Literal["silu", "gelu"] = "silu"
    """`gelu` is the tanh approximation, as in Grok-1 and GPT-3."""
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: PositiveFloat = 1e-5
    norm_placement: Literal["pre", "sandwich"] = "pre"
    """`sandwich` normalises before and after attention and feed-forward (Grok-1)."""
    qk_norm: bool = False
    """RMSNorm with a learned scale on each query and key head, before the rotary embedding (Qwen3)."""
    position: Literal["rope", "learned"] = "rope"
    rope_base: PositiveFloat = 10_000.0
    rope_scaling: dict[str, float | str] | None = None
    """Context extension as the Hugging Face `rope_scaling` table states it; kept for planning and refused by `model/`
    where it isn't implemented."""
    attention_multiplier: PositiveFloat | None = None
    """What attention logits are multiplied with; `head_dim ** -0.5` if unset."""
    attention_softcap: PositiveFloat | None = None
    """`c` in `c * tanh(logits / c)`."""
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: PositiveInt | None = None
    """How many tokens attention looks back on, itself included, in every layer (Mistral 7B); unset for all."""
    latent_attention: LatentAttentionSpec | None = None
    embedding_multiplier: PositiveFloat = 1.0
    output_multiplier: PositiveFloat = 1.0
    output_softcap: PositiveFloat | None = None
    tied_embeddings: bool = False
    moe: MoESpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """`kv_heads` defaults to `heads`, `head_dim` to `hidden / heads`, `ffn_hidden` to the experts' width."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        hidden, heads = values.get("hidden"), values.get("heads")
        if heads is not None:
            values.setdefault("kv_heads", heads)
        if "head_dim" not in values and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            if hidden % heads:
                raise ValueError(f"hidden = {hidden} doesn't divide by heads = {heads}; give head_dim")
            values["head_dim"] = hidden // heads
        moe = values.get("moe")
        if "ffn_hidden" not in values and isinstance(moe, dict) and "expert_hidden" in moe:
            values["ffn_hidden"] = moe["expert_hidden"]
        return values

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} doesn't divide by kv_heads = {self.kv_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even for a rotary embedding")
        if self.moe is not None and self.moe.dense_layers > self.layers:
            raise ValueError(f"moe.dense_layers = {self.moe.dense_layers} is more than layers = {self.layers}")
        return self

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return 0 if self.moe is None else self.layers - self.moe.dense_layers

    @property
    def dense_layers(self) -> int:
        """How many layers have a dense feed-forward network."""
        return self.layers - self.moe_layers

    @property
    def shared_width(self) -> int:
        """Width of the dense networks that every token passes through beside the experts it is sent to."""
        if self.moe is None:
            return 0
        return self.moe.shared_experts * self.moe.expert_hidden + (self.ffn_hidden if self.moe.residual else 0)

    def attended(self, seq_len: int) -> float:
        """How many tokens one token of a causal sequence attends to on average: half, or up to a window of them."""
        window = min(self.sliding_window or seq_len, seq_len)
        return window - window**2 / (2.0 * seq_len)

    @property
    def attention_scale(self) -> float:
        """What attention logits are multiplied with."""
        return self.attention_multiplier or self.head_dim**-0.5

    @cached_property
    def parameters(self) -> ParameterCount:
        """The network's parameters by kind."""
        return count_parameters(self)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole network, by kind; `active` is what one token passes through."""

    embedding: int
    """The input table, and the learned positions where there are any."""
    head: int
    """The output matrix; 0 where it is tied to the embedding."""
    attention: int
    dense_ffn: int
    experts: int
    """All routed experts."""
    shared_experts: int
    """All that every token passes through beside routed experts."""
    router: int
    norms: int
    active_experts: int
    """The routed experts that one token passes through."""

    @property
    def total(self) -> int:
        """All parameters, tied ones counted once."""
        return (
            self.embedding
            + self.head
            + self.attention
            + self.dense_ffn
            + self.experts
            + self.shared_experts
            + self.router
            + self.norms
        )

    @property
    def active(self) -> int:
        """The parameters that one token's forward pass uses, the embedding tables included."""
        return self.total - self.experts + self.active_experts


def count_parameters(model: ModelSpec) -> ParameterCount:
    """Count a network's parameters from its fields.

    Weights and biases of every linear map, the scales (and for LayerNorm the shifts) of every normalisation, tied
    matrices once. Multi-head latent attention as in DeepSeek-V2 (arXiv:2405.04434), section 2.1.
    """
    hidden, layers = model.hidden, model.layers
    norm_size = hidden * (2 if model.norm == "layer" else 1)
    norms_per_layer = 2 * norm_size * (2 if model.norm_placement == "sandwich" else 1)

    if model.latent_attention is None:
        q_width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
        attention = hidden * (q_width + 2 * kv_width) + q_width * hidden
        attention += (q_width + 2 * kv_width + hidden) if model.attention_bias else 0
        norms_per_layer += 2 * model.head_dim if model.qk_norm else 0
    else:
        mla = model.latent_attention
        q_width = model.heads * (mla.rope_head_dim + mla.nope_head_dim)
        attention = (hidden * mla.q_rank + mla.q_rank * q_width) if mla.q_rank else hidden * q_width
        attention += hidden * (mla.kv_rank + mla.rope_head_dim)
        attention += mla.kv_rank * model.heads * (mla.nope_head_dim + mla.value_head_dim)
        attention += model.heads * mla.value_head_dim * hidden
        norms_per_layer += mla.q_rank + mla.kv_rank

    matrices = 3 if model.gated_mlp else 2
    ffn_bias = (model.ffn_hidden * (matrices - 1) + hidden) if model.mlp_bias else 0
    moe, moe_layers = model.moe, model.moe_layers
    expert = matrices * hidden * moe.expert_hidden if moe else 0
    # DeepSeek's sigmoid scoring carries a correction bias per expert.
    router = hidden * moe.experts + (moe.experts if moe.scoring == "sigmoid" else 0) if moe else 0
    return ParameterCount(
        embedding=model.vocab * hidden + (model.context * hidden if model.position == "learned" else 0),
        head=0 if model.tied_embeddings else model.vocab * hidden,
        attention=layers * attention,
        dense_ffn=model.dense_layers * (matrices * hidden * model.ffn_hidden + ffn_bias),
        experts=moe_layers * expert * moe.experts if moe else 0,
        shared_experts=moe_layers * matrices * hidden * model.shared_width,
        router=moe_layers * router,
        norms=layers * norms_per_layer + norm_size,
        active_experts=moe_layers * expert * moe.top_k if moe else 0,
    )
