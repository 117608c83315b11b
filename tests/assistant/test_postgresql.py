"""The same database code on a real PostgreSQL, where several servers share it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from modelworks.assistant import accounts as accounts_room
from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database, migrate
from modelworks.assistant.documents.passages import Piece
from modelworks.assistant.ledger import Ledger
from modelworks.assistant.live.knowledge import Live
from modelworks.assistant.live.store import Item, LiveStore
from modelworks.assistant.store import ConversationStore
from modelworks.assistant.tables import Base
from modelworks.serve.access import Outcome, Wanted
from modelworks.serve.config import LiveConfig
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import OperationError

HERE = "192.0.2.7"


def test_the_migrations_make_the_tables_go_down_and_up_again(shared_database: str) -> None:
    database = Database(shared_database)
    with database.engine.connect() as connection:
        # The full-text indexes have tables that no mapped class describes.
        index = {
            "include_name": lambda name, kind, _: kind != "table" or name not in {"said", "passage_words", "live_words"}
        }
        assert compare_metadata(MigrationContext.configure(connection, opts=index), Base.metadata) == []
    migrate(database.engine, "base")
    assert set(inspect(database.engine).get_table_names()) == {"alembic_version"}
    migrate(database.engine)
    assert {"conversations", "usage"} <= set(inspect(database.engine).get_table_names())
    database.close()


def test_servers_that_start_together_migrate_once(shared_database: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        databases = list(threads.map(lambda _: Database(shared_database), range(4)))
    Accounts(databases[0]).add_user("alice")
    assert [user.name for user in Accounts(databases[3]).users()] == ["alice"]
    for database in databases:
        database.close()


def test_a_conversation_is_kept(shared_database: str) -> None:
    store = ConversationStore(shared_database)
    conversation = store.create("stub")
    question = store.add(conversation.id, "user", "Was ist ein Löwe? 🦁", None)
    answer = store.add(conversation.id, "assistant", "", question.id, "stub", "writing")
    store.save(answer.id, "Ein Tier.", "complete")
    assert [message.content for message in store.thread(conversation.id)] == ["Was ist ein Löwe? 🦁", "Ein Tier."]
    assert [found.conversation.id for found in store.search("LÖWE")] == [conversation.id]
    store.delete(conversation.id)
    assert store.conversations() == []
    store.close()


@pytest.mark.parametrize(
    ("limits", "fits"),
    [(["messages=10", "parallel=100"], 10), (["parallel=3"], 3), (["tokens_per_day=1000", "parallel=100"], 10)],
)
def test_requests_at_once_on_three_servers_get_no_more_than_the_tier_has(
    shared_database: str, limits: list[str], fits: int
) -> None:
    databases = [Database(shared_database) for _ in range(3)]
    accounts = Accounts(databases[0])
    accounts.set_tier("some", limits)
    accounts.add_user("alice", tier="some")
    who = accounts.recognise(accounts.create_key("alice")[1], HERE)
    ledgers = [Ledger(database) for database in databases]

    def admit(number: int) -> Any:
        try:
            return ledgers[number % 3].admit(who, Wanted("chat", "stub", 10, 1, 90))
        except RequestError:
            return None

    with ThreadPoolExecutor(24) as threads:
        grants = [grant for grant in threads.map(admit, range(36)) if grant is not None]
    assert len(grants) == fits
    for grant in grants:
        ledgers[0].settle(grant, Outcome(3, 4))
    assert ledgers[1].usage()[0]["completion_tokens"] == 4 * fits
    for database in databases:
        database.close()


def test_passwords_guessed_on_two_servers_count_together(shared_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []
    monkeypatch.setattr(accounts_room, "matches", lambda word, _: bool(judged.append(word)))
    databases = [Database(shared_database) for _ in range(2)]
    servers = [Accounts(database) for database in databases]
    servers[0].add_user("alice", password="correct horse battery")

    def guess(number: int) -> None:
        with pytest.raises(RequestError):
            servers[number % 2].sign_in("alice", f"guess {number}", HERE)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(guess, range(24)))
    assert 5 <= len(judged) <= 7
    for database in databases:
        database.close()


def test_a_server_that_is_not_there_is_said_in_one_sentence_without_its_password() -> None:
    with pytest.raises(OperationError) as error:
        Database("postgresql://someone:hunter2@127.0.0.1:1/nothing")
    assert "cannot be used" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_live_source_is_taken_once_and_its_passages_are_found(shared_database: str) -> None:
    database = Database(shared_database)
    store = LiveStore(database)
    source = store.add("feed", "News", "http://a/", 3600, False, False)
    with ThreadPoolExecutor(4) as threads:
        taken = [one for found in threads.map(lambda _: store.take(["feed"]), range(4)) for one in found]
    assert [one.id for one in taken] == [source.id]
    store.keep(taken[0], Item("1", "http://a/1", "Pumps", 1e9, [Piece("The gearbox takes oil.", "", "", 0)]))
    store.finish(taken[0], listed=["1"])
    evidence = asyncio.run(Live(database, LiveConfig()).evidence("Which oil?", 4096))
    assert [one.where for one in evidence.passages] == ["News: Pumps, published 2001-09-09 01:46 UTC"]
    store.remove(source.id)
    assert asyncio.run(Live(database, LiveConfig()).evidence("Which oil?", 4096)).passages == ()
    database.close()
