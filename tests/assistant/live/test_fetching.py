"""Fetching on somebody's behalf: public addresses alone, robots.txt, a host's turns, bounded sizes and times."""

from __future__ import annotations

import gzip
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

sys.path.insert(0, str(Path(__file__).parent))
from sites import LOOPBACK, Site, site_on

from modelworks.assistant.live.fetching import AGENT, Fetcher, FetchError, retry_after
from modelworks.assistant.live.guard import Guard
from modelworks.spec.errors import InputError

MOST = 1 << 20


@pytest.fixture
def site() -> Iterator[Site]:
    with site_on() as site:
        yield site


@pytest.fixture
async def fetcher() -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(Guard(LOOPBACK), delay_s=0.0, wall_s=5)
    yield fetcher
    await fetcher.close()


@pytest.fixture
async def stranger() -> AsyncIterator[Fetcher]:
    """As it is for those who allow nothing."""
    fetcher = Fetcher(Guard(), delay_s=0.0, wall_s=5)
    yield fetcher
    await fetcher.close()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("192.88.99.1", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "fe80::1", "fe80::1%lo"),
        *("fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"),
        *("2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "3fff::1", "5f00::1", "100::1", "4000::1"),
    ],
)
def test_no_kind_of_private_address_is_allowed(address: str) -> None:
    assert not Guard().allows(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_allowed(address: str) -> None:
    assert Guard().allows(address)


def test_this_machines_own_public_address_is_not_allowed_unless_the_operator_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = [SimpleNamespace(family=socket.AF_INET, address="8.8.8.8")]
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {"eth0": card})
    assert [Guard().allows(one) for one in ("8.8.8.8", "::ffff:8.8.8.8", "8.8.4.4")] == [False, False, True]
    assert Guard(["8.8.8.8"]).allows("8.8.8.8")


def test_what_the_operator_allows_is_allowed_and_nothing_beside_it() -> None:
    guard = Guard(["10.1.0.0/16", "fd00::/64"])
    assert [guard.allows(one) for one in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::5", "10.2.0.1")] == [
        *(True, True, True),
        False,
    ]
    with pytest.raises(InputError, match=r"'intranet' is not accepted: an address or a network"):
        Guard(["intranet"])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0", "[::1]", "[::ffff:127.0.0.1]"]
)
async def test_this_machine_is_not_reached_by_any_of_its_names(site: Site, stranger: Fetcher, host: str) -> None:
    site.pages["/"] = "secret"
    with pytest.raises(FetchError, match=r"is not a public address|can't be reached"):
        await stranger.get(site.address.replace("127.0.0.1", host), MOST)
    assert site.asked == []


class Names(AbstractResolver):
    """Answers each look-up with the next of some addresses."""

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[ResolveResult]:
        address = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0),
        ]

    async def close(self) -> None:
        """Nothing."""


async def test_a_name_is_judged_by_the_address_that_is_connected_to(site: Site) -> None:
    port = int(site.address.rpartition(":")[2])
    with site_on("127.0.0.2", port) as outside:  # which may be connected to, as a public address might
        outside.pages["/"] = "public"
        for answers in (["127.0.0.1"], ["127.0.0.2", "127.0.0.1"]):
            fetcher = Fetcher(Guard(["127.0.0.2"]), delay_s=0.0, resolver=Names(*answers))
            url = f"http://evil.example:{port}/"
            if len(answers) > 1:
                assert (await fetcher.get(url, MOST, robots=False)).content == b"public"
            with pytest.raises(FetchError, match=r"127\.0\.0\.1 is not a public address"):
                await fetcher.get(url, MOST, robots=False)
            await fetcher.close()
    assert site.asked == []


async def test_a_redirect_is_judged_like_the_first_address(site: Site) -> None:
    with site_on("127.0.0.2") as inside:
        inside.pages["/"] = "secret"
        for target in (inside.address, "file:///etc/passwd", "ftp://127.0.0.1/", "http://user:word@127.0.0.1/"):
            site.pages["/out"] = (302, {"Location": target}, b"")
            fetcher = Fetcher(Guard(["127.0.0.1/32"]), delay_s=0.0)
            with pytest.raises(FetchError, match=r"127\.0\.0\.2 is not a public address|is not accepted"):
                await fetcher.get(f"{site.address}/out", MOST)
            await fetcher.close()
        assert inside.asked == []


async def test_redirects_are_followed_five_times_and_never_with_a_key(site: Site, fetcher: Fetcher) -> None:
    site.pages["/a"] = (301, {"Location": "/b"}, b"")
    site.pages["/b"] = (200, {"Content-Type": "text/plain; charset=iso-8859-2"}, "ł".encode("iso-8859-2"))
    fetched = await fetcher.get(f"{site.address}/a", MOST)
    assert (fetched.url, fetched.kind, fetched.charset) == (f"{site.address}/b", "text/plain", "iso-8859-2")
    assert site.headers("/b")["user-agent"] == AGENT
    with pytest.raises(FetchError, match="not followed with a key"):
        await fetcher.get(f"{site.address}/a", MOST, headers={"Authorization": "Bearer x"})
    site.pages["/round"] = (302, {"Location": "/round"}, b"")
    with pytest.raises(FetchError, match="more than 5 times"):
        await fetcher.get(f"{site.address}/round", MOST)


