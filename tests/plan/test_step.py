"""A step's parts add up, follow from the layout as they should, and don't depend on what stands beside a candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelworks.plan.block import Setting
from modelworks.plan.collectives import fabric
from modelworks.plan.kernels import kernels_for
from modelworks.plan.layout import RECOMPUTE, Layouts, joined, layouts
from modelworks.plan.memory import MEMORY
from modelworks.plan.muon import layer_seconds
from modelworks.plan.planner import memory_by_stage, setting_for, software_spec
from modelworks.plan.step import REASONS, evaluate
from modelworks.spec.files import cluster_spec, device_spec, model_spec

BATCH = 1024
MakeSetting = Callable[..., Setting]


def candidates(model: str, count: int, seed: int = 0) -> Layouts:
    """Random layouts, of which some divide the model and some don't."""
    draw = np.random.default_rng(seed)
    pick = lambda *values: draw.choice(np.array(values), count)  # noqa: E731
    tensor, context, data = pick(1, 2, 4, 8), pick(1, 2), pick(1, 2, 8)
    pipeline = pick(1, 2, 4, 8)
    virtual = np.where(pipeline > 1, pick(1, 2, 4), 1)
    experts: dict[str, Any] = {}
    if model_spec(model).moe is not None:
        experts = {"expert": np.minimum(tensor * context * data, pick(1, 2, 4)), "expert_tensor": 1}
    return layouts(
        tensor=tensor, context=context, data=data, pipeline=pipeline, virtual_stages=virtual,
        schedule=np.where(virtual > 1, 1, pick(0, 2)), micro_batch=pick(1, 2, 4), recompute=pick(0, 1, 2, 3),
        recompute_share=pick(0.25, 0.5, 1.0), zero_stage=pick(0, 1, 2, 3),
        shards=np.where(draw.random(count) < 0.5, data * context, context), precision=pick(0, 1),
        sequence_parallel=draw.random(count) < 0.7, **experts,
    )  # fmt: skip


@pytest.mark.parametrize("model", ["grok-1", "llama-3.1-70b", "deepseek-v3"])
def test_reasons_add_up_to_the_step_and_components_to_the_memory(setting: MakeSetting, model: str) -> None:
    found = evaluate(setting(model, seq_len=4096), BATCH, candidates(model, 400))
    assert found.reasons.shape == (len(REASONS), 400)
    assert found.memory.shape == (len(MEMORY), 400)
    np.testing.assert_allclose(found.reasons.sum(axis=0), found.step_time_s, rtol=1e-12)
    np.testing.assert_allclose(found.memory.sum(axis=0), found.memory_bytes, rtol=1e-12)
    assert (found.reasons >= -1e-12).all()
    assert (found.memory >= 0).all()
    assert ((found.mfu > 0) & (found.mfu < 1)).all()


