"""Conversations from elsewhere: ChatGPT's and Open WebUI's exports, and our own; trees with their branches.

A file is a stranger's: of a zip one member is read, within limits; nothing is kept unless everything can be. What was
imported before is known by its origin, and left as it has become since.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import insert, select, update

from modelworks.assistant import search
from modelworks.assistant.calls import SETTLED, Call
from modelworks.assistant.exports import FORMAT, VERSION
from modelworks.assistant.owned import new_id
from modelworks.assistant.store import LONGEST_TITLE, UNTITLED, ConversationStore, title_of
from modelworks.assistant.tables import ConversationRow, MessageRow, ToolCallRow
from modelworks.assistant.talk import Conversation, conversation_of
from modelworks.spec.errors import InputError
from modelworks.spec.modes import BUILT_IN, REGULAR

LARGEST = 64 << 20
"""Bytes of a file that is imported."""
LARGEST_UNPACKED = 128 << 20
MOST_RATIO = 100
"""Of a zip's member, how many times larger than packed it may be; JSON gets to about 20."""
_MEMBER = "conversations.json"
_LARGEST_DIRECTORY = 4 << 20
_ACCEPTED = "ChatGPT's conversations.json or the zip it is in, Open WebUI's export, or our own JSON"


@dataclass
class _Node:
    """A message as it was found; `parent` is another's name. What is not kept leads on to its children."""

    name: str
    parent: str | None
    role: str = ""
    content: str = ""
    model: str | None = None
    created: float | None = None
    calls: tuple[Call, ...] = ()

    @property
    def kept(self) -> bool:
        return self.role in {"user", "assistant"} and bool(self.content.strip() or self.calls)


@dataclass
class _Talk:
    origin: str
    title: str
    model: str | None
    created: float | None
    updated: float | None
    nodes: list[_Node]
    leaf: str | None
    mode: str = REGULAR
    temperature: float | None = None
    own_id: str | None = None


@dataclass(frozen=True)
class Imported:
    """What an import has done."""

    new: list[Conversation] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    """Titles of those that were there already."""


def bring_in(store: ConversationStore, content: bytes, model: str = "") -> Imported:
    """Import all conversations of a file, or none.

    Parameters
    ----------
    store
        The conversations of whoever imports.
    content
        The file.
    model
        What conversations go on with that name no model.

    Raises
    ------
    InputError
        Naming what the file is not, or what of it is too large.
    """
    # What takes long is done before the transaction, in which everybody else waits.
    prepared = [(talk, _in_order(talk)) for talk in _talks(_json_of(content))]
    words = [[search.indexed(node.content) for node, _ in ordered] for _, ordered in prepared]
    report, seen = Imported(), set[str]()
    with store.database.write() as session:
        for (talk, ordered), indexed in zip(prepared, words, strict=True):
            same = select(ConversationRow).where(ConversationRow.origin == talk.origin)
            if talk.own_id is not None:
                same = select(ConversationRow).where(
                    (ConversationRow.origin == talk.origin) | (ConversationRow.id == talk.own_id)
                )
            if store.owner is not None:
                same = same.where(ConversationRow.user_id == store.owner)
            there = session.scalars(same.limit(1)).first()
            if there is not None or talk.origin in seen:
                report.known.append(there.title if there is not None else talk.title)
                continue
            seen.add(talk.origin)
            now = store.now()
            created = _time(talk.created) or now
            row = ConversationRow(
                id=new_id(),
                user_id=store.owner,
                title=talk.title or title_of(ordered[0][0].content if ordered else UNTITLED),
                model=talk.model or next((node.model for node, _ in reversed(ordered) if node.model), None) or model,
                created=created,
                updated=_time(talk.updated) or created,
                mode=talk.mode,
                temperature=talk.temperature,
                pinned=False,
                title_by="person" if talk.title else "line",
                origin=talk.origin,
            )
            session.add(row)
            session.flush()
            ids = _add(session, row, ordered, indexed)
            row.leaf_id = _leaf(talk, ordered, ids)
            report.new.append(conversation_of(row))
    return report


def _add(session: Any, row: ConversationRow, ordered: list[tuple[_Node, int | None]], words: list[str]) -> list[int]:
    """Add the messages; their ids, which grow in the order that parents come before children."""
    if not ordered:
        return []
    values = []
    for node, _ in ordered:
        at = _time(node.created) or row.created
        values.append(
            {
                "conversation_id": row.id,
                "role": node.role,
                "content": node.content,
                "model": node.model if node.role == "assistant" else None,
                "state": "complete",
                "created": at,
                "updated": at,
            }
        )
    inserted = insert(MessageRow).returning(MessageRow.id, sort_by_parameter_order=True)
    ids = list(session.scalars(inserted, values))
    linked = [{"id": ids[at], "parent_id": ids[up]} for at, (_, up) in enumerate(ordered) if up is not None]
    if linked:
        session.execute(update(MessageRow), linked)
    for (node, _), message_id in zip(ordered, ids, strict=True):
        session.add_all(ToolCallRow(message_id=message_id, **vars(call)) for call in node.calls)
    search.index_new(session, zip(ids, words, strict=True))
    return ids


