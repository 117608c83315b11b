"""Context extension in specs and configs: what is accepted, what is refused, and that nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest

from modelworks.spec import InputError, ModelSpec, RunSpec, dumps, loads_run
from modelworks.spec.fields import validate
from modelworks.spec.files import model_spec
from modelworks.spec.huggingface import config_from_model, spec_values

SMALL: dict[str, Any] = {"layers": 1, "hidden": 64, "ffn_hidden": 64, "heads": 2, "vocab": 16, "context": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 2048}
GROK = {"norm_placement": "sandwich", "activation": "gelu", "attention_softcap": 30.0, "tied_embeddings": True}
GROK["moe"] = {"experts": 2, "top_k": 1, "expert_hidden": 32}


def with_scaling(scaling: Any, **fields: Any) -> ModelSpec:
    return validate(ModelSpec, SMALL | fields | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        ({"rope_type": "yarm", "factor": 4.0}, "rope_scaling.rope_type = 'yarm' is not accepted: it should be"),
        ({"rope_type": "linear"}, "'rope_scaling.factor' is missing"),
        ({"rope_type": "linear", "factor": 0.5}, "rope_scaling.factor = 0.5 is not accepted: it should be greater"),
        ({"rope_type": "linear", "factor": "4"}, "rope_scaling.factor = '4' is not accepted: it should be a number"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings is missing: rope_type = 'yarn' needs"),
        (LLAMA3, "rope_scaling.low_freq_factor is missing: rope_type = 'llama3' needs it"),
        ({"rope_type": "linear", "factor": 4.0, "beta_fast": 8.0}, "beta_fast means nothing to rope_type = 'linear'"),
        (YARN | {"beta_fast": 0.5}, "beta_fast = 0.5 is not accepted: it should be above beta_slow = 1.0"),
        (LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}, "it should be above low_freq_factor = 4.0"),
        (YARN | {"mscale": 1.0}, "mscale and rope_scaling.mscale_all_dim are accepted together only"),
        (YARN | {"extrapolation_factor": 1.5}, "rope_scaling.extrapolation_factor = 1.5 is not accepted"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings = 0 is not accepted"),
        (YARN | {"attn_factor": 1.0}, "did you mean 'attention_factor'?"),
        ("yarn", "rope_scaling = 'yarn' is not accepted: it should be a table"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_in_one_sentence(scaling: Any, sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        with_scaling(scaling)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_learned_positions_are_not_stretched() -> None:
    with pytest.raises(InputError, match="rope_scaling is not accepted beside position = 'learned'"):
        with_scaling(YARN, position="learned")


def test_a_run_takes_another_kind_than_its_presets_or_none() -> None:
    run = '[model]\npreset = "llama-3.1-8b"\n{}[train]\nseq_len = 128\n'
    assert loads_run(run.format("")).model.rope_scaling == model_spec("llama-3.1-8b").rope_scaling
    other = loads_run(run.format('rope_scaling = {rope_type = "linear", factor = 2}\n'))
    assert other.model.rope_scaling is not None
    assert other.model.rope_scaling.rope_type == "linear"
    assert loads_run(run.format('rope_scaling = {rope_type = "default"}\n')).model.rope_scaling is None
    longer = loads_run(run.format(""), ["model.rope_scaling.factor=32.0"])
    assert longer.model.rope_scaling is not None
    assert longer.model.rope_scaling.factor == 32.0
    with pytest.raises(InputError, match=r"--set model.rope_scaling.factr: unknown field; did you mean"):
        loads_run(run.format(""), ["model.rope_scaling.factr=2"])


def test_a_table_in_the_words_of_older_run_specs_is_read_as_before() -> None:
    old = RunSpec(model=SMALL | {"rope_scaling": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}})
    text = dumps(old).replace("= 2048", "= 2048.0").replace("rope_type", "type")
    assert loads_run(text) == old


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048},
        YARN | {"beta_fast": 8.0, "truncate": False, "attention_factor": 1.1},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
        LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_a_config_gives_back_the_scaling_that_was_written(scaling: dict[str, Any] | None) -> None:
    model = with_scaling(scaling)
    back = ModelSpec(**spec_values(config_from_model(model), "config.json"))
    assert (back.rope_scaling, back.rope_base, back.context) == (model.rope_scaling, model.rope_base, model.context)


def test_a_static_ntk_extension_is_written_as_the_base_that_it_is() -> None:
    config = config_from_model(with_scaling({"rope_type": "ntk", "factor": 8.0}))
    assert "rope_scaling" not in config
    assert config["rope_theta"] == pytest.approx(10_000 * 8 ** (32 / 30))


def test_groks_own_fields_are_read_and_written() -> None:
    scaling = YARN | {"attention_factor": 1.0, "beta_fast": 8.0, "beta_slow": 1.0, "extrapolation_factor": 0.9}
    config = config_from_model(with_scaling(scaling, **GROK))
    assert "rope_scaling" not in config
    assert (config["rope_type"], config["scaling_factor"], config["extrapolation_factor"]) == ("yarn", 4.0, 0.9)
    back = ModelSpec(**spec_values(config, "config.json"))
    assert back.rope_scaling == with_scaling(scaling).rope_scaling
    plain = ModelSpec(**spec_values(config | {"rope_type": "original"}, "config.json"))
    assert plain.rope_scaling is None
    with pytest.raises(InputError, match="rope_type = 'theta' is not accepted: one of original, yarn"):
        spec_values(config | {"rope_type": "theta"}, "config.json")


@pytest.mark.parametrize(
    ("scaling", "fields", "sentence"),
    [
        (YARN, GROK, "'attention_factor': 1.0"),  # SGLang never applies one
        ({"rope_type": "linear", "factor": 4.0}, GROK, "rope_type = 'linear' has no place in the config of Grok1For"),
        (YARN | {"rope_type": "yarn_log"}, {}, "rope_type = 'yarn_log' has no place in the config of LlamaForCausalLM"),
        (YARN | {"extrapolation_factor": 0.5}, {}, "has no place in the config of LlamaForCausalLM"),
    ],
)
def test_a_scaling_that_others_would_not_apply_is_not_written(
    scaling: dict[str, Any], fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError) as refused:
        config_from_model(with_scaling(scaling, **fields))
    assert sentence in str(refused.value)
    assert "RopeScalingSpec" not in str(refused.value)


def test_a_config_with_an_unknown_kind_is_refused() -> None:
    config = config_from_model(with_scaling(None)) | {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}
    with pytest.raises(
        InputError, match=r"rope_scaling.rope_type = 'longrope' is not accepted: one of linear, dynamic"
    ):
        spec_values(config, "config.json")
