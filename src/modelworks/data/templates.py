"""Chat templates: a dialogue as the text that the model reads, and which parts of it are answers.

A template is a program in Jinja that comes with a model, so it is somebody else's. It runs in a process of its own, in
Jinja's sandbox, with a limit on its memory, its time and what it writes; what it does wrong is said in one sentence.

What is an answer follows from what the template writes: the dialogue up to an answer with the opening of the next one,
and the dialogue with that answer. What the second has more than the first is the answer, the mark of its end included.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modelworks.spec.chatml import CHATML
from modelworks.spec.errors import InputError, OperationError

Message = Mapping[str, str]
LIMIT_S = 5.0
"""Seconds of processor time that writing one dialogue out may take."""
_PATIENCE_S = 300.0
"""After so long without an answer the process is ended, whatever it does."""
_MEMORY_BYTES = 1 << 30
_LONGEST = 4_000_000
"""Characters that a dialogue may become."""


class Part(NamedTuple):
    """A part of a dialogue as text."""

    text: str
    answer: bool
    """Whether the model is to write it."""


class TemplateRefusal(Exception):  # noqa: N818 - what a template says of one dialogue
    """A dialogue that a template doesn't write out, and why."""


def find_template(given: str, tokenizer: Path | None) -> tuple[str, dict[str, str]]:
    """The template that a data section names, and the special tokens that it may use by name.

    Parameters
    ----------
    given
        ``auto``, or a path.
    tokenizer
        The ``tokenizer.json`` beside which a model keeps its own template; None for a tokenizer of ours.

    Raises
    ------
    InputError
        If the file can't be read.
    """
    config: dict[str, Any] = {}
    if tokenizer is not None:
        try:
            config = json.loads((tokenizer.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = {}
    names = {name: _piece(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if given != "auto":
        try:
            return Path(given).expanduser().read_text(encoding="utf-8"), names
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it isn't UTF-8 text"
            raise InputError(f"data.chat_template = {given!r} cannot be read: {reason}") from None
    beside = None if tokenizer is None else tokenizer.parent / "chat_template.jinja"
    if beside is not None and beside.is_file():
        return beside.read_text(encoding="utf-8"), names
    own = config.get("chat_template")
    if isinstance(own, list):  # several by name
        own = next((one.get("template") for one in own if one.get("name") == "default"), None)
    return (own if isinstance(own, str) else CHATML), names


class TemplateProcess:
    """A template at work; a context manager.

    Parameters
    ----------
    source
        The template.
    names
        Special tokens by the names that templates use for them.

    Raises
    ------
    InputError
        If it is no template.
    """

    def __init__(self, source: str, names: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM.format(path=[str(Path(__file__).parents[2])])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", "")},
        )
        try:
            refused = self._ask({"source": source, "names": dict(names or {})})
            if refused is not None:
                raise InputError(f"data.chat_template is not accepted: {refused}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """A dialogue's parts, in order.

        Raises
        ------
        TemplateRefusal
            If the template doesn't take this dialogue.
        InputError
            If it doesn't end, or takes too much memory.
        """
        answer = self._ask({"messages": list(messages)})
        if isinstance(answer, str):
            raise TemplateRefusal(answer)
        return [Part(text, learnt) for text, learnt in answer]

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(_PATIENCE_S, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line:
            raise OperationError("the process that writes dialogues out has ended; is there memory left?")
        answer = json.loads(line)
        if "endless" in answer:
            raise InputError(
                f"data.chat_template is not accepted: {answer['endless']}; one that writes a dialogue out in "
                f"{LIMIT_S:g} s and {_LONGEST:,} characters is"
            )
        return answer["answer"]


def _piece(given: Any) -> str:
    """A special token, which a tokenizer's config names plainly or with its properties."""
    text = given.get("content") if isinstance(given, dict) else given
    return text if isinstance(text, str) else ""


# --- in the process of its own ----------------------------------------------------------------------------------------

_PROGRAM = "import sys; sys.path[:0] = {path!r}; from modelworks.data.templates import work; work()"


class _Endless(BaseException):
    """The time is up; no template's own error handling stands in its way."""


def work() -> None:
    """Answer questions, a line of JSON each, until there are no more."""
    import resource

    from jinja2 import TemplateError

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGVTALRM, _time_is_up)
    render: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
        try:
            if "source" in question:
                render, answer = _compiled(question["source"], question["names"]), None
            else:
                answer = _parts(render, question["messages"])
            reply: dict[str, Any] = {"answer": answer}
        except _Endless:
            reply = {"endless": "it doesn't end"}
        except _TooMuch as error:
            reply = {"endless": str(error)}
        except MemoryError:
            reply = {"endless": f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"}
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            reply = {"answer": f"the chat template says: {str(error).splitlines()[0][:200] if str(error) else error!r}"}
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


class _TooMuch(Exception):  # noqa: N818
    """A template writes without end."""


def _time_is_up(*_: object) -> None:
    raise _Endless


def _compiled(source: str, names: Mapping[str, str]) -> Any:
    """The template as a function of messages and of whether the next answer is opened."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # As Hugging Face sets it up, which is what templates are written for.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.fromtimestamp(0).strftime(form)  # noqa: DTZ006
    template = environment.from_string(source)

    def render(messages: Sequence[Message], opened: bool) -> str:
        written, size = [], 0
        for piece in template.generate(messages=messages, add_generation_prompt=opened, tools=None, **names):
            written.append(piece)
            size += len(piece)
            if size > _LONGEST:
                raise _TooMuch(f"it writes more than {_LONGEST:,} characters")
        return "".join(written)

    return render


def _parts(render: Any, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    parts: list[tuple[str, bool]] = []
    done = ""
    for place, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        opened, whole = render(messages[: place - 1], True), render(messages[:place], False)
        # A template may open an answer with what it leaves out of one that is there, such as an empty thought.
        begin = next(
            (at for at, pair in enumerate(zip(opened, whole, strict=False)) if pair[0] != pair[1]), len(opened)
        )
        if not whole.startswith(done) or begin < len(done) or begin >= len(whole):
            raise ValueError(f"message {place} changes what is written of those before it")
        parts += [(whole[len(done) : begin], False), (whole[begin:], True)]
        done = whole
    return parts
