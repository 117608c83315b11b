"""Who is next when the engines are full."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack

import pytest

from modelworks.serve.errors import RequestError
from modelworks.serve.fairness import FairQueue


class Engines:
    """So many requests at once; each takes one turn of the loop's clock."""

    def __init__(self, capacity: int | None, waiting: int = 1000, wait_s: float = 30.0) -> None:
        self.queue = FairQueue(lambda _: capacity, waiting, wait_s)
        self.served: list[str] = []
        self.running = self.most = 0

    async def request(self, tenant: str, weight: float = 1.0, written: int = 10, lasts_s: float = 0.001) -> None:
        async with self.queue.place("m", tenant, weight) as place:
            self.running += 1
            self.most = max(self.most, self.running)
            self.served.append(tenant)
            await asyncio.sleep(lasts_s)
            self.running -= 1
            place.spent(0, written)

    def ask(self, tenant: str, count: int, **options: float) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.request(tenant, **options)) for _ in range(count)]


async def test_one_who_asks_for_little_does_not_wait_behind_one_who_asks_for_much() -> None:
    engines = Engines(capacity=1)
    flood = engines.ask("flood", 60)
    await asyncio.sleep(0.01)
    begun = len(engines.served)
    await asyncio.gather(*engines.ask("small", 3))
    late = [index for index, tenant in enumerate(engines.served[begun:]) if tenant == "small"]
    assert max(late) <= 8
    await asyncio.gather(*flood)
    assert engines.most == 1
    assert Counter(engines.served) == {"flood": 60, "small": 3}


async def test_shares_are_by_weight_and_by_tokens_not_by_requests() -> None:
    engines = Engines(capacity=1)
    tasks = engines.ask("heavy", 200, weight=4.0) + engines.ask("light", 200) + engines.ask("long", 200, written=40)
    while len(engines.served) < 150:
        await asyncio.sleep(0.005)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    share = Counter(engines.served[30:150])  # the first are served before it is known what they cost
    assert 2.8 < share["heavy"] / share["light"] < 5.5
    assert 2.5 < share["light"] / share["long"] < 6.5


async def test_a_pause_is_no_credit() -> None:
    engines = Engines(capacity=1)
    await asyncio.gather(*engines.ask("steady", 50))
    steady = engines.ask("steady", 40)
    await asyncio.sleep(0.005)
    begun = len(engines.served)
    late = engines.ask("late", 40)
    await asyncio.gather(*steady, *late)
    first = engines.served[begun : begun + 20]
    assert 7 <= first.count("late") <= 13


async def test_when_the_queue_is_full_the_one_with_most_in_it_is_refused_and_at_once() -> None:
    engines = Engines(capacity=1, waiting=10)
    flood = engines.ask("flood", 30, lasts_s=0.05)
    await asyncio.sleep(0)
    began = asyncio.get_running_loop().time()
    small = engines.ask("small", 2, lasts_s=0.001)
    done, _ = await asyncio.wait(flood, timeout=0.02)
    assert len(done) == 30 - 11 + 2
    assert asyncio.get_running_loop().time() - began < 0.2
    for task in done:
        error = task.exception()
        assert isinstance(error, RequestError)
        assert (error.status, error.code) == (429, "overloaded")
        assert 1 <= error.retry_after_s <= 60
    await asyncio.gather(*small)
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)


async def test_who_waits_too_long_is_refused_and_the_others_go_on() -> None:
    engines = Engines(capacity=1, wait_s=0.05)
    first = engines.ask("a", 1, lasts_s=0.2)
    await asyncio.sleep(0)
    with pytest.raises(RequestError, match=r"waited for 0.05 s"):
        await engines.request("b")
    await asyncio.gather(*first)
    await engines.request("b")


async def test_those_who_leave_free_their_places_a_thousand_times() -> None:
    engines = Engines(capacity=4, waiting=2000)
    for _ in range(4):
        leaving = engines.ask("leaves", 250, lasts_s=60)
        staying = engines.ask("stays", 5)
        await asyncio.sleep(0.01)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        engines.running = 0
        await asyncio.wait_for(asyncio.gather(*staying), 5)
    assert engines.served.count("stays") == 20
    assert engines.queue.waiting() == {"m": 0}


async def test_an_engine_that_queues_by_itself_has_no_queue_here() -> None:
    engines = Engines(capacity=None)
    await asyncio.gather(*engines.ask("a", 50))
    assert engines.most == 50


async def test_those_who_wait_go_on_when_an_engine_comes_back() -> None:
    capacity = 0
    queue = FairQueue(lambda _: capacity, 10, 10)

    async def request() -> None:
        async with queue.place("m", "a"):
            pass

    waiting = asyncio.create_task(request())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    capacity = 1
    await asyncio.wait_for(waiting, 2)


async def test_those_whose_limits_are_looked_at_count_as_waiting() -> None:
    queue = FairQueue(lambda _: 1, waiting=4)
    with ExitStack() as arriving:
        for _ in range(5):  # one runs, four wait
            arriving.enter_context(queue.arriving("m", "flood"))
        with pytest.raises(RequestError, match="more than 4 requests wait"), queue.arriving("m", "flood"):
            pass
        arriving.enter_context(queue.arriving("m", "small"))  # whoever has less is let in: a flood's goes for it
    with queue.arriving("m", "flood"):
        pass
