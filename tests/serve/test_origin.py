"""Who may speak with the server: its owner's own tools and pages, and no other site's page."""

from __future__ import annotations

import socket

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from modelworks.serve.origin import OwnOriginOnly


async def hello(_: object) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


@pytest.fixture(scope="module")
def browser() -> TestClient:
    routes = [Route("/", hello, methods=["GET", "POST"]), WebSocketRoute("/talk", talk)]
    return TestClient(OwnOriginOnly(Starlette(routes=routes), ["Chat.Example.org"]))


OWN = [
    ("127.0.0.1:8080", None),
    ("localhost:8080", "http://localhost:8080"),
    ("[::1]:8080", "http://[::1]:8080"),
    ("192.168.1.7:8080", "http://192.168.1.7:8080"),
    (socket.gethostname(), None),
    ("LOCALHOST", "http://localhost"),
    ("chat.example.org", "https://chat.example.org"),
    ("chat.example.org:443", "https://chat.example.org"),
]
FOREIGN = [
    ("evil.example", None),  # a name of theirs that leads to 127.0.0.1
    ("evil.example:8080", "http://evil.example:8080"),
    ("127.0.0.1.evil.example", None),
    ("localhost.evil.example", None),
    ("", None),
    ("127.0.0.1:x", None),
    ("127.0.0.1:8080", "http://evil.example"),
    ("127.0.0.1:8080", "null"),
    ("127.0.0.1:8080", "http://127.0.0.1:9090"),
    ("localhost:8080", "http://127.0.0.1:8080"),
    ("127.0.0.1:8080", "http://[broken"),
]


def headers(host: str, origin: str | None) -> dict[str, str]:
    return {"Host": host} | ({"Origin": origin} if origin else {})


@pytest.mark.parametrize(("host", "origin"), OWN)
def test_ones_own_tools_and_pages_are_let_in(browser: TestClient, host: str, origin: str | None) -> None:
    for method in ("GET", "POST"):
        assert browser.request(method, "/", headers=headers(host, origin)).text == "hello"
    with browser.websocket_connect("/talk", headers=headers(host, origin)) as websocket:
        assert websocket.receive_text() == "hello"


@pytest.mark.parametrize(("host", "origin"), FOREIGN)
def test_another_sites_page_is_turned_away(browser: TestClient, host: str, origin: str | None) -> None:
    for method in ("GET", "POST"):
        answer = browser.request(method, "/", headers=headers(host, origin))
        assert answer.status_code == 403
        assert "hello" not in answer.text
    with (
        pytest.raises(WebSocketDisconnect),
        browser.websocket_connect("/talk", headers=headers(host, origin)) as websocket,
    ):
        websocket.receive_text()


def test_the_api_is_behind_it(address: str) -> None:
    assert httpx.get(f"{address}/v1/models").status_code == 200
    assert httpx.get(f"{address}/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert httpx.post(f"{address}/v1/chat/completions", headers={"Origin": "http://evil.example"}).status_code == 403
