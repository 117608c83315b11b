"""A plan set out in the terminal, the answer first, with bars where lengths say more than digits.

Tables give one column what width is left, so that 80 columns are enough. Everything shown is in the plan already;
nothing is calculated here but differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from modelworks.plan.planner import LOSSES, Candidate, Loss, Plan
from modelworks.plan.waterfall import MEMORY_NAMES, largest_first
from modelworks.plan.words import (
    NONE,
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

_LOSS, _KEPT, _WHOLE = "yellow", "green", "bright_black"
_PARTS = ("cyan", "blue", "yellow", "magenta", "green", "bright_blue", "bright_black")
_MOST_SOURCES = 6


def page(plan: Plan) -> Group:
    """A plan: the answer, why it is no better, what it stands on."""
    parts: list[RenderableType] = [
        answer(plan),
        facts_table([plan]),
        waterfall_table(plan.waterfall, plan.mfu),
        memory_table(plan.best, plan.device.memory_bytes),
    ]
    if len(plan.memory_by_stage) > 1:
        parts.append(stage_table(plan))
    if plan.alternatives:
        parts.append(alternatives_table(plan))
    if len(plan.frontier) > 1:
        parts.append(frontier_table(plan))
    if plan.sensitivity:
        parts.append(sensitivity_table(plan))
    parts.append(standing(plan))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def answer(plan: Plan) -> Text:
    """What to do and what it takes, in three lines."""
    layout, cost = plan.best.layout, plan.cost
    text = Text()
    text.append(f"{plan.name}: {plan.run.model.name} on {plan.devices:,} x {plan.device.name}\n", style="bold")
    text.append(f"{layout_name(layout)}: ", style="bold green")
    text.append(f"{layout_details(layout)}. {layout_sentence(layout)}\n")
    text.append(
        f"{seconds(plan.step_time_s)} a step, {percent(plan.mfu)} MFU, {duration(plan.run_time_s)}", style="bold"
    )
    spent = f", {money(cost.rent_usd)} rented" if cost.rent_usd is not None else ""
    text.append(f" for {count(plan.run.train.tokens)} tokens{spent}. ")
    text.append(f"It fits: {gib(plan.memory_bytes)} of {gib(plan.device.memory_bytes)}.")
    for note in plan.notes:
        text.append(f"\nNote: {note}.", style="yellow")
    return text


def comparison(plans: Sequence[Plan]) -> Group:
    """Plans side by side: what each takes, and what each loses to what."""
    losses = Table(title="Points of MFU lost to", title_justify="left", title_style="bold", box=None)
    losses.add_column("")
    for plan in plans:
        losses.add_column(escape(plan.name), justify="right", overflow="fold")
    shares = [{loss.reason: loss.share for loss in plan.waterfall} for plan in plans]
    reasons = [name for name in LOSSES if any(abs(found.get(name, 0.0)) >= 0.0005 for found in shares)]
    for reason in sorted(reasons, key=lambda name: -max(found.get(name, 0.0) for found in shares)):
        losses.add_row(LOSSES[reason], *(f"{100 * found.get(reason, 0.0):.1f}" for found in shares))
    losses.add_row("achieved: MFU", *(f"{100 * plan.mfu:.1f}" for plan in plans), style="bold")
    return Group(facts_table(plans), Text(), losses)


def facts_table(plans: Sequence[Plan]) -> Table:
    """What plans take, one column for each."""
    named = len(plans) > 1
    table = Table(title="What it takes", title_justify="left", title_style="bold", show_header=named, box=None)
    table.add_column("")
    for plan in plans:
        table.add_column(escape(plan.name), overflow="fold")
    for name, values in facts(plans):
        table.add_row(name, *(escape(value) for value in values))
    return table


def facts(plans: Sequence[Plan]) -> list[tuple[str, list[str]]]:
    """Named quantities of plans in words, one value for each plan; what no plan knows is left out."""
    rows = [
        ("model", [_model(plan) for plan in plans]),
        ("devices", [f"{plan.devices:,} x {plan.device.name}" for plan in plans]),
        ("layout", [layout_name(plan.best.layout) for plan in plans]),
        ("batch", [_batch(plan) for plan in plans]),
        ("time per step", [seconds(plan.step_time_s) for plan in plans]),
        ("throughput", [f"{count(plan.tokens_per_s)} tokens/s" for plan in plans]),
        ("MFU", [f"{percent(plan.mfu)} of {_peak(plan)}" for plan in plans]),
        ("memory", [f"{gib(plan.memory_bytes)} of {gib(plan.device.memory_bytes)}" for plan in plans]),
        ("whole run", [f"{duration(plan.run_time_s)}, {plan.steps:,} steps" for plan in plans]),
        ("GPU hours", [f"{plan.cost.device_hours:,.0f}" for plan in plans]),
        ("energy", [f"{energy(plan.cost.energy_kwh)}, {_power(plan.cost.power_w)} while it runs" for plan in plans]),
        ("rented", [money(plan.cost.rent_usd) for plan in plans]),
        ("owned", [_owned(plan) for plan in plans]),
    ]
    return [(name, values) for name, values in rows if any(value != NONE for value in values)]


def waterfall_table(losses: Sequence[Loss], mfu: float) -> Table:
    """From the devices' peak down to what is achieved, in points of MFU."""
    table = _bars("From the devices' peak to what is achieved, in points of MFU")
    table.add_row("peak of the devices", Bar(100, 0, 100, color=_WHOLE), "100.0")
    top = 100.0
    for loss in largest_first(losses):
        low, high = sorted((top - 100 * loss.share, top))
        table.add_row(loss.words, Bar(100, max(low, 0.0), min(high, 100.0), color=_LOSS), f"{-100 * loss.share:+.1f}")
        top -= 100 * loss.share
    table.add_row("achieved: MFU", Bar(100, 0, 100 * mfu, color=_KEPT), f"{100 * mfu:.1f}", style="bold")
    return table


