"""The answers as one HTML file: charts drawn into it, nothing fetched from elsewhere, no script needed to read it."""

from __future__ import annotations

import html
from collections.abc import Sequence

from modelworks.simulate import drawing
from modelworks.simulate.answers import Answer
from modelworks.simulate.buildout import DAY_S
from modelworks.simulate.comparison import Comparison
from modelworks.simulate.events import Happening, History
from modelworks.simulate.machine import Machine, nodes_per_rack
from modelworks.simulate.report import duration, usd
from modelworks.simulate.sweep import Bar
from modelworks.simulate.top500 import Beside

_STYLE = """
:root{--ink:#1c1d21;--quiet:#6b6f78;--line:#d9dbe0;--paper:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e8e9ec;--quiet:#9a9ea8;--line:#34363d;--paper:#17181b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
  max-width:1000px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2.2rem 0 .4rem}
svg{width:100%;height:auto;font:12px system-ui,sans-serif;fill:var(--ink)}
.quiet{fill:var(--quiet);color:var(--quiet)}.axis{stroke:var(--line);fill:none}.hall{fill:none;stroke:var(--line)}
.figures{display:flex;flex-wrap:wrap;gap:1.5rem;margin:1rem 0}.figures b{display:block;font-size:1.35rem}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left}
td:not(:first-child),th:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
"""


