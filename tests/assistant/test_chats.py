"""Conversations over HTTP as a person has them, with users and without: modes, folders, search, and nobody else's."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from gateways import Stub, plain_client, serving, wait_for

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.calls import Call
from modelworks.assistant.chat import Assistant
from modelworks.assistant.conversations import conversation_routes
from modelworks.assistant.database import Database
from modelworks.assistant.gateway import AccountAccess
from modelworks.assistant.ledger import Ledger
from modelworks.assistant.personal import PersonalEngine
from modelworks.assistant.store import ConversationStore
from modelworks.assistant.tools.loop import Calling
from modelworks.assistant.tools.store import ToolStore
from modelworks.assistant.tools.toolbox import Toolbox
from modelworks.serve.access import principal_of
from modelworks.serve.api import create_app
from modelworks.serve.config import ServeConfig, ToolsConfig
from modelworks.serve.routing import Router
from modelworks.serve.store import Store
from modelworks.spec.fields import validate


@dataclass
class Talks:
    """A server with users and conversations."""

    client: httpx.Client
    accounts: Accounts
    stub: Stub
    store: ConversationStore
    operations: list[tuple[str, str]]

    def key(self, name: str, *limits: str) -> str:
        """A user's key."""
        self.accounts.set_tier(f"tier-{name}", ["models=['stub']", "parallel=100", *limits])
        self.accounts.add_user(name, tier=f"tier-{name}")
        return self.accounts.create_key(name)[1]

    def call(self, key: str, method: str, path: str, **options: Any) -> httpx.Response:
        return self.client.request(method, f"/v1/chats{path}", headers={"Authorization": f"Bearer {key}"}, **options)


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    stub = Stub("stub")
    yield stub
    stub.end()


@pytest.fixture
def talks(stub: Stub, tmp_path: Path) -> Iterator[Talks]:
    with talks_over(stub, tmp_path) as talks:
        yield talks


@contextlib.contextmanager
def talks_over(stub: Stub, folder: Path) -> Iterator[Talks]:
    stub.control(fault="none", rate=200, tokens=4)
    router = Router(validate(ServeConfig, {"engines": {"a": {"url": stub.url}}, "tries": 1}))
    database = Database(folder / "modelworks.db")
    access = AccountAccess(Accounts(database), Ledger(database))
    store = ConversationStore(folder / "modelworks.db")
    calling = Calling(Toolbox(ToolsConfig()), ToolStore(store.database))
    assistant = Assistant(store, router, calling=calling)

    def of(request: Any) -> Assistant:
        principal = principal_of(request)
        assert principal is not None
        state = app.state
        engine = PersonalEngine(router, principal, access.accounts, state.gate, state.metrics)
        return assistant.of(principal.user_id, engine, engine.tier)

    app = create_app(router, Store(folder / "models"), access=access, routers=[conversation_routes(of)])
    operations = [
        (method.upper(), path.removeprefix("/v1/chats"))
        for path, methods in app.openapi()["paths"].items()
        for method in methods
        if path.startswith("/v1/chats")
    ]
    with serving(app) as address, plain_client(base_url=address) as client:
        yield Talks(client, access.accounts, stub, store, operations)
    store.close()
    database.close()


def test_a_conversations_mode_and_temperature_are_what_the_engine_is_told(talks: Talks) -> None:
    key = talks.key("alice")
    persona = talks.call(key, "POST", "/personas", json={"name": "Pirate", "prompt": "You are a pirate."}).json()
    chat = talks.call(key, "POST", "", json={"model": "stub", "mode": persona["id"], "temperature": 1.5}).json()
    for change, told, temperature in (
        ({}, "You are a pirate.", 1.5),
        ({"mode": "regular", "temperature": None}, "You are a helpful assistant.", None),
        ({"mode": "fun", "temperature": 0}, "dry sense of humor", 0),
    ):
        assert talks.call(key, "PATCH", f"/{chat['id']}", json=change).status_code == 200
        ids = talks.call(key, "POST", f"/{chat['id']}/messages", json={"text": "Hello"}).json()
        path = f"/{chat['id']}/messages/{ids['answer_id']}"
        wait_for(lambda path=path: talks.call(key, "GET", path).json()["state"] == "complete")
        asked = talks.stub.seen()["last"]
        assert asked["messages"][0]["role"] == "system"
        assert told in asked["messages"][0]["content"]
        assert asked.get("temperature") == temperature


