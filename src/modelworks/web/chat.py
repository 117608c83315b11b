"""The chat page: a conversation, the models to talk to, and the line to write on.

The page watches and asks; answers live in `assistant.chat` and go on when the page is closed. What is typed is kept
by the browser until the server has stored it.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

from fastapi import Request
from nicegui import ui

from modelworks.assistant.chat import Answer
from modelworks.assistant.documents.store import Passage
from modelworks.assistant.talk import Conversation, Message
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.modes import REGULAR
from modelworks.web.calls import ToolSwitch, Verdict
from modelworks.web.dialogs import icon_button
from modelworks.web.documents import Shelf
from modelworks.web.frame import Side, frame
from modelworks.web.language import say, say_number
from modelworks.web.lookup import LookUp
from modelworks.web.services import Services
from modelworks.web.settings import Settings
from modelworks.web.turns import ModelTurn, UserTurn

FIRST_MODEL = "smollm2-135m"
"""The model that can be talked to from the start."""
FIRST_CHOICES = ("smollm2-135m-character", FIRST_MODEL)
"""What answers where nothing else was chosen; the first of these that is there."""
WATCH_S = 0.05
"""How often a growing answer is drawn."""
LOOK_S = 1.5
"""How often the models and the other pages' doings are looked at."""
FIRST_TURNS, MORE_TURNS = 20, 20
"""How many turns are drawn at first (the last ones), and each time that the reader comes near their beginning."""
LONGEST = 250_000
"""Characters that can be typed: the page's connection takes a million bytes at once. A long text becomes a document."""
_ENTER = """(event) => {
  const composing = event.isComposing || event.keyCode === 229; // some browsers say the first too late
  if (event.key !== "Enter" || event.shiftKey || composing || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  emit(event.target.value);
}"""
_PRESSED = """(event) => {
  if (event.detail < 2) emit(); // the second click of two would stop what the first has begun
}"""


def register(services: Services) -> None:
    """Add the chat's pages: ``/`` and ``/c/ID``."""

    @ui.page("/")
    async def new_chat(request: Request, model: str = "") -> None:
        own = services.of(request)
        names = await _names(own)
        with frame(request, own, "/", say("Chat")) as side:
            ChatPage(own, side, None, model, names)

    @ui.page("/c/{conversation_id}")
    async def conversation(request: Request, conversation_id: str, message: int | None = None) -> None:
        own = services.of(request)
        try:
            found = own.assistant.store.conversation(conversation_id)
            if message is not None:
                with suppress(InputError):  # it was found, and has been removed since
                    own.assistant.store.show_if_hidden(conversation_id, message)
        except InputError:
            with frame(request, own, "/", say("Chat")), ui.element("div").classes("empty"):
                with ui.element("h2"):
                    ui.label(say("This conversation isn't here"))
                ui.label(say("It was deleted, or the address is another server's."))
                ui.link(say("Begin a new one"), "/")
            return
        names = await _names(own)
        with frame(request, own, "/", found.title, conversation_id) as side:
            ChatPage(own, side, found, "", names, message)


async def _names(services: Services) -> dict[str, str]:
    """The models that can be talked to now, and what people are shown for each; none while that can't be said."""
    try:
        return {model.name: model.title or model.name for model in await services.assistant.engine.models()}
    except (InputError, OperationError):
        return {}


def _ideas() -> list[str]:
    return [
        say("Explain what a language model is"),
        say("Write a Python function that reverses a list"),
        say("Tell me a short story"),
    ]


