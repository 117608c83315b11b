"""What strangers send to a gateway: addresses to fetch, paths that climb, bodies that swell, headers that break."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from gateways import HELLO, Stub, plain_client, serving

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database
from modelworks.assistant.gateway import AccountAccess, account_routes, administration_routes
from modelworks.assistant.ledger import Ledger
from modelworks.serve.access import SCOPES
from modelworks.serve.api import create_app
from modelworks.serve.config import ServeConfig
from modelworks.serve.fairness import FairQueue
from modelworks.serve.routing import Router
from modelworks.serve.store import Store
from modelworks.spec.fields import validate


@dataclass
class Trap:
    """A place in this machine that nobody has any business with; it notes who calls."""

    port: int
    callers: list[Any] = field(default_factory=list)


@dataclass
class Target:
    """A gateway, and the key of a user who may do everything but administrate."""

    address: str
    key: str
    stub: Stub
    client: httpx.Client

    def post(self, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        """One request with the key."""
        headers = {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        return self.client.post(self.address + path, headers=headers, **options)

    def raw(self, request: bytes) -> bytes:
        """Bytes as no library would send them; what comes back until the connection ends."""
        host, port = self.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(request)
            answer = b""
            while block := connection.recv(1 << 16):
                answer += block
        return answer


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    found = Trap(listener.getsockname()[1])

    def listen() -> None:
        while True:
            try:
                connection, caller = listener.accept()
            except OSError:
                return
            found.callers.append(caller)
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield found
    listener.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder, stub = tmp_path_factory.mktemp("gateway"), Stub("stub")
    models = {"seen": {"on": {"a": "stub"}, "images": True}}
    router = Router(validate(ServeConfig, {"engines": {"a": {"url": stub.url}}, "models": models}))
    database = Database(folder / "modelworks.db")
    access = AccountAccess(Accounts(database), Ledger(database))
    access.accounts.set_tier("all", ["models=['*']", "images=true", "live_knowledge=true", "parallel=100"])
    access.accounts.add_user("mallory", tier="all")
    key = access.accounts.create_key("mallory", scopes=[scope for scope in SCOPES if scope != "admin"])[1]
    routers = [account_routes(access), administration_routes(access)]
    app = create_app(router, Store(folder / "models"), access=access, queue=FairQueue(router.capacity), routers=routers)
    with serving(app) as address, plain_client() as client:
        yield Target(address, key, stub, client)
    database.close()
    stub.end()


ADDRESSES = [
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[0:0:0:0:0:ffff:7f00:1]:{port}/",
    "http://2130706433:{port}/",  # decimal
    "http://0x7f000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://user:pass@127.0.0.1:{port}/",
    "http://example.org@127.0.0.1:{port}/",
    "http://127.0.0.1.nip.io:{port}/",  # a name that leads inwards, as a rebound one does
    "HTTP://127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "https://127.0.0.1:{port}/",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_GET",
    "file:///etc/passwd",
    " http://127.0.0.1:{port}/",
    "data:text/html,<script>",
    "DATA:image/png;base64,AAAA",
    "data:,http://127.0.0.1:{port}/",
]


@pytest.mark.parametrize("form", ADDRESSES)
def test_no_address_that_a_request_holds_is_fetched(target: Target, trap: Trap, form: str) -> None:
    address = form.format(port=trap.port)
    image = {"type": "image_url", "image_url": {"url": address}}
    schema = {"type": "object", "properties": {"a": {"$ref": address}}}
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [image]}]},
        {"messages": [{"role": "user", "content": [image | {"image_url": address}]}]},
    ]
    for body in bodies:
        answer = target.post(json={"model": "seen"} | body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    # These are an engine's to understand. They may be refused or passed on; they are not ours to follow.
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    form_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for body in ({"tools": [tool]}, {"response_format": form_}):
        assert target.post(json={"model": "seen", "messages": HELLO} | body).status_code in {200, 400}
    target.post("/v1/embeddings", json={"model": "stub", "input": address})
    target.client.get(f"{target.address}/v1/models/{address}", headers={"Authorization": f"Bearer {target.key}"})
    assert trap.callers == []


CLIMBS = [
    "/v1/models/../../../../etc/passwd",
    "/v1/models/..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/v1/models/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/v1/models/..%252f..%252fetc%252fpasswd",
    "/v1/models/..\\..\\etc\\passwd",
    "/v1/models//etc/passwd",
    "/v1/models/%00/etc/passwd",
    "/v1/account/keys/../../admin/users",
    "/v1/account/keys/..%2f..%2fadmin%2fusers",
    "/v1/account/..;/admin/users",
    "/v1//admin/users",
    "/V1/ADMIN/USERS",
    "//v1/admin/users",
    "/v1/account%2f..%2fadmin/users",
    "/v1/models/../admin/users",
]


@pytest.mark.parametrize("path", CLIMBS)
def test_no_path_climbs_out_of_where_it_may_go(target: Target, path: str) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {target.key}\r\nConnection: close\r\n\r\n"
    answer = target.raw(head.encode())
    assert int(answer.split()[1]) in {400, 403, 404, 405}
    assert b"root:" not in answer
    assert b"mallory" not in answer


def bomb_of(width: int, height: int) -> str:
    """A PNG of a few hundred kilobytes that is so many white points."""

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(width // 8 + 1)) for _ in range(height)) + rows.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    image = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", packed) + part(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(image).decode()


def test_what_swells_when_it_is_unpacked_is_not_unpacked(target: Target) -> None:
    whole = json.dumps({"model": "stub", "messages": HELLO}).encode()
    swelling = {
        "gzip": gzip.compress(whole[:-1] + b" " * (200 << 20) + b"}"),
        "deflate": zlib.compress(whole[:-1] + b" " * (200 << 20) + b"}"),
        "gzip, gzip": gzip.compress(gzip.compress(bytes(200 << 20))),
        "br": b"\x00" * 1000,
    }
    image = {"type": "image_url", "image_url": {"url": bomb_of(40_000, 40_000)}}
    with_image = json.dumps({"model": "seen", "messages": [{"role": "user", "content": [image]}]}).encode()
    before = psutil.Process().memory_info().rss
    began = time.monotonic()
    for coding, content in swelling.items():
        answer = target.post(content=content, headers={"Content-Encoding": coding})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert target.post(content=with_image).status_code == 200  # as it came, to the engine that can see
    assert target.stub.seen()["last"]["messages"][0]["content"] == [image]
    assert psutil.Process().memory_info().rss - before < 32 << 20
    assert time.monotonic() - began < 10


def _chat(more: str) -> bytes:
    return f'{{"model": "stub", "messages": [{{"role": "user", "content": "x"}}], {more}}}'.encode()


SWOLLEN = {
    "a list in a list in a list": _chat(f'"tools": {"[" * 400_000}{"]" * 400_000}'),
    "an object in an object": _chat('"metadata": ' + '{"a":' * 400_000 + "1" + "}" * 400_000),
    "a number of a million digits": _chat('"seed": ' + "9" * 1_000_000),
    "a number beyond all numbers": _chat('"temperature": 1e999999'),
    "a key a hundred thousand times": _chat(",".join(['"stop": "a"'] * 100_000)),
    "a schema of a hundred thousand parts": _chat(
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {'
        + ",".join(f'"{number}": {{}}' for number in range(100_000))
        + "}}}}]"
    ),
    "nine megabytes": _chat('"user": "' + "x" * (9 << 20) + '"'),
    "half a megabyte of escapes": _chat('"user": ' + '"' + "\\u0041" * 80_000 + '"'),
}


@pytest.mark.parametrize("what", SWOLLEN)
def test_what_costs_much_to_read_is_read_quickly_or_refused(target: Target, what: str) -> None:
    began = time.monotonic()
    answer = target.post(content=SWOLLEN[what])
    assert answer.status_code in {200, 400, 413}
    assert time.monotonic() - began < 5
    assert len(answer.content) < 4096


HEADERS = [
    b"Authorization: Bearer \xff\xfe\x00",
    b"Authorization: Bearer mw-" + b"a" * 40_000,
    b"Authorization: Bearer",
    b"Authorization: Basic bWFsbG9yeTo=",
    b"Authorization: Bearer mw-0000000000000000-' OR 1=1 --",
    b"Authorization: Bearer a\r\nAuthorization: Bearer b",
    b"Content-Length: -1",
    b"Content-Length: 9999999999999999999999",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"X-Forwarded-For: 127.0.0.1\r\nX-Admin: true",
    b"Cookie: session=root",
]


@pytest.mark.parametrize("header", HEADERS)
def test_no_header_lets_anyone_in_or_makes_the_server_fail(target: Target, header: bytes) -> None:
    answer = target.raw(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + header + b"\r\n\r\n")
    # Two keys, or an unreadable one: no key. What is no HTTP ends with the connection.
    assert not answer or int(answer.split()[1]) in {400, 401, 429, 431}
