"""Full-text search over what was said: SQLite's FTS5 or PostgreSQL's tsvector, fed with the same words.

Both databases are given words that are folded here: without case, without diacritics, one character a word where a
script has no spaces. So the same is found on both, and neither parses what a person types: a query becomes a list of
quoted words, each of which finds whatever begins with it, and all of which have to be in one message.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

INDEXED_CHARACTERS = 1 << 18
"""Of one message; PostgreSQL's tsvector holds no more than a megabyte."""
_LONGEST_WORD = 64
_MOST_WORDS = 16
"""Of a query."""
_MOST_HITS = 400
_BEFORE, _AFTER = 50, 110
"""Characters of a snippet beside its first hit."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_PLAIN = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ı": "i", "ħ": "h"})
"""Letters that Unicode doesn't take for others with a mark."""

_INDEX = {
    "sqlite": "INSERT OR REPLACE INTO said (rowid, words) VALUES (:id, :words)",
    "postgresql": "INSERT INTO said (message_id, words) VALUES (:id, to_tsvector('simple', :words)) "
    "ON CONFLICT (message_id) DO UPDATE SET words = excluded.words",
}
_FIND = {
    "sqlite": "SELECT m.conversation_id, m.id FROM said JOIN messages m ON m.id = said.rowid "
    "JOIN conversations c ON c.id = m.conversation_id WHERE said MATCH :query {mine} "
    "ORDER BY bm25(said), m.id DESC LIMIT :most",
    "postgresql": "SELECT m.conversation_id, m.id FROM said JOIN messages m ON m.id = said.message_id "
    "JOIN conversations c ON c.id = m.conversation_id WHERE said.words @@ to_tsquery('simple', :query) {mine} "
    "ORDER BY ts_rank(said.words, to_tsquery('simple', :query), 1) DESC, m.id DESC LIMIT :most",
}


@dataclass(frozen=True)
class Snippet:
    """A piece of a message; `hits` are the places (begin, end) in it of the words that were looked for."""

    text: str
    hits: tuple[tuple[int, int], ...]


def fold(written: str) -> str:
    """A text without case and diacritics: `Łódź` and `lodz` are the same."""
    plain = unicodedata.normalize("NFKD", written.casefold().translate(_PLAIN))
    return "".join(character for character in plain if not unicodedata.combining(character))


def words_of(written: str) -> list[str]:
    """The folded words of a text, in their order."""
    return [word[:_LONGEST_WORD] for word in _WORD.findall(fold(written))]


def query_words(typed: str) -> list[str]:
    """What is looked for when a person types this; none if there is no word in it."""
    return list(dict.fromkeys(words_of(typed)))[:_MOST_WORDS]


def index(session: Session | Connection, message_id: int, content: str) -> None:
    """Have a message found by its words from now on, and no longer by those that it had."""
    _index(session, [{"id": message_id, "words": indexed(content)}])


def index_all(connection: Connection) -> None:
    """Index every message that is there and whole."""
    messages = text("SELECT id, content FROM messages WHERE state <> 'writing' ORDER BY id")
    rows = connection.execute(messages.execution_options(yield_per=200))
    for batch in rows.partitions():
        _index(connection, [{"id": row.id, "words": indexed(row.content)} for row in batch])


def index_new(session: Session, messages: Iterable[tuple[int, str]]) -> None:
    """Index many messages at once, by id and what `indexed` makes of their contents."""
    rows = [{"id": message_id, "words": words} for message_id, words in messages]
    if rows:
        _index(session, rows)


def find(session: Session, words: list[str], owner: str | None) -> list[tuple[str, int]]:
    """Messages that hold words which begin so, the best first: ids of the conversation and of the message."""
    if not words:
        return []
    dialect = _dialect(session)
    query = " ".join(f'"{word}"*' for word in words)
    if dialect == "postgresql":
        query = " & ".join(f"'{word}':*" for word in words)
    statement = _FIND[dialect].format(mine="AND c.user_id = :owner" if owner is not None else "")
    values: dict[str, Any] = {"query": query, "most": _MOST_HITS} | ({"owner": owner} if owner is not None else {})
    return [(row[0], row[1]) for row in session.execute(text(statement), values)]


def holds(written: str, words: list[str]) -> bool:
    """Whether all words, or what begins with them, are in a text."""
    there = words_of(written)
    return bool(words) and all(any(each.startswith(word) for each in there) for word in words)


def snippet(content: str, words: list[str]) -> Snippet:
    """What stands around the first hit, on one line."""
    line = unicodedata.normalize("NFC", " ".join(content.split()))
    hits: list[tuple[int, int]] = []
    for match in _WORD.finditer(line):
        if hits and match.start() > hits[0][0] + _AFTER:
            break
        if fold(match[0]).startswith(tuple(words)):
            hits.append(match.span())
    first = hits[0][0] if hits else 0
    begin = 0 if first <= _BEFORE else line.rfind(" ", 0, first - _BEFORE + 20) + 1
    begin = begin if first - begin <= _BEFORE + 20 else first - _BEFORE
    end = min(len(line), first + _AFTER)
    lead, tail = "…" if begin else "", "…" if end < len(line) else ""
    shift = len(lead) - begin
    seen = tuple((start + shift, stop + shift) for start, stop in hits if start >= begin and stop <= end)
    return Snippet(f"{lead}{line[begin:end]}{tail}", seen)


def _index(session: Session | Connection, rows: list[dict[str, Any]]) -> None:
    session.execute(text(_INDEX[_dialect(session)]), rows)


def indexed(content: str) -> str:
    """The words of a message that it is found by."""
    return " ".join(words_of(content[:INDEXED_CHARACTERS]))[:INDEXED_CHARACTERS]


def _dialect(session: Session | Connection) -> str:
    return session.get_bind().dialect.name if isinstance(session, Session) else session.dialect.name
