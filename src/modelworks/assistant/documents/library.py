"""Takes documents in, and says what of them a model is given with a question.

A document is read in the background: its conversation shows how far it is, and a question that comes earlier waits for
it. If all that a conversation holds fits the model's context, with room for the talk and the answer, it is given whole;
otherwise the passages that fit the question best.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from modelworks.assistant.documents import reading
from modelworks.assistant.documents.blocks import Progress
from modelworks.assistant.documents.limits import WALL_S
from modelworks.assistant.documents.passages import split
from modelworks.assistant.documents.prompt import IMAGE_TOKENS, Given, cost
from modelworks.assistant.documents.store import Document, DocumentStore, Passage
from modelworks.assistant.retrieval import Embedder, Retrieval
from modelworks.serve.engine import ModelCard
from modelworks.spec.errors import InputError, OperationError

LARGEST = 64 << 20
"""Bytes of a file."""
AT_ONCE = 2
"""Documents that are read at the same time."""
MOST_PASSAGES = 8
"""That a question is given when the whole doesn't fit."""
MOST_PICTURES = 4
"""That a question is given, the latest."""
_WHOLE, _PART = 0.6, 0.4
"""Of the context: what documents may take that are given whole, and what their best passages may."""
_LOOK_S = 0.1
_LOG = logging.getLogger("modelworks.documents")


