"""The whole decoder: parameters, parity with transformers, generation, losses, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from modelworks.model.decoder import Decoder
from modelworks.spec import InputError, model_spec
from modelworks.spec.huggingface import spec_values
from modelworks.spec.model import ModelSpec

SIZES: dict[str, Any] = {"layers": 2, "hidden": 48, "heads": 6, "kv_heads": 2, "vocab": 97, "context": 64}
EXPERTS: dict[str, Any] = {"experts": 4, "top_k": 2, "expert_hidden": 40}
GROK: dict[str, Any] = SIZES | {
    "activation": "gelu",
    "norm_placement": "sandwich",
    "attention_softcap": 30.0,
    "embedding_multiplier": 48**0.5,
    "output_multiplier": 0.577,
    "tied_embeddings": True,
    "moe": EXPERTS,
}
TOWER: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "layers": 1, "hidden": 16, "heads": 2, "ffn_hidden": 32, "pixel_shuffle": 2,
}  # fmt: skip
SHAPES = {
    "grok": GROK,
    "mixtral": SIZES | {"moe": EXPERTS | {"renormalize": True}},
    "dense first, then experts": SIZES | {"ffn_hidden": 56, "moe": EXPERTS | {"dense_layers": 1}},
    "llama with biases": SIZES | {"ffn_hidden": 56, "attention_bias": True, "mlp_bias": True},
    "mistral": SIZES | {"ffn_hidden": 56, "sliding_window": 7},
    "smollm3": SIZES | {"ffn_hidden": 56, "nope_interval": 2, "tied_embeddings": True},
    "qwen2": SIZES | {"ffn_hidden": 56, "qkv_bias": True},
    "qwen": SIZES | {"ffn_hidden": 56, "qk_norm": True, "head_dim": 16, "tied_embeddings": True},
}


def decoder(shape: str) -> Decoder:
    return Decoder(ModelSpec(**SHAPES[shape]))


def some_tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, SIZES["vocab"], (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("preset", ["grok-1", "grok-tiny", "smollm2-135m"])
def test_a_preset_builds_the_parameters_that_its_spec_counts(preset: str) -> None:
    spec = model_spec(preset)
    with torch.device("meta"):
        built = Decoder(spec)
    assert sum(parameter.numel() for parameter in built.parameters()) == spec.parameters.total


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_builds_the_parameters_that_its_spec_counts(shape: str) -> None:
    built = decoder(shape)
    assert sum(parameter.numel() for parameter in built.parameters()) == built.spec.parameters.total


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_seed_draws_the_same_parameters_and_another_seed_others(shape: str) -> None:
    first, second = decoder(shape), decoder(shape)
    first.initialize(7)
    second.initialize(7)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    second.initialize(8)
    assert not torch.equal(first.embed.weight, second.embed.weight)


def transformers_model(kind: str) -> PreTrainedModel:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 211,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
    }
    torch.manual_seed(11)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    if kind == "qwen2 with a window":
        config = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=20, max_window_layers=0)
        return Qwen2ForCausalLM(config).eval()
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes, sliding_window=20)).eval()
    if kind == "smollm3":
        return SmolLM3ForCausalLM(SmolLM3Config(**sizes, no_rope_layer_interval=2, pad_token_id=0)).eval()
    tied, biased = kind == "tied llama", kind == "llama with biases"
    config = LlamaConfig(**sizes, tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased)
    return LlamaForCausalLM(config).eval()


def with_weights_of(theirs: PreTrainedModel) -> Decoder:
    """Our decoder with the weights of a transformers model, matched by what each matrix is for."""
    ours = Decoder(ModelSpec(**spec_values(theirs.config.to_dict(), "config.json")))
    state = theirs.state_dict()
    renamed = {"embed.weight": state["model.embed_tokens.weight"], "final_norm.weight": state["model.norm.weight"]}
    if ours.head is not None:
        renamed["head.weight"] = state["lm_head.weight"]
    parts = {f"attn.w{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"}
    parts |= {f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    parts |= {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm", "moe.router": "mlp.gate"}
    parts |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for layer in range(ours.spec.layers):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        for name, other in parts.items():
            for kind in ("weight", "bias"):
                if f"{there}{other}.{kind}" in state and f"{here}{name}.{kind}" in ours.state_dict():
                    renamed[f"{here}{name}.{kind}"] = state[f"{there}{other}.{kind}"]
        if f"{there}mlp.experts.gate_up_proj" in state:
            gate, up = state[f"{there}mlp.experts.gate_up_proj"].chunk(2, dim=1)
            renamed |= {f"{here}moe.gate": gate, f"{here}moe.up": up}
            renamed[f"{here}moe.down"] = state[f"{there}mlp.experts.down_proj"]
    ours.load_state_dict(renamed)
    return ours


@pytest.mark.parametrize(
    "kind",
    [
        "llama", "tied llama", "llama with biases", "mixtral", "mistral", "smollm3", "qwen2", "qwen2 with a window",
        "qwen3",
    ],
)  # fmt: skip
def test_logits_and_losses_equal_those_of_transformers(kind: str) -> None:
    theirs = transformers_model(kind)
    for parameter in theirs.parameters():  # norms' scales and biases too
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = with_weights_of(theirs)
    tokens = torch.randint(0, 211, (2, 100))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (ours(tokens) - expected).abs().max() <= 1e-4
        targets = tokens.roll(-1, 1)
        loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(ours(tokens, targets).cross_entropy, loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_logit_hears_of_a_later_token(shape: str) -> None:
    network, tokens = decoder(shape), some_tokens()
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % SIZES["vocab"]
    with torch.no_grad():
        before, after = network(tokens), network(changed)
    torch.testing.assert_close(after[:, :15], before[:, :15], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[:, 15:], before[:, 15:], atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_generation_over_the_cache_takes_the_most_likely_token_of_the_whole_forward_pass(shape: str) -> None:
    network, tokens = decoder(shape), some_tokens(length=5)
    output = network.generate(tokens, 12)
    assert output.shape == (2, 17)
    with torch.no_grad():
        logits = network(output)
    assert torch.equal(output[:, 5:], logits[:, 4:-1].argmax(-1))


def test_drawn_tokens_follow_the_softmax_within_the_nucleus() -> None:
    network, tokens = decoder("mixtral"), some_tokens(batch=1, length=6)
    with torch.no_grad():
        probabilities = (network(tokens)[0, -1] / 0.7).softmax(-1)
    ranked = probabilities.sort(descending=True)
    kept = ranked.indices[: int((ranked.values.cumsum(0) < 0.6).sum()) + 1]
    draws = network.generate(tokens.expand(4000, -1), 1, temperature=0.7, top_p=0.6, seed=5)[:, -1]
    assert set(draws.tolist()) <= set(kept.tolist())
    expected = probabilities[kept] / probabilities[kept].sum()
    observed = draws.bincount(minlength=SIZES["vocab"])[kept] / 4000
    assert (observed - expected).abs().max() < 0.04
    again = network.generate(tokens.expand(4000, -1), 1, temperature=0.7, top_p=0.6, seed=5)[:, -1]
    assert torch.equal(draws, again)


def test_generation_ends_when_every_sequence_has_stopped() -> None:
    network, tokens = decoder("mixtral"), some_tokens(batch=1, length=5)
    freely = network.generate(tokens, 10)[0, 5:].tolist()
    stop = freely[3]
    stopped = network.generate(tokens, 10, stop=[stop])[0, 5:].tolist()
    assert stopped == freely[: freely.index(stop) + 1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_new_tokens": 100}, "model.context = 64"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"max_new_tokens": 1, "temperature": -0.5}, "temperature = -0.5"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p = 0.0"),
    ],
)
def test_generation_refuses_parameters_out_of_range(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        decoder("mixtral").generate(some_tokens(), **arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_train_every_parameter_and_report_the_load_of_each_expert(shape: str) -> None:
    network, tokens = decoder(shape), some_tokens(batch=4, length=60)
    losses = network(tokens, tokens.roll(-1, 1))
    (losses.cross_entropy + 0.01 * losses.load_balance + 0.001 * losses.router_z).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []
    assert losses.expert_load.shape == (network.spec.moe_layers, EXPERTS["experts"] if network.spec.moe else 0)
    torch.testing.assert_close(losses.expert_load.sum(1), torch.ones(network.spec.moe_layers))


def test_bfloat16_autocast_gives_nearly_the_same_loss_with_float32_gradients() -> None:
    network, tokens = decoder("grok"), some_tokens()
    expected = network(tokens, tokens.roll(-1, 1)).cross_entropy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = network(tokens, tokens.roll(-1, 1)).cross_entropy
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    loss.backward()
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in network.parameters())


def test_a_decoder_in_bfloat16_returns_float32_logits() -> None:
    network = decoder("grok").bfloat16()
    assert network(some_tokens()).dtype == torch.float32


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(InputError, match=r"65 is too long: at most model\.context = 64"):
        decoder("mixtral")(some_tokens(length=65))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (
            "latent_attention",
            {
                "latent_attention": {
                    "q_rank": 8,
                    "kv_rank": 8,
                    "rope_head_dim": 8,
                    "nope_head_dim": 8,
                    "value_head_dim": 8,
                }
            },
        ),
        ("position = 'learned'", {"position": "learned"}),
        ("vision", {"vision": TOWER}),
        ("norm = 'layer'", {"norm": "layer"}),
        ("gated_mlp = False", {"gated_mlp": False}),
        ("moe.shared_experts = 1", {"moe": EXPERTS | {"shared_experts": 1}}),
        ("moe.scoring = 'sigmoid'", {"moe": EXPERTS | {"scoring": "sigmoid"}}),
        ("moe.routed_multiplier = 2.5", {"moe": EXPERTS | {"routed_multiplier": 2.5}}),
        ("mlp_bias = True", {"moe": EXPERTS, "mlp_bias": True}),
    ],
)
def test_a_field_that_is_not_implemented_is_refused_by_name(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"model.{field}.* is accepted"):
        Decoder(ModelSpec(**SIZES | {"ffn_hidden": 56} | values))
