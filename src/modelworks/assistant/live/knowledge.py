"""Live knowledge as the chat has it: a person's sources, and the passages of them that answer a question."""

from __future__ import annotations

import asyncio
import copy
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from urllib.parse import urlsplit

from sqlalchemy import select

from modelworks.assistant.database import Database
from modelworks.assistant.documents.prompt import cost
from modelworks.assistant.documents.store import Passage
from modelworks.assistant.live.fetching import Fetcher, given_address
from modelworks.assistant.live.folders import allowed_folder
from modelworks.assistant.live.guard import Guard
from modelworks.assistant.live.refresher import LOOK_S, Refresher
from modelworks.assistant.live.rounds import Tools
from modelworks.assistant.live.search import check_engine, search
from modelworks.assistant.live.store import KINDS, Kind, LiveStore, Source
from modelworks.assistant.retrieval import Embedder, Index, by_words, fused, nearest
from modelworks.assistant.tables import LiveItemRow, LivePassageRow
from modelworks.serve.config import LiveConfig
from modelworks.spec.errors import InputError, OperationError

MOST_PASSAGES = 6
"""That a question is given of sources."""
SHARE = 0.3
"""Of the context: what they may take."""
MOST_SEARCHES = 2
"""Search engines that a question is given to."""
LONGEST_SEARCH = 512
"""Characters of a search of X."""
INTERVALS_S: dict[Kind, float] = {"feed": 3600.0, "site": 86400.0, "folder": 900.0, "search": 86400.0, "x": 3600.0}
"""How often each kind is refreshed if nobody says; a search engine is asked when a question is."""
_INDEX = Index("live_passages", "live_words", "source_id")
_NEWS = re.compile(
    r"\b(news|newest|latest|recent|recently|headlines?|today|what'?s new|"
    r"wiadomości|aktualności|najnowsz\w+|ostatni\w*|dzisiaj|dziś|now(?:ego|ości))\b",
    re.IGNORECASE,
)
"""Asks for what is new, whatever it is about."""
_LOG = logging.getLogger("modelworks.live")


@dataclass(frozen=True)
class Evidence:
    """What a question is given of sources."""

    passages: tuple[Passage, ...] = ()
    notice: str | None = None
    """What the reader of the answer should know."""

    @property
    def tokens(self) -> int:
        """What it takes of the context, about."""
        return sum(map(cost, self.passages))


