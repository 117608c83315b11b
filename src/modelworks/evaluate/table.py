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


def scores_table(report: dict[str, Any]) -> Table:
    """A row for each task's, or group's, metric."""
    found = Table(title=f"{report['model']}, {report['version']}")
    for title in ("task", "metric"):
        found.add_column(title)
    for title in ("score", "± standard error", "samples", "shots"):
        found.add_column(title, justify="right")
    for task, metrics in report["scores"].items():
        about = report["tasks"].get(task, {})
        for metric, score in metrics.items():
            error = score["standard_error"]
            found.add_row(
                task,
                metric.removesuffix(",none"),
                f"{score['value']:.4g}",
                "" if error is None else f"{error:.2g}",
                str(about.get("samples", "")),
                "" if about.get("shots") is None else str(about["shots"]),
            )
    return found


def comparison_table(compared: dict[str, Any]) -> Table:
    """A row for each metric of the tasks that both have."""
    found = Table(title=f"{compared['model']} against {compared['against']}")
    for title in ("task", "metric"):
        found.add_column(title)
    for title in (compared["model"], compared["against"], "difference", "95 % interval", "McNemar p"):
        found.add_column(title, justify="right")
    found.add_column(f"{compared['model']} is")
    for row in compared["rows"]:
        low, high = row["interval"]
        p = row["mcnemar_p"]
        found.add_row(
            row["task"],
            row["metric"].removesuffix(",none"),
            f"{row['score']:.4g}",
            f"{row['against']:.4g}",
            f"{row['difference']:+.4g}",
            f"{low:+.4g} to {high:+.4g}",
            "" if p is None else f"{p:.2g}",
            row["verdict"],
        )
    return found


def kinds_table(report: dict[str, Any]) -> Table | None:
    """A row for each kind of question in our own suites, by the score that a suite is known by; None without kinds."""
    found = Table()
    for title in ("task", "questions of kind", "metric"):
        found.add_column(title)
    for title in ("score", "95 % interval", "samples"):
        found.add_column(title, justify="right")
    for task, about in report["tasks"].items():
        metric = next(iter(report["scores"].get(task, {})), None)
        for group, scores in about.get("by_kind", {}).items():
            if metric in scores:
                low, high = scores[metric]["interval"]
                cells = (f"{scores[metric]['value']:.1%}", f"{low:.1%} to {high:.1%}", f"{scores[metric]['samples']:,}")
                found.add_row(task, group, metric, *cells)
    return found if found.row_count else None
