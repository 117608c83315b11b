"""The frame around every page: the bar on top, the side with the conversations, the theme."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files

from fastapi import Request
from nicegui import ui

from modelworks import __version__
from modelworks.assistant.store import Conversation
from modelworks.spec.errors import InputError
from modelworks.web.services import Services
from modelworks.web.sign_in import ADMIN_PAGES

LOGO = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="var(--accent)" stroke-width="2" stroke-linecap="round" '
    'stroke-linejoin="round"><path d="M3 19V7l5 4 4-6 4 6 5-4v12z"/><path d="M8 19v-4M12 19v-6M16 19v-4"/></svg>'
)
FAVICON = LOGO.replace("var(--accent)", "#0f766e").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
_PAGES = [
    ("Chat", "/", "chat_bubble_outline"),
    ("Plan", "/plan", "calculate"),
    ("Supercomputer", "/supercomputer", "dns"),
    ("Runs", "/runs", "show_chart"),
    ("Models", "/models", "layers"),
    ("Administration", "/admin", "admin_panel_settings"),
]


@contextmanager
def frame(
    request: Request, services: Services, here: str, title: str, conversation_id: str | None = None
) -> Iterator[Side]:
    """Draw a page's frame; what is drawn in the block is the page's content.

    Parameters
    ----------
    here
        The path of the page in the side's list.
    title
        What the browser shows as the page's title.
    conversation_id
        The conversation that is shown, if one is.
    """
    services = services.of(request)
    set_title(title)
    ui.colors(primary="#0f766e", negative="#b3261e", warning="#b7791f")
    ui.add_head_html(f'<link rel="stylesheet" href="/_modelworks/{__version__}/style.css">')
    ui.add_head_html(f'<script src="/_modelworks/{__version__}/modelworks.js"></script>')
    theme = request.cookies.get("modelworks_theme")
    if theme in {"dark", "light"}:
        ui.dark_mode(theme == "dark")
    side = Side(services, here, conversation_id)
    with ui.header().classes("bar") as bar:
        ui.button(icon="menu", on_click=side.drawer.toggle).props('flat round dense color=grey aria-label="Menu"')
        side.bar = ui.element("div").classes("grow row-line").style("flex-wrap:nowrap;gap:8px")
        theme_button = ui.button(icon="contrast").props('flat round dense color=grey aria-label="Dark or light"')
        theme_button.on("click", js_handler="() => modelworks.theme()")
    bar.props(remove="elevated")
    yield side


def set_title(title: str) -> None:
    """What the browser shows as the page's title."""
    ui.page_title(f"{title} · Modelworks")


class Side:
    """The drawer: pages, and the conversations with what can be done to them."""

    def __init__(self, services: Services, here: str, conversation_id: str | None) -> None:
        self._services = services
        self.conversation_id = conversation_id
        self.bar: ui.element
        self.drawer = ui.left_drawer(fixed=True).props("width=272 breakpoint=900").classes("side")
        with self.drawer:
            ui.html(f"{LOGO}<span>Modelworks</span>", sanitize=False, tag="div").classes("brand")
            _link("New chat", "/", "edit_square", "nav primary")
            for name, path, icon in _pages_of(services):
                _link(name, path, icon, "nav here" if path == here else "nav")
            ui.label("Conversations").classes("talks-head")
            self._talks = ui.element("div").classes("talks")
            if services.principal is not None:
                _signed_in_as(services.principal.user)
        self.refresh()

    def refresh(self) -> None:
        """Draw the list of conversations anew."""
        self._talks.clear()
        conversations = self._services.assistant.store.conversations()
        with self._talks:
            for conversation in conversations:
                self._talk(conversation)
                if conversation.id == self.conversation_id:
                    set_title(conversation.title)
            if not conversations:
                ui.label("They are kept here.").classes("muted").style("padding:0 10px")

    def _talk(self, conversation: Conversation) -> None:
        here = " here" if conversation.id == self.conversation_id else ""
        with ui.element("div").classes(f"talk{here}"):
            with ui.element("a").props(f'href="/c/{conversation.id}"'):
                ui.label(conversation.title).style("overflow:hidden;text-overflow:ellipsis")
            with ui.button(icon="more_horiz").props('flat round dense size=sm color=grey aria-label="More"'), ui.menu():
                ui.menu_item("Rename", lambda: self._rename(conversation))
                ui.menu_item("Delete", lambda: self._delete(conversation))

    async def _rename(self, conversation: Conversation) -> None:
        title = await ask("Rename the conversation", "Rename", text=conversation.title)
        if isinstance(title, str):
            try:
                self._services.assistant.store.rename(conversation.id, title)
            except InputError as error:
                ui.notify(str(error), position="top", type="warning")
            self.refresh()

    async def _delete(self, conversation: Conversation) -> None:
        if not await ask(f"Delete “{conversation.title}”?", "Delete", note="Its messages are removed for good."):
            return
        await self._services.assistant.stop(conversation.id)
        self._services.assistant.store.delete(conversation.id)
        if conversation.id == self.conversation_id:
            ui.navigate.to("/")
        else:
            self.refresh()


