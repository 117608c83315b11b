"""Turns that are fair across processes: each tells the others, over Redis, what it has done for whom.

Limits need no Redis: they are sums in the database. But whose turn it is, each process decides by its own counts
(`serve.fairness`), so that one who keeps a whole worker busy would have a fresh count at the next. With
``MODELWORKS_REDIS`` set, what a request has cost is told to all processes, on a channel that keeps nothing. When Redis
is away, each goes on by itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI

from modelworks.serve.fairness import FairQueue
from modelworks.spec.errors import InputError

ADDRESS = "MODELWORKS_REDIS"
"""The environment variable with Redis' address."""
_CHANNEL = "modelworks:spent"
_TELL_S = 0.1
_AGAIN_S = 2.0
_LOG = logging.getLogger("modelworks.shared")


class SharedTurns:
    """Tells other processes what was done here, and a queue what was done there.

    Parameters
    ----------
    queue : FairQueue
        The queue of this process.
    address : str
        Redis' address, such as ``redis://10.0.0.7:6379/0``.

    Raises
    ------
    InputError
        If the address can't be one, or the package isn't installed.
    """

    def __init__(self, queue: FairQueue, address: str) -> None:
        try:
            from redis.asyncio import Redis
            from redis.exceptions import RedisError
        except ModuleNotFoundError:
            raise InputError(
                f"{ADDRESS} is set, and redis is not installed: pip install 'modelworks[redis]', or unset it"
            ) from None
        try:
            self._redis = Redis.from_url(address, socket_connect_timeout=2.0, socket_timeout=None)
        except ValueError:
            raise InputError(f"{ADDRESS} is not accepted: an address such as 'redis://10.0.0.7:6379/0' is") from None
        self._errors = (RedisError, OSError)
        self._queue = queue
        self._me = secrets.token_hex(8)
        self._untold: defaultdict[str, float] = defaultdict(float)
        queue.tell = self._note

    def _note(self, tenant: str, cost: float) -> None:
        self._untold[tenant] += cost

    async def run(self) -> None:
        """Tell and listen until the task is cancelled."""
        try:
            await asyncio.gather(self._keep(self._telling), self._keep(self._listening))
        finally:
            self._queue.tell = None
            await self._redis.aclose()

    async def _keep(self, work: Any) -> None:
        while True:
            try:
                await work()
            except self._errors as error:
                _LOG.warning("Redis does not answer, turns are this process' own: %s", type(error).__name__)
                self._untold.clear()
                await asyncio.sleep(_AGAIN_S)

    async def _telling(self) -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            if self._untold:
                told, self._untold = dict(self._untold), defaultdict(float)
                await self._redis.publish(_CHANNEL, orjson.dumps({"from": self._me, "spent": told}))

    async def _listening(self) -> None:
        async with self._redis.pubsub() as channel:
            await channel.subscribe(_CHANNEL)
            async with aclosing(channel.listen()) as messages:
                async for message in messages:
                    if message["type"] == "message":
                        self._hear(message["data"])

    def _hear(self, data: bytes) -> None:
        try:
            told = orjson.loads(data)
            if told["from"] != self._me:
                for tenant, cost in told["spent"].items():
                    self._queue.charge(str(tenant), float(cost))
        except (ValueError, KeyError, TypeError, AttributeError):
            _LOG.warning("something else speaks on Redis' channel %s", _CHANNEL)


def share_turns(app: FastAPI, queue: FairQueue) -> None:
    """Share a queue's turns as long as an application runs, if the environment names a Redis.

    Raises
    ------
    InputError
        As `SharedTurns`.
    """
    address = os.environ.get(ADDRESS)
    if not address:
        return
    shared, inner = SharedTurns(queue, address), app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[Any]:
        task = asyncio.create_task(shared.run(), name="shared turns")
        try:
            async with inner(running) as state:
                yield state
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    app.router.lifespan_context = lifespan
