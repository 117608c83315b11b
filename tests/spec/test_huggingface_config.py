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
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Mixtral", "Qwen3"])
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
        small["sliding_window"] = None
    config = getattr(transformers, f"{name}Config")(**small)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    model = model_spec(tmp_path / "config.json")
    assert model.parameters.total == built.num_parameters()
    assert model.rope_base == 12_345.0
    assert model.tied_embeddings == (name == "Qwen3")


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
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window = 32 is not accepted"),
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
    ],
    ids=["deepseek_v3", "gpt2", "qwen3_moe"],
)  # fmt: skip
def test_more_architectures_are_planned_than_imported(tmp_path: Path, name: str | int, given: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    total = model_spec(name).parameters.total if isinstance(name, str) else name
    assert model_spec(str(path)).parameters.total == total
    with pytest.raises(InputError, match=f"model_type = '{given['model_type']}' is not known here"):
        model_from_config(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "rwkv"}, "model_type = 'rwkv' is not known here; known are llama, mistral, mixtral, qwen3"),
        ({"model_type": "qwen2"}, "model_type = 'qwen2' is not known here"),
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
