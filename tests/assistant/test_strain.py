"""The gateway as it is started, with accounts, in a process of its own: too much to do, and clients that vanish."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from gateways import HELLO, Stub, plain_client, wait_for

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database
from modelworks.assistant.tables import UsageRow

_GATEWAY = Path(__file__).parents[1] / "serve" / "observed_gateway.py"
CONCURRENCY, WAITING = 8, 16


@dataclass
class Process:
    """A gateway that runs, the stub behind it, and a key for each user."""

    address: str
    keys: dict[str, str]
    stub: Stub
    client: httpx.Client
    database: Database
    home: Path
    """Where its database, its log and what it wrote to standard error are."""

    def held(self) -> dict[str, Any]:
        """What the process holds."""
        answer = self.client.get(f"{self.address}/v1/held", headers={"Authorization": f"Bearer {self.keys['root']}"})
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    def request(self, user: str) -> bytes:
        """A chat that streams, as it goes over the wire."""
        body = json.dumps({"model": "stub", "messages": HELLO, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.keys[user]}\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def connect(self) -> socket.socket:
        """A bare connection."""
        host, port = self.address.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=60)

    def open_rows(self) -> int:
        """Requests for which something is still set aside."""
        with self.database.read() as session:
            return session.scalar(select(func.count()).select_from(UsageRow).where(UsageRow.open)) or 0


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    home = tmp_path_factory.mktemp("home")
    database = Database(home / "modelworks.db")
    accounts = Accounts(database)
    accounts.set_tier("much", ["models=['*']", "parallel=10000"])
    for user in ("root", "flood", "more", "small"):
        accounts.add_user(user, tier="much", admin=user == "root")
    keys = {
        user: accounts.create_key(user, scopes=["admin"] if user == "root" else ["generate"])[1]
        for user in ("root", "flood", "more", "small")
    }
    stub = Stub("stub")
    config = home / "serve.toml"
    config.write_text(
        f'[engines.stub]\nurl = "{stub.url}"\nconcurrency = {CONCURRENCY}\n[queue]\nwaiting = {WAITING}\n'
    )
    environment = {name: value for name, value in os.environ.items() if name != "MODELWORKS_DATABASE"}
    command = [sys.executable, str(_GATEWAY), str(config), str(home / "log.jsonl")]
    environment["MODELWORKS_HOME"] = str(home)
    with (home / "errors.txt").open("w") as written:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=written, text=True, env=environment)
    assert server.stdout is not None
    address = next(word for word in server.stdout.readline().split() if word.startswith("http")).removesuffix("/v1")
    with plain_client() as client:
        yield Process(address, keys, stub, client, database, home)
    server.terminate()
    server.wait(30)
    stub.end()
    database.close()


def test_at_three_times_its_capacity_it_refuses_at_once_starves_nobody_and_recovers(process: Process) -> None:
    process.stub.control(rate=16, tokens=8)  # half a second each: sixteen a second
    ended: list[tuple[str, int, float, str | None]] = []
    until = time.monotonic() + 4

    def ask(user: str) -> None:
        began = time.monotonic()
        headers = {"Authorization": f"Bearer {process.keys[user]}"}
        answer = process.client.post(
            f"{process.address}/v1/chat/completions", json={"model": "stub", "messages": HELLO}, headers=headers
        )
        ended.append((user, answer.status_code, time.monotonic() - began, answer.headers.get("retry-after")))

    def keep_asking(user: str, every_s: float) -> None:
        """Independently of the answers, as many clients together do."""
        begun = []
        while time.monotonic() < until:
            begun.append(threading.Thread(target=ask, args=(user,)))
            begun[-1].start()
            time.sleep(every_s)
        for thread in begun:
            thread.join()

    asking = [
        threading.Thread(target=keep_asking, args=arguments)
        for arguments in (("flood", 1 / 32), ("more", 1 / 14), ("small", 1 / 2))
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    counted = {
        user: [sum(one[:2] == (user, status) for one in ended) for status in (200, 429)] for user in process.keys
    }
    assert sum(map(sum, counted.values())) == len(ended)  # nothing but answers and refusals
    assert counted["small"][1] == 0
    assert counted["flood"][1] > counted["flood"][0] / 2
    assert counted["more"][0] > 0.6 * counted["flood"][0]
    refusals = [one for one in ended if one[1] == 429]
    assert all(retry is not None and 1 <= int(retry) <= 60 for _, _, _, retry in refusals)
    assert sorted(seconds for _, _, seconds, _ in refusals)[len(refusals) // 2] < 0.5
    # Those who waited have been answered; who comes now waits for nobody.
    began = time.monotonic()
    ask("small")
    assert ended[-1][1] == 200
    assert time.monotonic() - began < 2
    assert process.stub.seen()["running"] == 0
    assert wait_for(lambda: not process.open_rows())


def test_a_thousand_clients_that_vanish_leave_nothing_behind(process: Process) -> None:
    process.stub.control(rate=20, tokens=1000)  # fifty seconds each, if nobody leaves
    request = process.request("flood")

    def vanish(number: int) -> None:
        with process.connect() as connection:
            connection.sendall(request[: -number % 7 - 1] if number % 5 == 4 else request)
            if number % 2:
                assert connection.recv(1 << 12)
            if number % 3 == 2:  # a reset instead of a farewell
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def round_of(count: int) -> dict[str, Any]:
        with ThreadPoolExecutor(CONCURRENCY) as threads:
            list(threads.map(vanish, [number for number in range(2 * count) if number % 10 not in {4, 9}][:count]))
            list(threads.map(vanish, [4, 14] * (count // 20)))  # in the middle of their own request
        began = time.monotonic()
        wait_for(lambda: not process.stub.seen()["running"])
        assert time.monotonic() - began < 3
        wait_for(lambda: not process.open_rows())
        return wait_for(settled)

    def settled() -> dict[str, Any] | None:
        held = process.held()
        tasks = held["tasks"]
        return held if sum(tasks.values()) <= most and held["files"] <= files + 2 else None

    most, files = 10**6, 10**6
    first = round_of(200)
    most, files = sum(first["tasks"].values()), first["files"]
    middle = round_of(400)
    last = round_of(400)
    assert last["threads"] <= first["threads"] + 2
    assert last["objects"] - middle["objects"] < 2 * 400  # a request that is held, holds dozens
    assert last["memory"] - middle["memory"] < 4 << 20
    process.stub.control(rate=200, tokens=8)
    with process.connect() as connection:
        connection.sendall(process.request("small"))
        answer = b""
        while b"[DONE]" not in answer:
            block = connection.recv(1 << 16)
            assert block
            answer += block
    assert answer.count(b'"content"') == 8
    assert_nothing_is_told(process)


def assert_nothing_is_told(process: Process) -> None:
    """The log says who asked, and never what, nor with which key."""
    assert (process.home / "errors.txt").read_text() == ""
    written = (process.home / "log.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert {"flood", "small"} <= {line["user"] for line in lines if line["message"] == "request"}
    assert len(lines) > 500
    kept = b"".join(file.read_bytes() for file in process.home.glob("modelworks.db*"))
    for key in process.keys.values():
        secret = key.split("-", 2)[2]
        assert secret not in written
        assert secret.encode() not in kept
    assert HELLO[0]["content"] not in written
    assert "@" not in written  # the stub's words are numbers at times
