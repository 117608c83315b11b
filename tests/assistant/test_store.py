"""Conversations are kept: what was written is read, branches stand side by side, and a crash loses nothing."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from modelworks.assistant.database import Database, migrate
from modelworks.assistant.store import UNTITLED, ConversationStore, title_of
from modelworks.assistant.tables import Base
from modelworks.spec.errors import InputError, OperationError

BUT_THE_INDEX = {
    "include_name": lambda name, kind, _: (
        kind != "table" or not name.startswith(("said", "passage_words", "live_words"))
    )
}
"""The indexes of words are the databases' own business; see `test_search` and `test_documents`."""


@pytest.fixture
def database_file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "modelworks.db"


@pytest.fixture
def store(database_file: Path):
    store = ConversationStore(database_file)
    yield store
    store.close()


def test_what_was_written_is_found_by_another_reader(store, database_file):
    conversation = store.create("smollm2")
    question = store.add(conversation.id, "user", "Was ist ein Löwe? 🦁\n\n```py\nx = 1\n```", None)
    store.add(conversation.id, "assistant", "Ein Tier.", question.id, model="smollm2")

    again = ConversationStore(database_file)
    found = [(m.role, m.content, m.model, m.state) for m in again.thread(conversation.id)]
    again.close()

    assert found == [
        ("user", "Was ist ein Löwe? 🦁\n\n```py\nx = 1\n```", None, "complete"),
        ("assistant", "Ein Tier.", "smollm2", "complete"),
    ]


def test_the_migrations_make_exactly_the_tables_that_the_program_uses(database_file):
    database = Database(database_file)
    with database.engine.connect() as connection:
        difference = compare_metadata(MigrationContext.configure(connection, opts=BUT_THE_INDEX), Base.metadata)
    database.close()
    assert difference == []


def test_migrations_go_down_to_nothing_and_up_again(database_file):
    database = Database(database_file)
    migrate(database.engine, "base")
    assert set(inspect(database.engine).get_table_names()) == {"alembic_version"}
    migrate(database.engine)
    assert {"conversations", "messages"} <= set(inspect(database.engine).get_table_names())
    database.close()


def test_a_database_of_a_newer_program_is_refused_and_left_alone(database_file):
    Database(database_file).close()
    with sqlite3.connect(database_file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(OperationError, match="newer Modelworks"):
        ConversationStore(database_file)


def test_a_file_that_is_no_database_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "modelworks.db").write_bytes(b"these are not the bytes of a database" * 100)
    with pytest.raises(OperationError, match="file is not a database"):
        ConversationStore(tmp_path / "modelworks.db")


def test_commits_reach_the_disk_before_they_are_acknowledged(database_file):
    database = Database(database_file)
    with database.engine.connect() as connection:
        journal = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar()
    database.close()
    assert (journal, synchronous) == ("wal", 2)  # 2 is FULL: https://sqlite.org/pragma.html#pragma_synchronous


def test_an_edited_question_stands_beside_the_first_with_both_answers_kept(store):
    conversation = store.create("m")
    first = store.add(conversation.id, "user", "first", None)
    store.add(conversation.id, "assistant", "answer to first", first.id)
    edited = store.add(conversation.id, "user", "edited", None)
    store.add(conversation.id, "assistant", "answer to edited", edited.id)
    assert [m.content for m in store.thread(conversation.id)] == ["edited", "answer to edited"]
    assert store.thread(conversation.id)[0].versions == (first.id, edited.id)

    store.show(conversation.id, first.id)
    assert [m.content for m in store.thread(conversation.id)] == ["first", "answer to first"]


def test_every_message_of_a_random_tree_is_reached_by_its_path(store):
    """The oracle is a plain dictionary of parents."""
    chance = random.Random(7)
    conversation = store.create("m")
    parents: dict[int, int | None] = {}
    for number in range(60):
        parent = chance.choice([None, *parents])
        parents[store.add(conversation.id, "user", str(number), parent).id] = parent
    for message_id in parents:
        expected, current = [], message_id
        while current is not None:
            expected.insert(0, current)
            current = parents[current]
        assert [m.id for m in store.path(conversation.id, message_id)] == expected
        store.show(conversation.id, message_id)
        shown = [m.id for m in store.thread(conversation.id)]
        assert shown[: len(expected)] == expected
        assert shown[-1] not in parents.values()


