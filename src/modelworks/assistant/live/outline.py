"""The process in which a feed or a site map is read: ``python -m modelworks.assistant.live.outline feed|map PATH URL``.

Like documents, feeds are what a stranger made; they are read with the same limits (`documents.limits`). What is found
are lines of JSON: ``{"entry"}`` for each entry of a feed, ``{"page"}`` and ``{"map"}`` for those that a site map
names, and last ``{"end": true}`` or ``{"error"}``.
"""

from __future__ import annotations

import calendar
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

MOST_ENTRIES = 300
"""Of a feed."""
MOST_PAGES = 50_000
"""Of a site map, as its protocol has it."""
LONGEST_ENTRY = 200_000
"""Characters of an entry's text."""
WALL_S = 120.0


async def outline(kind: str, path: Path, url: str) -> list[dict[str, Any]]:
    """What a feed or a site map holds, read in a process of its own.

    Raises
    ------
    InputError
        If it is none, in one sentence.
    """
    import asyncio

    from modelworks.assistant.documents.reading import confined
    from modelworks.spec.errors import InputError

    found: list[dict[str, Any]] = []
    what = "feed" if kind == "feed" else "site map"
    try:
        async with asyncio.timeout(WALL_S), confined(__name__, kind, str(path), url) as process:
            assert process.stdout is not None
            async for line in process.stdout:
                said: dict[str, Any] = json.loads(line)
                if "error" in said:
                    raise InputError(said["error"])
                if "end" in said:
                    return found
                found.append(said)
    except TimeoutError:
        raise InputError(f"reading the {what} {url} took more than {WALL_S:,.0f} seconds") from None
    raise InputError(f"the {what} {url} can't be read: it is damaged, or too much for what reading may take")


def main(kind: str, path: Path, url: str) -> None:
    """Read a feed or a site map and print what is in it."""
    from modelworks.assistant.documents.limits import confine

    os.nice(5)
    confine()
    try:
        for one in (_feed if kind == "feed" else _map)(path.read_bytes(), url):
            print(json.dumps(one), flush=False)
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
    except Exception as error:  # noqa: BLE001 (what a library makes of a damaged file can be anything)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        print(json.dumps({"error": f"{url} is damaged, or not what it seems to be"}))
    else:
        print(json.dumps({"end": True}))


def _feed(content: bytes, url: str) -> Iterator[dict[str, Any]]:
    import feedparser  # type: ignore[import-untyped]

    found = feedparser.parse(content, response_headers={"content-location": url}, sanitize_html=False)
    if not found.version and not found.entries:
        raise ValueError(f"{url} is not a feed: RSS or Atom is accepted")
    for entry in islice(found.entries, MOST_ENTRIES):
        address = str(entry.get("link") or "")
        title = " ".join(_words(str(entry.get("title") or "")).split())[:300]
        parts = [str(part.get("value") or "") for part in entry.get("content", ())]
        text = max([*parts, str(entry.get("summary") or "")], key=len)
        key = str(entry.get("id") or address or title)[:500]
        if key:
            when = entry.get("published_parsed") or entry.get("updated_parsed")
            yield {
                "entry": key,
                "address": address,
                "title": _plain(title),
                "published": calendar.timegm(when) if when and when[0] >= 1970 else None,
                "text": _plain(_words(text)[:LONGEST_ENTRY]),
            }


def _words(markup: str) -> str:
    from lxml import etree  # type: ignore[import-untyped]

    from modelworks.assistant.documents.parsers import page

    if "<" not in markup and "&" not in markup:
        return markup.strip()
    try:
        return "\n\n".join(block.text for block in page(markup.encode()))
    except (etree.ParserError, ValueError):
        return ""


def _map(content: bytes, url: str) -> Iterator[dict[str, Any]]:
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, recover=False)
    try:
        root = etree.fromstring(content, parser)
    except etree.XMLSyntaxError:
        root = None
    kind = etree.QName(root).localname if root is not None else ""
    if kind not in {"urlset", "sitemapindex"}:
        raise ValueError(f"{url} is not a site map: XML of sitemaps.org is accepted")
    for element in islice(root.iterchildren("{*}url", "{*}sitemap"), MOST_PAGES):
        address = (element.findtext("{*}loc") or "").strip()
        if address:
            when = (element.findtext("{*}lastmod") or "").strip()
            yield {"page" if kind == "urlset" else "map": address, "modified": _time(when)}


def _time(text: str) -> float | None:
    """Seconds of a W3C date and time; without a zone it is UTC. None of one before 1970, which no page is from."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    seconds = (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
    return seconds if seconds >= 0 else None


def _plain(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
