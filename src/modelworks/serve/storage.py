"""What the API keeps between requests: responses, files and batches; the interfaces of whoever keeps them.

An owner never finds another's things; None is the owner where there are no accounts. The methods wait for a disk or a
database, so the API calls them in threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

LASTS_S = 30 * 86400.0
"""How long a response, a file without a time of its own and an ended batch are kept."""

ENDED = ("completed", "failed", "expired", "cancelled")
"""States that a batch stays in."""
Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class Kept:
    """A response that can be gone on from."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    """All that it was made of: the items of those before it, and its request's own."""


@dataclass(frozen=True)
class StoredFile:
    """A file, without its content."""

    id: str
    name: str
    purpose: str
    size: int
    """Bytes."""
    created: float
    expires: float


@dataclass(frozen=True)
class Line:
    """One request of a batch."""

    number: int
    """Its place in the file, from 0."""
    custom_id: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What became of a line."""

    number: int
    good: bool
    content: str
    """The line for the file of answers, or that of errors, as JSON."""


@dataclass(frozen=True)
class Batch:
    """Requests that are answered when there is time. Times are seconds since 1970."""

    id: str
    owner: str | None
    key_id: str | None
    """The key that asked for it: what it may do is what the batch may."""
    endpoint: str
    input_file: str
    window_s: float
    created: float
    state: str = "validating"
    metadata: dict[str, str] = field(default_factory=dict)
    begun: float | None = None
    asked_to_end: float | None = None
    ended: float | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    output_file: str | None = None
    error_file: str | None = None

    @property
    def expires(self) -> float:
        """When what is not answered stays so."""
        return self.created + self.window_s


class Storage(Protocol):
    """Who keeps all of it."""

    # --- responses

    def put_response(self, owner: str | None, kept: Kept) -> None:
        """Keep a response."""

    def response(self, owner: str | None, response_id: str) -> Kept | None:
        """One that was kept."""

    def remove_response(self, owner: str | None, response_id: str) -> bool:
        """Forget one; false if there is none."""

    # --- files

    def put_file(
        self,
        owner: str | None,
        name: str,
        purpose: str,
        content: bytes,
        *,
        lasts_s: float = LASTS_S,
        most: int | None = None,
    ) -> StoredFile:
        """Keep a file.

        Raises
        ------
        RequestError
            413 if the owner's files would hold more than `most` bytes in all.
        """

    def files(
        self, owner: str | None, *, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> list[StoredFile]:
        """An owner's files by age, behind the one that is named."""

    def file(self, owner: str | None, file_id: str) -> StoredFile | None:
        """One of them."""

    def content(self, owner: str | None, file_id: str) -> bytes | None:
        """What is in it."""

    def remove_file(self, owner: str | None, file_id: str) -> bool:
        """Remove one; false if there is none."""

    # --- batches

    def put_batch(self, batch: Batch) -> None:
        """Keep a new batch."""

    def batches(self, owner: str | None, *, after: str | None, limit: int) -> list[Batch]:
        """An owner's batches, the newest first, behind the one that is named."""

    def batch(self, owner: str | None, batch_id: str) -> Batch | None:
        """One of them."""

    def cancel_batch(self, owner: str | None, batch_id: str) -> Batch | None:
        """Ask a batch to end; one that nobody works on has ended then."""

    def claim_batch(self, worker: str) -> Batch | None:
        """The oldest batch that has not ended and that no living worker works on, for this worker alone."""

    def beat_batch(self, worker: str, batch_id: str) -> Batch | None:
        """Say that the worker is at it; None if it no longer is its to work on."""

    def rest_batch(self, worker: str, batch_id: str, wait_s: float) -> None:
        """Let go of it, for nobody to claim before so many seconds."""

    def begin_batch(self, worker: str, batch_id: str, total: int) -> None:
        """Say how many lines it has, when they have been read."""

    def answered(self, batch_id: str) -> set[int]:
        """The lines whose results are kept."""

    def put_result(self, worker: str, batch_id: str, result: Result) -> None:
        """Keep what became of a line. A worker that lost the batch meanwhile keeps nothing."""

    def end_batch(self, worker: str, batch_id: str, state: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        """End it, and make files of its results."""

    def forget(self) -> None:
        """Remove what has lasted long enough."""
