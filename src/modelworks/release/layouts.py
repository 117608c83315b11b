"""How others name a network's tensors: one table for each layout, read in both directions.

A row is (our parameter, their tensor). ``{layer}`` counts layers; ``{expert}`` counts experts, whose tensors are one
slice each of our stacked parameter, or the whole of it where the row has no ``{expert}``. Rows whose parameter a
network doesn't have (biases, norms of queries and keys) are passed over. All weights are (out, in) in both worlds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from modelworks.model.vision import network_of
from modelworks.spec.errors import InputError
from modelworks.spec.huggingface import Layout, layout_of
from modelworks.spec.model import ModelSpec, VisionSpec

_ENDS = (
    ("embed.weight", "model.embed_tokens.weight"),
    ("final_norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
)
_PRE_NORMS = (
    ("blocks.{layer}.attn_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    ("blocks.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
)
_SANDWICH_NORMS = (
    ("blocks.{layer}.attn_norm.weight", "model.layers.{layer}.pre_attn_norm.weight"),
    ("blocks.{layer}.attn_post_norm.weight", "model.layers.{layer}.post_attn_norm.weight"),
    ("blocks.{layer}.ffn_norm.weight", "model.layers.{layer}.pre_moe_norm.weight"),
    ("blocks.{layer}.ffn_post_norm.weight", "model.layers.{layer}.post_moe_norm.weight"),
)
_ATTENTION = tuple(
    (f"blocks.{{layer}}.attn.w{part}.{kind}", f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}")
    for part in "qkvo"
    for kind in ("weight", "bias")
)
_HEAD_NORMS = tuple(
    (f"blocks.{{layer}}.attn.{part}_norm.weight", f"model.layers.{{layer}}.self_attn.{part}_norm.weight")
    for part in "qk"
)
_DENSE = tuple(
    (f"blocks.{{layer}}.mlp.{part}.{kind}", f"model.layers.{{layer}}.mlp.{part}_proj.{kind}")
    for part in ("gate", "up", "down")
    for kind in ("weight", "bias")
)
_SPARSE = (
    ("blocks.{layer}.moe.router.weight", "model.layers.{layer}.block_sparse_moe.gate.weight"),
    ("blocks.{layer}.moe.gate", "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"),
    ("blocks.{layer}.moe.up", "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"),
    ("blocks.{layer}.moe.down", "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"),
)
_VLLM_GROK = (
    *((ours, theirs.replace(".self_attn.", ".attn.")) for ours, theirs in _ATTENTION),
    ("blocks.{layer}.moe.router.weight", "model.layers.{layer}.moe_block.gate.weight"),
    ("blocks.{layer}.moe.gate", "model.layers.{layer}.moe_block.experts.{expert}.linear.weight"),
    ("blocks.{layer}.moe.up", "model.layers.{layer}.moe_block.experts.{expert}.linear_v.weight"),
    ("blocks.{layer}.moe.down", "model.layers.{layer}.moe_block.experts.{expert}.linear_1.weight"),
)


def _tower(ours: str, theirs: str) -> tuple[tuple[str, str], ...]:
    """Rows of a vision tower under two prefixes."""
    parts = (
        ("patches.weight", "embeddings.patch_embedding.weight"),
        ("patches.bias", "embeddings.patch_embedding.bias"),
        ("positions.weight", "embeddings.position_embedding.weight"),
        *(
            (f"blocks.{{layer}}.{our}.{kind}", f"encoder.layers.{{layer}}.{their}.{kind}")
            for our, their in (
                ("attn_norm", "layer_norm1"), ("attn.wq", "self_attn.q_proj"), ("attn.wk", "self_attn.k_proj"),
                ("attn.wv", "self_attn.v_proj"), ("attn.wo", "self_attn.out_proj"), ("mlp_norm", "layer_norm2"),
                ("mlp.up", "mlp.fc1"), ("mlp.down", "mlp.fc2"),
            )
            for kind in ("weight", "bias")
        ),
        ("final_norm.weight", "post_layernorm.weight"),
        ("final_norm.bias", "post_layernorm.bias"),
    )  # fmt: skip
    return tuple((ours + our, theirs + their) for our, their in parts)


TABLES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "grok-1": (*_ENDS, *_SANDWICH_NORMS, *_ATTENTION, *_DENSE, *_SPARSE),
    "grok-1-vllm": (*_ENDS, *_SANDWICH_NORMS, *_VLLM_GROK),
    "llama": (*_ENDS, *_PRE_NORMS, *_ATTENTION, *_DENSE),
    "mistral": (*_ENDS, *_PRE_NORMS, *_ATTENTION, *_DENSE),
    "smollm3": (*_ENDS, *_PRE_NORMS, *_ATTENTION, *_DENSE),
    "qwen2": (*_ENDS, *_PRE_NORMS, *_ATTENTION, *_DENSE),
    "qwen3": (*_ENDS, *_PRE_NORMS, *_ATTENTION, *_HEAD_NORMS, *_DENSE),
    "mixtral": (*_ENDS, *_PRE_NORMS, *_ATTENTION, *_SPARSE),
}
"""The tensors' names in Hugging Face folders, by layout."""

