"""The FLOPs of a network against PyTorch's own counter and against what was published."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modelworks.model.decoder import Decoder
from modelworks.spec.files import model_spec
from modelworks.spec.flops import attention_flop_per_token, forward_flop_per_token, training_flop_per_token
from modelworks.spec.model import ModelSpec


def test_a_dense_networks_matrix_products_are_those_that_pytorch_counts_forward_and_backward() -> None:
    spec = ModelSpec(layers=2, hidden=64, ffn_hidden=160, heads=4, vocab=512, context=128)
    decoder, tokens = Decoder(spec), torch.randint(512, (3, 32))
    with FlopCounterMode(display=False) as counter:
        decoder(tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if str(operation) in {"aten.mm", "aten.addmm"})
    attention = spec.layers * attention_flop_per_token(spec, 32)
    assert products == 3 * (forward_flop_per_token(spec, 32) - attention) * tokens.numel()


def test_grok_1_takes_six_flops_per_active_weight_and_token() -> None:
    # xAI states that a quarter of the 314 B weights are active for a token; at short sequences attention adds little.
    assert training_flop_per_token(model_spec("grok-1"), 1) == pytest.approx(6 * 314e9 / 4, rel=0.1)


def attention_flop(model: ModelSpec, seq_len: int) -> float:
    """Of one token and all layers, over the whole sequence: scores and weighted values, two FLOPs per product."""
    return 4.0 * model.layers * model.heads * model.head_dim * seq_len


def test_a_dense_model_takes_what_narayanan_et_al_count_less_half_of_the_attention() -> None:
    """arXiv:2104.04473, eq. 3: 96 B s l h^2 (1 + s/(6h) + V/(16 l h)) with recomputation; a quarter is forward, but
    for the logits, which are not recomputed: a third."""
    gpt = model_spec("gpt3-175b")
    h, layers, vocab, s = gpt.hidden, gpt.layers, gpt.vocab, gpt.context
    blocks = 96 * layers * h**2 * (1 + s / (6 * h)) / 4
    logits = 96 * layers * h**2 * vocab / (16 * layers * h) / 3
    assert forward_flop_per_token(gpt, s) == pytest.approx(blocks + logits - attention_flop(gpt, s) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "tokens", "seq_len", "total", "tolerance"),
    [
        # arXiv:2005.14165, table D.1: 3.14e23 for 300 B tokens, attention not counted.
        ("gpt3-175b", 300e9, 2048, 3.14e23, 0.03),
        # arXiv:2407.21783, section 3.2: 3.8e25 for 15.6 T tokens.
        ("llama-3.1-405b", 15.6e12, 8192, 3.8e25, 0.05),
    ],
)
def test_a_whole_training_run_takes_what_its_paper_says(
    name: str, tokens: float, seq_len: int, total: float, tolerance: float
) -> None:
    assert 3 * forward_flop_per_token(model_spec(name), seq_len) * tokens == pytest.approx(total, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek"])
def test_flops_equal_those_counted_while_transformers_runs(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    seq_len = 64
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if name == "deepseek" else 2,
        "vocab_size": 100,
        "max_position_embeddings": 128,
    }
    fields = {"layers": 3, "hidden": 64, "ffn_hidden": 96, "heads": 4, "vocab": 100, "context": 128}
    if name == "llama":
        config = transformers.LlamaConfig(**shape)
        model = ModelSpec(**fields, kv_heads=2, head_dim=16)
        attention = attention_flop(model, seq_len)
    elif name == "mixtral":
        config = transformers.MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
        moe = {"experts": 4, "top_k": 2, "expert_hidden": 96}
        model = ModelSpec(**fields, kv_heads=2, head_dim=16, moe=moe)
        attention = attention_flop(model, seq_len)
    else:
        latent = {"q_rank": 24, "kv_rank": 16, "rope_head_dim": 8, "nope_head_dim": 16, "value_head_dim": 12}
        config = transformers.DeepseekV3Config(
            **shape,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        )
        moe = {"experts": 4, "top_k": 2, "expert_hidden": 32, "shared_experts": 1, "dense_layers": 1}
        model = ModelSpec(**fields, head_dim=24, latent_attention=latent, moe=moe | {"scoring": "sigmoid"})
        attention = 2.0 * 3 * 4 * (24 + 12) * seq_len
    config._attn_implementation = "eager"  # the counter sees its two products; they run over the whole sequence
    built = transformers.AutoModelForCausalLM.from_config(config)
    # The experts as a loop over plain products, which the counter knows.
    built.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(torch.randint(0, 100, (1, seq_len)))
    assert counter.get_total_flops() == pytest.approx(
        seq_len * (forward_flop_per_token(model, seq_len) + attention / 2), rel=1e-9
    )
