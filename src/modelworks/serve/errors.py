"""What an API request can end with, as exceptions that carry their HTTP status and OpenAI's error code."""

from __future__ import annotations

from typing import Any

from modelworks.spec.errors import InputError, OperationError

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestError(InputError):
    """A request that can't be answered as it was asked.

    Parameters
    ----------
    message : str
        One sentence for the developer who sent it.
    status : int
        The HTTP status, 4xx.
    code : str
        OpenAI's machine-readable code, such as ``context_length_exceeded``.
    param : str
        The field at fault.
    retry_after_s : float, optional
        When the same request may be accepted, in seconds from now; sent as ``Retry-After``.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class UnknownModelError(RequestError):
    """No model of that name is served (404)."""

    def __init__(self, name: str, known: list[str]) -> None:
        accepted = (
            f"served are {', '.join(known)}" if known else "none is stored yet; modelworks models pull fetches one"
        )
        super().__init__(
            f"the model {name!r} does not exist: {accepted}", status=404, code="model_not_found", param="model"
        )


class UnavailableError(OperationError):
    """Something behind the gateway, mostly an engine, that did not begin to answer: another, or it later, may (503).

    Parameters
    ----------
    message : str
        One sentence; it names the engine, and never its address or key.
    busy_s : float, optional
        If it refused because it has too much to do: the seconds after which it wants to be asked again.
    """

    def __init__(self, message: str, busy_s: float | None = None) -> None:
        super().__init__(message)
        self.busy_s = busy_s


def error_body(error: Exception) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind, code, param = "server_error", None, None
    if isinstance(error, RequestError):
        kind = _KINDS.get(error.status, "invalid_request_error")
        code, param = error.code, error.param
    elif isinstance(error, UnavailableError):
        code = "unavailable"
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}
