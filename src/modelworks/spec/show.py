"""A spec with all its presets and defaults filled in, and where each of its values comes from.

`sourced` finds what a name or a path stands for and pairs every field with a `Fact`; `page` sets it out for the
terminal: the fields, and below them the sources they refer to by number.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from modelworks.spec import catalog, facts
from modelworks.spec.catalog import Entry, Fact
from modelworks.spec.errors import InputError
from modelworks.spec.fields import Section, nearest
from modelworks.spec.files import cluster_spec, device_spec, load_run, model_spec
from modelworks.spec.model import ModelSpec
from modelworks.spec.run import RunSpec

_DEFAULT = Fact(source="Modelworks: the field's default, or what follows from other fields", certainty="assumed")
_READERS: dict[str, Callable[[str], Section]] = {
    "models": model_spec,
    "hardware": device_spec,
    "clusters": cluster_spec,
    "failures": facts.failures,
    "parts": facts.parts,
    "part-prices": facts.prices,
    "top500": facts.top500_machine,
    "observations": facts.published_run,
}


@dataclass(frozen=True)
class SourcedSpec:
    """A complete spec and the source of each of its fields (dotted names)."""

    kind: Literal["run"] | catalog.Kind
    name: str
    spec: Section
    sources: Mapping[str, Fact]

    @property
    def model(self) -> ModelSpec | None:
        """The network that is described, if one is."""
        if isinstance(self.spec, RunSpec):
            return self.spec.model
        return self.spec if isinstance(self.spec, ModelSpec) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `spec`, `sources` and, where there is a network, `parameters`."""
        shown: dict[str, Any] = {
            "kind": self.kind,
            "name": self.name,
            "spec": self.spec.model_dump(mode="json", exclude_none=True),
            "sources": {field: fact.model_dump(exclude_none=True) for field, fact in self.sources.items()},
        }
        if self.model is not None:
            shown["parameters"] = {"total": self.model.parameters.total, "active": self.model.parameters.active}
        return shown


def sourced(name: str) -> SourcedSpec:
    """What `name` stands for: a run spec's file, a Hugging Face ``config.json``, or a catalog entry.

    A name that several kinds have is written with its kind: ``hardware/local``.

    Raises
    ------
    InputError
        If nothing has that name, or several kinds do.
    """
    if name.endswith(".toml"):
        return _sourced_run(name)
    if name.endswith(".json"):
        model = model_spec(name)
        stated = Fact(source=f"file {name}", certainty="assumed")
        return SourcedSpec("models", model.name, model, {field: stated for field, _ in _leaves(_dump(model))})
    entry = _find(name)
    spec = _READERS[entry.kind](entry.name)
    return SourcedSpec(entry.kind, entry.name, spec, _entry_sources(entry, _dump(spec)))


def page(shown: SourcedSpec) -> Group:
    """The spec as a table for the terminal, its sources as numbered notes below."""
    numbers: dict[str, int] = {}
    table = Table("field", "value", "certainty", "source", title=f"{shown.kind}: {escape(shown.name)}")
    for field, value in _leaves(_dump(shown.spec)):
        fact = shown.sources[field]
        if fact == _DEFAULT:
            table.add_row(escape(field), escape(_written(value)), "default", "")
            continue
        number = numbers.setdefault(_note(fact), len(numbers) + 1)
        table.add_row(escape(field), escape(_written(value)), fact.certainty, str(number))
    notes = Table.grid(padding=(0, 1))
    notes.add_column(justify="right")
    notes.add_column(overflow="fold")
    for note, number in numbers.items():
        notes.add_row(str(number), escape(note))
    parts: list[Any] = [table, notes]
    if shown.model is not None:
        counted = shown.model.parameters
        parts.insert(1, f"parameters: {counted.total:,}, of which one token uses {counted.active:,}")
    return Group(*parts)


def _find(name: str) -> Entry:
    """The one catalog entry of that name, with or without its kind in front."""
    kind, slash, bare = name.partition("/")
    if slash and kind in _READERS:
        return catalog.entry(kind, bare)  # type: ignore[arg-type]
    kinds = [kind for kind in get_args(catalog.Kind) if kind in _READERS and name in catalog.names(kind)]
    if not kinds:
        known = [known for kind in _READERS for known in catalog.names(kind)]  # type: ignore[arg-type]
        raise InputError(
            f"{name!r} is no catalog entry, run spec (.toml) or Hugging Face config (.json); {nearest(name, known)}"
        )
    if len(kinds) > 1:
        raise InputError(f"{name!r} stands for several things: " + " and ".join(f"{kind}/{name}" for kind in kinds))
    return catalog.entry(kinds[0], name)


def _sourced_run(path: str) -> SourcedSpec:
    run = load_run(path)
    given = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    file = Fact(source=f"file {path}", certainty="assumed")
    presets = {
        "model": catalog.entry("models", run.model.preset) if run.model.preset else None,
        "cluster": catalog.entry("clusters", run.cluster.preset) if run.cluster.preset else None,
    }
    sources = {}
    for field, _ in _leaves(_dump(run)):
        section, _, inner = field.partition(".")
        preset = presets.get(section)
        if _has(given, field):
            sources[field] = file
        elif preset is not None and _has(preset.values, inner):
            sources[field] = preset.provenance.of(inner)
        else:
            sources[field] = _DEFAULT
    return SourcedSpec("run", run.name, run, sources)


def _entry_sources(entry: Entry, values: Mapping[str, Any]) -> dict[str, Fact]:
    return {
        field: entry.provenance.of(field) if _has(entry.values, field) else _DEFAULT for field, _ in _leaves(values)
    }


def _dump(spec: Section) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_none=True)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of everything that isn't a table."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _has(values: Any, field: str) -> bool:
    for key in field.split("."):
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True


def _note(fact: Fact) -> str:
    return fact.source + (f" ({fact.note})" if fact.note else "")


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "_") if abs(value) >= 100_000 else str(value)
    return f"{value:g}" if isinstance(value, float) and abs(value) >= 1e6 else str(value)
