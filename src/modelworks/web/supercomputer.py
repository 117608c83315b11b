"""The page of the supercomputer: a cluster and a run picked, simulated, drawn, and one replica's time played.

It shows what the room `simulate` computes. While a replica is played, each failure lights the racks that it struck and
is told in words; goodput and cost are those until that moment.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastapi import Request
from nicegui import ui

from modelworks.simulate import drawing, page
from modelworks.simulate.answers import Answer, answer
from modelworks.simulate.buildout import DAY_S
from modelworks.simulate.events import Happening, History, replay
from modelworks.simulate.machine import nodes_per_rack
from modelworks.simulate.montecarlo import first_stream
from modelworks.spec import catalog
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import run_from
from modelworks.spec.run import RunSpec
from modelworks.web.frame import frame
from modelworks.web.services import Services
from modelworks.web.words import count, duration, per_cent

SAMPLES = 200
TICK_S = 0.15
TICKS = 400
"""A replica's time is played in so many ticks."""
KINDS = {"sync": "stops the job", "async": "behind the job", "peer": "in peers' memory", "multi-level": "both"}


@dataclass
class Choice:
    """What is picked on the page."""

    cluster: str = "colossus-100k"
    gpus: float = 100_000
    model: str = "grok-1"
    days: float = 30
    every_min: float = 5
    kind: str = "multi-level"
    spares: float = 250
    rate: float = 1.0

    def run(self) -> RunSpec:
        """The run spec that this describes.

        Raises
        ------
        InputError
            If something was left empty, or can't be.
        """
        empty = [name for name, value in vars(self).items() if value is None]
        if empty:
            raise InputError(f"{empty[0].replace('_', ' ')} is empty: a number is accepted")
        gpus = int(self.gpus)
        cluster: dict[str, Any] = {"preset": self.cluster, "gpus": gpus}
        return run_from(
            {
                "name": "supercomputer",
                "model": self.model,
                "train": {"tokens": 10**18, "seq_len": 2048, "global_batch": max(256, 4 * gpus)},
                "cluster": cluster,
                "checkpoint": {"every": float(self.every_min) * 60.0},
                "simulate": {
                    "days": float(self.days),
                    "samples": SAMPLES,
                    "rate": float(self.rate),
                    "spares": {"hot": int(self.spares)},
                    "state": {"kind": self.kind},
                },
            },
            where="the page",
        )


def register(services: Services) -> None:
    """Add the page ``/supercomputer``."""

    @ui.page("/supercomputer")
    def supercomputer(request: Request) -> None:
        with frame(request, services, "/supercomputer", "Supercomputer") as side:
            with side.bar:
                ui.html("<h1>Supercomputer</h1>")
            SupercomputerPage()


class SupercomputerPage:
    """The knobs, and below them what comes of them."""

    def __init__(self) -> None:
        self._choice = Choice()
        with ui.element("div").classes("sheet"):
            with ui.element("div").classes("panel"):
                self._knobs()
            self._place = ui.element("div").style("display:flex;flex-direction:column;gap:16px;width:100%")
        with self._place:
            ui.label("Pick a cluster and a run, and see what it really achieves.").classes("muted")

    def _knobs(self) -> None:
        clusters = [name for name in catalog.names("clusters") if name != "local"]
        with ui.element("div").classes("knobs"):
            ui.select(clusters, label="Cluster").bind_value(self._choice, "cluster")
            ui.number("GPUs", min=8, step=8).bind_value(self._choice, "gpus")
            ui.select(catalog.names("models"), label="Model").bind_value(self._choice, "model")
            ui.number("Days", min=1).bind_value(self._choice, "days")
            ui.number("Checkpoint every, min", min=0).bind_value(self._choice, "every_min")
            ui.select(KINDS, label="Checkpoints").bind_value(self._choice, "kind")
            ui.number("Hot spare nodes", min=0).bind_value(self._choice, "spares")
            ui.number("Failures, times Llama 3's", min=0, step=0.5).bind_value(self._choice, "rate")
        with ui.element("div").classes("row-line").style("margin-top:12px"):
            self._button = ui.button("Simulate", icon="play_arrow", on_click=self._simulate).props("unelevated no-caps")
            self._busy = ui.spinner(size="sm")
            self._busy.set_visibility(False)

    async def _simulate(self) -> None:
        self._button.disable()
        self._busy.set_visibility(True)
        try:
            found, history = await asyncio.to_thread(_work, self._choice.run())
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="warning", multi_line=True)
            return
        finally:
            self._button.enable()
            self._busy.set_visibility(False)
        self._place.clear()
        with self._place:
            _result(found)
            Player(found, history)
            _charts(found)


def _work(run: RunSpec) -> tuple[Answer, History]:
    found = answer(run)
    return found, replay(found.scenario, first_stream(found.scenario, found.samples, found.seed))


