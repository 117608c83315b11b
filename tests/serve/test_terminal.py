"""The chat in a terminal, typed into a real one (a pseudo-terminal) and answered by SmolLM2."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelworks.serve.store import Store

pytestmark = pytest.mark.slow
PROMPT = "\n> "


class Terminal:
    """`modelworks chat` with a person at the keyboard."""

    def __init__(self, home: Path, *options: str) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "MODELWORKS_HOME": str(home), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelworks", "chat", *options],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, pattern: str, seconds: float = 60) -> str:
        """What comes up to a pattern; it is taken off the screen."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.screen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self._master, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # its other end is closed
                    raise AssertionError(f"it ended, without {pattern!r} in {self.screen!r}") from None
        seen, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return seen

    def settle(self) -> None:
        """Wait until nothing more comes, as a person does: what is typed while Ctrl-C is at work is cleared with it."""
        while select.select([self._master], [], [], 0.5)[0]:
            self.screen += os.read(self._master, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
        self.screen = ""

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        os.close(self._master)


def _own_terminal() -> None:
    """Make the pseudo-terminal the process's own, so that Ctrl-C reaches it, however the tests were begun."""
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def home(tmp_path: Path, store: Store) -> Path:
    (tmp_path / "models").symlink_to(store.folder)
    return tmp_path


@pytest.fixture
def terminal(home: Path) -> Iterator[Terminal]:
    terminal = Terminal(home, "--context", "512")
    terminal.read_until(r"/help lists commands, Ctrl-D leaves\.\n> ")
    yield terminal
    terminal.end()


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on_with_what_was_said(
    terminal: Terminal, home: Path
) -> None:
    terminal.type("Tell me a very long story about a fox.\n")
    terminal.read_until(r"fox\.\n(.|\n){60}")
    terminal.type("\x03")
    terminal.read_until(PROMPT)
    assert terminal.process.poll() is None
    terminal.settle()
    terminal.type("\x03")  # at the prompt it clears the line and no more
    terminal.read_until(PROMPT)
    terminal.settle()
    terminal.type(f"/save {home}/said.json\n")
    terminal.read_until(r"Saved to .*\n> ")
    told, question, answer = json.loads((home / "said.json").read_text())["messages"]
    assert told["role"] == "system"
    assert question == {"role": "user", "content": "Tell me a very long story about a fox."}
    assert answer["role"] == "assistant"
    assert len(answer["content"]) >= 40


def test_a_conversation_longer_than_the_context_is_refused_and_reset_begins_anew(terminal: Terminal) -> None:
    terminal.type("What is this? " + "word " * 700 + "\n")
    terminal.read_until(r"maximum context length is 512 tokens [^;]*; /reset begins\s+anew\n> ")
    terminal.type("/reset\n")
    terminal.read_until(r"The conversation is forgotten\.\n> ")
    terminal.type("Name one animal.\n")
    assert len(terminal.read_until(PROMPT).split("Name one animal.\n")[1].strip()) > 3


def test_the_commands_answer_and_what_was_typed_comes_back_in_the_next_session(terminal: Terminal, home: Path) -> None:
    terminal.type("/help\n")
    assert "/save FILE" in terminal.read_until(PROMPT)
    terminal.type("/model\n")
    terminal.read_until(r"smollm2-135m \(now\)\n> ")
    terminal.type("/model other\n")
    terminal.read_until(r"There is no model other\.\n")
    terminal.read_until(PROMPT)
    terminal.type("/sing\n")
    terminal.read_until(r"There is no /sing; /help lists what there is\.\n> ")
    terminal.type("\x04")
    terminal.process.wait(30)
    assert terminal.process.returncode == 0
    again = Terminal(home)
    again.read_until("> ")
    again.type("\x10")  # Ctrl-P, as the arrow up
    again.read_until("/sing")
    again.type("\x15/exit\n")
    again.process.wait(30)
    assert again.process.returncode == 0
    again.end()


def test_sigterm_ends_the_chat(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(30) == -signal.SIGTERM


def test_ctrl_c_at_the_prompt_clears_the_line_however_soon_it_comes_and_the_chat_goes_on(terminal: Terminal) -> None:
    for _ in range(50):
        terminal.type("half a question\x03")
        terminal.read_until(PROMPT)
    terminal.type("Name one animal.\n")
    assert len(terminal.read_until(PROMPT).split("Name one animal.\n")[1].strip()) > 3


def test_ctrl_c_while_the_model_loads_ends_without_a_traceback(home: Path) -> None:
    terminal = Terminal(home)
    time.sleep(1.5)
    terminal.type("\x03")
    # A fast machine stands at its prompt by then, where Ctrl-C clears the line and no more.
    deadline = time.monotonic() + 120
    while terminal.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            terminal.type("/exit\n")  # more than once: what is typed while Ctrl-C is handled is dropped
        time.sleep(1)
    terminal.process.wait(10)
    said = os.read(terminal._master, 1 << 16).decode(errors="replace")
    terminal.end()
    assert "Traceback" not in said
    assert terminal.process.returncode in (0, 1, 130)
