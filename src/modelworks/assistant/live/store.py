"""Sources and their items in the database. Each source is a user's, or everybody's where an administrator shares it.

A source is refreshed by who holds it: taking it is one conditional update, so that of several servers one gets it, and
it ends by itself when that server dies. What is kept of a refresh is kept item by item, while it is held.
"""

from __future__ import annotations

import copy
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import Select, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session

from modelworks.assistant.database import Database
from modelworks.assistant.documents.passages import Piece
from modelworks.assistant.documents.store import Passage
from modelworks.assistant.owned import NotFoundError, named, new_id
from modelworks.assistant.tables import LiveItemRow, LivePassageRow, LiveSourceRow
from modelworks.spec.errors import InputError

Kind = Literal["feed", "site", "folder", "search", "x"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HELD_S = 120.0
"""How long a source is held without a word of who holds it."""
MOST_ITEMS = 300
"""Of a source; the oldest go."""
KEPT_S = 30 * 86400.0
"""How long an item is kept that its source lists no more."""
SHORTEST_INTERVAL_S = 300.0
LONGEST_INTERVAL_S = 30 * 86400.0
LONGEST_BACK_OFF_S = 86400.0


@dataclass(frozen=True)
class Source:
    """A source and how it is; times in seconds since 1970."""

    id: str
    kind: Kind
    name: str
    address: str
    interval_s: float
    whole: bool
    shared: bool
    paused: bool
    created: float
    next_at: float
    """When it is refreshed next."""
    refreshed: float | None
    """When it was last refreshed without an error."""
    failures: int
    error: str | None
    refreshing: bool
    items: int = 0


@dataclass(frozen=True)
class Held(Source):
    """A source that is being refreshed, with what its last refresh has noted."""

    user_id: str | None = None
    etag: str | None = None
    modified: str | None = None
    holder: str = ""


@dataclass(frozen=True)
class Item:
    """What a source lists, as it was read."""

    key: str
    address: str
    title: str
    published: float | None
    pieces: Sequence[Piece]
    version: str | None = None
    etag: str | None = None
    modified: str | None = None


@dataclass(frozen=True)
class Known:
    """What is known of an item that was read before."""

    id: int
    version: str | None
    etag: str | None
    modified: str | None
    fetched: float


class LostError(Exception):
    """The source is another's to refresh now, or gone, or paused."""


class LiveStore:
    """The sources of one database. Safe to use from several threads and processes.

    Parameters
    ----------
    database
        Where they are.
    most
        Sources that a user may have.
    clock
        Gives the time in seconds since 1970.
    """

    def __init__(self, database: Database, most: int = 50, clock: Callable[[], float] = time.time) -> None:
        self.database = database
        self._most = most
        self._clock = clock
        self._owner: str | None = None
        self._admin = True

    def of(self, user_id: str, admin: bool = False) -> LiveStore:
        """The same store as one user has it: the user's sources, and everybody's, which administrators may change."""
        own = copy.copy(self)
        own._owner, own._admin = user_id, admin
        return own

    def now(self) -> float:
        """The time in seconds since 1970."""
        return self._clock()

    # --- what a person does ---

    def add(self, kind: Kind, name: str, address: str, interval_s: float, whole: bool, shared: bool) -> Source:
        """Add a source, which is due at once.

        Raises
        ------
        InputError
            If something of it isn't accepted, or there are as many as are allowed.
        """
        now = self._clock()
        row = LiveSourceRow(
            id=new_id(),
            user_id=self._owner,
            shared=shared,
            kind=kind,
            name=named(name, "source"),
            address=address,
            interval_s=_checked_interval(interval_s),
            whole=whole,
            paused=False,
            created=now,
            next_at=now,
            failures=0,
        )
        if shared and not self._admin:
            raise InputError("a source for everybody can be added by an administrator alone")
        with self.database.write() as session:
            own = select(func.count()).select_from(LiveSourceRow).where(LiveSourceRow.user_id == self._owner)
            if (session.scalar(own) or 0) >= self._most:
                raise InputError(f"there are {self._most} sources already, which is the most; remove one first")
            same = self._visible().where(LiveSourceRow.kind == kind, LiveSourceRow.address == address)
            if session.scalar(same.limit(1)) is not None:
                raise InputError(f"there is a source with the address {address[:80]!r} already")
            session.add(row)
            session.flush()
            return self._source(row)

    def all(self) -> list[Source]:
        """All sources that whoever asks has, the oldest first."""
        count = select(LiveItemRow.source_id, func.count()).group_by(LiveItemRow.source_id)
        with self.database.read() as session:
            rows = session.scalars(self._visible().order_by(LiveSourceRow.created, LiveSourceRow.id)).all()
            counted = session.execute(count.where(LiveItemRow.source_id.in_([row.id for row in rows])))
            items = {row[0]: row[1] for row in counted}
            return [self._source(row, items.get(row.id, 0)) for row in rows]

    def source(self, source_id: str) -> Source:
        """One of them.

        Raises
        ------
        NotFoundError
            If it isn't there.
        """
        with self.database.read() as session:
            row = self._row(session, source_id)
            items = select(func.count()).select_from(LiveItemRow).where(LiveItemRow.source_id == row.id)
            return self._source(row, session.scalar(items) or 0)

    def kinds(self) -> set[str]:
        """The kinds of which there are sources."""
        with self.database.read() as session:
            return set(session.scalars(self._visible().with_only_columns(LiveSourceRow.kind).distinct()))

    def change(
        self, source_id: str, name: str | None = None, interval_s: float | None = None, paused: bool | None = None
    ) -> Source:
        """Change something of a source; one that is paused no more is due at once.

        Raises
        ------
        InputError
            If it isn't there or isn't the asker's to change, or something isn't accepted.
        """
        with self.database.write() as session:
            row = self._changeable(session, source_id)
            if name is not None:
                row.name = named(name, "source")
            if interval_s is not None:
                row.interval_s = _checked_interval(interval_s)
                row.next_at = min(row.next_at, self._clock() + row.interval_s)
            if paused is not None and paused != row.paused:
                row.paused, row.next_at = paused, self._clock()
                row.holder = row.held_until = None
            return self._source(row)

    def due(self, source_id: str) -> Source:
        """Have a source refreshed now; raises as `change`."""
        with self.database.write() as session:
            row = self._changeable(session, source_id)
            if row.paused:
                raise InputError(f"the source {row.name!r} is paused; go on with it first")
            row.next_at = self._clock()
            return self._source(row)

    def remove(self, source_id: str) -> None:
        """Remove a source with its items; raises as `change`. What answers were given of it stays with them."""
        with self.database.write() as session:
            session.delete(self._changeable(session, source_id))

    # --- what a refresh does ---

    def take(self, kinds: Sequence[Kind], most: int = 1) -> list[Held]:
        """Take some sources that are due; nobody else refreshes them for a while."""
        now, holder, taken = self._clock(), secrets.token_hex(8), []
        free = or_(LiveSourceRow.held_until.is_(None), LiveSourceRow.held_until < now)
        due = (LiveSourceRow.next_at <= now, LiveSourceRow.paused.is_(False), LiveSourceRow.kind.in_(kinds), free)
        with self.database.read() as session:
            found = session.scalars(select(LiveSourceRow.id).where(*due).order_by(LiveSourceRow.next_at).limit(most))
            ids = list(found)
        for source_id in ids:
            mine = update(LiveSourceRow).where(LiveSourceRow.id == source_id, *due)
            with self.database.write() as session:
                got: Any = session.execute(mine.values(holder=holder, held_until=now + HELD_S))
                if got.rowcount:
                    taken.append(self._held(session.get_one(LiveSourceRow, source_id)))
        return taken

    def hold(self, source: Held) -> None:
        """Go on to hold a source.

        Raises
        ------
        LostError
            If it is another's meanwhile.
        """
        with self.database.write() as session:
            self._mine(session, source).held_until = self._clock() + HELD_S

    def known(self, source: Source) -> dict[str, Known]:
        """The items of a source that were read before, by the keys that `key_of` makes."""
        columns = (LiveItemRow.key, LiveItemRow.id, LiveItemRow.version, LiveItemRow.etag, LiveItemRow.modified)
        with self.database.read() as session:
            rows = session.execute(select(*columns, LiveItemRow.fetched).where(LiveItemRow.source_id == source.id))
            return {row[0]: Known(*row[1:]) for row in rows}

    def keep(self, source: Held, item: Item) -> int:
        """Keep an item in place of what it was; its id. Raises as `hold`."""
        now, key = self._clock(), key_of(item.key)
        values = {
            "address": item.address,
            "title": item.title,
            # What says that it comes from the future would stand before all else for ever; a file can have any time.
            "published": min(item.published, now) if item.published is not None and item.published >= 0 else None,
            "fetched": now,
            "seen": now,
            "version": item.version,
            "etag": item.etag,
            "modified": item.modified,
            "embedded_by": None,
        }
        with self.database.write() as session:
            self._mine(session, source).held_until = now + HELD_S
            here = select(LiveItemRow).where(LiveItemRow.source_id == source.id, LiveItemRow.key == key)
            row = session.scalar(here)
            if row is None:
                row = LiveItemRow(source_id=source.id, key=key, **values)
                session.add(row)
                session.flush()
            else:
                session.execute(update(LiveItemRow).where(LiveItemRow.id == row.id).values(values))
                session.execute(delete(LivePassageRow).where(LivePassageRow.item_id == row.id))
            if item.pieces:
                rows = [
                    {"item_id": row.id, "source_id": source.id, "number": number, "vector": None, **vars(piece)}
                    for number, piece in enumerate(item.pieces)
                ]
                session.execute(insert(LivePassageRow), rows)
            return row.id

    def same(self, source: Held, items: Sequence[int], fetched: bool = True) -> None:
        """Note of items that they are still there as they were; `fetched` is whether that was looked at now."""
        now = self._clock()
        values = {"seen": now} | ({"fetched": now} if fetched else {})
        with self.database.write() as session:
            self._mine(session, source)
            session.execute(update(LiveItemRow).where(LiveItemRow.id.in_(items)).values(values))

    def finish(
        self,
        source: Held,
        etag: str | None = None,
        modified: str | None = None,
        listed: Sequence[str] | None = None,
        again_s: float | None = None,
        unchanged: bool = False,
    ) -> None:
        """Note that a refresh has ended well, and remove what is old.

        Parameters
        ----------
        etag, modified
            What the source said of its state.
        listed
            The keys of all items that there are now: others go. Left out, those go that were long not seen.
        again_s
            Seconds until the next refresh, if it isn't the interval.
        unchanged
            Whether the source said that all is as it was, so that nothing is old.
        """
        now = self._clock()
        with self.database.write() as session:
            row = self._mine(session, source)
            row.refreshed, row.failures, row.error = now, 0, None
            row.etag, row.modified, row.holder, row.held_until = etag, modified, None, None
            row.next_at = now + (row.interval_s if again_s is None else again_s)
            if unchanged:
                return
            items = LiveItemRow.source_id == source.id
            if listed is not None:
                there = {key_of(key) for key in listed}
                rows = session.execute(select(LiveItemRow.id, LiveItemRow.key).where(items))
                gone = [one.id for one in rows if one.key not in there]
                session.execute(delete(LiveItemRow).where(LiveItemRow.id.in_(gone)))
            else:
                session.execute(delete(LiveItemRow).where(items, LiveItemRow.seen < now - KEPT_S))
            time_of = func.coalesce(LiveItemRow.published, LiveItemRow.fetched)
            newest = select(LiveItemRow.id).where(items).order_by(time_of.desc(), LiveItemRow.id.desc())
            session.execute(delete(LiveItemRow).where(items, LiveItemRow.id.not_in(newest.limit(MOST_ITEMS))))

    def fail(self, source: Held, reason: str, retry_s: float | None = None) -> None:
        """Note why a refresh failed; each failure in a row doubles the time to the next one, up to a day."""
        now = self._clock()
        with self.database.write() as session:
            row = self._mine(session, source)
            row.failures, row.error, row.holder, row.held_until = row.failures + 1, reason[:500], None, None
            back_off = min(row.interval_s * 2 ** min(row.failures, 20), max(LONGEST_BACK_OFF_S, row.interval_s))
            row.next_at = now + max(back_off, min(retry_s or 0.0, LONGEST_INTERVAL_S))

    def release(self, source: Held) -> None:
        """Let go of a source that was not refreshed to its end; it is due as it was."""
        with self.database.write() as session:
            row = self._mine(session, source)
            row.holder = row.held_until = None

    # --- what a question needs ---

    def passages_of(self, passage_ids: Sequence[int]) -> list[Passage]:
        """Passages by their ids, in this order, each with its source, its address and its times."""
        query = (
            select(LivePassageRow, LiveItemRow, LiveSourceRow.name)
            .join(LiveItemRow, LiveItemRow.id == LivePassageRow.item_id)
            .join(LiveSourceRow, LiveSourceRow.id == LiveItemRow.source_id)
        )
        with self.database.read() as session:
            rows = session.execute(self._owned(query).where(LivePassageRow.id.in_(passage_ids)))
            found = {passage.id: _passage(passage, item, name) for passage, item, name in rows}
        return [found[one] for one in passage_ids if one in found]

    def newest(self, source_ids: Sequence[str], most: int) -> list[int]:
        """The first passages of the newest items, the newest first."""
        time_of = func.coalesce(LiveItemRow.published, LiveItemRow.fetched)
        query = select(LivePassageRow.id).join(LiveItemRow, LiveItemRow.id == LivePassageRow.item_id)
        query = query.where(LivePassageRow.source_id.in_(source_ids), LivePassageRow.number == 0)
        with self.database.read() as session:
            return list(session.scalars(query.order_by(time_of.desc(), LivePassageRow.id).limit(most)))

    def texts(self, item_id: int) -> list[tuple[int, str]]:
        """The passages of an item with their ids, as vectors are made of them."""
        query = select(LivePassageRow.id, LivePassageRow.heading, LivePassageRow.text)
        with self.database.read() as session:
            rows = session.execute(query.where(LivePassageRow.item_id == item_id).order_by(LivePassageRow.number))
            return [(row.id, f"{row.heading}\n{row.text}".strip()) for row in rows]

    def keep_vectors(self, item_id: int, vectors: Sequence[tuple[int, bytes]], model: str) -> None:
        """Keep the vectors of an item's passages."""
        with self.database.write() as session:
            for passage_id, vector in vectors:
                session.execute(update(LivePassageRow).where(LivePassageRow.id == passage_id).values(vector=vector))
            session.execute(update(LiveItemRow).where(LiveItemRow.id == item_id).values(embedded_by=model))

    # --- rows ---

    def _owned(self, query: Any) -> Any:
        if self._owner is None:
            return query
        return query.where(or_(LiveSourceRow.user_id == self._owner, LiveSourceRow.shared.is_(True)))

    def _visible(self) -> Select[LiveSourceRow]:
        visible: Select[LiveSourceRow] = self._owned(select(LiveSourceRow))
        return visible

    def _row(self, session: Session, source_id: str) -> LiveSourceRow:
        row = session.get(LiveSourceRow, source_id) if "\0" not in source_id else None
        if row is None or not (self._owner is None or row.shared or row.user_id == self._owner):
            raise NotFoundError(f"there is no source {source_id!r}")
        return row

    def _changeable(self, session: Session, source_id: str) -> LiveSourceRow:
        row = self._row(session, source_id)
        if row.shared and not self._admin:
            raise InputError(f"the source {row.name!r} is everybody's: an administrator can change it")
        return row

    def _mine(self, session: Session, source: Held) -> LiveSourceRow:
        query = select(LiveSourceRow).where(LiveSourceRow.id == source.id).with_for_update()
        row = session.scalar(query)
        if row is None or row.holder != source.holder:
            raise LostError
        return row

    def _source(self, row: LiveSourceRow, items: int = 0) -> Source:
        return Source(**self._shown(row), items=items)

    def _held(self, row: LiveSourceRow) -> Held:
        shown = self._shown(row)
        return Held(**shown, user_id=row.user_id, etag=row.etag, modified=row.modified, holder=row.holder or "")

    def _shown(self, row: LiveSourceRow) -> dict[str, Any]:
        same = ("id", "kind", "name", "address", "interval_s", "whole", "shared", "paused", "created", "next_at")
        shown = {name: getattr(row, name) for name in (*same, "refreshed", "failures", "error")}
        return shown | {"refreshing": row.held_until is not None and row.held_until >= self._clock()}


def key_of(key: str) -> str:
    """What an item is kept under."""
    return hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=24).hexdigest()


def _passage(passage: LivePassageRow, item: LiveItemRow, name: str) -> Passage:
    return Passage(
        passage.id,
        f"live {item.id}",
        f"{name}: {item.title}" if item.title else name,
        passage.number,
        passage.place,
        passage.heading if passage.heading != item.title else "",
        passage.text,
        passage.overlap,
        item.address,
        item.published,
        item.fetched,
    )


def _checked_interval(interval_s: float) -> float:
    if not SHORTEST_INTERVAL_S <= interval_s <= LONGEST_INTERVAL_S:
        raise InputError(
            f"interval_s = {interval_s:g} is not accepted: "
            f"{SHORTEST_INTERVAL_S:g} to {LONGEST_INTERVAL_S:g} seconds are"
        )
    return float(interval_s)
