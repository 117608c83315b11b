"""Tools on the chat page: the calls of an answer, with their consent, and the switch of a conversation's tools.

Arguments and results are a model's or a stranger's words: always text, never HTML.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Literal

from nicegui import ui

from modelworks.assistant.calls import Call
from modelworks.assistant.tools.loop import Calling
from modelworks.assistant.tools.tool import Tool
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.dialogs import asking
from modelworks.web.language import say, say_number

Verdict = Literal["allow", "always", "refuse"]


class Calls:
    """The calls of one answer.

    Parameters
    ----------
    decide
        Takes the number of a call that waits, and what the person says to it.
    """

    def __init__(self, decide: Callable[[int, Verdict], Awaitable[None]]) -> None:
        self._decide = decide
        self._place = ui.element("div").classes("calls")
        self._drawn: dict[int, tuple[str, ui.element]] = {}

    def show(self, calls: Sequence[Call]) -> None:
        """Draw what has changed."""
        for call in calls:
            state, element = self._drawn.get(call.number, ("", None))
            if state == call.state:
                continue
            if element is None:
                with self._place:
                    element = ui.element("div").classes("call").props(f"data-call={call.number}")
            element.clear()
            with element:
                self._draw(call)
            self._drawn[call.number] = (call.state, element)

    def _draw(self, call: Call) -> None:
        words = [call.name, _state(call)]
        if call.seconds is not None:
            words.append(say("{seconds} s", seconds=say_number(call.seconds, 1)))
        with ui.expansion(" · ".join(words), icon="build", value=call.state == "waiting").classes("call-more"):
            ui.label(say("Arguments")).classes("muted")
            _code(call.arguments)
            if call.result:
                ui.label(say("Result")).classes("muted")
                _code(call.result)
        if call.state == "waiting":
            with ui.element("div").classes("row-line").props("role=alert"):
                ui.label(say("The model asks to call {name}.", name=call.name)).classes("grow")
                for words_of, verdict in _verdicts():
                    button = ui.button(words_of, on_click=partial(self._decide, call.number, verdict))
                    button.props("no-caps dense " + ("unelevated" if verdict == "allow" else "flat"))


def _verdicts() -> list[tuple[str, Verdict]]:
    return [(say("Allow"), "allow"), (say("Always in this conversation"), "always"), (say("Refuse"), "refuse")]


def _about() -> dict[str, str]:
    """Our own tools in a reader's words; what models are told of them is longer, and English."""
    return {
        "calculator": say("Computes exactly."),
        "now": say("Tells the date and the time."),
        "search_documents": say("Looks for passages in this conversation's documents."),
        "python": say("Runs programs in a sandbox, without network and files of yours."),
    }


def _state(call: Call) -> str:
    return {
        "waiting": say("waiting"),
        "allowed": say("allowed"),
        "running": say("running"),
        "done": say("done"),
        "failed": say("failed"),
        "refused": say("refused"),
        "stopped": say("stopped"),
    }[call.state]


def _code(text: str) -> None:
    with ui.element("pre").style(
        "white-space:pre-wrap;overflow-wrap:anywhere;max-height:20em;overflow:auto;margin:4px 0"
    ):
        ui.label(text).style("white-space:pre-wrap;font-family:monospace;font-size:0.85em")


class ToolSwitch:
    """The button that opens a conversation's tools.

    Parameters
    ----------
    calling
        The server's tools, and where choices are kept.
    conversation
        Gives the id of the conversation, if there is one yet.
    begin
        Gives that of a conversation that is begun if there is none.
    """

    def __init__(
        self, calling: Calling, conversation: Callable[[], str | None], begin: Callable[[], Awaitable[str | None]]
    ) -> None:
        self._calling, self._conversation, self._begin = calling, conversation, begin
        self._button = (
            ui.button(icon="build", on_click=self._open)
            .classes("attach")
            .props(f'flat round dense color=grey aria-label="{say("Tools")}" title="{say("Tools")}"')
        )
        self._colour()

    async def _open(self) -> None:
        tools = await self._calling.toolbox.tools()
        conversation = self._conversation()
        on = set(self._calling.store.chosen(conversation).on) if conversation else set()
        with asking(say("Tools of this conversation")) as dialog:
            boxes = [(tool, self._box(tool, tool.name in on)) for tool in tools]
            for reason in await self._calling.toolbox.missing():
                ui.label(reason).classes("muted")
            with ui.element("div").classes("row-line").style("justify-content:flex-end;width:100%"):
                ui.button(say("Cancel"), on_click=dialog.close).props("flat no-caps color=grey")
                ui.button(say("Save"), on_click=lambda: dialog.submit(True)).props("unelevated no-caps")
        try:
            if await dialog:
                await self._keep([tool.name for tool, box in boxes if box.value])
        finally:
            if not dialog.is_deleted:
                dialog.delete()

    def _box(self, tool: Tool, on: bool) -> ui.checkbox:
        box = ui.checkbox(tool.name, value=on)
        ui.label(_about().get(tool.name, tool.description)).classes("muted").style("margin-left:40px")
        if tool.asks:
            ui.label(say("Asks before each call")).classes("muted").style("margin-left:40px")
        return box

    async def _keep(self, names: list[str]) -> None:
        conversation = await self._begin()
        if conversation is None:
            return
        try:
            self._calling.store.turn_on(conversation, names)
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
        self._colour()

    def _colour(self) -> None:
        conversation = self._conversation()
        on = bool(conversation and self._calling.store.chosen(conversation).on)
        self._button.props(f"color={'primary' if on else 'grey'}")
