"""Documents on the chat page: the shelf above the line to write on, and the passages that an answer names.

Files go to the server by themselves (``static/documents.js``), and not over the page's websocket. What is shown of a
document are a stranger's words: always as text, never as HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping

from nicegui import events, ui

from modelworks.assistant.documents.library import LARGEST, Library
from modelworks.assistant.documents.store import Document, Passage
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.dialogs import asking
from modelworks.web.language import say, say_number, say_time

WATCH_S = 0.4
"""How often the reading of documents is looked at, while it goes on."""
_ICONS = {"image": "image", "xlsx": "table_chart", "pptx": "slideshow", "code": "code", "pdf": "picture_as_pdf"}
_CITED = re.compile(r"\[(\d{1,3}(?:\s*[,;]\s*\d{1,3})*)\]")
_TAG = re.compile(r"(<[^>]*>)")
_WORDLESS = re.compile(r"<(/?)(?:pre|code|a|button)\b")
CLICKED = """(event) => {
  const cited = event.target.closest(".cite");
  if (cited) emit(Number(cited.textContent));
}"""
"""Tells which number was clicked in an answer."""


class Shelf:
    """The documents of the conversation that a page shows.

    Parameters
    ----------
    library
        Whose documents they are.
    conversation
        Gives the id of the conversation, if there is one yet.
    begin
        Gives that of a conversation that is begun if there is none.
    """

    def __init__(
        self, library: Library, conversation: Callable[[], str | None], begin: Callable[[], Awaitable[str | None]]
    ) -> None:
        self._library, self._conversation, self._begin = library, conversation, begin
        self._row = ui.element("div").classes("shelf").props(f'role=list aria-label="{say("Documents")}"')
        self._shown: list[object] = []
        ui.on("documents_taken", self._taken)
        ui.on("documents_sent", self._sent)
        self._timer = ui.timer(WATCH_S, self.refresh, active=False)
        self.refresh()

    def button(self) -> None:
        """What opens the browser's choice of files."""
        picker = ui.element("input").props(f'type=file multiple aria-label="{say("Files")}"').classes("document-picker")
        picker.style("display:none")
        kinds = say("PDF, Word, PowerPoint, Excel, HTML, Markdown, text, code and images")
        button = ui.button(icon="attach_file").props(f'flat round dense color=grey aria-label="{say("Add documents")}"')
        button.classes("attach").on("click", js_handler=f"() => document.getElementById('{picker.html_id}').click()")
        button.props(f'title="{kinds}"')

    def refresh(self) -> None:
        """Draw what has changed."""
        conversation = self._conversation()
        try:
            documents = self._library.store.documents(conversation) if conversation else []
        except (InputError, OperationError):
            return  # deleted on another page; the next thing that is done here says so
        self._timer.active = any(one.state == "reading" for one in documents)
        shown = [(one.id, one.state, self._how(one)) for one in documents]
        if shown == self._shown:
            return
        self._shown = list(shown)
        self._row.clear()
        with self._row:
            for one in documents:
                self._draw(one)

    def _draw(self, document: Document) -> None:
        with ui.element("div").classes(f"document {document.state}").props("role=listitem"):
            ui.icon("error_outline" if document.state == "failed" else _ICONS.get(document.kind, "description"))
            with ui.element("div").classes("about"):
                ui.label(document.name).classes("name").props(f"title={json.dumps(document.name)}")
                ui.label(self._how(document)).classes("how").props("role=status")
            remove = ui.button(icon="close", on_click=lambda: self._remove(document))
            label = say("Remove {name}", name=document.name)
            remove.props("flat round dense size=sm color=grey").props["aria-label"] = label
            if document.state == "reading":
                progress = self._library.progress(document.id)
                bar = ui.element("div").classes("bar")
                if progress is not None and progress.total:
                    bar.style(f"width:{100 * progress.done / progress.total:.0f}%")
                else:
                    bar.classes("unknown")

    def _how(self, document: Document) -> str:
        if document.state == "failed":
            return document.notice or say("It could not be read.")
        if document.state == "ready":
            return size_of(document.size) + (f" · {document.notice}" if document.notice else "")
        progress = self._library.progress(document.id)
        if progress is not None and progress.total:
            how = say("reading, {done} of {total}", done=say_number(progress.done), total=say_number(progress.total))
            return f"{size_of(document.size)} · {how}"
        return f"{size_of(document.size)} · {say('reading')}"

    async def _taken(self) -> None:
        conversation = await self._begin()
        if conversation is not None:
            path = json.dumps(f"/c/{conversation}/documents")
            ui.run_javascript(f"modelworksDocuments.send({path}, {LARGEST})")

    def _sent(self, event: events.GenericEventArguments) -> None:
        if event.args:
            ui.notify(str(event.args), position="top", type="negative", multi_line=True)
        self.refresh()

    async def _remove(self, document: Document) -> None:
        try:
            await self._library.remove(document.conversation_id, document.id)
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
        self.refresh()


