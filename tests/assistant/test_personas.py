"""Modes, personas, folders, pins and titles: a person's own, kept and given up again, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.personas import LONGEST_PROMPT
from modelworks.assistant.store import ConversationStore
from modelworks.assistant.titles import sensible
from modelworks.spec.errors import InputError


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ConversationStore]:
    file = tmp_path / "modelworks.db"
    store = ConversationStore(file if request.param == "sqlite" else request.getfixturevalue("shared_database"))
    yield store
    store.close()


def test_a_persona_is_told_until_it_is_changed_or_removed(store: ConversationStore) -> None:
    pirate = store.personas.create(" Pirate ", "You are a pirate.")
    chat = store.create("m", mode=pirate.id, temperature=1.5)
    assert (chat.mode, chat.temperature, store.prompt(chat.mode)) == (pirate.id, 1.5, "You are a pirate.")
    assert store.personas.change(pirate.id, prompt="You are a polite pirate.").name == "Pirate"
    assert store.prompt(chat.mode) == "You are a polite pirate."
    store.personas.delete(pirate.id)
    assert store.conversation(chat.id).mode == "regular"
    assert store.personas.all() == []
    assert store.change(chat.id, mode="fun", temperature=None).temperature is None
    assert "cruelty" in store.prompt("fun")


def test_what_a_persona_or_a_conversation_can_not_be_is_said(store: ConversationStore) -> None:
    store.personas.create("Pirate", "Arr.")
    chat = store.create("m")
    for name, prompt, wrong in (
        ("", "x", "1 to 60"),
        ("a\nb", "x", "one line"),
        ("x", " ", "prompt of 0"),
        ("x", "x" * (LONGEST_PROMPT + 1), "prompt of 8,001"),
        ("PIRATE", "x", "another name"),
        ("Fun", "x", "another name"),
    ):
        with pytest.raises(InputError, match=wrong):
            store.personas.create(name, prompt)
    for changes, wrong in (
        ({"mode": "rude"}, "mode = 'rude' is not accepted"),
        ({"temperature": 2.1}, "from 0 to 2"),
        ({"temperature": float("nan")}, "from 0 to 2"),
        ({"folder_id": "none"}, "there is no folder"),
        ({"folder_id": "\0"}, "there is no folder"),
        ({"title": " \n"}, "can't be empty"),
        ({"title": "x" * 201}, "1 to 200"),
    ):
        with pytest.raises(InputError, match=wrong):
            store.change(chat.id, pinned=True, **changes)
    assert store.conversation(chat.id) == chat


def test_folders_hold_conversations_and_let_them_go(store: ConversationStore) -> None:
    folder = store.folders.create("Work")
    first, second = store.create("m", folder_id=folder.id), store.create("m")
    store.change(second.id, folder_id=folder.id, pinned=True)
    store.change(first.id, folder_id=None)
    assert [(one.id, one.folder_id) for one in store.conversations()] == [(second.id, folder.id), (first.id, None)]
    assert store.folders.rename(folder.id, "Play").name == "Play"
    store.folders.delete(folder.id)
    assert {one.folder_id for one in store.conversations()} == {None}
    assert store.folders.all() == []


def test_nobody_has_anothers_personas_and_folders(store: ConversationStore) -> None:
    accounts = Accounts(store.database)
    alice, bob = (store.of(accounts.add_user(name).id) for name in ("alice", "bob"))
    persona, folder, chat = alice.personas.create("Pirate", "Arr."), alice.folders.create("Work"), bob.create("m")
    assert (bob.personas.all(), bob.folders.all()) == ([], [])
    bob.personas.create("Pirate", "Harr.")
    for theft in (
        lambda: bob.personas.change(persona.id, "Mine"),
        lambda: bob.personas.delete(persona.id),
        lambda: bob.folders.rename(folder.id, "Mine"),
        lambda: bob.folders.delete(folder.id),
        lambda: bob.change(chat.id, mode=persona.id),
        lambda: bob.change(chat.id, folder_id=folder.id),
        lambda: bob.create("m", mode=persona.id),
        lambda: bob.prompt(persona.id),
    ):
        with pytest.raises(InputError):
            theft()
    assert (alice.personas.all(), alice.folders.all()) == ([persona], [folder])
    accounts.remove_user("alice")
    assert (store.personas.all()[0].name, store.folders.all()) == ("Pirate", [])


def test_a_models_title_stands_until_a_person_gives_one_and_never_in_its_place(store: ConversationStore) -> None:
    chat = store.create("m")
    store.add(chat.id, "user", "how do whales sleep??", None)
    assert store.entitle(chat.id, "Sleep of Whales")
    assert (store.conversation(chat.id).title, store.conversation(chat.id).title_by) == ("Sleep of Whales", "model")
    store.rename(chat.id, "Mine")
    assert not store.entitle(chat.id, "Not this")
    assert store.conversation(chat.id).title == "Mine"
    early = store.create("m")
    store.rename(early.id, "New conversation")
    store.add(early.id, "user", "hello", None)
    assert store.conversation(early.id).title == "New conversation"


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("Sleep of Whales", "Sleep of Whales"),
        ('**Title:** "sleep of whales."', "Sleep of whales"),
        ("\n\n# Whales\nThey sleep.", "Whales"),
        ("The subject of this conversation is: whale sleep", "Whale sleep"),
        ("", None),
        ("...", None),
        ("Whales sleep with one half of their brain", None),
        ("I'm sorry, whales", None),
        ("Untitled", None),
        ("whale whale whale whale", None),
        ("<b>whales</b>", None),
        ("The Golden Curry", None),
        ("This conversation is about whales", None),
    ],
)
def test_what_can_be_no_title_is_none(words: str, title: str | None) -> None:
    assert sensible(words, "How do whales sleep? They rest one half of the brain; sleep of a whale.") == title
