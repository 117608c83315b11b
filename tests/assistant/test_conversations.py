"""Conversations over HTTP: what is acknowledged is kept, and answers are followed and taken up by a message's id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from gateways import Stub, numbers_of, plain_client, serving, wait_for

from modelworks.assistant.chat import Assistant
from modelworks.assistant.conversations import conversation_routes
from modelworks.assistant.store import ConversationStore
from modelworks.assistant.talk import CUT
from modelworks.serve.api import create_app
from modelworks.serve.config import ServeConfig
from modelworks.serve.routing import Router
from modelworks.serve.store import Store
from modelworks.spec.errors import OperationError
from modelworks.spec.fields import validate

_KILL = Path(__file__).parents[2] / "benchmarks" / "kill_server.py"


@dataclass
class Served:
    """A server with conversations, and the stub that answers."""

    client: httpx.Client
    stub: Stub
    store: ConversationStore

    def ask(self, text: str) -> tuple[str, str]:
        """Ask in a new conversation: its path, and the answer's."""
        chat = self.client.post("/v1/chats", json={"model": "stub"}).json()["id"]
        ids = self.client.post(f"/v1/chats/{chat}/messages", json={"text": text}).raise_for_status().json()
        return f"/v1/chats/{chat}", f"/v1/chats/{chat}/messages/{ids['answer_id']}"

    def events(self, path: str, **options: Any) -> Iterator[dict[str, Any]]:
        """The events of a message."""
        with self.client.stream("GET", f"{path}/events", **options) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    stub = Stub("stub")
    router = Router(validate(ServeConfig, {"engines": {"a": {"url": stub.url}}, "tries": 1}))
    store = ConversationStore(tmp_path / "modelworks.db")
    assistant = Assistant(store, router)
    app = create_app(router, Store(tmp_path / "models"), routers=[conversation_routes(lambda _: assistant)])
    with serving(app) as address, plain_client(base_url=address) as client:
        yield Served(client, stub, store)
    store.close()
    stub.end()


def test_an_answer_is_followed_lost_and_found_again_without_a_gap(served: Served) -> None:
    served.stub.control(rate=40, tokens=30)
    chat, path = served.ask("Count.")
    seen, events = "", served.events(path)
    for part in events:
        assert part["offset"] == len(seen)
        seen += part["text"]
        if len(seen) > 60:
            break
    events.close()
    for part in served.events(path, headers={"Last-Event-ID": str(len(seen))}):
        assert part["offset"] == len(seen)
        seen += part["text"]
    assert part["state"] == "complete"
    assert numbers_of(seen) == list(range(30))
    question, answer = served.client.get(f"{chat}/messages").json()["data"]
    assert (question["content"], answer["content"], answer["state"]) == ("Count.", seen, "complete")
    assert next(served.events(path, params={"offset": 5}))["text"] == seen[5:]


def test_an_answer_that_broke_off_is_taken_up_where_it_stands(served: Served) -> None:
    served.stub.control(fault="break", tokens=6)
    _, path = served.ask("Count.")
    cut = [part["state"] for part in served.events(path)][-1]
    before = served.client.get(path).json()
    assert (cut, before["state"], numbers_of(before["content"])) == ("failed", "failed", [0, 1, 2])
    served.stub.control(fault="none")
    wait_for(lambda: served.client.post(f"{path}/resume").status_code == 200)
    parts = list(served.events(path, params={"offset": len(before["content"])}))
    after = served.client.get(path).json()
    assert after["content"] == before["content"] + "".join(part["text"] for part in parts)
    assert (after["state"], after["notice"], after["id"]) == ("complete", None, before["id"])
    asked = served.stub.seen()["last"]
    assert [message["role"] for message in asked["messages"]] == ["system", "user", "assistant"]
    assert asked["messages"][-1]["content"] == before["content"]
    assert (asked["continue_final_message"], asked["add_generation_prompt"]) == (True, False)
    refused = served.client.post(f"{path}/resume")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_resumable")


def test_an_answer_that_reached_its_longest_goes_on_and_one_that_is_whole_does_not(served: Served) -> None:
    served.stub.control(tokens=3)
    _, path = served.ask("Count.")
    whole = "".join(part["text"] for part in served.events(path))
    wait_for(lambda: served.client.post(f"{path}/resume").status_code == 409)
    served.store.save(int(path.rpartition("/")[2]), whole, "complete", f"Something else. {CUT}")
    assert served.client.post(f"{path}/resume").json()["offset"] == len(whole)
    parts = list(served.events(path, params={"offset": len(whole)}))
    after = served.client.get(path).json()
    assert after["content"] == whole + "".join(part["text"] for part in parts) != whole
    assert (after["state"], after["notice"]) == ("complete", None)


def test_who_has_seen_more_than_a_crash_left_is_told_where_to_go_on(served: Served) -> None:
    _, path = served.ask("Count.")
    whole = "".join(part["text"] for part in served.events(path))
    served.store.save(int(path.rpartition("/")[2]), whole[:10], "interrupted")
    part = next(served.events(path, headers={"Last-Event-ID": str(len(whole))}))
    assert (part["offset"], part["text"], part["state"]) == (10, "", "interrupted")


def test_what_is_not_there_or_not_of_this_conversation_is_not_found(served: Served) -> None:
    served.stub.control(rate=10, tokens=100)
    chat, path = served.ask("Count.")
    other = served.client.post("/v1/chats", json={"model": "stub"}).json()["id"]
    number = path.rpartition("/")[2]
    for wrong in (f"/v1/chats/{other}/messages/{number}", f"{chat}/messages/999", "/v1/chats/none/messages/1"):
        assert served.client.get(wrong).status_code == 404
        assert served.client.get(f"{wrong}/events").status_code == 404
        assert served.client.post(f"{wrong}/resume").status_code in {404, 409}
    assert served.client.post(f"{chat}/messages", json={"text": "And now?"}).status_code == 400
    assert served.client.post("/v1/chats/none/stop").status_code == 404
    assert served.client.post(f"{chat}/stop").json() == {"stopped": True}
    assert served.client.get(path).json()["state"] == "stopped"


@pytest.mark.slow
def test_a_server_that_is_killed_again_and_again_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    home = tmp_path / "home"
    try:
        Store(home / "models").pull("smollm2-135m")
    except OperationError as error:
        pytest.skip(f"SmolLM2 can't be fetched on this machine: {error}")
    report = tmp_path / "report.json"
    ended = subprocess.run(
        [sys.executable, str(_KILL), "--kills", "4", "--clients", "3", "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "MODELWORKS_HOME": str(home)},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(report.read_text())
    assert found["wrong"] == []
    assert found["kills"] == 4
    assert found["questions"] >= 4
    assert found["resumed"] >= 1
