"""A plan as one page of HTML, and its parts as markup for the web app.

Bars are cells of tables with a coloured part, so that they take any width, are read out by a screen reader, and need
no script. The page holds the waterfall and the memory of each layout that it names, one of them shown; pointing at a
mark or a row shows another. Every name is escaped where it is put into markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelworks.plan import planner
from modelworks.plan.chart import COLOURS, Point, Series, axis_over, escaped, marker_colour, scatter
from modelworks.plan.document import Cell, document, table, write_whole
from modelworks.plan.planner import LOSSES, Candidate, Loss, Plan, waterfall
from modelworks.plan.report import facts
from modelworks.plan.waterfall import MEANINGS, MEMORY_NAMES, largest_first
from modelworks.plan.words import (
    count,
    duration,
    energy,
    gib,
    layout_details,
    layout_name,
    layout_sentence,
    money,
    percent,
    seconds,
)

Figure = tuple[str, str]
"""A quantity in words, and what it is."""


def plan_html(plan: Plan) -> str:
    """A plan as a page that stands alone."""
    layout = plan.best.layout
    notes = "".join(f'<p class="notice">{escaped(note)}</p>' for note in plan.notes)
    candidates = _named(plan)
    body = [
        f"<header><h1>{escaped(plan.name)}: {escaped(plan.run.model.name)} on {plan.devices:,} × "
        f"{escaped(plan.device.name)}</h1>"
        f'<p class="lead">{escaped(answer_sentence(plan))}</p></header>',
        notes,
        _panel(
            "",
            f'<p class="said">{escaped(layout_name(layout))}</p><p class="lead">{escaped(layout_sentence(layout))} '
            f"In {escaped(layout_details(layout))}.</p>{figures(_figures(plan))}"
            f"<details><summary>All figures</summary>{_facts_table([plan])}</details>",
        ),
        *(
            _sheet(key, candidate, plan, shown=candidate is plan.best, only=len(candidates) == 1)
            for key, candidate in candidates.items()
        ),
    ]
    if plan.alternatives:
        body.append(_panel("Next-best layouts, and why they lose", _alternatives(plan), CHOOSE))
    if len(plan.frontier) > 1:
        body.append(_panel("Time against devices and cost", frontier_markup(plan.frontier, _beaten(plan)), CHOOSE))
    side = []
    if plan.sensitivity:
        side.append(_panel("What 10 % more of it saves of the step", _sensitivity(plan)))
    if len(plan.memory_by_stage) > 1:
        side.append(_panel("Memory by stage", _stages(plan)))
    body.append(f'<div class="columns">{"".join(side)}</div>')
    if plan.assumptions:
        rows = [
            (escaped(fact.subject), escaped(fact.field), escaped(_value(fact.value)), _certainty(fact.certainty),
             escaped(fact.source))
            for fact in sorted(plan.assumptions, key=lambda fact: _CERTAINTIES.index(fact.certainty))
        ]  # fmt: skip
        head = ("Of", "Field", "Value", "Certainty", "Source")
        body.append(_panel("What it stands on", table(head, rows)))
    body.append(
        f'<p class="lead">{plan.considered:,} layouts were considered, {plan.evaluated:,} evaluated in full, as '
        f"{escaped(plan.software.name)} trains. Validation, checkpoints and failures are not counted.</p>"
    )
    return document(f"{plan.name}: plan", "".join(body))


_CERTAINTIES = ("assumed", "estimated", "published")
CHOOSE = "A row or a mark shows that layout's waterfall and memory."


def comparison_html(plans: Sequence[Plan]) -> str:
    """Plans side by side as a page that stands alone."""
    names = " · ".join(plan.name for plan in plans)
    shares = [{loss.reason: loss.share for loss in plan.waterfall} for plan in plans]
    reasons = [name for name in LOSSES if any(abs(found.get(name, 0.0)) >= 0.0005 for found in shares)]
    rows: list[list[Cell]] = [
        [escaped(LOSSES[name]), *((f"{100 * found.get(name, 0.0):.1f}", found.get(name, 0.0)) for found in shares)]
        for name in sorted(reasons, key=lambda name: -max(found.get(name, 0.0) for found in shares))
    ]
    rows.append(["<b>achieved: MFU</b>", *((f"{100 * plan.mfu:.1f}", plan.mfu) for plan in plans)])
    columns = "".join(
        f'<section class="panel"><h2>{escaped(plan.name)}</h2>{waterfall_markup(plan.waterfall, plan.mfu)}'
        f"<h3>Memory</h3>{memory_markup(plan.best, plan.device.memory_bytes)}</section>"
        for plan in plans
    )
    body = [
        f"<header><h1>{escaped(names)}</h1></header>",
        _panel("What each takes", _facts_table(plans)),
        f'<div class="columns">{columns}</div>',
        _panel("Points of MFU lost to", table(("Reason", *(plan.name for plan in plans)), rows)),
    ]
    return document(names, "".join(body))


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan's page to a file; see `document.write_whole`."""
    write_whole(path, plan_html(plan))


