"""The side's list of conversations: pins, folders, what is found, and what can be done to each of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from html import escape
from inspect import isawaitable
from typing import Any

from nicegui import background_tasks, ui

from modelworks.assistant.folders import Folder
from modelworks.assistant.imports import LARGEST, Imported, bring_in
from modelworks.assistant.search import Snippet
from modelworks.assistant.talk import Conversation, Found
from modelworks.spec.errors import InputError, OperationError
from modelworks.web.dialogs import ask, asking, icon_button, set_title
from modelworks.web.language import say
from modelworks.web.services import Services

_NEW = "new"
"""In place of a folder's id: one that is to be made."""
_DROPPED = """(event) => {
  event.preventDefault(); // the chat would take the file for a document
  UPLOADER.addFiles(event.dataTransfer.files);
}"""


class Talks:
    """The conversations of whoever is at the page.

    Parameters
    ----------
    services
        Where they are.
    conversation_id
        The one that is shown, if one is.
    """

    def __init__(self, services: Services, conversation_id: str | None) -> None:
        self._services, self._store = services, services.assistant.store
        self.conversation_id = conversation_id
        self._open: set[str] = set()
        with ui.element("div").classes("talks-head"):
            ui.label(say("Conversations")).classes("grow")
            icon_button("create_new_folder", say("New folder"), self._new_folder)
            icon_button("link", say("Shared links"), lambda: self._links(None))
            icon_button("upload", say("Import conversations"), self._import)
        self._field = ui.input(placeholder=say("Search"), on_change=self._search).classes("talks-search")
        self._field.props("outlined dense clearable debounce=250 type=search").props(
            f'aria-label="{say("Search the conversations")}"'
        )
        self._list = ui.element("div").classes("talks")
        self._place = ui.element("div")
        self.refresh()

    def refresh(self) -> None:
        """Draw the list anew."""
        if self._typed:
            background_tasks.create(self._search(), name="search")
            return
        self._list.clear()
        with self._list:
            self._draw_all(self._store.conversations())

    @property
    def _typed(self) -> str:
        return (self._field.value or "").strip()

    async def _search(self) -> None:
        typed = self._typed
        if not typed:
            self.refresh()
            return
        found = await asyncio.to_thread(self._store.search, typed)
        if typed == self._typed:  # otherwise the next search is on its way
            self._list.clear()
            with self._list:
                self._draw_found(found)

    def _draw_found(self, found: list[Found]) -> None:
        for one in found:
            self._talk(one.conversation, one)
        if not found:
            ui.label(say("Nothing was found.")).classes("muted talks-none")

    def _draw_all(self, conversations: list[Conversation]) -> None:
        for conversation in (one for one in conversations if one.pinned):
            self._talk(conversation)
        rest = [one for one in conversations if not one.pinned]
        for folder in self._store.folders.all():
            self._folder(folder, [one for one in rest if one.folder_id == folder.id])
        for conversation in (one for one in rest if one.folder_id is None):
            self._talk(conversation)
        for conversation in (one for one in conversations if one.id == self.conversation_id):
            set_title(conversation.title)
        if not conversations:
            ui.label(say("They are kept here.")).classes("muted talks-none")

    def _folder(self, folder: Folder, inside: list[Conversation]) -> None:
        opened = folder.id in self._open or any(one.id == self.conversation_id for one in inside)
        with ui.element("div").classes("folder-box"):
            with ui.element("details").classes("folder") as details:
                details.props(add="open" if opened else "")
                with ui.element("summary").classes("talk") as head:
                    head.on("click", lambda: self._open.symmetric_difference_update({folder.id}))
                    ui.icon("folder_open" if opened else "folder").classes("muted")
                    ui.label(folder.name).classes("grow cut")
                    ui.label(str(len(inside))).classes("muted")
                for conversation in inside:
                    self._talk(conversation)
            rename, delete = partial(self._rename_folder, folder), partial(self._delete_folder, folder)
            # Beside the summary, which is a button itself.
            self._menu(say("Folder {name}", name=folder.name), lambda: {say("Rename"): rename, say("Delete"): delete})

    def _talk(self, conversation: Conversation, found: Found | None = None) -> None:
        here = " here" if conversation.id == self.conversation_id else ""
        place = f"?message={found.message_id}" if found is not None and found.message_id is not None else ""
        with ui.element("div").classes(f"talk{here}"):
            if conversation.pinned:
                with ui.element("span").props(f'role=img aria-label="{say("Pinned")}"').classes("pinned"):
                    ui.icon("push_pin")
            with ui.element("a").props(f'href="/c/{conversation.id}{place}"'):
                ui.label(conversation.title).classes("cut")
                if found is not None and found.snippet is not None:
                    ui.html(_marked(found.snippet), tag="div").classes("snippet")
            self._menu(say("More"), lambda: self._actions(conversation))

    def _actions(self, conversation: Conversation) -> dict[str, Callable[[], object]]:
        """What can be done to a conversation, by name."""
        pinned = conversation.pinned
        actions: dict[str, Callable[[], object]] = {
            say("Rename"): lambda: self._rename(conversation),
            say("Unpin") if pinned else say("Pin"): lambda: self._change(conversation, pinned=not pinned),
            say("Move to a folder"): lambda: self._move(conversation),
            say("Share"): lambda: self._links(conversation),
        }
        for form, name in (("markdown", "Markdown"), ("pdf", "PDF"), ("json", "JSON")):
            actions[say("Export as {name}", name=name)] = partial(
                ui.download.from_url, f"/c/{conversation.id}/export/{form}"
            )
        return actions | {say("Delete"): lambda: self._delete(conversation)}

    def _menu(self, name: str, actions: Callable[[], Mapping[str, Callable[[], object]]]) -> None:
        """A button whose menu is made when it is asked for: a long list would be slow with all of them."""
        button = ui.button(icon="more_horiz").props("flat round dense size=sm color=grey")
        button.props["aria-label"] = name
        with button:
            menu = ui.menu().props("no-parent-event").classes("talk-menu")

        def show() -> None:
            menu.clear()
            with menu:
                for label, action in actions().items():
                    ui.menu_item(label, partial(self._do, action)).props("role=menuitem")
            menu.open()

        button.on("click.stop.prevent", show)

    async def _do(self, action: Callable[[], object]) -> None:
        """Do what a menu says. What it opens stands outside of the list, which may be drawn anew meanwhile."""
        with self._place:
            done = action()
            if isawaitable(done):
                await done

    def _change(self, conversation: Conversation, **changes: Any) -> None:
        self._try(lambda: self._store.change(conversation.id, **changes))

    def _try(self, work: Callable[[], object]) -> bool:
        """Do something and draw the list; whether it was accepted."""
        try:
            work()
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="warning", multi_line=True)
            return False
        finally:
            self.refresh()
        return True

    async def _rename(self, conversation: Conversation) -> None:
        title = await ask(say("Rename the conversation"), say("Rename"), text=conversation.title)
        if isinstance(title, str):
            self._change(conversation, title=title)

    async def _delete(self, conversation: Conversation) -> None:
        note = say("Its messages and the links to it are removed for good.")
        if not await ask(say("Delete “{title}”?", title=conversation.title), say("Delete"), note=note):
            return
        with suppress(InputError):  # another page was quicker
            await self._services.assistant.remove(conversation.id)
        if conversation.id == self.conversation_id:
            ui.navigate.to("/")
        else:
            self.refresh()

    async def _new_folder(self) -> None:
        name = await ask(say("New folder"), say("Create"), text="")
        if isinstance(name, str):
            self._try(lambda: self._store.folders.create(name))

    async def _rename_folder(self, folder: Folder) -> None:
        name = await ask(say("Rename the folder"), say("Rename"), text=folder.name)
        if isinstance(name, str):
            self._try(lambda: self._store.folders.rename(folder.id, name))

    async def _delete_folder(self, folder: Folder) -> None:
        if await ask(
            say("Delete the folder “{title}”?", title=folder.name),
            say("Delete"),
            note=say("Its conversations stay, in no folder."),
        ):
            self._try(lambda: self._store.folders.delete(folder.id))

    async def _move(self, conversation: Conversation) -> None:
        names: dict[str, str] = {"": say("No folder")} | {one.id: one.name for one in self._store.folders.all()}
        with asking(say("Move to a folder")) as dialog:
            for folder_id, name in names.items():
                button = ui.button(name, on_click=lambda _, to=folder_id: dialog.submit(to)).classes("quiet")
                button.props("no-caps flat align=left" + (" disable" if folder_id == conversation.folder_id else ""))
            new = ui.button(say("New folder"), icon="add", on_click=lambda: dialog.submit(_NEW))
            new.props("flat no-caps dense").style("align-self:flex-start")
        chosen = await dialog
        dialog.delete()
        if chosen == _NEW:
            called = await ask(say("New folder"), say("Create"), text="")
            made: list[Folder] = []
            if not isinstance(called, str) or not self._try(lambda: made.append(self._store.folders.create(called))):
                return
            chosen = made[0].id
        if chosen is not None:
            self._open.add(chosen)
            self._change(conversation, folder_id=chosen or None)

    async def _links(self, conversation: Conversation | None) -> None:
        """The links to a conversation, or all; a new one can be made for one."""
        if conversation is not None and not self._try(partial(self._store.shares.create, conversation.id)):
            return
        with asking(say("Shared links")) as dialog:
            ui.label(say("Whoever has a link reads the conversation as it was when it was shared.")).classes("muted")
            rows = ui.element("div").classes("links")

            def revoke(share_id: str) -> None:
                self._try(lambda: self._store.shares.revoke(share_id))
                draw()

            def draw() -> None:
                rows.clear()
                there = self._store.shares.all()
                if conversation is not None:
                    there = [one for one in there if one.conversation_id == conversation.id]
                with rows:
                    for one in reversed(there):
                        with ui.element("div").classes("link-row"):
                            ui.link(one.title, one.path, new_tab=True).classes("grow cut")
                            copied = f"modelworks.copy(location.origin + {json.dumps(one.path)})"
                            icon_button("content_copy", say("Copy the link"), partial(ui.run_javascript, copied))
                            icon_button("link_off", say("Revoke"), partial(revoke, one.id))
                    if not there:
                        ui.label(say("There are none.")).classes("muted")

            draw()
            ui.button(say("Done"), on_click=dialog.close).props("flat no-caps").style("align-self:flex-end")
        await dialog
        dialog.delete()

    async def _import(self) -> None:
        with asking(say("Import conversations")) as dialog:
            ui.label(say("ChatGPT's zip or its conversations.json, Open WebUI's export, or our own JSON.")).classes(
                "muted"
            )
            upload = ui.upload(on_upload=lambda event: dialog.submit(event.file), auto_upload=True)
            upload.props(f'max-file-size={LARGEST} accept=".json,.zip"').style("display:none")
            refused = say("A JSON or zip file of at most {size} MB is accepted.", size=LARGEST >> 20)
            upload.on("rejected", lambda: ui.notify(refused))
            uploader = f"getElement({upload.id}).$refs.qRef"
            button = ui.button(say("Choose a file, or drop it here")).props("no-caps flat icon=upload_file")
            button.classes("quiet file-drop").on("click", js_handler=f"() => {uploader}.pickFiles()")
            button.on("dragover", js_handler="(event) => event.preventDefault()")
            button.on("drop", js_handler=_DROPPED.replace("UPLOADER", uploader))
        file = await dialog
        dialog.delete()
        if file is None:
            return
        try:
            done = await asyncio.to_thread(bring_in, self._store, await file.read())
        except (InputError, OperationError) as error:
            ui.notify(str(error), position="top", type="negative", multi_line=True)
            return
        ui.notify(_told(done), position="top", type="positive" if done.new else "info", multi_line=True)
        self.refresh()


def _marked(snippet: Snippet) -> str:
    parts, at = [], 0
    for begin, end in snippet.hits:
        parts += [escape(snippet.text[at:begin]), f"<mark>{escape(snippet.text[begin:end])}</mark>"]
        at = end
    return "".join([*parts, escape(snippet.text[at:])])


def _told(done: Imported) -> str:
    said = say("Conversations imported: {count}.", count=len(done.new)) if done.new else say("Nothing new.")
    if done.known:
        said += " " + say("There already: {count}.", count=len(done.known))
    return said