class Library:
    """The documents of conversations.

    Parameters
    ----------
    store
        Where they are kept. Those that an earlier server left unread are marked on construction.
    embedder
        Who makes vectors of passages, if somebody does.
    """

    def __init__(self, store: DocumentStore, embedder: Embedder | None = None) -> None:
        self.store = store
        self.retrieval = Retrieval(store, embedder)
        self._progress: dict[str, Progress] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(AT_ONCE)
        store.interrupt_unfinished()

    def of(self, user_id: str) -> Library:
        """The same library as one user has it: the user's documents alone."""
        own = copy.copy(self)
        own.store = self.store.of(user_id)
        own.retrieval = Retrieval(own.store, self.retrieval.embedder)
        return own

    async def add(self, conversation_id: str, name: str, file: Path, most: int | None = None) -> Document:
        """Take a document in; it is read in the background. The file is the library's from here on, and removed.

        Raises
        ------
        InputError
            If there is no such conversation, or there are as many documents as are allowed.
        """
        try:
            size = file.stat().st_size
            document = await asyncio.to_thread(self.store.begin, conversation_id, name, size, most)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        self._progress[document.id] = Progress(0, 0)
        self._tasks[document.id] = asyncio.create_task(self._read(document, file), name=f"read {document.id}")
        await asyncio.sleep(0)  # a task that is cancelled before it begins never reaches its `finally`
        return document

    def progress(self, document_id: str) -> Progress | None:
        """How far the reading is; None if it isn't read by this server."""
        return self._progress.get(document_id)

    async def remove(self, conversation_id: str, document_id: str) -> None:
        """Remove a document; one that is being read is read no further.

        Raises
        ------
        InputError
            If it isn't there.
        """
        await asyncio.to_thread(self.store.remove, conversation_id, document_id)
        await self._end(document_id)

    async def leave(self, conversation_id: str) -> None:
        """End the reading of a conversation's documents.

        Raises
        ------
        InputError
            If there is no such conversation.
        """
        for document in await asyncio.to_thread(self.store.documents, conversation_id):
            await self._end(document.id)

    async def close(self) -> None:
        """End all reading."""
        for document_id in list(self._tasks):
            await self._end(document_id)

    async def given(
        self, conversation_id: str, question: str, card: ModelCard, talk: int, kept: Sequence[Passage] | None = None
    ) -> Given:
        """What a model is given with a question. Waits until all documents are read.

        Parameters
        ----------
        card
            The model.
        talk
            Tokens that the question itself takes.
        kept
            Passages that the answer was given before: it is given them again, and nothing is looked for.
        """
        documents = await self._settled(conversation_id)
        if not documents:
            return Given(tuple(kept or ()))
        seen = [one.id for one in documents if one.kind == "image"][-MOST_PICTURES:] if card.images else []
        read = [one.id for one in documents if not (card.images and one.kind == "image")]
        pictures = tuple(await asyncio.to_thread(self.store.pictures, seen))
        taken = talk + IMAGE_TOKENS * len(pictures)
        passages = kept if kept is not None else await self._chosen(read, question, card.context, taken)
        silent = await asyncio.to_thread(self._silent, documents, card)
        return Given(tuple(passages), pictures, silent, secret=conversation_id)

    async def _chosen(self, read: Sequence[str], question: str, context: int, taken: int) -> list[Passage]:
        whole = int(context * _WHOLE) - taken
        # A character is a byte at least, and a token three bytes about: what is longer than this can't fit.
        if await asyncio.to_thread(self.store.length, read) <= 3 * whole:
            everything = await asyncio.to_thread(self.store.passages, read)
            if sum(map(cost, everything)) <= whole:
                return everything
        room, chosen = min(int(context * _PART), whole), []
        found = await self.retrieval.best(read, question, MOST_PASSAGES)
        if len(found) < MOST_PASSAGES:
            # Such as for "summarise this": what nothing was found in is shown from its beginning.
            beginnings = await asyncio.to_thread(self.store.passages, read)
            known = {one.id for one in found}
            found += [one for one in beginnings[: 2 * MOST_PASSAGES] if one.id not in known][
                : MOST_PASSAGES - len(found)
            ]
        for passage in found:
            if cost(passage) <= room:
                room -= cost(passage)
                chosen.append(passage)
        return sorted(chosen, key=lambda one: (read.index(one.document_id), one.number))

    def _silent(self, documents: Sequence[Document], card: ModelCard) -> str | None:
        """What is said of images that a model can't see and that hold no text."""
        images = [one for one in documents if one.kind == "image" and not card.images]
        blank = [one.name for one in images if not self.store.length([one.id])]
        if not blank:
            return None
        return f"{card.name} takes text only, and no text was read in {', '.join(blank)}."

    async def _settled(self, conversation_id: str) -> list[Document]:
        """A conversation's documents that could be read, when none is being read any more."""
        patience = WALL_S
        while True:
            documents = await asyncio.to_thread(self.store.documents, conversation_id)
            waited_for = [self._tasks[one.id] for one in documents if one.state == "reading" and one.id in self._tasks]
            if patience <= 0 or not any(one.state == "reading" for one in documents):
                return [one for one in documents if one.state == "ready"]
            if waited_for:
                await asyncio.wait(waited_for)
            else:  # another server reads it, or has died over it
                await asyncio.sleep(_LOOK_S)
                patience -= _LOOK_S

    async def _read(self, document: Document, file: Path) -> None:
        def progress(done: int, total: int) -> None:
            self._progress[document.id] = Progress(done, total)

        try:
            async with self._places:
                contents = await reading.read(file, document.name, progress)
            pieces = await asyncio.to_thread(split, contents.blocks)
            notice = "; ".join(contents.remarks) or None
            await asyncio.to_thread(self.store.finish, document.id, contents.kind, pieces, contents.picture, notice)
            del contents
            try:
                await self.retrieval.embed(document.id)
            except (InputError, OperationError) as error:
                _LOG.warning("no vectors of a document: %s", error)  # its words are found without
        except InputError as error:
            await asyncio.to_thread(self.store.fail, document.id, str(error))
        except Exception as error:
            with suppress(OperationError):
                await asyncio.to_thread(self.store.fail, document.id, "it could not be kept; try again")
            if not isinstance(error, OperationError):
                raise
            _LOG.error("a document can't be kept: %s", error)
        finally:
            file.unlink(missing_ok=True)
            self._progress.pop(document.id, None)
            self._tasks.pop(document.id, None)

    async def _end(self, document_id: str) -> None:
        task = self._tasks.get(document_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
