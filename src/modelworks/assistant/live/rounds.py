"""One refresh of one source, of each kind: what is new is fetched, read and kept, item by item.

A refresh that is cut short leaves whole items. What a source said of its state (``ETag``) is noted at the end alone,
so that the next refresh doesn't take the rest for unchanged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

from modelworks.assistant.documents import reading
from modelworks.assistant.documents.blocks import Block
from modelworks.assistant.documents.passages import Piece, split
from modelworks.assistant.live.fetching import Fetcher, FetchError, check_address, unpacked
from modelworks.assistant.live.folders import allowed_folder, content_of, files_of
from modelworks.assistant.live.outline import outline
from modelworks.assistant.live.pages import PAGE_BYTES, on_disk, plain, read_page
from modelworks.assistant.live.store import MOST_ITEMS, Held, Item, Known, LiveStore, key_of
from modelworks.assistant.retrieval import Embedder
from modelworks.serve.config import LiveConfig
from modelworks.spec.errors import InputError, OperationError

FEED_BYTES = 8 << 20
"""Of a feed, unpacked."""
MAP_BYTES = 16 << 20
"""Of a site map, unpacked."""
API_BYTES = 4 << 20
"""Of an answer of X or of a search engine."""
MOST_MAPS = 20
"""Site maps that a site map may name."""
PAGES_AT_ONCE = 50
"""Pages that a refresh fetches; if there are more, the next one comes soon."""
SOON_S = 60.0
_POSTS, _POST_PAGES = 100, 3
_SINCE_S = 6 * 86400.0
"""How far back X can be asked for what came since a post, with a day to spare."""
_LOG = logging.getLogger("modelworks.live")


@dataclass(frozen=True)
class Tools:
    """What refreshes work with."""

    store: LiveStore
    strangers: Fetcher
    """Fetches what people have named, from public addresses."""
    own: Fetcher
    """Asks the services of the configuration, wherever they are."""
    config: LiveConfig
    folders: Sequence[str] | None
    """In which folders must be; None if they may be anywhere."""
    embedder: Embedder | None = None


class Round:
    """A refresh.

    Parameters
    ----------
    source
        What is refreshed.
    tools
        What it is refreshed with.
    """

    def __init__(self, source: Held, tools: Tools) -> None:
        self._source, self._tools, self._store = source, tools, tools.store

    async def run(self) -> None:
        """Refresh the source.

        Raises
        ------
        InputError, OperationError
            If it fails, with the reason in one sentence.
        LostError
            If it is another's to refresh meanwhile.
        """
        kinds = {"feed": self._feed, "site": self._site, "folder": self._folder, "x": self._posts}
        await kinds[self._source.kind]()

    async def _feed(self) -> None:
        source = self._source
        fetched = await self._tools.strangers.get(source.address, FEED_BYTES, source.etag, source.modified)
        if fetched.status == 304:
            await self._do(self._store.finish, source, source.etag, source.modified, unchanged=True)
            return
        with on_disk(fetched.content) as path:
            entries = await outline("feed", path, fetched.url)
        known = await self._do(self._store.known, source)
        same, pages = [], 0
        for entry in entries:
            version = hashlib.blake2b(json.dumps(entry).encode(), digest_size=16).hexdigest()
            before = known.get(key_of(entry["entry"]))
            if before is not None and before.version == version:
                same.append(before.id)
                continue
            address = _linked(fetched.url, entry["address"])
            pieces = split([Block(entry["text"], "", entry["title"])] if entry["text"] else [])
            if source.whole and address and pages < PAGES_AT_ONCE:
                pages += 1
                pieces = await self._page_of(address) or pieces
            if not pieces and entry["title"]:
                pieces = split([Block(entry["title"])])
            await self._keep(Item(entry["entry"], address, entry["title"], entry["published"], pieces, version))
        await self._do(self._store.same, source, same, not source.whole)
        await self._do(self._store.finish, source, fetched.etag, fetched.modified)

    async def _page_of(self, address: str) -> list[Piece]:
        """What a feed's entry leads to; nothing if it can't be had, since the feed's own words are there."""
        try:
            return (await read_page(await self._tools.strangers.get(address, PAGE_BYTES))).pieces
        except (InputError, OperationError) as error:
            _LOG.info("the page of a feed's entry is left out: %s", error)
            return []

    async def _site(self) -> None:
        pages = await self._listed()
        known = await self._do(self._store.known, self._source)
        before = self._store.now() - self._source.interval_s / 2
        wanted, same = [], []
        for address, modified in pages:
            one = known.get(key_of(address))
            version = None if modified is None else str(modified)
            current = one is not None and (one.version == version if version is not None else one.fetched > before)
            if one is not None and current:
                same.append(one.id)
            else:
                wanted.append((one.fetched if one is not None else 0.0, address, modified, one))
        wanted.sort(key=lambda each: each[0])  # those that nobody has seen, then those that were seen longest ago
        await self._do(self._store.same, self._source, same, False)
        failed: list[OperationError | InputError] = []
        for _, address, modified, one in wanted[:PAGES_AT_ONCE]:
            try:
                await self._page(address, modified, one)
            except (InputError, OperationError) as error:
                if isinstance(error, FetchError) and error.retry_s is not None:
                    raise
                _LOG.info("a page of a site is left out: %s", error)
                failed.append(error)
                await self._note_failed(address, modified, one)
        if failed and len(failed) == len(wanted[:PAGES_AT_ONCE]) and not same:
            raise failed[0]
        more = len(wanted) > PAGES_AT_ONCE and len(failed) < PAGES_AT_ONCE
        listed = [address for address, _ in pages]
        await self._do(self._store.finish, self._source, None, None, listed, SOON_S if more else None)

    async def _note_failed(self, address: str, modified: float | None, one: Known | None) -> None:
        """Note that a page was tried, so that those are tried before it that were not."""
        if one is not None:
            await self._do(self._store.same, self._source, [one.id])
        else:
            await self._keep(Item(address, address, address, modified, []))

    async def _page(self, address: str, modified: float | None, one: Known | None) -> None:
        conditions = (one.etag, one.modified) if one is not None else (None, None)
        fetched = await self._tools.strangers.get(address, PAGE_BYTES, *conditions)
        if fetched.status == 304 and one is not None:
            await self._do(self._store.same, self._source, [one.id])
            return
        page = await read_page(fetched)
        title = page.title or urlsplit(address).path.rstrip("/").rpartition("/")[2] or address
        version = None if modified is None else str(modified)
        await self._keep(Item(address, address, title, modified, page.pieces, version, fetched.etag, fetched.modified))

    async def _listed(self) -> list[tuple[str, float | None]]:
        """A site's pages and when they were changed, the latest first; those of other hosts are not the site's."""
        address = self._source.address
        maps = [address]
        if not urlsplit(address).path.endswith((".xml", ".xml.gz")):
            own = [one for one in await self._tools.strangers.site_maps(address) if _same_host(one, address)]
            maps = own[:MOST_MAPS] or [urljoin(address, "/sitemap.xml")]
        pages: dict[str, float | None] = {}
        asked: set[str] = set()
        while maps and len(asked) < MOST_MAPS:
            url = maps.pop(0)
            if url in asked:
                continue
            asked.add(url)
            fetched = await self._tools.strangers.get(url, MAP_BYTES)
            content = fetched.content
            if content.startswith(b"\x1f\x8b"):
                content = unpacked(content, MAP_BYTES)
                if len(content) > MAP_BYTES:
                    raise FetchError(f"{url} is larger than {MAP_BYTES:,} bytes, which is the most that is read")
            with on_disk(content) as path:
                for one in await outline("map", path, url):
                    if "map" in one and _same_host(one["map"], address):
                        maps.append(one["map"])
                    elif "page" in one and _same_host(one["page"], address):
                        pages.setdefault(one["page"], one["modified"])
        if not pages:
            raise InputError(f"the site map of {address} names no page of its host")
        latest = sorted(pages.items(), key=lambda each: -(each[1] or 0.0))
        return latest[:MOST_ITEMS]

    async def _folder(self) -> None:
        folder = await self._do(allowed_folder, self._source.address, self._tools.folders)
        files = await self._do(files_of, folder, MOST_ITEMS)
        known = await self._do(self._store.known, self._source)
        same = []
        for file in files:
            before = known.get(key_of(file.name))
            if before is not None and before.version == file.version:
                same.append(before.id)
                continue
            try:
                with on_disk(await self._do(content_of, file)) as path:
                    pieces = split((await reading.read(path, file.path.name)).blocks)
            except InputError as error:
                _LOG.info("a file of a folder is left out: %s", error)
                pieces = []  # known, so that it isn't tried again before it changes
            await self._keep(Item(file.name, "", file.name, file.modified, pieces, file.version))
        await self._do(self._store.same, self._source, same)
        await self._do(self._store.finish, self._source, listed=[file.name for file in files])

    async def _posts(self) -> None:
        """X's recent search: https://docs.x.com/x-api/posts/search-recent-posts."""
        token, source = self._tools.config.x_token, self._source
        if token is None:
            raise InputError(f"X can't be searched: {self._tools.config.x_token_env} holds no bearer token")
        asked = {
            "query": source.address,
            "max_results": str(_POSTS),
            "tweet.fields": "created_at,author_id",
            "expansions": "author_id",
            "user.fields": "username",
        }
        recent = source.refreshed is not None and source.refreshed > self._store.now() - _SINCE_S
        newest = source.etag if recent else None
        if newest:
            asked["since_id"] = newest
        for _ in range(_POST_PAGES):
            found = await ask_api(
                self._tools.own,
                f"{self._tools.config.x_url}/tweets/search/recent?{urlencode(asked)}",
                {"Authorization": f"Bearer {token}"},
            )
            names = {one["id"]: one["username"] for one in found.get("includes", {}).get("users", ())}
            for post in found.get("data", ()):
                await self._post(post, plain(str(names.get(post.get("author_id"), "i"))))
            meta = found.get("meta", {})
            if "next_token" not in asked and meta.get("newest_id"):
                newest = str(meta["newest_id"])
            if not meta.get("next_token"):
                break
            asked["next_token"] = str(meta["next_token"])
        await self._do(self._store.finish, source, newest)

    async def _post(self, post: dict[str, Any], name: str) -> None:
        address = f"https://x.com/{name}/status/{post['id']}"
        pieces = split([Block(plain(str(post["text"])), "", f"@{name}")])
        await self._keep(Item(str(post["id"]), address, f"@{name}", time_of(post.get("created_at")), pieces))

    async def _keep(self, item: Item) -> None:
        item_id = await self._do(self._store.keep, self._source, item)
        embedder = self._tools.embedder
        if embedder is None or not item.pieces:
            return
        try:
            texts = await self._do(self._store.texts, item_id)
            vectors = await embedder.vectors([text for _, text in texts])
        except (InputError, OperationError) as error:
            _LOG.warning("no vectors of a live source: %s", error)  # its words are found without
            return
        rows = [(passage_id, vector.tobytes()) for (passage_id, _), vector in zip(texts, vectors, strict=True)]
        await self._do(self._store.keep_vectors, item_id, rows, embedder.model)

    async def _do(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return await asyncio.to_thread(work, *arguments, **named)


async def ask_api(fetcher: Fetcher, url: str, headers: dict[str, str]) -> dict[str, Any]:
    """What an interface for programs answers: an object of JSON.

    Raises
    ------
    FetchError
        If it doesn't.
    """
    fetched = await fetcher.get(url, API_BYTES, headers={"Accept": "application/json"} | headers, robots=False)
    host = urlsplit(url).netloc
    try:
        found = json.loads(fetched.content)
    except (ValueError, RecursionError):
        raise FetchError(f"{host} answered with something that isn't JSON") from None
    if not isinstance(found, dict):
        raise FetchError(f"{host} answered with something else than an object of JSON")
    return found


def time_of(text: Any) -> float | None:
    """Seconds of a date and time as interfaces write them; none of one before 1970, which nothing here is from."""
    from datetime import UTC

    try:
        when = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    seconds = (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
    return seconds if seconds >= 0 else None


def _linked(base: str, address: str) -> str:
    """Where an entry leads, if that is the address of a page."""
    try:
        whole = urljoin(base, address.strip()) if address else ""
        check_address(whole)
    except (FetchError, ValueError):
        return ""
    return whole


def _same_host(one: str, other: str) -> bool:
    try:
        return urlsplit(one).hostname == urlsplit(other).hostname and urlsplit(one).scheme in {"http", "https"}
    except ValueError:
        return False
