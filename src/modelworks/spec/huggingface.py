"""A Hugging Face ``config.json`` as a model spec, and a model spec as a ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from modelworks.spec.errors import InputError
from modelworks.spec.fields import Section, nearest, validate
from modelworks.spec.model import PIXEL_DEVIATION, PIXEL_MEAN, ModelSpec, VisionSpec
from modelworks.spec.rope import USED

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
_KNOWN = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "smollm3", "grok-1", "idefics3", "smolvlm"]
_PLANNED = ["deepseek_v3", "gpt2", "qwen2_moe", "qwen3_moe"]
"""Further architectures whose fields say what a plan needs; weights of these aren't imported."""
_ATTENTION_BIASED = ("llama", "qwen3", "qwen3_moe", "smollm3", "deepseek_v3", "grok-1")
_MLP_BIASED = ("llama", "smollm3", "grok-1")
"""Architectures in which `attention_bias` and `mlp_bias` mean something."""
_WINDOW_ASKED = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")
"""Architectures that attend over a window only where `use_sliding_window` says so."""
_GROKS = ("Grok1ForCausalLM", "Grok1ModelForCausalLM")
"""Architectures of the Grok family; Grok-2's `model_type` is that of another network, which loads everywhere."""
_ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3")
"""The kinds of context extension that transformers has and we do."""
_GROK_ROPE_TYPES = {"yarn": "yarn", "yarn_linear": "yarn", "yarn_log": "yarn_log"}
"""Those that SGLang's Grok has, beside `original`, and what they are called here."""
_IDEFICS3 = {"patch_size": 32, "hidden_size": 1152, "num_attention_heads": 16}
_SIGLIP = {"patch_size": 16, "hidden_size": 768, "num_attention_heads": 12}
"""What the fields of a vision tower are where a config leaves them out."""
Layout = Literal["grok-1", "grok-1-vllm", "llama", "mistral", "smollm3", "qwen2", "qwen3", "mixtral", "idefics3"]
"""The layouts of Hugging Face folders that are written; `grok-1` is SGLang's, `grok-1-vllm` that of vLLM <= 0.24."""
_ARCHITECTURES: dict[Layout, str] = {
    "grok-1": "Grok1ForCausalLM",
    "grok-1-vllm": "Grok1ModelForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "idefics3": "Idefics3ForConditionalGeneration",
}


def model_from_config(path: str | Path, planning: bool = False) -> ModelSpec:
    """Read a ``config.json`` (or the folder that holds it).

    Parameters
    ----------
    path
        The file or its folder.
    planning
        Accept architectures that can be planned and not imported as well.

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
    values = spec_values(config, str(path), planning)
    if "vision" in values:
        values["vision"] |= _tiles_beside(path)
    return validate(ModelSpec, values, where=str(path))


def spec_values(config: Mapping[str, Any], where: str, planning: bool = False) -> dict[str, Any]:
    """The fields of a model spec from those of a Hugging Face config."""
    kind = config.get("model_type")
    if set(_listed(config.get("architectures"))) & set(_GROKS):
        kind = "grok-1"
        config = {**config, "model_type": kind}
    known = _KNOWN + _PLANNED if planning else _KNOWN
    if kind not in known:
        raise InputError(f"{where}: model_type = {kind!r} is not known here; {nearest(str(kind), known)}")
    try:
        if kind == "gpt2":
            return _gpt2_values(config, where)
        if kind in ("idefics3", "smolvlm"):
            return _seeing_values(config, where)
        heads = config["num_attention_heads"]
        rope = _rope(config, where)
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
            "rope_base": config.get("rope_theta", rope.get("rope_theta", 2e6 if kind == "smollm3" else 10_000.0)),
            "tied_embeddings": config.get("tie_word_embeddings", _tied_by_default(kind, config)),
            "attention_bias": kind in _ATTENTION_BIASED and config.get("attention_bias", False),
            "qkv_bias": kind == "qwen2" or (kind == "qwen2_moe" and config.get("qkv_bias", True)),
            "mlp_bias": kind in _MLP_BIASED and config.get("mlp_bias", False),
            "sliding_window": _sliding_window(config, where),
            "qk_norm": kind in ("qwen3", "qwen3_moe"),
            "activation": _activation(config, where),
        }
        if config.get("head_dim"):
            values["head_dim"] = config["head_dim"]
        values |= _stretched(config, rope, where)
        if kind == "mixtral":
            values["moe"] = {
                "experts": config["num_local_experts"],
                "top_k": config["num_experts_per_tok"],
                "expert_hidden": config["intermediate_size"],
                "renormalize": True,
            }
        if kind == "smollm3":
            values["nope_interval"] = _nope_interval(config, where)
        if kind in ("qwen2_moe", "qwen3_moe"):
            values["moe"] = _qwen_experts(config, where)
        if kind == "deepseek_v3":
            values |= _deepseek_values(config, where)
        if kind == "grok-1":
            values |= _grok_values(config, where)
    except KeyError as error:
        raise InputError(f"{where}: the field {error} is missing for model_type = {kind!r}") from None
    return {key: value for key, value in values.items() if value is not None}


def _listed(given: Any) -> list[str]:
    return [name for name in given if isinstance(name, str)] if isinstance(given, list) else []


def _tied_by_default(kind: str | None, config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding where a config doesn't say; Grok-2 has a head of its own."""
    return kind == "smollm3" or (kind == "grok-1" and not config.get("residual_moe", False))


