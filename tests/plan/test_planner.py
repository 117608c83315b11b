"""The step's arithmetic agrees with the papers' formulas, with a counter of operations, and with itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelworks.plan import predict
from modelworks.plan.step import MATMUL_EFFICIENCY, activation_bytes_per_token, memory_bytes, optimizer_bytes
from modelworks.spec import DeviceSpec, InputError, ModelSpec, RunSpec, device_spec, loads_run, model_spec
from modelworks.spec.catalog import names
from modelworks.spec.flops import forward_flop_per_token


def run_of(model: str = "grok-tiny", *overrides: str) -> RunSpec:
    return loads_run(f'model = "{model}"\n', overrides)


def device(**given: object) -> DeviceSpec:
    fields = {
        "name": "test",
        "peak_flops": {"fp32": 1e12, "bf16": 4e12},
        "memory_bytes": 64 * 2**30,
        "memory_bandwidth_bytes": 1e11,
        "power_w": 100.0,
    }
    return DeviceSpec.model_validate(fields | given)


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


def test_activations_take_what_korthikanti_et_al_count_without_dropout_and_scores() -> None:
    """arXiv:2205.05198, eq. 1: sbh(34 + 5as/h) bytes per layer; two of the 34 are dropout masks, the second term is
    the score matrix, which flash attention doesn't keep."""
    gpt = model_spec("gpt3-175b")
    assert activation_bytes_per_token(run_of("gpt3-175b"), "bf16") == gpt.layers * gpt.hidden * (34 - 2)


@pytest.mark.parametrize("name", names("models"))
def test_full_recomputation_keeps_less_and_works_a_forward_pass_more(name: str) -> None:
    plain, full = run_of(name), run_of(name, "parallel.recompute=full")
    assert activation_bytes_per_token(full, "bf16") < activation_bytes_per_token(plain, "bf16")
    fast_memory = device(memory_bandwidth_bytes=1e30)
    slowdown = predict(full, fast_memory).step_time_s / predict(plain, fast_memory).step_time_s
    # The blocks run four times instead of three; the output matrix doesn't run again.
    head = 2.0 * plain.model.hidden * plain.model.vocab / forward_flop_per_token(plain.model, plain.train.seq_len)
    assert slowdown == pytest.approx((4 - head) / 3, rel=1e-9)
    assert predict(full, fast_memory).flop_per_step == predict(plain, fast_memory).flop_per_step


@given(st.floats(1e9, 1e18), st.floats(1e9, 1e15), st.integers(1, 512))
def test_a_step_is_the_matrix_products_and_the_optimizers_traffic(flops: float, bandwidth: float, batch: int) -> None:
    run = run_of("grok-tiny", f"train.global_batch={batch}", "train.precision=fp32")
    predicted = predict(run, device(peak_flops={"fp32": flops}, memory_bandwidth_bytes=bandwidth))
    products = predicted.flop_per_step / flops / MATMUL_EFFICIENCY
    assert predicted.step_time_s == pytest.approx(products + optimizer_bytes(run.model) / bandwidth)
    assert predicted.tokens_per_s * predicted.step_time_s == pytest.approx(run.train.tokens_per_step)
    assert 0 < predicted.mfu <= MATMUL_EFFICIENCY * (1 + 1e-9)
    assert predicted.run_time_s == pytest.approx(run.train.steps * predicted.step_time_s)


def test_muon_takes_longer_than_adamw_by_a_share_that_shrinks_with_the_batch() -> None:
    def share(batch: int) -> float:
        runs = (run_of("grok-tiny", f"train.optimizer={name}", f"train.global_batch={batch}") for name in _OPTIMIZERS)
        muon, adamw = (predict(run, device()).step_time_s for run in runs)
        return muon / adamw - 1

    assert 0 < share(64) < share(8)


_OPTIMIZERS = ("muon", "adamw")


def test_muons_iterations_count_five_times_three_products_per_matrix() -> None:
    """X X^T, its square and the product with X, five times: 4 m^2 n + 2 m^3 each for a matrix of m x n, m <= n."""
    fields = {"layers": 1, "hidden": 8, "heads": 1, "head_dim": 8, "ffn_hidden": 32, "vocab": 10, "context": 16}
    model = ModelSpec(**fields, gated_mlp=False)
    run = run_of("grok-tiny", "train.seq_len=16").model_copy(update={"model": model})
    muon = run.model_copy(update={"train": run.train.model_copy(update={"optimizer": "muon"})})
    rate = device(peak_flops={"fp32": 1.0}, memory_bandwidth_bytes=1e30)
    extra = (predict(muon, rate).step_time_s - predict(run, rate).step_time_s) * MATMUL_EFFICIENCY
    attention = 4 * 5 * (4 * 8**2 * 8 + 2 * 8**3)
    feed_forward = 2 * 5 * (4 * 8**2 * 32 + 2 * 8**3)
    assert extra == pytest.approx(attention + feed_forward, rel=1e-6)


@pytest.mark.parametrize(
    ("rates", "asked", "chosen"),
    [
        ({"fp32": 1e12, "bf16": 4e12}, "auto", "bf16"),
        ({"fp32": 1e12, "bf16": 1e10}, "auto", "fp32"),
        ({"fp32": 1e12}, "auto", "fp32"),
        ({"fp32": 1e12, "bf16": 4e12}, "fp32", "fp32"),
    ],
)
def test_auto_precision_is_the_faster_one(rates: dict[str, float], asked: str, chosen: str) -> None:
    assert predict(run_of("grok-tiny", f"train.precision={asked}"), device(peak_flops=rates)).precision == chosen


def test_a_precision_without_a_rate_is_refused() -> None:
    with pytest.raises(InputError, match=r"train\.precision = 'fp8' is not accepted on a100-80gb: .* fp32, tf32, bf16"):
        predict(run_of("grok-tiny", "train.precision=fp8"), device_spec("a100-80gb"))


def test_several_devices_are_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match=r"cluster\.gpus = 1016 is not accepted: layouts over several devices"):
        predict(run_of("grok-tiny", "cluster=h100-superpod"), device_spec("h100-sxm"))


def test_the_automatic_micro_batch_is_the_largest_divisor_that_fits() -> None:
    run = run_of("grok-tiny", "train.global_batch=24")
    for gib in (2, 3, 6, 64):
        target = device(memory_bytes=gib * 2**30)
        chosen = predict(run, target)
        assert 24 % chosen.micro_batch == 0
        assert chosen.memory_bytes <= target.memory_bytes
        larger = [size for size in (2, 3, 4, 6, 8, 12, 24) if size > chosen.micro_batch]
        assert all(memory_bytes(run, size, chosen.precision) > target.memory_bytes for size in larger)


def test_a_stated_micro_batch_is_kept() -> None:
    assert predict(run_of("grok-tiny", "train.micro_batch=4"), device()).micro_batch == 4


def test_the_command_prints_the_prediction(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('name = "small"\nmodel = "grok-tiny"\n')

    def plan(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "modelworks", "plan", str(file), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = plan("--json", "--set", "train.seq_len=256")
    assert done.returncode == 0, done.stderr
    expected = predict(run_of("grok-tiny", "train.seq_len=256"), device_spec("local")).as_dict()
    assert json.loads(done.stdout) == {"name": "small", "device": "local"} | expected
    table = plan()
    assert table.returncode == 0, table.stderr
    assert "tokens/s" in table.stdout
    refused = plan("--set", "cluster=colossus-100k", "--set", "train.global_batch=100000")
    assert refused.returncode == 2
    assert "layouts over several devices are not planned yet" in refused.stderr
