"""Batches in the name of a key: what its tier has holds for them, and none is lost with the process at work."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accounted import Gateway, gateway_over
from gateways import HELLO, Stub, client_of, wait_for
from openai import NotFoundError, OpenAI
from sqlalchemy import func, select

from modelworks.assistant.database import Database
from modelworks.assistant.kept import DEAD_S, DatabaseStorage
from modelworks.assistant.tables import BatchRow, FileRow, ResultRow
from modelworks.serve.errors import RequestError
from modelworks.serve.storage import LASTS_S, Batch, Result

CHAT = "/v1/chat/completions"


def lines_of(count: int, **body: Any) -> bytes:
    """A batch's file."""
    asked = {"model": "stub", "messages": HELLO, **body}
    lines = [{"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": asked} for number in range(count)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def begun(client: OpenAI, content: bytes) -> str:
    """A batch's id."""
    file = client.files.create(file=("asked.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id


def ended(client: OpenAI, batch_id: str, seconds: float = 20) -> Any:
    """The batch when it has ended."""
    ends = {"completed", "failed", "cancelled", "expired"}
    return wait_for(lambda: (batch := client.batches.retrieve(batch_id)).status in ends and batch, seconds)


def results(client: OpenAI, file_id: str) -> list[dict[str, Any]]:
    """The lines of a file of answers."""
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_is_answered_in_the_name_of_its_key_and_its_use_is_counted(gateway: Gateway) -> None:
    client = client_of(gateway.address, gateway.user("alice", "answer=6"))
    batch = ended(client, begun(client, lines_of(20)))
    assert (batch.status, batch.request_counts.completed, batch.error_file_id) == ("completed", 20, None)
    answers = results(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{number}" for number in range(20)]
    assert {answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers} == {6}
    used = wait_for(lambda: gateway.ledger.usage()[0])
    assert (used["user"], used["requests"], used["completion_tokens"]) == ("alice", 20, 120)


def test_what_the_tier_does_not_include_fails_line_by_line(gateway: Gateway) -> None:
    client = client_of(gateway.address, gateway.user("alice"))
    good, bad = lines_of(1), lines_of(2, model="hidden").splitlines(True)[1]
    batch = ended(client, begun(client, good + bad))
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    [failed] = results(client, batch.error_file_id)
    assert failed["custom_id"] == "line-1"
    assert failed["response"]["status_code"] == 403
    assert failed["response"]["body"]["error"]["code"] == "not_in_tier"


def test_a_limit_that_is_reached_lets_the_batch_rest_and_is_not_got_round(gateway: Gateway) -> None:
    client = client_of(gateway.address, gateway.user("alice", "messages=3"))
    batch_id = begun(client, lines_of(8))
    wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed == 3)
    time.sleep(3)  # another look, and another one, for a batch to work on
    batch = client.batches.retrieve(batch_id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("in_progress", 3, 0)
    client.batches.cancel(batch_id)
    batch = ended(client, batch_id)
    assert batch.status == "cancelled"
    assert len(results(client, batch.output_file_id)) == 3


def test_a_revoked_key_has_nothing_more_answered(gateway: Gateway) -> None:
    gateway.stub.control(rate=8)
    client = client_of(gateway.address, gateway.user("alice", "parallel=2"))
    other = client_of(gateway.address, gateway.accounts.create_key("alice")[1])
    batch_id = begun(client, lines_of(4))
    wait_for(lambda: gateway.stub.seen()["running"])
    key_id = client.api_key.split("-")[1]
    gateway.accounts.revoke_key(key_id)
    batch = ended(other, batch_id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 3)
    assert {line["response"]["status_code"] for line in results(other, batch.error_file_id)} == {401}


def test_a_batch_waits_behind_those_that_somebody_waits_for(gateway: Gateway) -> None:
    gateway.stub.control(rate=16)  # eight answers at a time, half a second each
    client = client_of(gateway.address, gateway.user("alice"))
    bob = client_of(gateway.address, gateway.user("bob"))
    batch_id = begun(client, lines_of(64))
    wait_for(lambda: gateway.stub.seen()["running"] == 8)
    for _ in range(3):
        assert bob.chat.completions.create(model="stub", messages=HELLO).choices  # type: ignore[arg-type]
    assert client.batches.retrieve(batch_id).status == "in_progress"
    gateway.stub.control(rate=500)
    assert ended(client, batch_id).request_counts.completed == 64


def test_another_process_goes_on_where_one_has_ended(stub: Stub, tmp_path: Path) -> None:
    with gateway_over(stub, tmp_path) as first:
        stub.control(rate=16)
        key = first.user("alice", "parallel=8")
        client = client_of(first.address, key)
        batch_id = begun(client, lines_of(24))
        before = wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed)
    database = Database(tmp_path / "modelworks.db")
    storage = DatabaseStorage(database, lambda: time.time() + DEAD_S + 1)
    owner = database_owner(storage, batch_id)
    assert storage.batch(owner, batch_id).state == "in_progress"  # type: ignore[union-attr]
    claimed = storage.claim_batch("third")
    assert claimed is not None
    storage.rest_batch("third", batch_id, -DEAD_S)  # let go of it, so that the second one needn't wait
    database.close()
    asked = stub.seen()["requests"]
    with gateway_over(stub, tmp_path) as second:
        client = client_of(second.address, key)
        batch = ended(client, batch_id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 24)
        assert len({line["custom_id"] for line in results(client, batch.output_file_id)}) == 24
    assert stub.seen()["requests"] - asked <= 24 - before


def database_owner(storage: DatabaseStorage, batch_id: str) -> str | None:
    """Whose a batch is."""
    with storage._opened().read() as session:
        return session.get_one(BatchRow, batch_id).user_id


def test_a_user_who_is_removed_leaves_no_file_and_no_batch(gateway: Gateway, tmp_path: Path) -> None:
    client = client_of(gateway.address, gateway.user("alice"))
    ended(client, begun(client, lines_of(1)))
    gateway.accounts.remove_user("alice")
    with gateway.accounts.database.read() as session:
        for table in (FileRow, BatchRow, ResultRow):
            assert session.scalar(select(func.count()).select_from(table)) == 0


def test_files_hold_no_more_than_the_tier_has(gateway: Gateway) -> None:
    key = gateway.user("alice", "file_bytes=1000")
    client = client_of(gateway.address, key)
    kept = client.files.create(file=("a", b"x" * 900), purpose="user_data")
    form: dict[str, Any] = {"files": {"file": ("b", b"x" * 101)}, "data": {"purpose": "user_data"}}
    answer = gateway.call(key, "POST", "/v1/files", **form)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "storage_full")
    client.files.delete(kept.id)
    assert gateway.call(key, "POST", "/v1/files", **form).status_code == 200


class Storages:
    """Two processes' view of one database, whose clock the test turns."""

    def __init__(self, where: Path | str) -> None:
        self.now = 1_000_000.0
        self.databases = [Database(where) for _ in range(2)]
        self.one, self.two = (DatabaseStorage(database, lambda: self.now) for database in self.databases)


@pytest.fixture(params=["sqlite", "postgresql"])
def storages(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storages]:
    shared = request.param == "postgresql"
    storages = Storages(request.getfixturevalue("shared_database") if shared else tmp_path / "kept.db")
    yield storages
    for database in storages.databases:
        database.close()


def batch_of(storages: Storages, name: str = "batch_1") -> Batch:
    """A batch that is kept."""
    file = storages.one.put_file(None, "asked", "batch", b"")
    batch = Batch(name, None, None, CHAT, file.id, 86400.0, storages.now)
    storages.one.put_batch(batch)
    return batch


def test_a_batch_is_worked_on_by_one_and_taken_over_only_from_the_dead(storages: Storages) -> None:
    batch = batch_of(storages)
    assert storages.one.claim_batch("one") is not None
    assert storages.two.claim_batch("two") is None
    storages.now += DEAD_S - 1
    assert storages.one.beat_batch("one", batch.id) is not None
    storages.now += DEAD_S - 1
    assert storages.two.claim_batch("two") is None
    storages.now += 2
    assert storages.two.claim_batch("two") is not None
    assert storages.one.beat_batch("one", batch.id) is None


def test_who_has_lost_a_batch_writes_nothing_to_it(storages: Storages) -> None:
    batch = batch_of(storages)
    storages.one.claim_batch("one")
    storages.one.begin_batch("one", batch.id, 2)
    storages.now += DEAD_S + 1
    storages.two.claim_batch("two")
    storages.two.put_result("two", batch.id, Result(0, True, "two's"))
    storages.one.put_result("one", batch.id, Result(1, True, "one's"))
    storages.one.end_batch("one", batch.id, "completed")
    assert storages.two.answered(batch.id) == {0}
    storages.two.end_batch("two", batch.id, "completed")
    done = storages.one.batch(None, batch.id)
    assert done is not None
    assert (done.state, done.completed, done.error_file) == ("completed", 1, None)
    assert storages.one.content(None, done.output_file or "") == b"two's\n"


def test_what_rests_is_left_alone_for_its_time_unless_it_is_cancelled(storages: Storages) -> None:
    batch = batch_of(storages)
    storages.one.claim_batch("one")
    storages.one.rest_batch("one", batch.id, 3600)
    storages.now += 3599
    assert storages.two.claim_batch("two") is None
    storages.now += 2
    assert storages.two.claim_batch("two") is not None
    storages.two.rest_batch("two", batch.id, 3600)
    storages.one.cancel_batch(None, batch.id)
    claimed = storages.two.claim_batch("three")
    assert claimed is not None
    assert claimed.state == "cancelling"


def test_files_and_ended_batches_are_forgotten_when_their_time_is_over(storages: Storages) -> None:
    batch = batch_of(storages)
    short = storages.one.put_file(None, "short", "user_data", b"x", lasts_s=3600)
    storages.one.claim_batch("one")
    storages.one.end_batch("one", batch.id, "failed", [{"code": "x", "message": "y"}])
    storages.now += 3601
    storages.one.forget()
    assert storages.one.file(None, short.id) is None
    assert storages.one.batch(None, batch.id) is not None
    storages.now += LASTS_S
    storages.one.forget()
    assert storages.one.batch(None, batch.id) is None
    assert storages.one.content(None, batch.input_file) is None


def test_pages_of_files_are_whole_and_in_order(storages: Storages) -> None:
    made = []
    for number in range(7):
        storages.now += number % 2  # some of one age
        made.append(storages.one.put_file(None, str(number), "batch" if number % 2 else "user_data", b"x").id)
    storages.one.put_file(None, "later", "user_data", b"x")
    for order in ("asc", "desc"):
        seen: list[str] = []
        while page := storages.one.files(None, purpose=None, after=seen[-1] if seen else None, limit=3, order=order):
            seen += [file.id for file in page]
        assert sorted(seen) == sorted({*made, *seen})
        assert len(seen) == 8
    odd = storages.one.files(None, purpose="batch", after=None, limit=100, order="asc")
    assert {file.id for file in odd} == set(made[1::2])
    with pytest.raises(RequestError, match="there is no 'file-x'"):
        storages.one.files(None, purpose=None, after="file-x", limit=3, order="asc")


def test_a_file_of_another_is_not_there(gateway: Gateway) -> None:
    alice, bob = (client_of(gateway.address, gateway.user(name)) for name in ("alice", "bob"))
    file = alice.files.create(file=("a", b"x"), purpose="user_data")
    with pytest.raises(NotFoundError):
        bob.files.content(file.id)
    assert not list(bob.files.list())
