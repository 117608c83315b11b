"""Conversations go out as files and links and come in from elsewhere: whole, with their branches, or not at all."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelworks.assistant.exports import export
from modelworks.assistant.imports import LARGEST, bring_in
from modelworks.assistant.shares import shared
from modelworks.assistant.store import ConversationStore
from modelworks.spec.errors import InputError

POLISH = "Zażółć gęślą jaźń – ĄĆĘŁŃÓŚŹŻ"


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ConversationStore]:
    file = tmp_path / "modelworks.db"
    store = ConversationStore(file if request.param == "sqlite" else request.getfixturevalue("shared_database"))
    yield store
    store.close()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[ConversationStore]:
    store = ConversationStore(tmp_path / "modelworks.db")
    yield store
    store.close()


def branched(store: ConversationStore) -> str:
    """A conversation with two answers, of which the first is shown."""
    chat = store.create("smollm2", mode="fun", temperature=0.5)
    question = store.add(chat.id, "user", POLISH, None)
    first = store.add(chat.id, "assistant", "**One** & `<two>`\n\n```py\nx = '<b>'\n```\n- a\n- b", question.id, "m1")
    store.add(chat.id, "assistant", "Another", question.id, "m2", "stopped")
    store.show(chat.id, first.id)
    return chat.id


def tree(store: ConversationStore, chat_id: str) -> list[tuple[Any, ...]]:
    """All messages, with their parents as places."""
    messages = store.tree(chat_id)[1]
    places = {message.id: place for place, message in enumerate(messages)}
    return [(m.role, m.content, m.model, m.parent_id and places[m.parent_id]) for m in messages]


def test_our_own_export_comes_in_elsewhere_as_it_was_and_not_twice(store: ConversationStore, tmp_path: Path) -> None:
    chat = branched(store)
    name, content = export(store, chat, "json")
    assert name == "Zażółć gęślą jaźń ĄĆĘŁŃÓŚŹŻ.json"
    assert bring_in(store, content).known == [POLISH]  # it is there
    other = ConversationStore(tmp_path / "other.db")
    (new,) = bring_in(other, content).new
    assert tree(other, new.id) == tree(store, chat)
    assert [m.content for m in other.thread(new.id)] == [m.content for m in store.thread(chat)]
    was = store.conversation(chat)
    for field in ("title", "model", "mode", "temperature", "created", "updated"):
        assert getattr(new, field) == getattr(was, field), field
    assert bring_in(other, content).known == [POLISH]
    assert len(other.conversations()) == 1
    assert [one.conversation.id for one in other.search("zazolc")] == [new.id]
    other.close()


def test_markdown_is_the_branch_that_is_shown(plain: ConversationStore) -> None:
    name, content = export(plain, branched(plain), "markdown")
    text = content.decode()
    assert name.endswith(".md")
    assert text.startswith(f"# {POLISH}\n")
    assert f"## You\n\n{POLISH}" in text
    assert "## m1\n\n**One** & `<two>`" in text
    assert "Another" not in text


def test_a_pdf_holds_every_letter_that_was_said_and_code_that_is_no_markup(plain: ConversationStore) -> None:
    pypdf = pytest.importorskip("pypdf")
    chat = branched(plain)
    last = plain.thread(chat)[-1].id
    for number in range(30):
        last = plain.add(chat, "user" if number % 2 == 0 else "assistant", f"line {number} " + "słowo " * 80, last).id
    hostile = "<img src='file:///etc/passwd'/> &amp; </font></para> <a href='x'>y</a>\x00\x07 " + "w" * 4000
    plain.add(chat, "user", hostile, last)
    reader = pypdf.PdfReader(io.BytesIO(export(plain, chat, "pdf")[1]))
    text = "".join(page.extract_text() for page in reader.pages)
    assert len(reader.pages) > 2
    for said in (*POLISH.split(), "<two>", "x = '<b>'", "line 29", "file:///etc/passwd", "</font>"):
        assert said in text, said
    assert "Another" not in text
    assert {font["/BaseFont"].split("+")[-1] for page in reader.pages for font in fonts(page)} >= {"DejaVuSans"}


def fonts(page: Any) -> Iterator[Any]:
    for font in page["/Resources"]["/Font"].values():
        yield font.get_object()


def node(name: str, parent: str | None, role: str | None, text: str = "", **more: Any) -> dict[str, Any]:
    """A node of ChatGPT's mapping."""
    content = more.pop("content", {"content_type": "text", "parts": [text]})
    about = more.pop("metadata", {"model_slug": "gpt-4o"} if role == "assistant" else {})
    message = None
    if role is not None:
        message = {"author": {"role": role}, "content": content, "create_time": 1700000000.5, "metadata": about} | more
    return {"id": name, "parent": parent, "children": [], "message": message}


