"""A copy of the database is of one moment, and brings that moment back."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.backup import back_up, restore
from modelworks.assistant.database import Database, migrate
from modelworks.assistant.store import ConversationStore
from modelworks.spec.errors import InputError


def filled(file: Path, users: int = 3) -> Database:
    database = Database(file)
    for number in range(users):
        Accounts(database).add_user(f"user-{number}")
    return database


def names(file: Path) -> list[str]:
    database = Database(file)
    found = [user.name for user in Accounts(database).users()]
    database.close()
    return found


def test_what_is_restored_is_what_was_copied(tmp_path: Path) -> None:
    database = filled(tmp_path / "live.db")
    size = back_up(tmp_path / "live.db", tmp_path / "copies" / "copy.db")
    assert size == (tmp_path / "copies" / "copy.db").stat().st_size
    assert (tmp_path / "copies" / "copy.db").stat().st_mode & 0o077 == 0
    Accounts(database).remove_user("user-0")
    Accounts(database).add_user("later")
    restore(tmp_path / "copies" / "copy.db", tmp_path / "live.db")
    # The server that runs sees it, too.
    assert [user.name for user in Accounts(database).users()] == ["user-0", "user-1", "user-2"]
    Accounts(database).add_user("after")
    database.close()
    assert [file.name for file in (tmp_path / "copies").iterdir()] == ["copy.db"]


def test_a_copy_made_while_others_write_is_of_one_moment(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path / "live.db")
    conversation = store.create("stub")
    stop = threading.Event()
    acknowledged = []

    def write() -> None:
        parent = None
        while not stop.is_set():
            parent = store.add(conversation.id, "user", f"{len(acknowledged)} " + "x" * 2000, parent).id
            acknowledged.append(parent)

    writer = threading.Thread(target=write)
    writer.start()
    before = []
    for number in range(4):
        time.sleep(0.1)
        before.append(len(acknowledged))
        back_up(tmp_path / "live.db", tmp_path / f"{number}.db")
    stop.set()
    writer.join()
    store.close()
    for number, least in enumerate(before):
        copy = ConversationStore(tmp_path / f"{number}.db")
        thread = copy.thread(conversation.id)
        copy.close()
        assert len(thread) >= least
        assert [message.content.split()[0] for message in thread] == [str(index) for index in range(len(thread))]


def test_a_copy_of_an_earlier_schema_is_brought_up(tmp_path: Path) -> None:
    database = filled(tmp_path / "old.db")
    migrate(database.engine, "0001")
    database.close()
    restore(tmp_path / "old.db", tmp_path / "live.db")
    assert names(tmp_path / "live.db") == []


def test_a_restore_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    filled(tmp_path / "copy.db", 40).close()
    filled(tmp_path / "live.db", 3).close()
    code = "import sys, time; from pathlib import Path; from modelworks.assistant.backup import restore\n"
    code += "print('ready', flush=True)\nfor _ in range(50): restore(Path(sys.argv[1]), Path(sys.argv[2]))"
    chance = random.Random(7)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "copy.db"), str(tmp_path / "live.db")],
            stdout=subprocess.PIPE,
            env=os.environ,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(names(tmp_path / "live.db")) in {3, 40}
        with sqlite3.connect(tmp_path / "live.db") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("damage", ["no file", "no database", "another's", "torn"])
def test_what_is_no_copy_is_refused_and_what_is_there_stands(tmp_path: Path, damage: str) -> None:
    filled(tmp_path / "live.db").close()
    copy = tmp_path / "copy.db"
    if damage == "no database":
        copy.write_bytes(b"not a database" * 1000)
    elif damage == "another's":
        with sqlite3.connect(copy) as connection:
            connection.execute("CREATE TABLE other (x)")
    elif damage == "torn":
        back_up(tmp_path / "live.db", copy)
        copy.write_bytes(copy.read_bytes()[:20_000])
    with pytest.raises(InputError):
        restore(copy, tmp_path / "live.db")
    assert names(tmp_path / "live.db") == ["user-0", "user-1", "user-2"]


def test_a_database_that_is_not_sqlites_has_its_own_tools(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pg_dump"):
        back_up("postgresql://host/name", tmp_path / "copy.db")
    with pytest.raises(InputError, match="there is no database"):
        back_up(tmp_path / "none.db", tmp_path / "copy.db")
