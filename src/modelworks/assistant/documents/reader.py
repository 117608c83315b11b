"""The process in which a document is read: ``python -m modelworks.assistant.documents.reader PATH NAME``.

A document is what a stranger made, and the libraries that read it are large. So it is read here, where memory and
time have limits and a crash ends nothing but the reading. What it finds are lines of JSON on standard output:
``{"kind"}``, ``{"done", "total"}``, ``{"text", "place", "heading"}``, ``{"picture"}``, ``{"remark"}``, and last
``{"end": true}`` or ``{"error"}``.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

from modelworks.assistant.documents.blocks import Block, Picture, Progress
from modelworks.assistant.documents.images import image
from modelworks.assistant.documents.kinds import kind_of
from modelworks.assistant.documents.limits import MEMORY, confine
from modelworks.assistant.documents.parsers import PARSERS
from modelworks.spec.errors import InputError

MOST_CHARACTERS = 20_000_000
"""Of a document's text."""


def main(path: Path, name: str) -> None:
    """Read a document and print what is in it."""
    os.nice(5)  # who talks to a model goes first
    confine()
    try:
        kind = kind_of(path, name)
        _say(kind=kind)
        _read(kind, path, name)
    except InputError as error:
        _say(error=str(error))
    except MemoryError:
        _say(error=f"{name} takes more than {MEMORY >> 30} GiB of memory to read")
    except Exception as error:  # noqa: BLE001 (what a library makes of a damaged file can be anything)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        _say(error=f"{name} is damaged, or not what it seems to be")
    else:
        _say(end=True)


def _read(kind: str, path: Path, name: str) -> None:
    characters, pictures, remark = 0, 0, ""
    for part in (PARSERS | {"image": image})[kind](path, name):
        if isinstance(part, Block):
            characters += len(part.text)
            if characters > MOST_CHARACTERS:
                raise InputError(f"{name} holds more than {MOST_CHARACTERS:,} characters of text")
            _say(text=_plain(part.text), place=_plain(part.place), heading=_plain(part.heading))
        elif isinstance(part, Progress):
            _say(done=part.done, total=part.total)
        elif isinstance(part, Picture):
            pictures += 1
            _say(picture=base64.b64encode(part.content).decode())
        else:
            remark = part.text
            _say(remark=remark)
    if not characters and not pictures:
        raise InputError(f"there is no text in {name}{': ' if remark else ''}{remark}")


def _plain(text: str) -> str:
    """Without what a database doesn't take (NUL, halves of surrogate pairs)."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
