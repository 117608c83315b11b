"""The chat page: a conversation, the models to talk to, and the line to write on.

The page watches and asks; answers live in `assistant.chat` and go on when the page is closed. What is typed is kept
by the browser until the server has stored it.
"""

from __future__ import annotations

import json

from fastapi import Request
from nicegui import ui

from modelworks.assistant.chat import Answer
from modelworks.assistant.store import Conversation, Message
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.frame import Side, frame
from modelworks.web.services import Services
from modelworks.web.turns import ModelTurn, UserTurn

FIRST_MODEL = "smollm2-135m"
"""The model that can be talked to from the start."""
WATCH_S = 0.05
"""How often a growing answer is drawn."""
LOOK_S = 1.5
"""How often the models and the other pages' doings are looked at."""
_IDEAS = ["Explain what a language model is", "Write a Python function that reverses a list", "Tell me a short story"]
_ENTER = """(event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  emit(event.target.value);
}"""


def register(services: Services) -> None:
    """Add the chat's pages: ``/`` and ``/c/ID``."""

    @ui.page("/")
    async def new_chat(request: Request, model: str = "") -> None:
        own = services.of(request)
        names = await _names(own)
        with frame(request, own, "/", "Chat") as side:
            ChatPage(own, side, None, model, names)

    @ui.page("/c/{conversation_id}")
    async def conversation(request: Request, conversation_id: str) -> None:
        own = services.of(request)
        try:
            found = own.assistant.store.conversation(conversation_id)
        except InputError:
            with frame(request, own, "/", "Chat"), ui.element("div").classes("empty"):
                ui.html("<h2>This conversation isn't here</h2>")
                ui.label("It was deleted, or the address is another server's.")
                ui.link("Begin a new one", "/")
            return
        names = await _names(own)
        with frame(request, own, "/", found.title, conversation_id) as side:
            ChatPage(own, side, found, "", names)


async def _names(services: Services) -> list[str]:
    """The models that can be talked to now; none while that can't be said."""
    try:
        return [model.name for model in await services.assistant.engine.models()]
    except (InputError, OperationError):
        return []


