"""Who is next when the engines are full: the one who has had least of them, for what its tier weighs.

The virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each tenant has a
count of the work done for it, divided by its weight, and the next request is taken from the tenant with the smallest.
Who comes back after a pause doesn't bring the pause along as credit. Work is counted in tokens, a written one twice;
it is charged with a guess when a request begins, and put right when it ends.

What can't wait is refused at once: when the queue is full, the newest request of whoever has the most waiting. Whether
it is full is looked at before anything is done for a request (`FairQueue.arriving`), so that refusing costs next to
nothing, and those whose limits are still being looked at count as waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from modelworks.serve.errors import RequestError

WRITTEN = 2.0
"""What a written token costs, where a read one costs 1."""
_FIRST_GUESS = 256.0
_LOOK_S = 0.5
"""How often those who wait look whether an engine has come back."""
_MOST_ABSENT = 10_000
_SMOOTHING = 0.1


class _Waiter:
    def __init__(self, tenant: str, weight: float, cost: float) -> None:
        self.tenant, self.weight, self.cost = tenant, weight, cost
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Place:
    """A request that runs. Whoever runs it says what it has cost."""

    def __init__(self, cost: float) -> None:
        self.cost = cost

    def spent(self, read: int, written: int) -> None:
        """The tokens of the request, now that they are known."""
        self.cost = read + WRITTEN * written


class FairQueue:
    """The queue in front of the engines.

    Parameters
    ----------
    capacity : callable
        How many requests of a model run at once; None if they don't queue here.
    waiting : int
        How many requests may wait for a model.
    wait_s : float
        How long one may wait.
    """

    def __init__(self, capacity: Callable[[str], int | None], waiting: int = 256, wait_s: float = 30.0) -> None:
        self._capacity = capacity
        self._most_waiting = waiting
        self._wait_s = wait_s
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, dict[str, deque[_Waiter]]] = {}
        self._arriving: dict[str, Counter[str]] = {}
        self._count: dict[str, float] = {}
        self._guessed: dict[str, float] = {}
        """Of the count, what is a guess for requests that run."""
        self._present: Counter[str] = Counter()
        self._floor = 0.0
        self._answer_cost = WRITTEN * _FIRST_GUESS
        self._answer_s = 1.0
        self.tell: Callable[[str, float], None] | None = None
        """Told what a request has cost its tenant, for other processes' queues (`charge`)."""

    def change(self, waiting: int, wait_s: float) -> None:
        """Other limits, from now on."""
        self._most_waiting, self._wait_s = waiting, wait_s

    def charge(self, tenant: str, cost: float) -> None:
        """Count what was done for a tenant elsewhere, as `tell` has it; of no concern while it has nothing here."""
        if tenant in self._present:
            self._count[tenant] += cost

    def waiting(self) -> dict[str, int]:
        """How many wait, by model."""
        return {model: sum(map(len, tenants.values())) for model, tenants in self._waiting.items()}

    @contextmanager
    def arriving(self, model: str, tenant: str, weight: float = 1.0) -> Iterator[None]:
        """Hold a request's place among those that are looked at before they wait.

        Raises
        ------
        RequestError
            429 if it would be refused by `place` as things stand.
        """
        capacity = self._capacity(model)
        if capacity is None:
            yield
            return
        arriving = self._arriving.setdefault(model, Counter())
        tenants = self._waiting.get(model, {})
        room = self._most_waiting + max(capacity - self._running[model], 0)
        if sum(map(len, tenants.values())) + arriving.total() >= room:
            lengths = {name: (len(queue) + arriving[name]) / queue[0].weight for name, queue in tenants.items()}
            lengths |= {name: float(count) for name, count in arriving.items() if name not in tenants}
            own = (len(tenants.get(tenant, ())) + arriving[tenant] + 1) / weight
            if own >= max(lengths.values(), default=0.0):
                raise self._too_much(model, f"more than {self._most_waiting} requests wait for the model {model}")
        arriving[tenant] += 1
        try:
            yield
        finally:
            arriving[tenant] -= 1
            if not arriving[tenant]:
                del arriving[tenant]

    @asynccontextmanager
    async def place(self, model: str, tenant: str, weight: float = 1.0, read: float = 0.0) -> AsyncIterator[Place]:
        """Wait for a turn, and hold it as long as the block runs.

        Parameters
        ----------
        model : str
            What is asked for.
        tenant : str
            Who asks.
        weight : float
            The tenant's share beside that of others.
        read : float
            Tokens of the prompt, about.

        Raises
        ------
        RequestError
            429, with the time after which it may go better, if there are too many or it took too long.
        """
        if self._capacity(model) is None:
            yield Place(0.0)
            return
        waiter = _Waiter(tenant, weight, read + self._answer_cost)
        self._join(tenant)
        try:
            await self._turn(model, waiter)
        except BaseException:
            self._leave(tenant)
            raise
        place, began = Place(waiter.cost), time.monotonic()
        try:
            yield place
        finally:
            self._answer_s += _SMOOTHING * (time.monotonic() - began - self._answer_s)
            self._answer_cost += _SMOOTHING * (max(place.cost - read, 0) - self._answer_cost)
            self._count[tenant] += (place.cost - waiter.cost) / weight
            self._guessed[tenant] -= waiter.cost / weight
            self._running[model] -= 1
            if self.tell is not None:
                self.tell(tenant, place.cost / weight)
            self._leave(tenant)
            self._go_on(model)

    async def _turn(self, model: str, waiter: _Waiter) -> None:
        self._make_room(model, waiter)
        tenants = self._waiting.setdefault(model, {})
        tenants.setdefault(waiter.tenant, deque()).append(waiter)
        self._go_on(model)
        until = time.monotonic() + self._wait_s
        try:
            while not waiter.turn.done():
                left = until - time.monotonic()
                if left <= 0:
                    raise self._too_much(model, f"the request waited for {self._wait_s:g} s and its turn didn't come")
                await asyncio.wait({waiter.turn}, timeout=min(left, _LOOK_S))
                self._go_on(model)
            waiter.turn.result()
        except BaseException:
            self._withdraw(model, waiter)
            raise

    def _withdraw(self, model: str, waiter: _Waiter) -> None:
        """Take back a request that isn't wanted any more; if its turn has come meanwhile, the next one has it."""
        if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
            self._count[waiter.tenant] -= waiter.cost / waiter.weight
            self._guessed[waiter.tenant] -= waiter.cost / waiter.weight
            self._running[model] -= 1
            self._go_on(model)
            return
        waiter.turn.cancel()
        queue = self._waiting.get(model, {}).get(waiter.tenant)
        if queue and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._waiting[model][waiter.tenant]

    def _make_room(self, model: str, waiter: _Waiter) -> None:
        tenants = self._waiting.get(model, {})
        free = self._running[model] < (self._capacity(model) or 0)
        if (free and not tenants) or sum(map(len, tenants.values())) < self._most_waiting:
            return
        lengths = {tenant: len(queue) / queue[0].weight for tenant, queue in tenants.items()}
        lengths[waiter.tenant] = (len(tenants.get(waiter.tenant, ())) + 1) / waiter.weight
        longest = max(lengths, key=lambda tenant: (lengths[tenant], tenant == waiter.tenant))
        refusal = self._too_much(model, f"more than {self._most_waiting} requests wait for the model {model}")
        if longest == waiter.tenant:
            raise refusal
        dropped = tenants[longest].pop()
        if not tenants[longest]:
            del tenants[longest]
        dropped.turn.set_exception(refusal)

    def _go_on(self, model: str) -> None:
        """Give turns as long as there is room."""
        tenants = self._waiting.get(model)
        while tenants and self._running[model] < (self._capacity(model) or 0):
            tenant = min(tenants, key=self._count.__getitem__)
            waiter = tenants[tenant].popleft()
            if not tenants[tenant]:
                del tenants[tenant]
            if waiter.turn.done():
                continue
            self._floor = max(self._floor, self._count[tenant] - self._guessed[tenant])
            self._count[tenant] += waiter.cost / waiter.weight
            self._guessed[tenant] += waiter.cost / waiter.weight
            self._running[model] += 1
            waiter.turn.set_result(None)

    def _join(self, tenant: str) -> None:
        if not self._present[tenant]:
            others = [self._count[other] - self._guessed[other] for other in self._present]
            floor = min(others) if others else self._floor
            self._count[tenant] = max(self._count.get(tenant, 0.0), floor)
            self._guessed[tenant] = 0.0
        self._present[tenant] += 1

    def _leave(self, tenant: str) -> None:
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant], self._guessed[tenant]
            if len(self._count) > _MOST_ABSENT + len(self._present):
                self._count = {name: self._count[name] for name in self._present}

    def _too_much(self, model: str, reason: str) -> RequestError:
        waiting = sum(map(len, self._waiting.get(model, {}).values())) + 1
        seconds = waiting * self._answer_s / max(self._capacity(model) or 0, 1)
        return RequestError(
            f"there is too much to do: {reason}",
            status=429,
            code="overloaded",
            retry_after_s=min(max(seconds, 1.0), 60.0),
        )