def write_comparison(plans: Sequence[Plan], path: Path) -> None:
    """Write the page of plans side by side to a file; see `document.write_whole`."""
    write_whole(path, comparison_html(plans))


def answer_sentence(plan: Plan) -> str:
    """What a run takes, in a sentence or two."""
    spent = f" and {money(plan.cost.rent_usd)} of rent" if plan.cost.rent_usd is not None else ""
    first = largest_first(plan.waterfall)[:2]
    waits = " and ".join(f"{loss.words} ({100 * loss.share:.0f} points of MFU)" for loss in first)
    return (
        f"{count(plan.run.train.tokens)} tokens take {duration(plan.run_time_s)}{spent}: {seconds(plan.step_time_s)} a "
        f"step at {percent(plan.mfu)} MFU, in {gib(plan.memory_bytes)} of {gib(plan.device.memory_bytes)} a device. "
        f"Most is lost to {waits}."
    )


def _figures(plan: Plan) -> list[Figure]:
    found = [
        (seconds(plan.step_time_s), "a step"),
        (percent(plan.mfu), "MFU"),
        (duration(plan.run_time_s), f"whole run, {plan.steps:,} steps"),
        (gib(plan.memory_bytes), f"of {gib(plan.device.memory_bytes)} a device"),
        (f"{plan.cost.device_hours:,.0f}", "GPU hours"),
        (energy(plan.cost.energy_kwh), "energy"),
    ]
    if plan.cost.rent_usd is not None:
        found.append((money(plan.cost.rent_usd), "rented"))
    if plan.cost.owned_usd is not None:
        found.append((money(plan.cost.owned_usd), "owned: its share of the cluster's life"))
    return found


def _named(plan: Plan) -> dict[str, Candidate]:
    """The layouts that the page names, by what tells them apart; the best first."""
    every = [plan.best, *(other.candidate for other in plan.alternatives), *(p.candidate for p in plan.frontier)]
    return {layout_key(candidate): candidate for candidate in reversed(every)} | {layout_key(plan.best): plan.best}


def layout_key(candidate: Candidate) -> str:
    """What tells a layout apart from others, in words: rows and marks carry it."""
    return f"{layout_name(candidate.layout)}, {layout_details(candidate.layout)}"


def _sheet(key: str, candidate: Candidate, plan: Plan, shown: bool, only: bool) -> str:
    """One layout's waterfall and memory; those of the best one are shown first."""
    losses = waterfall(plan.run.model, plan.run.train.seq_len, candidate)
    hidden = "" if shown else " hidden"
    name = "" if only else f'<p class="said">{escaped(key)}: {seconds(candidate.step_time_s)} a step</p>'
    return (
        f'<div class="sheet-of" data-sheet="{escaped(key)}"{hidden}>{name}<div class="columns">'
        f'<section class="panel"><h2>From peak to achieved</h2>{waterfall_markup(losses, candidate.mfu)}</section>'
        f'<section class="panel"><h2>Memory of the fullest stage\'s devices</h2>'
        f"{memory_markup(candidate, plan.device.memory_bytes)}</section></div></div>"
    )


def _panel(title: str, content: str, note: str = "") -> str:
    head = f"<h2>{escaped(title)}</h2>" if title else ""
    said = f'<p class="hint">{escaped(note)}</p>' if note else ""
    return f'<section class="panel">{head}{said}{content}</section>'


def _facts_table(plans: Sequence[Plan]) -> str:
    head = "".join(f'<th scope="col">{escaped(plan.name)}</th>' for plan in plans) if len(plans) > 1 else ""
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th>{"".join(f"<td>{escaped(value)}</td>" for value in values)}</tr>'
        for name, values in facts(plans)
    )
    first = f"<thead><tr><td></td>{head}</tr></thead>" if head else ""
    return f'<div class="sortable"><table class="facts">{first}<tbody>{rows}</tbody></table></div>'


