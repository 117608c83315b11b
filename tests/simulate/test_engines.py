"""Two engines, one truth: the same failures lead to the same books, and chance to the same distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest

from modelworks.simulate.events import replay
from modelworks.simulate.failures import draw
from modelworks.simulate.montecarlo import follow, simulate
from modelworks.simulate.outcome import REASONS, Outcome, together
from modelworks.simulate.scenario import Scenario, scenario
from modelworks.spec import loads_run

LLAMA = """
model = "llama-3.1-405b"
[train]
tokens = "{tokens}"
seq_len = 8192
global_batch = 2048
[cluster]
preset = "colossus-100k"
gpus = 16_384
[simulate]
days = {days}
"""
VARIANTS = {
    "plain": "",
    "sync": '[simulate.state]\nkind = "sync"\nstall = "20s"\n',
    "maintenance": '[simulate.maintenance]\nevery = "27h"\n',
    "multi-level": '[simulate.state]\nkind = "multi-level"\nstall = "1s"\n[simulate.health_checks]\nevery = "1h"\n',
    "peer": '[simulate.state]\nkind = "peer"\nstorage_every = 12\nstall = "2s"\n',
    "few spares": "[simulate.spares]\nhot = 2\npool = 3\n",
    "lemons": "[simulate.repair]\nlemon_fraction = 0.5\ntechnicians = 6\n",
    "build-out": "[[simulate.batches]]\nday = 0\ngpus = 4096\n[[simulate.batches]]\nday = 3\ngpus = 12_288\n"
    "[simulate.causes.gpu]\nshape = 0.6\n",
}


def of(variant: str, tokens: str = "9000T", days: float = 8.0) -> Scenario:
    return scenario(loads_run(LLAMA.format(tokens=tokens, days=days) + VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_engines_book_the_same_failures_alike(variant: str) -> None:
    s = of(variant)
    stream = draw(s, 4, np.random.SeedSequence(7))
    answers = follow(s, stream)
    told = together([replay(s, stream, replica).outcome for replica in range(4)])
    assert answers.ettr == pytest.approx(told.ettr, abs=1e-9)
    assert (answers.interruptions == told.interruptions).all()
    assert (answers.drains == told.drains).all()
    assert (answers.planned == told.planned).all()
    assert answers.reasons_s == pytest.approx(told.reasons_s, abs=1.0)
    assert answers.causes_s == pytest.approx(told.causes_s, abs=1.0)
    assert answers.interruptions.sum() > 100


def test_both_engines_finish_the_tokens_at_the_same_second() -> None:
    s = of("maintenance", tokens="1T", days=10.0)
    stream = draw(s, 4, np.random.SeedSequence(7))
    answers, told = follow(s, stream), [replay(s, stream, replica).outcome for replica in range(4)]
    assert answers.finished.all()
    assert answers.elapsed_s == pytest.approx([float(each.elapsed_s[0]) for each in told], abs=1e-3)
    assert answers.useful_s == pytest.approx(np.full(4, s.target_s))


def test_an_elastic_job_shrinks_and_grows_alike_in_both_engines() -> None:
    text = LLAMA.format(tokens="9000T", days=15)
    text += "[simulate.spares]\nhot = 1\n[simulate.elastic]\nenabled = true\ngroup_gpus = 128\n"
    s = scenario(loads_run(text))
    stream = draw(s, 4, np.random.SeedSequence(7))
    answers = follow(s, stream)
    told = together([replay(s, stream, replica).outcome for replica in range(4)])
    assert answers.ettr == pytest.approx(told.ettr, abs=1e-3)
    assert answers.reasons_s[:, REASONS.index("fewer nodes")].min() > 0


def test_the_engines_agree_within_their_confidence_intervals_on_independent_failures() -> None:
    s = of("plain", days=5.0)
    answers = simulate(s, 400, 11)
    stream = draw(s, 60, np.random.SeedSequence(99))
    told = together([replay(s, stream, replica).outcome for replica in range(60)])
    for one, other in (
        (answers.ettr, told.ettr),
        (answers.interruptions.sum(axis=1), told.interruptions.sum(axis=1)),
    ):
        error = math.sqrt(one.var() / len(one) + other.var() / len(other))
        assert abs(one.mean() - other.mean()) < 4 * error


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_second_is_booked_once(variant: str) -> None:
    out = simulate(of(variant), 50, 3)
    assert out.useful_s + out.reasons_s.sum(axis=1) == pytest.approx(out.elapsed_s, abs=1e-3)
    failures = [
        reason for reason in REASONS if reason in {"lost work", "detection", "waiting", "restart", "stragglers"}
    ]
    booked = out.reasons_s[:, [REASONS.index(reason) for reason in failures]].sum(axis=1)
    assert out.causes_s.sum(axis=1) == pytest.approx(booked, abs=1e-3)


def test_the_same_seed_gives_the_same_result_and_another_another() -> None:
    s = of("few spares", days=4.0)
    one, same, other = simulate(s, 64, 5), simulate(s, 64, 5), simulate(s, 64, 6)
    for field in fields(Outcome):
        assert np.array_equal(getattr(one, field.name), getattr(same, field.name))
    assert not np.array_equal(one.ettr, other.ettr)


def test_batches_of_replicas_are_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    s = of("plain", days=4.0)
    monkeypatch.setattr("modelworks.simulate.montecarlo.FAILURES_AT_ONCE", 200)
    out = simulate(s, 40, 5)
    assert out.ettr.shape == (40,)
    assert len(np.unique(out.ettr)) == 40


def test_without_failures_the_ettr_is_one_less_the_checkpoints(plain: Callable[..., Scenario]) -> None:
    s = plain(hours=1e15, every=580.0, stall=20.0, days=10.0)
    out = simulate(replace(s, causes=()), 3, 0)
    assert out.ettr == pytest.approx(1.0 - 20.0 / 600.0, abs=1e-4)
    assert out.interruptions.sum() == 0


def test_the_repair_shops_queue_is_that_of_erlang(plain: Callable[..., Scenario]) -> None:
    """Nodes out of service are those under repair and those in the queue, which Erlang's formula knows."""
    from modelworks.simulate.closed_form import repair_wait_s

    s = plain(
        "simulate.repair.technicians=4", "simulate.spares.hot=90", hours=400.0, scope="node", repair=1.0, days=300.0
    )
    arrivals, repair = 1 / s.mttf_s, 10 * 3600.0
    out = simulate(s, 60, 2)
    # A loss finds as many out as there are on average (Poisson arrivals see time averages) and adds itself; Little's
    # law gives that average.
    counts = out.nodes_out
    seen = (np.arange(len(counts)) * counts).sum() / counts.sum() - 1
    expected = arrivals * (repair + repair_wait_s(4, arrivals, repair))
    assert seen == pytest.approx(expected, rel=0.05)