_EYES = (
    ("eyes.connector.maps.0.weight", "model.connector.modality_projection.proj.weight"),
    *_tower("eyes.tower.", "model.vision_model."),
)
TABLES["idefics3"] = (
    *((ours, theirs.replace("model.", "model.text_model.", 1)) for ours, theirs in TABLES["llama"]),
    *_EYES,
)
TOWER_TABLE: tuple[tuple[str, str], ...] = _tower("", "vision_model.")
"""The names of SigLIP's vision tower, whose pooling head is left out."""
EYES_GGUF_TABLE: tuple[tuple[str, str], ...] = (
    ("connector.maps.0.weight", "mm.model.fc.weight"),
    ("tower.patches.weight", "v.patch_embd.weight"),
    ("tower.patches.bias", "v.patch_embd.bias"),
    ("tower.positions.weight", "v.position_embd.weight"),
    *(
        (f"tower.blocks.{{layer}}.{ours}.{kind}", f"v.blk.{{layer}}.{theirs}.{kind}")
        for ours, theirs in (
            ("attn_norm", "ln1"), ("attn.wq", "attn_q"), ("attn.wk", "attn_k"), ("attn.wv", "attn_v"),
            ("attn.wo", "attn_out"), ("mlp_norm", "ln2"), ("mlp.up", "ffn_up"), ("mlp.down", "ffn_down"),
        )
        for kind in ("weight", "bias")
    ),
    ("tower.final_norm.weight", "v.post_ln.weight"),
    ("tower.final_norm.bias", "v.post_ln.bias"),
)  # fmt: skip
"""The names of tower and connector in the file that llama.cpp calls a multimodal projector."""

GGUF_TABLE: tuple[tuple[str, str], ...] = (
    ("embed.weight", "token_embd.weight"),
    ("final_norm.weight", "output_norm.weight"),
    ("head.weight", "output.weight"),
    ("blocks.{layer}.attn_norm.weight", "blk.{layer}.attn_norm.weight"),
    ("blocks.{layer}.ffn_norm.weight", "blk.{layer}.ffn_norm.weight"),
    ("blocks.{layer}.attn_post_norm.weight", "blk.{layer}.attn_output_norm.weight"),
    ("blocks.{layer}.ffn_post_norm.weight", "blk.{layer}.layer_output_norm.weight"),
    *(
        (f"blocks.{{layer}}.attn.w{part}.{kind}", f"blk.{{layer}}.attn_{name}.{kind}")
        for part, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
        for kind in ("weight", "bias")
    ),
    *((f"blocks.{{layer}}.attn.{part}_norm.weight", f"blk.{{layer}}.attn_{part}_norm.weight") for part in "qk"),
    *(
        (f"blocks.{{layer}}.mlp.{part}.{kind}", f"blk.{{layer}}.ffn_{part}.{kind}")
        for part in ("gate", "up", "down")
        for kind in ("weight", "bias")
    ),
    ("blocks.{layer}.moe.router.weight", "blk.{layer}.ffn_gate_inp.weight"),
    *((f"blocks.{{layer}}.moe.{part}", f"blk.{{layer}}.ffn_{part}_exps.weight") for part in ("gate", "up", "down")),
)
"""The tensors' names in GGUF files, which are the same for every architecture that we write."""


