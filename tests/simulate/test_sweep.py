"""Knobs are read as they are written, and turned one at a time or together."""

from __future__ import annotations

import itertools

import pytest

from modelworks.simulate.scenario import scenario
from modelworks.simulate.sweep import knob, sweep, tornado
from modelworks.spec import InputError, RunSpec, loads_run

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
days = 6
"""


def build(overrides: list[str]) -> RunSpec:
    return loads_run(RUN, overrides)


def test_a_range_of_times_goes_in_equal_ratios() -> None:
    values = knob("checkpoint.every=1min..60min").values
    assert (len(values), values[0], values[-1]) == (9, 60.0, 3600.0)
    ratios = [after / before for before, after in itertools.pairwise(values)]
    assert ratios == pytest.approx([60 ** (1 / 8)] * 8, rel=1e-4)


def test_a_range_of_numbers_goes_in_equal_steps_and_whole_numbers_stay_whole() -> None:
    assert knob("simulate.spares.hot=0..64:5").values == (0, 16, 32, 48, 64)
    assert all(isinstance(value, int) for value in knob("simulate.spares.hot=1..3").values)
    assert knob("simulate.rate=0.5..1.5:3").values == (0.5, 1.0, 1.5)


def test_a_list_takes_words_and_quantities() -> None:
    assert knob("simulate.state.kind=sync,async,multi-level").values == ("sync", "async", "multi-level")
    assert knob("checkpoint.every=30s,5min").values == (30, 300)


@pytest.mark.parametrize("text", ["checkpoint.every", "=1..2", "a=5..1", "a=1..2:1", "a=1..2:x", "a=x..y", "a=?"])
def test_what_is_not_a_knob_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--sweep .* is not accepted"):
        knob(text)


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"simulate\.spares\.hots: unknown field; did you mean 'simulate\.spares\.hot'"
    ):
        sweep(build, [knob("simulate.spares.hots=1,2")], 5)


def test_two_knobs_give_every_combination() -> None:
    points = sweep(build, [knob("checkpoint.every=2min,40min"), knob("simulate.rate=1,3")], 30)
    assert [tuple(point.values.values()) for point in points] == [(120, 1), (120, 3), (2400, 1), (2400, 3)]
    ratios = [point.answer.outcome.ettr.mean() for point in points]
    assert ratios[0] > ratios[1]
    assert ratios[0] > ratios[2] > ratios[3]


def test_a_tornado_ranks_the_knobs_by_what_they_do() -> None:
    middle, bars = tornado(scenario(build(["checkpoint.every=1h", "simulate.spares.hot=60"])), 30, 0)
    widths = [bar.width(middle) for bar in bars]
    assert widths == sorted(widths, reverse=True)
    # An hour of work between checkpoints: failures and the interval matter most.
    assert {bars[0].name, bars[1].name} == {"failure rates", "checkpoint interval"}
    failures = next(bar for bar in bars if bar.name == "failure rates")
    assert failures.half > middle > failures.double
