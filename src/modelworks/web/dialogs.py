"""Small things that every page has: a question in a dialog, a quiet button, the page's title."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nicegui import ui

from modelworks.web.language import say


def set_title(title: str) -> None:
    """What the browser shows as the page's title."""
    ui.page_title(f"{title} · Modelworks")


@contextmanager
def asking(title: str, classes: str = "asking") -> Iterator[ui.dialog]:
    """A dialog with a title, which is its name for screen readers too; what is drawn in the block is its content."""
    with ui.dialog() as dialog, ui.card().classes(classes):
        dialog.props["aria-label"] = title
        ui.label(title).classes("asked")
        yield dialog


async def ask(question: str, verb: str, note: str = "", text: str | None = None) -> str | bool | None:
    """A dialog that asks for a text (if one is given to begin with) or for a yes; nothing if it is dismissed."""
    with asking(question) as dialog:
        if note:
            ui.label(note).classes("muted")
        field = None
        if text is not None:
            field = ui.input(value=text).props("outlined dense autofocus").style("width:100%")
            field.props["aria-label"] = question
            field.on("keydown.enter", lambda: dialog.submit(field.value))
        with ui.element("div").classes("row-line").style("justify-content:flex-end;width:100%"):
            ui.button(say("Cancel"), on_click=dialog.close).props("flat no-caps color=grey")
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
    """A small quiet button with an icon, named for screen readers and where the pointer rests."""
    button = ui.button(icon=icon, on_click=action).props("flat round dense size=sm color=grey")
    # Not through props(), which reads a text: a name in it could end its quotes and set what it likes.
    button.props["aria-label"] = button.props["title"] = name
    return button
