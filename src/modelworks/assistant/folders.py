"""Folders of conversations: a conversation is in one of its owner's, or in none."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import update

from modelworks.assistant.owned import Owned, named, new_id
from modelworks.assistant.tables import ConversationRow, FolderRow
from modelworks.spec.errors import InputError

MOST_FOLDERS = 500


@dataclass(frozen=True)
class Folder:
    """A folder."""

    id: str
    name: str
    created: float


class Folders(Owned):
    """A person's folders."""

    def all(self) -> list[Folder]:
        """All of them, by name."""
        with self._database.read() as session:
            found = [_folder(row) for row in session.scalars(self._mine(FolderRow))]
        return sorted(found, key=lambda folder: folder.name.casefold())

    def create(self, name: str) -> Folder:
        """A new, empty one.

        Raises
        ------
        InputError
            If the name is empty or too long, or there are too many.
        """
        row = FolderRow(id=new_id(), user_id=self._owner, name=named(name, "folder"), created=self._clock())
        with self._database.write() as session:
            if self._count(session, FolderRow) >= MOST_FOLDERS:
                raise InputError(f"there are {MOST_FOLDERS} folders already, which is the most; remove one first")
            session.add(row)
            session.flush()
            return _folder(row)

    def rename(self, folder_id: str, name: str) -> Folder:
        """Give one another name; an empty one is refused."""
        with self._database.write() as session:
            row = self._row(session, FolderRow, folder_id, "folder")
            row.name = named(name, "folder")
            return _folder(row)

    def delete(self, folder_id: str) -> None:
        """Remove one; its conversations stay, in none."""
        with self._database.write() as session:
            row = self._row(session, FolderRow, folder_id, "folder")
            session.execute(update(ConversationRow).where(ConversationRow.folder_id == row.id).values(folder_id=None))
            session.delete(row)


def _folder(row: FolderRow) -> Folder:
    return Folder(row.id, row.name, row.created)
