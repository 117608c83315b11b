"""A Hugging Face ``config.json`` stands for the model that transformers builds from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelworks.spec import InputError, load_run, model_spec
from modelworks.spec.huggingface import model_from_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}


def write(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "SmolLM3"])
def test_parameters_equal_those_of_the_model_that_transformers_builds(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 100,
        "max_position_embeddings": 256,
        "tie_word_embeddings": name == "Qwen3",
        "rope_theta": 12_345.0,
    }
    if name == "Mistral":
        small["sliding_window"] = 32
    if name == "SmolLM3":
        small |= {"no_rope_layer_interval": 2, "pad_token_id": 0}
    if name == "Qwen2Moe":
        small |= {"num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 80}
    config = getattr(transformers, f"{name}Config")(**small)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    model = model_spec(tmp_path / "config.json")
    assert model.parameters.total == built.num_parameters()
    assert model.rope_base == 12_345.0
    assert model.sliding_window == (32 if name == "Mistral" else None)
    assert model.tied_embeddings == (name == "Qwen3")
    assert model.nope_interval == (2 if name == "SmolLM3" else None)


def test_a_published_config_gives_the_catalogs_model(tmp_path: Path) -> None:
    """The fields of mistralai/Mixtral-8x7B-v0.1's config.json."""
    write(
        tmp_path,
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    )
    read, ours = model_spec(tmp_path / "config.json"), model_spec("mixtral-8x7b")
    assert read.model_dump(exclude={"name", "preset"}) == ours.model_dump(exclude={"name", "preset"})


def test_a_run_may_take_its_model_from_a_config_beside_it(tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    (tmp_path / "run.toml").write_text('[model]\nhf = "config.json"\nlayers = 5\n[train]\nseq_len = 128\n')
    model = load_run(tmp_path / "run.toml").model
    assert (model.layers, model.hidden, model.kv_heads) == (5, 64, 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "lama"}, "model_type = 'lama' is not known here; did you mean 'llama'?"),
        ({"model_type": None}, "model_type = None is not known here"),
        ({"hidden_size": "64"}, "hidden = '64' is not accepted: it should be a whole number"),
        ({"num_attention_heads": 0}, "heads = 0 is not accepted: it should be greater than 0"),
        ({"num_key_value_heads": 3}, "heads = 4 doesn't divide by kv_heads = 3"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' is not accepted: it should be a table"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not accepted"),
        ({"sliding_window": 32}, "sliding_window = 32 is not accepted for model_type = 'llama': null is"),
        ({"model_type": "mistral", "sliding_window": "4k"}, "sliding_window = '4k' is not accepted: a positive whole"),
        (
            {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1},
            "sliding_window = 32 in some of the layers is not accepted: in all of them or in none is",
        ),
        (
            {"model_type": "smollm3", "sliding_window": 32, "use_sliding_window": True},
            "use_sliding_window = True is not accepted for model_type = 'smollm3': false is",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [0, 1]}, "no_rope_layers = [0, 1] is not accepted"),
        ({"rms_norm_eps": float("nan")}, "norm_eps = nan is not accepted: it should be a finite number"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path, LLAMA | change)
    with pytest.raises(InputError) as refused:
        model_spec(path)
    assert sentence in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {key: value for key, value in LLAMA.items() if key != "hidden_size"})
    with pytest.raises(InputError, match="the field 'hidden_size' is missing for model_type = 'llama'"):
        model_spec(path)


@pytest.mark.parametrize("text", ["{", "", "\x00"])
def test_a_config_that_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as a Hugging Face config"):
        model_spec(write(tmp_path, text))