def _grok_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Grok-1 and Grok-2."""
    if config.get("sliding_window_size", -1) not in (None, -1) or config.get("global_attn_every_n", 1) != 1:
        raise InputError(f"{where}: sliding_window_size = {config.get('sliding_window_size')!r} is not accepted: -1 is")
    temperature = config.get("attn_temperature_len", -1)
    moe = {
        "experts": config.get("num_local_experts", config.get("num_experts")),
        "top_k": config.get("num_experts_per_tok", config.get("num_selected_experts")),
        "expert_hidden": config.get("moe_intermediate_size", config["intermediate_size"]),
        "residual": config.get("residual_moe", False),
        "router_softcap": config.get("router_logit_softcapping") or None,
    }
    return {
        "activation": "gelu",
        "norm_placement": "sandwich",
        "attention_multiplier": config.get("attn_output_multiplier"),
        "attention_softcap": config.get("max_attn_value", config.get("attn_logit_softcapping", 30.0)) or None,
        "attention_temperature_length": temperature if temperature and temperature > 0 else None,
        "output_softcap": config.get("final_logit_softcapping") or None,
        "embedding_multiplier": config.get("embedding_multiplier_scale", 1.0),
        "output_multiplier": config.get("output_multiplier_scale", 1.0),
        "moe": {field: value for field, value in moe.items() if value is not None},
    }


def _gpt2_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """GPT-2 (its fields have names of their own)."""
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise InputError(f"{where}: activation_function = {activation!r} is not accepted: gelu_new is")
    return {
        "name": str(config.get("_name_or_path") or Path(where).parent.name or "gpt2"),
        "layers": config["n_layer"],
        "hidden": config["n_embd"],
        "ffn_hidden": config.get("n_inner") or 4 * config["n_embd"],
        "heads": config["n_head"],
        "vocab": config["vocab_size"],
        "context": config["n_positions"],
        "activation": _ACTIVATIONS[activation],
        "gated_mlp": False,
        "norm": "layer",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "position": "learned",
        "attention_bias": True,
        "mlp_bias": True,
        "tied_embeddings": config.get("tie_word_embeddings", True),
    }


def _seeing_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Idefics3 and SmolVLM: a vision tower, a pixel shuffle and one map in front of a decoder of its own config.

    How many tiles an image is cut into stands in the preprocessor's config: one is taken here. Fields of the tower that
    are missing have the values of transformers' `Idefics3VisionConfig`.
    """
    text, vision = config["text_config"], config["vision_config"]
    for field, table in (("text_config", text), ("vision_config", vision)):
        if not isinstance(table, Mapping):
            raise InputError(f"{where}: {field} = {table!r} is not accepted: it should be a table")
    tied = config.get("tie_word_embeddings", False)
    values = spec_values({"model_type": "llama"} | dict(text) | {"tie_word_embeddings": tied}, where)
    seeing = _tower_values(vision, where, _IDEFICS3)
    seeing |= {"pixel_shuffle": config.get("scale_factor", 2), "image_token": config.get("image_token_id")}
    values["vision"] = {field: value for field, value in seeing.items() if value is not None}
    return values


