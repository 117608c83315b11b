"""The page of live sources: those that there are and how they are, and a form to add one."""

from __future__ import annotations

import time
from functools import partial
from typing import cast

from fastapi import Request
from nicegui import ui

from modelworks.assistant.live.knowledge import INTERVALS_S, Live
from modelworks.assistant.live.store import Kind, Source
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.dialogs import ask, icon_button
from modelworks.web.frame import frame
from modelworks.web.language import say, say_number, say_time
from modelworks.web.services import Services

LOOK_S = 1.0
"""How often the sources are looked at."""


def register(services: Services) -> None:
    """Add the page ``/sources``."""

    @ui.page("/sources")
    async def sources(request: Request) -> None:
        own = services.of(request)
        with frame(request, own, "/sources", say("Sources")) as side:
            with side.bar, ui.element("h1"):
                ui.label(say("Sources"))
            with ui.element("div").classes("sheet"):
                try:
                    SourcesPage(await own.assistant.sources(), own)
                except RequestError:
                    ui.label(say("Live knowledge isn't part of your tier.")).classes("lead")


def kind_names() -> dict[Kind, str]:
    """What the kinds are called."""
    return {
        "feed": say("Feed (RSS, Atom)"),
        "site": say("Site (site map)"),
        "folder": say("Folder on the server"),
        "search": say("Web search"),
        "x": say("Search of X"),
    }


def interval_names() -> dict[float, str]:
    """How often a source can be refreshed, as the form offers it."""
    return {
        900.0: say("every 15 minutes"),
        3600.0: say("every hour"),
        6 * 3600.0: say("every 6 hours"),
        86400.0: say("every day"),
    }


class SourcesPage:
    """One open page."""

    def __init__(self, live: Live, services: Services) -> None:
        self._live = live
        self._may_share = services.access is not None and services.is_admin
        self._shown: object = None
        with ui.element("p").classes("lead"):
            ui.label(say("What is here is looked up when a question is asked, and cited with its time."))
        self._form()
        self._list = ui.element("div").classes("live-sources").props(f'role=list aria-label="{say("Sources")}"')
        self._draw()
        ui.timer(LOOK_S, self._draw)

    def _form(self) -> None:
        names = {kind: name for kind, name in kind_names().items() if kind in self._live.kinds}
        with ui.element("form").classes("panel add-source").on("submit.prevent", self._add):
            self._kind = ui.select(names, value="feed", label=say("Kind"), on_change=self._chosen)
            self._kind.props("outlined dense options-dense")
            self._address = ui.input(say("Address")).props("outlined dense").classes("grow")
            self._engine = ui.select(self._live.engines, label=say("Search engine")).props("outlined dense")
            self._interval = ui.select(interval_names(), value=INTERVALS_S["feed"], label=say("Refreshed"))
            self._interval.props("outlined dense options-dense")
            self._whole = ui.checkbox(say("Read the pages that entries lead to"))
            self._shared = ui.checkbox(say("For everybody"))
            self._shared.set_visibility(self._may_share)
            ui.button(say("Add"), icon="add").props("type=submit unelevated no-caps")
        self._chosen()

    def _chosen(self) -> None:
        kind = cast("Kind", self._kind.value)
        labels = {"feed": say("Address of the feed"), "site": say("Address of the site or its site map")}
        labels |= {"folder": say("Folder"), "x": say("What is searched, as on X")}
        self._address.props(f'label="{labels.get(kind, "")}"')
        self._address.set_visibility(kind != "search")
        self._engine.set_visibility(kind == "search")
        self._engine.value = self._engine.value or next(iter(self._live.engines), None)
        self._interval.set_visibility(kind != "search")
        self._interval.value = INTERVALS_S[kind]
        self._whole.set_visibility(kind == "feed")

    async def _add(self) -> None:
        kind = cast("Kind", self._kind.value)
        address = (self._engine.value if kind == "search" else self._address.value) or ""
        try:
            await self._live.add(
                *(kind, address),
                interval_s=self._interval.value,
                whole=kind == "feed" and self._whole.value,
                shared=self._may_share and self._shared.value,
            )
        except (InputError, OperationError) as error:
            _tell(error)
            return
        self._address.value = ""
        self._draw()

    def _draw(self) -> None:
        try:
            sources = self._live.store.all()
        except OperationError:
            return  # a database that is away for a while
        shown = [(one, _state(one)) for one in sources]
        if shown == self._shown:
            return
        self._shown = shown
        self._list.clear()
        with self._list:
            if not sources:
                ui.label(say("There is no source yet.")).classes("muted").props("role=listitem")
            for one, state in shown:
                self._source(one, state)

    def _source(self, one: Source, state: str) -> None:
        kinds = kind_names()
        with ui.element("div").classes("panel live-source").props("role=listitem"):
            with ui.element("div").classes("about"):
                ui.label(one.name).classes("name")
                about = [kinds[one.kind], one.address] + ([say("for everybody")] if one.shared else [])
                ui.label(" · ".join(about)).classes("muted")
                ui.label(state).classes("muted").props("role=status")
                if one.error:
                    ui.label(one.error).classes("wrong")
            if one.shared and not self._may_share:
                return
            name = one.name
            if not one.paused and one.kind != "search":
                icon_button("refresh", say("Refresh {name} now", name=name), partial(self._do, one, "refresh"))
            if one.paused:
                icon_button("play_arrow", say("Go on with {name}", name=name), partial(self._do, one, "go on"))
            else:
                icon_button("pause", say("Pause {name}", name=name), partial(self._do, one, "pause"))
            icon_button("delete", say("Remove {name}", name=name), partial(self._remove, one))

    async def _do(self, one: Source, what: str) -> None:
        try:
            if what == "refresh":
                await self._live.refresh(one.id)
            else:
                await self._live.change(one.id, paused=what == "pause")
        except (InputError, OperationError) as error:
            _tell(error)
        self._draw()

    async def _remove(self, one: Source) -> None:
        if not await ask(say("Remove {name}?", name=one.name), say("Remove")):
            return
        try:
            self._live.store.remove(one.id)
        except (InputError, OperationError) as error:
            _tell(error)
        self._draw()


def _state(one: Source) -> str:
    if one.paused:
        return say("paused")
    if one.kind == "search":
        return say("asked when a question is")
    if one.refreshing:
        return say("being refreshed")
    parts = [say("items: {count}", count=say_number(one.items))]
    if one.refreshed is not None:
        parts.append(say("refreshed {time}", time=say_time(one.refreshed)))
    wait = max(one.next_at - time.time(), 0) / 60
    parts.append(say("next in {minutes} min", minutes=say_number(wait)))
    return " · ".join(parts)


def _tell(error: Exception) -> None:
    ui.notify(str(error), position="top", type="negative", multi_line=True)
