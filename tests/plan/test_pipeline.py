"""Pipelines against the papers' bubbles and by simulation of the schedule."""

from __future__ import annotations

import numpy as np
import pytest

from modelworks.plan.layout import layouts
from modelworks.plan.pipeline import bubble, deal_layers, in_flight


def simulated_1f1b(stages: list[float], micro_batches: int) -> float:
    """Time of a 1F1B step by playing it: forward takes a third of a stage's time, backward the rest."""
    p = len(stages)
    forward_done, backward_done = {}, {}
    free = [0.0] * p
    queues = []
    for stage in range(p):
        warm = min(p - stage, micro_batches)
        order = [("f", i) for i in range(warm)]
        for i in range(micro_batches - warm):
            order += [("b", i), ("f", i + warm)]
        order += [("b", i) for i in range(micro_batches - warm, micro_batches)]
        queues.append(order)
    while any(queues):
        moved = False
        for stage in range(p):
            if not queues[stage]:
                continue
            kind, i = queues[stage][0]
            needs = forward_done.get((stage - 1, i)) if kind == "f" and stage else 0.0
            if kind == "b":
                needs = backward_done.get((stage + 1, i)) if stage < p - 1 else forward_done.get((stage, i))
            if needs is None:
                continue
            share = stages[stage] / 3 * (1 if kind == "f" else 2)
            free[stage] = max(free[stage], needs) + share
            (forward_done if kind == "f" else backward_done)[stage, i] = free[stage]
            queues[stage].pop(0)
            moved = True
        assert moved, "the schedule is stuck"
    return max(free)


@pytest.mark.parametrize("micro_batches", [4, 8, 33])
def test_a_1f1b_step_lasts_as_long_as_playing_it(micro_batches: int) -> None:
    stage = 3.0
    c = layouts(pipeline=4)
    each = np.array([stage])
    step = micro_batches * stage + bubble(c, each, each, each, np.zeros(1))[0]
    assert step == pytest.approx(simulated_1f1b([stage] * 4, micro_batches))


def test_a_slow_last_stage_costs_what_playing_it_costs() -> None:
    c = layouts(pipeline=4)
    idle = bubble(c, np.array([3.0]), np.array([3.0]), np.array([4.5]), np.zeros(1))[0]
    assert 32 * 4.5 + idle == pytest.approx(simulated_1f1b([3.0, 3.0, 3.0, 4.5], 32), rel=1e-9)


@pytest.mark.parametrize(("virtual", "schedule", "share"), [(1, 0, 7 / 32), (4, 1, 7 / 128)])
def test_the_bubble_of_equal_stages_is_narayanan_2021s(virtual: int, schedule: int, share: float) -> None:
    # Section 2.2: (p - 1) / m, and (p - 1) / (v m) with v interleaved stages; p = 8, m = 32.
    c = layouts(pipeline=8, virtual_stages=virtual, schedule=schedule)
    each = np.array([1.0])
    assert bubble(c, each, each, each, np.zeros(1))[0] / 32 == pytest.approx(share)


def test_zero_bubble_h1_leaves_a_third_where_forward_backward_and_weights_take_the_same() -> None:
    # Qi et al. 2023, table 1: (p - 1)(F + B - W) instead of (p - 1)(F + B + W).
    c = layouts(pipeline=8, schedule=np.array([0, 2]))
    each = np.full(2, 3.0)
    plain, zero = bubble(c, each, each, each, np.full(2, 1.0))
    assert zero == pytest.approx(plain / 3)


@pytest.mark.parametrize("layers", [32, 61, 126, 7])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (4, 1), (2, 3), (7, 1)])
def test_stages_have_all_layers_and_the_middle_ones_most(layers: int, pipeline: int, virtual: int) -> None:
    if pipeline * virtual > layers:
        pytest.skip("more chunks than layers")
    stages = deal_layers(layers, layouts(pipeline=pipeline, virtual_stages=virtual))
    first, middle, last = stages.first[0], stages.middle[0], stages.last[0]
    dealt = layers if pipeline == 1 else first + (pipeline - 2) * middle + last
    assert dealt >= layers
    assert dealt - layers < pipeline
    assert max(first, last) <= middle


def test_interleaving_holds_more_activations_as_korthikanti_2022_states() -> None:
    # Section 4.2.3: 1 + (p - 1) / (p m) of 1F1B's L layers' worth, with m interleaved stages.
    c = layouts(pipeline=8, virtual_stages=np.array([1, 3]))
    held = in_flight(c, np.array([64, 64]))
    assert held[0] == 8
    assert held[1] == pytest.approx(8 * (1 + 7 / 24))