def tower_from_config(path: Path) -> VisionSpec:
    """Read a SigLIP's ``config.json``: its vision tower, one token to a patch.

    Raises
    ------
    InputError
        If the file can't be read, or is another model's.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a Hugging Face config: {error}") from None
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind not in ("siglip", "siglip_vision_model"):
        raise InputError(f"{path}: model_type = {kind!r} is not accepted: 'siglip' and 'siglip_vision_model' are")
    vision = config.get("vision_config", {}) if kind == "siglip" else config
    if not isinstance(vision, Mapping):
        raise InputError(f"{path}: vision_config = {vision!r} is not accepted: it should be a table")
    return validate(VisionSpec, _tower_values(vision, str(path), _SIGLIP), where=str(path))


def _tower_values(vision: Mapping[str, Any], where: str, defaults: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a vision tower from the config of SigLIP's, or of Idefics3's, which is built alike."""
    vision = {**defaults, **vision}
    activation = vision.get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise InputError(f"{where}: vision_config.hidden_act = {activation!r} is not accepted: 'gelu_pytorch_tanh' is")
    if vision.get("num_channels", 3) != 3:
        raise InputError(f"{where}: vision_config.num_channels = {vision['num_channels']!r} is not accepted: 3 is")
    return {
        "image_size": vision.get("image_size", 224),
        "patch_size": vision["patch_size"],
        "layers": vision.get("num_hidden_layers", 12),
        "hidden": vision["hidden_size"],
        "heads": vision["num_attention_heads"],
        "ffn_hidden": vision.get("intermediate_size", 3072),
        "norm_eps": vision.get("layer_norm_eps", 1e-6),
    }


