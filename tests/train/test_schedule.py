"""The learning rate's schedules against their analytic values."""

import math

import pytest

from modelworks.spec.run import TrainSpec
from modelworks.train.schedule import factor, progress


def _spec(**fields: object) -> TrainSpec:
    # 100 steps of one sequence of ten tokens.
    return TrainSpec.model_validate({"tokens": 1000, "seq_len": 10, "global_batch": 1, **fields})


def test_warmup_is_linear_and_reaches_the_peak_at_its_end() -> None:
    spec = _spec(warmup_fraction=0.1)
    factors = [factor(spec, progress(spec, step, 0.0)) for step in range(1, 11)]
    assert factors == pytest.approx([step / 10 for step in range(1, 11)])


def test_wsd_is_flat_and_then_falls_linearly_to_its_final_fraction() -> None:
    spec = _spec(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2, final_fraction=0.1)
    assert {factor(spec, step / 100) for step in range(10, 81)} == {1.0}
    assert factor(spec, 0.9) == pytest.approx((1.0 + 0.1) / 2)
    assert factor(spec, 1.0) == pytest.approx(0.1)


def test_cosine_is_half_way_down_in_the_middle_and_at_its_final_fraction_at_the_end() -> None:
    spec = _spec(schedule="cosine", warmup_fraction=0.0, final_fraction=0.1)
    assert factor(spec, 0.0) == pytest.approx(1.0)
    assert factor(spec, 0.5) == pytest.approx(0.55)
    assert factor(spec, 0.25) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert factor(spec, 1.0) == pytest.approx(0.1)


def test_constant_stays_at_the_peak_after_warmup() -> None:
    spec = _spec(schedule="constant", warmup_fraction=0.02)
    assert factor(spec, 0.01) == pytest.approx(0.5)
    assert {factor(spec, step / 100) for step in range(2, 101)} == {1.0}


def test_no_warmup_and_no_decay_divide_by_nothing() -> None:
    spec = _spec(schedule="wsd", warmup_fraction=0.0, decay_fraction=0.0)
    assert [factor(spec, done) for done in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_with_a_time_budget_progress_is_the_time_spent_unless_the_steps_are_further() -> None:
    spec = _spec(max_time="10s")
    assert progress(spec, 5, 5.0) == 0.5
    assert progress(spec, 90, 5.0) == 0.9
    assert progress(spec, 5, 11.0) == 1.0
