"""One turn of a conversation on the page: what a person wrote, what a model answers, and the buttons below.

A growing answer is drawn in blocks. A finished block is never drawn again, so that a long answer costs no more per
word than a short one, and what the reader has selected stays selected.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

from nicegui import ui

from modelworks.assistant.chat import Answer
from modelworks.assistant.store import CUT_SHORT, Message
from modelworks.web.frame import icon_button
from modelworks.web.markdown import render, split_stable


class Actions(Protocol):
    """What a turn's buttons do."""

    async def edit(self, message: Message, text: str) -> bool:
        """Ask again with another text; whether that began."""

    async def regenerate(self, message: Message) -> None:
        """Answer once more."""

    async def resume(self, message: Message) -> None:
        """Go on with an answer that was cut short."""

    async def show(self, message_id: int) -> None:
        """Show another version."""


class UserTurn:
    """What a person wrote."""

    def __init__(self, message: Message, actions: Actions) -> None:
        self._message, self._actions = message, actions
        self._turn = ui.element("div").classes("turn user")
        self._draw()

    def _draw(self) -> None:
        self._turn.clear()
        with self._turn:
            ui.label(self._message.content).classes("bubble")
            with ui.element("div").classes("tools"):
                _versions(self._message, self._actions)
                icon_button("content_copy", "Copy", lambda: copy(self._message.content))
                icon_button("edit", "Edit", self._edit)

    def _edit(self) -> None:
        async def send() -> None:
            await self._actions.edit(self._message, field.value)

        self._turn.clear()
        with self._turn:
            field = ui.textarea(value=self._message.content).props('outlined autogrow autofocus aria-label="Edit"')
            field.style("width:100%")
            with ui.element("div").classes("row-line"):
                ui.button("Cancel", on_click=self._draw).props("flat no-caps color=grey")
                ui.button("Send", on_click=send).props("unelevated no-caps")


class ModelTurn:
    """What a model said, or is saying."""

    def __init__(self, message: Message, actions: Actions, answer: Answer | None = None) -> None:
        self._message, self._actions = message, actions
        self._drawn = ""
        with ui.element("div").classes("turn model"):
            ui.label(message.model or "").classes("who")
            self._said = ui.element("div").classes("said")
            with self._said:
                self._live = ui.html("", tag="div")
            self._waiting = ui.html('<span class="waiting"><i></i><i></i><i></i></span>', sanitize=False)
            self._waiting.props('role=status aria-label="The model is reading"')
            self._end = ui.element("div")
        self._done = 0
        if answer is None:
            self.grow(message.content)
            self.end(message.content, message.state, message.notice)
        else:
            self.grow(answer.text)

    def grow(self, text: str) -> None:
        """Draw what has been said so far."""
        if text == self._drawn:
            return
        self._drawn = text
        self._waiting.set_visibility(not text)
        blocks, rest = split_stable(text[self._done :])
        for block in blocks:
            self._live.set_content(render(block))
            self._done += len(block)
            with self._said:
                self._live = ui.html("", tag="div")
        self._live.set_content(render(rest))

    def end(self, text: str, state: str, notice: str | None, rate: str = "") -> None:
        """Draw what stands below an answer that has ended."""
        self._waiting.set_visibility(False)
        self._end.clear()
        with self._end:
            if state == "failed":
                ui.label(notice or "The answer failed.").classes("notice bad").props("role=alert")
            elif state == "interrupted":
                ui.label("Interrupted: the server ended while this was being written.").classes("notice")
            elif notice:
                ui.label(notice).classes("notice")
            with ui.element("div").classes("tools"):
                _versions(self._message, self._actions)
                if text:
                    icon_button("content_copy", "Copy", lambda: copy(text))
                icon_button("refresh", "Answer again", lambda: self._actions.regenerate(self._message))
                if state in CUT_SHORT:
                    icon_button("play_arrow", "Go on", lambda: self._actions.resume(self._message))
                if state == "stopped":
                    ui.label("Stopped").classes("rate")
                if rate:
                    ui.label(rate).classes("rate")


def copy(text: str) -> None:
    """Put a text on the clipboard of the browser."""
    ui.run_javascript(f"modelworks.copy({json.dumps(text)})")
    ui.notify("Copied", timeout=900)


def _versions(message: Message, actions: Actions) -> None:
    if len(message.versions) < 2:
        return
    place = message.versions.index(message.id)

    def turn_to(step: int) -> Callable[[], object]:
        return lambda: actions.show(message.versions[place + step])

    back = icon_button("chevron_left", "Earlier version", turn_to(-1))
    back.set_enabled(place > 0)
    ui.label(f"{place + 1}/{len(message.versions)}")
    forth = icon_button("chevron_right", "Later version", turn_to(1) if place + 1 < len(message.versions) else list)
    forth.set_enabled(place + 1 < len(message.versions))
