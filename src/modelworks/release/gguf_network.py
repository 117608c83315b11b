"""What a GGUF file says of a network: a model spec as metadata, and metadata as a model spec.

Four architectures of llama.cpp: `grok`; `llama`, which is also Mixtral's; `qwen2`; `qwen3`. `llama` turns pairs of
neighbouring dimensions, where we (and Hugging Face) pair each with the one half a head away, so that the rows of its
queries and keys are in another order; the others are in ours.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelworks.model.rotary import attention_factor, rotary_frequencies
from modelworks.release.gguf_file import values as values_of
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.gguf_header import GgufHeader
from modelworks.spec.huggingface import layout_of, with_plain_base
from modelworks.spec.model import ModelSpec
from modelworks.spec.rope import RopeScalingSpec

ARCHITECTURES = {
    "grok-1": "grok", "llama": "llama", "mistral": "llama", "smollm3": "llama", "mixtral": "llama", "qwen2": "qwen2",
    "qwen3": "qwen3",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"
"""What each rotary frequency is divided by (D / 2), in files of networks with Llama 3.1's scaling."""
_YARN_KEYS = {
    "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "extrapolation_factor": "yarn_ext_factor",
}  # fmt: skip
"""Fields of `rope_scaling` and their keys in a GGUF file, behind `rope.scaling.`."""
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "extrapolation_factor": 1.0}
_LLAMA3 = [
    RopeScalingSpec(
        rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    for factor in (8.0, 32.0)
]  # fmt: skip
"""The scalings that were published: Llama 3.1's and Llama 3.2's."""


def metadata_of(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """A network's architecture in llama.cpp, and its fields under llama.cpp's keys (without the architecture's name).

    Raises
    ------
    InputError
        If a field of the network has no key there: what is written always reads back as the same network.
    """
    architecture, spec = ARCHITECTURES[layout_of(spec)], with_plain_base(spec)
    values: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "context_length": spec.context,
        "embedding_length": spec.hidden,
        "block_count": spec.layers,
        "feed_forward_length": spec.moe.expert_hidden if spec.moe and not spec.moe.residual else spec.ffn_hidden,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.dimension_count": spec.head_dim,
        "rope.freq_base": float(spec.rope_base),
    }
    values |= _stretching(spec, architecture)
    if spec.moe is not None:
        values |= {"expert_count": spec.moe.experts, "expert_used_count": spec.moe.top_k}
    if architecture == "grok":
        values |= {
            "expert_feed_forward_length": spec.moe.expert_hidden if spec.moe else spec.ffn_hidden,
            "logit_scale": float(spec.output_multiplier),
            "embedding_scale": float(spec.embedding_multiplier),
            "attention.output_scale": float(spec.attention_scale),
            "attn_logit_softcapping": float(spec.attention_softcap or 0.0),
        }
        values |= _groks_own(spec)
    _refuse_lossy(spec, architecture, values)
    return architecture, values


def _groks_own(spec: ModelSpec) -> dict[str, Any]:
    """What Grok-2 has beyond Grok-1, and whether gates are rescaled where it can be told from the outside."""
    values: dict[str, Any] = {"router_logit_softcapping": 0.0}
    if spec.moe is not None:
        values["router_logit_softcapping"] = float(spec.moe.router_softcap or 0.0)
        if spec.moe.residual or spec.moe.renormalize:
            values["expert_weights_norm"] = spec.moe.renormalize
    if spec.output_softcap is not None:
        values["final_logit_softcapping"] = float(spec.output_softcap)
    if spec.attention_temperature_length is not None:
        values["attention.temperature_length"] = spec.attention_temperature_length
    return values


def left_out_by_llama_cpp(spec: ModelSpec) -> list[str]:
    """What llama.cpp's `grok` reads of a network, or not even that, and computes without; empty where it has it all.

    It rescales the chosen gates to sum to one. Alone that is undone by the norm after the experts; beside a dense
    network it changes how much the experts count. Source: llama.cpp, ``src/models/grok.cpp`` (2026).
    """
    found = []
    if spec.norm_placement == "sandwich" and spec.moe is not None:
        if spec.moe.router_softcap is not None:
            found.append(f"moe.router_softcap = {spec.moe.router_softcap}")
        if spec.moe.residual and not spec.moe.renormalize:
            found.append("moe.renormalize = false beside moe.residual = true")
    if spec.attention_temperature_length is not None and spec.context > spec.attention_temperature_length + 1:
        found.append(f"attention_temperature_length = {spec.attention_temperature_length}")
    return found


def spec_of(file: GgufHeader) -> ModelSpec:
    """The network that a file's metadata describes.

    Raises
    ------
    InputError
        If the architecture isn't known, or a key is missing or out of range.
    """
    architecture = file.architecture
    if architecture not in set(ARCHITECTURES.values()):
        accepted = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise InputError(f"{file.path}: its architecture is {architecture[:40]!r}; {accepted} are accepted")
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    values.setdefault("vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", [])))
    tied, biased = "output.weight" not in file.tensors, "blk.0.attn_output.bias" in file.tensors
    fields = _fields(architecture, values, str(file.path), tied=tied, attention_bias=biased)
    fields["qkv_bias"] = "blk.0.attn_q.bias" in file.tensors and not biased
    fields["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    if "moe" in fields and architecture == "grok":
        fields["moe"]["residual"] = "blk.0.ffn_up.weight" in file.tensors
    if ROPE_FACTORS in file.tensors:
        plain = validate(ModelSpec, fields, where=str(file.path))
        fields["rope_scaling"] = _llama3_scaling(file, plain).model_dump(exclude_none=True)
    spec = validate(ModelSpec, fields, where=str(file.path))
    if spec.layers > len(file.tensors):
        raise InputError(f"{file.path}: it speaks of {spec.layers} blocks and holds {len(file.tensors)} tensors")
    return spec


def rope_factors(spec: ModelSpec) -> Tensor | None:
    """What `rope_freqs.weight` holds for a network (D / 2); None where the file needs none."""
    if spec.rope_scaling is None or spec.rope_scaling.rope_type != "llama3":
        return None
    plain = spec.model_copy(update={"rope_scaling": None})
    device = torch.device("cpu")
    return rotary_frequencies(plain, device) / rotary_frequencies(spec, device)


def to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows (heads * D, ...) so that the pairs (i, i + D / 2) of each head become neighbours."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def from_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Undo `to_neighbours`."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def rotated_heads(spec: ModelSpec, architecture: str, ours: str) -> int | None:
    """How many heads a parameter's rows make up, where the architecture has them in another order; else None."""
    part = ours.split(".")[-2]
    if architecture != "llama" or part not in ("wq", "wk"):
        return None
    return spec.heads if part == "wq" else spec.kv_heads


def _fields(
    architecture: str, values: dict[str, Any], where: str, *, tied: bool, attention_bias: bool
) -> dict[str, Any]:
    try:
        heads, hidden = values["attention.head_count"], values["embedding_length"]
        fields: dict[str, Any] = {
            "layers": values["block_count"],
            "hidden": hidden,
            "ffn_hidden": values["feed_forward_length"],
            "heads": heads,
            "kv_heads": values.get("attention.head_count_kv", heads),
            "vocab": values["vocab_size"],
            "context": values["context_length"],
            "norm_eps": _decimal(values["attention.layer_norm_rms_epsilon"]),
            "rope_base": _decimal(values.get("rope.freq_base", 10_000.0)),
            "tied_embeddings": tied,
            "attention_bias": attention_bias,
            "qk_norm": architecture == "qwen3",
        }
        if "attention.key_length" in values:
            fields["head_dim"] = values["attention.key_length"]
        scaling = values.get("rope.scaling.type", "none")
        if scaling != "none":
            fields["rope_scaling"] = _stretched(scaling, values, architecture)
        if values.get("expert_count", 0):
            width = values.get("expert_feed_forward_length", values["feed_forward_length"])
            fields["moe"] = {"experts": values["expert_count"], "top_k": values["expert_used_count"]}
            fields["moe"] |= {"expert_hidden": width, "renormalize": architecture == "llama"}
        if architecture == "grok":
            fields |= {
                "activation": "gelu",
                "norm_placement": "sandwich",
                "attention_multiplier": _decimal(values["attention.output_scale"]),
                "attention_softcap": _decimal(values["attn_logit_softcapping"]),
                "embedding_multiplier": _decimal(values["embedding_scale"]),
                "output_multiplier": _decimal(values["logit_scale"]),
                "output_softcap": _decimal(values.get("final_logit_softcapping", 0.0)) or None,
                "attention_temperature_length": values.get("attention.temperature_length"),
            }
        if architecture == "grok" and "moe" in fields:
            fields["moe"]["renormalize"] = values.get("expert_weights_norm", False)
            fields["moe"]["router_softcap"] = _decimal(values.get("router_logit_softcapping", 0.0)) or None
    except KeyError as error:
        raise InputError(f"{where}: the key {architecture}.{error.args[0]} is missing") from None
    except (TypeError, ValueError):
        raise InputError(f"{where}: the metadata of {architecture} has a value that isn't a number") from None
    return fields


def _decimal(value: float) -> float:
    """A number that was stored in fp32, as the shortest decimal that it stands for: 1e-5 and not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _stretching(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """Context extension under llama.cpp's keys; what is written as factors of frequencies (`llama3`) needs none.

    llama.cpp multiplies cosine and sine with YaRN's own attention factor and with `attn_factor`; where the ramp begins
    and ends it reads for `grok` only.
    """
    scaling = spec.rope_scaling
    if scaling is None or scaling.rope_type == "llama3":
        return {}
    if scaling.rope_type not in ("linear", "yarn") or scaling.truncate is False:
        given = scaling.model_dump(exclude_none=True)
        raise InputError(
            f"model.rope_scaling = {given} has no place in llama.cpp: linear, ntk, llama3 and yarn with whole "
            f"dimensions are accepted"
        )
    values = {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": float(scaling.factor)}
    if scaling.rope_type == "yarn":
        values["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings or spec.context
        values["rope.scaling.attn_factor"] = attention_factor(spec) / _yarns_own(scaling.factor)
        ramp = {"beta_fast": scaling.fast, "beta_slow": scaling.slow, "extrapolation_factor": scaling.extrapolated}
        if architecture == "grok":
            values |= {f"rope.scaling.{_YARN_KEYS[field]}": float(given) for field, given in ramp.items()}
        else:
            for field, number in ramp.items():
                if number != _YARN_DEFAULTS[field]:
                    raise InputError(
                        f"model.rope_scaling.{field} = {number} has no place in llama.cpp's {architecture}: "
                        f"{_YARN_DEFAULTS[field]} is accepted"
                    )
    return values


def _stretched(kind: str, values: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The inverse of `_stretching`."""
    factor = _decimal(values.get("rope.scaling.factor", 1.0))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = values.get(
            "rope.scaling.original_context_length", values["context_length"]
        )
        scaling |= {
            field: _decimal(values[f"rope.scaling.{key}"])
            for field, key in _YARN_KEYS.items()
            if f"rope.scaling.{key}" in values
        }
        if architecture == "grok":
            scaling.setdefault("beta_fast", 8.0)  # what llama.cpp takes for it where a file says nothing
        own = _decimal(values.get("rope.scaling.attn_factor", 1.0))
        if own != 1.0:
            scaling["attention_factor"] = _decimal(own * _yarns_own(factor))
    return scaling


def _yarns_own(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0


def _llama3_scaling(file: GgufHeader, plain: ModelSpec) -> RopeScalingSpec:
    """The published scaling that gives the file's factors."""
    stored = values_of(file, ROPE_FACTORS)
    for scaling in _LLAMA3:
        factors = rope_factors(plain.model_copy(update={"rope_scaling": scaling}))
        if factors is not None and np.allclose(factors.numpy(), stored, rtol=1e-4):
            return scaling
    raise InputError(f"{file.path}: {ROPE_FACTORS} holds no published scaling of Llama 3.1 or 3.2")


def _refuse_lossy(spec: ModelSpec, architecture: str, values: dict[str, Any]) -> None:
    """Refuse a network that its own metadata would not give back (numbers to fp32's precision)."""
    if architecture == "grok" and spec.attention_softcap is None:
        raise InputError(
            "model.attention_softcap is missing: llama.cpp's grok has one, and a positive number is accepted"
        )
    fields = _fields(
        architecture, values, "metadata", tied=spec.tied_embeddings, attention_bias=spec.attention_bias
    )  # fmt: skip
    fields |= {"qkv_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    if architecture == "grok" and spec.moe is not None and "moe" in fields:
        fields["moe"]["residual"] = spec.moe.residual
    back = validate(ModelSpec, fields, where="metadata")
    for name in ModelSpec.model_fields:
        given, read = getattr(spec, name), getattr(back, name)
        if name in ("name", "preset", "ffn_hidden", "rope_scaling") or given == read:
            continue
        if isinstance(given, float) and isinstance(read, float) and np.float32(given) == np.float32(read):
            continue
        if name == "attention_multiplier" and np.float32(spec.attention_scale) == np.float32(back.attention_scale):
            continue
        raise InputError(f"model.{name} = {given!r} has no place in llama.cpp's {architecture}: {read!r} is accepted")
