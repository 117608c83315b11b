"""The pages of runs: the list, and one run with its figures and live charts.

They read what a run has written into its folder (`train.record`), so they show a run of any process, also one started
on the command line.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from nicegui import ui

from modelworks.launch import local
from modelworks.spec.errors import InputError, OperationError
from modelworks.train.record import MetricsReader, RunRecord, Status, list_runs
from modelworks.web import charts
from modelworks.web.frame import frame
from modelworks.web.services import Services
from modelworks.web.words import count, duration, number, per_cent

LIST_S = 2.0
RUN_S = 1.0
"""How often a run's folder is looked at."""
RESUMABLE = {"stopped", "failed", "crashed"}


def register(services: Services) -> None:
    """Add the pages ``/runs`` and ``/runs/NAME``."""

    @ui.page("/runs")
    def runs(request: Request) -> None:
        with frame(request, services, "/runs", "Runs") as side:
            with side.bar:
                ui.html("<h1>Runs</h1>")
            RunList()

    @ui.page("/runs/{name}")
    def run(request: Request, name: str) -> None:
        with frame(request, services, "/runs", name) as side:
            with side.bar:
                ui.html('<h1><a href="/runs" style="text-decoration:none">Runs</a></h1>')
                ui.label(f"/ {name}").style("overflow:hidden;text-overflow:ellipsis;white-space:nowrap")
            try:
                record = RunRecord(name)
            except InputError as error:
                with ui.element("div").classes("empty"):
                    ui.html("<h2>No such run</h2>")
                    ui.label(str(error))
                return
            RunPage(services, record)


class RunList:
    """All runs on this machine, each as a card that keeps itself up to date."""

    def __init__(self) -> None:
        self._shown: list[tuple[str, Status]] = []
        self._sheet = ui.element("div").classes("sheet")
        self._refresh()
        ui.timer(LIST_S, self._refresh)

    def _refresh(self) -> None:
        now = [(record.name, record.status()) for record in list_runs()]
        if now == self._shown and self._sheet.default_slot.children:
            return
        self._shown = now
        self._sheet.clear()
        with self._sheet:
            if not now:
                with ui.element("div").classes("empty"):
                    ui.html("<h2>No runs yet</h2>")
                    ui.html("<p>A run appears here as soon as it starts:</p>")
                    ui.html('<pre class="log">modelworks train RUN.toml</pre>')
            for name, status in now:
                _card(name, status)


def _card(name: str, status: Status) -> None:
    with ui.element("a").props(f'href="/runs/{name}"').classes("panel run-card"):
        with ui.element("div").classes("row-line"):
            ui.html(f"<h3>{name}</h3>")
            _state(status)
            ui.space()
            ui.label(_progress(status)).classes("muted")
        _bar(status)
        with ui.element("div").classes("figures"):
            for value, what in _figures(status):
                _figure(value, what)


_OF_OBJECTIVES = {
    "Reward": {"training": "reward", "held out": "validation_reward"},
    "Rewards of pairs": {"chosen": "chosen_reward", "rejected": "rejected_reward"},
    "Held-out pairs told apart": {"share": "validation_preference_accuracy"},
    "Loss of signs": {"training": "sign_loss", "held out": "validation_sign_loss"},
    "Held-out signs that are read right": {"share": "validation_sign_accuracy"},
}
"""Charts that a run has if its objective logs these metrics, by the names of their lines."""


