"""What answers while a slider moves is feasible, keeps what is stated, and never claims more than the full search."""

from __future__ import annotations

import numpy as np
import pytest

from modelworks.plan.layout import fits_model, layouts
from modelworks.plan.live import Quick, quick, sizes
from modelworks.plan.planner import plan
from modelworks.plan.step import evaluate
from modelworks.spec.files import run_from
from modelworks.spec.run import RunSpec


def run_of(model: str = "llama-3.1-8b", gpus: int = 64, batch: int = 256, **parallel: object) -> RunSpec:
    values = {
        "model": model,
        "train": {"tokens": 10**12, "seq_len": 4096, "global_batch": batch},
        "cluster": {"preset": "h100-superpod", "gpus": gpus},
        "parallel": parallel,
    }
    return run_from(values)


CASES = [
    run_of(),
    run_of("grok-1", 512, 512),
    run_of("deepseek-v3", 1024, 2048),
    run_of("llama-3.1-405b", 1024, 512, tensor=8),
    run_of("grok-1", 512, 512, expert_tensor=2, zero_stage=3, recompute="full"),
]


@pytest.fixture(scope="module", params=range(len(CASES)), ids=lambda case: CASES[case].model.name)
def found(request: pytest.FixtureRequest) -> Quick:
    return quick(CASES[request.param])


def test_every_layout_found_divides_fits_and_is_evaluated_as_the_step_is(found: Quick) -> None:
    model, train, every = found.run.model, found.run.train, found.distinct.layouts
    assert len(every)
    assert fits_model(model, train.seq_len, train.global_batch, every).all()
    again = evaluate(found.setting, train.global_batch, every)
    np.testing.assert_allclose(again.step_time_s, found.distinct.step_time_s)
    assert (again.memory_bytes <= found.device.memory_bytes).all()
    assert (np.diff(found.distinct.step_time_s) >= 0).all()
    assert (every.devices <= found.run.cluster.gpus).all()


def test_what_the_spec_states_is_kept(found: Quick) -> None:
    best = found.best
    assert best is not None
    for name, value in found.run.parallel.model_dump().items():
        if value != "auto" and name in best.layout:
            assert best.layout[name] == value


def test_other_sizes_are_layouts_that_fit_and_the_front_is_what_none_beats(found: Quick) -> None:
    front, beaten = sizes(found)
    points = [*front, *beaten]
    assert len({point.devices for point in points}) == len(points)
    for point in points:
        layout = layouts(**point.candidate.layout)
        assert layout.devices[0] == point.devices
        again = evaluate(found.setting, found.run.train.global_batch, layout)
        assert again.fits[0]
        assert again.step_time_s[0] == pytest.approx(point.candidate.step_time_s)

    def beats(one, other) -> bool:
        pairs = [(one.devices, other.devices), (one.days, other.days), (one.usd, other.usd)]
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    assert all(not any(beats(one, point) for one in points) for point in front)
    assert all(any(beats(one, point) for one in points) for point in beaten)


def test_the_size_that_is_asked_for_is_as_fast_as_the_answer(found: Quick) -> None:
    best = found.best
    assert best is not None
    used = int(found.distinct.layouts.devices[0])
    front, beaten = sizes(found)
    same = next(point for point in [*front, *beaten] if point.devices == used)
    assert same.candidate.step_time_s == pytest.approx(best.step_time_s)


def test_a_model_too_large_for_the_devices_has_no_best_but_a_leanest_layout() -> None:
    found = quick(run_of("llama-3.1-405b", 8, 64))
    assert found.best is None
    assert found.leanest is not None
    assert found.leanest.memory_bytes > found.device.memory_bytes
    assert sizes(found) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("run", CASES[:1] + CASES[3:4], ids=lambda run: run.model.name)
def test_the_full_search_is_at_least_as_good_and_not_much_better(run: RunSpec) -> None:
    best, full = quick(run).best, plan(run)
    assert best is not None
    assert full.step_time_s <= best.step_time_s * (1 + 1e-9)
    assert best.step_time_s <= 1.15 * full.step_time_s