def _in_order(talk: _Talk) -> list[tuple[_Node, int | None]]:
    """The nodes that are kept, parents first, each with the place of the one before it."""
    children: dict[str | None, list[_Node]] = {}
    names = {node.name for node in talk.nodes}
    if len(names) != len(talk.nodes):
        raise InputError(f"two messages of {talk.title[:60]!r} have one id: each needs its own")
    for node in talk.nodes:
        children.setdefault(node.parent if node.parent in names else None, []).append(node)
    kept: list[tuple[_Node, int | None]] = []
    waiting: list[tuple[_Node, int | None]] = [(node, None) for node in reversed(children.get(None, []))]
    visited = 0
    while waiting:
        node, up = waiting.pop()
        visited += 1
        if node.kept:
            kept.append((node, up))
            up = len(kept) - 1
        waiting += [(child, up) for child in reversed(children.get(node.name, []))]
    if visited != len(talk.nodes):
        raise InputError(f"the messages of {talk.title[:60]!r} are no tree: one of them comes before itself")
    return kept


def _leaf(talk: _Talk, ordered: list[tuple[_Node, int | None]], ids: list[int]) -> int | None:
    """The last message of the branch that was shown; else the last of all."""
    places = {node.name: at for at, (node, _) in enumerate(ordered)}
    parents = {node.name: node.parent for node in talk.nodes}
    name = talk.leaf
    while name is not None and name not in places:
        name = parents.get(name)
    return ids[places[name]] if name is not None else (ids[-1] if ids else None)


def _json_of(content: bytes) -> Any:
    if len(content) > LARGEST:
        raise InputError(f"the file has {len(content):,} bytes: {LARGEST:,} are the most")
    if content[:4] == b"PK\x03\x04":
        content = _member(content)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"the file is not accepted: {_ACCEPTED} is") from None


def _member(content: bytes) -> bytes:
    """The one member of a zip that is read."""
    end = content.rfind(b"PK\x05\x06")
    directory = struct.unpack_from("<I", content, end + 12)[0] if 0 <= end <= len(content) - 22 else 0
    # The directory is read as a whole, and one for more than 4 GB is nothing that fits into the limit.
    if directory > _LARGEST_DIRECTORY or content[max(end - 20, 0) : end][:4] == b"PK\x06\x07":
        raise InputError("the zip is not accepted: it has too many members")
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            found = [one for one in archive.infolist() if PurePosixPath(one.filename).name == _MEMBER]
            if len(found) != 1:
                raise InputError(f"the zip is not accepted: one with a single {_MEMBER} is")
            one = found[0]
            if one.file_size > LARGEST_UNPACKED or one.file_size > MOST_RATIO * max(one.compress_size, 1):
                raise InputError(
                    f"{_MEMBER} swells from {one.compress_size:,} to {one.file_size:,} bytes: "
                    f"{MOST_RATIO} times as much and {LARGEST_UNPACKED:,} bytes are the most"
                )
            if one.flag_bits & 1 or one.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise InputError(f"{_MEMBER} is encrypted or packed in an unusual way, which is not accepted")
            with archive.open(one) as member:
                return member.read(one.file_size)  # no more than it has said, whatever is in it
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, struct.error):
        raise InputError("the file is no whole zip") from None


def _talks(found: Any) -> list[_Talk]:
    if isinstance(found, dict) and found.get("format") == FORMAT:
        if found.get("version") != VERSION:
            raise InputError(
                f"the export is of version {str(found.get('version'))[:20]}: version {VERSION} is read; "
                "a newer Modelworks may read it"
            )
        return [_ours(found)]
    listed = [found] if isinstance(found, dict) else found
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise InputError(f"the file is not accepted: {_ACCEPTED} is")
    if all(isinstance(one.get("mapping"), dict) for one in listed):
        return [_chatgpt(one) for one in listed]
    if all(isinstance(one.get("chat"), dict) for one in listed):
        return [_open_webui(one) for one in listed]
    raise InputError(f"the file is of a kind or a version that is not known: {_ACCEPTED} is")


