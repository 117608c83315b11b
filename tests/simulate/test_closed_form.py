"""The closed forms agree with their papers, and the simulation with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from modelworks.simulate.answers import best_interval_s
from modelworks.simulate.closed_form import (
    best_interval_s as best_by_formula,
)
from modelworks.simulate.closed_form import (
    daly_s,
    effective_time_ratio,
    erlang_c,
    repair_wait_s,
    young_s,
)
from modelworks.simulate.montecarlo import simulate
from modelworks.simulate.scenario import Scenario


def test_youngs_interval_is_the_square_root_of_twice_cost_times_mttf() -> None:
    assert young_s(2.0, 10_000.0) == 200.0


@pytest.mark.parametrize(("cost", "mttf"), [(5.0, 3600.0), (60.0, 86400.0), (300.0, 6 * 3600.0)])
def test_dalys_interval_is_near_the_true_optimum_and_nearer_than_youngs(cost: float, mttf: float) -> None:
    best = best_by_formula(cost, 600.0, mttf)
    assert daly_s(cost, mttf) == pytest.approx(best, rel=0.01)
    assert abs(daly_s(cost, mttf) - best) < abs(young_s(cost, mttf) - best)


def test_the_best_interval_solves_dalys_transcendental_equation() -> None:
    # d/dt of t / (exp((t + C) / M) - 1) = 0: exp((t + C) / M) (1 - t / M) = 1.
    best = best_by_formula(30.0, 600.0, 7200.0)
    assert math.exp((best + 30.0) / 7200.0) * (1 - best / 7200.0) == pytest.approx(1.0, abs=1e-6)


def test_without_failures_the_ratio_is_one_less_the_checkpoints() -> None:
    assert effective_time_ratio(600.0, 20.0, 300.0, math.inf) == 600.0 / 620.0
    assert effective_time_ratio(600.0, 20.0, 300.0, 1e12) == pytest.approx(600.0 / 620.0, rel=1e-6)


@pytest.mark.parametrize(
    ("servers", "load", "waits"),
    # Tables of Erlang C, and M/M/1, where the probability to wait is the load.
    [(1, 0.5, 0.5), (2, 1.0, 1 / 3), (5, 4.0, 0.5541), (10, 8.0, 0.4092)],
)
def test_erlangs_c_is_that_of_its_tables(servers: int, load: float, waits: float) -> None:
    assert erlang_c(servers, load) == pytest.approx(waits, abs=1e-4)


def test_an_overloaded_repair_shop_never_catches_up() -> None:
    assert erlang_c(3, 3.0) == 1.0
    assert repair_wait_s(3, 1.0, 3.0) == math.inf


def test_a_queue_of_one_technician_waits_as_an_m_m_1_queue() -> None:
    # W_q = rho / (mu - lambda).
    assert repair_wait_s(1, 0.5 / 3600, 3600.0) == pytest.approx(0.5 / (1 / 3600 - 0.5 / 3600))


@pytest.mark.parametrize(
    ("hours", "every", "restart"), [(100.0, 600.0, 300.0), (20.0, 300.0, 600.0), (400.0, 3600.0, 60.0)]
)
def test_the_simulated_ettr_is_dalys_within_its_confidence_interval(
    plain: Callable[..., Scenario], hours: float, every: float, restart: float
) -> None:
    s = plain(hours=hours, every=every, restart=restart, days=min(0.4 * hours, 60.0))
    assert s.mttf_s == pytest.approx(hours * 36.0)
    ratios = simulate(s, 400, 1).ettr
    expected = effective_time_ratio(every, 20.0, restart, hours * 36.0)
    error = ratios.std() / math.sqrt(len(ratios))
    # The last, unfinished stretch of work counts as done, on average half an interval.
    cut = 0.5 * every / s.horizon_s
    assert ratios.mean() == pytest.approx(expected, abs=4 * error + cut)


def test_times_between_failures_are_exponential_with_the_stated_mean(plain: Callable[..., Scenario]) -> None:
    from modelworks.simulate.failures import draw

    s = plain(hours=100.0, days=30.0)
    times = draw(s, 200, np.random.SeedSequence(3)).time_s
    gaps = np.diff(np.where(np.isfinite(times), times, np.nan), axis=0, prepend=0.0)
    gaps = gaps[~np.isnan(gaps)]
    assert gaps.mean() == pytest.approx(3600.0, rel=0.01)
    # Of an exponential the deviation is the mean, and a share 1/e is longer than it.
    assert gaps.std() == pytest.approx(3600.0, rel=0.02)
    assert (gaps > 3600.0).mean() == pytest.approx(math.exp(-1), abs=0.005)


def test_the_best_interval_by_simulation_is_dalys(plain: Callable[..., Scenario]) -> None:
    s = plain(hours=200.0, stall=30.0, days=100.0)
    found = best_interval_s(s, 0)
    assert found == pytest.approx(daly_s(30.0, s.mttf_s), rel=0.25)
    exact = best_by_formula(30.0, 300.0, s.mttf_s)
    # The optimum is flat: what counts is that nothing is lost by taking the interval that was found.
    ratio = effective_time_ratio(found or 0.0, 30.0, 300.0, s.mttf_s)
    assert ratio == pytest.approx(effective_time_ratio(exact, 30.0, 300.0, s.mttf_s), abs=5e-4)
