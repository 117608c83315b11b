"""The character of the assistant: dialogues of our own writing, for two modes.

`regular` is brief, clear and honest about what it doesn't know; `fun` is dry and candid, teases ideas and itself, and
still gives the right answer. Beside plain answers there are dialogues about who the assistant is, refusals, and ones
where a refusal would be wrong. Each was written by itself: there are no templates, and `check` refuses what is alike.

The files hold what is said and name the mode; what a model is told first in it comes from `spec.modes`, so that a
model is tuned on the very words it is prompted with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from modelworks.data.distinct import in_share
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import write_atomically
from modelworks.spec.modes import BUILT_IN

Kind = Literal["answer", "identity", "refusal", "careful"]
KINDS: tuple[str, ...] = get_args(Kind)
"""`careful`: the subject is delicate, and it is right to answer."""
HELD_OUT = 0.1
"""The share of the dialogues that is kept from training."""
ALIKE = 0.5
"""Dialogues of one mode that share this much of their runs of three words are one dialogue written twice."""
LONGEST_ANSWER = 120
"""Words."""
_FOLDER = Path(__file__).parent
_RUN = 3
_SLURS = frozenset(
    {
        "0bc1e6946736", "1c5d0a683872", "1c6916ee27b3", "2dc96e2a08f7", "2e46f8d56572", "2f68a357609a", "334dba37b637",
        "3a5188b6b3f1", "40d5a9a17962", "438ed034be55", "4a103c5b1bff", "524e8abe3e4a", "6f10e75e9e70", "7fed6b981969",
        "83bd8486928f", "867d2b5a0068", "8c881c58dc1e", "8e236ca175d6", "9431c69de414", "9cf944135db2", "9eba73ee4d5d",
        "a4149a6bc0f1", "a6e45c0c82a5", "a8f9d9bd4338", "ac9306574c2e", "af5801380230", "ceb15b92ab8c", "d517d2ba03f4",
        "e533a067cd5c", "f248d66d8d1f",
    }
)  # fmt: skip
"""BLAKE2b hashes of 6 bytes of slurs, English and Polish, which nobody has to read here."""


@dataclass(frozen=True)
class Dialogue:
    """What was asked and answered in a mode, the question first.

    Attributes
    ----------
    mode
        ``regular`` or ``fun``.
    kind
        What it teaches: `KINDS`.
    turns
        The question, the answer, and so on; an even number.
    """

    mode: str
    kind: str
    turns: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages that a model learns from, the mode's system prompt first."""
        roles = ("user", "assistant") * (len(self.turns) // 2)
        said = [{"role": role, "content": content} for role, content in zip(roles, self.turns, strict=True)]
        return [{"role": "system", "content": BUILT_IN[self.mode]}, *said]

    @property
    def answers(self) -> tuple[str, ...]:
        """What the assistant says."""
        return self.turns[1::2]

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training; it stays so when others are added."""
        text = json.dumps([self.mode, *self.turns], ensure_ascii=False).encode()
        return in_share(hashlib.blake2b(text, digest_size=8).digest(), HELD_OUT)


@cache
def dialogues() -> tuple[Dialogue, ...]:
    """All dialogues of the package.

    Raises
    ------
    InputError
        If one can't be learnt from, or two are alike.
    """
    found = tuple(
        dialogue_from(json.loads(line), f"{file.name}:{number}")
        for file in sorted(_FOLDER.glob("*.jsonl"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
    )
    check(found)
    return found


def training() -> list[Dialogue]:
    """The dialogues to train on."""
    return [dialogue for dialogue in dialogues() if not dialogue.held_out]


def held_out() -> list[Dialogue]:
    """The dialogues that are kept from training."""
    return [dialogue for dialogue in dialogues() if dialogue.held_out]


def write_dialogues(folder: Path) -> dict[str, int]:
    """Write ``train.jsonl`` and ``held-out.jsonl``, a record ``{"messages": [...]}`` on each line.

    Who it is, the assistant shall know without a mode's system prompt too: such dialogues of the regular mode, of those
    to train on, are written once more without it.

    Returns
    -------
    dict
        How many records each file holds.

    Raises
    ------
    OperationError
        If the files can't be written.
    """
    told = [dialogue.messages for dialogue in training()]
    plain = [one.messages[1:] for one in training() if (one.mode, one.kind) == ("regular", "identity")]
    parts = {"train.jsonl": told + plain, "held-out.jsonl": [dialogue.messages for dialogue in held_out()]}
    for name, part in parts.items():
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in part]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, "\n".join(lines) + "\n")
        except OSError as error:
            raise OperationError(f"{folder / name} cannot be written: {error.strerror or error}") from None
    return {name: len(part) for name, part in parts.items()}


def dialogue_from(record: Any, where: str) -> Dialogue:
    """The dialogue in a record ``{"mode": ..., "kind": ..., "messages": [...]}``.

    Raises
    ------
    InputError
        If its mode or kind is unknown, its roles don't alternate, or a message is empty.
    """
    mode, kind, messages = record["mode"], record["kind"], record["messages"]
    if mode not in BUILT_IN:
        raise InputError(f"{where}: mode = {mode!r} is not accepted: {', '.join(BUILT_IN)} are")
    if kind not in KINDS:
        raise InputError(f"{where}: kind = {kind!r} is not accepted: {', '.join(KINDS)} are")
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise InputError(f"{where}: the roles {', '.join(roles)} are not accepted: user and assistant in turns are")
    turns = tuple(message["content"] for message in messages)
    for place, turn in enumerate(turns, start=1):
        if not turn.strip():
            raise InputError(f"{where}: message {place} is empty")
    return Dialogue(mode, kind, turns)


def check(found: Sequence[Dialogue]) -> None:
    """Refuse what the dialogues promise not to hold.

    Raises
    ------
    InputError
        If an answer is too long or holds a slur, or two dialogues of a mode are alike.
    """
    for dialogue in found:
        for answer in dialogue.answers:
            if len(answer.split()) > LONGEST_ANSWER:
                raise InputError(f"an answer of {len(answer.split())} words is too long: {answer[:60]!r}")
        if slurs(" ".join(dialogue.turns)):
            raise InputError(f"a dialogue holds a slur: the one that begins {dialogue.turns[0][:60]!r}")
    for first, second, share in alike(found):
        raise InputError(f"{share:.0%} of {first.turns[0]!r} and {second.turns[0]!r} are the same")


def alike(found: Sequence[Dialogue], least: float = ALIKE) -> Iterator[tuple[Dialogue, Dialogue, float]]:
    """Pairs of one mode whose runs of three words overlap (Jaccard) by at least so much."""
    runs = [_runs(dialogue) for dialogue in found]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, dialogue in enumerate(found):
        shared: dict[int, int] = defaultdict(int)
        for run in runs[number]:
            for other in holders[run]:
                shared[other] += found[other].mode == dialogue.mode
            holders[run].append(number)
        for other, common in shared.items():
            share = common / len(runs[number] | runs[other])
            if share >= least:
                yield found[other], dialogue, share


def slurs(text: str) -> bool:
    """Whether a text holds a slur of a small list."""
    return any(hashlib.blake2b(word.encode(), digest_size=6).hexdigest() in _SLURS for word in words(text))


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def _runs(dialogue: Dialogue) -> set[tuple[str, ...]]:
    said = words(" ".join(dialogue.turns))
    return {tuple(said[start : start + _RUN]) for start in range(max(1, len(said) - _RUN + 1))}
