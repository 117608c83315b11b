"""Fetches pages as a polite robot does: named, in turn, no more than is allowed, and asking only for what is new.

Every hop of a redirect is looked at like the first: its scheme, the site's ``robots.txt`` (RFC 9309), the host's turn,
and, where the socket is made, the address (`live.guard`). What is fetched has a largest size, counted after it is
unpacked, and a longest time.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

import aiohttp
from protego import Protego

from modelworks import __version__
from modelworks.assistant.live.guard import REFUSED, Guard
from modelworks.spec.errors import InputError, OperationError

NAME = "Modelworks"
"""What ``robots.txt`` may call this robot."""
AGENT = f"{NAME}/{__version__} (live knowledge of a Modelworks server)"
MOST_REDIRECTS = 5
WALL_S = 60.0
"""Seconds that a page may take in all."""
SILENCE_S = 15.0
"""Seconds that it may send nothing."""
LONGEST_WAIT_S = 60.0
"""Seconds between two pages that a site may ask for (``Crawl-delay``, ``Retry-After``); with more, it is left alone."""
LONGEST_ADDRESS = 2000
ROBOTS_BYTES = 512 << 10
_ROBOTS_S = 3600.0
"""How long a site's ``robots.txt`` is remembered."""
_ROBOTS_RETRY_S = 300.0
"""How long it is remembered that there was none to be had."""
_MOST_HOSTS = 2000
_REDIRECTS = {301, 302, 303, 307, 308}
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Fetched:
    """What came. Of status 304 there is no content: it is what it was."""

    url: str
    """Where it came from, after redirects."""
    status: int
    content: bytes
    kind: str
    """Its media type."""
    charset: str | None = None
    etag: str | None = None
    modified: str | None = None