def _ours(found: dict[str, Any]) -> _Talk:
    head, messages = found.get("conversation"), found.get("messages")
    if not isinstance(head, dict) or not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError("the export is not whole: it lacks its conversation or its messages")
    nodes = [
        _Node(
            name=str(one.get("id")),
            parent=None if one.get("parent_id") is None else str(one["parent_id"]),
            role=_text(one.get("role")),
            content=_text(one.get("content")),
            model=_text(one.get("model")) or None,
            created=_time(one.get("created")),
            calls=_calls(one.get("calls"), _text(one.get("content"))) if one.get("role") == "assistant" else (),
        )
        for one in messages
    ]
    own_id, temperature = _text(head.get("id"))[:32], _number(head.get("temperature"))
    return _Talk(
        origin=f"modelworks:{own_id or new_id()}",
        title=_title(head.get("title")),
        model=_text(head.get("model"))[:256] or None,
        created=_time(head.get("created")),
        updated=_time(head.get("updated")),
        nodes=nodes,
        leaf=None if head.get("leaf_id") is None else str(head["leaf_id"]),
        mode=head["mode"] if head.get("mode") in list(BUILT_IN) else REGULAR,
        temperature=temperature if temperature is not None and 0 <= temperature <= 2 else None,
        own_id=own_id,
    )


def _calls(found: Any, content: str) -> tuple[Call, ...]:
    """The calls of an answer, all of them settled: nothing that a file says is to be called."""
    calls = []
    for number, one in enumerate(map(_dict, _list(found))):
        position = min(max(int(_number(one.get("position")) or 0), 0), len(content))
        states = [state for state in SETTLED if state == one.get("state")]
        call_id, name, arguments = (_text(one.get(key)) for key in ("call_id", "name", "arguments"))
        state = states[0] if states else "stopped"
        result, seconds = _text(one.get("result")), _number(one.get("seconds"))
        calls.append(Call(number, position, call_id, name, arguments, state, result, seconds))
    return tuple(calls)


def _chatgpt(found: dict[str, Any]) -> _Talk:
    nodes = []
    for name, given in found["mapping"].items():
        given = given if isinstance(given, dict) else {}
        parent = given.get("parent")
        node = _Node(str(name), str(parent) if parent is not None else None)
        message = given.get("message")
        if isinstance(message, dict):
            about = _dict(message.get("metadata"))
            content = _dict(message.get("content"))
            to_all = message.get("recipient") in {None, "all"}  # what goes to a tool isn't said to the reader
            if to_all and not about.get("is_visually_hidden_from_conversation"):
                node.role = _text(_dict(message.get("author")).get("role"))
                parts = content.get("parts") if content.get("content_type") in {"text", "multimodal_text"} else None
                node.content = "\n\n".join(_text(part) for part in _list(parts) if isinstance(part, str))
            node.model = _text(about.get("model_slug"))[:256] or None
            node.created = _time(message.get("create_time"))
        nodes.append(node)
    return _Talk(
        origin=_origin("chatgpt", found.get("conversation_id") or found.get("id"), found),
        title=_title(found.get("title")),
        model=_text(found.get("default_model_slug"))[:256] or None,
        created=_time(found.get("create_time")),
        updated=_time(found.get("update_time")),
        nodes=nodes,
        leaf=_text(found.get("current_node")) or None,
    )


def _open_webui(found: dict[str, Any]) -> _Talk:
    chat = found["chat"]
    history = _dict(chat.get("history"))
    messages = history.get("messages")
    if not isinstance(messages, dict):
        raise InputError("an Open WebUI chat without chat.history.messages is of a version that is not known")
    nodes = [
        _Node(
            name=str(name),
            parent=None if given.get("parentId") is None else str(given["parentId"]),
            role=_text(given.get("role")),
            content=_text(given.get("content")),
            model=_text(given.get("model"))[:256] or None,
            created=_time(given.get("timestamp")),
        )
        for name, given in ((name, _dict(given)) for name, given in messages.items())
    ]
    models = [_text(one) for one in _list(chat.get("models")) if isinstance(one, str)]
    return _Talk(
        origin=_origin("open-webui", found.get("id") or chat.get("id"), found),
        title=_title(found.get("title") or chat.get("title")),
        model=(models[0][:256] if models else "") or None,
        created=_time(found.get("created_at") or chat.get("timestamp")),
        updated=_time(found.get("updated_at")),
        nodes=nodes,
        leaf=_text(history.get("currentId")) or None,
    )


def _origin(kind: str, name: Any, found: dict[str, Any]) -> str:
    """What the conversation is elsewhere; where it has no name there, a checksum of it."""
    known = _text(name)[:200] or f"{zlib.crc32(json.dumps(found, sort_keys=True).encode()):08x}"
    return f"{kind}:{known}"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    """A text that every database takes: without NUL, and without halves of characters."""
    if not isinstance(value, str):
        return ""
    return value.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _title(value: Any) -> str:
    return " ".join(_text(value).split())[:LONGEST_TITLE]


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e20
    return float(value) if good and math.isfinite(value) else None


def _time(value: Any) -> float | None:
    """Seconds since 1970; some write milliseconds, others nanoseconds."""
    seconds = _number(value)
    while seconds is not None and seconds > 1e11:
        seconds /= 1000
    return seconds if seconds is not None and seconds > 0 else None