def _result(found: Answer) -> None:
    values = found.as_dict()
    best = values["checkpoint"]["best_interval_s"]
    shown = [
        (per_cent(values["ettr"]["mean"]), "of the time counts (ETTR)"),
        (f"{values['interruptions']['mean']:,.0f}", "interruptions"),
        (duration(values["mttf_hours"] * 3600 if values["mttf_hours"] else None), "between two of them"),
        (count(values["tokens_per_day"]), "tokens a day"),
        (count(values["lost_gpu_hours"]), "GPU-hours lost"),
        (f"{values['lost_usd'] / 1e6:,.1f} M$", "is what they cost"),
        (duration(best), "best between checkpoints"),
        (f"{values['machine']['power']['total_w'] / 1e6:,.0f} MW", "at the site's meter"),
        (f"{values['machine']['cost']['capital_usd'] / 1e9:,.2f} G$", "to build"),
    ]
    with ui.element("div").classes("panel"), ui.element("div").classes("figures"):
        for value, what in shown:
            with ui.element("div").classes("figure"):
                ui.html(f"<b>{value}</b>")
                ui.label(what).style("font-size:12.5px;color:var(--muted)")


class Player:
    """The machine's picture and one replica's time on it."""

    def __init__(self, found: Answer, history: History) -> None:
        machine = found.scenario.machine
        self._found, self._history = found, history
        self._per_rack = nodes_per_rack(machine.cluster, machine.parts)
        self._end_s = float(history.outcome.elapsed_s[0])
        self._failures = [h for h in history.happenings if h.what in {"failure", "drain", "pause"}]
        self._running = _running(history)
        with ui.element("div").classes("panel").style("display:flex;flex-direction:column;gap:12px"):
            ui.html("<h3>One replica, played</h3>")
            with ui.element("div").classes("drawing"):
                ui.html(page.picture(machine), sanitize=False)
            with ui.element("div").classes("row-line").style("width:100%;flex-wrap:nowrap;gap:12px"):
                self._toggle = ui.button(icon="play_arrow", on_click=self._play).props(
                    'flat round dense aria-label="Play"'
                )
                self._slider = ui.slider(
                    min=0, max=self._end_s / DAY_S, step=self._end_s / DAY_S / TICKS, value=0, on_change=self._show
                ).style("flex:1")
            with ui.element("div").classes("row-line").style("width:100%"):
                self._day = ui.label()
                ui.space()
                self._money = ui.label().classes("muted")
            self._said = ui.label().classes("muted").style("min-height:1.6em")
            with ui.element("div").classes("drawing"):
                ui.html(drawing.timeline(page.spans(history), self._end_s / DAY_S), sanitize=False)
        self._timer = ui.timer(TICK_S, self._tick, active=False)
        self._show()

    def _play(self) -> None:
        if self._slider.value >= self._end_s / DAY_S:
            self._slider.value = 0
        self._timer.active = not self._timer.active
        self._toggle.props(f"icon={'pause' if self._timer.active else 'play_arrow'}")

    def _tick(self) -> None:
        self._slider.value = min(self._slider.value + self._end_s / DAY_S / TICKS, self._end_s / DAY_S)
        if self._slider.value >= self._end_s / DAY_S:
            self._timer.active = False
            self._toggle.props("icon=play_arrow")

    def _show(self) -> None:
        now_s = float(self._slider.value) * DAY_S
        past = [happening for happening in self._failures if happening.time_s <= now_s]
        recent = [happening for happening in past if happening.time_s > now_s - 2 * self._end_s / TICKS]
        racks = sorted({node // self._per_rack for happening in recent for node in happening.nodes})
        running = sum(max(0.0, min(end, now_s) - begin) for begin, end in self._running)
        gpu_hours = self._found.gpu_hours(now_s)
        share = per_cent(running / now_s) if now_s else "–"
        self._day.text = f"day {now_s / DAY_S:.1f}: {len(past):,} interruptions, running {share} of the time"
        self._money.text = f"{gpu_hours * self._found.machine.cost.usd_per_gpu_hour / 1e6:,.1f} M$ spent"
        self._said.text = _told(recent[-1] if recent else (past[-1] if past else None))
        ui.run_javascript(
            "document.querySelectorAll('[data-rack].struck').forEach(rack => rack.classList.remove('struck'));"
            + f"{racks}.forEach(n => document.querySelector(`[data-rack=\"${{n}}\"]`)?.classList.add('struck'));"
        )


def _running(history: History) -> list[tuple[float, float]]:
    """When the replica ran: (begin, end) in seconds."""
    marks = [*history.happenings, Happening(float(history.outcome.elapsed_s[0]), "end")]
    return [(here.time_s, following.time_s) for here, following in pairwise(marks) if here.what == "running"]


def _told(happening: Happening | None) -> str:
    if happening is None:
        return "nothing has failed yet"
    day = f"day {happening.time_s / DAY_S:.2f}: "
    if happening.what == "pause":
        return day + happening.cause
    where = f" on node {happening.nodes[0]:,}" if happening.nodes else ""
    if len(happening.nodes) > 1:
        where = f" on {len(happening.nodes)} nodes from {happening.nodes[0]:,}"
    lost = f", {duration(happening.lost_work_s)} of work lost" if happening.lost_work_s >= 1 else ""
    return f"{day}{happening.cause.replace('_', ' ')}{where}{lost}, down for {duration(happening.down_s)}"


def _charts(found: Answer) -> None:
    for title, chart in (
        ("From peak FLOPs to useful tokens", drawing.waterfall(found.goodput)),
        ("What stops the run", drawing.bars(page.causes(found))),
        ("ETTR over all samples", drawing.histogram([100 * float(v) for v in found.outcome.ettr], unit=" %")),
    ):
        with ui.element("div").classes("panel"):
            ui.html(f"<h3>{title}</h3>")
            with ui.element("div").classes("drawing"):
                ui.html(chart, sanitize=False)
