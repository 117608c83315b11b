"""The dialog of a conversation's settings: its mode, its temperature, and the personas that a person has written."""

from __future__ import annotations

from functools import partial
from typing import Any

from nicegui import ui

from modelworks.assistant.chat import Assistant
from modelworks.assistant.personas import LONGEST_PROMPT, OWN, Persona
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.modes import FUN, REGULAR
from modelworks.web.dialogs import asking, icon_button
from modelworks.web.language import say


class Settings:
    """The dialog; `ask` shows it.

    Parameters
    ----------
    assistant
        Whose personas and modes there are.
    mode, temperature
        What is set now.
    kinds
        The kinds of modes that may be chosen.
    """

    def __init__(self, assistant: Assistant, mode: str, temperature: float | None, kinds: list[str]) -> None:
        self._assistant, self._kinds = assistant, kinds
        with asking(say("This conversation"), "asking settings") as self._dialog:
            self._mode = ui.select(self._modes(), label=say("Mode")).props(f'outlined dense aria-label="{say("Mode")}"')
            self._mode.set_value(mode if mode in self._modes() else REGULAR)
            self._own = ui.checkbox(say("Own temperature"), value=temperature is not None)
            with ui.element("div").classes("row-line").bind_visibility_from(self._own, "value"):
                self._slider = ui.slider(min=0, max=2, step=0.1, value=0.7 if temperature is None else temperature)
                self._slider.props(f'label aria-label="{say("Temperature")}"').classes("grow")
                ui.label().bind_text_from(self._slider, "value", lambda value: f"{value:.1f}").classes("muted")
            if OWN in kinds:
                self._personas = ui.element("div").classes("links")
                self._draw()
            with ui.element("div").classes("row-line").style("justify-content:flex-end;width:100%"):
                ui.button(say("Cancel"), on_click=self._dialog.close).props("flat no-caps color=grey")
                ui.button(say("Save"), on_click=lambda: self._dialog.submit(True)).props("unelevated no-caps")

    async def ask(self) -> tuple[str, float | None] | None:
        """The mode and the temperature that were chosen; None if the dialog was dismissed."""
        try:
            if not await self._dialog:
                return None
            return self._mode.value or REGULAR, float(self._slider.value) if self._own.value else None
        finally:
            if not self._dialog.is_deleted:
                self._dialog.delete()

    def _modes(self) -> dict[str, str]:
        own = {one.id: one.name for one in self._assistant.store.personas.all()} if OWN in self._kinds else {}
        ours = {REGULAR: say("Regular"), FUN: say("Fun")}
        return {mode: name for mode, name in ours.items() if mode in self._kinds} | own

    def _draw(self) -> None:
        self._personas.clear()
        with self._personas:
            for persona in self._assistant.store.personas.all():
                with ui.element("div").classes("link-row"):
                    ui.label(persona.name).classes("grow cut")
                    icon_button("edit", say("Edit {name}", name=persona.name), partial(self._edit, persona))
                    icon_button("delete", say("Remove {name}", name=persona.name), partial(self._remove, persona))
            ui.button(say("New persona"), icon="add", on_click=lambda: self._edit(None)).props("flat no-caps dense")

    def _edit(self, persona: Persona | None) -> None:
        self._personas.clear()
        with self._personas:
            name = ui.input(say("Name"), value=persona.name if persona else "").props("outlined dense maxlength=60")
            prompt = ui.textarea(say("What the model is told first"), value=persona.prompt if persona else "")
            prompt.props(f"outlined dense autogrow maxlength={LONGEST_PROMPT}")
            with ui.element("div").classes("row-line"):
                ui.button(say("Back"), on_click=self._draw).props("flat no-caps color=grey")
                ui.button(say("Keep persona"), on_click=lambda: self._keep(persona, name.value, prompt.value)).props(
                    "unelevated no-caps"
                )

    async def _keep(self, persona: Persona | None, name: str, prompt: str) -> None:
        personas = self._assistant.store.personas
        try:
            await self._assistant.may(OWN)
            kept = personas.create(name, prompt) if persona is None else personas.change(persona.id, name, prompt)
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="warning", multi_line=True)
            return
        self._show_modes(kept.id if persona is None else self._mode.value)

    def _remove(self, persona: Persona) -> None:
        self._assistant.store.personas.delete(persona.id)
        self._show_modes(REGULAR if self._mode.value == persona.id else self._mode.value)

    def _show_modes(self, chosen: Any) -> None:
        self._mode.set_options(self._modes(), value=chosen)
        self._draw()
