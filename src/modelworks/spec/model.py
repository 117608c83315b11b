"""What a network is: the fields that select one decoder, and the parameters that follow from them.

One class covers the Grok family and its open cousins (Llama, Mixtral, Qwen, GPT-3, DeepSeek-V3), with a vision tower
where there is one (Grok-1.5V, SmolVLM). A field that a network doesn't have is left at its default.
`ModelSpec.parameters` counts from the fields alone, so that a network of hundreds of billions of parameters is counted
without building it; `model/` builds the same count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from modelworks.spec.fields import PositiveFloat, PositiveInt, Section
from modelworks.spec.rope import RopeScalingSpec

NonNegativeInt = Annotated[int, Field(ge=0)]
PIXEL_MEAN = PIXEL_DEVIATION = 0.5
"""What is taken off a colour from 0 to 1, and what it is then divided by, before a vision tower sees it (SigLIP)."""


class MoESpec(Section):
    """The mixture of experts that stands in place of a layer's feed-forward network."""

    experts: PositiveInt
    top_k: PositiveInt
    expert_hidden: PositiveInt
    """Width of one expert."""
    shared_experts: NonNegativeInt = 0
    """Experts that every token passes through (DeepSeek)."""
    shared_hidden: PositiveInt | None = None
    """Width of a shared expert where it isn't `expert_hidden` (Qwen2-MoE)."""
    shared_gate: bool = False
    """Whether each token weighs what its shared experts give, by a sigmoid (Qwen2-MoE)."""
    residual: bool = False
    """Whether a dense feed-forward network of the model's `ffn_hidden` stands beside the experts; the sum of both is
    then divided by the square root of two (Grok-2)."""
    dense_layers: NonNegativeInt = 0
    """How many of the first layers keep a dense feed-forward network of the model's `ffn_hidden`."""
    renormalize: bool = False
    """Whether the chosen experts' gates are rescaled to sum to one (Mixtral: yes; Grok-1: no)."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    routed_multiplier: PositiveFloat = 1.0
    router_softcap: PositiveFloat | None = None
    """`c` in `c * tanh(logits / c)` of the router's logits (Grok-2)."""

    @model_validator(mode="after")
    def _top_k_within_experts(self) -> MoESpec:
        if self.top_k > self.experts:
            raise ValueError(
                f"moe.top_k = {self.top_k} needs at least as many experts, and moe.experts = {self.experts}"
            )
        if not self.shared_experts and (self.shared_hidden is not None or self.shared_gate):
            raise ValueError("moe.shared_hidden and moe.shared_gate need moe.shared_experts of 1 or more")
        return self

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together."""
        return self.shared_experts * (self.shared_hidden or self.expert_hidden)


class LatentAttentionSpec(Section):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values through a low-rank bottleneck."""

    q_rank: NonNegativeInt
    """Rank of the queries' bottleneck; 0 for none."""
    kv_rank: PositiveInt
    rope_head_dim: PositiveInt
    """Dimensions of a head that carry the rotary position, beside `nope_head_dim` that do not."""
    nope_head_dim: PositiveInt
    value_head_dim: PositiveInt


