"""From files of preferences to packed pairs: a chosen and a rejected answer to the same prompt.

A pair is a JSON record ``{"messages": [...], "chosen": ..., "rejected": ...}``. The prompt may be called ``prompt``
too, and be a text, which is then the user's. An answer is a text, an assistant's message, or a list of messages that
ends with one. What stands in such a list before the answer is the prompt, the same on both sides; a record whose lists
hold it needs no other.

A pair is kept as two dialogues, the chosen one first, of which the last answers alone are marked. Both are dealt into
one sequence, so that they come in one batch, and don't see each other there. A pair that is together longer than a
sequence is left out: cut answers would be compared by what is left of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np

from modelworks.data.answers import DialogueDataset, pack
from modelworks.data.dialogues import Dialogue, DialoguePacking, dialogue_from
from modelworks.data.packed import Split, SplitWriter
from modelworks.data.records import BadRecord, Make
from modelworks.data.templates import TemplateProcess

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two dialogues that differ in their last answer."""

    chosen: Dialogue
    rejected: Dialogue

    @property
    def utf8(self) -> bytes:
        """The pair as text, by which it is told from others."""
        return json.dumps([self.chosen.messages, self.rejected.messages], ensure_ascii=False).encode("utf-8")


def pair_from(value: Any, file: str, line: int) -> Pair | BadRecord:
    """The pair in one record of JSON."""
    if not isinstance(value, dict):
        return BadRecord(file, line, "no pair: a record with 'chosen' and 'rejected' is needed")
    missing = next((side for side in SIDES if value.get(side) is None), None)
    if missing is not None:
        return BadRecord(file, line, f"no pair: the field {missing!r} is missing")
    given = value.get("messages", value.get("prompt"))
    prompt = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if prompt is not None and not isinstance(prompt, list):
        return BadRecord(file, line, "the prompt is neither a text nor a list of messages")
    found = []
    for side in SIDES:
        before, answer = _split(value[side])
        if before and prompt is not None and before != prompt:
            return BadRecord(file, line, f"what stands before the {side} answer isn't the prompt, which is the same")
        prompt = prompt or before
        if not prompt:
            return BadRecord(file, line, "no pair: a prompt, as 'messages' or 'prompt', is needed")
        if isinstance(prompt[-1], dict) and prompt[-1].get("role") == "assistant":
            return BadRecord(
                file, line, "the prompt's last message is the assistant's: the answer is to follow a user's"
            )
        dialogue = dialogue_from({"messages": [*prompt, answer]}, file, line)
        if isinstance(dialogue, BadRecord):
            return BadRecord(file, line, f"{side}: {dialogue.reason}")
        found.append(dialogue)
    if found[0].messages == found[1].messages:
        return BadRecord(file, line, "the chosen and the rejected answer are equal")
    return Pair(*found)


class PairPacking(DialoguePacking):
    """One preparation of pairs."""

    _what = "pairs"
    _make: ClassVar[Make[Any]] = staticmethod(pair_from)

    def _added(
        self, template: TemplateProcess, record: Any, split: Split, writer: SplitWriter, answers_file: BinaryIO
    ) -> bool:
        """Write both dialogues of a pair to its split, unless it is a bad record."""
        sides = []
        for dialogue in (record.chosen, record.rejected):
            encoded = self._encoded(template, dialogue, last_only=True)
            if encoded is None:
                return False
            sides.append(encoded)
        learnt = [[token for token, counts in zip(*side, strict=True) if counts] for side in sides]
        if not all(learnt) or learnt[0] == learnt[1]:
            self._refuse(
                record.chosen, "the answers are equal, or one is empty, once the chat template has written them"
            )
            return False
        for (ids, answers), dialogue in zip(sides, (record.chosen, record.rejected), strict=True):
            writer.add(ids, len(dialogue.utf8))
            answers_file.write(bytes(answers))
        self._answer_tokens[split] += len(learnt[0])
        self._answer_bytes[split] += len(record.chosen.messages[-1]["content"].encode())
        return True


class PairDataset(DialogueDataset):
    """Tokens of prepared pairs; the answers of a sequence's pair i have the numbers 2 i + 1, chosen, and 2 i + 2.

    Tokens and bytes of answers are those of the chosen ones.
    """

    _nothing_fits = "no pair of the {split} split has a chosen and a rejected dialogue that fit into it together"

    def _documents_of(self, items: list[int]) -> list[int]:
        return [document for item in items for document in (2 * item, 2 * item + 1)]

    def _packing(self, split: Split, seq_len: int) -> tuple[list[list[int]], int]:
        """The pairs of each sequence, and how many are too long for one."""
        if (split, seq_len) not in self._packed:
            lengths = np.diff(self.documents(split).astype(np.int64)).reshape(-1, 2)
            sizes = (lengths + 1).sum(1)
            long = {int(pair) for pair in np.flatnonzero(sizes > seq_len + 2)}
            self._packed[split, seq_len] = pack(sizes.tolist(), seq_len + 2, long), len(long)
        return self._packed[split, seq_len]


def _split(given: Any) -> tuple[list[Any], Any]:
    """What stands before an answer, and its message."""
    if isinstance(given, list):
        return given[:-1], given[-1] if given else None
    return [], {"role": "assistant", "content": given} if isinstance(given, str) else given
