"""What the next step learns from, got ready in a thread while the last one is learnt from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Taken = TypeVar("Taken")


class Ahead(Generic[Taken]):
    """A function of a place, called for the place that is likely next before it is asked for.

    Parameters
    ----------
    take
        What is to be had at a place, always the same; called in a thread.
    stride
        From a place to the next one.
    """

    def __init__(self, take: Callable[[int], Taken], stride: int) -> None:
        self._take, self._stride = take, stride
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Taken]] | None = None

    def __call__(self, place: int) -> Taken:
        """What is at a place; what failed in the thread fails here."""
        ready, self._next = self._next, None
        if ready is None or ready[0] != place:
            ready = place, self._thread.submit(self._take, place)
        found = ready[1].result()
        following = place + self._stride
        self._next = following, self._thread.submit(self._take, following)
        return found

    def close(self) -> None:
        """Give up what isn't begun."""
        self._thread.shutdown(wait=True, cancel_futures=True)