async def test_robots_txt_is_asked_once_and_obeyed(site: Site, fetcher: Fetcher) -> None:
    site.pages["/robots.txt"] = (
        "User-agent: Modelworks\nDisallow: /private\nAllow: /private/not\nSitemap: http://x/m.xml"
    )
    site.pages |= {"/a": "a", "/private": "b", "/private/not": "c"}
    await fetcher.get(f"{site.address}/a", MOST)
    await fetcher.get(f"{site.address}/private/not", MOST)
    with pytest.raises(FetchError, match=r"robots\.txt of .* forbids .*/private$"):
        await fetcher.get(f"{site.address}/private", MOST)
    site.pages["/to-private"] = (302, {"Location": "/private"}, b"")
    with pytest.raises(FetchError, match="forbids"):
        await fetcher.get(f"{site.address}/to-private", MOST)
    assert [path for path, _ in site.asked].count("/robots.txt") == 1
    assert "/private" not in site.paths()
    assert await fetcher.site_maps(site.address) == ["http://x/m.xml"]


async def test_with_a_robots_txt_that_can_not_be_had_nothing_is_fetched(site: Site, fetcher: Fetcher) -> None:
    site.pages |= {"/robots.txt": (503, {}, b""), "/a": "a"}
    with pytest.raises(FetchError, match=r"robots\.txt can't be had: it answered 503"):
        await fetcher.get(f"{site.address}/a", MOST)
    assert site.paths() == []


async def test_a_host_has_its_turns_and_its_crawl_delay(site: Site) -> None:
    site.pages |= {"/robots.txt": "User-agent: *\nCrawl-delay: 0.5", "/a": "a"}
    fetcher = Fetcher(Guard(LOOPBACK), delay_s=0.2)
    began = time.monotonic()
    for _ in range(3):
        await fetcher.get(f"{site.address}/a", MOST)
    assert time.monotonic() - began >= 1.5  # after robots.txt and between the pages
    await fetcher.close()
    site.pages["/robots.txt"] = "User-agent: *\nCrawl-delay: 3600"
    patient = Fetcher(Guard(LOOPBACK), delay_s=0.0)
    with pytest.raises(FetchError, match="wants 3,600 s between two pages"):
        await patient.get(f"{site.address}/a", MOST)
    await patient.close()


async def test_retry_after_is_waited_for_or_told(site: Site, fetcher: Fetcher) -> None:
    site.pages["/busy"] = (429, {"Retry-After": "900"}, b"")
    with pytest.raises(FetchError, match="is busy and wants to be asked again in 900 s") as caught:
        await fetcher.get(f"{site.address}/busy", MOST)
    assert caught.value.retry_s == 900
    before = len(site.asked)
    with pytest.raises(FetchError, match="is busy"):  # the host is left alone, whatever the page
        await fetcher.get(f"{site.address}/other", MOST)
    assert len(site.asked) == before
    assert retry_after("Sat, 01 Jan 2000 00:00:00 GMT") == 0
    assert retry_after("soon") is None


async def test_a_page_that_is_the_same_is_not_sent_again(site: Site, fetcher: Fetcher) -> None:
    site.pages["/a"] = (200, {"ETag": '"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, b"a")
    first = await fetcher.get(f"{site.address}/a", MOST)
    again = await fetcher.get(f"{site.address}/a", MOST, first.etag, first.modified)
    assert (first.status, again.status, again.content) == (200, 304, b"")
    assert site.headers("/a")["if-modified-since"] == "Mon, 01 Jan 2024 00:00:00 GMT"


def endless(handler: Any) -> None:
    """100 MB, without saying so."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(1600):
        handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")


def trickling(handler: Any) -> None:
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.05)


async def test_what_is_too_large_or_takes_too_long_is_left(site: Site) -> None:
    fetcher = Fetcher(Guard(LOOPBACK), delay_s=0.0, wall_s=1.0)
    site.pages |= {"/endless": endless, "/trickle": trickling, "/said": bytes(MOST + 1)}
    bomb = gzip.compress(bytes(50 << 20))
    site.pages["/bomb"] = (200, {"Content-Encoding": "gzip"}, bomb)
    site.pages["/packed"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(b"hello"))
    site.pages["/odd"] = (200, {"Content-Encoding": "br"}, b"x")
    for path in ("/endless", "/said", "/bomb"):
        with pytest.raises(FetchError, match=rf"{path} is larger than 1,048,576 bytes"):
            await fetcher.get(site.address + path, MOST)
    with pytest.raises(FetchError, match="took more than 1 seconds"):
        await fetcher.get(f"{site.address}/trickle", MOST)
    with pytest.raises(FetchError, match="packed by 'br'"):
        await fetcher.get(f"{site.address}/odd", MOST)
    assert (await fetcher.get(f"{site.address}/packed", MOST)).content == b"hello"
    with pytest.raises(FetchError, match=r"/none answered 404 \(Not Found\)"):
        await fetcher.get(f"{site.address}/none", MOST)
    await fetcher.close()
