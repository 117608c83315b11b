"""An engine elsewhere: a server that speaks OpenAI's API, such as vLLM, SGLang, another Modelworks or xAI.

Every answer is asked for as a stream, also one that is sent whole, so that hanging up ends it there at once. Events
are passed on as they came, several at a time when several have come. What happens before the first of them is
`UnavailableError`, and may be tried again elsewhere; what happens after it ends the answer.

Its address and key are the operator's. Redirects are not followed, so that the key goes nowhere else, and neither
address nor key is in an error's text.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import suppress
from itertools import takewhile
from typing import Any

import aiohttp
import orjson

from modelworks.serve.config import EngineConfig
from modelworks.serve.engine import Activity, Endpoint, Engine, ModelCard
from modelworks.serve.errors import RequestError, UnavailableError, UnknownModelError
from modelworks.serve.events import Events
from modelworks.spec.errors import OperationError

_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_UNKNOWN_CONTEXT = 8192
_LONGEST_REASON = 500
_LONGEST_LIST = 4 << 20
_LONGEST_REFUSAL = 1 << 16
_END_S = 1.0
"""How long the end of a body may take after its last event, if the connection is to be kept."""
_OUR_FAULT = {401, 402, 403, 404, 405, 407, 408, 409, 421, 425}
"""Refusals that say something of the gateway's configuration or of the moment, not of the request."""


class UpstreamEngine(Engine):
    """One engine behind an OpenAI-compatible API.

    Parameters
    ----------
    name : str
        The operator's name for it, which errors and figures carry.
    config : EngineConfig
        Its address, key, models and times.
    """

    def __init__(self, name: str, config: EngineConfig) -> None:
        assert config.url is not None
        self.name = name
        self._config = config
        self._url = config.url
        self._headers = {"Authorization": f"Bearer {config.key}"} if config.key_env else {}
        self._session: aiohttp.ClientSession | None = None
        self._cards = {name: _card(name, {}) for name in config.models or []}
        self._running: Counter[str] = Counter()
        self._endings: set[asyncio.Task[None]] = set()

    def activity(self) -> dict[str, Activity]:
        """Answers that run there for us; those that wait there can't be seen from here."""
        return {model: Activity(count, 0) for model, count in self._running.items()}

    async def models(self) -> list[ModelCard]:
        """The models of the last check; before it, those that the configuration names."""
        return list(self._cards.values())

    async def card(self, model: str) -> ModelCard:
        """One of the models."""
        if model not in self._cards:
            raise UnknownModelError(model, sorted(self._cards))
        return self._cards[model]

    async def check(self) -> None:
        """Ask for its list of models.

        Raises
        ------
        UnavailableError
            If it doesn't answer in time, or with something else.
        """
        timeout = aiohttp.ClientTimeout(total=self._config.connect_s)
        try:
            async with self._open().get(self._url + "/models", timeout=timeout, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise UnavailableError(f"the engine {self.name} answers {answer.status} when asked for its models")
                content = await _read(answer, _LONGEST_LIST)
            listed = {str(item["id"]): item for item in orjson.loads(content)["data"]}
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnavailableError(f"the engine {self.name} can't be reached: {_reason(error)}") from None
        except (ValueError, KeyError, TypeError):
            raise UnavailableError(f"the engine {self.name} gave no list of models that can be read") from None
        wanted = self._config.models if self._config.models is not None else list(listed)
        self._cards = {name: _card(name, listed.get(name, {})) for name in wanted}

    async def stream(self, endpoint: Endpoint, model: str, body: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        """Answer a request; see `Engine.stream`."""
        asked = orjson.dumps({**body, "model": model, "stream": True, "stream_options": {"include_usage": True}})
        self._running[model] += 1
        answer = silence = None
        events = Events()
        try:
            try:
                async with asyncio.timeout(self._config.first_token_s):
                    answer = await self._post(_PATHS[endpoint], asked)
                    batch: list[str] = []
                    while not batch and not events.ended:
                        batch = _next(events, await answer.content.readany())
            except (aiohttp.ClientError, TimeoutError, OperationError) as error:
                raise self._unavailable(error) from None
            if not batch:
                raise UnavailableError(f"the engine {self.name} ended its answer before it began")
            if failed := next(filter(_is_error, batch), None):  # before anybody has heard a word
                raise self._refusal(500, failed.encode())
            silence = _Silence(answer, self._config.stall_s)
            while True:
                sound = list(takewhile(lambda chunk: not _is_error(chunk), batch))
                if sound:
                    yield sound
                if len(sound) < len(batch):
                    raise OperationError(f"the engine {self.name} failed in the middle of its answer")
                if events.ended:
                    return
                try:
                    silence.begins()
                    block = await answer.content.readany()
                    silence.ends()
                    batch = _next(events, block)
                except (aiohttp.ClientError, OperationError):
                    what = "broke off"
                    if silence.too_long:
                        what = f"said nothing for {self._config.stall_s:g} s"
                    raise OperationError(f"the engine {self.name} {what} in the middle of its answer") from None
        finally:
            self._running[model] -= 1
            if silence is not None:
                silence.close()
            if answer is not None:
                self._let_go(answer, events.ended)

    async def embed(self, model: str, texts: list[str]) -> tuple[list[list[float]], int]:
        """Vectors from there, scaled to unit length there or not at all."""
        asked = orjson.dumps({"model": model, "input": texts, "encoding_format": "float"})
        self._running[model] += 1
        try:
            async with asyncio.timeout(self._config.first_token_s):
                answer = await self._post("/embeddings", asked)
                async with answer:
                    given = orjson.loads(await answer.read())
            vectors = [item["embedding"] for item in sorted(given["data"], key=lambda item: item["index"])]
            return vectors, int((given.get("usage") or {}).get("prompt_tokens", 0))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unavailable(error) from None
        except (ValueError, KeyError, TypeError):
            raise UnavailableError(f"the engine {self.name} gave no vectors that can be read") from None
        finally:
            self._running[model] -= 1

    def _let_go(self, answer: aiohttp.ClientResponse, ended: bool) -> None:
        """Keep an answer's connection for another request, but only if nothing more comes over it: after its last event
        the end of its body is still on the way."""
        if not ended:
            answer.close()
        elif answer.content.at_eof():
            answer.release()
        else:
            ending = asyncio.create_task(_to_end(answer))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # Not limited here: the gateway's queue decides how much an engine is given.
            connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=30, keepalive_timeout=30)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._config.connect_s)
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=timeout,
                headers={**self._headers, "Accept-Encoding": "identity"},
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session

    async def _post(self, path: str, content: bytes) -> aiohttp.ClientResponse:
        """The answer to a request, its body still to be read.

        Raises
        ------
        RequestError
            If the request is refused for what it says.
        UnavailableError
            If it is refused for another reason.
        """
        headers = {"Content-Type": "application/json"}
        answer = await self._open().post(self._url + path, data=content, headers=headers, allow_redirects=False)
        if answer.status == 200:
            return answer
        try:
            refusal = await _read(answer, _LONGEST_REFUSAL)
        finally:
            answer.close()
        raise self._refusal(answer.status, refusal, answer.headers.get("Retry-After"))

    def _refusal(self, status: int, content: bytes, retry_after: str | None = None) -> Exception:
        if status == 429 or (status == 503 and retry_after):
            return UnavailableError(f"the engine {self.name} has too much to do", busy_s=_seconds(retry_after))
        try:
            error = orjson.loads(content)
            error = error.get("error", error)
            reason, code, param = str(error.get("message", error)), error.get("code"), error.get("param")
        except (ValueError, AttributeError):
            return UnavailableError(f"the engine {self.name} answers {status}")
        inner = code if isinstance(code, int) else status
        if not 400 <= inner < 500 or inner in _OUR_FAULT:
            return UnavailableError(f"the engine {self.name} answers {inner}")
        # vLLM has the status where OpenAI has the code, and says in words alone that a prompt is too long.
        code = code if isinstance(code, str) and not code.isdigit() else None
        if code is None and re.search(r"maximum context length|context size", reason):
            code = "context_length_exceeded"
        known = {"code": code, "param": param if isinstance(param, str) else None}
        return RequestError(reason[:_LONGEST_REASON], status=inner, **known)

    def _unavailable(self, error: Exception) -> UnavailableError:
        if isinstance(error, UnavailableError):
            return error
        if isinstance(error, aiohttp.ClientConnectorError | TimeoutError):
            return UnavailableError(f"the engine {self.name} can't be reached: {_reason(error)}")
        return UnavailableError(f"the engine {self.name} broke off before its answer began")


