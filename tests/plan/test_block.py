"""A layer's time against arithmetic done by hand on a device of round numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from modelworks.plan.block import COMPONENTS, Setting, block_times
from modelworks.plan.layout import layouts
from modelworks.spec.flops import attention_flop_per_token, forward_flop_per_token

from .ideal import RATE, Ideal

MATMUL, ATTENTION, TENSOR, EXPERT = (COMPONENTS.index(name) for name in ("matmul", "attention", "tensor", "expert"))


@pytest.fixture
def ideal(setting: Callable[..., Setting]) -> Callable[..., Setting]:
    def make(model: str, **changed: Any) -> Setting:
        base = setting(model, seq_len=changed.pop("seq_len", 2048))
        software = base.software.model_copy(
            update={"tensor_overlap_forward": 0.0, "tensor_overlap_backward": 0.0, "expert_host_s": 0.0} | changed
        )
        calibration = base.calibration.model_copy(
            update={"sustained": {}, "sustained_default": {"bf16": 1.0}, "attention_backward": 2.0}
        )
        fabric = replace(base.fabric, kernels=Ideal())
        return replace(base, kernels=Ideal(), fabric=fabric, software=software, calibration=calibration)

    return make


@pytest.mark.parametrize("model", ["gpt3-175b", "llama-3.1-70b", "mixtral-8x7b", "grok-1", "deepseek-v3"])
@pytest.mark.parametrize("tensor", [1, 8])
def test_products_and_attention_are_the_models_flops(ideal: Callable[..., Setting], model: str, tensor: int) -> None:
    given = ideal(model)
    spec = given.model
    shape = layouts(tensor=tensor, expert_tensor=tensor if spec.moe else 1)
    block = block_times(given, shape)
    times = np.zeros(len(COMPONENTS))
    for layer, count in ((block.dense, spec.dense_layers), (block.experts, spec.moe_layers)):
        if layer is not None:
            times += count * layer.forward[:, 0]
    times += block.head_forward[:, 0]
    done = (times[MATMUL] + times[ATTENTION]) * RATE * tensor
    expected = forward_flop_per_token(spec, given.seq_len) * given.seq_len
    # The router works on each rank's own tokens; DeepSeek's down-projections stand on every rank.
    assert done == pytest.approx(expected, rel=0.02 if tensor == 1 or spec.latent_attention is None else 0.25)
    assert times[ATTENTION] * RATE * tensor == pytest.approx(
        spec.layers * attention_flop_per_token(spec, given.seq_len) * given.seq_len
    )


def test_the_backward_pass_has_twice_the_products(ideal: Callable[..., Setting]) -> None:
    layer = block_times(ideal("llama-3.1-8b"), layouts()).dense
    assert layer is not None
    assert layer.backward[MATMUL] == pytest.approx(2 * layer.forward[MATMUL])
    assert layer.weight_gradient == pytest.approx(layer.forward[MATMUL])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_exchanges_move_what_shoeybi_2019_and_korthikanti_2022_state(
    ideal: Callable[..., Setting], sequence_parallel: bool
) -> None:
    given = ideal("gpt3-175b")
    layer = block_times(given, layouts(tensor=8, sequence_parallel=sequence_parallel)).dense
    assert layer is not None
    # Two all-reduces of s b h elements in each direction; split in two, they move the same bytes forward. Backward,
    # sequence parallelism gathers each half's input once more for the weights' gradients.
    moved = 2 * 2 * (7 / 8) * given.seq_len * given.model.hidden * 2.0
    assert layer.forward[TENSOR, 0] * 1e9 == pytest.approx(moved)
    assert layer.backward[TENSOR, 0] * 1e9 == pytest.approx(moved * (1.5 if sequence_parallel else 1.0))


def test_recomputing_everything_costs_one_more_forward_pass(ideal: Callable[..., Setting]) -> None:
    layer = block_times(ideal("llama-3.1-8b", launch_s=0.0), layouts()).dense
    assert layer is not None
    assert layer.recompute[3].sum() == pytest.approx(layer.forward.sum())
    assert layer.recompute[1].sum() == pytest.approx(layer.forward[ATTENTION].sum())
    assert layer.recompute[0].sum() == 0.0
    assert layer.recompute[1].sum() < layer.recompute[2].sum() < layer.recompute[3].sum()


def test_dispatch_sends_each_token_to_its_experts_and_back(ideal: Callable[..., Setting]) -> None:
    given = ideal("mixtral-8x7b")
    layer = block_times(given, layouts(expert=8, data=8)).experts
    assert layer is not None
    sent = given.seq_len * 2 * given.model.hidden * 2.0
    assert layer.forward[EXPERT, 0] == pytest.approx(2 * sent * (7 / 8) / 1e9, rel=1e-6)


def test_a_host_that_launches_slower_than_the_device_computes_decides(ideal: Callable[..., Setting]) -> None:
    given = ideal("llama-3.1-8b", launch_s=1.0, kernels_per_layer=10.0)
    layer = block_times(given, layouts()).dense
    assert layer is not None
    assert layer.forward.sum() == pytest.approx(10.0)
    assert layer.backward.sum() == pytest.approx(20.0)


def test_layers_of_the_catalogs_models_take_positive_times_in_every_shape(setting: Callable[..., Setting]) -> None:
    given = setting("deepseek-v3", seq_len=4096)
    shapes = layouts(tensor=np.array([1, 2, 4, 8, 8]), expert=np.array([1, 8, 32, 8, 64]), expert_tensor=1)
    block = block_times(given, shapes)
    for layer in (block.dense, block.experts):
        assert layer is not None
        assert np.all(layer.forward >= 0)
        assert np.all(layer.forward.sum(axis=0) > 0)
        assert np.all(layer.backward.sum(axis=0) > layer.forward.sum(axis=0))
