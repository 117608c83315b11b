"""Turns across processes, over a real Redis."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelworks.serve.fairness import FairQueue
from modelworks.serve.shared import SharedTurns
from modelworks.spec.errors import InputError

pytest.importorskip("redis", reason="redis is not installed: pip install 'modelworks[redis]'")


class RedisServer:
    """Debian's Redis, on a socket of the tests' own."""

    def __init__(self, folder: str) -> None:
        self._socket = f"{folder}/redis.sock"
        self.address = f"unix://{self._socket}"
        self.start()

    def start(self) -> None:
        words = ["--port", "0", "--unixsocket", self._socket, "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        Path(self._socket).unlink(missing_ok=True)


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server on this machine; Debian's package is redis-server")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path has to be short
        server = RedisServer(folder)
        yield server
        server.end()


async def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def ask(queue: FairQueue, tenant: str, order: list[str], written: int = 1) -> None:
    async with queue.place("m", tenant) as place:
        order.append(tenant)
        place.spent(0, written)


class Listening(FairQueue):
    """A queue that says when it was told something."""

    heard = 0

    def charge(self, tenant: str, cost: float) -> None:
        super().charge(tenant, cost)
        self.heard += 1


async def next_after_a_flood_elsewhere(here: Listening, there: FairQueue, told: bool) -> str:
    """Who has the next turn here, of one who has had much there and one who has had nothing."""
    order: list[str] = []
    holding, done = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with here.place("m", "holder"):
            holding.set()
            await done.wait()

    holder = asyncio.create_task(hold())
    await holding.wait()
    waiting = [asyncio.create_task(ask(here, "flood", order)), asyncio.create_task(ask(here, "quiet", order))]
    await until(lambda: here.waiting().get("m") == 2)
    before = here.heard
    await ask(there, "flood", [], written=5000)
    if told:
        await until(lambda: here.heard > before)
    done.set()
    await asyncio.gather(holder, *waiting)
    return order[0]


async def test_what_one_had_at_another_process_counts_here(redis: RedisServer) -> None:
    here, there = Listening(lambda _: 1), Listening(lambda _: 1)
    assert await next_after_a_flood_elsewhere(here, there, told=False) == "flood", "it came first"
    here, there = Listening(lambda _: 1), Listening(lambda _: 1)
    tasks = [asyncio.create_task(SharedTurns(queue, redis.address).run()) for queue in (here, there)]
    try:
        await joined(here, there)
        assert await next_after_a_flood_elsewhere(here, there, told=True) == "quiet"
        # Redis dies: each goes on alone. It comes back: so does what they say.
        redis.end()
        await asyncio.sleep(0.3)
        assert await next_after_a_flood_elsewhere(here, there, told=False) in {"flood", "quiet"}
        redis.start()
        await joined(here, there)
        assert await next_after_a_flood_elsewhere(here, there, told=True) == "quiet"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def joined(here: Listening, there: FairQueue) -> None:
    """Wait until one hears the other."""
    before = here.heard
    async with asyncio.timeout(20):
        while here.heard == before:
            await ask(there, "somebody", [])
            await asyncio.sleep(0.15)


async def test_one_that_hears_itself_counts_nothing_twice(redis: RedisServer) -> None:
    here, there = Listening(lambda _: 1), Listening(lambda _: 1)
    tasks = [asyncio.create_task(SharedTurns(queue, redis.address).run()) for queue in (here, there)]
    await joined(here, there)
    assert there.heard == 0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="MODELWORKS_REDIS is not accepted"):
        SharedTurns(FairQueue(lambda _: 1), "10.0.0.7:6379")
