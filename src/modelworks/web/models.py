"""The page of models: those that can be talked to, those that can be fetched, and the catalog's architectures."""

from __future__ import annotations

import asyncio
import html

from fastapi import Request
from nicegui import ui

from modelworks.serve.download import Source, sources
from modelworks.serve.store import ServedModel
from modelworks.spec import catalog, model_spec
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.dialogs import ask, icon_button
from modelworks.web.frame import frame
from modelworks.web.services import Services
from modelworks.web.words import count, size

REFRESH_S = 1.0


def register(services: Services) -> None:
    """Add the page ``/models``."""

    @ui.page("/models")
    def models(request: Request) -> None:
        with frame(request, services, "/models", "Models") as side:
            with side.bar:
                ui.html("<h1>Models</h1>")
            with ui.element("div").classes("sheet"):
                ModelList(services)
                _catalog()


class ModelList:
    """The models on this machine and on their way here."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._shown: object = None
        self._place = ui.element("div").style("display:flex;flex-direction:column;gap:12px")
        self._refresh()
        ui.timer(REFRESH_S, self._refresh)

    def _refresh(self) -> None:
        models = self._services.store.list()
        pulls = {name: (pull.done, pull.total, pull.error) for name, pull in self._services.pulls.items()}
        if (models, pulls) == self._shown:
            return
        self._shown = (models, pulls)
        self._place.clear()
        with self._place:
            ui.html("<h2>On this machine</h2>")
            for model in models:
                self._served(model)
            here = {model.name for model in models}
            absent = [source for name, source in sources().items() if name not in here]
            for source in absent:
                self._absent(source)
            if not models and not absent:
                ui.label("None yet. A finished run is released to here.").classes("lead")

    def _served(self, model: ServedModel) -> None:
        with ui.element("div").classes("panel row-line"):
            with ui.element("div").style("flex:1 1 260px;min-width:0"):
                ui.label(model.name).style("font-weight:600;overflow-wrap:anywhere")
                context = f"context of {model.context:,} tokens"
                ui.label(f"{size(model.bytes)} · {context} · {model.license} · {model.source}").classes("muted").style(
                    "overflow-wrap:anywhere"
                )
            try:
                self._services.store.base(model)
            except InputError:
                ui.label(f"needs the {model.adapts} that it was made for").classes("muted")
            else:
                button = ui.button("Chat with it", on_click=lambda: ui.navigate.to(f"/?model={model.name}"))
                button.props("flat no-caps dense padding='4px 12px'").classes("quiet")
            icon_button("delete_outline", f"Remove {model.name}", lambda: self._remove(model))

    def _absent(self, source: Source) -> None:
        pull = self._services.pulls.get(source.name)
        with ui.element("div").classes("panel row-line"):
            with ui.element("div").style("flex:1 1 260px;min-width:0"):
                ui.label(source.name).style("font-weight:600")
                ui.label(f"{source.title} · {size(source.bytes)} · {source.license}").classes("muted")
                if pull is not None and pull.error:
                    ui.label(pull.error).classes("notice bad")
                elif pull is not None:
                    ui.linear_progress(pull.fraction, show_value=False, size="6px").props("instant-feedback rounded")
            if pull is None or pull.error:
                button = ui.button("Fetch", icon="download", on_click=lambda: self._services.pull(source.name))
                button.props("flat no-caps dense padding='4px 12px'").classes("quiet")
            else:
                ui.label(f"{pull.fraction:.0%}").classes("muted")

    async def _remove(self, model: ServedModel) -> None:
        if not await ask(f"Remove {model.name}?", "Remove", note=f"Its file of {size(model.bytes)} is deleted."):
            return
        try:
            await asyncio.to_thread(self._services.store.remove, model.name)
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative")
        self._refresh()


def _catalog() -> None:
    """The architectures that a run can be planned and trained with."""
    rows = []
    for name in catalog.names("models"):
        spec = model_spec(name)
        experts = f"{spec.moe.experts}, top {spec.moe.top_k}" if spec.moe else "–"
        cells = [count(spec.parameters.total), count(spec.parameters.active), str(spec.layers), f"{spec.hidden:,}"]
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in [*cells, f"{spec.context:,}"])
        rows.append(f"<tr><td><b>{html.escape(name)}</b></td>{numbers}<td>{experts}</td></tr>")
    heads = "".join(
        f'<th class="number">{head}</th>' for head in ("Parameters", "Active", "Layers", "Width", "Context")
    )
    ui.html("<h2>Catalog</h2>").style("margin-top:14px")
    ui.html("<p class='lead'>Architectures to plan and to train with: <code>model = \"NAME\"</code> in a run spec.</p>")
    table = f"<table><thead><tr><th>Name</th>{heads}<th>Experts</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    ui.html(table).classes("panel grid-table").props("tabindex=0")
