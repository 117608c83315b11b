"""The page stands alone, and the trace and the timeline tell what the replica met."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from modelworks.simulate.answers import answer
from modelworks.simulate.drawing import hall, waterfall
from modelworks.simulate.events import replay
from modelworks.simulate.montecarlo import first_stream, simulate
from modelworks.simulate.page import page, spans, struck_racks
from modelworks.simulate.scenario import Scenario, scenario
from modelworks.simulate.sweep import tornado
from modelworks.simulate.top500 import beside
from modelworks.simulate.trace import lines, write
from modelworks.simulate.trace import stream as read_stream
from modelworks.spec import InputError, loads_run

RUN = """
name = "a <b> & c"
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
[simulate.maintenance]
every = "1d"
"""


@pytest.fixture(scope="module")
def resolved() -> Scenario:
    return scenario(loads_run(RUN.replace("a <b> & c", "page")))


class Whole(HTMLParser):
    """Counts elements and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(resolved: Scenario) -> None:
    found = answer(resolved.run, samples=20, search=False)
    history = replay(resolved, first_stream(resolved, 20, 0))
    text = page(found, history, beside(resolved.machine, 1e12), tornado(resolved, 5, 0))
    reader = Whole()
    reader.feed(text)
    assert reader.open == []
    assert reader.links == []
    assert "script" not in reader.seen
    assert not re.search(r"url\(|@import", text)
    assert reader.seen.count("svg") >= 7
    assert f"{found.outcome.ettr.mean():.1%}" in text
    # A mark on the timeline for every failure, and a rack in the picture for every rack.
    failures = [h for h in history.happenings if h.what in {"failure", "drain"}]
    assert len(failures) == history.outcome.interruptions.sum() + history.outcome.drains.sum()
    assert text.count("data-rack=") == resolved.machine.counts["rack"]


def test_the_first_stream_is_that_of_the_simulations_first_replica(resolved: Scenario) -> None:
    out = simulate(resolved, 20, 3)
    told = replay(resolved, first_stream(resolved, 20, 3)).outcome
    assert float(told.ettr[0]) == pytest.approx(float(out.ettr[0]), abs=1e-9)


def test_the_timelines_running_spans_add_up_to_the_running_time(resolved: Scenario) -> None:
    history = replay(resolved, first_stream(resolved, 20, 0))
    drawn = spans(history)
    assert all(end >= begin for begin, end, _, _ in drawn)
    assert all(after[0] == pytest.approx(before[1]) for before, after in itertools.pairwise(drawn))
    out = history.outcome
    running = sum(end - begin for begin, end, kind, _ in drawn if kind == "running") * 86400
    useful_and_running = float(out.useful_s[0]) + out.reasons_s[0, [0, 1, 5, 6, 7]].sum()
    # Work that is lost, slow or spent on checkpoints was running time as well.
    assert running == pytest.approx(useful_and_running, rel=1e-6)


def test_the_trace_lists_every_failure_of_the_stream_in_order(resolved: Scenario, tmp_path: Path) -> None:
    stream = first_stream(resolved, 20, 0)
    path = tmp_path / "trace.jsonl"
    number = write(path, resolved, stream, seed=0)
    read = [json.loads(line) for line in path.read_text().splitlines()]
    head, failures = read[0], read[1:]
    assert head["format"] == "modelworks-failure-trace-1"
    assert (head["nodes"], head["gpus_per_node"]) == (1024, 8)
    assert number == len(failures) > 10
    times = [failure["time_s"] for failure in failures]
    assert times == sorted(times)
    assert times[-1] < resolved.horizon_s
    for failure in failures:
        assert all(0 <= node < 1024 for node in failure["nodes"])
        assert (len(failure["nodes"]) == 0) == (failure["scope"] in {"none", "cluster"})
    assert list(lines(resolved, stream, 0)) == read


def test_a_trace_read_back_is_simulated_as_the_failures_that_were_written(resolved: Scenario) -> None:
    drawn = first_stream(resolved, 20, 0)
    # What a trace doesn't tell: which nodes are lemons, and how long each restart took.
    plain = replace(drawn, relapse_s=np.full_like(drawn.relapse_s, np.inf), restart=np.ones_like(drawn.restart))
    read = read_stream(list(lines(resolved, plain, 0))[1:], resolved)
    expected, found = replay(resolved, plain).outcome, replay(resolved, read).outcome
    assert found.ettr == pytest.approx(expected.ettr, abs=1e-6)
    assert (found.interruptions == expected.interruptions).all()
    assert found.reasons_s == pytest.approx(expected.reasons_s, abs=1.0)


def test_a_trace_of_another_scenario_or_out_of_order_is_refused(resolved: Scenario) -> None:
    known = resolved.causes[0].name
    with pytest.raises(InputError, match="cause = 'meteor' is not accepted: one of "):
        read_stream([{"time_s": 1.0, "cause": "meteor"}], resolved)
    with pytest.raises(InputError, match="not in order"):
        read_stream([{"time_s": 2.0, "cause": known}, {"time_s": 1.0, "cause": known}], resolved)


def test_failed_nodes_are_shown_in_their_racks(resolved: Scenario) -> None:
    history = replay(resolved, first_stream(resolved, 20, 0))
    struck = struck_racks(resolved.machine, history.happenings)
    nodes = {node for happening in history.happenings for node in happening.nodes}
    assert struck == sorted({node // 8 for node in nodes})
    assert 0 < len(struck) <= resolved.machine.counts["rack"]


@pytest.mark.parametrize("racks", [1, 8, 1563])
def test_the_picture_scales_from_one_rack_to_a_hundred_thousand_gpus(racks: int) -> None:
    drawn = hall(racks, 32, 16, 64, struck=[0])
    assert drawn.count("data-rack=") == racks
    assert drawn.count("#be123c") == 1
    places = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    assert all(float(x) >= 0 and float(x) + float(width) <= 960 for x, width in places)


def test_names_are_escaped() -> None:
    assert "<b>" not in waterfall([("a <b>", 1.0), ("& c", 0.5)])
