"""The catalog's files of failures, parts, prices, TOP500 machines and published runs, as typed specs."""

from __future__ import annotations

from typing import TypeVar

from modelworks.spec import catalog
from modelworks.spec.catalog import Kind
from modelworks.spec.fields import Section, validate
from modelworks.spec.machine import PartsSpec, PricesSpec, PublishedRunSpec, Top500Spec
from modelworks.spec.simulation import FailuresSpec

SectionType = TypeVar("SectionType", bound=Section)


def failures(name: str) -> FailuresSpec:
    """What fails and how often, by its catalog name or the path of a TOML file."""
    return _read(FailuresSpec, "failures", name)


def parts(name: str) -> PartsSpec:
    """Parts of nodes, racks and networks, by catalog name or path."""
    return _read(PartsSpec, "parts", name)


def prices(name: str) -> PricesSpec:
    """Prices, by catalog name or path."""
    return _read(PricesSpec, "part-prices", name)


def top500_machine(name: str) -> Top500Spec:
    """A machine of the TOP500, by catalog name."""
    return _read(Top500Spec, "top500", name)


def published_run(name: str) -> PublishedRunSpec:
    """What others published of a run's interruptions, by catalog name."""
    return _read(PublishedRunSpec, "observations", name)


def top500() -> list[Top500Spec]:
    """All machines of the TOP500 that the catalog has, the fastest first."""
    machines = [top500_machine(name) for name in catalog.names("top500")]
    return sorted(machines, key=lambda machine: -machine.rmax_flops)


def published_runs() -> list[PublishedRunSpec]:
    """What others published of their runs' interruptions."""
    return [published_run(name) for name in catalog.names("observations")]


def _read(kind: type[SectionType], folder: Kind, name: str) -> SectionType:
    found = catalog.entry(folder, name)
    return validate(kind, {"name": found.name} | found.values, where=f"{folder} {name}")