def size_of(count: int) -> str:
    """Bytes in a reader's units."""
    return f"{say_number(count / 1e6, 1)} MB" if count >= 1e6 else f"{say_number(max(count / 1e3, 0.1), 1)} kB"


def cited(html: str, numbers: Collection[int]) -> str:
    """An answer's HTML with its ``[1]`` as buttons, where there is a passage of that number; not inside code."""
    if not numbers or "[" not in html:
        return html
    depth, parts = 0, []
    for part in _TAG.split(html):
        if part.startswith("<"):
            if tag := _WORDLESS.match(part):
                depth += -1 if tag[1] else 1
            parts.append(part)
        else:
            parts.append(part if depth else _CITED.sub(lambda found: _buttons(found, numbers), part))
    return "".join(parts)


def _buttons(found: re.Match[str], numbers: Collection[int]) -> str:
    named = [int(number) for number in re.split(r"\s*[,;]\s*", found[1])]
    if not set(named) <= set(numbers):
        return found[0]
    return "".join(map(_button, named))


def _button(number: int) -> str:
    name = say("Open source {number}", number=number)
    return f'<button type="button" class="cite" aria-label="{name}">{number}</button>'


def draw_sources(passages: Mapping[int, Passage], text: str = "") -> None:
    """What an answer was given, as a list that opens; and as of when it is, where it is of live sources."""
    if not passages:
        return
    times = as_of(passages, text)
    if times is not None:
        first, last = map(say_time, times)
        said = (
            say("As of {time}", time=first) if first == last else say("As of {first} to {last}", first=first, last=last)
        )
        ui.label(said).classes("as-of")
    with ui.element("details").classes("sources"):
        with ui.element("summary"):
            ui.label(say("Sources: {count}", count=len(passages))).style("display:inline")
        for number, passage in passages.items():
            row = ui.element("button").classes("source").props("type=button")
            row.on("click", lambda _, one=passage, at=number: open_passage(at, one))
            with row:
                with ui.element("b"):
                    ui.label(str(number))
                ui.label(passage.where)


def open_passage(number: int, passage: Passage) -> None:
    """A dialog with a passage, its document and its place."""
    with asking(f"{number} · {passage.document}", "passage") as dialog:
        place = ", ".join(part for part in (passage.place, passage.heading) if part)
        if place:
            ui.label(place).classes("muted")
        if passage.fetched is not None:
            times = [say("read {time}", time=say_time(passage.fetched))]
            if passage.published is not None:
                times.insert(0, say("published {time}", time=say_time(passage.published)))
            ui.label(" · ".join(times)).classes("muted")
        ui.label(passage.text).classes("text")
        if passage.address.startswith(("https://", "http://")):
            link = ui.link(passage.address, passage.address, new_tab=True).classes("where")
            link.props('rel="noopener noreferrer nofollow"')
        ui.button(say("Close"), on_click=dialog.close).props("flat no-caps color=grey").style("align-self:flex-end")
    dialog.on("hide", dialog.delete)
    dialog.open()


def as_of(passages: Mapping[int, Passage], text: str) -> tuple[float, float] | None:
    """The oldest and the newest time of the live passages that an answer names, or else of all that it was given."""
    named = {int(number) for found in _CITED.findall(text) for number in re.split(r"\s*[,;]\s*", found)}
    times = {number: one.time for number, one in passages.items() if one.fetched is not None and one.time is not None}
    used = [time for number, time in times.items() if number in named] or list(times.values())
    return (min(used), max(used)) if used else None
