"""A machine that grows trains on what is there, and machines are compared by the calendar."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest

from modelworks.simulate.buildout import DAY_S, Candidate, capacity, overtakes
from modelworks.simulate.comparison import alternative, compare
from modelworks.simulate.montecarlo import simulate
from modelworks.simulate.scenario import scenario
from modelworks.spec import load_run, loads_run
from modelworks.spec.simulation import BatchSpec, PowerPhaseSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "simulate" / "h100-now-or-b200-later.toml"


def test_nodes_run_when_they_have_arrived_and_have_power() -> None:
    batches = [BatchSpec(day=0, gpus=80), BatchSpec(day=10, gpus=80)]
    phases = [
        PowerPhaseSpec(day=0, megawatts=0.05),
        PowerPhaseSpec(day=5, megawatts=0.12),
        PowerPhaseSpec(day=20, megawatts=1),
    ]
    steps = capacity(20, 8, batches, phases, node_w=10_000.0)
    assert steps.times_s.tolist() == [0.0, 5 * DAY_S, 10 * DAY_S, 20 * DAY_S]
    assert steps.nodes.tolist() == [5, 10, 12, 20]
    assert steps.at(np.array([0.0, 5 * DAY_S - 1, 5 * DAY_S, 30 * DAY_S])).tolist() == [5, 5, 10, 20]


def test_node_seconds_are_the_area_under_the_nodes() -> None:
    steps = capacity(20, 8, [BatchSpec(day=0, gpus=80), BatchSpec(day=10, gpus=80)], [], 1.0)
    days = np.array([0.0, 5.0, 10.0, 12.0])
    assert steps.node_seconds(days * DAY_S) / DAY_S == pytest.approx([0.0, 50.0, 100.0, 140.0])


def test_a_growing_machine_does_the_work_of_its_nodes() -> None:
    text = 'model = "grok-1"\n[train]\ntokens = "9000T"\nseq_len = 8192\nglobal_batch = 2048\n'
    text += '[cluster]\npreset = "colossus-100k"\ngpus = 8192\n[simulate]\ndays = 20\nrate = 1e-6\n'
    text += "batches = [{day = 0, gpus = 2048}, {day = 10, gpus = 6144}]\n[simulate.restart]\nspread = 0\n"
    out = simulate(scenario(loads_run(text)), 5, 0)
    # Half of the time a quarter of the nodes, then all: five eighths, less one restart and the checkpoints.
    assert out.useful_s / out.elapsed_s == pytest.approx(5 / 8, abs=1e-3)
    assert out.ettr == pytest.approx(1.0, abs=1e-3)
    assert (out.planned == 1).all()


def candidate(name: str, start: datetime.date, tokens_per_s: float) -> Candidate:
    steps = capacity(10, 8, [], [], 1.0)
    return Candidate(name, start, steps, tokens_per_s, tokens_per_s * 1e12, 1e6, 365 * 100.0, 1e6)


def test_a_later_and_faster_machine_overtakes_when_its_head_start_is_made_up() -> None:
    early = candidate("early", datetime.date(2024, 1, 1), 1.0)
    late = candidate("late", datetime.date(2024, 4, 10), 3.0)  # 100 days later
    # t = 3 (t - 100): even on day 150, ahead on day 151.
    assert overtakes(late, early) == datetime.date(2024, 1, 1) + datetime.timedelta(days=151)
    assert overtakes(early, late) is None


def test_finish_and_cost_follow_from_the_rate() -> None:
    machine = candidate("one", datetime.date(2024, 1, 1), 2.0)
    end = machine.finish(2.0 * 10 * DAY_S)
    assert end.isoformat() == "2024-01-11T00:00:00"
    assert machine.usd_until(end) == pytest.approx(1000.0)
    assert machine.joules_per_token() == pytest.approx(5e5)
    assert machine.tokens([datetime.date(2023, 1, 1), datetime.date(2024, 1, 2)]) == pytest.approx([0.0, 2.0 * DAY_S])


@pytest.mark.slow
def test_the_example_compares_four_machines_for_the_same_tokens() -> None:
    run = load_run(EXAMPLE, ["simulate.samples=10"])
    found = compare(run)
    names = [each.name for each in found.candidates]
    assert names[0] == "H100 from July 2024"
    assert len(names) == 4
    h100, h200, b200 = found.candidates[:3]
    # The H200 computes as the H100 does; the B200 has 2,250 TFLOP/s against 989.
    assert h200.tokens_per_s == pytest.approx(h100.tokens_per_s, rel=0.03)
    assert b200.tokens_per_s / h100.tokens_per_s == pytest.approx(2250 / 989.4, rel=0.1)
    assert found.first.finish(found.tokens) == min(each.finish(found.tokens) for each in found.candidates)
    for who, whom, on in found.overtakings:
        one = next(each for each in found.candidates if each.name == who)
        other = next(each for each in found.candidates if each.name == whom)
        before = on - datetime.timedelta(days=2)
        assert one.tokens([on])[0] > other.tokens([on])[0]
        assert one.tokens([before])[0] <= other.tokens([before])[0]


def test_an_alternative_keeps_the_run_and_changes_the_machine() -> None:
    run = load_run(EXAMPLE)
    other = alternative(run, run.simulate.alternatives[2])
    assert (other.cluster.device, other.cluster.gpus_per_node) == ("gb200-nvl72", 4)
    assert other.cluster.network is not None
    assert other.cluster.network.nics_per_node == 4
    assert other.train.tokens == run.train.tokens
