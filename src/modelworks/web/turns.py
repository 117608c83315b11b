"""One turn of a conversation on the page: what a person wrote, what a model answers, and the buttons below.

A growing answer is drawn in blocks. A finished block is never drawn again, so that a long answer costs no more per
word than a short one, and what the reader has selected stays selected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Protocol

from nicegui import ui

from modelworks.assistant.calls import Call
from modelworks.assistant.chat import Answer
from modelworks.assistant.documents.store import Passage
from modelworks.assistant.talk import Message, goes_on
from modelworks.web.calls import Calls, Verdict
from modelworks.web.dialogs import icon_button
from modelworks.web.documents import CLICKED, cited, draw_sources, open_passage
from modelworks.web.language import say
from modelworks.web.markdown import render, split_stable


class Actions(Protocol):
    """What a turn's buttons do."""

    async def edit(self, message: Message, text: str) -> bool:
        """Ask again with another text; whether that began."""

    async def regenerate(self, message: Message) -> None:
        """Answer once more."""

    async def resume(self, message: Message) -> None:
        """Go on with an answer that was cut short."""

    async def decide(self, message: Message, number: int, verdict: Verdict) -> None:
        """Answer a call of a tool that waits for consent."""

    def sources(self, message: Message) -> dict[int, Passage]:
        """The passages of documents that an answer was given."""

    async def show(self, message_id: int) -> None:
        """Show another version."""


class UserTurn:
    """What a person wrote."""

    def __init__(self, message: Message, actions: Actions) -> None:
        self._message, self._actions = message, actions
        self._turn = ui.element("div").classes("turn user").props(f"data-message={message.id}")
        self._draw()

    def _draw(self) -> None:
        self._turn.clear()
        with self._turn:
            ui.label(self._message.content).classes("bubble")
            with ui.element("div").classes("tools"):
                _versions(self._message, self._actions)
                icon_button("content_copy", say("Copy"), lambda: copy(self._message.content))
                icon_button("edit", say("Edit"), self._edit)

    def _edit(self) -> None:
        async def send() -> None:
            await self._actions.edit(self._message, field.value)

        self._turn.clear()
        with self._turn:
            field = ui.textarea(value=self._message.content).props(
                f'outlined autogrow autofocus aria-label="{say("Edit")}"'
            )
            field.style("width:100%")
            with ui.element("div").classes("row-line"):
                ui.button(say("Cancel"), on_click=self._draw).props("flat no-caps color=grey")
                ui.button(say("Send"), on_click=send).props("unelevated no-caps")


class ModelTurn:
    """What a model said, or is saying."""

    def __init__(self, message: Message, actions: Actions, answer: Answer | None = None) -> None:
        self._message, self._actions = message, actions
        self._drawn = ""
        with ui.element("div").classes("turn model").props(f"data-message={message.id}"):
            ui.label(message.model or "").classes("who")
            self._calls = Calls(lambda number, verdict: actions.decide(message, number, verdict))
            self._said = ui.element("div").classes("said")
            self._said.on("click", lambda event: self._open(event.args), js_handler=CLICKED)
            with self._said:
                self._live = ui.html("", tag="div")
            self._waiting = ui.html('<span class="waiting"><i></i><i></i><i></i></span>', sanitize=False)
            self._waiting.props(f'role=status aria-label="{say("The model is reading")}"')
            self._end = ui.element("div")
        self._done = 0
        self._sources: dict[int, Passage] | None = None
        if answer is None:
            self.grow(message.content, message.calls)
            self.end(message.content, message.state, message.notice)
        else:
            self.grow(answer.text, answer.calls)

    def grow(self, text: str, calls: Sequence[Call] = ()) -> None:
        """Draw what has been said and asked for so far."""
        self._calls.show(calls)
        if text == self._drawn:
            return
        self._drawn = text
        self._waiting.set_visibility(not text)
        blocks, rest = split_stable(text[self._done :])
        for block in blocks:
            self._live.set_content(self._rendered(block))
            self._done += len(block)
            with self._said:
                self._live = ui.html("", tag="div")
        self._live.set_content(self._rendered(rest))

    def _rendered(self, text: str) -> str:
        return cited(render(text), self._given())

    def _given(self) -> dict[int, Passage]:
        """What the answer was given of documents; it is known when its first words are."""
        if self._sources is None:
            self._sources = self._actions.sources(self._message)
        return self._sources

    def _open(self, number: int) -> None:
        if number in self._given():
            open_passage(number, self._given()[number])

    def end(self, text: str, state: str, notice: str | None, rate: str = "") -> None:
        """Draw what stands below an answer that has ended."""
        self._waiting.set_visibility(False)
        self._end.clear()
        with self._end:
            if state == "failed":
                ui.label(notice or say("The answer failed.")).classes("notice bad").props("role=alert")
            elif state == "interrupted":
                ui.label(say("Interrupted: the server ended while this was being written.")).classes("notice")
            elif notice:
                ui.label(notice).classes("notice")
            draw_sources(self._given(), text)
            with ui.element("div").classes("tools"):
                _versions(self._message, self._actions)
                if text:
                    icon_button("content_copy", say("Copy"), lambda: copy(text))
                icon_button("refresh", say("Answer again"), lambda: self._actions.regenerate(self._message))
                if goes_on(state, notice):
                    icon_button("play_arrow", say("Go on"), lambda: self._actions.resume(self._message))
                if state == "stopped":
                    ui.label(say("Stopped")).classes("rate")
                if rate:
                    ui.label(rate).classes("rate")


def copy(text: str) -> None:
    """Put a text on the clipboard of the browser."""
    ui.run_javascript(f"modelworks.copy({json.dumps(text)})")
    ui.notify(say("Copied"), timeout=900)


def _versions(message: Message, actions: Actions) -> None:
    if len(message.versions) < 2:
        return
    place = message.versions.index(message.id)

    def turn_to(step: int) -> Callable[[], object]:
        return lambda: actions.show(message.versions[place + step])

    back = icon_button("chevron_left", say("Earlier version"), turn_to(-1))
    back.set_enabled(place > 0)
    ui.label(f"{place + 1}/{len(message.versions)}")
    forth = icon_button(
        "chevron_right", say("Later version"), turn_to(1) if place + 1 < len(message.versions) else list
    )
    forth.set_enabled(place + 1 < len(message.versions))
