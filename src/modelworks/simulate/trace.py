"""A failure trace: what one replica meets, as lines of JSON that a fault injector can replay at compressed time.

The first line describes the trace; each further one is a failure of the stream, in order of time. `nodes` are ranks of
nodes from 0; a failure with scope ``none`` or ``cluster`` has none and stops the whole job. What was injected, or
happened, can be written in the same form and simulated: `stream`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelworks.simulate.failures import FailureStream
from modelworks.simulate.scenario import Scenario
from modelworks.spec.errors import InputError
from modelworks.spec.home import write_atomically

FORMAT = "modelworks-failure-trace-1"


def lines(scenario: Scenario, stream: FailureStream, seed: int, replica: int = 0) -> Iterator[dict[str, Any]]:
    """The trace of one replica as plain values."""
    run = scenario.run
    yield {
        "format": FORMAT,
        "name": run.name,
        "nodes": scenario.nodes,
        "gpus_per_node": run.cluster.gpus_per_node,
        "horizon_s": scenario.horizon_s,
        "step_time_s": scenario.work.step_time_s,
        "seed": seed,
        "replica": replica,
    }
    only = stream.only(replica)
    for row in np.flatnonzero(np.isfinite(only.time_s[:, 0])):
        cause = scenario.causes[int(only.cause[row, 0])]
        first = min(int(float(only.lot[row, 0]) * scenario.nodes), scenario.nodes - cause.nodes)
        yield {
            "time_s": round(float(only.time_s[row, 0]), 3),
            "cause": cause.name,
            "kind": cause.facts.kind,
            "scope": cause.facts.scope,
            "nodes": list(range(first, first + cause.nodes)),
            "detect_s": round(float(only.detect_s[row, 0]), 3),
            "repair_s": round(float(only.repair_s[row, 0]), 3),
            "outage_s": round(float(only.outage_s[row, 0]), 3),
            "slowdown": cause.facts.slowdown,
            "foreseen": bool(only.foreseen[row, 0]),
        }


def write(path: Path, scenario: Scenario, stream: FailureStream, seed: int, replica: int = 0) -> int:
    """Write a trace, all of it or nothing; how many failures it has."""
    written = [json.dumps(line) for line in lines(scenario, stream, seed, replica)]
    write_atomically(path, "\n".join(written) + "\n")
    return len(written) - 1


def stream(failures: Iterable[Mapping[str, Any]], scenario: Scenario) -> FailureStream:
    """The failures of a trace as one replica of a scenario meets them; no node is a lemon.

    Parameters
    ----------
    failures
        The trace's lines but the first, as plain values, in order of time. `detect_s`, `repair_s`, `outage_s` and
        `foreseen` may be missing where they are nothing; `restart`, where it is given, is how long the restart took
        over its mean.
    scenario
        Has the causes that the trace names.

    Raises
    ------
    InputError
        If a cause is unknown, or times aren't in order.
    """
    found = list(failures)
    known = {cause.name: number for number, cause in enumerate(scenario.causes)}
    times = [float(failure["time_s"]) for failure in found]
    if times != sorted(times):
        raise InputError("the trace's time_s are not in order of time")
    for failure in found:
        if failure["cause"] not in known:
            raise InputError(f"cause = {failure['cause']!r} is not accepted: one of {', '.join(known)} is")

    def column(values: list[Any], kind: Any = np.float32) -> Any:
        return np.array(values, kind).reshape(len(found), 1)

    def of(name: str) -> Any:
        return column([failure.get(name, 0.0) for failure in found])

    return FailureStream(
        time_s=column(times, np.float64),
        cause=column([known[failure["cause"]] for failure in found], np.int16),
        detect_s=of("detect_s"),
        repair_s=of("repair_s"),
        relapse_s=column([np.inf] * len(found)),
        outage_s=of("outage_s"),
        restart=column([failure.get("restart", 1.0) for failure in found]),
        lot=column([(failure.get("nodes") or [0])[0] / scenario.nodes for failure in found]),
        foreseen=column([bool(failure.get("foreseen")) for failure in found], bool),
    )