def _pages_of(services: Services) -> list[tuple[str, str, str]]:
    """The pages that whoever is here may see; administration needs users."""
    pages = _PAGES if services.access is not None else _PAGES[:-1]
    return [page for page in pages if services.is_admin or page[1] not in ADMIN_PAGES]


def _signed_in_as(name: str) -> None:
    with ui.element("form").props('method="post" action="/sign-out"').classes("signed-in"):
        ui.label(name).classes("name")
        with ui.element("button").props('type="submit"'):
            ui.label("Sign out")


async def ask(question: str, verb: str, note: str = "", text: str | None = None) -> str | bool | None:
    """A dialog that asks for a text (if one is given to begin with) or for a yes; nothing if it is dismissed."""
    with ui.dialog() as dialog, ui.card().style("min-width:min(400px, 88vw);gap:14px"):
        ui.label(question).style("font-weight:600;overflow-wrap:anywhere")
        if note:
            ui.label(note).classes("muted")
        field = None
        if text is not None:
            field = ui.input(value=text).props("outlined dense autofocus").style("width:100%")
            field.on("keydown.enter", lambda: dialog.submit(field.value))
        with ui.element("div").classes("row-line").style("justify-content:flex-end;width:100%"):
            ui.button("Cancel", on_click=dialog.close).props("flat no-caps color=grey")
            ui.button(verb, on_click=lambda: dialog.submit(True if field is None else field.value)).props(
                "unelevated no-caps"
            )
    try:
        answer: str | bool | None = await dialog
        return answer
    finally:
        if not dialog.is_deleted:  # as it is when the page was closed with the question open
            dialog.delete()


def icon_button(icon: str, name: str, action: Callable[[], object]) -> ui.button:
    """A small quiet button with an icon, named for screen readers and in a tooltip."""
    button = ui.button(icon=icon, on_click=action).props(f'flat round dense size=sm color=grey aria-label="{name}"')
    with button:
        ui.tooltip(name)
    return button


def _link(name: str, path: str, icon: str, classes: str) -> None:
    with ui.element("a").props(f'href="{path}"').classes(classes):
        ui.icon(icon)
        ui.label(name)


def style_sheet() -> str:
    """The pages' style sheet, those of plans and of highlighted code included."""
    from modelworks.plan.document import style
    from modelworks.web.markdown import code_styles

    own = (files("modelworks.web") / "static" / "modelworks.css").read_text(encoding="utf-8")
    return own + style() + code_styles()


def script() -> str:
    """The pages' own script, that of plans included."""
    from modelworks.plan import document

    own = (files("modelworks.web") / "static" / "modelworks.js").read_text(encoding="utf-8")
    return own + document.script()