@pytest.mark.parametrize("model", ["grok-1", "llama-3.1-70b"])
def test_a_candidate_is_the_same_alone_and_among_others_in_any_order(setting: MakeSetting, model: str) -> None:
    base, many = setting(model, seq_len=4096), candidates(model, 60)
    together = evaluate(base, BATCH, many)
    order = np.random.default_rng(1).permutation(60)
    shuffled = evaluate(base, BATCH, many.take(order))
    np.testing.assert_allclose(shuffled.step_time_s, together.step_time_s[order], rtol=1e-12)
    np.testing.assert_allclose(shuffled.memory, together.memory[:, order], rtol=1e-12)
    for index in range(0, 60, 7):
        alone = evaluate(base, BATCH, many.take(np.array([index])))
        np.testing.assert_allclose(alone.reasons[:, 0], together.reasons[:, index], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(alone.memory[:, 0], together.memory[:, index], rtol=1e-12)


@pytest.mark.parametrize("resource", ["memory_bandwidth_bytes", "scale_up_bandwidth_bytes", "peak_flops", "network"])
def test_more_of_a_resource_never_makes_a_step_longer(setting: MakeSetting, resource: str) -> None:
    base, many = setting("grok-1", seq_len=4096), candidates("grok-1", 400)
    before = evaluate(base, BATCH, many).step_time_s
    device, cluster = base.device, cluster_spec("colossus-100k", 1024)
    for factor in (1.01, 1.1, 2.0, 10.0):
        if resource == "network":
            assert cluster.network is not None
            faster = {"nic_bandwidth_bytes": cluster.network.nic_bandwidth_bytes * factor}
            machines = cluster.model_copy(update={"network": cluster.network.model_copy(update=faster)})
            richer = replace(base, fabric=fabric(machines, base.kernels, base.calibration))
        else:
            old = getattr(device, resource)
            new = {name: rate * factor for name, rate in old.items()} if isinstance(old, dict) else old * factor
            more = device.model_copy(update={resource: new})
            kernels = kernels_for(more)
            richer = replace(base, device=more, kernels=kernels, fabric=fabric(cluster, kernels, base.calibration))
        after = evaluate(richer, BATCH, many).step_time_s
        assert (after <= before * (1 + 1e-9)).all()
        assert (after * factor >= before * (1 - 1e-9)).all(), "a step gains at most what the resource does"


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_doubling_replicas_at_the_same_batch_halves_micro_batches_and_what_they_take(
    data: int, pipeline: int, micro_batch: int
) -> None:
    base = setting_for(
        model_spec("llama-3.1-8b"), 4096, cluster_spec("colossus-100k", 1024), device_spec("h100-sxm"),
        software_spec("megatron-core"),
    )  # fmt: skip
    one, two = (
        evaluate(base, BATCH, layouts(tensor=2, pipeline=pipeline, data=d, micro_batch=micro_batch))
        for d in (data, 2 * data)
    )
    for reason in ("matmul", "attention", "memory", "tensor"):
        assert two.reasons[REASONS.index(reason)] == pytest.approx(one.reasons[REASONS.index(reason)] / 2)
    assert two.reasons[REASONS.index("bubble")] == pytest.approx(one.reasons[REASONS.index("bubble")])


def test_a_step_twice_as_long_in_sequences_takes_twice_as_long_but_for_what_comes_once(setting: MakeSetting) -> None:
    base, many = setting("grok-1", seq_len=4096), candidates("grok-1", 100)
    one, two = evaluate(base, BATCH, many), evaluate(base, 2 * BATCH, many)
    for reason in ("matmul", "attention", "memory", "recompute"):
        row = REASONS.index(reason)
        np.testing.assert_allclose(two.reasons[row], 2 * one.reasons[row], rtol=1e-12)
    optimizer = REASONS.index("optimizer")
    np.testing.assert_allclose(two.reasons[optimizer], one.reasons[optimizer], rtol=1e-12)


def test_batches_may_differ_from_candidate_to_candidate(setting: MakeSetting) -> None:
    base, many = setting("grok-1", seq_len=4096), candidates("grok-1", 20)
    batches = np.where(np.arange(20) % 2 == 0, 512, 1024)
    mixed = evaluate(base, batches, many)
    for batch in (512, 1024):
        same = evaluate(base, batch, many)
        np.testing.assert_allclose(mixed.step_time_s[batches == batch], same.step_time_s[batches == batch], rtol=1e-12)


def test_more_recomputation_costs_time_and_saves_memory(setting: MakeSetting) -> None:
    base = setting("grok-1", seq_len=4096)
    kinds = [layouts(tensor=4, pipeline=8, data=8, recompute=kind) for kind in RECOMPUTE]
    found = evaluate(base, BATCH, joined(kinds))
    assert (np.diff(found.step_time_s) >= 0).all()
    assert (np.diff(found.memory[MEMORY.index("activations")]) <= 0).all()
    half = evaluate(base, BATCH, layouts(tensor=4, pipeline=8, data=8, recompute="full", recompute_share=0.5))
    for row in (found.reasons[REASONS.index("recompute")],):
        assert half.reasons[REASONS.index("recompute"), 0] == pytest.approx((row[0] + row[3]) / 2)


def test_the_fullest_stage_decides_the_memory(setting: MakeSetting) -> None:
    base = setting("llama-3.1-70b", seq_len=4096)
    for pipeline in (1, 2, 4, 8):
        one = layouts(tensor=8, pipeline=pipeline, data=4)
        whole = evaluate(base, BATCH, one).memory_bytes[0]
        stages = memory_by_stage(base, BATCH, one)
        assert len(stages) == min(pipeline, 3)
        assert max(sum(stage.values()) for stage in stages.values()) == pytest.approx(whole)


def test_muons_products_are_five_times_three_for_each_matrix(setting: MakeSetting) -> None:
    """X X^T, its square and the product with X: 4 m^2 n + 2 m^3 FLOPs for m x n matrices, large enough to be at peak."""
    base = replace(setting("llama-3.1-405b"), optimizer="muon")
    dense, _ = layer_seconds(base, "bf16")
    model = base.model
    matrices = [(model.hidden, model.heads * model.head_dim)] * 2 + [
        (model.hidden, model.kv_heads * model.head_dim)
    ] * 2
    matrices += [(model.hidden, model.ffn_hidden)] * 3
    flop = sum(5 * (4 * min(m) ** 2 * max(m) + 2 * min(m) ** 3) for m in matrices)
    reached = flop / dense / base.device.peak_flops["bf16"]
    assert 0.4 < reached < 1.0
    one = layouts(tensor=8, pipeline=9, data=4)
    muon, adamw = evaluate(base, BATCH, one), evaluate(replace(base, optimizer="adamw"), BATCH, one)
    row = REASONS.index("optimizer")
    assert muon.reasons[row, 0] - adamw.reasons[row, 0] == pytest.approx(14 * dense)