class ChatPage:
    """One open page."""

    def __init__(
        self, services: Services, side: Side, conversation: Conversation | None, model: str, names: list[str]
    ) -> None:
        self._services, self._assistant, self._side = services, services.assistant, side
        self._id = conversation.id if conversation else None
        self._answer: Answer | None = None
        self._live: ModelTurn | None = None
        self._thread: list[Message] = []
        self._pulls: list[tuple[str, int, int, str | None]] = []
        self._wanted = model or (conversation.model if conversation else self._last_model())
        with side.bar:
            self._picker = ui.select([], on_change=self._choose).props(
                'borderless dense options-dense hide-bottom-space aria-label="Model"'
            )
            self._picker.classes("picker")
        with ui.element("div").classes("chat"):
            self._banner = ui.element("div")
            scroll = ui.element("div").classes("thread")
            with scroll:
                self._turns = ui.element("div").classes("column-text").props("aria-live=polite")
            ui.html('<button type="button" class="to-end" aria-label="To the end">↓</button>', sanitize=False)
            self._compose()
        self._redraw()
        self._show(names)
        ui.timer(LOOK_S, self._look, immediate=False)
        self._watch_timer = ui.timer(WATCH_S, self._watch, active=self._answer is not None)
        ui.timer(0, lambda: self._connected(scroll.html_id), once=True)

    # --- drawing ---

    def _compose(self) -> None:
        with ui.element("div").classes("composer"):
            with ui.element("div").classes("composer-box"):
                self._field = ui.textarea(placeholder="Write a message").props(
                    'autogrow borderless dense autofocus input-style="resize:none" aria-label="Message"'
                )
                self._field.on("keydown", lambda event: self._send(event.args), js_handler=_ENTER)
                self._field.on("update:model-value", js_handler="(value) => modelworks.draftSaved(value)")
                self._button = ui.button(icon="arrow_upward", on_click=self._send_or_stop)
                self._button.props('round unelevated dense aria-label="Send"').classes("send")
            ui.label("Models make mistakes. Small ones make more.").classes("hint")

    def _redraw(self) -> None:
        """Draw the whole branch that is shown."""
        self._thread = self._assistant.store.thread(self._id) if self._id else []
        self._answer = self._assistant.running(self._id) if self._id else None
        self._live = None
        self._turns.clear()
        with self._turns:
            if not self._thread:
                self._empty()
            for message in self._thread:
                self._turn(message)
        self._set_button()

    def _turn(self, message: Message) -> None:
        if message.role == "user":
            UserTurn(message, self)
        elif self._answer is not None and message.id == self._answer.message.id:
            self._live = ModelTurn(message, self, self._answer)
        else:
            ModelTurn(message, self)

    def _empty(self) -> None:
        with ui.element("div").classes("empty"):
            ui.html("<h2>What would you like to know?</h2>")
            if self._services.members is None:
                ui.label("A model answers on this machine. Nothing leaves it.")
            with ui.element("div").classes("ideas"):
                for idea in _IDEAS:
                    button = ui.element("button").classes("idea").props("type=button")
                    button.on("click", lambda _, idea=idea: self._send(idea))
                    with button:
                        ui.label(idea)

    def _set_button(self) -> None:
        answering = self._answer is not None
        self._button.props(
            f'icon={"stop" if answering else "arrow_upward"} aria-label="{"Stop" if answering else "Send"}"'
        )

    # --- what the user does ---

    async def _connected(self, region: str) -> None:
        draft = await ui.run_javascript(
            f"modelworks.follow({json.dumps(region)}); return modelworks.draft()", timeout=5
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
        if not (text or "").strip() or self._answer is not None:
            return
        parent_id = self._thread[-1].id if self._thread else None
        if await self._ask(text, parent_id):
            if self._field.value.strip() == text.strip():
                self._field.value = ""
            ui.run_javascript("modelworks.draftSaved('')")
            self._remember_address()

    async def _ask(self, text: str, parent_id: int | None) -> bool:
        """Store a question and watch its answer; whether that began. What can't be sent stays where it was typed."""
        model = self._picker.value
        if not model:
            ui.notify("There is no model to answer yet; Models has one to fetch.", type="warning", position="top")
            return False
        try:
            if self._id is None:
                self._id = self._assistant.store.create(model).id
            await self._assistant.ask(self._id, text, parent_id, model)
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
            return False
        self._begin()
        return True

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
            self._redraw()

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
        if known and [message.id for message in thread[: len(known)]] == known:
            with self._turns:
                for message in thread[len(known) :]:
                    self._turn(message)
            self._thread = thread
            self._set_button()
        else:
            self._redraw()
        self._side.conversation_id = self._id
        self._side.refresh()
        self._watch_timer.active = self._answer is not None

    def _watch(self) -> None:
        """Draw what has been said since the last look."""
        answer, live = self._answer, self._live
        if answer is None or live is None:
            self._watch_timer.active = False
            return
        live.grow(answer.text)
        if answer.finished.is_set():
            rate = f"{answer.tokens / answer.seconds:.0f} tokens/s" if answer.tokens and answer.seconds else ""
            live.end(answer.text, answer.state, answer.notice, rate)
            self._answer = self._live = None
            self._thread = self._assistant.store.thread(self._id) if self._id else []
            self._set_button()

    async def _look(self) -> None:
        """Notice new models, and answers that another page asked for."""
        self._show(await _names(self._services))

    def _show(self, names: list[str]) -> None:
        if names != self._picker.options:
            self._picker.set_options(names)
        if self._picker.value not in names:
            preferred = [name for name in (self._wanted, FIRST_MODEL) if name in names]
            self._picker.value = next(iter(preferred or names), None)
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
                        ui.label(f"{pull.name} could not be fetched: {pull.error}")
                        ui.button("Try again", on_click=lambda _, p=pull: self._services.pull(p.name)).props(
                            "flat dense no-caps"
                        )
                    else:
                        ui.label(f"Fetching {pull.name}: {pull.done / 1e6:.0f} of {pull.total / 1e6:.0f} MB")
                        ui.linear_progress(pull.fraction, show_value=False).props("instant-feedback")

    def _last_model(self) -> str:
        latest = self._assistant.store.conversations()
        return latest[0].model if latest else FIRST_MODEL

    def _remember_address(self) -> None:
        if self._id is not None:
            ui.navigate.history.replace(f"/c/{self._id}")