def memory_table(candidate: Candidate, capacity_bytes: float) -> Table:
    """What a device of the fullest stage holds, against what it has."""
    table = _bars("Memory of a device of the fullest stage")
    size, start = max(candidate.memory_bytes, capacity_bytes), 0.0
    for number, (component, held) in enumerate(candidate.memory.items()):
        if held:
            bar = Bar(size, start, start + held, color=_PARTS[number % len(_PARTS)])
            table.add_row(escape(MEMORY_NAMES.get(component, component)), bar, gib(held))
            start += held
    over = candidate.memory_bytes > capacity_bytes
    whole = Bar(size, 0, candidate.memory_bytes, color="red" if over else _KEPT)
    table.add_row("in all", whole, gib(candidate.memory_bytes), style="bold")
    table.add_row("the device has", Bar(size, 0, capacity_bytes, color=_WHOLE), gib(capacity_bytes))
    return table


def stage_table(plan: Plan) -> Table:
    """Memory of a device of each kind of stage."""
    table = Table(title="Memory by stage", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    for stage in plan.memory_by_stage:
        table.add_column(f"{stage} stage", justify="right")
    components = {name for held in plan.memory_by_stage.values() for name, size in held.items() if size}
    for name in (name for name in MEMORY_NAMES if name in components):
        table.add_row(MEMORY_NAMES[name], *(gib(held.get(name, 0.0)) for held in plan.memory_by_stage.values()))
    table.add_row("in all", *(gib(sum(held.values())) for held in plan.memory_by_stage.values()), style="bold")
    return table


def alternatives_table(plan: Plan) -> Table:
    """The best layout and those that come next, with what each loses by."""
    table = Table(title="Next-best layouts", title_justify="left", title_style="bold", box=None)
    table.add_column("layout", ratio=3, min_width=16)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("MFU", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("why it loses", ratio=4, min_width=20)
    for candidate, why in ((plan.best, "the best"), *((other.candidate, other.why) for other in plan.alternatives)):
        table.add_row(
            f"{layout_name(candidate.layout)}",
            seconds(candidate.step_time_s),
            percent(candidate.mfu),
            gib(candidate.memory_bytes),
            escape(why),
        )
    return table


def frontier_table(plan: Plan) -> Table:
    """The layouts that no other beats in time, cost and devices at once."""
    table = Table(
        title="Time against cost and devices: no other layout beats these in all three",
        title_justify="left", title_style="bold", box=None,
    )  # fmt: skip
    for name in ("devices", "whole run", "cost", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layout", min_width=20)
    for point in plan.frontier:
        table.add_row(
            f"{point.devices:,}",
            duration(point.days * 86400),
            money(point.usd),
            percent(point.candidate.mfu),
            f"{layout_name(point.candidate.layout)} {point.candidate.layout['precision']}",
        )
    return table


def sensitivity_table(plan: Plan) -> Table:
    """What a tenth more of each resource would buy."""
    table = Table(title="What 10 % more of it saves of the step", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    table.add_column("this layout", justify="right")
    table.add_column("laid out anew", justify="right")
    table.add_column("", min_width=20)
    for row in plan.sensitivity:
        changed = layout_name(row.layout)
        changed = "" if changed == layout_name(plan.best.layout) else f"as {changed}"
        table.add_row(row.resource, percent(row.same_layout), percent(row.searched), changed)
    return table


def standing(plan: Plan) -> Text:
    """How much of the plan is published, estimated and assumed, and what was tried."""
    kinds = Counter(fact.certainty for fact in plan.assumptions)
    said = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    text = Text()
    text.append("What it stands on: ", style="bold")
    text.append(f"{said} facts of the catalog" if said else "the facts that were given")
    text.append(f", as {plan.software.name} trains. ")
    assumed = [fact for fact in plan.assumptions if fact.certainty == "assumed"]
    if assumed:
        names = ", ".join(f"{fact.subject}.{fact.field}" for fact in assumed[:_MOST_SOURCES])
        more = f" and {len(assumed) - _MOST_SOURCES} more" if len(assumed) > _MOST_SOURCES else ""
        text.append(f"Assumed are {names}{more}; --html and --json list all with their sources. ")
    text.append(f"{plan.considered:,} layouts were considered, {plan.evaluated:,} evaluated in full. ")
    text.append("Validation, checkpoints and failures are not counted.")
    return text


def _bars(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, expand=True)
    table.add_column(width=28, no_wrap=True)
    table.add_column(ratio=1, min_width=10)
    table.add_column(justify="right", width=10, no_wrap=True)
    return table


def _model(plan: Plan) -> str:
    parameters = plan.run.model.parameters
    text = f"{plan.run.model.name}, {count(parameters.total)} parameters"
    return text if parameters.active == parameters.total else f"{text}, {count(parameters.active)} a token"


def _batch(plan: Plan) -> str:
    train = plan.run.train
    return (
        f"{train.global_batch:,} x {train.seq_len:,} tokens, {plan.micro_batches} micro batches of {plan.micro_batch}"
    )


def _peak(plan: Plan) -> str:
    return f"{plan.device.peak_flops[plan.precision] / 1e12:,.0f} TFLOP/s {plan.precision}"  # type: ignore[index]


def _owned(plan: Plan) -> str:
    if plan.cost.owned_usd is None:
        return NONE
    return f"{money(plan.cost.owned_usd)} of a cluster of {money(plan.cost.buy_usd)}"


def _power(watts: float) -> str:
    return f"{watts / 1e6:,.1f} MW" if watts >= 1e6 else f"{watts / 1e3:,.3g} kW"