class VisionSpec(Section):
    """Eyes in front of the decoder: a vision transformer, and the connector that makes tokens of its patches.

    Tiles are cut into square patches; a transformer attends from each patch of a tile to all of them, in both
    directions (Dosovitskiy et al. 2020, arXiv:2010.11929; LayerNorm before each half, a plain feed-forward network,
    biases everywhere, learned positions, no class token: SigLIP, arXiv:2303.15343, without its pooling head). Squares
    of patches are then joined, and mapped to the decoder's width (Laurencon et al. 2024, arXiv:2408.12637).
    """

    image_size: PositiveInt
    """Height and width of a tile in pixels; what does not fill a patch is cut off."""
    patch_size: PositiveInt
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    ffn_hidden: PositiveInt
    pixel_shuffle: PositiveInt = 1
    """So many patches to each side become one token of the decoder."""
    norm_eps: PositiveFloat = 1e-6
    connector_hidden: PositiveInt | None = None
    """Inner width of a connector of two maps and a GELU between them, with biases; unset for one map without bias."""
    tiles: PositiveInt = 1
    """Tiles that an image is cut into at most, its thumbnail among them; 1 for the thumbnail alone."""
    images: PositiveInt = 1
    """Images in a training sequence; their tokens are part of its length."""
    image_token: NonNegativeInt | None = None
    """The token that holds the places of an image's tokens; a network is built with it, a plan does without."""

    @model_validator(mode="after")
    def _divisible(self) -> VisionSpec:
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size = {self.patch_size} is larger than image_size = {self.image_size}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} doesn't divide by heads = {self.heads}")
        side = self.image_size // self.patch_size
        if side % self.pixel_shuffle:
            raise ValueError(
                f"pixel_shuffle = {self.pixel_shuffle} doesn't divide image_size / patch_size = {side} patches"
            )
        return self

    @property
    def patches(self) -> int:
        """Patches of one tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of the decoder that a tile takes."""
        return self.patches // self.pixel_shuffle**2

    @property
    def tiles_per_side(self) -> int:
        """Tiles along an image's longer side; 1 where it isn't cut, since then the thumbnail shows as much."""
        return max(1, math.isqrt(self.tiles - 1))

    @property
    def tiles_per_sequence(self) -> int:
        """Tiles of all of a sequence's images."""
        return self.images * self.tiles

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens of the decoder that a sequence's images take."""
        return self.tiles_per_sequence * self.tokens_per_tile

    @property
    def transformer(self) -> EncoderSpec:
        """The vision transformer as a network of its own, over the patches of one tile.

        Its patches come from no vocabulary: `vocab` means nothing.
        """
        return EncoderSpec(
            name="vision", layers=self.layers, hidden=self.hidden, ffn_hidden=self.ffn_hidden, heads=self.heads,
            kv_heads=self.heads, head_dim=self.hidden // self.heads, vocab=1, context=self.patches, activation="gelu",
            gated_mlp=False, norm="layer", norm_eps=self.norm_eps, position="learned", attention_bias=True,
            mlp_bias=True,
        )  # fmt: skip

    def connector_maps(self, width: int) -> list[tuple[int, int]]:
        """The (out, in) of the connector's linear maps onto a decoder of that width."""
        joined = self.pixel_shuffle**2 * self.hidden
        if self.connector_hidden is None:
            return [(width, joined)]
        return [(self.connector_hidden, joined), (width, self.connector_hidden)]

    @property
    def patch_width(self) -> int:
        """Numbers in a patch: its pixels in three colours."""
        return 3 * self.patch_size**2


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
    rope_scaling: RopeScalingSpec | None = None
    """Context extension, in the words of the Hugging Face `rope_scaling` table; ``{rope_type = "default"}``
    takes that of a preset away."""
    attention_multiplier: PositiveFloat | None = None
    """What attention logits are multiplied with; `head_dim ** -0.5` if unset."""
    attention_softcap: PositiveFloat | None = None
    """`c` in `c * tanh(logits / c)`."""
    attention_temperature_length: Annotated[int, Field(ge=2)] | None = None
    """From this position on, counted from 0, a token's attention logits are multiplied by `log(position) / log(length)`
    after their cap (Grok-2): attention over more tokens stays as sharp as over fewer."""
    attention_bias: bool = False
    """Biases of all four maps of attention."""
    qkv_bias: bool = False
    """Biases of queries, keys and values alone (Qwen2)."""
    nope_interval: PositiveInt | None = None
    """Every so manieth layer has no rotary embedding, the others have (SmolLM3); unset for all."""
    mlp_bias: bool = False
    sliding_window: PositiveInt | None = None
    """How many tokens attention looks back on, itself included, in every layer (Mistral 7B); unset for all."""
    latent_attention: LatentAttentionSpec | None = None
    embedding_multiplier: PositiveFloat = 1.0
    output_multiplier: PositiveFloat = 1.0
    output_softcap: PositiveFloat | None = None
    tied_embeddings: bool = False
    moe: MoESpec | None = None
    vision: VisionSpec | None = None

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
        scaling = values.get("rope_scaling")
        if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
            values["rope_scaling"] = None
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
        if self.position != "rope" and self.rope_scaling is not None:
            raise ValueError(f"rope_scaling is not accepted beside position = {self.position!r}: 'rope' is")
        if self.qkv_bias and self.attention_bias:
            raise ValueError("qkv_bias and attention_bias are not accepted together: attention_bias has those too")
        if self.qkv_bias and self.latent_attention is not None:
            raise ValueError("qkv_bias is not accepted beside latent_attention")
        if self.nope_interval is not None and (self.position != "rope" or self.nope_interval > self.layers):
            raise ValueError(
                f"nope_interval = {self.nope_interval} needs position = 'rope' and as many layers, "
                f"and there are {self.layers}"
            )
        if self.moe is not None and self.moe.dense_layers > self.layers:
            raise ValueError(f"moe.dense_layers = {self.moe.dense_layers} is more than layers = {self.layers}")
        if self.vision is not None and (self.vision.image_token or 0) >= self.vocab:
            raise ValueError(f"vision.image_token = {self.vision.image_token} is not below vocab = {self.vocab}")
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
        return self.moe.shared_width + (self.ffn_hidden if self.moe.residual else 0)

    def has_rotary(self, layer: int) -> bool:
        """Whether a layer, counted from 0, turns its queries and keys by their positions."""
        return self.position == "rope" and (self.nope_interval is None or (layer + 1) % self.nope_interval != 0)

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


class EncoderSpec(ModelSpec):
    """A transformer whose tokens attend to all tokens of their sequence, those behind them too."""

    def attended(self, seq_len: int) -> float:
        """How many tokens one token attends to: all of them."""
        return float(seq_len)


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
    vision: int = 0
    """The vision transformer and its connector."""

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
            + self.vision
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
        attention += (q_width + 2 * kv_width) if model.attention_bias or model.qkv_bias else 0
        attention += hidden if model.attention_bias else 0
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
        shared_experts=moe_layers * hidden * (matrices * model.shared_width + (moe.shared_gate if moe else 0)),
        router=moe_layers * router,
        norms=layers * norms_per_layer + norm_size,
        active_experts=moe_layers * expert * moe.top_k if moe else 0,
        vision=0 if model.vision is None else _vision_parameters(model.vision, hidden),
    )


def _vision_parameters(vision: VisionSpec, width: int) -> int:
    """Patch embedding with its bias, positions, transformer, last normalisation, connector."""
    transformer = count_parameters(vision.transformer)
    embedding = (vision.patch_width + 1 + vision.patches) * vision.hidden
    connector = sum(out * of for out, of in vision.connector_maps(width))
    if vision.connector_hidden is not None:
        connector += vision.connector_hidden + width
    return embedding + transformer.attention + transformer.dense_ffn + transformer.norms + connector
