"""What must hold of any scenario, whatever the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelworks.simulate.montecarlo import simulate
from modelworks.simulate.recovery import Checkpoints
from modelworks.simulate.scenario import Scenario, scenario
from modelworks.spec import RunSpec, loads_run

RUN = """
model = "grok-1"
[train]
tokens = "9000T"
seq_len = 8192
global_batch = 2048
[cluster]
preset = "colossus-100k"
gpus = 8192
[simulate]
days = 12
"""


def ettr(*overrides: str, samples: int = 80) -> float:
    return float(simulate(scenario(loads_run(RUN, overrides)), samples, 4).ettr.mean())


def test_more_spares_are_never_worse() -> None:
    ratios = [ettr(f"simulate.spares.hot={hot}") for hot in (0, 1, 2, 4, 8, 16, 64)]
    # The failures are the same, but a job that goes on earlier saves at other moments: a hair is allowed for that.
    assert all(more >= fewer - 5e-4 for fewer, more in itertools.pairwise(ratios))
    assert ratios[-1] > ratios[0] + 0.1


def test_a_pool_behind_the_hot_spares_is_worth_less_than_hot_ones_and_more_than_none() -> None:
    none, pool, hot = ettr("simulate.spares.hot=1"), ettr("simulate.spares.hot=1", "simulate.spares.pool=20"), 0.0
    hot = ettr("simulate.spares.hot=21")
    assert none < pool < hot


@pytest.mark.parametrize("gpus", [1024, 16_384, 100_000])
def test_doubling_all_rates_halves_the_mttf(gpus: int) -> None:
    run = RUN.replace("8192\n[simulate]", f"{gpus}\n[simulate]")
    once, twice = scenario(loads_run(run)), scenario(loads_run(run, ["simulate.rate=2"]))
    assert twice.mttf_s == pytest.approx(once.mttf_s / 2)
    counts = [simulate(s, 40, 1).interruptions.sum(axis=1).mean() for s in (once, twice)]
    assert counts[1] == pytest.approx(2 * counts[0], rel=0.06)


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ("simulate.rate=2", "simulate.rate=1"),
        ("simulate.restart.scheduler=600", "simulate.restart.scheduler=10"),
        ("simulate.restart.manual_fraction=0.1", "simulate.restart.manual_fraction=0"),
        ("simulate.repair.technicians=2", "simulate.repair.technicians=20"),
        ("checkpoint.every=3600", "checkpoint.every=120"),
        ("simulate.state.kind=sync", "simulate.state.kind=async"),
        ("simulate.state.kind=async", "simulate.state.kind=multi-level"),
        ("simulate.causes.gpu.detect=1800", "simulate.causes.gpu.detect=5"),
    ],
)
def test_a_knob_turned_the_wrong_way_costs_time(worse: str, better: str) -> None:
    assert ettr(worse) < ettr(better)


def test_an_elastic_job_does_better_without_spares() -> None:
    few = ["simulate.spares.hot=0", "simulate.elastic.group_gpus=128"]
    assert ettr(*few, "simulate.elastic.enabled=true") > ettr(*few) + 0.2


def test_infant_mortality_brings_failures_early_and_wear_late() -> None:
    def halves(shape: float, rate: float) -> tuple[float, float]:
        from modelworks.simulate.failures import draw

        overrides = [f"simulate.causes.gpu.shape={shape}", f"simulate.causes.gpu.rate={rate}", "simulate.age=0"]
        s = scenario(loads_run(RUN, overrides))
        stream = draw(s, 200, np.random.SeedSequence(1))
        gpu = next(index for index, cause in enumerate(s.causes) if cause.name == "gpu")
        times = stream.time_s[(stream.cause == gpu) & np.isfinite(stream.time_s)]
        return float((times < s.horizon_s / 2).sum()), float((times >= s.horizon_s / 2).sum())

    # Of a Weibull process of shape k a share (1/2)^k falls into the first half of a life that begins at age 0.
    for shape, rate in ((0.5, 10), (2.0, 100)):
        early, late = halves(shape, rate)
        share, error = 0.5**shape, 0.5 / (early + late) ** 0.5
        assert error < 0.02
        assert early / (early + late) == pytest.approx(share, abs=4 * error)


@settings(max_examples=60)
@given(
    every=st.floats(1.0, 4000.0), stall=st.floats(0.0, 60.0), ratio=st.integers(1, 12), durable=st.floats(0.0, 90.0),
    lag=st.floats(0.0, 900.0), running=st.floats(0.0, 1e5), fast=st.booleans(),
)  # fmt: skip
def test_progress_never_promises_what_was_not_done(
    every: float, stall: float, ratio: int, durable: float, lag: float, running: float, fast: bool
) -> None:
    plan = Checkpoints(every, stall, ratio, durable, lag, fast, 0.0, 0.0)
    worked, held, stored = plan.progress(np.array([running, running + 1.0]))
    assert (stored <= held + 1e-6).all()
    assert (held <= worked + 1e-6).all()
    assert worked[0] <= running + 1e-6
    assert worked[1] >= worked[0] - 1e-6


@settings(max_examples=60)
@given(every=st.floats(1.0, 400.0), stall=st.floats(0.0, 60.0), ratio=st.integers(1, 12), work=st.floats(1.0, 1e5))
def test_the_time_for_some_work_is_the_inverse_of_the_work_in_some_time(
    every: float, stall: float, ratio: int, work: float
) -> None:
    plan = Checkpoints(every, stall, ratio, 5.0, 0.0, True, 0.0, 0.0)
    running = plan.running_s(np.array([work]))
    assert plan.progress(running)[0] == pytest.approx(work, rel=1e-6, abs=1e-3)


def test_a_run_that_never_fails_takes_its_full_speed_time(plain_spec: Callable[..., RunSpec]) -> None:
    run = plain_spec("train.tokens=10_000_000_000", hours=1e15, stall=0.0)
    s: Scenario = scenario(run)
    out = simulate(s, 2, 0)
    steps = -(-10_000_000_000 // s.work.tokens_per_step)
    assert out.elapsed_s == pytest.approx(steps * s.work.step_time_s)
