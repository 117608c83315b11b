"""The catalog's numbers are those that others published, and each says where it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from modelworks.spec import InputError, cluster_spec, device_spec, facts, model_spec
from modelworks.spec.catalog import Certainty, Entry, Kind, entries, entry, names
from modelworks.spec.fields import Section

EVERY_ENTRY = [found for kind in get_args(Kind) for found in entries(kind)]


def numbers(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all numbers, quantities with units included."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif (isinstance(value, int | float) and not isinstance(value, bool)) or (
            isinstance(value, str) and re.match(r"\d", value)
        ):
            yield prefix + key


def has(values: dict[str, Any], dotted: str) -> bool:
    for key in dotted.split("."):
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


@pytest.mark.parametrize("found", EVERY_ENTRY, ids=lambda found: f"{found.kind}/{found.name}")
def test_every_number_of_the_catalog_has_a_source_and_a_certainty(found: Entry) -> None:
    assert list(numbers(found.values))
    for field in numbers(found.values):
        fact = found.provenance.of(field)
        assert len(fact.source) > 10, field
        assert fact.certainty in get_args(Certainty)
        if fact.source.startswith("Modelworks"):
            assert fact.certainty != "published", f"{field}: our own number isn't published by anyone"


@pytest.mark.parametrize("found", EVERY_ENTRY, ids=lambda found: f"{found.kind}/{found.name}")
def test_no_source_is_stated_for_a_field_that_is_not_there(found: Entry) -> None:
    assert [field for field in found.provenance.fields if not has(found.values, field)] == []


@pytest.mark.parametrize("kind", ["models", "hardware", "clusters"])
def test_every_entry_of_the_catalog_is_a_whole_spec(kind: Kind) -> None:
    read: dict[str, Callable[[str], Section]] = {
        "models": model_spec,
        "hardware": device_spec,
        "clusters": cluster_spec,
        "failures": facts.failures,
        "prices": facts.prices,
        "parts": facts.parts,
        "top500": facts.top500_machine,
        "observations": facts.published_run,
    }
    assert names(kind)
    for name in names(kind):
        assert read[kind](name).name == name  # type: ignore[attr-defined]


def test_a_cluster_names_a_device_of_the_catalog() -> None:
    assert {cluster_spec(name).device for name in names("clusters")} <= set(names("hardware"))


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # The sizes in the headers of the published safetensors files, as the Hugging Face hub shows them.
        ("smollm2-135m", 134_515_008),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_parameters_equal_those_of_the_published_weights(name: str, total: int) -> None:
    assert model_spec(name).parameters.total == total


@pytest.mark.parametrize(
    ("name", "total", "active", "tolerance"),
    [
        # xai-org/grok-1, README: 314B.
        ("grok-1", 314e9, None, 0.01),
        # arXiv:2005.14165, table 2.1: 175.0B.
        ("gpt3-175b", 175.0e9, 175.0e9, 0.003),
        # arXiv:2401.04088, section 2: 47B in all, 13B active.
        ("mixtral-8x7b", 47e9, 13e9, 0.01),
        # arXiv:2412.19437, abstract: 671B in all, 37B active.
        ("deepseek-v3", 671e9, 37e9, 0.02),
    ],
)
def test_parameters_agree_with_the_papers(name: str, total: float, active: float | None, tolerance: float) -> None:
    counted = model_spec(name).parameters
    assert counted.total == pytest.approx(total, rel=tolerance)
    if active is not None:
        assert counted.active == pytest.approx(active, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b", "gpt3-175b", "deepseek-v3", "llama-3.1-405b"])
def test_parameters_equal_those_of_transformers_built_without_memory(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = model_spec(name)
    shape = {
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "tie_word_embeddings": model.tied_embeddings,
    }
    if name.startswith("llama"):
        config = transformers.LlamaConfig(**shape)
    elif name.startswith("mixtral"):
        config = transformers.MixtralConfig(
            **shape, num_local_experts=model.moe.experts, num_experts_per_tok=model.moe.top_k
        )
    elif name.startswith("gpt3"):
        config = transformers.GPT2Config(
            vocab_size=model.vocab,
            n_positions=model.context,
            n_embd=model.hidden,
            n_layer=model.layers,
            n_head=model.heads,
            n_inner=model.ffn_hidden,
        )
    else:
        latent, moe = model.latent_attention, model.moe
        config = transformers.DeepseekV3Config(
            **shape,
            moe_intermediate_size=moe.expert_hidden,
            n_routed_experts=moe.experts,
            num_experts_per_tok=moe.top_k,
            n_shared_experts=moe.shared_experts,
            first_k_dense_replace=moe.dense_layers,
            q_lora_rank=latent.q_rank,
            kv_lora_rank=latent.kv_rank,
            qk_rope_head_dim=latent.rope_head_dim,
            qk_nope_head_dim=latent.nope_head_dim,
            v_head_dim=latent.value_head_dim,
        )
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    # The router's correction bias of DeepSeek is a buffer there, and a weight of the published files.
    extra = sum(buffer.numel() for key, buffer in built.named_buffers() if key.endswith("e_score_correction_bias"))
    assert built.num_parameters() + extra == model.parameters.total


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no preset 'grok1' in models; did you mean 'grok-1'\?"):
        model_spec("grok1")


def test_a_preset_cannot_name_a_file_outside_the_catalog() -> None:
    with pytest.raises(InputError, match="no preset"):
        entry("models", "../hardware/local")


def test_every_price_is_of_a_device_of_the_catalog() -> None:
    assert set(names("prices")) - {"rules"} <= set(names("hardware"))
    with pytest.raises(InputError, match="no preset 'b20' in prices; did you mean 'b200'"):
        entry("prices", "b20")


def test_a_preset_may_be_a_file_of_the_users(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text("layers = 2\nhidden = 64\nffn_hidden = 128\nheads = 4\nvocab = 100\ncontext = 32\n")
    model = model_spec(own)
    assert (model.name, model.layers, model.head_dim, model.kv_heads) == ("mine", 2, 16, 4)
    assert entry("models", str(own)).provenance.certainty == "assumed"
    own.write_text(own.read_text().replace("layers = 2", "layers = 3"))
    assert model_spec(own).layers == 3


def test_a_preset_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    with pytest.raises(InputError, match=r"mine\.toml: cannot be read: No such file"):
        model_spec(own)
    own.write_text("layers = = 2")
    with pytest.raises(InputError, match=r"mine\.toml: not TOML"):
        model_spec(own)
    own.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"mine\.toml: not TOML"):
        model_spec(own)
    own.write_text("provenance = 3")
    with pytest.raises(InputError, match="provenance = 3 is not accepted: it should be a table"):
        model_spec(own)


def test_the_local_device_is_what_bench_measured(home: Path) -> None:
    assert device_spec("local").power_w == entry("hardware", "local").values["power_w"]
    (home / "hardware.toml").write_text(
        'kind = "cpu"\nmemory_bytes = "8GiB"\nmemory_bandwidth_bytes = "10GB/s"\npower_w = 30.0\n'
        "[peak_flops]\nfp32 = 2e11\n"
    )
    measured = device_spec("local")
    assert (measured.name, measured.peak_flops, measured.memory_bytes) == ("local", {"fp32": 2e11}, 8 * 2**30)
