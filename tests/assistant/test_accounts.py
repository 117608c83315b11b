"""Accounts: keys are recognised and forgotten, passwords are kept as hashes, limits hold against many at once."""

from __future__ import annotations

import hmac
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect

from modelworks.assistant import accounts as accounts_room
from modelworks.assistant import passwords
from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database, default_database, migrate
from modelworks.assistant.ledger import Ledger, priced
from modelworks.assistant.passwords import LONGEST_WAIT_S, Lockout, network
from modelworks.assistant.store import ConversationStore
from modelworks.serve.access import Outcome, Principal, Wanted
from modelworks.serve.config import PriceConfig
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError

PASSWORD = "correct horse battery"
HERE = "192.0.2.7"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "modelworks.db")
    yield database
    database.close()


@pytest.fixture
def accounts(database: Database, clock: Clock) -> Accounts:
    return Accounts(database, clock)


def principal(accounts: Accounts, user: str = "alice", *limits: str) -> Principal:
    """A user with a tier of its own."""
    accounts.set_tier(f"tier-{user}", list(limits))
    accounts.add_user(user, tier=f"tier-{user}")
    _, whole = accounts.create_key(user)
    return accounts.recognise(whole, HERE)


def outcome_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except RequestError as error:
        return f"{error.status} {error}"
    return "passed"


def test_a_key_is_recognised_until_it_is_revoked(accounts: Accounts) -> None:
    accounts.add_user("alice", tier="premium", team="research")
    key, whole = accounts.create_key("alice", "laptop")
    found = accounts.recognise(whole, HERE)
    assert (found.user, found.team, found.tier.name, found.key_id) == ("alice", "research", "premium", key.id)
    accounts.revoke_key(key.prefix)
    with pytest.raises(RequestError):
        accounts.recognise(whole, HERE)


def test_whatever_is_wrong_with_a_key_is_said_in_the_same_words(accounts: Accounts, clock: Clock) -> None:
    accounts.add_user("alice")
    accounts.add_user("bob")
    key, revoked = accounts.create_key("alice")
    accounts.revoke_key(key.id)
    _, expired = accounts.create_key("alice", lasts_s=10)
    _, disabled = accounts.create_key("bob")
    _, good = accounts.create_key("alice")
    accounts.change_user("bob", disabled=True)
    clock.now += 11
    wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
    unknown = "mw-" + "0" * 16 + good[19:]
    said = {outcome_of(lambda key=key: accounts.recognise(key, HERE)) for key in (revoked, expired, disabled, wrong)}
    said |= {outcome_of(lambda key=key: accounts.recognise(key, HERE)) for key in (unknown, "", "x" * 10_000, "mw-é")}
    assert said == {"401 this key is not valid"}
    assert accounts.recognise(good, HERE).user == "alice"


def test_what_is_kept_is_neither_the_key_nor_the_password(accounts: Accounts, tmp_path: Path) -> None:
    accounts.add_user("alice", password=PASSWORD)
    _, whole = accounts.create_key("alice")
    accounts.sign_in("alice", PASSWORD, HERE)
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert whole.encode() not in kept
    assert whole.split("-", 2)[2].encode() not in kept  # which may hold a dash itself
    assert PASSWORD.encode() not in kept
    assert b"$argon2id$v=19$m=65536,t=3,p=4$" in kept


def test_an_unknown_key_is_compared_like_a_known_one(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    true = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append((one, other)) or true(one, other))
    accounts.add_user("alice")
    _, whole = accounts.create_key("alice")
    for key in (whole, "mw-" + "0" * 16 + whole[19:], "nothing like a key"):
        outcome_of(lambda key=key: accounts.recognise(key, HERE))
    assert [len(one) == len(other) == 64 for one, other in compared] == [True] * 3


def test_a_wrong_name_takes_as_long_as_a_wrong_password(accounts: Accounts) -> None:
    accounts.add_user("alice", password=PASSWORD)
    times: dict[str, list[float]] = {"alice": [], "nobody": []}
    for _ in range(4):
        for name, took in times.items():
            began = time.process_time()
            assert outcome_of(lambda name=name: accounts.sign_in(name, "wrong wrong wrong", HERE)).startswith("401")
            took.append(time.process_time() - began)
    ratio = statistics.median(times["alice"]) / statistics.median(times["nobody"])
    assert 0.6 < ratio < 1.7