class RunPage:
    """One run: where it stands, its curves, and what can be done to it."""

    def __init__(self, services: Services, record: RunRecord) -> None:
        self._services, self._record = services, record
        self._reader = MetricsReader(record.folder)
        self._rows: list[dict[str, Any]] = []
        self._status: Status | None = None
        with ui.element("div").classes("sheet"):
            with ui.element("div").classes("row-line"):
                ui.html(f"<h2>{record.name}</h2>")
                self._badge = ui.element("div")
                ui.space()
                self._stop = ui.button("Stop", icon="stop", on_click=self._ask_to_stop)
                self._resume = ui.button("Resume", icon="play_arrow", on_click=self._go_on)
                self._talk = ui.button("Chat with it", icon="chat_bubble_outline", on_click=self._chat)
                for button in (self._stop, self._resume, self._talk):
                    button.props("flat no-caps dense padding='4px 12px'").classes("quiet")
            self._head = ui.element("div").classes("panel").style("display:flex;flex-direction:column;gap:14px")
            with ui.element("div").classes("charts"):
                self._loss = _chart("Loss", ["training", "cross-entropy"])
                self._bpb = _chart("Validation bits per byte", ["bits per byte"])
                self._speed = _chart("Tokens per second", ["tokens/s"])
                self._mfu = _chart("MFU: share of this machine's measured matmul rate", ["MFU"], percent=True)
                self._norm = _chart("Gradient norm", ["gradient norm"])
                self._rate = _chart("Learning rate", ["learning rate"])
                self._of_objective: dict[str, ui.echart] = {}
                self._experts: ui.echart | None = None
                self._place = ui.element("div").style("display:contents")
            self._log_place = ui.element("div")
            self._spec()
        self._refresh()
        ui.timer(RUN_S, self._refresh)

    def _spec(self) -> None:
        with ui.expansion("Spec").props("dense").classes("panel"):
            ui.label((self._record.folder / "run.toml").read_text(encoding="utf-8")).classes("log").style(
                "white-space:pre-wrap;font:12.5px/1.5 var(--mono)"
            )

    def _refresh(self) -> None:
        if not self._record.folder.exists():
            ui.navigate.to("/runs")
            return
        status = self._record.status()
        if status != self._status:
            self._status = status
            self._draw_head(status)
        rows, restarted = self._reader.read()
        if restarted:
            self._rows = []
        if rows or restarted:
            self._rows += rows
            self._draw_charts()

    def _draw_head(self, status: Status) -> None:
        self._badge.clear()
        with self._badge:
            _state(status)
        self._head.clear()
        with self._head:
            ui.label(_progress(status)).classes("muted")
            _bar(status)
            with ui.element("div").classes("figures"):
                for value, what in [*_figures(status), (count(status.tokens), "tokens")]:
                    _figure(value, what)
            if status.message:
                bad = " bad" if status.state in {"failed", "crashed"} else ""
                ui.label(status.message).classes(f"notice{bad}")
        self._stop.set_visibility(status.active)
        self._resume.set_visibility(status.state in RESUMABLE)
        served = {model.name for model in self._services.store.list()}
        self._talk.set_visibility(status.served_as in served)
        self._log_place.clear()
        log = self._record.log() if status.state in {"failed", "crashed"} else ""
        if log:
            with self._log_place:
                ui.label(log).classes("log").style("white-space:pre-wrap;font:12.5px/1.5 var(--mono)")

    def _draw_charts(self) -> None:
        rows = self._rows
        _fill(self._loss, charts.points(rows, "loss"), charts.points(rows, "cross_entropy"))
        _fill(self._bpb, charts.points(rows, "validation_bpb"), symbols=True)
        _fill(self._speed, charts.points(rows, "tokens_per_s"))
        _fill(self._mfu, charts.points(rows, "mfu", 100.0))
        _fill(self._norm, charts.points(rows, "grad_norm"))
        _fill(self._rate, charts.points(rows, "learning_rate"))
        for title, lines in _OF_OBJECTIVES.items():
            data = [charts.points(rows, key) for key in lines.values()]
            if any(data) and title not in self._of_objective:
                with self._place:
                    self._of_objective[title] = _chart(title, list(lines))
            if title in self._of_objective:
                _fill(self._of_objective[title], *data, symbols=len(data[-1]) < len(data[0]))
        layers = max((len(row.get("expert_load") or []) for row in rows[-1:]), default=0)
        if layers and self._experts is None:
            with self._place:
                self._experts = _chart(
                    "Expert load: the fullest expert's share, 1 is even", [f"layer {layer}" for layer in range(layers)]
                )
        if self._experts is not None:
            _fill(self._experts, *[charts.expert_load(rows, layer) for layer in range(layers)])

    async def _ask_to_stop(self) -> None:
        self._stop.disable()
        try:
            await asyncio.to_thread(self._record.stop)
            ui.notify("It saves a checkpoint and stops.")
        except OperationError as error:
            ui.notify(str(error), position="top", type="warning")
        finally:
            self._stop.enable()

    async def _go_on(self) -> None:
        self._resume.disable()
        try:
            self._services.begun_runs.add(self._record.name)
            await asyncio.to_thread(local.resume, self._record.name)
            ui.notify("It goes on from its last checkpoint.")
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
        finally:
            self._resume.enable()

    def _chat(self) -> None:
        if self._status is not None and self._status.served_as:
            ui.navigate.to(f"/?model={self._status.served_as}")


def _chart(title: str, series: list[str], percent: bool = False) -> ui.echart:
    with ui.element("div").classes("panel"):
        ui.html(f"<h3>{title}</h3>")
        return ui.echart(charts.options(series, percent)).classes("chart")


def _fill(chart: ui.echart, *data: list[list[float]], symbols: bool = False) -> None:
    for line, values in zip(chart.options["series"], data, strict=True):
        line["data"] = values
        line["showSymbol"] = symbols or len(values) < 3
    chart.options["title"]["show"] = not any(data)
    chart.update()


def _state(status: Status) -> None:
    ui.label(status.state).classes(f"state {status.state}")


def _bar(status: Status) -> None:
    done = status.step / status.steps if status.steps else 0.0
    ui.linear_progress(done, show_value=False, size="6px").props("instant-feedback rounded")


def _figure(value: str, what: str) -> None:
    with ui.element("div").classes("figure"):
        ui.html(f"<b>{value}</b>")
        ui.label(what).style("font-size:12.5px;color:var(--muted)")


def _progress(status: Status) -> str:
    if status.state == "preparing":
        return status.message or "preparing the data"
    step = f"step {status.step:,}" + (f" of {status.steps:,}" if status.steps else "")
    return f"{step}, {duration(status.eta_s)} left" if status.active and status.eta_s is not None else step


def _figures(status: Status) -> list[tuple[str, str]]:
    return [
        (number(status.loss, 3), "loss"),
        (number(status.validation_bpb, 3), "bits per byte"),
        (count(status.tokens_per_s), "tokens/s"),
        (per_cent(status.mfu), "MFU"),
        (duration(status.eta_s) if status.active else "–", "ETA"),
    ]