def test_a_tier_has_the_modes_that_it_has_also_for_conversations_begun_before(talks: Talks) -> None:
    key = talks.key("alice")
    chat = talks.call(key, "POST", "", json={"model": "stub", "mode": "fun"}).json()["id"]
    talks.accounts.set_tier("tier-alice", ["personas=['regular']"])
    assert [one["id"] for one in talks.call(key, "GET", "/personas").json()["data"]] == ["regular"]
    for method, path, body in (
        ("POST", "", {"model": "stub", "mode": "fun"}),
        ("PATCH", f"/{chat}", {"mode": "fun"}),
        ("POST", "/personas", {"name": "Pirate", "prompt": "Arr."}),
    ):
        answer = talks.call(key, method, path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "mode_not_allowed"), path
    ids = talks.call(key, "POST", f"/{chat}/messages", json={"text": "Hello"}).json()
    path = f"/{chat}/messages/{ids['answer_id']}"
    wait_for(lambda: talks.call(key, "GET", path).json()["state"] == "failed")
    assert "doesn't include the mode fun" in talks.call(key, "GET", path).json()["notice"]


def test_conversations_are_put_into_folders_pinned_renamed_found_and_removed(talks: Talks) -> None:
    key = talks.key("alice")
    folder = talks.call(key, "POST", "/folders", json={"name": "Work"}).json()["id"]
    chats = [talks.call(key, "POST", "", json={"model": "stub"}).json()["id"] for _ in range(3)]
    changed = {"pinned": True, "folder_id": folder, "title": "Über Wale"}
    assert talks.call(key, "PATCH", f"/{chats[0]}", json=changed).json().items() >= changed.items()
    assert talks.call(key, "GET", "").json()["data"][0]["id"] == chats[0]
    for query, found in (("?query=uber", chats[:1]), (f"?folder_id={folder}", chats[:1]), ("?query=nothing", [])):
        assert [one["id"] for one in talks.call(key, "GET", query).json()["data"]] == found, query
    assert talks.call(key, "PATCH", f"/folders/{folder}", json={"name": "Play"}).json()["name"] == "Play"
    assert talks.call(key, "DELETE", f"/folders/{folder}").json()["deleted"]
    assert talks.call(key, "GET", f"/{chats[0]}").json()["folder_id"] is None
    assert talks.call(key, "DELETE", f"/{chats[0]}").json()["deleted"]
    assert talks.call(key, "GET", f"/{chats[0]}").status_code == 404
    for path in (f"/{chats[1]}/messages/{10**20}", f"/{chats[1]}/messages/-1", "/%00", f"/{chats[1]}%00/messages"):
        assert talks.call(key, "GET", path).status_code == 404, path
    for body in ({"title": ""}, {"temperature": 3}, {"pinned": None}, {"owner": "bob"}, {"mode": "x"}):
        assert talks.call(key, "PATCH", f"/{chats[1]}", json=body).status_code == 400, body


def test_a_conversation_goes_out_and_comes_in_and_is_shared(talks: Talks) -> None:
    alice, bob = talks.key("alice"), talks.key("bob")
    chat = talks.call(alice, "POST", "", json={"model": "stub"}).json()["id"]
    assert talks.call(alice, "POST", f"/{chat}/shares").status_code == 400
    ids = talks.call(alice, "POST", f"/{chat}/messages", json={"text": "Über Wale"}).json()
    answer = f"/{chat}/messages/{ids['answer_id']}"
    wait_for(lambda: talks.call(alice, "GET", answer).json()["state"] == "complete")
    for form, kind in (("json", "application/json"), ("markdown", "text/markdown"), ("pdf", "application/pdf")):
        file = talks.call(alice, "GET", f"/{chat}/export?format={form}")
        assert file.headers["content-type"].startswith(kind)
        assert file.headers["content-disposition"].startswith("attachment; filename*=UTF-8''%C3%9Cber%20Wale.")
    content = talks.call(alice, "GET", f"/{chat}/export").content
    assert talks.call(alice, "POST", "/import", content=content).json() == {
        "imported": [],
        "already_there": ["Über Wale"],
    }
    (own,) = talks.call(bob, "POST", "/import", content=content).json()["imported"]
    assert talks.call(bob, "GET", f"/{own['id']}/messages").json()["data"][0]["content"] == "Über Wale"
    assert talks.call(bob, "POST", "/import", content=b"nonsense").status_code == 400
    share = talks.call(alice, "POST", f"/{chat}/shares").json()
    assert talks.call(alice, "GET", "/shares").json()["data"] == [share]
    assert talks.call(alice, "DELETE", f"/shares/{share['id']}").json()["deleted"]
    assert talks.call(alice, "GET", f"/{chat}/export?format=exe").status_code == 400


