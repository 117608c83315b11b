"""The chat's switch to look things up in live sources; it is there where there are some."""

from __future__ import annotations

import asyncio

from nicegui import ui

from modelworks.assistant.chat import Assistant
from modelworks.assistant.talk import Conversation
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.language import say


class LookUp:
    """The switch of the conversation that a page shows.

    Parameters
    ----------
    assistant
        Whose sources they are.
    conversation
        The conversation, if there is one yet; a new one is looked up if there are sources, and no question is sent to a
        search engine for it.
    """

    def __init__(self, assistant: Assistant, conversation: Conversation | None) -> None:
        self._assistant = assistant
        self.conversation_id = conversation.id if conversation else None
        kinds = assistant.live.store.kinds() if assistant.live is not None else set()
        self.searched = "search" in kinds
        self.on = conversation.look_up if conversation else bool(kinds) and not self.searched
        self._there = bool(kinds) or self.on

    def button(self) -> None:
        """Draw it."""
        self._button = ui.button(icon="travel_explore", on_click=self._toggle).classes("look-up")
        self._button.set_visibility(self._there)
        self._draw()
        ui.timer(0, self._check, once=True)

    async def _check(self) -> None:
        """Take it away where the user's tier doesn't include it."""
        try:
            may = await self._assistant.may_look_up()
        except (InputError, OperationError):
            return
        if not may:
            self._button.set_visibility(False)

    def _draw(self) -> None:
        name = say("Look things up in the sources")
        self._button.props(f"flat round dense color={'primary' if self.on else 'grey'} aria-pressed={_word(self.on)}")
        self._button.props(f'aria-label="{name}" title="{name}"')

    async def _toggle(self) -> None:
        self.on = not self.on
        if self.conversation_id is not None:
            try:
                await asyncio.to_thread(self._assistant.store.change, self.conversation_id, look_up=self.on)
            except (InputError, OperationError) as error:
                self.on = not self.on
                ui.notify(str(error), position="top", type="negative", multi_line=True)
        self._draw()


def _word(value: bool) -> str:
    return str(value).lower()