def test_a_parent_of_another_conversation_is_refused(store):
    one, two = store.create("m"), store.create("m")
    message = store.add(one.id, "user", "hello", None)
    with pytest.raises(InputError, match="there is no message"):
        store.add(two.id, "assistant", "hi", message.id)
    assert store.thread(two.id) == []


def test_a_deleted_conversation_takes_its_messages_along_and_late_answers_go_nowhere(store, database_file):
    conversation = store.create("m")
    question = store.add(conversation.id, "user", "q", None)
    answer = store.add(conversation.id, "assistant", "", question.id, state="writing")
    store.delete(conversation.id)
    other = store.create("m")
    kept = store.add(other.id, "user", "kept", None)
    store.save(answer.id, "late words", "complete")
    assert kept.id > answer.id
    with sqlite3.connect(database_file) as connection:
        assert connection.execute("SELECT content FROM messages").fetchall() == [("kept",)]
    with pytest.raises(InputError, match="there is no conversation"):
        store.thread(conversation.id)


def test_conversations_are_listed_latest_first(database_file):
    times = iter(range(1, 100))
    store = ConversationStore(database_file, clock=lambda: float(next(times)))
    old, new = store.create("m"), store.create("m")
    store.add(new.id, "user", "About whales", None)
    store.add(old.id, "user", "100% of_this", None)
    assert [c.title for c in store.conversations()] == ["100% of_this", "About whales"]
    store.close()


def test_a_title_comes_from_the_first_question_and_a_given_one_stays(store):
    conversation = store.create("m")
    assert conversation.title == UNTITLED
    question = store.add(conversation.id, "user", "\n  Why is the sky blue?\nReally.", None)
    assert store.conversation(conversation.id).title == "Why is the sky blue?"
    store.rename(conversation.id, " Sky ")
    store.add(conversation.id, "user", "another", question.id)
    assert store.conversation(conversation.id).title == "Sky"
    with pytest.raises(InputError, match="can't be empty"):
        store.rename(conversation.id, "  ")


@pytest.mark.parametrize("text", ["word " * 50, "x" * 500, "ä" * 59 + " end", "  \n\t "])
def test_a_title_is_one_short_line(text):
    title = title_of(text)
    assert 0 < len(title) <= 61
    assert "\n" not in title


def test_concurrent_writers_in_threads_and_processes_lose_nothing(store, database_file):
    conversation = store.create("m")
    failures: list[BaseException] = []

    def write(name: str) -> None:
        try:
            for number in range(20):
                store.add(conversation.id, "user", f"{name}-{number}", None)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    outside = f"""
import pathlib, sys
from modelworks.assistant.store import ConversationStore
store = ConversationStore(pathlib.Path({str(database_file)!r}))
for number in range(20):
    store.add({conversation.id!r}, "user", f"{{sys.argv[1]}}-{{number}}", None)
"""
    processes = [subprocess.Popen([sys.executable, "-c", outside, f"process{n}"]) for n in range(2)]
    threads = [threading.Thread(target=write, args=(f"thread{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [process.wait(60) for process in processes] == [0, 0]

    with sqlite3.connect(database_file) as connection:
        written = {content for (content,) in connection.execute("SELECT content FROM messages")}
    expected = {f"thread{n}-{k}" for n in range(4) for k in range(20)}
    expected |= {f"process{n}-{k}" for n in range(2) for k in range(20)}
    assert failures == []
    assert written == expected


def test_what_was_acknowledged_before_a_kill_is_there_and_the_unfinished_answer_is_marked(database_file):
    writer = f"""
import pathlib
from modelworks.assistant.store import ConversationStore
store = ConversationStore(pathlib.Path({str(database_file)!r}))
conversation = store.create("m")
question = store.add(conversation.id, "user", "question", None)
answer = store.add(conversation.id, "assistant", "", question.id, state="writing")
text = ""
while True:
    text += "word "
    store.save(answer.id, text, "writing")
    print(len(text), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(30):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    acknowledged = [int(line) for line in process.communicate()[0].split()]
    last = acknowledged[-1] if acknowledged else 30 * 5

    store = ConversationStore(database_file)
    assert store.interrupt_unfinished() == 1
    question, answer = store.thread(store.conversations()[0].id)
    store.close()
    assert question.content == "question"
    assert len(answer.content) >= last
    assert answer.state == "interrupted"
    assert "ended while" in (answer.notice or "")