def chatgpt(**changes: Any) -> dict[str, Any]:
    nodes = [
        node("root", None, None),
        node("hidden", "root", "system", "", metadata={"is_visually_hidden_from_conversation": True}),
        node("q", "hidden", "user", "How do whales sleep?"),
        node("tool", "q", "assistant", "", recipient="python", content={"content_type": "code", "text": "1"}),
        node("result", "tool", "tool", "1"),
        node("a1", "result", "assistant", "With half a brain."),
        node("a2", "q", "assistant", "Floating.\0\ud800"),
        node("q2", "a1", "user", content={"content_type": "multimodal_text", "parts": [{"asset": 1}, "And this?"]}),
    ]
    talk = {"id": "abc", "conversation_id": "abc", "title": "Whales", "create_time": 1700000000.0}
    talk |= {"update_time": 1700000100.0, "mapping": {one["id"]: one for one in nodes}, "current_node": "a2"}
    return talk | changes


def test_chatgpts_export_comes_in_with_its_branches_times_and_models(store: ConversationStore) -> None:
    packed = zipped({"user.json": b"{}", "conversations.json": json.dumps([chatgpt()]).encode(), "chat.html": b"x"})
    (new,) = bring_in(store, packed, "smollm2").new
    assert (new.title, new.created, new.updated, new.model) == ("Whales", 1700000000.0, 1700000100.0, "gpt-4o")
    assert tree(store, new.id) == [
        ("user", "How do whales sleep?", None, None),
        ("assistant", "With half a brain.", "gpt-4o", 0),
        ("user", "And this?", None, 1),
        ("assistant", "Floating.\ufffd\ufffd", "gpt-4o", 0),
    ]
    assert [message.content[:8] for message in store.thread(new.id)] == ["How do w", "Floating"]
    assert store.thread(new.id)[0].created == 1700000000.5
    again = bring_in(store, json.dumps([chatgpt(), chatgpt(id="d", conversation_id="d", title="New")]).encode())
    assert ([one.title for one in again.new], again.known) == (["New"], ["Whales"])


def open_webui() -> dict[str, Any]:
    messages = {
        "u": {"id": "u", "parentId": None, "childrenIds": ["x", "y"], "role": "user", "content": "Hi", "timestamp": 17},
        "x": {
            "id": "x",
            "parentId": "u",
            "childrenIds": [],
            "role": "assistant",
            "content": "Hello",
            "model": "llama3",
        },
        "y": {"id": "y", "parentId": "u", "childrenIds": [], "role": "assistant", "content": "Hey", "model": "qwen"},
    }
    chat = {"title": "Greetings", "models": ["llama3"], "history": {"messages": messages, "currentId": "x"}}
    return {"id": "1-2", "title": "Greetings", "chat": chat, "created_at": 1700000000, "updated_at": 1700000001}


def test_open_webuis_export_comes_in_with_its_branches(store: ConversationStore) -> None:
    (new,) = bring_in(store, json.dumps([open_webui()]).encode()).new
    assert (new.title, new.model, new.created) == ("Greetings", "llama3", 1700000000.0)
    assert tree(store, new.id) == [
        ("user", "Hi", None, None),
        ("assistant", "Hello", "llama3", 0),
        ("assistant", "Hey", "qwen", 0),
    ]
    assert [message.content for message in store.thread(new.id)] == ["Hi", "Hello"]


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target.getvalue()


def lying(content: bytes) -> bytes:
    """A zip whose member says that it is smaller than it is."""
    packed = bytearray(zipped({"conversations.json": content}))
    place = packed.rindex(b"PK\x01\x02")
    packed[place + 24 : place + 28] = (10).to_bytes(4, "little")
    return bytes(packed)