def layouts_table(rows: Sequence[tuple[Candidate, str]]) -> str:
    """Layouts with what each takes and a text of why."""
    cells: list[list[Cell]] = [
        [
            f"<b>{escaped(layout_name(candidate.layout))}</b><small>{escaped(layout_details(candidate.layout))}</small>",
            (seconds(candidate.step_time_s), candidate.step_time_s),
            (percent(candidate.mfu), candidate.mfu),
            (gib(candidate.memory_bytes), candidate.memory_bytes),
            escaped(why),
        ]
        for candidate, why in rows
    ]
    head = ("Layout", "Step", "MFU", "Memory", "Why it loses")
    return table(head, cells, [layout_key(candidate) for candidate, _ in rows])


def _alternatives(plan: Plan) -> str:
    return layouts_table([(plan.best, "the best"), *((other.candidate, other.why) for other in plan.alternatives)])


def _beaten(plan: Plan) -> list[planner.Point]:
    """The next-best layouts as points beside the front."""
    days = plan.run_time_s / plan.step_time_s / 86400
    front = {layout_key(point.candidate) for point in plan.frontier}
    return [
        planner.Point(_devices(other.candidate), days * other.candidate.step_time_s, None, other.candidate)
        for other in plan.alternatives
        if layout_key(other.candidate) not in front
    ]


def frontier_markup(front: Sequence[planner.Point], beaten: Sequence[planner.Point] = (), choose: bool = True) -> str:
    """The chart of time against devices; cost and layout are said where one points.

    Parameters
    ----------
    front
        Layouts that no other beats in time, cost and devices at once.
    beaten
        Others, to compare.
    choose
        Whether a mark shows the waterfall of its layout, which then has a sheet on the page.
    """
    points = [*front, *beaten]
    if not points:
        return ""

    def series(name: str, chosen: Sequence[planner.Point], is_front: bool) -> Series:
        keys = [layout_key(point.candidate) if choose else "" for point in chosen]
        marks = [
            Point(point.devices, point.days, _trade_off(point), key) for point, key in zip(chosen, keys, strict=True)
        ]
        return Series(name, marks, steps=is_front, faint=not is_front)

    x = axis_over("devices", [float(point.devices) for point in points], lambda value: f"{value:,.6g}")
    y = axis_over("days", [point.days for point in points], lambda value: f"{value:,.4g}")
    found = [series("not beaten in time, cost and devices", front, True), series("beaten", beaten, False)]
    found = [one for one in found if one.points]
    keys = "".join(
        f'<span class="key"><i style="background:{marker_colour(number, one.faint)}"></i>{escaped(one.name)}</span>'
        for number, one in enumerate(found)
    )
    drawing = scatter(found, x, y, "Days of the whole run against the number of devices", 360, identity="front")
    return f'<div class="keys">{keys}</div>{drawing}'


def _trade_off(point: planner.Point) -> str:
    spent = f", {money(point.usd)}" if point.usd is not None else ""
    return (
        f"{point.devices:,} devices: {duration(point.days * 86400)}{spent}\n"
        f"{seconds(point.candidate.step_time_s)} a step, {percent(point.candidate.mfu)} MFU\n"
        + layout_key(point.candidate)
    )


def _devices(candidate: Candidate) -> int:
    layout = candidate.layout
    return int(layout["tensor"] * layout["pipeline"] * layout["context"] * layout["data"])


def _sensitivity(plan: Plan) -> str:
    largest = max((row.searched for row in plan.sensitivity), default=0.0) or 1.0
    rows = []
    for row in sorted(plan.sensitivity, key=lambda row: -row.searched):
        changed = layout_name(row.layout)
        tip = f"with this layout {percent(row.same_layout)}, laid out anew {percent(row.searched)}"
        if changed != layout_name(plan.best.layout):
            tip += f"\nbest then: {changed}"
        rows.append(_row(row.resource, 0, max(0.0, 100 * row.searched / largest), percent(row.searched), tip, "gain"))
    return _bars("What 10 % more of each resource saves of the step", rows)


