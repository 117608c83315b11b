"""The frame around every page: the bar on top, the side with the conversations, the theme."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib.resources import files

from fastapi import Request
from nicegui import ui

from modelworks import __version__
from modelworks.web.dialogs import set_title
from modelworks.web.language import LANGUAGES, language_of, say, script_words
from modelworks.web.services import Services
from modelworks.web.sign_in import ADMIN_PAGES
from modelworks.web.talks import Talks

LOGO = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="var(--accent)" stroke-width="2" stroke-linecap="round" '
    'stroke-linejoin="round"><path d="M3 19V7l5 4 4-6 4 6 5-4v12z"/><path d="M8 19v-4M12 19v-6M16 19v-4"/></svg>'
)
FAVICON = LOGO.replace("var(--accent)", "#0f766e").replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
_PAGES = [
    ("Chat", "/", "chat_bubble_outline"),
    ("Sources", "/sources", "rss_feed"),
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
    language = language_of(request)
    ui.add_head_html(f"<script>modelworks.words = {script_words(language)}</script>")
    _set_language(language, translated=here in {"/", "/sources"})
    theme = request.cookies.get("modelworks_theme")
    if theme in {"dark", "light"}:
        ui.dark_mode(theme == "dark")
    side = Side(services, here, conversation_id)
    with ui.header().classes("bar") as bar:
        ui.button(icon="menu", on_click=side.drawer.toggle).props(
            f'flat round dense color=grey aria-label="{say("Menu")}"'
        )
        side.bar = ui.element("div").classes("grow row-line").style("flex-wrap:nowrap;gap:8px")
        _language_button(language)
        if here == "/":
            keys = ui.button(icon="keyboard").props(
                f'flat round dense color=grey aria-label="{say("Keyboard shortcuts")}"'
            )
            keys.classes("gt-sm").on("click", js_handler="() => keys.overview()")
        theme_button = ui.button(icon="contrast").props(
            f'flat round dense color=grey aria-label="{say("Dark or light")}"'
        )
        theme_button.on("click", js_handler="() => modelworks.theme()")
    bar.props(remove="elevated")
    yield side


def _set_language(language: str, translated: bool) -> None:
    """Tell the browser what language a page is in; some have an English content."""
    client = ui.context.client
    client.page = copy(client.page)  # the original is every visitor's
    client.page.language = "pl" if language == "pl" else "en-US"
    if not translated:
        client.content.props("lang=en")


def _language_button(language: str) -> None:
    for code in LANGUAGES:
        if code != language:
            button = ui.button(code.upper(), color=None).props(
                f'flat dense no-caps lang={code} title="{LANGUAGES[code]}"'
            )
            button.props(f'aria-label="{LANGUAGES[code]}"').classes("other-language")
            button.on("click", js_handler=f"() => modelworks.language('{code}')")


class Side:
    """The drawer: pages, and the conversations."""

    def __init__(self, services: Services, here: str, conversation_id: str | None) -> None:
        self.bar: ui.element
        self.drawer = ui.left_drawer(fixed=True).props("width=272 breakpoint=900").classes("side")
        with self.drawer:
            ui.html(f"{LOGO}<span>Modelworks</span>", sanitize=False, tag="div").classes("brand")
            _link(say("New chat"), "/", "edit_square", "nav primary")
            for name, path, icon in _pages_of(services):
                _link(say(name), path, icon, "nav here" if path == here else "nav")
            self.talks = Talks(services, conversation_id)
            if services.principal is not None:
                _signed_in_as(services.principal.user)


def _pages_of(services: Services) -> list[tuple[str, str, str]]:
    """The pages that whoever is here may see; administration needs users."""
    pages = _PAGES if services.access is not None else _PAGES[:-1]
    pages = [page for page in pages if page[1] != "/sources" or services.assistant.live is not None]
    return [page for page in pages if services.is_admin or page[1] not in ADMIN_PAGES]


def _signed_in_as(name: str) -> None:
    with ui.element("form").props('method="post" action="/sign-out"').classes("signed-in"):
        ui.label(name).classes("name")
        with ui.element("button").props('type="submit"'):
            ui.label(say("Sign out"))


def _link(name: str, path: str, icon: str, classes: str) -> None:
    with ui.element("a").props(f'href="{path}"').classes(classes):
        ui.icon(icon)
        ui.label(name)


def style_sheet() -> str:
    """The pages' style sheet, those of plans and of highlighted code included."""
    from modelworks.plan.document import style
    from modelworks.web.markdown import code_styles

    own = _static("modelworks.css") + _static("documents.css") + _static("sources.css")
    return own + style() + code_styles()


def script() -> str:
    """The pages' own script, that of plans included."""
    from modelworks.plan import document

    names = ("modelworks.js", "drawings.js", "keys.js", "documents.js")
    return "".join([*map(_static, names), document.script()])


def _static(name: str) -> str:
    return (files("modelworks.web") / "static" / name).read_text(encoding="utf-8")
