"""A chat in the terminal: the answer streams, Ctrl-C stops it (not the program), the conversation goes on.

What was typed is remembered across sessions by the line editor; what was said is kept in the conversation until
`/reset` or the end, and `/save` writes it down.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

from rich.console import Console

from modelworks.serve.engine import Engine, Message
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import home, write_atomically

_HELP = """/help          this list
/reset         forget the conversation
/model [NAME]  go on with another model, or list them
/save FILE     write the conversation as JSON
/exit          leave (so does Ctrl-D); Ctrl-C stops an answer"""
_LONGEST_HISTORY = 1000


class Conversation:
    """One conversation with one engine."""

    def __init__(self, engine: Engine, model: str, system: str | None, console: Console) -> None:
        self._engine = engine
        self._console = console
        self.model = model
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._said: list[Message] = []

    async def answer(self, text: str) -> None:
        """Print the answer to a message as it comes. A stopped answer stays in the conversation as far as it came."""
        self._said.append({"role": "user", "content": text})
        parts: list[str] = []
        try:
            async for part in self._parts():
                parts.append(part)
                self._console.print(part, end="", markup=False, highlight=False, soft_wrap=True)
        except (InputError, OperationError):
            self._said.pop()
            raise
        self._console.print()
        self._said.append({"role": "assistant", "content": "".join(parts)})

    async def _parts(self) -> AsyncIterator[str]:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, stopped.set)
        waiting = asyncio.ensure_future(stopped.wait())
        try:
            async with aclosing(self._engine.chat(self.model, [*self._system, *self._said])) as answer:
                while not stopped.is_set():
                    coming = asyncio.ensure_future(anext(answer, None))
                    await asyncio.wait({coming, waiting}, return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        coming.cancel()
                        await asyncio.wait({coming})
                        return
                    delta = coming.result()
                    if delta is None:
                        return
                    yield delta.text
        finally:
            waiting.cancel()
            loop.remove_signal_handler(signal.SIGINT)

    async def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; false ends the conversation."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self._said.clear()
                self._console.print("The conversation is forgotten.")
            case "/model":
                await self._change_model(rest)
            case "/save":
                self._save(rest)
            case "/help":
                self._console.print(_HELP, markup=False, highlight=False)
            case _:
                self._console.print(f"There is no {word}; /help lists what there is.", markup=False, highlight=False)
        return True

    async def _change_model(self, name: str) -> None:
        names = [card.name for card in await self._engine.models()]
        if name in names:
            self.model = name
        elif name:
            self._console.print(f"There is no model {name}.", markup=False, highlight=False)
        listed = ", ".join(f"{one} (now)" if one == self.model else one for one in names)
        self._console.print(listed, markup=False, highlight=False)

    def _save(self, name: str) -> None:
        if not name:
            self._console.print("/save needs a file's name.", markup=False)
            return
        content = {"model": self.model, "messages": [*self._system, *self._said]}
        try:
            write_atomically(
                Path(name).expanduser().absolute(), json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            )
        except OSError as error:
            self._console.print(f"{name} can't be written: {error.strerror}", markup=False, highlight=False)
        else:
            self._console.print(f"Saved to {name}.", markup=False, highlight=False, soft_wrap=True)


async def converse(engine: Engine, model: str, system: str | None, messages: list[str], console: Console) -> None:
    """Answer the given messages one after the other, or, if there are none, whatever is typed until the end."""
    conversation = Conversation(engine, model, system, console)
    try:
        await engine.load(model)
        for message in messages:
            await conversation.answer(message)
        if not messages:
            console.print(f"Chat with {model}. /help lists commands, Ctrl-D leaves.", markup=False, highlight=False)
            await _typed(conversation, console)
    finally:
        await engine.close()


async def _typed(conversation: Conversation, console: Console) -> None:
    # asyncio's own handler would cancel the conversation, and leave the line where it is.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with _line_history():
        while True:
            try:
                with _ctrl_c_typed():
                    line = input("> ").strip()
                if line.startswith("/"):
                    if not await conversation.command(line):
                        return
                elif line:
                    await conversation.answer(line)
            except EOFError:
                console.print()
                return
            except KeyboardInterrupt:  # pressed once more while an answer is being stopped
                console.print()
            except (InputError, OperationError) as error:
                console.print(_advised(error), style="red", markup=False, highlight=False)


def _advised(error: InputError | OperationError) -> str:
    """What went wrong; and the way out of a conversation that has grown too long."""
    too_long = isinstance(error, RequestError) and error.code == "context_length_exceeded"
    return f"{error}; /reset begins anew" if too_long else str(error)


@contextlib.contextmanager
def _ctrl_c_typed() -> Iterator[None]:
    """Ctrl-C is a key like others, which clears the line. As a signal, one that came between the prompt and the wait
    for a key would be forgotten: Python looks for signals only when they interrupt that wait."""
    import readline

    if not os.isatty(0) or "libedit" in (readline.__doc__ or ""):  # whose keys are bound in other words
        yield
        return
    readline.parse_and_bind(r'"\C-c": "\C-e\C-u\C-m"')
    found = termios.tcgetattr(0)
    *others, characters = found
    characters = [*characters]
    characters[termios.VINTR] = bytes([os.fpathconf(0, "PC_VDISABLE")])
    termios.tcsetattr(0, termios.TCSANOW, [*others, characters])
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSANOW, found)


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Lines typed in earlier sessions, to be called up with the arrow keys."""
    import readline

    file = home() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(_LONGEST_HISTORY)
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
