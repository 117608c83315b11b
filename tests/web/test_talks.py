"""The side's list and a conversation's settings in a real browser, over a stub engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from gateways import Stub
from started import address_of

from modelworks.assistant.store import ConversationStore

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    stub = Stub("stub")
    yield stub
    stub.end()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConversationStore]:
    store = ConversationStore(tmp_path_factory.mktemp("home") / "modelworks.db")
    yield store
    store.close()


@pytest.fixture(scope="module")
def url(store: ConversationStore, stub: Stub) -> Iterator[str]:
    home = Path(store.database.shown).parent
    (home / "serve.toml").write_text(f'[engines.a]\nurl = "{stub.url}"\n')
    environment = {**os.environ, "MODELWORKS_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("MODELWORKS_DATABASE", None)
    command = [sys.executable, "-m", "modelworks", "up", "--port", "0", "--no-run", "--no-titles"]
    with subprocess.Popen(
        [*command, "--config", str(home / "serve.toml")], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        yield address_of(process, home)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 800}, base_url=url, accept_downloads=True)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    yield page
    assert troubles == []
    context.close()


@pytest.fixture
def talk(store: ConversationStore) -> Iterator[str]:
    chat = store.create("stub")
    question = store.add(chat.id, "user", "Gdzie jest Łódź?", None)
    store.add(chat.id, "assistant", "W Polsce, <b>na zachód</b> od Warszawy.", question.id, "stub")
    yield chat.id
    store.delete(chat.id)


def choose(page: Any, action: str) -> None:
    page.locator(".talk.here").get_by_label("More").click()
    page.get_by_text(action, exact=True).click()


def test_a_conversation_is_found_moved_pinned_and_exported(page: Any, talk: str, store: ConversationStore) -> None:
    page.goto(f"/c/{talk}")
    page.get_by_label("New folder").click()
    page.locator(".q-dialog input").fill("<b>Cities</b>")
    page.locator(".q-dialog input").press("Enter")
    page.locator(".folder", has_text="<b>Cities</b>").wait_for()
    choose(page, "Move to a folder")
    page.locator(".q-dialog").get_by_role("button", name="<b>Cities</b>").click()
    page.locator(".folder .talk.here").wait_for()
    choose(page, "Move to a folder")
    page.locator(".q-dialog").get_by_role("button", name="New folder").click()
    page.get_by_role("dialog", name="New folder").locator("input").fill("Towns")
    page.get_by_role("button", name="Create").click()
    page.locator(".folder", has_text="Towns").locator(".talk.here").wait_for()
    choose(page, "Pin")
    page.get_by_role("img", name="Pinned").wait_for()
    assert store.conversation(talk).pinned
    choose(page, "Export as Markdown")
    page.get_by_label("Search the conversations").fill("LODZ warsz")
    page.get_by_text("Nothing was found.").wait_for()
    page.get_by_label("Search the conversations").fill("warsz")
    assert page.locator(".talk mark").inner_text() == "Warszawy"
    assert "<b>na zachód</b>" in page.locator(".snippet").inner_text()
    page.locator(".snippet").click()
    page.wait_for_url("**/c/*?message=*")
    page.locator(".turn.found", has_text="Warszawy").wait_for()


def test_an_export_is_downloaded_and_imported_again(page: Any, talk: str, tmp_path: Path) -> None:
    page.goto(f"/c/{talk}")
    page.locator(".talk.here").get_by_label("More").click()
    with page.expect_download() as download:
        page.get_by_text("Export as JSON", exact=True).click()
    assert download.value.suggested_filename == "Gdzie jest Łódź.json"
    found = json.loads(Path(download.value.path()).read_text())
    assert [one["role"] for one in found["messages"]] == ["user", "assistant"]
    found["conversation"] |= {"id": "elsewhere", "title": "Brought along"}
    (tmp_path / "talk.json").write_text(json.dumps(found))
    for told in ("Conversations imported: 1.", "Nothing new. There already: 1."):
        page.get_by_label("Import conversations").click()
        page.locator(".q-uploader input[type=file]").set_input_files(tmp_path / "talk.json")
        page.get_by_text(told).wait_for()
        page.locator(".q-dialog").wait_for(state="detached")
    assert page.locator(".talk", has_text="Brought along").count() == 1


def test_a_link_is_made_read_and_revoked(page: Any, talk: str, browser: Any) -> None:
    page.goto(f"/c/{talk}")
    choose(page, "Share")
    link = page.locator(".link-row a")
    address = page.evaluate("link => link.href", link.element_handle())
    reader = browser.new_page()
    reader.goto(address)
    assert "<b>na zachód</b>" in reader.locator(".said").inner_text()
    assert reader.locator("script").count() == 0
    page.get_by_label("Revoke").click()
    page.get_by_text("There are none.").wait_for()
    assert reader.goto(address).status == 404
    reader.close()


def test_a_persona_is_written_and_answers_with_its_own_temperature(page: Any, stub: Stub) -> None:
    page.goto("/")
    page.get_by_label("Conversation settings").click()
    page.get_by_role("button", name="New persona").click()
    page.get_by_label("Name").fill("Pirate")
    page.get_by_label("What the model is told first").fill("You are a pirate.")
    page.get_by_role("button", name="Keep persona").click()
    page.get_by_label("Edit Pirate").wait_for()
    page.get_by_text("Own temperature").click()
    page.locator('[aria-label="Temperature"] [tabindex="0"]').focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("0.8", exact=True).last.wait_for()
    page.get_by_role("button", name="Save").click()
    page.locator(".q-dialog").wait_for(state="detached")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_label("Message", exact=True).press("Enter")
    page.get_by_label("Answer again").wait_for()
    asked = stub.seen()["last"]
    assert asked["messages"][0] == {"role": "system", "content": "You are a pirate."}
    assert asked["temperature"] == pytest.approx(0.8)
