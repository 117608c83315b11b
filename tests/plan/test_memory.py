"""A device's memory against the papers that its formulas come from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from modelworks.plan.block import Setting
from modelworks.plan.layout import layouts
from modelworks.plan.memory import activation_bytes, stage_parameters, state_bytes
from modelworks.plan.pipeline import deal_layers
from modelworks.plan.step import evaluate


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "expected"),
    [
        (1, False, lambda h, a, s, t: 34 + 5 * a * s / h),
        (8, False, lambda h, a, s, t: 10 + 24 / t + 5 * a * s / (h * t)),
        (8, True, lambda h, a, s, t: 34 / t + 5 * a * s / (h * t)),
    ],
    ids=["table 2, no parallelism", "table 2, tensor parallel", "table 2, tensor and sequence parallel"],
)
def test_activations_of_a_layer_are_those_of_korthikanti_2022(
    setting: Callable[..., Setting], tensor: int, sequence_parallel: bool, expected: Callable[..., float]
) -> None:
    gpt = setting("gpt3-175b", software="megatron-lm-2021")
    one = layouts(tensor=tensor, sequence_parallel=sequence_parallel)
    whole, _, _ = activation_bytes(gpt, one, "middle", np.array([1]))
    h, a, s = gpt.model.hidden, gpt.model.heads, gpt.seq_len
    assert whole[0] == pytest.approx(s * h * expected(h, a, s, tensor), rel=1e-12)


def test_selective_recomputation_saves_the_scores_and_full_keeps_the_input_alone(
    setting: Callable[..., Setting],
) -> None:
    gpt = setting("gpt3-175b", software="megatron-lm-2021")
    whole, less, _ = activation_bytes(gpt, layouts(sequence_parallel=False), "middle", np.array([1]))
    h, a, s = gpt.model.hidden, gpt.model.heads, gpt.seq_len
    # Korthikanti et al. 2022, table 2: 34 sbh with the attention recomputed, 2 sbh with everything.
    assert whole[0] - less[1][0] == pytest.approx(34 * s * h)
    assert whole[0] - less[3][0] == pytest.approx(2 * s * h)
    assert less[1][0] == pytest.approx(5 * a * s * s)


@pytest.mark.parametrize(
    ("stage", "bytes_each"),
    [(0, 16.0), (1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)],
)
def test_state_per_parameter_is_that_of_rajbhandari_2019(
    setting: Callable[..., Setting], stage: int, bytes_each: float
) -> None:
    # ZeRO, figure 1: mixed precision with Adam, 2 bytes of weights, 2 of gradients, K = 12, on 64 devices.
    base = setting("llama-3.1-8b")
    traits = base.software.model_copy(update={"gradient_bytes": 2})
    zero = Setting(**(vars(base) | {"software": traits}))
    c = layouts(data=64, zero_stage=stage)
    parameters = stage_parameters(zero.model, c, deal_layers(zero.model.layers, c))
    state = state_bytes(zero, c, parameters)[0, :3, 0].sum()
    assert state == pytest.approx(bytes_each * zero.model.parameters.total, rel=1e-9)


def test_parameters_on_all_devices_add_up_to_the_models(setting: Callable[..., Setting]) -> None:
    grok = setting("grok-1", seq_len=8192)
    c = layouts(tensor=4, pipeline=8, expert=8, expert_tensor=1, data=16, virtual_stages=4)
    first, middle, last = stage_parameters(grok.model, c, deal_layers(grok.model.layers, c))
    plain = (first.plain + 6 * middle.plain + last.plain)[0] * 4
    experts = (first.experts + 6 * middle.experts + last.experts)[0] * 8
    count = grok.model.parameters
    # What tensor parallelism copies to each rank: norms and routers; the tied table stands in both end stages.
    copied = 3 * (count.norms - grok.model.hidden + count.router) + count.embedding - grok.model.hidden
    assert experts == count.experts
    assert plain == pytest.approx(count.total - count.experts + copied, rel=1e-3)


def test_more_of_any_sharding_never_takes_more_memory(setting: Callable[..., Setting]) -> None:
    llama = setting("llama-3.1-70b", seq_len=8192)
    for field, values in (("zero_stage", [0, 1, 2, 3]), ("recompute", [0, 1, 3]), ("tensor", [1, 2, 4, 8])):
        c = layouts(data=16, **{field: np.array(values)})
        used = evaluate(llama, 16, c).memory_bytes
        assert np.all(np.diff(used) <= 1e-6 * used[:-1]), field
