"""The list of models: those that can be served, those that can be fetched, those that can be built."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from modelworks.serve.download import sources
from modelworks.serve.store import Store
from modelworks.spec import catalog
from modelworks.spec.files import model_spec
from modelworks.spec.gguf_header import read_gguf_header


def listing(store: Store | None = None) -> list[dict[str, Any]]:
    """One row per model: `name`, `kind` (served, source or catalog), `parameters`, `bytes`, `context`, `source`."""
    store = store or Store()
    rows = []
    served = store.list()
    for model in served:
        parameters = read_gguf_header(store.path(model.name), arrays=False).parameters
        rows.append(_row(model.name, "served", parameters, model.bytes + model.eyes_bytes, model.context, model.source))
    here = {model.name for model in served}
    for name, source in sources().items():
        if name not in here:
            rows.append(_row(name, "source", None, source.bytes, None, f"modelworks models pull {name}"))
    for entry in catalog.entries("models"):
        spec = model_spec(entry.name)
        rows.append(_row(entry.name, "catalog", spec.parameters.total, None, spec.context, entry.provenance.source))
    return rows


def _row(
    name: str, kind: str, parameters: int | None, size: int | None, context: int | None, source: str
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "parameters": parameters,
        "bytes": size,
        "context": context,
        "source": source,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The list for people."""
    shown = Table("Name", "Kind", "Parameters", "Size", "Context", "Source")
    for row in rows:
        size = f"{row['bytes'] / 1e6:,.0f} MB" if row["bytes"] else ""
        context = f"{row['context']:,}" if row["context"] else ""
        shown.add_row(row["name"], row["kind"], _short(row["parameters"]), size, context, row["source"])
    return shown


def _short(count: int | None) -> str:
    if count is None:
        return ""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