def _stages(plan: Plan) -> str:
    stages = plan.memory_by_stage
    used = {name for held in stages.values() for name, size in held.items() if size}
    rows: list[list[Cell]] = [
        [escaped(words), *((gib(held.get(name, 0.0)), held.get(name, 0.0)) for held in stages.values())]
        for name, words in MEMORY_NAMES.items()
        if name in used
    ]
    totals = [sum(held.values()) for held in stages.values()]
    rows.append(["<b>in all</b>", *((gib(total), total) for total in totals)])
    return table(("", *(f"{stage} stage" for stage in stages)), rows)


def _value(value: str) -> str:
    """A fact's value, without the zeros of a large number."""
    try:
        return f"{float(value):.6g}"
    except ValueError:
        return value


def _certainty(kind: str) -> str:
    return f'<span class="certainty {escaped(kind)}">{escaped(kind)}</span>'


def figures(values: Sequence[Figure]) -> str:
    """Quantities set out large, each above what it is."""
    cells = "".join(f"<div><dd>{escaped(value)}</dd><dt>{escaped(what)}</dt></div>" for value, what in values)
    return f'<dl class="plan-figures">{cells}</dl>'


def waterfall_markup(losses: Sequence[Loss], mfu: float) -> str:
    """From the peak of the devices down to what is achieved, in points of MFU."""
    rows = [_row("peak of the devices", 0.0, 100.0, "100.0", "What the devices would do at their peak.", "whole")]
    top = 100.0
    for loss in largest_first(losses):
        points = 100 * loss.share
        low, high = sorted((top - points, top))
        meaning = MEANINGS.get(loss.reason, "")
        tip = f"{loss.words}: {points:.2f} % of the step\n{meaning}".strip()
        rows.append(_row(loss.words, max(0.0, low), min(100.0, high), _signed(-points), tip, "loss"))
        top -= points
    achieved = f"The model's own FLOPs take {100 * mfu:.2f} % of what the devices could do in a step's time."
    rows.append(_row("achieved: MFU", 0.0, 100 * mfu, f"{100 * mfu:.1f}", achieved, "whole kept"))
    return _bars("What each reason costs, in points of MFU", rows)


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def memory_markup(candidate: Candidate, capacity_bytes: float) -> str:
    """What a device of the fullest stage holds, against what it has."""
    size = max(candidate.memory_bytes, capacity_bytes)
    parts, rows, start = [], [], 0.0
    for number, (component, held) in enumerate(candidate.memory.items()):
        if not held:
            continue
        name, share = MEMORY_NAMES.get(component, component), 100 * held / size
        colour = COLOURS[number % len(COLOURS)]
        tip = escaped(f"{name}\n{gib(held)}, {held / capacity_bytes:.1%} of the device's memory")
        parts.append(f'<i style="width:{share:.3f}%;background:{colour}" data-tip="{tip}"></i>')
        rows.append(_row(name, start, start + share, gib(held), "", "part", colour))
        start += share
    limit = (
        f'<b style="left:{100 * capacity_bytes / size:.2f}%"></b>' if candidate.memory_bytes > capacity_bytes else ""
    )
    over = candidate.memory_bytes - capacity_bytes
    said = f"{gib(candidate.memory_bytes)} of {gib(capacity_bytes)}"
    said += f": {gib(over)} too much" if over > 0 else f", {gib(-over)} free"
    kind = "plan-stack over" if over > 0 else "plan-stack"
    whole = f'<div class="{kind}" role="img" aria-label="{said}">{"".join(parts)}{limit}</div>'
    return f'<p class="said">{said}</p>{whole}{_bars("Memory by component", rows)}'


def _row(name: str, start: float, end: float, value: str, tip: str, kind: str, colour: str = "") -> str:
    """A named bar from `start` to `end` per cent."""
    place = f"left:{start:.3f}%;width:{max(0.0, end - start):.3f}%" + (f";background:{colour}" if colour else "")
    said = f' data-tip="{escaped(tip)}"' if tip else ""
    return (
        f'<tr class="{kind}"{said}><th scope="row">{escaped(name)}</th>'
        f'<td class="track"><div><i style="{place}"></i></div></td><td class="number">{escaped(value)}</td></tr>'
    )


def _bars(title: str, rows: Sequence[str]) -> str:
    return f'<table class="plan-bars" aria-label="{escaped(title)}"><tbody>{"".join(rows)}</tbody></table>'
