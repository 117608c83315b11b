"""What routes about conversations have in common: bodies that hold nothing unknown, and what errors become."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict

from modelworks.assistant.owned import NotFoundError
from modelworks.serve.errors import RequestError, UnavailableError
from modelworks.spec.errors import InputError, OperationError


class StrictBody(BaseModel):
    """A body that holds nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


async def asked(work: Callable[..., Any], *arguments: Any) -> Any:
    """What work in a thread gives; what it doesn't find is 404, and what it doesn't accept 400."""
    with refusals():
        return await asyncio.to_thread(work, *arguments)


@contextmanager
def refusals() -> Iterator[None]:
    """What isn't found becomes 404, and what isn't accepted 400."""
    try:
        yield
    except NotFoundError as error:
        raise RequestError(str(error), status=404, code="not_found") from None
    except InputError as error:
        raise RequestError(str(error), code="invalid_value") from None
    except OperationError:
        raise UnavailableError("the conversations can't be reached now") from None
