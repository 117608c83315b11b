"""The flow of one answer: the question is stored, the engine is asked, and what it says is stored while it says it.

An answer belongs to the server and not to the page that asked for it: it goes on when the page is closed, and any page
can watch it (`Assistant.running`, `Assistant.follow`). Twice a second what has come so far goes to the database, so
that after a crash the conversation stands as it was at most half a second before; and an answer that was cut short can
be taken up where it stands (`Assistant.resume`): the engine is given its beginning and goes on with it.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from modelworks.assistant.store import ConversationStore, Message, State
from modelworks.serve.engine import Engine
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError, OperationError

SAVE_EVERY_S = 0.5
_LOOK_S = 0.05
"""How often who follows an answer looks for more of it."""
PERSONA = {"role": "system", "content": "You are a helpful assistant."}
"""What a model is told first. Small models answer worse to their template's own words."""
TEMPLATE_TOKENS = 16
"""What a chat template adds to one message, at most."""
BYTES_PER_TOKEN = 3
"""Of prose in UTF-8: English has four to five, code and other languages fewer."""
SYSTEM_TOKENS = 64
"""What a chat template adds to the whole, such as a default system message."""


@dataclass
class Answer:
    """An answer that is being written; `text` grows until `state` is no longer ``writing``."""

    message: Message
    text: str = ""
    state: State = "writing"
    notice: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


@dataclass(frozen=True)
class Part:
    """A piece of an answer: what stands at an offset (in characters), and how the answer is with it."""

    offset: int
    text: str
    state: State
    notice: str | None = None


