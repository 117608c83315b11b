"""Starts the process that reads a document, listens to it, and ends it if it takes too long or nobody waits for it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelworks.assistant.documents.blocks import Block
from modelworks.assistant.documents.limits import COMPUTING_S, WALL_S
from modelworks.spec.errors import InputError

_READER = "modelworks.assistant.documents.reader"
_LONGEST_LINE = 64 << 20
_PASSED_ON = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""Of this process's environment: what Python needs, and nothing that is secret."""


@dataclass
class Contents:
    """What was in a document."""

    kind: str = ""
    blocks: list[Block] = field(default_factory=list)
    picture: bytes | None = None
    remarks: list[str] = field(default_factory=list)


async def read(
    path: Path, name: str, progress: Callable[[int, int], None] | None = None, wall_s: float = WALL_S
) -> Contents:
    """Read a document in a process of its own. Cancelling this ends that process.

    Parameters
    ----------
    path
        Where the file is.
    name
        What its owner calls it.
    progress
        Told how many of how many parts are done.
    wall_s
        Seconds that it may take.

    Raises
    ------
    InputError
        If it can't be read, with the reason in one sentence.
    """
    try:
        async with asyncio.timeout(wall_s), confined(_READER, str(path), name) as process:
            return await _listen(process, name, progress or (lambda done, total: None))
    except TimeoutError:
        raise InputError(f"reading {name} took more than {wall_s:,.0f} seconds") from None


@asynccontextmanager
async def confined(module: str, *words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A module's process, which confines itself and says lines; it ends with the block.

    Parameters
    ----------
    module
        Run as ``python -m``.
    words
        Its arguments.
    """
    environment = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    # The threads of libraries only contend for a processor that others want as well.
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": "/nonexistent"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
        limit=_LONGEST_LINE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _listen(process: asyncio.subprocess.Process, name: str, progress: Callable[[int, int], None]) -> Contents:
    contents = Contents()
    assert process.stdout is not None
    async for line in process.stdout:
        said: dict[str, Any] = json.loads(line)
        if "text" in said:
            contents.blocks.append(Block(said["text"], said["place"], said["heading"]))
        elif "done" in said:
            progress(said["done"], said["total"])
        elif "picture" in said:
            contents.picture = base64.b64decode(said["picture"])
        elif "remark" in said:
            contents.remarks.append(said["remark"])
        elif "kind" in said:
            contents.kind = said["kind"]
        elif "error" in said:
            raise InputError(said["error"])
        else:
            return contents
    if await process.wait() == -signal.SIGXCPU:
        raise InputError(f"reading {name} took more than {COMPUTING_S} seconds of computing")
    raise InputError(f"{name} can't be read: it is damaged, or too much for the memory that reading may take")
