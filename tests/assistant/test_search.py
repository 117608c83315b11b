"""What was said is found by its words, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database, migrate
from modelworks.assistant.search import INDEXED_CHARACTERS, fold, snippet
from modelworks.assistant.store import ConversationStore


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """A database of each kind."""
    return tmp_path / "modelworks.db" if request.param == "sqlite" else request.getfixturevalue("shared_database")


@pytest.fixture
def store(where: Path | str) -> Iterator[ConversationStore]:
    times = iter(range(1, 10_000))
    store = ConversationStore(where, clock=lambda: float(next(times)))
    yield store
    store.close()


def said(store: ConversationStore, *texts: str) -> str:
    """A conversation of these messages."""
    conversation, last = store.create("m"), None
    for number, content in enumerate(texts):
        last = store.add(conversation.id, "assistant" if number % 2 else "user", content, last).id
    return conversation.id


def found(store: ConversationStore, typed: str) -> list[str]:
    return [one.conversation.id for one in store.search(typed)]


def test_words_are_found_by_their_beginning_without_case_and_diacritics(store: ConversationStore) -> None:
    lodz = said(store, "Gdzie jest Łódź?", "W Polsce, na południowy zachód od Warszawy.")
    ocean = said(store, "Tell me about whales", "The naïve Ångström measures café-crème in 東京.")
    for typed in ("łódź", "LODZ", "lod", "polud warsz", "Poludniowy"):
        assert found(store, typed) == [lodz], typed
    for typed in ("angstrom", "naive CAFE", "creme", "京", "東京", "WHALE", "cafe\u0301"):
        assert found(store, typed) == [ocean], typed
    for typed in ("hales", "lodz whales", "", "  ", "?!", "%", "_"):
        assert found(store, typed) == [], typed


def test_the_message_that_says_most_of_it_comes_first_with_a_piece_around_the_words(store: ConversationStore) -> None:
    once = said(store, "Greetings", "word " * 200 + "a fox was there " + "word " * 200)
    often = said(store, "Hello there", "The fox met a fox, and the fox ran.")
    titled = said(store, "Fox hunting")
    first, second, third = store.search("fox")
    assert [one.conversation.id for one in (first, second, third)] == [titled, often, once]
    assert third.snippet is not None
    assert third.snippet.text.startswith("…")
    assert [third.snippet.text[begin:end] for begin, end in third.snippet.hits] == ["fox"]
    assert third.message_id == store.thread(once)[-1].id
    assert second.snippet is not None
    assert [second.snippet.text[begin:end] for begin, end in second.snippet.hits] == ["fox"] * 3


def test_the_index_follows_what_is_written_renamed_and_deleted(store: ConversationStore) -> None:
    name = said(store, "A question")
    answer = store.add(name, "assistant", "", store.thread(name)[-1].id, "m", "writing")
    store.save(answer.id, "half a walrus", "writing")
    assert found(store, "walrus") == []
    store.save(answer.id, "a whole walrus", "stopped")
    assert found(store, "walrus") == [name]
    store.save(answer.id, "a seal", "complete")
    assert (found(store, "walrus"), found(store, "seal")) == ([], [name])
    store.rename(name, "Penguins")
    assert found(store, "penguin") == [name]
    store.delete(name)
    assert found(store, "seal") == []
    with store.database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM said")) == 0


def test_what_the_servers_end_cut_short_is_found(store: ConversationStore) -> None:
    name = said(store, "A question")
    store.save(store.add(name, "assistant", "", store.thread(name)[-1].id, "m", "writing").id, "otter", "writing")
    store.interrupt_unfinished()
    assert found(store, "otter") == [name]


def test_each_user_finds_their_own_alone(where: Path | str) -> None:
    database = Database(where)
    accounts = Accounts(database)
    stores = [ConversationStore(where).of(accounts.add_user(name).id) for name in ("alice", "bob")]
    hers = said(stores[0], "the secret word is platypus")
    assert [found(store, "platypus") for store in stores] == [[hers], []]
    accounts.remove_user("alice")
    with database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM said")) == 0
    for store in stores:
        store.close()
    database.close()


def test_what_was_there_before_the_index_is_found_and_the_way_back_keeps_it(where: Path | str) -> None:
    store = ConversationStore(where)
    name = said(store, "Złoty wiek", "of whales")
    migrate(store.database.engine, "0005")
    with store.database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM messages")) == 2
    migrate(store.database.engine)
    assert found(store, "zloty") == found(store, "whale") == [name]
    assert store.conversation(name).mode == "regular"
    store.close()


HOSTILE = [
    '"',
    "'",
    "a OR b",
    "NOT",
    "a AND",
    "NEAR(",
    "x*",
    "col:x",
    "-x",
    "^x",
    "a:*",
    "& | !",
    "<->",
    "\\",
    "\0",
    "%s",
]


@pytest.mark.parametrize("typed", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_is_typed_is_a_syntax_error(store: ConversationStore, typed: str) -> None:
    name = said(store, "x a or b not and near col near")
    assert set(found(store, typed)) <= {name}
    assert set(found(store, f"{typed} near")) <= {name}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(typed=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_whatever_is_typed_is_looked_for(store: ConversationStore, typed: str) -> None:
    assert store.search(typed) == []


def test_a_message_larger_than_the_index_takes_is_kept_and_found_by_its_beginning(store: ConversationStore) -> None:
    words = " ".join(f"w{number}" for number in range(INDEXED_CHARACTERS // 3))
    name = said(store, words)
    assert found(store, "w77") == [name]
    assert store.thread(name)[0].content == words


@given(st.text())
def test_a_snippets_hits_are_in_it_and_begin_with_the_word(content: str) -> None:
    for word in fold(content).split()[:2]:
        piece = snippet(content, [word])
        for begin, end in piece.hits:
            assert fold(piece.text[begin:end]).startswith(word)
