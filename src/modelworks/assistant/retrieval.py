"""The passages that answer a question best, of sources that are somebody's.

They are ranked by words, as the database's full-text index has them (BM25 in SQLite; in PostgreSQL its own rank of
each word, weighed by how rare the word is among the sources), and by meaning where a model makes vectors. The two
rankings are fused by reciprocal rank (Cormack, Clarke and Büttcher 2009: the sum of 1 / (60 + rank)), which needs no
common scale.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import ARRAY, Text, bindparam, select, text, update
from sqlalchemy.orm import Session

from modelworks.assistant.documents.store import DocumentStore, Passage
from modelworks.assistant.tables import DocumentRow, PassageRow
from modelworks.serve.engine import Engine
from modelworks.spec.errors import InputError, OperationError

_LOG = logging.getLogger("modelworks.documents")
_FUSION = 60
_LOOKED_AT = 50
"""Passages of each ranking that are fused."""
_MOST_WORDS = 32
"""Of a question."""
_BATCH = 16
"""Passages that are given to a model at once."""
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by can could did do does for from had has have how i if in is it its me my not of on or "
        "our please say says so tell than that the their them then there these they this those to us was we were what "
        "when where which who why will with would you your about",
    )
)
"""Words of English that say nothing of what is asked for."""
_SQLITE = """
SELECT {passages}.id FROM {index} JOIN {passages} ON {passages}.id = {index}.rowid
WHERE {index} MATCH :words AND {passages}.{source} IN :sources
ORDER BY bm25({index}, 2.0, 1.0), {passages}.id LIMIT :most"""
_POSTGRESQL = """
WITH scope AS (
  SELECT id, words FROM {passages} JOIN {index} ON passage_id = id WHERE {source} IN :sources
), asked AS (
  SELECT DISTINCT plainto_tsquery('english', word) AS word FROM unnest(:words) AS word
), hits AS (
  SELECT id, word, ts_rank(words, word, 1) AS rank FROM scope JOIN asked ON words @@ word
), weights AS (
  SELECT word, ln(1 + (SELECT count(*) FROM scope)::float / count(*)) AS weight FROM hits GROUP BY word
)
SELECT id FROM hits JOIN weights USING (word) GROUP BY id ORDER BY sum(rank * weight) DESC, id LIMIT :most"""


@dataclass(frozen=True)
class Index:
    """Where passages and their words are, and the column that says of which source they are."""

    passages: str
    index: str
    source: str


DOCUMENTS = Index("passages", "passage_words", "document_id")


@dataclass(frozen=True)
class Embedder:
    """A model that makes vectors, and the engine that has it."""

    engine: Engine
    model: str

    async def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """One row of unit length per text."""
        rows: list[list[float]] = []
        for begin in range(0, len(texts), _BATCH):
            found, _ = await self.engine.embed(self.model, list(texts[begin : begin + _BATCH]))
            rows += found
        return np.asarray(rows, dtype=np.float32)


class Retrieval:
    """Ranks passages.

    Parameters
    ----------
    store
        Whose passages they are.
    embedder
        Who makes vectors; left out, words alone rank.
    """

    def __init__(self, store: DocumentStore, embedder: Embedder | None = None) -> None:
        self.store = store
        self.embedder = embedder

    async def best(self, sources: Sequence[str], question: str, most: int) -> list[Passage]:
        """The best passages of some documents for a question, the best first.

        A document that isn't the owner's gives none.
        """
        rankings = [await asyncio.to_thread(self._by_words, sources, question)]
        if self.embedder is not None:
            try:
                asked = (await self.embedder.vectors([question]))[0]
            except (InputError, OperationError) as error:
                _LOG.warning("passages are ranked by words alone: %s", error)
            else:
                rankings.append(await asyncio.to_thread(self._by_meaning, self.embedder.model, sources, asked))
        return await asyncio.to_thread(self.store.passages_of, fused(rankings)[:most])

    async def embed(self, document_id: str) -> None:
        """Make the vectors of a document's passages, if there is who makes them."""
        if self.embedder is None:
            return
        passages = await asyncio.to_thread(self.store.passages, [document_id])
        vectors = await self.embedder.vectors([f"{one.heading}\n{one.text}".strip() for one in passages])
        await asyncio.to_thread(self._keep, document_id, [one.id for one in passages], vectors, self.embedder.model)

    def _keep(self, document_id: str, passage_ids: list[int], vectors: np.ndarray, model: str) -> None:
        with self.store.database.write() as session:
            for passage_id, vector in zip(passage_ids, vectors, strict=True):
                session.execute(update(PassageRow).where(PassageRow.id == passage_id).values(vector=vector.tobytes()))
            session.execute(update(DocumentRow).where(DocumentRow.id == document_id).values(embedded_by=model))

    def _by_words(self, sources: Sequence[str], question: str) -> list[int]:
        with self.store.database.read() as session:
            return by_words(session, DOCUMENTS, sources, question)

    def _by_meaning(self, model: str, sources: Sequence[str], asked: np.ndarray) -> list[int]:
        query = select(PassageRow.id, PassageRow.vector).join(DocumentRow, DocumentRow.id == PassageRow.document_id)
        query = query.where(DocumentRow.id.in_(sources), DocumentRow.embedded_by == model)
        with self.store.database.read() as session:
            rows = [(row[0], row[1]) for row in session.execute(query) if row[1] is not None]
        return nearest(rows, asked)


def by_words(session: Session, index: Index, sources: Sequence[str], question: str) -> list[int]:
    """The passages of some sources that fit a question's words best, the best first."""
    words = words_of(question)
    if not words or not sources:
        return []
    if session.get_bind().dialect.name == "sqlite":
        query = text(_SQLITE.format(**vars(index))).bindparams(words=" OR ".join(f'"{word}"' for word in words))
    else:
        query = text(_POSTGRESQL.format(**vars(index))).bindparams(bindparam("words", words, ARRAY(Text)))
    listed = query.bindparams(bindparam("sources", list(sources), expanding=True), most=_LOOKED_AT)
    return list(session.scalars(listed))


def nearest(rows: Sequence[tuple[int, bytes]], asked: np.ndarray) -> list[int]:
    """The ids of those whose vectors are nearest to a question's, the nearest first."""
    if not rows:
        return []
    vectors = np.frombuffer(b"".join(row[1] for row in rows), dtype=np.float32).reshape(len(rows), -1)
    return [rows[index][0] for index in np.argsort(-(vectors @ asked), kind="stable")[:_LOOKED_AT]]


def words_of(question: str) -> list[str]:
    """The words of a question that are worth looking for, each once, in its order."""
    words = [word for word in re.findall(r"\w+", question.lower()) if word not in _COMMON]
    return list(dict.fromkeys(words))[:_MOST_WORDS]


def fused(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Several rankings as one; what two of them have stands before what one of them has at the same rank."""
    scores: Counter[int] = Counter()
    for ranking in rankings:
        for rank, one in enumerate(ranking, start=1):
            scores[one] += 1 / (_FUSION + rank)  # type: ignore[assignment]
    return sorted(scores, key=lambda one: (-scores[one], one))
