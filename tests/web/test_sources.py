"""Live sources in a real browser: a feed is added, asked about, and cited with its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nicegui import Client, ui

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
sys.path.insert(0, str(Path(__file__).parents[1] / "assistant" / "live"))
from gateways import Stub
from sites import Site, rss, site_on
from started import address_of, hindrances

from modelworks.assistant.chat import Assistant
from modelworks.assistant.documents.store import Passage
from modelworks.assistant.live.knowledge import Live
from modelworks.assistant.store import ConversationStore
from modelworks.assistant.tools.toolbox import Toolbox
from modelworks.serve.config import LiveConfig, ServeConfig, ToolsConfig
from modelworks.serve.routing import Router
from modelworks.spec.fields import validate
from modelworks.web.dialogs import icon_button
from modelworks.web.documents import as_of
from modelworks.web.lookup import LookUp


def test_an_answer_is_as_of_the_passages_that_it_names() -> None:
    def live(published: float | None) -> Passage:
        return Passage(0, "", "", 0, "", "", "", 0, "http://x/", published, 50.0)

    given = {1: Passage(1, "d", "", 0, "", "", "", 0), 2: live(10.0), 3: live(30.0), 4: live(None)}
    assert as_of(given, "It is so [2, 3] and not [9].") == (10, 30)
    assert as_of(given, "It is so [4].") == (50, 50)
    assert as_of(given, "It is so [1].") == as_of(given, "") == (10, 50)
    assert as_of({1: given[1]}, "[1]") is None


def test_a_name_is_no_more_than_the_words_of_its_button() -> None:
    hostile = 'News" innerHTML="<b>" x="'
    with Client(ui.page("")):
        button = icon_button("delete", f"Remove {hostile}", lambda: None)
    assert button.props["title"] == button.props["aria-label"] == f"Remove {hostile}"
    assert "innerHTML" not in button.props


def test_no_question_goes_to_a_search_engine_before_somebody_wants_that(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path / "modelworks.db")
    live = Live(store.database, validate(LiveConfig, {"searxng": "http://127.0.0.1:1"}))
    router = Router(validate(ServeConfig, {"engines": {"a": {"url": "http://127.0.0.1:1"}}}))
    assistant = Assistant(store, router, live=live)
    seen = [LookUp(assistant, None)]
    live.store.add("feed", "News", "http://a/", 3600, False, False)
    seen.append(LookUp(assistant, None))
    live.store.add("search", "Web", "searxng", 3600, False, False)
    seen.append(LookUp(assistant, None))
    assert [(one.on, one.searched) for one in seen] == [(False, False), (True, False), (False, True)]
    store.close()
    mcp = {"url": "http://192.0.2.1/mcp"}
    assert [Toolbox(validate(ToolsConfig, {"mcp": one})).reaches_out for one in ({}, {"far": mcp})] == [False, True]


@pytest.fixture
def site() -> Iterator[Site]:
    with site_on() as site:
        yield site


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub("stub")
    yield stub
    stub.end()


@pytest.fixture
def page(browser: Any, stub: Stub, tmp_path: Path) -> Iterator[Any]:
    allowed = '[live]\nallow_addresses = ["127.0.0.0/8"]\ndelay_s = 0.1\n'
    (tmp_path / "serve.toml").write_text(f'[engines.a]\nurl = "{stub.url}"\n{allowed}')
    environment = {**os.environ, "MODELWORKS_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("MODELWORKS_DATABASE", None)
    command = [sys.executable, "-m", "modelworks", "up", "--port", "0", "--no-run", "--no-titles"]
    command += ["--config", str(tmp_path / "serve.toml")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    context = browser.new_context(
        viewport={"width": 1200, "height": 800}, base_url=address_of(process, tmp_path), locale="en-US"
    )
    page = context.new_page()
    page.set_default_timeout(60_000)  # a busy machine is not a failure
    yield page
    context.close()
    process.send_signal(signal.SIGTERM)
    process.wait(60)


@pytest.mark.slow
@pytest.mark.browser
def test_a_feed_is_added_asked_about_and_cited_with_its_time(page: Any, stub: Stub, site: Site) -> None:
    date = "Mon, 02 Nov 2026 08:00:00 GMT"
    site.pages["/feed"] = rss(("1", "Recall", "The pump X200 is <b>recalled</b> for its seal.", date))
    stub.control(says="It is recalled [1].")
    page.goto("/")
    page.get_by_label("Message", exact=True).wait_for()
    assert not page.get_by_label("Look things up in the sources").is_visible()

    page.goto("/sources")
    page.get_by_label("Address of the feed").fill("not an address")
    page.get_by_role("button", name="Add").click()
    page.get_by_text("the address 'not an address' is not accepted").wait_for()
    page.get_by_label("Address of the feed").fill(f"{site.address}/feed")
    page.get_by_label("Address of the feed").press("Enter")
    page.get_by_text("items: 1 · refreshed").wait_for()
    assert hindrances(page) == []

    page.goto("/")
    switch = page.get_by_label("Look things up in the sources")
    switch.wait_for()
    assert switch.get_attribute("aria-pressed") == "true"
    page.get_by_label("Message", exact=True).fill("Is the pump X200 recalled?")
    page.get_by_label("Message", exact=True).press("Enter")
    cite = page.get_by_label("Open source 1")
    cite.wait_for()
    page.get_by_text("As of Nov 2, 2026, 08:00 UTC").or_(page.get_by_text("As of 2 Nov 2026, 08:00 UTC")).wait_for()
    asked = stub.seen()["last"]["messages"][-1]["content"]
    assert "[1] 127.0.0.1: Recall, published 2026-11-02 08:00 UTC" in asked
    cite.click()
    passage = page.locator(".passage")
    passage.wait_for()
    assert "The pump X200 is recalled for its seal." in passage.inner_text()
    assert "published 2 Nov 2026, 08:00 UTC" in passage.inner_text()
    assert passage.get_by_role("link").get_attribute("href") == f"{site.address}/1"
    page.get_by_role("button", name="Close").click()
    passage.wait_for(state="detached")

    switch.click()
    page.wait_for_function("document.querySelector('.look-up').getAttribute('aria-pressed') === 'false'")
    page.get_by_label("Message", exact=True).fill("And now?")
    page.get_by_label("Message", exact=True).press("Enter")
    page.locator(".turn.model").nth(1).get_by_text("It is recalled").wait_for()
    assert stub.seen()["last"]["messages"][-1]["content"] == "And now?"

    page.goto("/sources")
    page.get_by_label("Pause 127.0.0.1").click()
    page.get_by_text("paused", exact=True).wait_for()
    page.get_by_label("Remove 127.0.0.1").click()
    page.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_text("There is no source yet.").wait_for()