def page(
    found: Answer,
    history: History,
    beside: Beside,
    tornado: tuple[float, Sequence[Bar]],
    comparison: Comparison | None = None,
) -> str:
    """The page; `history` is the replica whose time is drawn."""
    s, run, out = found.scenario, found.scenario.run, found.outcome
    end_s = float(history.outcome.elapsed_s[0])
    last_week = [happening for happening in history.happenings if happening.time_s > end_s - 7 * DAY_S]
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        f'<p class="quiet">{run.cluster.gpus:,} x {html.escape(run.cluster.device)}, {html.escape(run.model.name)}, '
        f"{found.samples:,} samples, seed {found.seed}</p>",
        _figures(found),
        "<h2>From peak FLOPs to useful tokens</h2>",
        drawing.waterfall(found.goodput),
        "<h2>What stops the run</h2>",
        drawing.bars(causes(found)),
        "<h2>Effective training time over all samples</h2>",
        drawing.histogram([100.0 * float(value) for value in out.ettr], unit=" %"),
        f"<h2>One replica's time, every failure and recovery ({len(history.happenings):,} events)</h2>",
        drawing.timeline(spans(history), end_s / DAY_S),
        '<p class="quiet">green: it runs; red: it is down after a failure; brown: it is planned. '
        "Point at a mark to see what happened.</p>",
        f"<h2>What matters most (ETTR {tornado[0]:.2%})</h2>",
        drawing.bars([_tornado_row(bar, tornado[0]) for bar in tornado[1]]),
        "<h2>The machine from above; racks where this replica failed in its last week are red</h2>",
        picture(s.machine, struck_racks(s.machine, last_week)),
        "<h2>Power in three steps and a failure</h2>",
        _power(found),
        "<h2>What it is made of and costs</h2>",
        _bill(found),
        "<h2>Beside the TOP500</h2>",
        _list(beside),
    ]
    if comparison is not None:
        parts += ["<h2>Tokens over the calendar</h2>", calendar(comparison), _compared(comparison)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(run.name)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def spans(history: History) -> list[tuple[float, float, str, str]]:
    """A replica's time as spans of days: (begin, end, kind, note), a failure's with what it was."""
    found: list[tuple[float, float, str, str]] = []
    marks = [h for h in history.happenings if h.what in {"running", "failure", "drain", "pause", "finished"}]
    end_s = float(history.outcome.elapsed_s[0])
    kinds = {"running": "running", "failure": "down", "drain": "planned", "pause": "planned"}
    for here, following in zip(marks, [*marks[1:], None], strict=True):
        if here.what == "finished":
            continue
        until = following.time_s if following else end_s
        note = "" if here.what == "running" else _note(here)
        found.append((here.time_s / DAY_S, until / DAY_S, kinds[here.what], note))
    return found


def struck_racks(machine: Machine, happenings: Sequence[Happening]) -> list[int]:
    """Racks in which nodes failed."""
    per_rack = nodes_per_rack(machine.cluster, machine.parts)
    return sorted({node // per_rack for happening in happenings for node in happening.nodes})


def picture(machine: Machine, struck: Sequence[int] = ()) -> str:
    """The machine's network, halls and racks."""
    per_rack = nodes_per_rack(machine.cluster, machine.parts)
    gpus = min(per_rack * machine.cluster.gpus_per_node, machine.cluster.gpus)
    shape = machine.parts.hall
    drawn = drawing.hall(machine.counts["rack"], shape.racks_per_row, shape.rows_per_hall, gpus, struck)
    if machine.network is None:
        return drawn
    names = [f"{name} switches" for name in ("leaf", "spine", "core", "super-core")]
    return drawing.network(list(zip(names, machine.network.switches, strict=False))) + drawn


def calendar(comparison: Comparison) -> str:
    """Tokens over time, a line for a machine."""
    dates = comparison.dates()
    days = [float((date - dates[0]).days) for date in dates]
    series = [(each.name, days, [t / 1e12 for t in each.tokens(dates).tolist()]) for each in comparison.candidates]
    ticks = [(days[at], dates[at].isoformat()) for at in range(0, len(dates), max(1, len(dates) // 6))]
    return drawing.lines(series, ticks, " T")


def _note(happening: Happening) -> str:
    if happening.what == "pause":
        return f"day {happening.time_s / DAY_S:.2f}: {happening.cause}"
    where = f", {len(happening.nodes)} nodes from {happening.nodes[0]}" if happening.nodes else ""
    return (
        f"day {happening.time_s / DAY_S:.2f}: {happening.cause} ({happening.scope}{where}), "
        f"lost {duration(happening.lost_work_s)} of work, down for {duration(happening.down_s)}"
    )


def _figures(found: Answer) -> str:
    values = found.as_dict()
    days = values["days_to_finish"]
    shown = [
        (f"{values['ettr']['mean']:.1%}", "effective training time"),
        (f"{values['interruptions']['mean']:,.0f}", f"interruptions in {values['days']:.0f} days"),
        (duration(values["mttf_hours"] * 3600) if values["mttf_hours"] else "never", "mean time to failure"),
        (f"{values['lost_gpu_hours']:,.0f}", f"GPU-hours lost, {usd(values['lost_usd'])}"),
        (f"{values['tokens_per_day'] / 1e9:,.0f} G", "tokens a day"),
        (f"{days['p50']:.1f}" if days and "p50" in days else "-", "days to finish (half of the samples)"),
        (duration(values["checkpoint"]["best_interval_s"]), "best checkpoint interval"),
    ]
    return '<div class="figures">' + "".join(f"<div><b>{b}</b>{what}</div>" for b, what in shown) + "</div>"


def causes(found: Answer) -> list[tuple[str, float, str]]:
    """Rows for a chart of lost time: (cause, seconds, what is written behind it)."""
    counts, lost = found.outcome.interruptions.mean(axis=0), found.outcome.causes_s.mean(axis=0)
    order = sorted(range(len(counts)), key=lambda index: -lost[index])
    return [
        (found.cause_names[index], float(lost[index]),
         f"{counts[index]:,.1f} times, {found.gpu_hours(float(lost[index])):,.0f} GPU-hours")
        for index in order if lost[index] > 0
    ]  # fmt: skip


def _tornado_row(bar: Bar, middle: float) -> tuple[str, float, str]:
    return bar.name, bar.width(middle), f"halved {bar.half - middle:+.2%}, doubled {bar.double - middle:+.2%}"


def _power(found: Answer) -> str:
    power, step_s = found.machine.power, found.scenario.work.step_time_s
    corners = power.profile(step_s, down_s=1.5 * step_s)
    seconds, watts = [x for x, _ in corners], [y / 1e6 for _, y in corners]
    return drawing.lines([("IT power", seconds, watts)], [(x, f"{x:.1f} s") for x in (0.0, step_s, 3 * step_s)], " MW")


def _bill(found: Answer) -> str:
    built = found.machine
    cost, power = built.cost, built.power
    rows = [
        (name.replace("_", " "), f"{number:,}") for name, number in built.counts.items() if number and name != "job"
    ]
    rows += [(f"transceivers, {kind}", f"{number:,}") for kind, number in built.transceivers.items() if number]
    rows += [
        ("IT power", f"{power.it_w / 1e6:,.1f} MW"),
        ("site power", f"{power.total_w / 1e6:,.1f} MW"),
        ("energy in a year", f"{power.year_wh() / 1e12:,.3g} TWh, {usd(cost.energy_usd_per_year)}"),
        ("servers", usd(cost.servers_usd)),
        ("network", usd(cost.network_usd)),
        ("storage", usd(cost.storage_usd)),
        ("building", usd(cost.building_usd)),
        ("a GPU-hour", f"{cost.usd_per_gpu_hour:.2f} $"),
    ]
    return _table([], rows)


def _list(beside: Beside) -> str:
    def exa(value: float | None) -> str:
        return f"{value / 1e18:.3g}" if value else "-"

    rows = [
        (("~ " if row.estimated else "") + row.name, exa(row.hpl_flops), exa(row.hpl_mxp_flops), exa(row.bf16_flops),
         f"{row.power_w / 1e6:.1f}" if row.power_w else "-")
        for row in beside.rows
    ]  # fmt: skip
    notes = [f"~ HPL: {beside.hpl.method}."] if beside.hpl else []
    notes += [f"~ HPL-MxP: {beside.hpl_mxp.method}."] if beside.hpl_mxp else []
    head = ["", "HPL, EFLOP/s", "HPL-MxP, EFLOP/s", "bf16 peak, EFLOP/s", "MW"]
    return _table(head, rows) + f'<p class="quiet">{html.escape(" ".join(notes))}</p>'


def _compared(comparison: Comparison) -> str:
    rows = [
        (each.name, each.finish(comparison.tokens).date().isoformat(), usd(comparison.usd(each)),
         f"{each.joules_per_token():.3g}")
        for each in comparison.candidates
    ]  # fmt: skip
    said = [f"{who} overtakes {whom} on {on.isoformat()}." for who, whom, on in comparison.overtakings]
    said.append(f"First: {comparison.first.name}; cheapest: {comparison.cheapest.name}.")
    return _table(["", "done", "cost", "J/token"], rows) + f"<p>{html.escape(' '.join(said))}</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{body}</table>"