class _Silence:
    """Hangs up on an engine that has been waited for too long.

    One timer runs for the whole answer: to set one for each token costs as much as to read it.

    Parameters
    ----------
    answer : aiohttp.ClientResponse
        What is read.
    longest_s : float
        How long the engine may say nothing while it is read from.
    """

    def __init__(self, answer: aiohttp.ClientResponse, longest_s: float) -> None:
        self._answer, self._longest_s = answer, longest_s
        self._loop = asyncio.get_running_loop()
        self._began = math.inf
        self._timer = self._loop.call_later(longest_s, self._look)
        self.too_long = False

    def begins(self) -> None:
        """It is waited for the engine from now on."""
        self._began = self._loop.time()

    def ends(self) -> None:
        """It has said something."""
        self._began = math.inf

    def close(self) -> None:
        """Nothing more is waited for."""
        self._timer.cancel()

    def _look(self) -> None:
        left_s = min(self._began + self._longest_s - self._loop.time(), self._longest_s)
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
            return
        self.too_long = True
        self._answer.close()


async def _to_end(answer: aiohttp.ClientResponse) -> None:
    """Wait for the end of a body that has said everything, but not for long."""
    with suppress(aiohttp.ClientError, TimeoutError):
        async with asyncio.timeout(_END_S):
            if not await answer.content.readany():
                answer.release()
                return
    answer.close()


async def _read(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, or its beginning if it is longer than the limit."""
    content = b""
    async for block in answer.content.iter_any():
        content += block
        if len(content) > limit:
            break
    return content[:limit]


def _next(events: Events, block: bytes) -> list[str]:
    """The events in what has come; no bytes at all mean that the connection has ended."""
    if not block and not events.ended:
        raise OperationError("the connection ended")
    return events.take(block)


def _is_error(chunk: str) -> bool:
    """Whether a chunk is an error; a quote inside generated text is escaped and can't match."""
    return chunk.startswith(('{"error"', '{"object":"error"'))


def _reason(error: Exception) -> str:
    """Why a connection failed, without the address."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or type(error.os_error).__name__
    return type(error).__name__


def _seconds(retry_after: str | None) -> float:
    try:
        return min(max(float(retry_after or 1), 0.1), 3600)
    except ValueError:
        return 1.0


def _card(name: str, listed: dict[str, Any]) -> ModelCard:
    """A model as the engine's list has it: vLLM and SGLang state the context as ``max_model_len``."""
    context = listed.get("max_model_len") or listed.get("context_length") or listed.get("context_window")
    created = listed.get("created")
    return ModelCard(
        name,
        context if isinstance(context, int) and context > 0 else _UNKNOWN_CONTEXT,
        created if isinstance(created, int) else 0,
        str(listed.get("owned_by") or "unknown")[:128],
        str(listed.get("license") or "unknown")[:128],
        tools=True,
    )
