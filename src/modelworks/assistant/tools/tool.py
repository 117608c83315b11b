"""One tool: what a model is told of it, what its arguments must be, and how it is called."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from modelworks.assistant.documents.library import Library
from modelworks.spec.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a tool is called: in a conversation, with the documents that its user may see."""

    conversation_id: str
    library: Library | None


@dataclass(frozen=True)
class Tool:
    """Something that a model can ask for.

    Parameters
    ----------
    name
        Letters, digits, dash and underscore.
    parameters
        The JSON schema of its arguments, an object.
    call
        Does it; an `InputError` or an `OperationError` is told the model in its words.
    asks
        Whether the person is asked before each call.
    stranger
        Whether its result can hold words of somebody who is neither the user nor the operator.
    checked
        Whether arguments are held against the schema here. A stranger's schema can name addresses to be fetched, and
        patterns and references that are never done with: who wrote it holds them against it.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    call: Callable[[dict[str, Any], Place], Awaitable[str]]
    asks: bool = False
    stranger: bool = False
    checked: bool = True

    @property
    def offered(self) -> dict[str, Any]:
        """As OpenAI's API describes a tool."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def arguments(self, given: str) -> dict[str, Any]:
        """The arguments that a model has written, as values.

        Raises
        ------
        InputError
            If they aren't JSON, or not what the schema says.
        """
        from jsonschema import Draft202012Validator, ValidationError

        try:
            arguments = json.loads(given or "{}")
        except (ValueError, RecursionError):
            raise InputError(f"the arguments of {self.name} are not JSON: {given[:200]!r}") from None
        if not isinstance(arguments, dict):
            raise InputError(f"the arguments of {self.name} don't fit: an object is accepted")
        if not self.checked:
            return arguments
        try:
            Draft202012Validator(self.parameters).validate(arguments)
        except ValidationError as error:
            where = "".join(f".{part}" for part in error.absolute_path)
            raise InputError(
                f"the arguments of {self.name} don't fit: arguments{where}: {error.message[:300]}"
            ) from None
        return arguments