class Assistant:
    """Asks an engine on behalf of conversations that are kept.

    Parameters
    ----------
    store
        Where conversations are kept. Answers that an earlier server left unfinished are marked on construction.
    engine
        Who answers.
    sampling
        OpenAI options for every answer, such as ``temperature``.
    """

    def __init__(self, store: ConversationStore, engine: Engine, sampling: dict[str, Any] | None = None) -> None:
        self.store = store
        self.engine = engine
        self._sampling = sampling or {}
        self._running: dict[str, Answer] = {}
        store.interrupt_unfinished()

    def of(self, user_id: str, engine: Engine) -> Assistant:
        """The same assistant as one user has it: the user's conversations alone, and an engine that knows who asks."""
        own = copy.copy(self)
        own.store, own.engine = self.store.of(user_id), engine
        return own

    def running(self, conversation_id: str) -> Answer | None:
        """The answer that is being written in a conversation, if one is."""
        return self._running.get(conversation_id)

    async def ask(self, conversation_id: str, text: str, parent_id: int | None, model: str) -> Answer:
        """Store a question behind a message and begin to answer it. An edited question has its first version's parent.

        Raises
        ------
        InputError
            If the question is empty, or an answer is still being written in this conversation.
        """
        if not text.strip():
            raise InputError("an empty message can't be sent")
        self._refuse_second(conversation_id)
        question = await asyncio.to_thread(self.store.add, conversation_id, "user", text, parent_id)
        return await self.answer(conversation_id, question.id, model)

    async def answer(self, conversation_id: str, question_id: int, model: str) -> Answer:
        """Begin an answer to a question that is stored; one more if there is one already."""
        self._refuse_second(conversation_id)
        await asyncio.to_thread(self.store.choose_model, conversation_id, model)
        history = await asyncio.to_thread(self.store.path, conversation_id, question_id)
        # Nothing is awaited between this look and the entry below, so that two pages can't both begin.
        self._refuse_second(conversation_id)
        message = self.store.add(conversation_id, "assistant", "", question_id, model=model, state="writing")
        return await self._begin(Answer(message), model, history)

    async def _begin(self, answer: Answer, model: str, history: Sequence[Message]) -> Answer:
        self._running[answer.message.conversation_id] = answer
        answer.task = asyncio.create_task(self._write(answer, model, history), name=f"answer {answer.message.id}")
        # Let it begin: a task that is cancelled before that never reaches its `finally`.
        await asyncio.sleep(0)
        return answer

    async def resume(self, conversation_id: str, message_id: int) -> Answer:
        """Go on with an answer that was cut short, where it stands; if it is being written, that is all that's needed.

        Raises
        ------
        InputError
            If it isn't an answer of this conversation, or is whole; or another one is being written.
        """
        answer = self._running.get(conversation_id)
        if answer is not None and answer.message.id == message_id:
            return answer
        self._refuse_second(conversation_id)
        history = await asyncio.to_thread(self.store.path, conversation_id, message_id)
        # As in `answer`: nothing is awaited between this look and the entry.
        self._refuse_second(conversation_id)
        message = self.store.take_up(conversation_id, message_id)
        return await self._begin(Answer(message, message.content), message.model or "", history)

    async def follow(self, conversation_id: str, message_id: int, offset: int = 0) -> AsyncGenerator[Part, None]:
        """A message from a place in its text on, as it grows, up to its end; the last part has its state.

        Parts say where they begin. After a crash the server can have less of an answer than who followed it: then the
        first part begins earlier than asked for, and what stood there is replaced by it.

        Raises
        ------
        InputError
            If the message isn't one of this conversation.
        """
        answer = self._running.get(conversation_id)
        if answer is None or answer.message.id != message_id:
            message = (await asyncio.to_thread(self.store.path, conversation_id, message_id))[-1]
            begin = min(offset, len(message.content))
            yield Part(begin, message.content[begin:], message.state, message.notice)
            return
        offset, ended = min(offset, len(answer.text)), False
        while not ended:
            ended, text = answer.finished.is_set(), answer.text
            if len(text) > offset or ended:
                yield Part(offset, text[offset:], answer.state if ended else "writing", answer.notice)
            offset = len(text)
            if not ended:
                with suppress(TimeoutError):
                    await asyncio.wait_for(answer.finished.wait(), _LOOK_S)

    async def stop(self, conversation_id: str) -> None:
        """End an answer where it stands; what has come so far is kept."""
        answer = self._running.get(conversation_id)
        if answer is not None and answer.task is not None:
            answer.task.cancel()
            await answer.finished.wait()

    async def close(self) -> None:
        """End all answers and store them."""
        for conversation_id in list(self._running):
            await self.stop(conversation_id)

    def _refuse_second(self, conversation_id: str) -> None:
        if conversation_id in self._running:
            raise InputError("an answer is still being written in this conversation; stop it first")

    async def _write(self, answer: Answer, model: str, history: Sequence[Message]) -> None:
        conversation_id = answer.message.conversation_id
        saving = asyncio.create_task(self._keep_saving(answer), name=f"save {answer.message.id}")
        try:
            await self._stream(answer, model, history)
            answer.state = "complete"
        except asyncio.CancelledError:
            answer.state = "stopped"
        except (InputError, OperationError) as error:
            answer.state, answer.notice = "failed", str(error)
        except Exception as error:
            answer.state, answer.notice = "failed", f"the engine broke off: {error}"
            raise
        finally:
            saving.cancel()
            # Not in a thread: at a server's end the loop's threads may already be gone.
            try:
                self.store.save(answer.message.id, answer.text, answer.state, answer.notice)
            finally:
                self._running.pop(conversation_id, None)
                answer.finished.set()

    async def _keep_saving(self, answer: Answer) -> None:
        """What has come so far goes to the database, also while the engine is silent."""
        saved = answer.text
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            if answer.text != saved:
                saved = answer.text
                with suppress(OperationError):  # the last one says what is wrong, if it still is
                    await asyncio.to_thread(self.store.save, answer.message.id, saved, "writing", answer.notice)

    async def _stream(self, answer: Answer, model: str, history: Sequence[Message]) -> None:
        turns, left_out = await fit(self.engine, model, history)
        before = answer.text
        while True:
            if left_out:
                answer.notice = f"The conversation is longer than {model}'s context: its {_oldest(left_out)} left out."
            try:
                await self._listen(answer, model, turns)
            except RequestError as error:
                if error.code != "context_length_exceeded" or answer.text != before or len(turns) < 2:
                    raise
                shorter = _without_oldest_turn(turns)
                left_out += len(turns) - len(shorter)
                turns = shorter
            else:
                return

    async def _listen(self, answer: Answer, model: str, turns: Sequence[dict[str, str]]) -> None:
        began = time.monotonic()
        sampling = self._sampling
        if turns[-1]["role"] == "assistant":  # it goes on with it; llama.cpp does so anyway, others have to be told
            sampling = sampling | {"continue_final_message": True, "add_generation_prompt": False}
        async with aclosing(self.engine.chat(model, [PERSONA, *turns], **sampling)) as deltas:
            async for delta in deltas:
                answer.text += delta.text
                answer.seconds = time.monotonic() - began
                if delta.usage is not None:
                    answer.tokens = delta.usage.completion_tokens
                if delta.finish_reason == "length":
                    cut = "The answer was cut: it reached the longest that is allowed."
                    answer.notice = f"{answer.notice} {cut}" if answer.notice else cut


async def fit(engine: Engine, model: str, history: Sequence[Message]) -> tuple[list[dict[str, str]], int]:
    """As many of the latest turns as fill three quarters of a model's context, so that the answer has room.

    Tokens are estimated from bytes; where that is too hopeful the engine refuses, and `Assistant` leaves out more. The
    last message is always kept. Messages without text (an answer that failed at once) are not sent.

    Returns
    -------
    tuple
        The messages to send, and how many of the oldest were left out.
    """
    turns = [{"role": message.role, "content": message.content} for message in history if message.content.strip()]
    cards = {card.name: card for card in await engine.models()}
    if model not in cards:
        return turns, 0  # the engine itself says best what is wrong
    budget = cards[model].context * 3 // 4 - SYSTEM_TOKENS
    kept = len(turns)
    for turn in reversed(turns):
        budget -= len(turn["content"].encode()) // BYTES_PER_TOKEN + TEMPLATE_TOKENS
        if budget < 0 and kept < len(turns):
            break
        kept -= 1
    # A talk begins with a question, not with the answer to one that was left out.
    while kept < len(turns) - 1 and turns[kept]["role"] == "assistant":
        kept += 1
    return turns[kept:], kept


def _without_oldest_turn(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    shorter = list(turns[1:])
    while len(shorter) > 1 and shorter[0]["role"] == "assistant":
        shorter.pop(0)
    return shorter


def _oldest(count: int) -> str:
    return "oldest message was" if count == 1 else f"{count} oldest messages were"
