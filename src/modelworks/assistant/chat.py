"""The flow of one answer: the question is stored, the engine is asked, and what it says is stored while it says it.

An answer belongs to the server and not to the page that asked for it: it goes on when the page is closed, and any page
can watch it (`Assistant.running`, `Assistant.follow`). Twice a second what has come so far goes to the database, so
that after a crash the conversation stands as it was at most half a second before; and an answer that was cut short can
be taken up where it stands (`Assistant.resume`): the engine is given its beginning and goes on with it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from modelworks.assistant.calls import Call, round_of, turns_of
from modelworks.assistant.documents.library import Library
from modelworks.assistant.documents.prompt import Given
from modelworks.assistant.documents.store import Passage
from modelworks.assistant.live.knowledge import Evidence, Live
from modelworks.assistant.personas import kind_of
from modelworks.assistant.store import ConversationStore
from modelworks.assistant.talk import CUT, Message, State
from modelworks.assistant.titles import title_by
from modelworks.assistant.tools.loop import ENOUGH, LONGEST_RESULT, MOST_ROUNDS, Calling, asked_for
from modelworks.assistant.tools.tool import Place, Tool
from modelworks.serve.access import Tier
from modelworks.serve.engine import Engine, ModelCard
from modelworks.serve.errors import RequestError
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.modes import BUILT_IN, REGULAR

_LOG = logging.getLogger("modelworks.chat")
SAVE_EVERY_S = 0.5
_LOOK_S = 0.05
"""How often who follows an answer looks for more of it."""
PERSONA = {"role": "system", "content": BUILT_IN[REGULAR]}
"""What a model is told first in the regular mode. Small models answer worse to their template's own words."""
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
    calls: list[Call] = field(default_factory=list)
    """Of tools, in the order in which they were asked for."""
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
    titles
        Whether the model that gave a conversation's first answer is asked for its title.
    library
        The documents of conversations, if they may have some.
    live
        Sources that refresh themselves, if there are some.
    calling
        The tools of conversations, if they may have some.
    """

    def __init__(
        self,
        store: ConversationStore,
        engine: Engine,
        sampling: dict[str, Any] | None = None,
        titles: bool = False,
        library: Library | None = None,
        live: Live | None = None,
        calling: Calling | None = None,
    ) -> None:
        self.store = store
        self.engine = engine
        self.library = library
        self.live = live
        self.calling = calling
        self._sampling = sampling or {}
        self._running: dict[str, Answer] = {}
        self._tier: Callable[[], Awaitable[Tier]] | None = None
        self._titles = titles
        self._title_engine = engine
        self._titling: dict[str, asyncio.Task[None]] = {}
        store.interrupt_unfinished()

    def of(self, user_id: str, engine: Engine, tier: Callable[[], Awaitable[Tier]], admin: bool = False) -> Assistant:
        """The same assistant as one user has it: the user's conversations, an engine that knows who asks, and a tier.

        Titles are asked of the server's own engine: they are the product's doing and count as nobody's message.
        """
        own = copy.copy(self)
        own.store, own.engine, own._tier = self.store.of(user_id), engine, tier
        own.library = self.library.of(user_id) if self.library is not None else None
        own.live = self.live.of(user_id, admin) if self.live is not None else None
        return own

    async def modes(self) -> list[str]:
        """The kinds of modes that may be chosen: ``regular``, ``fun``, ``own``."""
        return list((await self._tier()).personas if self._tier is not None else Tier(name="all").personas)

    async def may(self, mode: str) -> None:
        """Refuse a mode that the user's tier doesn't include.

        Raises
        ------
        RequestError
            403 if it doesn't.
        """
        if self._tier is None:
            return
        tier = await self._tier()
        if kind_of(mode) not in tier.personas:
            kind = "personas of one's own" if kind_of(mode) == "own" else f"the mode {mode}"
            raise RequestError(f"the tier {tier.name} doesn't include {kind}", status=403, code="mode_not_allowed")

    def titling(self, conversation_id: str) -> bool:
        """Whether a model is being asked for a conversation's title."""
        return conversation_id in self._titling

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
        # Answers that are being written are everybody's: whose this one is, the store says.
        await asyncio.to_thread(self.store.conversation, conversation_id)
        answer = self._running.get(conversation_id)
        if answer is not None and answer.message.id == message_id:
            return answer
        self._refuse_second(conversation_id)
        history = await asyncio.to_thread(self.store.path, conversation_id, message_id)
        # As in `answer`: nothing is awaited between this look and the entry.
        self._refuse_second(conversation_id)
        message = self.store.take_up(conversation_id, message_id)
        taken_up = Answer(message, message.content, calls=[replace(call) for call in message.calls])
        return await self._begin(taken_up, message.model or "", history)

    async def decide(
        self, conversation_id: str, message_id: int, number: int, verdict: Literal["allow", "always", "refuse"]
    ) -> None:
        """Answer a call of a tool that waits for consent; an answer that a server's end has cut short goes on with it.

        Raises
        ------
        InputError
            If no such call of this conversation waits.
        """
        message = (await asyncio.to_thread(self.store.path, conversation_id, message_id))[-1]
        answer = self._running.get(conversation_id)
        writing = answer is not None and answer.message.id == message_id
        calls = answer.calls if answer is not None and writing else message.calls
        asked = [call for call in calls if call.number == number and call.state == "waiting"]
        if self.calling is None or not asked:
            raise InputError(f"the call {number} doesn't wait for an answer")
        if verdict == "always":
            await asyncio.to_thread(self.calling.store.always, conversation_id, asked[0].name)
        if writing:
            self.calling.settle(message_id, number, verdict != "refuse")
        else:
            self._refuse_second(conversation_id)
            await asyncio.to_thread(self.calling.store.decide, message_id, number, verdict != "refuse")
            await self.resume(conversation_id, message_id)

    async def follow(self, conversation_id: str, message_id: int, offset: int = 0) -> AsyncGenerator[Part, None]:
        """A message from a place in its text on, as it grows, up to its end; the last part has its state.

        Parts say where they begin. After a crash the server can have less of an answer than who followed it: then the
        first part begins earlier than asked for, and what stood there is replaced by it.

        Raises
        ------
        InputError
            If the message isn't one of this conversation.
        """
        await asyncio.to_thread(self.store.conversation, conversation_id)
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

    async def remove(self, conversation_id: str) -> None:
        """Remove a conversation for good, with what is shared of it; what is written or read for it ends.

        Raises
        ------
        InputError
            If it isn't there.
        """
        await asyncio.to_thread(self.store.conversation, conversation_id)
        await self.stop(conversation_id)
        if self.library is not None:
            await self.library.leave(conversation_id)
        await asyncio.to_thread(self.store.delete, conversation_id)

    async def close(self) -> None:
        """End all answers and store them, the reading of documents, and the refreshing of sources."""
        if self.calling is not None:
            self.calling.closing = True
        for conversation_id in list(self._running):
            await self.stop(conversation_id)
        if self.calling is not None:
            await self.calling.toolbox.close()
        for task in list(self._titling.values()):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        if self.library is not None:
            await self.library.close()
        if self.live is not None:
            await self.live.close()

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
                first = [turn.role for turn in history] == ["user"] and conversation_id not in self._titling
                if self._titles and first and answer.state == "complete":
                    naming = self._entitle(conversation_id, model, history[0].content, answer.text)
                    self._titling[conversation_id] = asyncio.create_task(naming, name=f"title {conversation_id}")
                answer.finished.set()

    async def _entitle(self, conversation_id: str, model: str, question: str, said: str) -> None:
        """Ask the model for a title; where that fails or nothing sensible comes, the first line stays."""
        try:
            if (await asyncio.to_thread(self.store.conversation, conversation_id)).title_by == "line":
                title = await title_by(self._title_engine, model, question, said)
                if title is not None:
                    await asyncio.to_thread(self.store.entitle, conversation_id, title)
        except (InputError, OperationError) as error:
            _LOG.info("a conversation keeps its first line as its title: %s", error)
        finally:
            del self._titling[conversation_id]

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
        conversation = await asyncio.to_thread(self.store.conversation, answer.message.conversation_id)
        await self.may(conversation.mode)
        prompt = await asyncio.to_thread(self.store.prompt, conversation.mode)
        own = {"temperature": conversation.temperature} if conversation.temperature is not None else {}
        tools = await self.calling.offered(conversation.id) if self.calling is not None else {}
        if answer.calls:  # its own words and calls are added below
            history = [message for message in history if message.id != answer.message.id]
            await self._carry_out(answer, model, tools)
        given = await self._given(answer, model, history, conversation.look_up)
        taken = given.tokens + len(prompt.encode()) // BYTES_PER_TOKEN
        turns, left_out = await fit(self.engine, model, history, taken + _weight(tools, answer))
        before, results_left_out = answer.text, 0
        while True:
            notices = [given.notice] if given.notice else []
            if left_out:
                notices.append(f"The conversation is longer than {model}'s context: its {_oldest(left_out)} left out.")
            offered = [tool.offered for tool in tools.values()]
            if offered and len(set(map(round_of, answer.calls))) >= MOST_ROUNDS:
                offered = []
                notices.append(ENOUGH)
            answer.notice = " ".join(notices) or None
            options = self._sampling | own | ({"tools": offered} if offered else {})
            spoken = [
                *given.onto(turns),
                *(turns_of(answer.text, answer.calls, results_left_out) if answer.calls else ()),
            ]
            try:
                pieces = await self._listen(answer, model, prompt, spoken, options)
            except RequestError as error:
                too_long = error.code == "context_length_exceeded" and answer.text == before
                if too_long and len(turns) > 1:
                    shorter = _without_oldest_turn(turns)
                    left_out += len(turns) - len(shorter)
                    turns = shorter
                elif too_long and given.can_shrink:
                    given = given.shrunk()
                    taken = given.tokens + len(prompt.encode()) // BYTES_PER_TOKEN
                    if not answer.text:  # what it has said already can name any of them
                        await self._keep_sources(answer, given)
                elif too_long and results_left_out < len(answer.calls):
                    results_left_out += 1
                else:
                    raise
            else:
                if not pieces or not offered:
                    return
                await self._ask_for(answer, pieces, tools)
                await self._carry_out(answer, model, tools)
                turns, left_out = await fit(self.engine, model, history, taken + _weight(tools, answer))
                before = answer.text

    async def _ask_for(self, answer: Answer, pieces: Sequence[dict[str, Any]], tools: dict[str, Tool]) -> None:
        """Add the calls that an answer asks for."""
        assert self.calling is not None
        chosen = await asyncio.to_thread(self.calling.store.chosen, answer.message.conversation_id)
        asks = {name: tool.asks and name not in chosen.always for name, tool in tools.items()}
        if answer.text and not answer.text.endswith("\n"):
            answer.text += "\n\n"
        calls = asked_for(pieces, len(answer.calls), len(answer.text), asks)
        # The words before the calls: they stand at a place in them, also after a kill that comes now.
        await asyncio.to_thread(self.store.save, answer.message.id, answer.text, "writing", answer.notice)
        await self.calling.expect(answer.message.id, calls)
        answer.calls += calls

    async def _carry_out(self, answer: Answer, model: str, tools: dict[str, Tool]) -> None:
        if self.calling is None:
            return
        longest = LONGEST_RESULT
        with suppress(RequestError):  # the engine itself says best what is wrong
            longest = (await self.engine.card(model)).context * BYTES_PER_TOKEN // 4
        place = Place(answer.message.conversation_id, self.library)
        await self.calling.carry_out(answer.message.id, answer.calls, tools, place, longest)

    async def _given(self, answer: Answer, model: str, history: Sequence[Message], look_up: bool) -> Given:
        """What the conversation's documents hold for its last question; it is kept which passages these are.

        An answer that is gone on with has the passages that it was given before: its words name them by their numbers.
        """
        question = next((message.content for message in reversed(history) if message.role == "user"), "")
        if self.library is None or not question:
            return Given()
        try:
            card = await self.engine.card(model)
        except RequestError:
            return Given()  # the engine itself says best what is wrong
        talk = len(question.encode()) // BYTES_PER_TOKEN + SYSTEM_TOKENS
        conversation_id = answer.message.conversation_id
        kept = await self._kept_sources(answer)
        if kept:
            before = [one for place, (number, one) in enumerate(kept.items(), start=1) if number == place]
            given = await self.library.given(conversation_id, question, card, talk, before)
            return replace(given, secret=conversation_id)
        looked_up = await self._looked_up(question, card) if look_up else Evidence()
        given = await self.library.given(conversation_id, question, card, talk + looked_up.tokens)
        notice = " ".join(one for one in (given.notice, looked_up.notice) if one) or None
        passages = given.passages + looked_up.passages
        given = replace(given, passages=passages, notice=notice, secret=conversation_id)
        await self._keep_sources(answer, given)
        return given

    async def may_look_up(self) -> bool:
        """Whether there are live sources, and the user's tier includes them."""
        return self.live is not None and (self._tier is None or (await self._tier()).live_knowledge)

    async def sources(self) -> Live:
        """The user's live sources, to be changed.

        Raises
        ------
        RequestError
            403 if the user's tier doesn't include them.
        """
        if self.live is None or not await self.may_look_up():
            raise RequestError("your tier doesn't include live knowledge", status=403, code="sources_not_allowed")
        return self.live

    async def _looked_up(self, question: str, card: ModelCard) -> Evidence:
        """What live sources hold for a question, where there are some for the user."""
        if self.live is None or not await self.may_look_up():
            return Evidence()
        return await self.live.evidence(question, card.context)

    async def _kept_sources(self, answer: Answer) -> dict[int, Passage]:
        """What an answer that has begun was given, by its numbers."""
        if self.library is None or not (answer.text or answer.calls):
            return {}
        message = answer.message
        return await asyncio.to_thread(self.library.store.sources, message.conversation_id, message.id)

    async def _keep_sources(self, answer: Answer, given: Given) -> None:
        if self.library is not None:
            await asyncio.to_thread(self.library.store.keep_sources, answer.message.id, given.passages)

    async def _listen(
        self, answer: Answer, model: str, prompt: str, turns: Sequence[dict[str, Any]], sampling: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Add what an engine says to an answer; the pieces of the calls that it asks for."""
        pieces: list[dict[str, Any]] = []
        began = time.monotonic()
        told = {"role": "system", "content": prompt}
        if turns[-1]["role"] == "assistant":  # it goes on with it; llama.cpp does so anyway, others have to be told
            sampling = sampling | {"continue_final_message": True, "add_generation_prompt": False}
        async with aclosing(self.engine.chat(model, [told, *turns], **sampling)) as deltas:
            async for delta in deltas:
                answer.text += delta.text
                pieces += delta.tool_calls
                answer.seconds = time.monotonic() - began
                if delta.usage is not None:
                    answer.tokens = delta.usage.completion_tokens
                if delta.finish_reason == "length":
                    answer.notice = f"{answer.notice} {CUT}" if answer.notice else CUT
        return pieces


async def fit(
    engine: Engine, model: str, history: Sequence[Message], taken: int = 0
) -> tuple[list[dict[str, Any]], int]:
    """As many of the latest turns as fill three quarters of a model's context, so that the answer has room.

    Tokens are estimated from bytes; where that is too hopeful the engine refuses, and `Assistant` leaves out more. The
    last message is always kept. Messages without text (an answer that failed at once) are not sent. `taken` is what
    else stands in the context.

    Returns
    -------
    tuple
        The messages to send, and how many of the oldest were left out.
    """
    turns: list[dict[str, Any]] = []
    for message in history:
        if message.calls:
            turns += turns_of(message.content, message.calls)
        elif message.content.strip():
            turns.append({"role": message.role, "content": message.content})
    cards = {card.name: card for card in await engine.models()}
    if model not in cards:
        return turns, 0  # the engine itself says best what is wrong
    budget = cards[model].context * 3 // 4 - SYSTEM_TOKENS - taken
    kept = len(turns)
    for turn in reversed(turns):
        budget -= _tokens(turn)
        if budget < 0 and kept < len(turns):
            break
        kept -= 1
    # A talk begins with a question, not with the answer to one that was left out.
    while kept < len(turns) - 1 and turns[kept]["role"] != "user":
        kept += 1
    return turns[kept:], kept


def _tokens(turn: dict[str, Any]) -> int:
    """What a turn takes of the context, about."""
    calls = json.dumps(turn["tool_calls"]) if "tool_calls" in turn else ""
    return len((turn["content"] + calls).encode()) // BYTES_PER_TOKEN + TEMPLATE_TOKENS


def _weight(tools: dict[str, Tool], answer: Answer) -> int:
    """The tokens of what is told of tools, and of an answer's own calls."""
    described = json.dumps([tool.offered for tool in tools.values()]) if tools else ""
    own = turns_of(answer.text, answer.calls) if answer.calls else []
    return len(described) // BYTES_PER_TOKEN + sum(map(_tokens, own))


def _without_oldest_turn(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    shorter = list(turns[1:])
    while len(shorter) > 1 and shorter[0]["role"] != "user":
        shorter.pop(0)
    return shorter


def _oldest(count: int) -> str:
    return "oldest message was" if count == 1 else f"{count} oldest messages were"