def _tiles_beside(config: Path) -> dict[str, Any]:
    """How many tiles an image is cut into, from the preprocessor's config beside a model's; nothing without one."""
    path = config.with_name("preprocessor_config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("do_image_splitting") is False:
            return {"tiles": 1}
        side = values["size"]["longest_edge"] // values["max_image_size"]["longest_edge"]
        return {"tiles": side * side + 1 if side > 1 else 1}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        raise InputError(
            f"{path}: cannot be read as Idefics3's: size.longest_edge and max_image_size.longest_edge are needed"
        ) from None


def preprocessor_config(vision: VisionSpec) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of a network that sees: how transformers cuts its images into tiles."""
    side = vision.tiles_per_side
    return {
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "do_image_splitting": side > 1,
        "size": {"longest_edge": side * vision.image_size},
        "max_image_size": {"longest_edge": vision.image_size},
        "rescale_factor": 1 / 255,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_DEVIATION] * 3,
        "resample": 1,
    }


def _qwen_experts(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise InputError(
            f"{where}: decoder_sparse_step and mlp_only_layers are not accepted: experts in every layer are"
        )
    shared = {}
    if config["model_type"] == "qwen2_moe":
        width = config["shared_expert_intermediate_size"]
        shared = {"shared_experts": 1, "shared_hidden": width, "shared_gate": True}
    return {
        "experts": config["num_experts"],
        "top_k": config["num_experts_per_tok"],
        "expert_hidden": config["moe_intermediate_size"],
        "renormalize": config.get("norm_topk_prob", False),
        **shared,
    }


def _deepseek_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """DeepSeek-V3 and its kin: latent attention, dense first layers, shared experts."""
    if config.get("moe_layer_freq", 1) != 1:
        raise InputError(f"{where}: moe_layer_freq = {config['moe_layer_freq']!r} is not accepted: 1 is")
    latent = {
        "q_rank": config.get("q_lora_rank") or 0,
        "kv_rank": config["kv_lora_rank"],
        "rope_head_dim": config["qk_rope_head_dim"],
        "nope_head_dim": config["qk_nope_head_dim"],
        "value_head_dim": config["v_head_dim"],
    }
    return {
        "latent_attention": latent,
        "head_dim": latent["rope_head_dim"] + latent["nope_head_dim"],
        "moe": {
            "experts": config["n_routed_experts"],
            "top_k": config["num_experts_per_tok"],
            "expert_hidden": config["moe_intermediate_size"],
            "shared_experts": config.get("n_shared_experts") or 0,
            "dense_layers": config.get("first_k_dense_replace", 0),
            "renormalize": config.get("norm_topk_prob", True),
            "scoring": config.get("scoring_func", "sigmoid"),
            "routed_multiplier": float(config.get("routed_scaling_factor", 1.0)),
        },
    }


def _rope(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The table of the rotary embedding: `rope_parameters` since transformers 5, `rope_scaling` before."""
    for field in ("rope_parameters", "rope_scaling"):
        given = config.get(field)
        if given:
            if not isinstance(given, Mapping):
                raise InputError(f"{where}: {field} = {given!r} is not accepted: it should be a table")
            return given
    return {}


def _stretched(config: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of context extension, from the rotary embedding's table or from Grok's own fields."""
    if config.get("model_type") == "grok-1" and config.get("rope_type"):
        return _groks_stretched(config, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    if kind not in _ROPE_TYPES:
        raise InputError(
            f"{where}: rope_scaling.rope_type = {kind!r} is not accepted: one of {', '.join(_ROPE_TYPES)} is"
        )
    scaling = {"rope_type": kind} | {
        key: rope[key] for key in ("factor", *USED[kind]) if rope.get(key) is not None and key != "extrapolation_factor"
    }
    if kind == "dynamic":
        # There the context in the config is the one before the extension, and no longer one is stated.
        original, factor = config["max_position_embeddings"], scaling.get("factor")
        longest = original * factor if isinstance(original, int) and isinstance(factor, (int, float)) else original
        return {
            "rope_scaling": scaling | {"original_max_position_embeddings": original},
            "context": int(longest) if isinstance(longest, float) else longest,
        }
    if kind in ("yarn", "llama3"):
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        if kind == "yarn" and "factor" not in scaling and isinstance(config["max_position_embeddings"], int):
            scaling["factor"] = config["max_position_embeddings"] / scaling["original_max_position_embeddings"]
    return {"rope_scaling": scaling}


def _groks_stretched(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Context extension in the fields that SGLang reads for Grok; its attention factor is never applied there.

    The released Grok-2 says `original`, which is no extension beside its base.
    """
    kind = config["rope_type"]
    if kind == "original":
        return {}
    if kind not in _GROK_ROPE_TYPES:
        accepted = ", ".join(("original", *_GROK_ROPE_TYPES))
        raise InputError(f"{where}: rope_type = {kind!r} is not accepted: one of {accepted} is")
    scaling = {
        "rope_type": _GROK_ROPE_TYPES[kind],
        "factor": config["scaling_factor"],
        "original_max_position_embeddings": config["original_max_position_embeddings"],
        "attention_factor": 1.0,
    }
    kept = ("beta_fast", "beta_slow", "extrapolation_factor")
    return {"rope_scaling": scaling | {key: config[key] for key in kept if config.get(key) is not None}}


def _groks_rope_fields(model: ModelSpec, layout: Layout) -> dict[str, Any]:
    """The inverse of `_groks_stretched`."""
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    kinds = {ours: theirs for theirs, ours in _GROK_ROPE_TYPES.items() if theirs != "yarn_linear"}
    if layout == "grok-1-vllm" or scaling.rope_type not in kinds:
        raise InputError(
            f"model.rope_scaling.rope_type = {scaling.rope_type!r} has no place in the config of "
            f"{_ARCHITECTURES[layout]}: "
            + ("leaving rope_scaling out" if layout == "grok-1-vllm" else f"one of {', '.join(kinds)}")
            + " is accepted"
        )
    fields = {
        "rope_type": kinds[scaling.rope_type],
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "scaling_factor": scaling.factor,
        "extrapolation_factor": scaling.extrapolation_factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _stretching_table(model: ModelSpec, layout: Layout) -> dict[str, Any]:
    """A config's `rope_scaling` table."""
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    if scaling.rope_type not in _ROPE_TYPES:
        raise InputError(
            f"model.rope_scaling.rope_type = {scaling.rope_type!r} has no place in the config of "
            f"{_ARCHITECTURES[layout]}: one of {', '.join(_ROPE_TYPES)} is accepted"
        )
    return {"rope_scaling": scaling.model_dump(exclude_none=True)}


def _sliding_window(config: Mapping[str, Any], where: str) -> int | None:
    """The window that every layer attends over; None for the whole context. Layers that differ are refused."""
    kind, window, context = (
        config.get("model_type"),
        config.get("sliding_window"),
        config.get("max_position_embeddings"),
    )
    if not window or not config.get("use_sliding_window", kind not in _WINDOW_ASKED):
        return None
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise InputError(f"{where}: sliding_window = {window!r} is not accepted: a positive whole number is")
    if isinstance(context, int) and window >= context:
        return None
    if kind not in (*_WINDOW_ASKED, "mistral", "mixtral"):
        raise InputError(f"{where}: sliding_window = {window} is not accepted for model_type = {kind!r}: null is")
    types, layers = config.get("layer_types"), config["num_hidden_layers"]
    if types is None and kind in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", 28)
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(0, layers - first)
    if types is None and kind in _WINDOW_ASKED:
        raise InputError(f"{where}: use_sliding_window = True is not accepted for model_type = {kind!r}: false is")
    if types is not None and len(set(types)) > 1:
        raise InputError(
            f"{where}: sliding_window = {window} in some of the layers is not accepted: in all of them or in none is"
        )
    return None if types is not None and "sliding_attention" not in types else window


def _nope_interval(config: Mapping[str, Any], where: str) -> int | None:
    """At which interval SmolLM3's layers have no rotary embedding; None where all have one."""
    layers = config["num_hidden_layers"]
    flags = config.get("no_rope_layers")
    if flags is None:
        interval = config.get("no_rope_layer_interval", 4)
        return interval if isinstance(interval, int) and interval <= layers else None
    for interval in range(1, layers + 2):
        if list(flags[:layers]) == [int((layer + 1) % interval != 0) for layer in range(layers)]:
            return interval if interval <= layers else None
    raise InputError(f"{where}: no_rope_layers = {flags!r} is not accepted: zeros at one interval are")


def _activation(config: Mapping[str, Any], where: str) -> str:
    given = config.get("hidden_act", "silu")
    if given not in _ACTIVATIONS:
        accepted = ", ".join(sorted(_ACTIVATIONS))
        raise InputError(f"{where}: hidden_act = {given!r} is not accepted: one of {accepted} is")
    return _ACTIVATIONS[given]


def layout_of(model: ModelSpec) -> Layout:
    """The layout that a network has a place in, judged by its few telling fields."""
    if model.vision is not None:
        return "idefics3"
    if model.norm_placement == "sandwich":
        return "grok-1"
    if model.moe is not None:
        return "mixtral"
    if model.qk_norm:
        return "qwen3"
    if model.qkv_bias:
        return "qwen2"
    if model.nope_interval is not None:
        return "smollm3"
    return "llama" if model.sliding_window is None else "mistral"


def config_from_model(model: ModelSpec, layout: Layout | None = None, dtype: str = "float32") -> dict[str, Any]:
    """Write a network's ``config.json``, as plain values.

    Parameters
    ----------
    model
        The network.
    layout
        Whose names are used; that of `layout_of` if unset.
    dtype
        The weights' precision, as PyTorch names it.

    Raises
    ------
    InputError
        If a field of the network has no place in the config: what is written always reads back as the same network.
    """
    layout, model = layout or layout_of(model), with_plain_base(model)
    if model.vision is not None:
        seeing = _seeing_config(model, model.vision, dtype)
        _refuse_lossy(model, seeing, layout)
        return seeing
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[layout]],
        "model_type": _model_type(model, layout),
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.context,
        "hidden_act": "gelu_pytorch_tanh" if model.activation == "gelu" else "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": model.attention_bias,
        "mlp_bias": model.mlp_bias,
        "torch_dtype": dtype,
    }
    if layout not in ("grok-1", "grok-1-vllm"):
        config |= _stretching_table(model, layout)
        if model.rope_scaling is not None and model.rope_scaling.rope_type == "dynamic":
            config["max_position_embeddings"] = model.rope_scaling.original_max_position_embeddings
    if layout == "mixtral" and model.moe is not None:
        config |= {"num_local_experts": model.moe.experts, "num_experts_per_tok": model.moe.top_k}
        config["intermediate_size"] = model.moe.expert_hidden
    if layout in ("mistral", "mixtral"):
        config["sliding_window"] = model.sliding_window
    elif model.sliding_window is not None and layout in ("qwen2", "qwen3"):
        # In every layer; Qwen's configs count the first ones that have none.
        config |= {"sliding_window": model.sliding_window, "use_sliding_window": True, "max_window_layers": 0}
    if layout == "smollm3":
        interval = model.nope_interval or model.layers + 1
        # Unstated, the padding would be a token of SmolLM3's own vocabulary.
        config |= {"no_rope_layer_interval": interval, "pad_token_id": None}
        config["no_rope_layers"] = [int(model.has_rotary(layer)) for layer in range(model.layers)]
    if layout in ("grok-1", "grok-1-vllm"):
        config |= _grok_fields(model, layout) | _groks_rope_fields(model, layout)
    _refuse_lossy(model, config, layout)
    return config


def _seeing_config(model: ModelSpec, vision: VisionSpec, dtype: str) -> dict[str, Any]:
    """The inverse of `_seeing_values`."""
    blind = model.model_copy(update={"vision": None})
    if vision.connector_hidden is not None:
        raise InputError(
            f"model.vision.connector_hidden = {vision.connector_hidden} has no place in the config of "
            f"{_ARCHITECTURES['idefics3']}: leaving it out is accepted"
        )
    if layout_of(blind) != "llama":
        raise InputError(
            f"model.vision has no place beside a decoder of the layout {layout_of(blind)}: one of Llama's is accepted"
        )
    return {
        "architectures": [_ARCHITECTURES["idefics3"]],
        "model_type": "idefics3",
        "text_config": config_from_model(blind, "llama", dtype),
        "vision_config": {
            "model_type": "idefics3_vision",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_hidden_layers": vision.layers,
            "hidden_size": vision.hidden,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.ffn_hidden,
            "layer_norm_eps": vision.norm_eps,
            "hidden_act": "gelu_pytorch_tanh",
            "num_channels": 3,
        },
        "scale_factor": vision.pixel_shuffle,
        "image_token_id": vision.image_token,
        "tie_word_embeddings": model.tied_embeddings,
        "vocab_size": model.vocab,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }


def _model_type(model: ModelSpec, layout: Layout) -> str:
    """What a config calls its network: Grok-2's release takes a name that every transformers knows."""
    if layout == "grok-1" and model.moe is not None and model.moe.residual:
        return "git"
    return "grok-1" if layout == "grok-1-vllm" else layout


def with_plain_base(model: ModelSpec) -> ModelSpec:
    """The same network with a static NTK-aware extension written as what it is: another base."""
    if model.rope_scaling is None or model.rope_scaling.rope_type != "ntk" or model.head_dim <= 2:
        return model
    base = model.rope_base * model.rope_scaling.factor ** (model.head_dim / (model.head_dim - 2))
    return model.model_copy(update={"rope_base": base, "rope_scaling": None})


def _grok_fields(model: ModelSpec, layout: Layout) -> dict[str, Any]:
    """What the config of Grok-1 and 2 has beside the common fields, under SGLang's names and those of older vLLM."""
    fields: dict[str, Any] = {
        "attn_output_multiplier": model.attention_scale,
        "attn_logit_softcapping": model.attention_softcap or 0.0,
        "embedding_multiplier_scale": model.embedding_multiplier,
        "output_multiplier_scale": model.output_multiplier,
        "pad_token_id": 0,
    }
    if model.moe is not None:
        fields |= {
            "num_local_experts": model.moe.experts,
            "num_experts_per_tok": model.moe.top_k,
            "moe_intermediate_size": model.moe.expert_hidden,
        }
    if layout == "grok-1":
        # The experts lie in ordinary files, at every degree of tensor parallelism.
        fields["load_presharded_moe"] = False
        fields["router_logit_softcapping"] = (model.moe.router_softcap if model.moe else None) or 0.0
        fields["final_logit_softcapping"] = model.output_softcap or 0.0
        fields["attn_temperature_len"] = model.attention_temperature_length or -1
        fields["residual_moe"] = model.moe is not None and model.moe.residual
    else:
        experts = model.moe.experts if model.moe else 0
        fields |= {"max_attn_value": model.attention_softcap or 0.0, "num_experts": experts}
        fields["router_logit_softcapping"] = 0.0
    return fields


def _refuse_lossy(model: ModelSpec, config: Mapping[str, Any], layout: Layout) -> None:
    """Refuse a network that its own config would not give back."""
    back = validate(ModelSpec, spec_values(config, "config.json"), where="config.json")
    for field in ModelSpec.model_fields:
        given, read = getattr(model, field), getattr(back, field)
        if field in ("name", "preset") or given == read or (field == "ffn_hidden" and model.dense_layers == 0):
            continue
        if field == "attention_multiplier" and model.attention_scale == back.attention_scale:
            continue
        if isinstance(given, VisionSpec) and isinstance(read, VisionSpec):
            # Tiles stand in the preprocessor's config, and how many images a sequence has is the training's matter.
            read = read.model_copy(update={"tiles": given.tiles, "images": given.images})
            if given == read:
                continue
        given, read = (v.model_dump(exclude_none=True) if isinstance(v, Section) else v for v in (given, read))
        raise InputError(
            f"model.{field} = {given!r} has no place in the config of {_ARCHITECTURES[layout]}: {read!r} is accepted"
        )