def test_an_answer_that_is_being_written_is_its_users_alone(talks: Talks) -> None:
    alice, bob = talks.key("alice"), talks.key("bob")
    talks.stub.control(rate=5, tokens=50)
    chat = talks.call(alice, "POST", "", json={"model": "stub"}).json()["id"]
    asked = talks.call(alice, "POST", f"/{chat}/messages", json={"text": "Slowly"}).json()
    answer = f"/{chat}/messages/{asked['answer_id']}"
    assert talks.call(alice, "POST", f"{answer}/resume").status_code == 200
    for key_path in (("GET", f"{answer}/events"), ("POST", f"{answer}/resume"), ("POST", f"/{chat}/stop")):
        assert talks.call(bob, *key_path).status_code == 404, key_path
    assert talks.call(alice, "GET", answer).json()["state"] == "writing"
    talks.call(alice, "POST", f"/{chat}/stop")


def test_tools_are_chosen_and_only_those_that_there_are(talks: Talks) -> None:
    key = talks.key("alice")
    chat = talks.call(key, "POST", "", json={"model": "stub"}).json()["id"]
    offered = talks.call(key, "GET", f"/{chat}/tools").json()["data"]
    assert [one["name"] for one in offered] == ["calculator", "now", "search_documents"]
    assert not any(one["on"] or one["asks"] for one in offered)
    refused = talks.call(key, "PUT", f"/{chat}/tools", json={"on": ["now", "rm"]})
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400,
        "on: there is no tool 'rm'; there are calculator, now, search_documents",
    )
    chosen = talks.call(key, "PUT", f"/{chat}/tools", json={"on": ["now"]}).json()["data"]
    assert [one["name"] for one in chosen if one["on"]] == ["now"]
    talks.call(key, "POST", f"/{chat}/messages", json={"text": "Hello"}).raise_for_status()
    wait_for(lambda: talks.stub.seen()["last"].get("tools"))
    assert [one["function"]["name"] for one in talks.stub.seen()["last"]["tools"]] == ["now"]


BODIES = {
    ("POST", ""): {"model": "stub"},
    ("PATCH", "/{chat_id}"): {"title": "stolen", "pinned": True},
    ("POST", "/{chat_id}/messages"): {"text": "stolen"},
    ("POST", "/{chat_id}/messages/{message_id}/calls/{number}"): {"verdict": "allow"},
    ("PUT", "/{chat_id}/tools"): {"on": ["now"]},
    ("POST", "/folders"): {"name": "bobs"},
    ("PATCH", "/folders/{folder_id}"): {"name": "stolen"},
    ("POST", "/personas"): {"name": "bobs", "prompt": "x"},
    ("PATCH", "/personas/{persona_id}"): {"name": "stolen"},
}
"""What each operation is sent by somebody whose things it is not about."""


def test_another_user_reads_and_changes_nothing_on_any_operation(talks: Talks) -> None:
    talks.key("alice")
    bob = talks.key("bob")
    own = talks.store.of(talks.accounts.user("alice").id)
    chat = own.create("stub")
    own.add(chat.id, "assistant", "alices-answer", own.add(chat.id, "user", "alices-question", None).id, "stub")
    things = {"chat_id": chat.id, "folder_id": own.folders.create("alices-folder").id}
    things |= {"persona_id": own.personas.create("alices-persona", "alices-prompt").id}
    things |= {"share_id": own.shares.create(chat.id).id}
    answer_id = own.thread(chat.id)[-1].id
    things |= {"message_id": str(answer_id), "number": "0"}
    tools = ToolStore(own.database)
    tools.keep(answer_id, Call(0, 0, "call_0_0", "now", '{"zone": "alices-zone"}', "waiting"))

    def kept() -> object:
        return own.conversations(), own.thread(chat.id), own.folders.all(), own.personas.all(), tools.chosen(chat.id)

    before = kept()
    tried = set()
    for method, path in talks.operations:
        if path == "/import":
            continue  # it takes a file, and makes what is one's own
        body = BODIES.get((method, path))
        named = re.findall(r"{(\w+)}", path)
        there = path.format(**things)
        answer = talks.call(bob, method, there, json=body) if body else talks.call(bob, method, there)
        assert "alices-" not in answer.text, (method, path)
        if named:
            nobody = path.format(**dict.fromkeys(named, "nothing") | {"message_id": "1", "number": "0"})
            told = talks.call(bob, method, nobody, json=body) if body else talks.call(bob, method, nobody)
            assert answer.status_code == told.status_code, (method, path, answer.text)
            assert answer.status_code in {404, 409}, (method, path, answer.text)
            tried.update(named)
    assert tried == things.keys()
    assert own.shares.all()[0].id == things["share_id"]
    assert "alices-" not in talks.call(bob, "GET", "?query=alices").text
    assert kept() == before
