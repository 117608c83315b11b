"""A model behind an OpenAI-compatible API, asked in words and pictures."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Protocol

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from modelworks.spec.errors import InputError, OperationError

KEY = "OPENAI_API_KEY"
"""The environment variable with the API key, where one is needed."""
_ATTEMPTS = 4
_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}


class Chat(Protocol):
    """What answers a question about pictures."""

    def ask(self, content: Sequence[str | bytes], max_tokens: int) -> str:
        """The answer to one message: texts, and pictures as the bytes of their files, in the order given."""


class _BusyError(Exception):
    """The server asks to come again, or hung up."""


class Endpoint:
    """A model of a server.

    Parameters
    ----------
    url
        Up to and including ``/v1``.
    wanted
        The model's name there; the first of the server's if None.
    timeout_s
        For one answer.

    Raises
    ------
    InputError
        If the server has no such model.
    OperationError
        If it does not answer.
    """

    def __init__(self, url: str, wanted: str | None = None, timeout_s: float = 300.0) -> None:
        key = os.environ.get(KEY)
        self._url = url.rstrip("/")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=timeout_s, follow_redirects=False
        )
        listed = self._asked("GET", "/models", None)
        try:
            models = [str(item["id"]) for item in listed["data"]]
        except (KeyError, TypeError):
            raise OperationError(f"{self._url} gave no list of models that can be read") from None
        if wanted and wanted not in models:
            raise InputError(f"{self._url} has no model {wanted!r}: {', '.join(models) or 'none'} are accepted")
        if not models:
            raise InputError(f"{self._url} has no model")
        self._model = wanted or models[0]

    def ask(self, content: Sequence[str | bytes], max_tokens: int) -> str:
        """The likeliest answer to one message, with pictures as data URLs.

        Raises
        ------
        OperationError
            If the server refuses, or does not answer after four attempts.
        """
        message = {"role": "user", "content": [_part(part) for part in content]}
        body = {"model": self._model, "messages": [message], "temperature": 0, "max_tokens": max_tokens}
        answer = self._asked("POST", "/chat/completions", body)
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise OperationError(f"{self._url} gave no answer that can be read") from None

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        attempts = Retrying(
            retry=retry_if_exception_type(_BusyError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.5, max=20),
            reraise=True,
        )
        try:
            return attempts(self._once, method, path, body)
        except _BusyError as error:
            raise OperationError(f"{self._url} does not answer: {error}") from None

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            answer = self._client.request(method, self._url + path, json=body)
        except httpx.InvalidURL as error:
            raise InputError(f"MODEL {self._url} is not accepted: {error}") from None
        except httpx.HTTPError as error:
            raise _BusyError(str(error) or type(error).__name__) from None
        if answer.status_code == 429 or answer.status_code >= 500:
            raise _BusyError(f"it says {answer.status_code}")
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.status_code != 200 or content is None:
            raise OperationError(f"{self._url} refuses: it says {answer.status_code} {_reason(content)}".rstrip())
        return content


def _reason(content: Any) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:300] if message else ""


def _part(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = next((kind for start, kind in _KINDS.items() if part.startswith(start)), "png")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{b64encode(part).decode()}"}}