class Live:
    """The sources of one database.

    Parameters
    ----------
    database
        Where they are.
    config
        What they may reach.
    embedder
        Who makes vectors of passages, if somebody does.
    any_folder
        Whether folders may be anywhere on this machine, since whoever asks owns it.
    look_s
        How often is looked for sources that are due.
    """

    def __init__(
        self,
        database: Database,
        config: LiveConfig,
        embedder: Embedder | None = None,
        any_folder: bool = False,
        look_s: float = LOOK_S,
    ) -> None:
        self.store = LiveStore(database, config.most)
        folders = None if any_folder else config.folders
        strangers, own = Fetcher(Guard(config.allow_addresses), config.delay_s), Fetcher(None, 0.0)
        self._tools = Tools(self.store, strangers, own, config, folders, embedder)
        self._refresher = Refresher(self._tools, look_s)
        self._task: asyncio.Task[None] | None = None

    def of(self, user_id: str, admin: bool = False) -> Live:
        """The same as one user has it: the user's sources, and everybody's."""
        own = copy.copy(self)
        own.store = self.store.of(user_id, admin)
        return own

    def start(self) -> None:
        """Begin to refresh sources."""
        self._task = asyncio.create_task(self._refresher.run(), name="live sources")

    async def close(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._tools.strangers.close()
        await self._tools.own.close()

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of sources that this server can have."""
        config = self._tools.config
        there = {
            "folder": self._tools.folders is None or bool(self._tools.folders),
            "search": bool(self.engines),
            "x": config.x_token is not None,
        }
        return [kind for kind in KINDS if there.get(kind, True)]

    @property
    def engines(self) -> list[str]:
        """The search engines that this server can ask."""
        config = self._tools.config
        return ["searxng"] * (config.searxng is not None) + ["brave"] * (config.brave_key is not None)

    @property
    def folders(self) -> list[str] | None:
        """The folders that sources may be in; None if they may be anywhere."""
        return None if self._tools.folders is None else list(self._tools.folders)

    async def add(
        self,
        kind: Kind,
        address: str,
        name: str = "",
        interval_s: float | None = None,
        whole: bool = False,
        shared: bool = False,
    ) -> Source:
        """Add a source; it is refreshed at once.

        Raises
        ------
        InputError
            If something of it isn't accepted, in one sentence.
        """
        if kind not in KINDS:
            raise InputError(f"kind = {str(kind)[:40]!r} is not accepted: {', '.join(KINDS)} are")
        if kind not in self.kinds:
            raise InputError(f"sources of the kind {kind!r} are not set up on this server")
        address = await asyncio.to_thread(self._checked, kind, address)
        name = name.strip() or _name_of(kind, address)
        every = INTERVALS_S[kind] if interval_s is None else interval_s
        source = await asyncio.to_thread(self.store.add, kind, name, address, every, whole, shared)
        self._refresher.wake()
        return source

    async def refresh(self, source_id: str) -> Source:
        """Have a source refreshed now.

        Raises
        ------
        InputError
            If it isn't there, isn't the asker's to change, or is paused.
        """
        source = await asyncio.to_thread(self.store.due, source_id)
        self._refresher.wake()
        return source

    async def change(
        self, source_id: str, name: str | None = None, interval_s: float | None = None, paused: bool | None = None
    ) -> Source:
        """Change something of a source; raises as `LiveStore.change`."""
        source = await asyncio.to_thread(self.store.change, source_id, name, interval_s, paused)
        self._refresher.wake()
        return source

    async def evidence(self, question: str, context: int) -> Evidence:
        """The passages of sources that answer a question best, the best first.

        Parameters
        ----------
        context
            Tokens of the model's context, of which they take a share.
        """
        sources = [one for one in await asyncio.to_thread(self.store.all) if not one.paused]
        searched = [one for one in sources if one.kind == "search"][:MOST_SEARCHES]
        kept, *found = await asyncio.gather(
            self._kept([one.id for one in sources if one.kind != "search"], question),
            *(search(one, question, self._tools) for one in searched),
            return_exceptions=True,
        )
        if isinstance(kept, BaseException):
            raise kept
        lists, notices = [kept], []
        for source, one in zip(searched, found, strict=True):
            if isinstance(one, (InputError, OperationError)):
                _LOG.info("a search failed: %s", one)
                notices.append(f"{source.name} could not be searched: {one}.")
            elif isinstance(one, Exception):
                _LOG.error("a search failed", exc_info=one)
                notices.append(f"{source.name} could not be searched: what came is not what was expected.")
            elif isinstance(one, BaseException):
                raise one
            else:
                lists.append(one)
        room = int(context * SHARE)
        chosen: list[Passage] = []
        for passage in chain.from_iterable(zip_longest(*lists)):
            if passage is not None and cost(passage) <= room and len(chosen) < MOST_PASSAGES:
                room -= cost(passage)
                chosen.append(passage)
        return Evidence(tuple(chosen), " ".join(notices) or None)

    async def _kept(self, source_ids: Sequence[str], question: str) -> list[Passage]:
        """Of what is kept: by words, by meaning where vectors are made, and what is newer before what is older."""
        if not source_ids:
            return []
        rankings = [await asyncio.to_thread(self._by_words, source_ids, question)]
        embedder = self._tools.embedder
        if embedder is not None:
            try:
                asked = (await embedder.vectors([question]))[0]
            except (InputError, OperationError) as error:
                _LOG.warning("live sources are ranked by words alone: %s", error)
            else:
                rows = await asyncio.to_thread(self._vectors, source_ids, embedder.model)
                rankings.append(nearest(rows, asked))
        best = fused(rankings)[: 4 * MOST_PASSAGES]
        passages = {one.id: one for one in await asyncio.to_thread(self.store.passages_of, best)}
        newest = sorted(passages, key=lambda one: -(passages[one].time or 0.0))
        # Time decides between passages that fit about as well; who asks for what is new wants the newest that fit.
        wants_new = _NEWS.search(question) is not None
        weighed = [*rankings, newest, newest] if wants_new else [*rankings, *rankings, newest]
        order = [one for one in fused(weighed) if one in passages][:MOST_PASSAGES]
        if len(order) < MOST_PASSAGES and wants_new:
            more = await asyncio.to_thread(self.store.newest, source_ids, MOST_PASSAGES)
            order += [one for one in more if one not in order][: MOST_PASSAGES - len(order)]
        return await asyncio.to_thread(self.store.passages_of, order)

    def _by_words(self, source_ids: Sequence[str], question: str) -> list[int]:
        with self.store.database.read() as session:
            return by_words(session, _INDEX, source_ids, question)

    def _vectors(self, source_ids: Sequence[str], model: str) -> list[tuple[int, bytes]]:
        query = select(LivePassageRow.id, LivePassageRow.vector).join(
            LiveItemRow, LiveItemRow.id == LivePassageRow.item_id
        )
        query = query.where(LivePassageRow.source_id.in_(source_ids), LiveItemRow.embedded_by == model)
        with self.store.database.read() as session:
            return [(row.id, row.vector) for row in session.execute(query) if row.vector is not None]

    def _checked(self, kind: Kind, address: str) -> str:
        if kind in {"feed", "site"}:
            return given_address(address)
        if kind == "folder":
            return str(allowed_folder(address.strip(), self._tools.folders))
        if kind == "search":
            check_engine(address.strip(), self._tools.config)
            return address.strip()
        asked = " ".join(address.split())
        if not asked or len(asked) > LONGEST_SEARCH or not asked.isprintable():
            raise InputError(f"the search {asked[:40]!r} is not accepted: 1 to {LONGEST_SEARCH} characters are")
        return asked


def _name_of(kind: Kind, address: str) -> str:
    if kind in {"feed", "site"}:
        return (urlsplit(address).hostname or address)[:100]
    if kind == "folder":
        return address.rstrip("/").rpartition("/")[2][:100] or "/"
    if kind == "search":
        return {"searxng": "SearXNG", "brave": "Brave Search"}[address]
    return f"X: {address}"[:100]
