"""A failure trace: what one replica meets, as lines of JSON that a fault injector can replay at compressed time.

The first line describes the trace; each further one is a failure of the stream, in order of time. `nodes` are ranks of
nodes from 0; a failure with scope ``none`` or ``cluster`` has none and stops the whole job.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modelworks.simulate.failures import FailureStream
from modelworks.simulate.scenario import Scenario
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
