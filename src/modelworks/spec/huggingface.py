"""A Hugging Face ``config.json`` as a model spec, and a model spec as a ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelworks.spec.errors import InputError
from modelworks.spec.fields import nearest, validate
from modelworks.spec.model import ModelSpec

_KNOWN = ["llama", "mistral", "mixtral", "qwen3", "grok-1"]


def model_from_config(path: str | Path) -> ModelSpec:
    """Read a ``config.json`` (or the folder that holds it).

    Raises
    ------
    InputError
        If the file can't be read, or names an architecture that isn't known.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a Hugging Face config: {error}") from None
    if not isinstance(config, Mapping):
        raise InputError(f"{path}: a Hugging Face config is a table of fields, and this is a {type(config).__name__}")
    return validate(ModelSpec, spec_values(config, str(path)), where=str(path))


def spec_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a model spec from those of a Hugging Face config."""
    kind = config.get("model_type")
    if kind not in _KNOWN:
        raise InputError(f"{where}: model_type = {kind!r} is not known here; {nearest(str(kind), _KNOWN)}")
    try:
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        values: dict[str, Any] = {
            "name": str(config.get("_name_or_path") or Path(where).parent.name or kind),
            "layers": config["num_hidden_layers"],
            "hidden": config["hidden_size"],
            "ffn_hidden": config["intermediate_size"],
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "vocab": config["vocab_size"],
            "context": config["max_position_embeddings"],
            "norm_eps": config.get("rms_norm_eps", 1e-5),
            "rope_base": config.get("rope_theta", rope.get("rope_theta", 10_000.0)),
            "tied_embeddings": config.get("tie_word_embeddings", kind == "grok-1"),
            "attention_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
            "qk_norm": kind == "qwen3",
        }
        if config.get("head_dim"):
            values["head_dim"] = config["head_dim"]
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            values["rope_scaling"] = {key: value for key, value in rope.items() if isinstance(value, (int, float, str))}
        if kind == "mixtral":
            values["moe"] = {
                "experts": config["num_local_experts"],
                "top_k": config["num_experts_per_tok"],
                "expert_hidden": config["intermediate_size"],
                "renormalize": True,
            }
        if kind == "grok-1":
            values |= {
                "activation": "gelu",
                "norm_placement": "sandwich",
                "attention_multiplier": config.get("attn_output_multiplier"),
                "attention_softcap": config.get("max_attn_value", config.get("attn_logit_softcapping", 30.0)),
                "embedding_multiplier": config.get("embedding_multiplier_scale", 1.0),
                "output_multiplier": config.get("output_multiplier_scale", 1.0),
                "moe": {
                    "experts": config.get("num_local_experts", config.get("num_experts")),
                    "top_k": config.get("num_experts_per_tok", config.get("num_selected_experts")),
                    "expert_hidden": config.get("moe_intermediate_size", config["intermediate_size"]),
                },
            }
    except KeyError as error:
        raise InputError(f"{where}: the field {error} is missing for model_type = {kind!r}") from None
    return {key: value for key, value in values.items() if value is not None}