def test_a_config_that_is_a_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a Hugging Face config is a table of fields, and this is a list"):
        model_spec(write(tmp_path, []))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (
            "deepseek-v3",
            {
                "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432,
                "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "rms_norm_eps": 1e-6,
                "max_position_embeddings": 163840, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
                "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 2048, "n_routed_experts": 256,
                "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3, "norm_topk_prob": True,
                "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "moe_layer_freq": 1, "hidden_act": "silu",
            },
        ),
        (
            # openai-community/gpt2-xl, config.json: 1.5 billion parameters.
            1_557_611_200,
            {
                "model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024, "n_ctx": 1024,
                "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            },
        ),
        (
            # Qwen/Qwen3-30B-A3B, config.json: 30.5 billion parameters.
            30_532_122_624,
            {
                "model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144,
                "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
                "max_position_embeddings": 40960, "moe_intermediate_size": 768, "num_experts": 128,
                "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
                "use_sliding_window": False, "sliding_window": None, "hidden_act": "silu", "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
            },
        ),
        (
            # Qwen/Qwen1.5-MoE-A2.7B, config.json: 14.3 billion parameters.
            14_315_784_192,
            {
                "model_type": "qwen2_moe", "num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 5632,
                "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936,
                "max_position_embeddings": 8192, "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
                "norm_topk_prob": False, "decoder_sparse_step": 1, "use_sliding_window": False,
                "sliding_window": 32768, "max_window_layers": 21, "hidden_act": "silu", "rms_norm_eps": 1e-6,
                "rope_theta": 1e6, "tie_word_embeddings": False,
            },
        ),
        (
            # Qwen/Qwen2-57B-A14B, config.json: 57.41 billion parameters (Qwen2 Technical Report, arXiv:2407.10671).
            57_408_658_944,
            {
                "model_type": "qwen2_moe", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151936,
                "max_position_embeddings": 131072, "moe_intermediate_size": 2560,
                "shared_expert_intermediate_size": 20480, "num_experts": 64, "num_experts_per_tok": 8,
                "norm_topk_prob": False, "decoder_sparse_step": 1, "use_sliding_window": False, "hidden_act": "silu",
                "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
            },
        ),
        (
            # HuggingFaceTB/SmolVLM-Instruct: 2.25 billion parameters.
            2_246_272_880,
            {
                "model_type": "idefics3", "scale_factor": 3, "tie_word_embeddings": False,
                "text_config": {
                    "model_type": "llama", "num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 8192,
                    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49155,
                    "max_position_embeddings": 16384, "rope_theta": 273768.0, "rms_norm_eps": 1e-5,
                },
                "vision_config": {
                    "model_type": "idefics3_vision", "hidden_size": 1152, "image_size": 384, "patch_size": 14,
                    "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                },
            },
        ),
        (
            "smolvlm-256m",
            {
                "model_type": "idefics3", "scale_factor": 4, "tie_word_embeddings": False,
                "text_config": {
                    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
                    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "head_dim": 64,
                    "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5,
                },
                "vision_config": {
                    "model_type": "idefics3_vision", "hidden_size": 768, "image_size": 512, "patch_size": 16,
                    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                },
            },
        ),
    ],
    ids=["deepseek_v3", "gpt2", "qwen3_moe", "qwen1.5-moe", "qwen2-57b", "smolvlm", "smolvlm-256m"],
)  # fmt: skip
def test_more_architectures_are_planned_than_imported(tmp_path: Path, name: str | int, given: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    total = model_spec(name).parameters.total if isinstance(name, str) else name
    assert model_spec(str(path)).parameters.total == total
    if given["model_type"] == "idefics3":
        assert model_from_config(path).parameters.total == total
        return
    with pytest.raises(InputError, match=f"model_type = '{given['model_type']}' is not known here"):
        model_from_config(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "rwkv"}, "model_type = 'rwkv' is not known here; known are llama, mistral, mixtral, qwen2"),
        ({"model_type": "gemma2"}, "model_type = 'gemma2' is not known here"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step and mlp_only_layers are not accepted"),
    ],
)
def test_an_architecture_that_does_not_map_exactly_is_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    path = tmp_path / "config.json"
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
        "num_experts": 4,
        "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 256, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }  # fmt: skip
    path.write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=sentence):
        model_spec(str(path))


@pytest.mark.parametrize(
    ("total", "field", "value", "given"),
    [
        (
            # Qwen/Qwen2-7B, config.json: 7.62 billion parameters.
            7_615_616_512, "qkv_bias", True,
            {
                "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                "max_position_embeddings": 131072, "max_window_layers": 28, "sliding_window": 131072,
                "use_sliding_window": False, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            },
        ),
        (
            # mistralai/Mistral-7B-v0.1, config.json: 7.24 billion parameters.
            7_241_732_096, "sliding_window", 4096,
            {
                "model_type": "mistral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
                "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
                "max_position_embeddings": 32768, "sliding_window": 4096, "tie_word_embeddings": False,
            },
        ),
        (
            # HuggingFaceTB/SmolLM3-3B, config.json: 3.08 billion parameters, every fourth layer without positions.
            3_075_098_624, "nope_interval", 4,
            {
                "model_type": "smollm3", "num_hidden_layers": 36, "hidden_size": 2048, "intermediate_size": 11008,
                "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256,
                "max_position_embeddings": 65536, "no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4,
                "use_sliding_window": False, "sliding_window": None, "rope_theta": 5e6, "rms_norm_eps": 1e-6,
            },
        ),
    ],
    ids=["qwen2-7b", "mistral-7b", "smollm3-3b"],
)  # fmt: skip
def test_published_configs_have_their_published_parameters(
    tmp_path: Path, total: int, field: str, value: Any, given: dict[str, Any]
) -> None:
    model = model_from_config(write(tmp_path, given))
    assert model.parameters.total == total
    assert getattr(model, field) == value


def test_a_shared_expert_has_a_width_and_a_gate_of_its_own(tmp_path: Path) -> None:
    small = LLAMA | {
        "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 80,
    }  # fmt: skip
    model = model_spec(write(tmp_path, small))
    assert model.moe is not None
    assert (model.shared_width, model.moe.shared_gate, model.qkv_bias) == (80, True, True)
    # Two layers: three matrices of 64 x 80, and a gate of 64.
    assert model.parameters.shared_experts == 2 * (3 * 64 * 80 + 64)


@pytest.mark.slow
def test_a_vision_model_has_the_parameters_that_transformers_builds(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 8,
    }  # fmt: skip
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**text), vision_config=vision, scale_factor=2, image_token_id=99
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        built = transformers.Idefics3ForConditionalGeneration(config)
    assert model_spec(tmp_path / "config.json").parameters.total == built.num_parameters()
