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

Kind = Literal["models", "hardware", "clusters", "failures", "prices"]
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


@cache
def entry(kind: Kind, name: str) -> Entry:
    """Read one entry by its name, or a file of the user's by its path (it ends in ``.toml``).

    Raises
    ------
    InputError
        If there is none of that name, naming the nearest; or if the file is not TOML or carries no provenance.
    """
    if kind not in get_args(Kind):
        raise InputError(f"the catalog has no {kind!r}; {nearest(kind, get_args(Kind))}")
    own = name.endswith(".toml")
    path = Path(name).expanduser() if own else _FOLDER / kind / f"{name}.toml"
    if not own and ("/" in name or not path.is_file()):
        raise InputError(f"no preset {name!r} in {kind}; {nearest(name, names(kind))}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML: {error}") from None
    stated = values.pop("provenance", {"source": f"file {path}", "certainty": "assumed"} if own else {})
    return Entry(kind, path.stem, values, validate(Provenance, stated, where=f"{path.name} [provenance]"))
