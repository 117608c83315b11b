"""Small scenarios whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modelworks.simulate.scenario import Scenario, scenario
from modelworks.spec import RunSpec, loads_run

ONE_CAUSE = """
[observation]
gpus = 8
days = 1.0
[causes.node]
component = "node"
mtbf_hours = {hours}
scope = "{scope}"
repair_fraction = {repair}
repair_hours = 10.0
detect_s = {detect}
"""
RUN = """
model = "llama-3.1-405b"
[train]
tokens = 1000000000000000000
seq_len = 8192
global_batch = 2048
[cluster]
preset = "colossus-100k"
gpus = {gpus}
[checkpoint]
every = {every}
[simulate]
days = {days}
failures = "{failures}"
[simulate.state]
kind = "{kind}"
stall = {stall}
write = {write}
read = 0
[simulate.restart]
drain = 0
swap = 0
scheduler = {restart}
container = 0
communicator = 0
communicator_per_rank = 0
warm_up = 0
spread = 0
manual_fraction = 0
[simulate.repair]
lemon_fraction = 0
burn_in = 0
"""


@pytest.fixture
def plain(tmp_path: Path) -> Callable[..., Scenario]:
    """A cluster of 100 nodes on which one thing fails, everything else being as simple as can be."""

    def build(*overrides: str, **given: object) -> Scenario:
        return scenario(plain_run(tmp_path, *overrides, **given))

    return build


@pytest.fixture
def plain_spec(tmp_path: Path) -> Callable[..., RunSpec]:
    """The same as a run spec."""
    return lambda *overrides, **given: plain_run(tmp_path, *overrides, **given)


def plain_run(folder: Path, *overrides: str, **given: object) -> RunSpec:
    """The run spec of `plain`."""
    values: dict[str, object] = {
        "gpus": 800, "days": 30.0, "hours": 100.0, "scope": "none", "repair": 0.0, "detect": 0.0, "every": 600.0,
        "kind": "sync", "stall": 20.0, "write": 0.0, "restart": 300.0,
    }  # fmt: skip
    values |= given
    file = folder / f"failures-{abs(hash(str(sorted(values.items()))))}.toml"
    file.write_text(ONE_CAUSE.format(**values))
    return loads_run(RUN.format(failures=file, **values), overrides)
