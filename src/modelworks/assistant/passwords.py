"""Passwords, kept as Argon2id hashes, and the wait after wrong ones.

A wrong name takes as long as a wrong password: where there is no hash, one that nobody has the password of is checked.
Hashing takes 64 MiB and some time by design, so that no more than two are made at once.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from modelworks.assistant.database import Database
from modelworks.assistant.tables import AttemptRow
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError

SHORTEST, LONGEST = 12, 256
LONGEST_WAIT_S = 900.0
_FORGOTTEN_S = 86400.0
_HASHER = PasswordHasher()  # RFC 9106's second recommendation: Argon2id, 64 MiB, 3 passes
_AT_ONCE = threading.Semaphore(2)
_NOBODYS = "$argon2id$v=19$m=65536,t=3,p=4$MHsLmpwh2/pPh9iZTk3uIA$D3hagYNEGM6V/JO8to3Ud56acrX7jvXfXX8JrllASqI"
"""Of a random word that was thrown away."""


def hashed(password: str, name: str) -> str:
    """A password as it is kept.

    Raises
    ------
    InputError
        If it is too short or too long, or the user's name.
    """
    if not SHORTEST <= len(password) <= LONGEST:
        raise InputError(
            f"the password is not accepted: {SHORTEST} to {LONGEST} characters are, this one has {len(password)}"
        )
    if password.casefold() == name.casefold():
        raise InputError("the password is not accepted: it is the user's name")
    with _AT_ONCE:
        return _HASHER.hash(password)


def matches(password: str, kept: str | None) -> bool:
    """Whether a password is the one that is kept; without one, the same time passes and it isn't."""
    with _AT_ONCE:
        try:
            right = _HASHER.verify(kept or _NOBODYS, password[: 4 * LONGEST])
        except (VerificationError, InvalidHashError):
            return False
    return right and kept is not None


class Lockout:
    """Makes those wait who have been wrong too often: twice as long each time, up to a quarter of an hour.

    An attempt counts before it is judged, so that many at once are no way around. A day without one, and it is
    forgotten.

    Parameters
    ----------
    database : Database
        Where failures are counted, for all servers that share it.
    clock
        Gives the time in seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def attempt(self, allowed: dict[str, int]) -> None:
        """Count an attempt as failed, until `succeeded` says otherwise.

        Parameters
        ----------
        allowed : dict
            What is counted (a name, an address), and how many failures are free.

        Raises
        ------
        RequestError
            429, if one of them has to wait; the attempt must not be judged then.
        """
        now = self._clock()
        with self._database.write() as session:
            rows = {subject: _row(session, subject, now) for subject in sorted(allowed)}
            wait = max(_wait(row, allowed[subject], now) for subject, row in rows.items())
            if wait <= 0:
                for row in rows.values():
                    row.failures, row.last = row.failures + 1, now
        if wait > 0:
            raise RequestError(
                "there were too many wrong attempts; wait before the next",
                status=429,
                code="too_many_attempts",
                retry_after_s=wait,
            )

    def forget(self) -> None:
        """Remove what is older than a day."""
        with self._database.write() as session:
            session.execute(delete(AttemptRow).where(AttemptRow.last < self._clock() - _FORGOTTEN_S))

    def succeeded(self, subjects: list[str]) -> None:
        """Forget the failures of those who have come in."""
        with self._database.write() as session:
            session.execute(delete(AttemptRow).where(AttemptRow.subject.in_(subjects)))


def _row(session: Session, subject: str, now: float) -> AttemptRow:
    """The row of a subject, made if it isn't there, and locked against other servers."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    made = insert(AttemptRow).values(subject=subject[:160], failures=0, last=now).on_conflict_do_nothing()
    session.execute(made)
    row = session.get_one(AttemptRow, subject[:160], with_for_update=True)
    if row.last < now - _FORGOTTEN_S:
        row.failures = 0
    return row


def _wait(row: AttemptRow, allowed: int, now: float) -> float:
    """Seconds until the next attempt may be made."""
    over = row.failures - allowed
    return row.last + min(2.0**over, LONGEST_WAIT_S) - now if over >= 0 else 0.0


def network(address: str) -> str:
    """What counts as one address: of IPv6 the network of 64 bits that one customer has."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if found.version == 6:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)
