"""What the chat says is there in every language, and the right one is chosen."""

import ast
import re
import string
from pathlib import Path

import pytest
from starlette.requests import Request

import modelworks.web
from modelworks.web.frame import _PAGES
from modelworks.web.language import LANGUAGES, catalog, language_of, say, say_number, script_sentences

ROOM = Path(modelworks.web.__file__).parent


def said() -> set[str]:
    """Every sentence that the pages can say."""
    found = {name for name, _, _ in _PAGES} | set(script_sentences())
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "say" and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    # Names of buttons that a script finds by the words on them.
    keys = (ROOM / "static" / "keys.js").read_text()
    return found | set(re.findall(r"keys\.(?:named|version)\(\"([^\"]+)\"", keys))


def request(**headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw})


@pytest.mark.parametrize("code", [code for code in LANGUAGES if code != "en"])
def test_every_sentence_is_there_and_none_that_nobody_says(code):
    assert set(catalog(code)) == said()


@pytest.mark.parametrize("code", [code for code in LANGUAGES if code != "en"])
def test_translations_fill_in_what_their_originals_do(code):
    for english, other in catalog(code).items():
        names = [{name for _, name, _, _ in string.Formatter().parse(text)} for text in (english, other)]
        assert names[0] == names[1], english


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("pl-PL,pl;q=0.9,en-US;q=0.8", "pl"),
        ("en-GB,en;q=0.9,pl;q=0.5", "en"),
        ("de-DE,de;q=0.9,pl;q=0.4", "pl"),
        ("pl;q=0,en", "en"),
        ("fr", "en"),
        ("*", "en"),
        ("pl;q=x..;;,,,=", "en"),
        ("", "en"),
    ],
)
def test_the_browsers_first_language_that_there_is_is_taken(wanted, expected):
    assert language_of(request(accept_language=wanted)) == expected


def test_a_language_that_was_chosen_goes_before_the_browsers():
    assert language_of(request(accept_language="en", cookie="modelworks_language=pl")) == "pl"
    assert language_of(request(accept_language="pl", cookie="modelworks_language=../x")) == "pl"


def test_sentences_and_numbers_are_written_as_the_language_does():
    assert say("Sign in") == "Sign in"
    assert (
        say("Fetching {name}: {done} of {total} MB", to="pl", name="x", done="1", total="2") == "Pobieranie x: 1 z 2 MB"
    )
    assert say_number(12345.67, 1, to="en") == "12,345.7"
    assert say_number(12345.67, 1, to="pl") == "12\N{NO-BREAK SPACE}345,7"