def test_guessing_a_password_many_times_at_once_gets_no_more_tries(
    accounts: Accounts, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts.add_user("alice", password=PASSWORD)
    judged = []
    monkeypatch.setattr(accounts_room, "matches", lambda word, kept: judged.append(word) or word == PASSWORD)
    with ThreadPoolExecutor(16) as threads:
        said = list(threads.map(lambda n: outcome_of(lambda: accounts.sign_in("alice", f"guess {n}", HERE)), range(40)))
    assert len(judged) == 5
    assert sum(answer.startswith("429") for answer in said) == 35
    assert outcome_of(lambda: accounts.sign_in("alice", PASSWORD, HERE)).startswith("429")
    assert accounts.sign_in("alice", PASSWORD, "198.51.100.1")
    clock.now += 2
    assert accounts.sign_in("alice", PASSWORD, HERE)


def test_the_wait_doubles_up_to_a_quarter_of_an_hour_and_is_forgotten_after_a_day(
    database: Database, clock: Clock
) -> None:
    lockout, waits = Lockout(database, clock), []
    for _ in range(14):
        while True:
            try:
                lockout.attempt({"alice": 2})
                break
            except RequestError as error:
                waits.append(error.retry_after_s)
                clock.now += error.retry_after_s
    assert waits == [min(2.0**n, LONGEST_WAIT_S) for n in range(12)]
    clock.now += 86401
    lockout.attempt({"alice": 1})


def test_wrong_keys_make_an_address_wait_and_right_ones_pass(accounts: Accounts) -> None:
    accounts.add_user("alice")
    _, good = accounts.create_key("alice")
    said = [outcome_of(lambda: accounts.recognise("mw-wrong", HERE)) for _ in range(30)]
    assert said[:20] == ["401 this key is not valid"] * 20
    assert all(answer.startswith("429") for answer in said[20:])
    assert accounts.recognise(good, HERE).user == "alice"
    assert outcome_of(lambda: accounts.recognise("mw-wrong", "198.51.100.1")).startswith("401")


def test_an_ipv6_customer_is_one_address() -> None:
    assert network("2001:db8::1") == network("2001:db8::ffff:1") != network("2001:db8:0:1::1")
    assert network("192.0.2.1") != network("192.0.2.2")


def test_another_password_ends_all_sign_ins_and_no_key(accounts: Accounts) -> None:
    accounts.add_user("alice", password=PASSWORD)
    _, key = accounts.create_key("alice")
    _, signed_in = accounts.sign_in("ALICE", PASSWORD, HERE)
    assert accounts.recognise(signed_in, HERE).user == "alice"
    accounts.set_password("alice", "another long password")
    assert outcome_of(lambda: accounts.recognise(signed_in, HERE)).startswith("401")
    assert accounts.recognise(key, HERE).user == "alice"


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda accounts: accounts.add_user("alice"), "there is a user 'alice' already"),
        (lambda accounts: accounts.add_user("ALICE"), "there is a user 'ALICE' already"),
        (lambda accounts: accounts.add_user("a b"), "the user 'a b' is not accepted"),
        (
            lambda accounts: accounts.add_user("bob", tier="gold"),
            "there is no tier 'gold'; there are free, premium, premium+",
        ),
        (lambda accounts: accounts.add_user("bob", password="short"), "12 to 256 characters"),
        (lambda accounts: accounts.add_user("bob-the-builder", password="Bob-the-Builder"), "the user's name"),
        (lambda accounts: accounts.create_key("carol"), "there is no user 'carol'"),
        (lambda accounts: accounts.create_key("alice", scopes=["root"]), "the scope 'root' is not accepted: generate"),
        (lambda accounts: accounts.create_key("alice", scopes=["admin"]), "alice is no administrator"),
        (lambda accounts: accounts.revoke_key("mw-nothing"), "there is no key"),
        (lambda accounts: accounts.set_tier("t", ["parallel=0"]), "parallel = 0 is not accepted"),
        (lambda accounts: accounts.set_tier("t", ["paralel=1"]), "did you mean 'parallel'"),
        (lambda accounts: accounts.set_tier("t", ["parallel"]), "key=value"),
        (lambda accounts: accounts.remove_tier("free"), "there is no tier 'free' that could be removed"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(accounts: Accounts, work: Any, says: str) -> None:
    accounts.add_user("alice")
    with pytest.raises(InputError) as error:
        work(accounts)
    assert says in str(error.value)


def test_a_tier_is_changed_for_its_users_at_once_and_goes_back(accounts: Accounts) -> None:
    accounts.add_user("alice", tier="free")
    _, key = accounts.create_key("alice")
    before = accounts.recognise(key, HERE).tier
    accounts.set_tier("free", ["tokens_per_day=7K", "models=['grok-*']"])
    after = accounts.recognise(key, HERE).tier
    assert (after.tokens_per_day, after.models, after.parallel) == (7000, ["grok-*"], before.parallel)
    accounts.remove_tier("free")
    assert accounts.recognise(key, HERE).tier == before


def test_a_user_who_is_no_administrator_any_more_has_no_admin_key(accounts: Accounts) -> None:
    accounts.add_user("root", admin=True)
    _, key = accounts.create_key("root", scopes=["admin", "models"])
    assert "admin" in accounts.recognise(key, HERE).scopes
    accounts.change_user("root", admin=False)
    assert accounts.recognise(key, HERE).scopes == {"models"}


def test_what_was_done_is_written_down_with_who_did_it_and_no_secret(accounts: Accounts) -> None:
    accounts.add_user("alice", password=PASSWORD)
    _, whole = accounts.create_key("alice", actor="root")
    written = accounts.audit()
    assert [(entry["actor"], entry["action"]) for entry in written] == [
        ("root", "create key"),
        ("command line", "add user"),
    ]
    assert PASSWORD not in str(written)
    assert whole[20:] not in str(written)


def chat(answers: int = 1, prompt: int = 10, answer: int = 90) -> Wanted:
    return Wanted("chat", "stub", prompt * answers, answers, answer)


def admitted(ledgers: list[Ledger], who: Principal, wanted: Wanted, count: int) -> list[Any]:
    """So many requests at once, spread over servers: what each was granted, or None."""

    def admit(number: int) -> Any:
        try:
            return ledgers[number % len(ledgers)].admit(who, wanted)
        except RequestError as error:
            refusals.append(error)
            return None

    refusals: list[RequestError] = []
    with ThreadPoolExecutor(count) as threads:
        grants = list(threads.map(admit, range(count)))
    assert all(error.status == 429 and (error.retry_after_s or 0) >= 1 for error in refusals)
    return grants


@pytest.mark.parametrize(
    ("limits", "wanted", "fits"),
    [
        (["messages=10", "parallel=100"], chat(), 10),
        (["messages=10", "parallel=100"], chat(answers=4), 2),
        (["tokens_per_day=1000", "parallel=100"], chat(), 10),
        (["parallel=3"], chat(), 3),
    ],
)
def test_requests_at_once_on_two_servers_get_no_more_than_the_tier_has(
    accounts: Accounts, tmp_path: Path, clock: Clock, limits: list[str], wanted: Wanted, fits: int
) -> None:
    who = principal(accounts, "alice", *limits)
    databases = [Database(tmp_path / "modelworks.db") for _ in range(2)]
    grants = admitted([Ledger(database, clock) for database in databases], who, wanted, 24)
    for database in databases:
        database.close()
    assert sum(grant is not None for grant in grants) == fits


def test_what_was_set_aside_and_not_used_can_be_used(accounts: Accounts, database: Database, clock: Clock) -> None:
    who = principal(accounts, "alice", "tokens_per_day=1000", "messages=3", "parallel=1")
    ledger = Ledger(database, clock)
    grant = ledger.admit(who, chat(answer=5000))
    assert grant.answer_tokens == 990
    assert "1 requests at once" in outcome_of(lambda: ledger.admit(who, chat()))
    ledger.settle(grant, Outcome(prompt_tokens=12, completion_tokens=88))
    assert ledger.standing(who) == {"messages": 1, "tokens_today": 100}
    assert ledger.admit(who, chat(answer=5000)).answer_tokens == 890


def test_a_request_that_failed_for_our_reasons_is_no_message(
    accounts: Accounts, database: Database, clock: Clock
) -> None:
    who = principal(accounts, "alice", "messages=1")
    ledger = Ledger(database, clock)
    for status in (503, 429, 400):
        ledger.settle(ledger.admit(who, chat()), Outcome(status=status))
    ledger.settle(ledger.admit(who, chat()), Outcome(status=499, completion_tokens=3))
    assert "1 answers in 2 hours" in outcome_of(lambda: ledger.admit(who, chat()))


def test_a_window_slides(accounts: Accounts, database: Database, clock: Clock) -> None:
    who = principal(accounts, "alice", "messages=2", "window_s=1h", "tokens_per_day=200", "answer=90")
    ledger = Ledger(database, clock)
    for _ in range(2):
        ledger.settle(ledger.admit(who, chat()), Outcome(prompt_tokens=10, completion_tokens=90))
        clock.now += 1000
    with pytest.raises(RequestError) as error:
        ledger.admit(who, chat())
    assert error.value.retry_after_s == pytest.approx(3600 - 2000)
    clock.now += error.value.retry_after_s + 1
    with pytest.raises(RequestError, match="200 tokens in 24 hours") as error:
        ledger.admit(who, chat())
    clock.now += error.value.retry_after_s + 1
    assert ledger.admit(who, chat()).answer_tokens == 90


def test_a_process_that_died_holds_nothing_back(accounts: Accounts, database: Database, clock: Clock) -> None:
    who = principal(accounts, "alice", "parallel=2", "tokens_per_day=200", "messages=2")
    dead, alive = Ledger(database, clock), Ledger(database, clock)
    dead.admit(who, chat())
    alive.admit(who, chat())
    assert outcome_of(lambda: alive.admit(who, chat())) != "passed"
    for _ in range(5):
        clock.now += 15
        alive.beat()
    assert alive.standing(who) == {"messages": 1, "tokens_today": 100}
    assert alive.admit(who, chat()).answer_tokens == 90
    assert outcome_of(lambda: alive.admit(who, chat())) != "passed"


def test_usage_is_added_up_by_user_team_and_model(accounts: Accounts, database: Database, clock: Clock) -> None:
    who = principal(accounts)
    accounts.change_user("alice", team="research")
    ledger = Ledger(database, clock)
    for status, written in ((200, 7), (200, 5), (503, 0)):
        ledger.settle(ledger.admit(who, chat()), Outcome(3, written, 1, status=status))
    expected = {"user": "alice", "team": "research", "model": "stub", "requests": 3, "failed": 1}
    expected |= {"prompt_tokens": 9, "cached_tokens": 3, "completion_tokens": 12}
    assert ledger.usage() == [expected]
    prices = {"stub": PriceConfig(read=2e6, cached=5e5, written=1e7), "other": PriceConfig(read=1.0)}
    assert priced(ledger.usage(), prices) == [expected | {"cost": 6 * 2.0 + 3 * 0.5 + 12 * 10.0}]
    assert priced(ledger.usage(), {})[0]["cost"] is None
    clock.now += 31 * 86400
    assert ledger.usage() == []


def test_a_removed_user_leaves_no_key_and_no_usage(accounts: Accounts, database: Database, clock: Clock) -> None:
    who = principal(accounts)
    ledger = Ledger(database, clock)
    ledger.settle(ledger.admit(who, chat()), Outcome(1, 1))
    accounts.remove_user("alice")
    assert accounts.keys() == []
    assert ledger.usage() == []


def test_conversations_outlive_the_accounts_coming_and_going(tmp_path: Path) -> None:
    file = tmp_path / "modelworks.db"
    store = ConversationStore(file)
    conversation = store.create("stub")
    store.add(conversation.id, "user", "hello", None)
    store.close()
    database = Database(file)
    Accounts(database).add_user("alice")
    migrate(database.engine, "0001")
    assert "users" not in inspect(database.engine).get_table_names()
    migrate(database.engine)
    assert Accounts(database).users() == []
    database.close()
    store = ConversationStore(file)
    assert [message.content for message in store.thread(conversation.id)] == ["hello"]
    store.close()


def test_an_address_that_is_no_database_is_refused_and_its_password_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELWORKS_DATABASE", "mysql://user:hunter2@host/x")
    with pytest.raises(InputError, match="postgresql://user@host/modelworks") as error:
        Database(default_database())
    assert "hunter2" not in str(error.value)


def test_the_hash_that_stands_for_no_user_is_one() -> None:
    assert not passwords.matches("anything", None)
    assert passwords._HASHER.check_needs_rehash(passwords._NOBODYS) is False
