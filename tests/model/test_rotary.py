"""Rotary positions and their stretching, against transformers' own tables and against the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modelworks.model.decoder import Decoder
from modelworks.model.rotary import attention_factor, rotary_frequencies, rotary_tables
from modelworks.release.huggingface import load_pretrained
from modelworks.spec.huggingface import spec_values
from modelworks.spec.model import ModelSpec

CPU = torch.device("cpu")
ORIGINAL = {"original_max_position_embeddings": 2048}
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 16.0} | ORIGINAL,
    "yarn as Grok-2": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 8.0, "attention_factor": 1.0} | ORIGINAL,
    "yarn as DeepSeek": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0} | ORIGINAL,
    "yarn at broken dimensions": {"rope_type": "yarn", "factor": 4.0, "truncate": False} | ORIGINAL,
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL,
}


def small_config(scaling: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=64, max_position_embeddings=2048, tie_word_embeddings=False,
        rope_parameters={"rope_theta": 500_000.0} | scaling,
    )  # fmt: skip


def ours_of(config: LlamaConfig) -> ModelSpec:
    return ModelSpec(**spec_values(config.to_dict(), "config.json"))


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("seq_len", [300, 8000])
def test_frequencies_and_attention_factor_equal_those_of_transformers(scaling: dict[str, Any], seq_len: int) -> None:
    config = small_config(scaling)
    if scaling["rope_type"] == "default":
        expected, factor = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, CPU, seq_len=seq_len)
    spec = ours_of(config)
    torch.testing.assert_close(rotary_frequencies(spec, CPU, seq_len), expected, rtol=1e-5, atol=1e-9)
    assert attention_factor(spec) == pytest.approx(factor)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_stretched_network_gives_the_logits_that_transformers_gives(scaling: dict[str, Any], tmp_path: Any) -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(small_config(scaling)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.12)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(64, (1, 2500 if scaling["rope_type"] == "dynamic" else 600))
    with torch.no_grad():
        ours = load_pretrained(tmp_path)(tokens)
        expected: Tensor = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_a_static_ntk_extension_divides_the_slowest_frequency_by_the_factor_and_keeps_the_fastest() -> None:
    plain = ours_of(small_config(SCALINGS["plain"]))
    stretched = ModelSpec(**plain.model_dump() | {"rope_scaling": {"rope_type": "ntk", "factor": 8.0}})
    before, after = rotary_frequencies(plain, CPU), rotary_frequencies(stretched, CPU)
    torch.testing.assert_close(after[-1], before[-1] / 8.0)
    assert after[0] == before[0] == 1.0


@settings(max_examples=40, deadline=None)
@given(factor=st.floats(1.0, 64.0), whole=st.floats(0.0, 1.0), kind=st.sampled_from(["yarn", "yarn_log"]))
def test_yarns_frequencies_stay_between_stretched_and_plain_ones(factor: float, whole: float, kind: str) -> None:
    plain = ours_of(small_config(SCALINGS["plain"]))
    scaling = {"rope_type": kind, "factor": factor, "extrapolation_factor": whole} | ORIGINAL
    stretched = ModelSpec(**plain.model_dump() | {"rope_scaling": scaling})
    before, after = rotary_frequencies(plain, CPU), rotary_frequencies(stretched, CPU)
    assert (after <= before * 1.000_01).all()
    assert (after >= before / factor * 0.999_99).all()
    # The fastest pair turns 326 times in the original context, the slowest less than once.
    kept = whole + (1 - whole) / factor if kind == "yarn" else factor ** (whole - 1)
    torch.testing.assert_close(after[0], before[0] * kept)
    torch.testing.assert_close(after[-1], before[-1] / factor)


def test_the_attention_factor_scales_the_logits_twice() -> None:
    """Cosine and sine are multiplied, of queries and of keys: the YaRN paper's 1 / t, with sqrt(1/t) = 0.1 ln s + 1."""
    spec = ours_of(small_config(SCALINGS["yarn"]))
    tables = rotary_tables(spec, 100, 5, CPU)
    lengths = (tables.cosine**2 + tables.sine**2).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.1 * math.log(16.0) + 1.0))


def test_a_dynamic_network_is_the_plain_one_up_to_its_original_context() -> None:
    plain, dynamic = (ours_of(small_config(SCALINGS[kind])) for kind in ("plain", "dynamic"))
    assert dynamic.context == 4 * plain.context
    assert torch.equal(rotary_frequencies(plain, CPU), rotary_frequencies(dynamic, CPU, 2048))
    assert rotary_frequencies(dynamic, CPU, 2049)[-1] < rotary_frequencies(plain, CPU)[-1]
    Decoder(dynamic)