CYCLE = {"a": node("a", "b", "user", "x"), "b": node("b", "a", "user", "y")}
HEAD = {"format": "modelworks-conversation"}
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is not accepted"),
    "no JSON": (b"\xff\xfe", "is not accepted"),
    "deep": (b"[" * 200_000, "is not accepted"),
    "a number": (b"1" * 5000, "is not accepted"),
    "another's": (b'[{"messages": []}]', "kind or a version that is not known"),
    "a mixture": (json.dumps([chatgpt(), open_webui()]).encode(), "kind or a version that is not known"),
    "newer": (json.dumps(HEAD | {"version": 2}).encode(), "of version 2: version 1 is read"),
    "half": (json.dumps(HEAD | {"version": 1}).encode(), "not whole"),
    "an old chat": (json.dumps([{"chat": {"messages": []}}]).encode(), "version that is not known"),
    "a circle": (json.dumps([chatgpt(), chatgpt(id="z", conversation_id="z", mapping=CYCLE)]).encode(), "no tree"),
    "a bomb": (zipped({"conversations.json": b" " * (8 << 20)}), "swells from"),
    "a liar": (lying(b"[" + b" " * 1000 + b"]"), "no whole zip|is not accepted"),
    "half a zip": (zipped({"conversations.json": b"[]" * 500})[:-30], "no whole zip"),
    "another zip": (zipped({"other.json": b"[]"}), "single conversations.json"),
    "two of them": (zipped({"a/conversations.json": b"[]", "b/conversations.json": b"[]"}), "single"),
    "packed oddly": (zipped({"conversations.json": b"[]"}, zipfile.ZIP_LZMA), "unusual way"),
    "crowded": (zipped({"x" * 60000 + str(number): b"" for number in range(80)}), "too many members"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_export_is_refused_in_one_sentence_and_nothing_is_kept(plain: ConversationStore, kind: str) -> None:
    content, wrong = REFUSED[kind]
    with pytest.raises(InputError, match=wrong) as error:
        bring_in(plain, content)
    assert "\n" not in str(error.value)
    assert plain.conversations() == []


def test_a_file_over_the_limit_is_refused(plain: ConversationStore) -> None:
    with pytest.raises(InputError, match="are the most"):
        bring_in(plain, b" " * (LARGEST + 1))


def test_a_link_shows_the_branch_as_it_was_until_it_is_revoked(store: ConversationStore) -> None:
    chat = branched(store)
    share = store.shares.create(chat)
    store.add(chat, "user", "a secret afterthought", store.thread(chat)[-1].id)
    store.rename(chat, "Another title")
    title, messages = shared(store.database, share.id)
    assert title == POLISH
    assert [(one.role, one.content[:7]) for one in messages] == [("user", POLISH[:7]), ("assistant", "**One**")]
    assert store.shares.all() == [share]
    assert len(share.id) == 32
    store.shares.revoke(share.id)
    assert store.shares.all() == []
    with pytest.raises(InputError, match="revoked"):
        shared(store.database, share.id)
    again = store.shares.create(chat)
    store.delete(chat)
    with pytest.raises(InputError, match="no such link"):
        shared(store.database, again.id)
    with pytest.raises(InputError, match="nothing was said"):
        store.shares.create(store.create("m").id)


def test_a_message_id_that_stands_twice_is_refused_at_once(store: ConversationStore) -> None:
    # Walked through, forty such pairs would be more messages than there is time for.
    content = json.loads(export(store, branched(store), "json")[1])
    content["conversation"]["id"] = "twice"
    first = content["messages"][0]
    pairs = [first | {"id": number, "parent_id": number - 1 or None} for number in range(1, 41) for _ in range(2)]
    with pytest.raises(InputError, match="have one id"):
        bring_in(store, json.dumps(content | {"messages": pairs}).encode())


def test_a_conversation_of_any_length_comes_in_and_is_removed(store: ConversationStore) -> None:
    # SQLite follows no more than a thousand messages from parent to child.
    content = json.loads(export(store, branched(store), "json")[1])
    content["conversation"] |= {"id": "long", "leaf_id": None}
    first = content["messages"][0]
    long = [first | {"id": number, "parent_id": number - 1 or None} for number in range(1, 1501)]
    (new,) = bring_in(store, json.dumps(content | {"messages": long}).encode()).new
    assert len(store.thread(new.id)) == 1500
    store.delete(new.id)
    assert [one.conversation.id for one in store.search("zazolc")] == [one.id for one in store.conversations()]
