"""The chat in the language of whoever reads it: English, or Polish from ``languages/pl.toml``.

The English sentence is the key, so the code reads as the page does; a test holds every catalog against the sentences
that the pages say. The language is the one that was chosen (a cookie), or the first of the browser's that there is.
"""

from __future__ import annotations

import json
import re
import tomllib
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files

from starlette.requests import HTTPConnection

LANGUAGES = {"en": "English", "pl": "Polski"}
"""Codes, and how speakers call the language."""
COOKIE = "modelworks_language"
_WANTED = re.compile(r"\s*([a-z]{2,3})\b[^,;]*(?:;\s*q=([\d.]+))?\s*(?:,|$)", re.IGNORECASE)
_SCRIPT_WORD = re.compile(r"\bword\(\s*\"((?:[^\"\\]|\\.)*)\"")


def language_of(request: HTTPConnection) -> str:
    """The language for a request: chosen, or wanted by the browser (RFC 9110, Accept-Language), or English."""
    chosen = request.cookies.get(COOKIE, "")
    if chosen in LANGUAGES:
        return chosen
    wanted = []
    for found in _WANTED.finditer(request.headers.get("accept-language", "")[:500]):
        try:
            wanted.append((float(found[2] or 1), found[1].lower()))
        except ValueError:
            continue
    known = [(weight, code) for weight, code in wanted if code in LANGUAGES and weight > 0]
    return max(known, key=lambda each: each[0])[1] if known else "en"


def say(english: str, /, to: str | None = None, **values: object) -> str:
    """A sentence in the language of the page that is drawn, or in another one.

    Parameters
    ----------
    english
        The sentence; ``{names}`` in it are filled in.
    to
        A language's code, where no page is being drawn.
    """
    sentence = catalog(to or _language_here()).get(english, english)
    return sentence.format(**values) if values else sentence


def say_number(value: float, digits: int = 0, to: str | None = None) -> str:
    """A number as the page's language writes it."""
    from babel.numbers import format_decimal

    return format_decimal(round(value, digits), locale=to or _language_here())


def say_time(seconds: float, to: str | None = None) -> str:
    """A time (seconds since 1970) as the page's language writes it, in UTC."""
    from babel.dates import format_datetime

    when = datetime.fromtimestamp(seconds, UTC)
    return f"{format_datetime(when, 'd MMM y, HH:mm', locale=to or _language_here())} UTC"


@cache
def catalog(code: str) -> dict[str, str]:
    """English sentences and what they are in a language; for English there are none."""
    file = files("modelworks.web") / "languages" / f"{code}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8")) if code != "en" else {}


@cache
def script_words(code: str) -> str:
    """What the pages' own scripts say, as JSON: English and the language's."""
    words = catalog(code)
    return json.dumps({english: words[english] for english in script_sentences() if english in words})


@cache
def script_sentences() -> frozenset[str]:
    """The English sentences in the pages' own scripts."""
    static = files("modelworks.web") / "static"
    scripts = [file.read_text(encoding="utf-8") for file in static.iterdir() if file.name.endswith(".js")]
    return frozenset(found[1] for script in scripts for found in _SCRIPT_WORD.finditer(script))


def _language_here() -> str:
    from nicegui import ui

    try:
        return language_of(ui.context.client.request)
    except RuntimeError:  # outside of a page
        return "en"