class ChatPage:
    """One open page."""

    def __init__(
        self,
        services: Services,
        side: Side,
        conversation: Conversation | None,
        model: str,
        names: dict[str, str],
        seen_id: int | None = None,
    ) -> None:
        self._services, self._assistant, self._side = services, services.assistant, side
        self._id = conversation.id if conversation else None
        self._answer: Answer | None = None
        self._live: ModelTurn | None = None
        self._thread: list[Message] = []
        self._given: frozenset[int] = frozenset()
        self._undrawn = 0
        # Of a conversation that hasn't begun.
        self._mode = REGULAR
        self._temperature: float | None = None
        self._look_up = LookUp(services.assistant, conversation)
        self._titling = False
        self._sending = False
        self._pulls: list[tuple[str, int, int, str | None]] = []
        self._wanted = model or (conversation.model if conversation else self._last_model())
        with side.bar:
            self._picker = ui.select({}, on_change=self._choose).props(
                f'borderless dense options-dense hide-bottom-space aria-label="{say("Model")}"'
            )
            self._picker.classes("picker")
            icon_button("tune", say("Conversation settings"), self._settings)
        with ui.element("div").classes("chat"):
            self._banner = ui.element("div")
            scroll = ui.element("div").classes("thread")
            with scroll, ui.element("div").classes("column-text"):
                self._older = ui.element("button").classes("older").props("type=button")
                self._older.on("click", self._draw_older)
                with self._older:
                    ui.label(say("Earlier messages"))
                # Apart from the others: what was said long ago is not news to a screen reader.
                self._earlier = ui.element("div").classes("turns")
                self._turns = ui.element("div").classes("turns").props("aria-live=polite")
            ui.html(f'<button type="button" class="to-end" aria-label="{say("To the end")}">↓</button>', sanitize=False)
            self._compose()
        self._redraw(seen_id)
        self._show(names)
        ui.timer(LOOK_S, self._look, immediate=False)
        self._watch_timer = ui.timer(WATCH_S, self._watch, active=self._answer is not None)
        ui.timer(0, lambda: self._connected(scroll.html_id, seen_id), once=True)

    # --- drawing ---

    def _compose(self) -> None:
        with ui.element("div").classes("composer"):
            library = self._assistant.library
            shelf = Shelf(library, lambda: self._id, self._begin_conversation) if library is not None else None
            with ui.element("div").classes("composer-box"):
                if shelf is not None:
                    shelf.button()
                self._look_up.button()
                if self._assistant.calling is not None:
                    ToolSwitch(self._assistant.calling, lambda: self._id, self._begin_conversation)
                self._field = ui.textarea(placeholder=say("Write a message")).props(
                    f'autogrow borderless dense autofocus input-style="resize:none" maxlength={LONGEST} '
                    f'aria-label="{say("Message")}"'
                )
                self._field.on("keydown", lambda event: self._send(event.args), js_handler=_ENTER)
                self._field.on("update:model-value", js_handler="(value) => modelworks.draftSaved(value)")
                self._button = ui.button(icon="arrow_upward").on("click", self._send_or_stop, js_handler=_PRESSED)
                self._button.props(f'round unelevated dense aria-label="{say("Send")}"').classes("send")
            ui.label(say("Models make mistakes. Small ones make more.")).classes("hint")

    def _redraw(self, seen_id: int | None = None) -> None:
        """Draw the end of the branch that is shown, from a message on that is to be seen."""
        self._thread = self._assistant.store.thread(self._id) if self._id else []
        self._answer = self._assistant.running(self._id) if self._id else None
        self._live = None
        library = self._assistant.library
        self._given = library.store.given(self._id) if library is not None and self._id else frozenset()
        seen = [place for place, message in enumerate(self._thread) if message.id == seen_id]
        self._undrawn = min(max(len(self._thread) - FIRST_TURNS, 0), *seen, len(self._thread))
        self._earlier.clear()
        self._turns.clear()
        with self._turns:
            if not self._thread:
                self._empty()
            for message in self._thread[self._undrawn :]:
                self._turn(message)
        self._older.set_visibility(self._undrawn > 0)
        self._set_button()

    def _draw_older(self) -> None:
        """Draw some of the turns before the first one that is drawn."""
        begin = max(self._undrawn - MORE_TURNS, 0)
        with self._earlier, ui.element("div").classes("turns") as turns:
            for message in self._thread[begin : self._undrawn]:
                self._turn(message)
        turns.move(target_index=0)
        self._undrawn = begin
        self._older.set_visibility(begin > 0)

    def _turn(self, message: Message) -> None:
        if message.role == "user":
            UserTurn(message, self)
        elif self._answer is not None and message.id == self._answer.message.id:
            self._live = ModelTurn(message, self, self._answer)
        else:
            ModelTurn(message, self)

    def _empty(self) -> None:
        with ui.element("div").classes("empty"):
            with ui.element("h2"):
                ui.label(say("What would you like to know?"))
            if self._services.members is None:
                calling = self._assistant.calling
                out = self._look_up.searched or (calling is not None and calling.toolbox.reaches_out)
                inside = say("A model answers on this machine. Nothing leaves it.")
                ui.label(say("A model answers on this machine.") if out else inside)
            with ui.element("div").classes("ideas"):
                for idea in _ideas():
                    button = ui.element("button").classes("idea").props("type=button")
                    button.on("click", lambda _, idea=idea: self._send(idea))
                    with button:
                        ui.label(idea)

    def _set_button(self) -> None:
        answering = self._answer is not None
        self._turns.props(f"aria-busy={str(answering).lower()}")  # an answer is read out when it is whole
        self._button.props(
            f'icon={"stop" if answering else "arrow_upward"} aria-label="{say("Stop") if answering else say("Send")}"'
        )

    # --- what the user does ---

    async def _connected(self, region: str, seen_id: int | None) -> None:
        draft = await ui.run_javascript(
            f"modelworks.follow({json.dumps(region)}, {json.dumps(seen_id)}); return modelworks.draft()", timeout=5
        )
        if draft and not self._field.value:
            self._field.value = draft

    async def _send_or_stop(self) -> None:
        if self._answer is not None and self._id is not None:
            await self._assistant.stop(self._id)
            self._watch()
        else:
            await self._send(self._field.value)

    async def _send(self, text: str) -> None:
        if self._answer is not None or self._sending:
            return
        if not (text or "").strip():
            ui.notify(say("There is nothing to send yet."), position="top")
            return
        parent_id = self._thread[-1].id if self._thread else None
        self._sending = True
        try:
            sent = await self._ask(text, parent_id)
        finally:
            self._sending = False
        if sent:
            ui.run_javascript("modelworks.draftSaved('')")
            self._remember_address()
            ui.run_javascript(f"modelworks.sent({json.dumps(text)})")

    async def _ask(self, text: str, parent_id: int | None) -> bool:
        """Store a question and watch its answer; whether that began. What can't be sent stays where it was typed."""
        model = self._model_here()
        if model is None:
            return False
        try:
            if self._id is None:
                self._id = self._assistant.store.create(
                    model, self._mode, self._temperature, look_up=self._look_up.on
                ).id
            await self._assistant.ask(self._id, text, parent_id, model)
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
            return False
        self._begin()
        return True

    def _model_here(self) -> str | None:
        """The model that is chosen, and stays it from now on; that there is none is said."""
        self._wanted = self._picker.value or self._wanted
        if not self._picker.value:
            ui.notify(say("There is no model to answer yet; Models has one to fetch."), type="warning", position="top")
        return self._picker.value or None

    async def _begin_conversation(self) -> str | None:
        """The conversation of this page, begun if there is none: documents are dropped before a word is said."""
        if self._id is None:
            model = self._model_here()
            if model is None:
                return None
            self._id = self._assistant.store.create(model, self._mode, self._temperature, look_up=self._look_up.on).id
            self._side.talks.conversation_id = self._look_up.conversation_id = self._id
            self._side.talks.refresh()
            # What is being written moves to the new address.
            ui.run_javascript("modelworks.draftSaved('')")
            self._remember_address()
            ui.run_javascript(f"modelworks.draftSaved({json.dumps(self._field.value or '')})")
        return self._id

    async def decide(self, message: Message, number: int, verdict: Verdict) -> None:
        """Answer a call of a tool that waits for consent."""
        if self._id is None:
            return
        try:
            await self._assistant.decide(self._id, message.id, number, verdict)
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
            return
        if self._answer is None:
            self._redraw()
            self._watch_timer.active = self._answer is not None

    def sources(self, message: Message) -> dict[int, Passage]:
        """The passages of documents that an answer was given."""
        writing = self._answer is not None and self._answer.message.id == message.id
        if self._assistant.library is None or self._id is None or not (writing or message.id in self._given):
            return {}
        return self._assistant.library.store.sources(self._id, message.id)

    async def edit(self, message: Message, text: str) -> bool:
        """Ask a question again in other words; the first ones stay as an earlier version."""
        return await self._ask(text, message.parent_id)

    async def regenerate(self, message: Message) -> None:
        """Answer a question once more; the first answer stays as an earlier version."""
        if self._id is None or message.parent_id is None:
            return
        try:
            await self._assistant.answer(self._id, message.parent_id, self._picker.value or message.model or "")
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
            return
        self._begin()

    async def resume(self, message: Message) -> None:
        """Go on with an answer that was cut short, where it stands."""
        if self._id is None:
            return
        try:
            await self._assistant.resume(self._id, message.id)
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
            return
        self._redraw()
        self._watch_timer.active = self._answer is not None

    async def show(self, message_id: int) -> None:
        """Show another version of a message, with what follows it."""
        if self._id is not None:
            self._assistant.store.show(self._id, message_id)
            self._redraw(message_id)

    async def _settings(self) -> None:
        store = self._assistant.store
        now = store.conversation(self._id) if self._id is not None else None
        mode, temperature = (now.mode, now.temperature) if now is not None else (self._mode, self._temperature)
        try:
            chosen = await Settings(self._assistant, mode, temperature, await self._assistant.modes()).ask()
            if chosen is None:
                return
            await self._assistant.may(chosen[0])
            self._mode, self._temperature = chosen
            if self._id is not None:
                store.change(self._id, mode=self._mode, temperature=self._temperature)
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)

    def _choose(self) -> None:
        self._wanted = self._picker.value or self._wanted
        if self._id is not None and self._picker.value:
            self._assistant.store.choose_model(self._id, self._picker.value)

    # --- what happens ---

    def _begin(self) -> None:
        """Show what has been added, and watch the answer."""
        assert self._id is not None
        known = [message.id for message in self._thread]
        thread = self._assistant.store.thread(self._id)
        self._answer = self._assistant.running(self._id)
        scrolled = bool(self._earlier.default_slot.children)  # far up; a new question is drawn with the end alone
        if known and not scrolled and [message.id for message in thread[: len(known)]] == known:
            with self._turns:
                for message in thread[len(known) :]:
                    self._turn(message)
            self._thread = thread
            self._set_button()
        else:
            self._redraw()
        self._side.talks.conversation_id = self._id
        self._look_up.conversation_id = self._id
        self._side.talks.refresh()
        self._watch_timer.active = self._answer is not None

    def _watch(self) -> None:
        """Draw what has been said since the last look."""
        answer, live = self._answer, self._live
        if answer is None or live is None:
            self._watch_timer.active = False
            return
        live.grow(answer.text, answer.calls)
        if answer.finished.is_set():
            rate = ""
            if answer.tokens and answer.seconds:
                rate = say("{rate} tokens/s", rate=say_number(answer.tokens / answer.seconds))
            live.end(answer.text, answer.state, answer.notice, rate)
            self._answer = self._live = None
            self._titling = True
            self._thread = self._assistant.store.thread(self._id) if self._id else []
            self._set_button()

    async def _look(self) -> None:
        """Notice new models, a title that was found, and answers that another page asked for."""
        if self._titling and self._id is not None and not self._assistant.titling(self._id):
            self._titling = False
            self._side.talks.refresh()
        await self._catch_up()
        self._show(await _names(self._services))

    async def _catch_up(self) -> None:
        """Draw what another page has added since, so that the next question doesn't stand beside it."""
        if self._id is None or self._answer is not None or self._sending or self._assistant.running(self._id):
            return
        with suppress(InputError, OperationError):  # removed on another page: the next thing that is done here says so
            leaf_id = (await asyncio.to_thread(self._assistant.store.conversation, self._id)).leaf_id
            shown = self._thread[-1].id if self._thread else None
            if leaf_id != shown and self._answer is None and not self._sending:
                self._begin()

    def _show(self, names: dict[str, str]) -> None:
        if names != self._picker.options:
            self._picker.set_options(names)
        wanted, chosen = self._wanted, self._picker.value
        if wanted in names:
            chosen = wanted
        elif chosen not in names:
            chosen = next((name for name in (*FIRST_CHOICES, *names) if name in names), None)
        if chosen != self._picker.value:
            self._picker.value = chosen
            self._wanted = wanted  # it may still be on its way here
        self._draw_banner()
        if self._id and self._answer is None and self._assistant.running(self._id):
            self._redraw()
            self._watch_timer.active = True

    def _draw_banner(self) -> None:
        pulls = [(pull.name, pull.done, pull.total, pull.error) for pull in self._services.pulls.values()]
        if pulls == self._pulls:
            return
        self._pulls = pulls
        self._banner.clear()
        with self._banner:
            for pull in self._services.pulls.values():
                with ui.element("div").classes("banner").props("role=status"):
                    if pull.error:
                        ui.label(say("{name} could not be fetched: {reason}", name=pull.name, reason=pull.error))
                        ui.button(say("Try again"), on_click=lambda _, p=pull: self._services.pull(p.name)).props(
                            "flat dense no-caps"
                        )
                    else:
                        done, total = say_number(pull.done / 1e6), say_number(pull.total / 1e6)
                        ui.label(say("Fetching {name}: {done} of {total} MB", name=pull.name, done=done, total=total))
                        ui.linear_progress(pull.fraction, show_value=False).props("instant-feedback")

    def _last_model(self) -> str:
        latest = self._assistant.store.conversations()
        return latest[0].model if latest else FIRST_CHOICES[0]

    def _remember_address(self) -> None:
        if self._id is not None:
            ui.navigate.history.replace(f"/c/{self._id}")
