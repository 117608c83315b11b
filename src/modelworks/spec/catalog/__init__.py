"""The catalog: facts as data. One TOML file per thing, every number with its source and certainty.

A file holds the thing's own fields and a table ``[provenance]``: ``source`` and ``certainty`` stand for all numbers in
the file, and ``[provenance.fields."network.latency_s"]`` for a single one that comes from elsewhere.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from modelworks.spec.errors import InputError
from modelworks.spec.fields import Section, nearest, validate

Kind = Literal[
    "models",
    "hardware",
    "clusters",
    "software",
    "calibration",
    "kernels",
    "failures",
    "prices",
    "scaling",
    "parts",
    "part-prices",
    "top500",
    "observations",
]
Certainty = Literal["published", "estimated", "assumed"]
_FOLDER = Path(__file__).parent


class Fact(Section):
    """Where a number comes from and how certain it is."""

    source: str
    certainty: Certainty
    note: str | None = None


class Provenance(Fact):
    """The source of a whole file, and of single fields that differ."""

    fields: dict[str, Fact] = {}

    def of(self, field: str) -> Fact:
        """The source of one field (dotted name); a table's entry holds for what is in it."""
        while field:
            if field in self.fields:
                return self.fields[field]
            field = field.rpartition(".")[0]
        return self


@dataclass(frozen=True)
class Entry:
    """One catalog file: its plain values and their provenance."""

    kind: Kind
    name: str
    values: dict[str, Any]
    provenance: Provenance


def names(kind: Kind) -> list[str]:
    """The names of the catalog's entries of one kind, sorted."""
    return sorted(path.stem for path in (_FOLDER / kind).glob("*.toml"))


def entries(kind: Kind) -> Iterator[Entry]:
    """All entries of one kind."""
    return (entry(kind, name) for name in names(kind))


def entry(kind: Kind, name: str) -> Entry:
    """Read one entry by its name, or a file of the user's by its path (it ends in ``.toml``).

    Raises
    ------
    InputError
        If there is none of that name, naming the nearest; or if the file is not TOML or carries no provenance.
    """
    if kind not in get_args(Kind):
        raise InputError(f"the catalog has no {kind!r}; {nearest(kind, get_args(Kind))}")
    if name.endswith(".toml"):
        path = Path(name).expanduser()
        return _read(kind, path, {"source": f"file {path}", "certainty": "assumed"})
    if name not in names(kind):
        raise InputError(f"no preset {name!r} in {kind}; {nearest(name, names(kind))}")
    return _packaged(kind, name)


@cache
def _packaged(kind: Kind, name: str) -> Entry:
    return _read(kind, _FOLDER / kind / f"{name}.toml", {})


def _read(kind: Kind, path: Path, unstated: dict[str, Any]) -> Entry:
    """Read one file; `unstated` is the provenance of a file that has none."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    provenance = values.pop("provenance", unstated)
    if not isinstance(provenance, dict):
        raise InputError(f"{path}: provenance = {provenance!r} is not accepted: it should be a table")
    return Entry(kind, path.stem, values, validate(Provenance, provenance, where=f"{path.name} [provenance]"))