class FetchError(OperationError):
    """A page that did not come, in one sentence.

    Parameters
    ----------
    retry_s
        Seconds after which the site wants to be asked again.
    """

    def __init__(self, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_s = retry_s


@dataclass
class _Host:
    """A host's turns."""

    lock: asyncio.Lock
    free_at: float = 0.0
    used_at: float = 0.0


@dataclass(frozen=True)
class _Robots:
    """What a site wants of robots; without rules, everything is forbidden."""

    rules: Protego | None
    until: float
    reason: str = ""


class Fetcher:
    """Fetches pages. Belongs to one event loop.

    Parameters
    ----------
    guard
        Says which addresses may be connected to; None for those of the operator's own configuration.
    delay_s
        Seconds between two requests to one host, at least.
    wall_s
        Seconds that a page may take in all.
    resolver
        Who resolves names; left out, the system.
    """

    def __init__(
        self,
        guard: Guard | None,
        delay_s: float = 1.0,
        wall_s: float = WALL_S,
        resolver: aiohttp.abc.AbstractResolver | None = None,
    ) -> None:
        self._guard, self._delay_s, self._wall_s, self._resolver = guard, delay_s, wall_s, resolver
        self._session: aiohttp.ClientSession | None = None
        self._hosts: dict[str, _Host] = {}
        self._robots: dict[str, _Robots] = {}

    async def close(self) -> None:
        """Let go of the connections."""
        if self._session is not None:
            await self._session.close()

    async def get(
        self,
        url: str,
        most: int,
        etag: str | None = None,
        modified: str | None = None,
        headers: Mapping[str, str] | None = None,
        robots: bool = True,
    ) -> Fetched:
        """Fetch a page, over redirects.

        Parameters
        ----------
        most
            Bytes that it may have, unpacked.
        etag, modified
            What came with it the last time; if it is still the same, nothing is sent (status 304).
        headers
            More of them, such as a key. With some, redirects are not followed, so that a key goes nowhere else.
        robots
            Whether ``robots.txt`` is asked, as it is for pages; interfaces for programs have none.

        Raises
        ------
        FetchError
            If it doesn't come, with the reason in one sentence.
        """
        asked = dict(headers or {})
        conditions = {"If-None-Match": etag, "If-Modified-Since": modified}
        asked |= {name: value for name, value in conditions.items() if value}
        for _ in range(MOST_REDIRECTS + 1):
            check_address(url)
            pause = await self._pause(url) if robots else 0.0
            fetched, target = await self._once(url, most, asked, pause)
            if target is None:
                return fetched
            if headers:
                raise FetchError(f"{url} redirects, which is not followed with a key")
            url = urljoin(url, target)
        raise FetchError(f"{url} redirects more than {MOST_REDIRECTS} times")

    async def site_maps(self, url: str) -> list[str]:
        """The site maps that a site's ``robots.txt`` names."""
        rules = (await self._rules(url)).rules
        return list(rules.sitemaps) if rules is not None else []

    async def _pause(self, url: str) -> float:
        """Seconds that the site wants between two pages; a page that it forbids is refused."""
        found = await self._rules(url)
        rules = found.rules
        if rules is None:
            raise FetchError(f"nothing is fetched from {_origin(url)} now, since its robots.txt {found.reason}")
        if not rules.can_fetch(url, NAME):
            raise FetchError(f"robots.txt of {_origin(url)} forbids {url}")
        pause = float(rules.crawl_delay(NAME) or 0.0)
        if pause > LONGEST_WAIT_S:
            raise FetchError(f"{_origin(url)} wants {pause:,.0f} s between two pages, which is too long to wait")
        return pause

    async def _rules(self, url: str) -> _Robots:
        origin = _origin(url)
        known = self._robots.get(origin)
        if known is not None and known.until > time.monotonic():
            return known
        found = await self._ask_for_rules(origin)
        if len(self._robots) > _MOST_HOSTS:
            self._robots.clear()
        self._robots[origin] = found
        return found

    async def _ask_for_rules(self, origin: str) -> _Robots:
        url, now = f"{origin}/robots.txt", time.monotonic()
        try:
            for _ in range(MOST_REDIRECTS + 1):
                check_address(url)
                fetched, target = await self._once(url, ROBOTS_BYTES, {}, 0.0, plain=False)
                if target is None:
                    break
                url = urljoin(url, target)
        except FetchError as error:
            if REFUSED in str(error):
                raise
            return _Robots(None, now + _ROBOTS_RETRY_S, f"can't be had: {error}")
        if fetched.status >= 500 or fetched.status == 429:
            return _Robots(None, now + _ROBOTS_RETRY_S, f"can't be had: it answered {fetched.status}")
        text = fetched.content.decode("utf-8", "replace") if fetched.status == 200 else ""  # with none, all is allowed
        return _Robots(Protego.parse(text), now + _ROBOTS_S)

    async def _once(
        self, url: str, most: int, headers: Mapping[str, str], pause: float, plain: bool = True
    ) -> tuple[Fetched, str | None]:
        """One request: what came, or where to go instead. If it isn't `plain`, any status is an answer."""
        host = await self._turn(url, pause)
        shown = shown_address(url)
        try:
            async with (
                asyncio.timeout(self._wall_s),
                self._open().get(url, headers=headers, allow_redirects=False) as answer,
            ):
                status = answer.status
                if status in _REDIRECTS and "Location" in answer.headers:
                    return Fetched(url, status, b"", ""), answer.headers["Location"]
                if status in {429, 503} and (wait := retry_after(answer.headers.get("Retry-After"))) is not None:
                    host.free_at = max(host.free_at, time.monotonic() + wait)
                    if plain:
                        raise FetchError(f"{shown} is busy and wants to be asked again in {wait:,.0f} s", wait)
                if status not in {200, 304} and plain:
                    raise FetchError(f"{shown} answered {status} ({_phrase(status)})")
                content = b"" if status == 304 else await _body(answer, most, shown)
                said = (answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
                return Fetched(url, status, content, answer.content_type, answer.charset, *said), None
        except TimeoutError:
            raise FetchError(f"{shown} took more than {self._wall_s:,.0f} seconds") from None
        except (aiohttp.ClientError, OSError, ValueError, zlib.error) as error:
            raise FetchError(f"{shown} can't be reached: {_reason(error)}") from None

    async def _turn(self, url: str, pause: float) -> _Host:
        """Wait until the host may be asked again."""
        name = urlsplit(url).netloc.lower()
        if len(self._hosts) > _MOST_HOSTS:
            self._hosts = {one: host for one, host in self._hosts.items() if host.lock.locked()}
        host = self._hosts.setdefault(name, _Host(asyncio.Lock()))
        async with host.lock:
            now = time.monotonic()
            wait = max(host.free_at, host.used_at + max(pause, self._delay_s) if host.used_at else 0.0) - now
            if wait > LONGEST_WAIT_S:
                raise FetchError(f"{name} is busy and wants to be asked again in {wait:,.0f} s", wait)
            if wait > 0:
                await asyncio.sleep(wait)
            host.used_at = time.monotonic()
        return host

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                resolver=self._resolver,
                use_dns_cache=False,
                force_close=True,
                limit=16,
                socket_factory=self._guard.socket if self._guard is not None else None,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENCE_S),
                headers={"User-Agent": AGENT, "Accept-Encoding": "gzip, deflate"},
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


def check_address(url: str) -> None:
    """Refuse what is no address of a page.

    Raises
    ------
    FetchError
        Saying what is accepted.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        good = good and parts.username is None and len(url) <= LONGEST_ADDRESS and url.isprintable()
    except ValueError:
        good = False
    if not good or " " in url:
        raise FetchError(f"the address {url[:80]!r} is not accepted: one such as 'https://example.org/feed.xml' is")


def given_address(url: str) -> str:
    """An address as a person gives it, without spaces around it and a fragment.

    Raises
    ------
    InputError
        If it is none.
    """
    url = url.strip()
    try:
        check_address(url)
    except FetchError as error:
        raise InputError(str(error)) from None
    return urlunsplit(urlsplit(url)._replace(fragment=""))


def retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After``, which is a number or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal() and len(value) < 12:
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def shown_address(url: str) -> str:
    """An address without its query, which may hold what was asked."""
    return urlunsplit(urlsplit(url)._replace(query="", fragment=""))[:200]


def unpacked(content: bytes, most: int) -> bytes:
    """What is packed by gzip or zlib, up to one byte more than may come out of it."""
    unpacker = zlib.decompressobj(wbits=47)
    return unpacker.decompress(content, most + 1)


async def _body(answer: aiohttp.ClientResponse, most: int, shown: str) -> bytes:
    too_large = FetchError(f"{shown} is larger than {most:,} bytes, which is the most that is read")
    packing = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in {"identity", "", "gzip", "x-gzip", "deflate"}:
        raise FetchError(f"{shown} is packed by {packing[:20]!r}, which wasn't asked for")
    if (answer.content_length or 0) > most:
        raise too_large
    content = bytearray()
    async for block in answer.content.iter_chunked(_BLOCK):
        content += block
        if len(content) > most:
            raise too_large
    if packing in {"identity", ""}:
        return bytes(content)
    whole = unpacked(bytes(content), most)
    if len(whole) > most:
        raise too_large
    return whole


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "which is no status that is known"


def _reason(error: Any) -> str:
    inner = getattr(error, "os_error", None) or error
    text = " ".join(str(inner).split()) or type(error).__name__
    if REFUSED in text:
        return next(part for part in text.split("OSError") if REFUSED in part)[:200] if "Multiple" in text else text
    return text[:200]
