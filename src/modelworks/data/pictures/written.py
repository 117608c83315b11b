"""Pictures in a folder, as programs that train on conversations read them.

::

    OUT/
      pictures.json            what it was made of
      pictures.jsonl           a conversation a line: id, kind, about (of each question), messages
      images/000000/0000000.png ...

It is written beside its place and renamed when whole; a stopped call goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelworks.data.pictures.drawing import Picture
from modelworks.data.pictures.kinds import KINDS, picture
from modelworks.data.pictures.looks import Split
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import write_atomically

MANIFEST, LINES = "pictures.json", "pictures.jsonl"
_FORMAT = 1
_FOLDER = 1000
"""Pictures in a folder of images."""


def write_pictures(
    out: Path,
    count: int,
    seed: int = 0,
    split: Split = "train",
    kinds: tuple[str, ...] = KINDS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the pictures 0 to `count` - 1 with their questions into a new folder.

    Parameters
    ----------
    out
        The folder; until it is whole, it is ``OUT.part``, and the same call goes on with that.
    count, seed, split, kinds
        Which pictures; see `picture`.
    progress
        Told pictures written, and of how many.

    Returns
    -------
    dict
        What stands in ``pictures.json``: ``format``, ``count``, ``seed``, ``split``, ``kinds``, ``questions``.

    Raises
    ------
    InputError
        If the folder exists, the count is not positive, or what is begun there was begun with other words.
    OperationError
        If it can't be written.
    """
    if count < 1:
        raise InputError(f"--count {count} is not accepted: 1 or more are")
    if seed < 0:
        raise InputError(f"--seed {seed} is not accepted: 0 or more are")
    if out.exists():
        raise InputError(f"{out} exists: a folder that doesn't is accepted")
    head = {"format": _FORMAT, "count": count, "seed": seed, "split": split, "kinds": list(kinds)}
    part = out.with_name(f"{out.name}.part")
    try:
        done, questions = _begin(part, head)
        with (part / LINES).open("a", encoding="utf-8") as lines:
            for index in range(done, count):
                shown = picture(index, seed, split, kinds)
                name = f"images/{index // _FOLDER:06}/{index:07}.png"
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shown.image.save(part / name)
                lines.write(json.dumps(_conversation(index, name, shown)) + "\n")
                questions += len(shown.questions)
                if progress is not None:
                    progress(index + 1, count)
        written = head | {"questions": questions}
        write_atomically(part / MANIFEST, json.dumps(written, indent=1) + "\n")
        part.rename(out)
    except OSError as error:
        raise OperationError(f"{out} cannot be written: {error.strerror or error}") from None
    return written


def _begin(part: Path, head: dict[str, Any]) -> tuple[int, int]:
    """Pictures and questions that an earlier call wrote; half a line is taken away."""
    if not part.exists():
        part.mkdir(parents=True)
        write_atomically(part / MANIFEST, json.dumps(head, indent=1) + "\n")
        return 0, 0
    begun = json.loads((part / MANIFEST).read_text(encoding="utf-8")) if (part / MANIFEST).is_file() else None
    if begun is None or {key: begun.get(key) for key in head} != head:
        raise InputError(f"{part} was begun with other words: remove it, or give the same")
    text = (part / LINES).read_text(encoding="utf-8") if (part / LINES).is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomically(part / LINES, whole)
    lines = whole.splitlines()
    return len(lines), sum(len(json.loads(line)["about"]) for line in lines)


def _conversation(index: int, name: str, shown: Picture) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for question in shown.questions:
        asked: list[dict[str, str]] = [{"type": "text", "text": question.text}]
        if not messages:
            asked.insert(0, {"type": "image", "image": name})
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": question.answer}]
    return {
        "id": index,
        "kind": shown.kind,
        "about": [question.about for question in shown.questions],
        "messages": messages,
    }
