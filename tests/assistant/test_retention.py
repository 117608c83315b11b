"""What is kept, for how long, what goes on request, and what is exported."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import pytest
from sqlalchemy import func, inspect, select
from typer.testing import CliRunner

from modelworks.assistant.accounts import REMOVED, Accounts
from modelworks.assistant.database import Database, migrate
from modelworks.assistant.ledger import DAY_S, Ledger, prune, used_by_day
from modelworks.assistant.retention import prune_as
from modelworks.assistant.store import ConversationStore
from modelworks.assistant.tables import AttemptRow, AuditRow, Base, MessageRow, UsageRow
from modelworks.cli import app
from modelworks.serve.access import Outcome, Wanted
from modelworks.serve.errors import RequestError

NOW = 1_800_000_000.0


def used(accounts: Accounts, name: str, days_ago: float, tokens: int = 100) -> None:
    """A request that ended so long ago."""
    at = NOW - days_ago * DAY_S
    ledger = Ledger(accounts.database, clock=lambda: at)
    _, key = accounts.create_key(name)
    grant = ledger.admit(accounts.recognise(key, "::1"), Wanted("chat", "grok", 1, 1, 10))
    ledger.settle(grant, Outcome(prompt_tokens=tokens, completion_tokens=tokens))


@pytest.fixture
def accounts(home: Path) -> Accounts:
    accounts = Accounts(Database(home / "modelworks.db"), clock=lambda: NOW)
    accounts.add_user("alice", password="correct horse battery")
    accounts.add_user("alice-2")
    return accounts


def test_what_is_too_old_goes_and_what_a_limit_counts_stays(accounts: Accounts, home: Path) -> None:
    accounts.set_tier("slow", ["window_s=10d"])
    for days_ago in (0.5, 5, 9, 11, 40):
        used(accounts, "alice", days_ago)
    for days_ago in (1, 100):
        store = ConversationStore(home / "modelworks.db", clock=lambda ago=days_ago: NOW - ago * DAY_S)
        store.add(store.create("grok").id, "user", "hello", None)
    assert prune(accounts.database, NOW, 90 * DAY_S, 2 * DAY_S) == {"conversations": 1, "requests": 2}
    with accounts.database.read() as session:
        assert session.scalar(select(func.count()).select_from(MessageRow)) == 1
        assert session.scalar(select(func.min(UsageRow.at))) == NOW - 9 * DAY_S
    assert prune(accounts.database, NOW, None, None) == {"conversations": 0, "requests": 0}


def test_a_configuration_says_how_long(accounts: Accounts, home: Path) -> None:
    store = ConversationStore(home / "modelworks.db", clock=lambda: time.time() - 8 * DAY_S)
    store.create("grok")
    config = home / "serve.toml"
    config.write_text('[engines.a]\nurl = "http://localhost:1/v1"\n')
    assert prune_as(accounts.database, config)["conversations"] == 0
    config.write_text('[engines.a]\nurl = "http://localhost:1/v1"\n[retention]\nconversations = "7d"\n')
    assert prune_as(accounts.database, config)["conversations"] == 1


def test_who_asks_to_be_forgotten_leaves_nothing_and_others_lose_nothing(accounts: Accounts, home: Path) -> None:
    store = ConversationStore(home / "modelworks.db")
    for name in ("alice", "alice-2"):
        used(accounts, name, 1)
        own = store.of(accounts.user(name).id)
        own.add(own.create("grok").id, "user", f"{name} was here", None)
    for name in ("alice", "alice-2"):
        with pytest.raises(RequestError):
            accounts.sign_in(name, "a wrong password", "10.0.0.1")
    accounts.sign_in("alice", "correct horse battery", "10.0.0.1")
    mine = accounts.user("alice").id
    accounts.remove_user("Alice", everything=True)
    with accounts.database.read() as session:
        for table in Base.metadata.tables.values():
            for row in session.execute(select(table)).mappings():
                for value in row.values():
                    if isinstance(value, str):
                        words = value.replace("alice-2", "").lower()
                        assert "alice" not in words, (table.name, value)
                        assert mine not in words, (table.name, value)
        assert session.scalar(select(func.count()).select_from(MessageRow)) == 1
        assert session.scalar(select(func.count()).select_from(UsageRow)) == 1
        left = session.scalars(select(AttemptRow.subject)).all()
        assert "sign-in alice-2 from 10.0.0.1" in left
        subjects = session.scalars(select(AuditRow.subject)).all()
        assert any("alice-2" in subject for subject in subjects)
        assert REMOVED in subjects


def test_conversations_from_before_there_were_users_are_given_to_one(accounts: Accounts, home: Path) -> None:
    store = ConversationStore(home / "modelworks.db")
    talk = store.create("grok")
    own = store.of(accounts.user("alice").id)
    assert own.conversations() == []
    done = CliRunner().invoke(app, ["users", "set", "alice", "--conversations"])
    assert done.exit_code == 0, done.output
    assert [found.id for found in own.conversations()] == [talk.id]
    assert store.of(accounts.user("alice-2").id).conversations() == []


def test_nothing_of_a_conversation_is_reached_through_another_users_store(accounts: Accounts, home: Path) -> None:
    store = ConversationStore(home / "modelworks.db")
    hers, his = (store.of(accounts.user(name).id) for name in ("alice", "alice-2"))
    talk = hers.create("grok")
    said = hers.add(talk.id, "user", "mine", None)
    for reach in (
        lambda: his.conversation(talk.id),
        lambda: his.rename(talk.id, "x"),
        lambda: his.choose_model(talk.id, "x"),
        lambda: his.add(talk.id, "user", "x", said.id),
        lambda: his.thread(talk.id),
        lambda: his.path(talk.id, said.id),
        lambda: his.show(talk.id, said.id),
    ):
        with pytest.raises(Exception, match="there is no conversation"):
            reach()
    his.delete(talk.id)
    assert his.search("mine") == []
    assert [message.content for message in hers.thread(talk.id)] == ["mine"]


def test_usage_is_exported_and_summed_by_day(accounts: Accounts) -> None:
    accounts.change_user("alice", team="research")
    for days_ago in (0, 1, 1):
        used(accounts, "alice", days_ago)
    used(accounts, "alice-2", 1, tokens=7)
    now = time.time()
    done = CliRunner().invoke(app, ["usage", "--csv", "--days", str((now - NOW) / DAY_S + 10 if now > NOW else 10)])
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["user"], row["team"], row["requests"], row["prompt_tokens"]) for row in rows] == [
        ("alice", "research", "3", "300"),
        ("alice-2", "", "1", "7"),
    ]
    today = int(NOW // DAY_S)
    assert used_by_day(accounts.database, 2, NOW) == [
        {"day": today - 1, "user": "alice", "requests": 2, "tokens": 400},
        {"day": today - 1, "user": "alice-2", "requests": 1, "tokens": 14},
        {"day": today, "user": "alice", "requests": 1, "tokens": 200},
    ]


def test_owners_come_and_go_with_the_schema_and_no_message_is_lost(home: Path) -> None:
    store = ConversationStore(home / "modelworks.db")
    talk = store.create("grok")
    store.add(talk.id, "user", "still here", None)
    engine = store.database.engine
    migrate(engine, "0002")
    assert "user_id" not in {column["name"] for column in inspect(engine).get_columns("conversations")}
    assert "subject" not in {column["name"] for column in inspect(engine).get_columns("users")}
    migrate(engine)
    assert [message.content for message in store.thread(talk.id)] == ["still here"]


def test_postgresql_keeps_sums_and_forgets_the_same(shared_database: str) -> None:
    accounts = Accounts(Database(shared_database), clock=lambda: NOW)
    accounts.add_user("alice", password="correct horse battery")
    used(accounts, "alice", 0)
    used(accounts, "alice", 30)
    store = ConversationStore(shared_database).of(accounts.user("alice").id)
    store.create("grok")
    assert [row["tokens"] for row in used_by_day(accounts.database, 40, NOW)] == [200, 200]
    assert prune(accounts.database, NOW, None, 20 * DAY_S) == {"conversations": 0, "requests": 1}
    migrate(accounts.database.engine, "0002")
    migrate(accounts.database.engine)
    accounts.remove_user("alice", everything=True)
    assert accounts.users() == []
    with accounts.database.read() as session:
        assert session.scalar(select(func.count()).select_from(UsageRow)) == 0
    accounts.database.close()
    store.close()
