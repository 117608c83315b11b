"""Takes server-sent events apart: bytes in as the network cuts them, whole events out as they were sent.

Only what an OpenAI-compatible engine sends is understood: events of one ``data:`` line each, and comments, which are
left out. What is inside an event is not looked at.
"""

from __future__ import annotations

from modelworks.spec.errors import OperationError

LONGEST = 4 << 20
"""Bytes of one event, at most."""


class Events:
    """The events of one stream. `ended` is true once the engine has said that it has said everything."""

    def __init__(self) -> None:
        self._rest = b""
        self.ended = False

    def take(self, block: bytes) -> list[str]:
        """The data of the events that are whole now.

        Raises
        ------
        OperationError
            If an event is longer than `LONGEST`, or isn't UTF-8.
        """
        text = self._rest + block if self._rest else block
        cut = text.rfind(b"\n") + 1
        self._rest = text[cut:]
        if len(self._rest) > LONGEST:
            raise OperationError(f"an event is longer than {LONGEST:,} bytes")
        found = []
        try:
            for line in text[:cut].split(b"\n"):
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        self.ended = True
                    elif data:
                        found.append(data.decode())
        except UnicodeDecodeError:
            raise OperationError("an event is not UTF-8 text") from None
        return found
