"""The gateway with accounts, over real ports: keys, scopes, tiers, limits, and nobody near another's things."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import func, select, text

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from accounted import Gateway
from gateways import HELLO, client_of, numbers_of, text_of, wait_for

from modelworks.assistant.tables import UsageRow
from modelworks.serve.access import OPEN_PATHS, SCOPES, scope_of
from modelworks.serve.log import JsonLines

PASSWORD = "correct horse battery"
NOTHING = {
    "key_id": "0" * 16,
    "response_id": "resp_" + "0" * 48,
    "file_id": "file-" + "0" * 32,
    "batch_id": "batch_" + "0" * 32,
}
"""Names of things that nobody has."""
DOCUMENTATION = {"/v1/docs", "/openapi.json", "/v1/docs/oauth2-redirect"}


def filled(path: str, **values: str) -> str:
    """A path of the schema with its parameters filled in."""
    for name, value in values.items():
        path = path.replace(f"{{{name}}}", value).replace(f"{{{name}:path}}", value)
    return path


def body_for(gateway: Gateway, method: str, path: str) -> Any:
    """A body that the route accepts, so that what refuses is not the body."""
    known = {
        "/v1/chat/completions": {"model": "stub", "messages": HELLO},
        "/v1/completions": {"model": "stub", "prompt": "x"},
        "/v1/responses": {"model": "stub", "input": "x"},
        "/v1/embeddings": {"model": "stub", "input": "x"},
        "/v1/files": {"file": "x", "purpose": "batch"},
        "/v1/batches": {
            "input_file_id": "file-0",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
        "/v1/account/login": {"user": "alice", "password": "not it, not it"},
        "/v1/account/keys": {"name": "made by another"},
        "/v1/account/password": {"current": "not it, not it", "new": "something long enough"},
    }
    needed = "requestBody" in gateway.schema["paths"][path][method.lower()]
    assert not needed or path in known, f"{method} {path} is new: say here what it takes"
    return {"json": known[path]} if needed else {}


def test_every_route_but_the_open_ones_needs_a_key_with_its_scope(gateway: Gateway) -> None:
    keys = {scope: gateway.user(f"only-{scope}", scopes=[scope], admin=True) for scope in SCOPES}
    for method, path in gateway.operations():
        if path in OPEN_PATHS:
            continue
        there = filled(path, name="stub", **NOTHING)
        body = body_for(gateway, method, path)
        assert gateway.call(None, method, there, **body).status_code == 401, path
        assert gateway.call("mw-wrong", method, there, **body).status_code in {401, 429}, path
        for scope, key in keys.items():
            answer = gateway.call(key, method, there, **body)
            assert (answer.status_code == 403) == (scope != scope_of(path)), (method, path, scope, answer.text)
            assert answer.status_code < 500
    for path in (*DOCUMENTATION, "/", "/v1", "/v1/nothing", "/v1//chat/completions", "/V1/models", "/metrics/"):
        assert gateway.call(None, "GET", path).status_code == 401, path
    assert gateway.call(None, "GET", "/health").status_code == 200


def test_every_path_of_an_administrator_is_closed_to_a_user_with_every_other_scope(gateway: Gateway) -> None:
    key = gateway.user("alice")
    mine = [(method, path) for method, path in gateway.operations() if scope_of(path) == "admin"]
    assert {path for _, path in mine} >= {"/metrics", "/v1/admin/reload", "/v1/admin/users", "/v1/admin/audit"}
    assert {gateway.call(key, method, path).status_code for method, path in mine if path not in OPEN_PATHS} == {403}


def test_another_user_reads_and_changes_nothing_on_any_route(gateway: Gateway) -> None:
    alice, bob = gateway.user("alice", password=PASSWORD, team="alices-team"), gateway.user("bob", password=PASSWORD)
    assert gateway.call(alice, "POST", "/v1/account/keys", json={"name": "alices-key"}).status_code == 200
    client_of(gateway.address, alice).chat.completions.create(model="stub", messages=HELLO)
    wait_for(lambda: not _open_rows(gateway))
    client = client_of(gateway.address, alice)
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions"} | {
        "body": {"model": "stub", "prompt": "x"}
    }
    file = client.files.create(file=("alices-file", json.dumps(request).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
    response = client.responses.create(model="stub", input="alices-question")
    keys = gateway.accounts.keys("alice")
    things = {"key_id": [key.id for key in keys], "file_id": [one.id for one in client.files.list()]}
    things |= {"batch_id": [batch.id], "response_id": [response.id]}
    hers = [gateway.accounts.user("alice").id, "alices-", *(name for names in things.values() for name in names)]
    before = _state(gateway, alice)
    tried = set()
    for method, path in gateway.operations():
        kind = next((kind for kind in things if f"{{{kind}}}" in path), None)
        for name in things[kind] if kind else [""]:
            there = filled(path, name="stub", **{kind or "": name})
            answer = gateway.call(bob, method, there, **body_for(gateway, method, path))
            assert not [part for part in hers if part in answer.text.replace(name or "-", "")], (method, path)
            if kind:
                assert answer.status_code == 404, (method, path)
                nobody = gateway.call(bob, method, filled(path, **NOTHING)).text
                assert answer.text.replace(name, NOTHING[kind]) == nobody
                tried.add(kind)
    assert tried == things.keys()
    theft = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    assert gateway.call(bob, "POST", "/v1/batches", json=theft).status_code == 404
    assert _state(gateway, alice) == before
    signed_in = {"user": "alice", "password": PASSWORD}
    assert gateway.call(None, "POST", "/v1/account/login", json=signed_in).status_code == 200


def _state(gateway: Gateway, key: str) -> Any:
    account, keys, usage = (gateway.call(key, "GET", f"/v1/account{part}").json() for part in ("", "/keys", "/usage"))
    files, batches = (gateway.call(key, "GET", path).json() for path in ("/v1/files", "/v1/batches"))
    return account, [{**one, "last_used": None} for one in keys["data"]], usage, files, batches


def test_a_key_makes_no_key_that_can_more_and_no_user_names_another(gateway: Gateway) -> None:
    alice = gateway.user("alice", scopes=["account"], admin=True)
    for scopes in (["generate"], ["admin"], ["account", "models"]):
        assert gateway.call(alice, "POST", "/v1/account/keys", json={"scopes": scopes}).status_code == 403
    made = gateway.call(alice, "POST", "/v1/account/keys", json={}).json()
    assert made["scopes"] == ["account"]
    assert gateway.call(made["key"], "GET", "/v1/account").json()["user"] == "alice"
    for extra in ({"user": "bob"}, {"user_id": "x"}, {"admin": True}):
        assert gateway.call(alice, "POST", "/v1/account/keys", json=extra).status_code == 400


def test_a_revoked_key_is_worthless_at_the_next_request(gateway: Gateway) -> None:
    alice = gateway.user("alice")
    assert gateway.call(alice, "GET", "/v1/models").status_code == 200
    key_id = gateway.call(alice, "GET", "/v1/account/keys").json()["data"][0]["id"]
    assert gateway.call(alice, "DELETE", f"/v1/account/keys/{key_id}").json()["revoked"]
    answer = gateway.call(alice, "GET", "/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_official_client_sees_the_errors_that_it_knows(gateway: Gateway) -> None:
    alice = gateway.user("alice", "messages=1")
    with pytest.raises(openai.AuthenticationError):
        client_of(gateway.address, "mw-wrong").models.list()
    client = client_of(gateway.address, alice)
    assert [model.id for model in client.models.list()] == ["seen", "stub"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("hidden")
    with pytest.raises(openai.PermissionDeniedError, match="does not include the model hidden"):
        client.chat.completions.create(model="hidden", messages=HELLO)
    assert numbers_of(text_of(client.chat.completions.create(model="stub", messages=HELLO, stream=True))) == list(
        range(8)
    )
    with pytest.raises(openai.RateLimitError, match="1 answers in 2 hours") as error:
        client.chat.completions.create(model="stub", messages=HELLO)
    assert int(error.value.response.headers["retry-after"]) > 7000


@pytest.mark.parametrize(
    ("asked", "limits", "says"),
    [
        ({"reasoning_effort": "high"}, "modes=['fast', 'think']", "the mode think"),
        ({"extra_body": {"search_parameters": {"mode": "on"}}}, "live_knowledge=true", "live knowledge"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context=5000", "up to 2,000 are accepted"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}],
                    }
                ],
            },
            "images=true",
            "images",
        ),
    ],
)
def test_what_the_tier_does_not_include_is_refused_and_what_it_does_is_passed_on(
    gateway: Gateway, asked: dict[str, Any], limits: str, says: str
) -> None:
    client = client_of(gateway.address, gateway.user("alice", "context=2000"))
    request = {"model": "seen", "messages": HELLO, **asked}
    with pytest.raises(openai.PermissionDeniedError, match=says):
        client.chat.completions.create(**request)
    gateway.accounts.set_tier("tier-alice", [limits, "context=5000"])
    client.chat.completions.create(**request)
    sent = gateway.stub.seen()["last"]
    expected = {key: value for key, value in request.items() if key not in {"extra_body", "model"}}
    expected |= request.get("extra_body", {})
    assert {key: sent[key] for key in expected} == expected


def test_an_answer_is_no_longer_than_the_tier_and_the_day_allow(gateway: Gateway) -> None:
    alice = gateway.user("alice", "answer=6", "tokens_per_day=100")
    client = client_of(gateway.address, alice)
    for asked in ({}, {"max_tokens": 1000}, {"max_completion_tokens": 7}):
        answer = client.chat.completions.create(model="stub", messages=HELLO, **asked)
        assert answer.usage.completion_tokens == 6
    wait_for(lambda: not _open_rows(gateway))
    used = gateway.call(alice, "GET", "/v1/account").json()["used"]
    assert used == {"messages": 3, "tokens_today": 3 * (5 + 6)}
    answer = client.completions.create(model="stub", prompt=["a", "b"], n=2, max_tokens=3)
    assert answer.usage.completion_tokens == 12


@pytest.mark.parametrize("limits", [["messages=5"], ["tokens_per_day=50", "answer=8"], ["parallel=5"]])
def test_many_requests_at_once_get_no_more_than_the_tier_has(gateway: Gateway, limits: list[str]) -> None:
    gateway.stub.control(rate=8)  # an answer takes a second, so that none has ended before the last has begun
    alice = gateway.user("alice", *limits)
    body = {"model": "stub", "messages": HELLO}
    with ThreadPoolExecutor(25) as threads:
        answers = list(threads.map(lambda _: gateway.call(alice, "POST", "/v1/chat/completions", json=body), range(25)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) + statuses.count(429) == 25
    assert 1 <= statuses.count(200) <= 5
    assert "parallel=5" in limits or statuses.count(200) >= 4  # a request's tokens are a guess until it has ended
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)


def test_a_client_that_leaves_pays_for_what_was_written_and_keeps_no_place(gateway: Gateway) -> None:
    gateway.stub.control(rate=50, tokens=1000)
    alice = gateway.user("alice", "parallel=1", "tokens_per_day=1000")
    client = client_of(gateway.address, alice)
    stream = client.chat.completions.create(model="stub", messages=HELLO, stream=True)
    heard = [next(stream) for _ in range(10)]
    with pytest.raises(openai.RateLimitError, match="1 requests at once"):
        client.chat.completions.create(model="stub", messages=HELLO)
    stream.close()
    row = wait_for(gateway.ledger.usage)[0]
    assert len(heard) <= row["completion_tokens"] + 1 < 100
    gateway.stub.control(tokens=2)
    assert client.chat.completions.create(model="stub", messages=HELLO).usage.completion_tokens == 2


def test_a_user_with_little_is_served_while_another_floods(gateway: Gateway) -> None:
    gateway.stub.control(rate=16)  # eight answers at a time, half a second each
    flood, small = gateway.user("flood"), gateway.user("small")
    body = {"model": "stub", "messages": HELLO}
    ended: list[str] = []

    def ask(key: str, name: str) -> None:
        assert gateway.call(key, "POST", "/v1/chat/completions", json=body).status_code == 200
        ended.append(name)

    flooding = [threading.Thread(target=ask, args=(flood, "flood")) for _ in range(48)]
    for thread in flooding:
        thread.start()
    wait_for(lambda: ended)
    asking = [threading.Thread(target=ask, args=(small, "small")) for _ in range(3)]
    for thread in asking:
        thread.start()
    for thread in [*asking, *flooding]:
        thread.join()
    assert max(index for index, name in enumerate(ended) if name == "small") < 40


def test_who_is_refused_because_there_is_too_much_to_do_has_used_no_message(gateway: Gateway) -> None:
    gateway.stub.control(rate=1)
    gateway.queue.change(0, 1.0)
    alice, bob = gateway.user("alice"), gateway.user("bob", "messages=1")
    streams = [
        client_of(gateway.address, alice).chat.completions.create(model="stub", messages=HELLO, stream=True)
        for _ in range(8)
    ]
    for _ in range(3):
        answer = gateway.call(bob, "POST", "/v1/chat/completions", json={"model": "stub", "messages": HELLO})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    for stream in streams:
        stream.close()
    gateway.stub.control(rate=200)
    wait_for(lambda: not gateway.stub.seen()["running"])
    assert (
        client_of(gateway.address, bob).chat.completions.create(model="stub", messages=HELLO).usage.total_tokens == 13
    )


def test_a_database_that_fails_spoils_no_answer_that_runs_and_lets_nobody_in(gateway: Gateway) -> None:
    gateway.stub.control(rate=20)
    alice = gateway.user("alice")
    stream = iter(client_of(gateway.address, alice).chat.completions.create(model="stub", messages=HELLO, stream=True))
    first = next(stream)
    with gateway.accounts.database.engine.begin() as connection:
        connection.execute(text("DROP TABLE usage"))
        connection.execute(text("DROP TABLE keys"))
    assert numbers_of(text_of([first, *stream])) == list(range(8))
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/account/login")):
        body = {"json": {"user": "nobody", "password": PASSWORD}} if method == "POST" else {}
        with gateway.accounts.database.engine.begin() as connection:
            connection.execute(text("DROP TABLE IF EXISTS attempts"))
        answer = gateway.call(alice, method, path, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert "modelworks.db" not in answer.text


def test_guessing_a_password_is_slowed_and_another_address_is_not(gateway: Gateway) -> None:
    gateway.user("alice", password=PASSWORD)

    def login(word: str) -> httpx.Response:
        return gateway.call(None, "POST", "/v1/account/login", json={"user": "alice", "password": word})

    assert login(PASSWORD).status_code == 200
    with ThreadPoolExecutor(8) as threads:
        statuses = [answer.status_code for answer in threads.map(lambda n: login(f"guess number {n}"), range(12))]
    assert 5 <= statuses.count(401) <= 7  # five are free; the waits after them are a second, then two
    assert statuses.count(401) + statuses.count(429) == 12
    assert gateway.accounts.sign_in("alice", PASSWORD, "198.51.100.9")


def test_a_sign_in_is_a_key_and_a_new_password_ends_it(gateway: Gateway) -> None:
    gateway.user("alice", password=PASSWORD)
    key = gateway.call(None, "POST", "/v1/account/login", json={"user": "alice", "password": PASSWORD}).json()["key"]
    assert gateway.call(key, "GET", "/v1/models").status_code == 200
    change = {"current": "not the password", "new": "another long password"}
    assert gateway.call(key, "PUT", "/v1/account/password", json=change).status_code == 401
    assert (
        gateway.call(key, "PUT", "/v1/account/password", json=change | {"current": PASSWORD, "new": "x"}).status_code
        == 400
    )
    assert gateway.call(key, "PUT", "/v1/account/password", json=change | {"current": PASSWORD}).status_code == 200
    assert gateway.call(key, "GET", "/v1/models").status_code == 401


def test_no_log_line_and_no_refusal_holds_a_key_a_password_or_what_was_said(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "modelworks")
    caplog.handler.setFormatter(JsonLines())
    alice = gateway.user("alice", "messages=2", password=PASSWORD)
    secrets = [alice, alice[20:], PASSWORD, "an unspeakable question", "0@"]
    said = [{"role": "user", "content": secrets[3]}]
    body = {"model": "stub", "messages": said}
    refusals = [gateway.call(alice[:-1] + "!", "POST", "/v1/chat/completions", json=body)]
    assert gateway.call(alice, "POST", "/v1/chat/completions", json=body).status_code == 200
    gateway.stub.control(fault="error")
    refusals.append(gateway.call(alice, "POST", "/v1/chat/completions", json=body))
    refusals.append(gateway.call(alice, "POST", "/v1/chat/completions", json=body | {"temperature": secrets[3]}))
    gateway.stub.control(fault="refuse")
    refusals.append(gateway.call(alice, "POST", "/v1/chat/completions", json=body))
    wrong = ({"user": "alice", "password": PASSWORD * 99}, {"user": "alice", "password": PASSWORD, "x": 1})
    refusals += [gateway.call(None, "POST", "/v1/account/login", json=given) for given in wrong]
    assert all(answer.status_code >= 400 for answer in refusals)
    lines = [JsonLines().format(record) for record in caplog.records if record.name.startswith("modelworks")]
    noted = [json.loads(line) for line in lines if json.loads(line)["message"] == "request"]
    assert (noted[0]["user"], noted[0]["status"], noted[0]["completion_tokens"]) == ("alice", 200, 8)
    for written in [*lines, *(answer.text for answer in refusals), gateway.call(None, "GET", "/health").text]:
        assert not [secret for secret in secrets if secret in written]


def test_an_error_of_ours_is_logged_by_its_place_and_not_by_its_words() -> None:
    try:
        raise ValueError("an unspeakable question")
    except ValueError:
        record = logging.getLogger("modelworks.x").makeRecord("m", 40, "f", 1, "broke", (), sys.exc_info())
    line = JsonLines().format(record)
    assert "unspeakable" not in line
    assert json.loads(line)["error"] == "ValueError"


def test_figures_are_kept_by_user_and_model(gateway: Gateway) -> None:
    root, alice = gateway.user("root", scopes=["admin"], admin=True), gateway.user("alice")
    client_of(gateway.address, alice).chat.completions.create(model="stub", messages=HELLO)
    wait_for(lambda: not _open_rows(gateway))
    page = gateway.call(root, "GET", "/metrics").text
    assert 'modelworks_tenant_requests_total{model="stub",status="200",user="alice"} 1.0' in page
    assert 'modelworks_tenant_tokens_total{kind="completion",model="stub",user="alice"} 8.0' in page
    engines = gateway.call(root, "GET", "/v1/admin/engines").json()["data"]
    assert [(engine["name"], engine["well"]) for engine in engines] == [("a", True)]
    assert gateway.call(root, "POST", "/v1/admin/reload").json() == {"engines": ["a"]}
    wait_for(lambda: not _open_rows(gateway))
    assert gateway.call(root, "GET", "/v1/admin/usage").json()["data"][0]["completion_tokens"] == 8


def _open_rows(gateway: Gateway) -> int:
    with gateway.accounts.database.read() as session:
        return session.scalar(select(func.count()).select_from(UsageRow).where(UsageRow.open)) or 0


def test_many_disconnects_leave_no_place_taken(gateway: Gateway) -> None:
    gateway.stub.control(rate=20, tokens=1000)
    alice = gateway.user("alice", "parallel=1000")
    body = json.dumps({"model": "stub", "messages": HELLO, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {alice}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    host, port = gateway.address.removeprefix("http://").split(":")

    def leave(number: int) -> None:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(request)
            if number % 2:
                assert connection.recv(1 << 12)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, range(100)))
    began = time.monotonic()
    wait_for(lambda: not gateway.stub.seen()["running"])
    assert time.monotonic() - began < 3
    wait_for(lambda: not _open_rows(gateway))
    gateway.stub.control(rate=200, tokens=8)
    last = gateway.call(alice, "POST", "/v1/chat/completions", json={"model": "stub", "messages": HELLO})
    assert last.json()["usage"]["completion_tokens"] == 8


def test_a_response_that_was_kept_is_its_owners_alone_and_goes_with_the_user(gateway: Gateway) -> None:
    alice, bob = gateway.user("alice"), gateway.user("bob")
    kept = client_of(gateway.address, alice).responses.create(model="stub", input="hello")
    there = f"/v1/responses/{kept.id}"
    assert gateway.call(alice, "GET", there).json()["output"] == json.loads(kept.to_json())["output"]
    following = {"model": "stub", "input": "x", "previous_response_id": kept.id}
    for method, path, body in (
        ("GET", there, {}),
        ("GET", f"{there}/input_items", {}),
        ("DELETE", there, {}),
        ("POST", "/v1/responses", {"json": following}),
    ):
        assert gateway.call(bob, method, path, **body).status_code == 404, (method, path)
    assert gateway.call(alice, "DELETE", there).json()["deleted"]
    assert gateway.call(alice, "GET", there).status_code == 404
