"""Evaluations as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def report_table(report: dict[str, Any]) -> Table:
    """A row for each depth, task or part of the positions, a column for each length."""
    cells, lengths = report["cells"], list(dict.fromkeys(cell["length"] for cell in report["cells"]))
    found = Table(title=f"{report['model']}, {report['version']}: {report['task']}")
    if report["task"] == "position-perplexity":
        for title in ("tokens", "position", "nats", "perplexity"):
            found.add_column(title, justify="right")
        for cell in cells:
            for part in cell["positions"]:
                where = f"{part['from']:,} to {part['to']:,}"
                found.add_row(f"{cell['length']:,}", where, f"{part['nats']:.3f}", f"{part['perplexity']:.2f}")
        return found
    found.add_column("depth" if report["task"] == "needle" else "task")
    for length in lengths:
        found.add_column(f"{length:,}", justify="right")
    rows: dict[str, dict[int, float]] = {}
    for cell in cells:
        name = cell["task"] if cell["depth"] is None else f"{cell['depth']:.0%}"
        rows.setdefault(name, {})[cell["length"]] = cell["score"]
    for name, scores in rows.items():
        found.add_row(name, *(f"{scores[length]:.0%}" for length in lengths))
    found.add_section()
    found.add_row("all", *(f"{report['by_length'][str(length)]:.0%}" for length in lengths))
    return found
