"""Refreshes sources when they are due, a few at a time. Several servers on one database share them out."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from modelworks.assistant.live.fetching import FetchError
from modelworks.assistant.live.rounds import Round, Tools
from modelworks.assistant.live.store import HELD_S, Held, Kind, LostError
from modelworks.spec.errors import InputError, OperationError

AT_ONCE = 3
"""Sources that a server refreshes at the same time."""
LOOK_S = 5.0
"""How often is looked for what is due."""
LONGEST_S = 1800.0
"""Seconds that a refresh may take."""
_KINDS: tuple[Kind, ...] = ("feed", "site", "folder", "x")
_LOG = logging.getLogger("modelworks.live")


class Refresher:
    """The refreshes of one server.

    Parameters
    ----------
    tools
        What they work with.
    look_s
        How often is looked for what is due.
    """

    def __init__(self, tools: Tools, look_s: float = LOOK_S) -> None:
        self._tools, self._store, self._look_s = tools, tools.store, look_s
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look at once: something has become due."""
        self._wake.set()

    async def run(self) -> None:
        """Refresh until this is cancelled; what is being refreshed then ends, and is due as it was."""
        try:
            while True:
                self._wake.clear()
                try:
                    await self._begin()
                except OperationError as error:  # a database that is away for a while
                    _LOG.info("no source could be taken: %s", error)
                except Exception:  # noqa: BLE001 (what fails once may not end all refreshes for good)
                    _LOG.exception("no source could be taken")
                with suppress(TimeoutError):
                    # Not wait_for: in Python 3.11 it loses a cancellation that comes with what it waits for.
                    async with asyncio.timeout(self._look_s):
                        await self._wake.wait()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _begin(self) -> None:
        if (free := AT_ONCE - len(self._running)) <= 0:
            return
        for source in await asyncio.to_thread(self._store.take, _KINDS, free):
            task = asyncio.create_task(self._refresh(source), name=f"refresh {source.id}")
            self._running.add(task)
            task.add_done_callback(self._done)
        await asyncio.sleep(0)  # a task that is cancelled before it begins never reaches its `except`

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake.set()

    async def _refresh(self, source: Held) -> None:
        work = asyncio.create_task(Round(source, self._tools).run())
        holding = asyncio.create_task(self._hold(source, work))
        try:
            async with asyncio.timeout(LONGEST_S):
                await work
        except asyncio.CancelledError:
            if not work.done():
                work.cancel()
                await asyncio.wait([work])
            # Not in a thread: at a server's end the loop's threads may already be gone.
            with suppress(LostError, OperationError):
                self._store.release(source)
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
        except LostError:
            pass
        except TimeoutError:
            await self._fail(source, f"it took more than {LONGEST_S:,.0f} seconds")
        except FetchError as error:
            await self._fail(source, str(error), error.retry_s)
        except (InputError, OperationError) as error:
            await self._fail(source, str(error))
        except Exception:  # noqa: BLE001 (what another's service sends can be anything)
            _LOG.exception("a refresh of a %s failed", source.kind)
            await self._fail(source, "what came is not what was expected; the server's log says more")
        finally:
            holding.cancel()

    async def _fail(self, source: Held, reason: str, retry_s: float | None = None) -> None:
        _LOG.info("a %s could not be refreshed: %s", source.kind, reason)
        with suppress(LostError, OperationError):
            await asyncio.to_thread(self._store.fail, source, reason, retry_s)

    async def _hold(self, source: Held, work: asyncio.Task[None]) -> None:
        while True:
            await asyncio.sleep(HELD_S / 4)
            try:
                await asyncio.to_thread(self._store.hold, source)
            except LostError:
                work.cancel()
                return
            except OperationError:
                continue
