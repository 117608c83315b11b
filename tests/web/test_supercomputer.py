"""What the page of the supercomputer picks, plays and tells."""

from __future__ import annotations

import pytest

from modelworks.simulate.events import Happening, replay
from modelworks.simulate.montecarlo import first_stream
from modelworks.simulate.outcome import REASONS
from modelworks.simulate.scenario import scenario
from modelworks.spec.errors import InputError

supercomputer = pytest.importorskip("modelworks.web.supercomputer")


@pytest.mark.parametrize(("gpus", "model"), [(8, "llama-3.1-8b"), (2048, "grok-1"), (100_000, "grok-1")])
def test_a_choice_is_a_run_that_can_be_simulated(gpus: int, model: str) -> None:
    resolved = scenario(supercomputer.Choice(gpus=gpus, model=model, spares=1, days=2).run())
    assert (resolved.run.cluster.gpus, resolved.hot) == (gpus, 1)
    assert resolved.checkpoints.fast


def test_an_empty_field_and_a_wrong_one_are_said_in_a_sentence() -> None:
    with pytest.raises(InputError, match="days is empty: a number is accepted"):
        supercomputer.Choice(days=None).run()
    with pytest.raises(InputError, match=r"simulate\.rate = 0\.0 is not accepted"):
        supercomputer.Choice(rate=0).run()


def test_the_player_knows_when_the_replica_ran() -> None:
    resolved = scenario(supercomputer.Choice(gpus=8192, days=5, spares=20).run())
    history = replay(resolved, first_stream(resolved, 10, 0))
    running = sum(end - begin for begin, end in supercomputer._running(history))
    out = history.outcome
    down = sum(
        float(out.reasons_s[0, REASONS.index(name)]) for name in ("detection", "waiting", "restart", "maintenance")
    )
    assert running == pytest.approx(float(out.elapsed_s[0]) - down, rel=1e-6)


def test_a_failure_is_told_in_words() -> None:
    told = supercomputer._told
    assert told(None) == "nothing has failed yet"
    one = Happening(86400.0, "failure", "power_feed", "feed", tuple(range(128, 256)), lost_work_s=90, down_s=600)
    assert told(one) == "day 1.00: power feed on 128 nodes from 128, 1 min 30 s of work lost, down for 10 min"
    assert told(Happening(43200.0, "pause", "maintenance")) == "day 0.50: maintenance"
