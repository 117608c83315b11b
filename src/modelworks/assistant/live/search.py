"""Search engines, asked when a question is: SearXNG, or Brave's search. Of the first results the pages are read.

What is found is not kept: it answers this question, and goes into the record of what its answer was given.
"""

from __future__ import annotations

import asyncio
import html
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np

from modelworks.assistant.documents.blocks import Block
from modelworks.assistant.documents.passages import split
from modelworks.assistant.documents.store import Passage
from modelworks.assistant.live.fetching import FetchError, check_address
from modelworks.assistant.live.pages import PAGE_BYTES, plain, read_page
from modelworks.assistant.live.rounds import Tools, ask_api, time_of
from modelworks.assistant.live.store import Source
from modelworks.assistant.retrieval import fused, words_of
from modelworks.serve.config import LiveConfig
from modelworks.spec.errors import InputError, OperationError

ENGINES = ("searxng", "brave")
MOST_RESULTS = 6
MOST_PAGES = 3
"""Results whose pages are read."""
SEARCH_S = 8.0
"""Seconds that a search may take."""
PAGES_S = 8.0
"""Seconds in which pages are read; of those that take longer, what the search engine said is used."""
LONGEST_QUESTION = 300
"""Characters of a question that a search engine is given."""
_TAG = re.compile(r"<[^>]*>")
_SATURATION, _LENGTH = 1.2, 0.75
"""The usual k1 and b of BM25."""
_LOG = logging.getLogger("modelworks.live")


@dataclass(frozen=True)
class Result:
    """What a search engine says of a page."""

    address: str
    title: str
    snippet: str
    published: float | None


def check_engine(engine: str, config: LiveConfig) -> None:
    """Refuse a search engine that this server can't ask.

    Raises
    ------
    InputError
        Naming those that it can.
    """
    there = {"searxng": config.searxng is not None, "brave": config.brave_key is not None}
    if not there.get(engine, False):
        ready = [name for name in ENGINES if there[name]]
        accepted = ", ".join(ready) or "none is set up on this server"
        raise InputError(f"the search engine {engine[:40]!r} is not accepted: {accepted}")


async def search(source: Source, question: str, tools: Tools) -> list[Passage]:
    """The passages that a search finds, the best first.

    Raises
    ------
    InputError, OperationError
        If the search engine can't be asked.
    """
    check_engine(source.address, tools.config)
    try:
        async with asyncio.timeout(SEARCH_S):
            results = await _results(source.address, " ".join(question.split())[:LONGEST_QUESTION], tools)
    except TimeoutError:
        raise FetchError(f"the search took more than {SEARCH_S:g} seconds") from None
    tasks = [asyncio.create_task(_page(source, result, tools)) for result in results[:MOST_PAGES]]
    if tasks:
        try:
            await asyncio.wait(tasks, timeout=PAGES_S)
        finally:
            for task in tasks:
                task.cancel()
            read = await asyncio.gather(*tasks, return_exceptions=True)
    found: list[Passage] = []
    for place, result in enumerate(results):
        page = read[place] if place < len(tasks) else None
        if isinstance(page, list) and page:
            found += page
        else:
            found += _passages(source, result, [Block(result.snippet)], tools)
    return await _ranked(found, question, tools)


async def _results(engine: str, question: str, tools: Tools) -> list[Result]:
    config = tools.config
    if engine == "searxng":
        url = f"{config.searxng}/search?{urlencode({'q': question, 'format': 'json'})}"
        listed = (await ask_api(tools.own, url, {})).get("results", ())
        names = ("url", "title", "content", "publishedDate")
    else:
        url = f"{config.brave_url}/web/search?{urlencode({'q': question, 'count': MOST_RESULTS})}"
        answer = await ask_api(tools.own, url, {"X-Subscription-Token": config.brave_key or ""})
        listed = (answer.get("web") or {}).get("results", ())
        names = ("url", "title", "description", "page_age")
    results = [_result(*(one.get(name) for name in names)) for one in listed if isinstance(one, dict)]
    return [one for one in results if one is not None][:MOST_RESULTS]


def _result(address: Any, title: Any, snippet: Any, published: Any) -> Result | None:
    try:
        check_address(str(address or ""))
    except FetchError:
        return None
    said, called = (" ".join(html.unescape(_TAG.sub("", plain(str(text or "")))).split()) for text in (snippet, title))
    return Result(plain(str(address)), called[:300], said[:2000], time_of(published) if published else None)


async def _page(source: Source, result: Result, tools: Tools) -> list[Passage]:
    try:
        page = await read_page(await tools.strangers.get(result.address, PAGE_BYTES))
    except (InputError, OperationError) as error:
        _LOG.info("the page of a search's result is left out: %s", error)
        return []
    return _passages(source, result, [Block(piece.text, piece.place, piece.heading) for piece in page.pieces], tools)


def _passages(source: Source, result: Result, blocks: Sequence[Block], tools: Tools) -> list[Passage]:
    now = tools.store.now()
    published = min(result.published, now) if result.published is not None else None
    name = f"{source.name}: {result.title}" if result.title else source.name
    return [
        Passage(
            *(0, result.address, name, number, piece.place, piece.heading, piece.text, 0),
            address=result.address,
            published=published,
            fetched=now,
        )
        for number, piece in enumerate(split(blocks))
        if piece.text.strip()
    ]


async def _ranked(passages: list[Passage], question: str, tools: Tools) -> list[Passage]:
    texts = [f"{one.document}\n{one.heading}\n{one.text}" for one in passages]
    rankings = [by_words(texts, words_of(question))]
    if tools.embedder is not None and texts:
        try:
            vectors = await tools.embedder.vectors([*(text[:1500] for text in texts), question])
        except (InputError, OperationError) as error:
            _LOG.warning("what was searched is ranked by words alone: %s", error)
        else:
            rankings.append([int(one) for one in np.argsort(-(vectors[:-1] @ vectors[-1]), kind="stable")])
    order = fused(rankings)
    order += [place for place in range(len(passages)) if place not in set(order)]  # as the search engine has them
    return [passages[place] for place in order]


def by_words(texts: Sequence[str], words: Sequence[str]) -> list[int]:
    """The places of texts that hold some of the words, by BM25, the best first."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    average = sum(lengths) / max(len(lengths), 1) or 1.0
    scores: Counter[int] = Counter()
    for word in words:
        having = sum(word in count for count in counts)
        weight = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        for place, count in enumerate(counts):
            if often := count[word]:
                norm = _SATURATION * (1 - _LENGTH + _LENGTH * lengths[place] / average)
                scores[place] += weight * often * (_SATURATION + 1) / (often + norm)  # type: ignore[assignment]
    return sorted(scores, key=lambda place: (-scores[place], place))