@dataclass(frozen=True)
class TensorPlace:
    """Where one of their tensors lies in our network."""

    theirs: str
    ours: str
    expert: int | None
    """Which slice of the parameter; None for the whole."""
    shape: tuple[int, ...]

    def of(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor itself, a view into the parameter."""
        parameter = parameters[self.ours].detach()
        part = parameter if self.expert is None else parameter[self.expert]
        return part.view(self.shape) if self.shape else part


def places(spec: ModelSpec, layout: Layout | Literal["gguf"]) -> list[TensorPlace]:
    """Every tensor of a network in a layout, in the network's order.

    Raises
    ------
    InputError
        If a parameter of the network has no name in the layout.
    """
    with torch.device("meta"):
        parameters = {name: tuple(parameter.shape) for name, parameter in network_of(spec).named_parameters()}
    table = GGUF_TABLE if layout == "gguf" else TABLES[layout]
    found = places_of(parameters, dict(table), layout, spec.vision)
    if spec.tied_embeddings and layout in ("grok-1", "grok-1-vllm"):
        # SGLang and vLLM multiply with an explicit head even where it equals the embedding.
        found.append(TensorPlace("lm_head.weight", "embed.weight", None, parameters["embed.weight"]))
    return found


def places_of(
    parameters: Mapping[str, tuple[int, ...]], theirs: Mapping[str, str], layout: str, vision: VisionSpec | None = None
) -> list[TensorPlace]:
    """The tensors of parameters, given by their names and shapes, under a table's names.

    Raises
    ------
    InputError
        If a parameter has no name there.
    """
    found: list[TensorPlace] = []
    for name, shape in parameters.items():
        layer, pattern = _pattern(name)
        if pattern not in theirs:
            raise InputError(f"the layout {layout} has no name for the network's parameter {name}")
        if vision is not None and name.endswith("patches.weight"):
            # A matrix here, a convolution's kernel there: the same numbers in the same order.
            shape = (vision.hidden, 3, vision.patch_size, vision.patch_size)
        found += _expanded(theirs[pattern], name, layer, shape)
    return found


def layout_for(spec: ModelSpec, vllm: bool = False) -> Layout:
    """The layout that a network is published in; with `vllm` the one that vLLM up to 0.24 reads for Grok-1."""
    layout = layout_of(spec)
    if not vllm:
        return layout
    if layout != "grok-1":
        raise InputError(f"layout = 'vllm' is for networks of Grok-1's shape, and this one is {layout}'s: leave it out")
    return "grok-1-vllm"


def _pattern(name: str) -> tuple[str, str]:
    """``blocks.3.attn.wq.weight`` as (``3``, ``blocks.{layer}.attn.wq.weight``)."""
    found = re.match(r"(.*?\bblocks\.)(\d+)(\..*)", name)
    return (found[2], f"{found[1]}{{layer}}{found[3]}") if found else ("", name)


def _expanded(theirs: str, ours: str, layer: str, shape: tuple[int, ...]) -> Iterator[TensorPlace]:
    if "{expert}" not in theirs:
        yield TensorPlace(theirs.format(layer=layer), ours, None, shape)
        return
    for expert in range(shape[0]):
        yield TensorPlace(theirs.format(layer=layer, expert=expert), ours, expert, shape[1:])
