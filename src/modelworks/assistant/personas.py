"""Ways to answer: two that are there from the start, and those that a person has written.

A conversation's mode is ``regular``, ``fun``, or the id of one of its owner's personas. What a model is told first is
short: small models answer worse to a long one.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import update
from sqlalchemy.orm import Session

from modelworks.assistant.owned import Owned, named, new_id, owned
from modelworks.assistant.tables import ConversationRow, PersonaRow
from modelworks.spec.errors import InputError
from modelworks.spec.modes import BUILT_IN, REGULAR

OWN = "own"
LONGEST_PROMPT = 8000
"""Characters of a persona's prompt."""
MOST_PERSONAS = 100


@dataclass(frozen=True)
class Persona:
    """A way to answer; `prompt` is what a model is told first."""

    id: str
    name: str
    prompt: str
    created: float


class Personas(Owned):
    """The personas that a person has written."""

    def all(self) -> list[Persona]:
        """All of them, the earliest first."""
        with self._database.read() as session:
            return [_persona(row) for row in session.scalars(self._mine(PersonaRow))]

    def create(self, name: str, prompt: str) -> Persona:
        """A new one.

        Raises
        ------
        InputError
            If the name or the prompt is empty or too long, the name is taken, or there are too many.
        """
        row = PersonaRow(id=new_id(), user_id=self._owner, name="", prompt="", created=self._clock())
        with self._database.write() as session:
            if self._count(session, PersonaRow) >= MOST_PERSONAS:
                raise InputError(f"there are {MOST_PERSONAS} personas already, which is the most; remove one first")
            self._set(session, row, name, prompt)
            session.add(row)
            session.flush()
            return _persona(row)

    def change(self, persona_id: str, name: str | None = None, prompt: str | None = None) -> Persona:
        """Give one another name or prompt; the next answer of its conversations is by it. Raises as `create`."""
        with self._database.write() as session:
            row = self._row(session, PersonaRow, persona_id, "persona")
            self._set(session, row, row.name if name is None else name, row.prompt if prompt is None else prompt)
            return _persona(row)

    def delete(self, persona_id: str) -> None:
        """Remove one; its conversations go on in the regular mode."""
        with self._database.write() as session:
            row = self._row(session, PersonaRow, persona_id, "persona")
            session.execute(update(ConversationRow).where(ConversationRow.mode == row.id).values(mode=REGULAR))
            session.delete(row)

    def _set(self, session: Session, row: PersonaRow, name: str, prompt: str) -> None:
        name, prompt = named(name, "persona", 60), prompt.replace("\0", "").strip()
        if not prompt or len(prompt) > LONGEST_PROMPT:
            raise InputError(
                f"a persona's prompt of {len(prompt):,} characters is not accepted: 1 to {LONGEST_PROMPT:,} are"
            )
        taken = {other.name.casefold() for other in session.scalars(self._mine(PersonaRow)) if other.id != row.id}
        if name.casefold() in taken | BUILT_IN.keys():
            raise InputError(f"there is a persona {name!r} already; give this one another name")
        row.name, row.prompt = name, prompt


def prompt_of(session: Session, owner: str | None, mode: str) -> str:
    """What a model is told first in a mode.

    Raises
    ------
    InputError
        If it is neither ours nor one of the owner's personas.
    """
    if mode in BUILT_IN:
        return BUILT_IN[mode]
    try:
        return owned(session, owner, PersonaRow, mode, "persona").prompt
    except InputError:
        raise InputError(f"mode = {mode!r} is not accepted: regular, fun, or the id of a persona is") from None


def kind_of(mode: str) -> str:
    """A mode as tiers name it: ``regular``, ``fun``, or ``own`` for all that a person has written."""
    return mode if mode in BUILT_IN else OWN


def _persona(row: PersonaRow) -> Persona:
    return Persona(row.id, row.name, row.prompt, row.created)
