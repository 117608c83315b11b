"""llama.cpp inside this process, through `xllamacpp`.

Each model is loaded when it is first asked for, and the one that was used longest ago makes room for it. A model has
a number of slots; a request waits for one here rather than inside llama.cpp, since a request that waits here can be
called off at any moment. A running request has a thread, in which llama.cpp calls back with each chunk as JSON text;
chunks cross to the event loop untouched, several at once when it is busy. A callback that returns true ends the
request: during the reading of the prompt (`return_progress`, batches of 256 tokens) as well as during the answer.

llama.cpp also opens an HTTP port on the loopback interface, which can't be turned off; it is given a random key that
nobody else knows.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when the library is loaded

from modelworks.serve.engine import Activity, Endpoint, Engine, ModelCard
from modelworks.serve.errors import RequestError
from modelworks.serve.seeing import TileSize, with_fitted_images
from modelworks.serve.store import ServedModel, Store
from modelworks.serve.toolcalls import ToolPrompt
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.gguf_header import GgufHeader, read_gguf_header

try:
    import xllamacpp  # type: ignore[import-untyped]
except ImportError as error:
    if "libgomp" not in str(error):
        raise
    raise OperationError(
        "llama.cpp needs the OpenMP library libgomp.so.1, which isn't on this machine; Debian's package is libgomp1"
    ) from None

_PREFILL_BATCH = 256
_EMBEDDING_CONTEXT = 2048
_RANDOM_SEED = 0xFFFFFFFF
_PASSED_ON = {
    *("messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed", "cache_prompt"),
    *("presence_penalty", "frequency_penalty", "repeat_penalty", "logit_bias", "logprobs", "top_logprobs"),
    *("response_format", "tools", "tool_choice"),
}


@dataclass(frozen=True)
class EngineSettings:
    """How models are loaded.

    Parameters
    ----------
    slots : int
        Chats that a model answers at once; more wait.
    threads : int, optional
        Threads that compute; default is one less than the machine's cores. llama.cpp's threads spin: with as many as
        there are cores, anything else that runs slows it a hundredfold.
    context : int
        Tokens per chat, at most (a model trained on less has less).
    memory_bytes : int, optional
        What loaded models may take together; default is half of the machine's memory.
    """

    slots: int = 4
    threads: int | None = None
    context: int = 4096
    memory_bytes: int | None = None

    @property
    def thread_count(self) -> int:
        """Threads that compute."""
        return self.threads or max(1, (psutil.cpu_count(logical=False) or 1) - 1)

    @property
    def memory_limit(self) -> int:
        """Bytes that loaded models may take together."""
        return self.memory_bytes or int(psutil.virtual_memory().total) // 2


class _Loaded:
    """One model in memory."""

    def __init__(
        self,
        server: Any,
        slots: int,
        size: int,
        tools: bool,
        adapters: Sequence[str] = (),
        tiles: TileSize | None = None,
    ) -> None:
        self.server = server
        self.adapters = adapters
        self.tiles = tiles
        self.slots = asyncio.Semaphore(slots)
        self.bytes = size
        self.tools = tools
        self.users = 0
        self.threads = ThreadPoolExecutor(slots, thread_name_prefix="llama.cpp")

    def scales(self, model: str) -> list[dict[str, Any]]:
        """How much of each adapter a request for a model has. All are named: what is not keeps the last request's."""
        return [{"id": number, "scale": float(name == model)} for number, name in enumerate(self.adapters)]


class _Flow:
    """Chunks on their way from llama.cpp's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[str] = deque()
        self._ready = asyncio.Event()
        self._woken = False
        self.cancelled = False
        self.ended = False

    def push(self, chunk: str) -> bool:
        """Take a chunk, in llama.cpp's thread; true asks it to stop."""
        if '"prompt_progress":' not in chunk:  # a quote inside generated text is escaped and can't match
            self._chunks.append(chunk)
            if not self._woken:
                self._woken = True
                self._loop.call_soon_threadsafe(self._ready.set)
        return self.cancelled

    def end(self, _: object) -> None:
        """No more chunks come."""
        self.ended = True
        self._ready.set()

    async def batches(self) -> AsyncGenerator[list[str], None]:
        """What has come since the last time, until the end."""
        while True:
            await self._ready.wait()
            ended = self.ended
            self._ready.clear()
            self._woken = False
            batch = []
            while self._chunks:
                batch.append(self._chunks.popleft())
            if batch:
                yield batch
            if ended:
                return


class LlamaCppEngine(Engine):
    """Serves the models of a store.

    Parameters
    ----------
    store : Store
        Where the GGUF files are.
    settings : EngineSettings
        Slots, threads, context and memory.
    """

    def __init__(self, store: Store, settings: EngineSettings | None = None) -> None:
        self.store = store
        self.settings = settings or EngineSettings()
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._loading = asyncio.Lock()
        self._idle = asyncio.Event()
        self._flows: set[_Flow] = set()
        self._running: set[asyncio.Future[None]] = set()
        self._headers: dict[str, GgufHeader] = {}
        self._busy: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()

    def activity(self) -> dict[str, Activity]:
        """Slots in use and requests waiting, by model."""
        return {name: Activity(count, self._waiting[name]) for name, count in self._busy.items()}

    async def models(self) -> list[ModelCard]:
        """The store's models."""
        found = []
        for model in self.store.list():
            with suppress(InputError):  # an adapter whose model is gone
                found.append(self._card(model))
        return found

    async def card(self, model: str) -> ModelCard:
        """One of the store's models."""
        return self._card(self.store.get(model))

    def _card(self, model: ServedModel) -> ModelCard:
        header = self._header(model)
        context = min(self.settings.context, header.context)
        return ModelCard(
            model.name,
            context,
            model.created,
            model.source,
            model.license,
            tools="tools" in header.chat_template,
            images=bool(self.store.base(model).eyes_bytes),
            title=model.title,
        )

    def _header(self, model: ServedModel) -> GgufHeader:
        """What the model's file says, or the one's that it adapts."""
        base = self.store.base(model)
        if base.sha256 not in self._headers:
            self._headers[base.sha256] = read_gguf_header(self.store.path(base.name), arrays=False)
        return self._headers[base.sha256]

    async def load(self, model: str) -> None:
        """Load a model now."""
        async with self._lease(self.store.get(model)):
            pass

    async def stream(self, endpoint: Endpoint, model: str, body: dict[str, Any]) -> AsyncGenerator[list[str], None]:
        """Answer a request; see `Engine.stream`."""
        if endpoint == "chat" and not body.get("messages"):
            raise RequestError("messages is empty: at least one message is needed", param="messages")
        async with self._lease(self.store.get(model)) as loaded:
            if endpoint == "chat":
                body = await asyncio.to_thread(with_fitted_images, body, loaded.tiles)
            described = ToolPrompt.of(body) if endpoint == "chat" and not loaded.tools else None
            text = _request(described.body if described else body, loaded.scales(model))
            handle = loaded.server.handle_chat_completions if endpoint == "chat" else loaded.server.handle_completions
            await self._take_slot(model, loaded)
            batches = self._run(model, loaded, handle, text)
            async with aclosing(described.translate(batches) if described else batches) as translated:
                async for batch in translated:
                    yield batch

    async def _take_slot(self, model: str, loaded: _Loaded) -> None:
        self._waiting[model] += 1
        try:
            await loaded.slots.acquire()
        finally:
            self._waiting[model] -= 1

    async def _run(
        self, model: str, loaded: _Loaded, handle: Callable[..., Any], text: str
    ) -> AsyncGenerator[list[str], None]:
        """Run one request, which has a slot, in a thread; the slot is free when the thread has ended."""
        flow = _Flow()
        work = asyncio.get_running_loop().run_in_executor(loaded.threads, _call, handle, text, flow)
        self._flows.add(flow)
        self._busy[model] += 1
        self._running.add(work)

        def ended(_: object) -> None:
            loaded.slots.release()
            self._busy[model] -= 1
            self._flows.discard(flow)
            self._running.discard(work)

        work.add_done_callback(ended)
        work.add_done_callback(flow.end)
        try:
            async for batch in flow.batches():
                if any(chunk.startswith('{"error"') for chunk in batch):
                    raise _failure(batch)
                yield batch
            await work
        finally:
            flow.cancelled = True
            if work.done() and not work.cancelled():
                work.exception()

    async def embed(self, model: str, texts: list[str]) -> tuple[list[list[float]], int]:
        """The mean of the last layer's states over each text's tokens, scaled to unit length."""
        async with self._lease(self.store.get(model), embedding=True) as loaded, loaded.slots:
            request = json.dumps({"model": model, "input": texts})
            work = asyncio.get_running_loop().run_in_executor(loaded.threads, loaded.server.handle_embeddings, request)
            try:
                answer = json.loads(await asyncio.shield(work))
            except (ValueError, RuntimeError) as error:
                raise RequestError(str(error), param="input") from None
        if "error" in answer:
            raise _embedding_failure(answer["error"])
        vectors = sorted(answer["data"], key=lambda item: item["index"])
        return [item["embedding"] for item in vectors], answer["usage"]["prompt_tokens"]

    async def close(self) -> None:
        """Stop all answers and free all models."""
        for flow in self._flows:
            flow.cancelled = True
        if self._running:
            await asyncio.wait(self._running)
        async with self._loading:
            while self._loaded:
                await self._unload(next(iter(self._loaded)))

    @asynccontextmanager
    async def _lease(self, model: ServedModel, embedding: bool = False) -> AsyncIterator[_Loaded]:
        """The model in memory, which stays there as long as the lease is held. Its adapters are there with it."""
        if embedding and model.adapts is not None:
            raise RequestError(
                f"{model.name} is an adapter, and adapters don't embed: {model.adapts} does",
                code="embeddings_not_supported",
                param="model",
            )
        base = self.store.base(model)
        adapters = [] if embedding else self.store.adapters(base)
        seeing = [] if embedding or base.eyes_sha256 is None else [base.eyes_sha256]
        parts = [base.sha256, *seeing, *(one.sha256 for one in adapters), *(["embedding"] if embedding else [])]
        key = "+".join(parts)
        while key not in self._loaded:
            async with self._loading:
                if key not in self._loaded:
                    await self._load(key, base, adapters, embedding)
        loaded = self._loaded[key]
        self._loaded.move_to_end(key)
        loaded.users += 1
        try:
            yield loaded
        finally:
            loaded.users -= 1
            self._idle.set()

    async def _load(self, key: str, model: ServedModel, adapters: list[ServedModel], embedding: bool) -> None:
        path = self.store.path(model.name)
        header = await asyncio.to_thread(read_gguf_header, path, arrays=False)
        context, slots = min(self.settings.context, header.context), self.settings.slots
        if embedding:
            context, slots = min(_EMBEDDING_CONTEXT, header.context), 1
        size = header.bytes + context * slots * header.kv_bytes_per_token + sum(one.bytes for one in adapters)
        eyes = None if embedding else self.store.eyes(model)
        size += 0 if eyes is None else model.eyes_bytes
        await self._make_room(size)
        parameters = _parameters(model.name, str(path), slots, context, self.settings.thread_count, embedding)
        tiles = None
        if eyes is not None:
            tiles = TileSize.of(await asyncio.to_thread(read_gguf_header, eyes, arrays=False))
            parameters.mmproj.path = str(eyes)
        parameters.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(str(self.store.path(one.name)), 0.0) for one in adapters
        ]
        parameters.lora_init_without_apply = True
        try:
            server = await asyncio.to_thread(_started, parameters)
        except (RuntimeError, ValueError) as error:
            raise OperationError(f"llama.cpp cannot load the model {model.name} from {path}: {error}") from None
        names = [one.name for one in adapters]
        self._loaded[key] = _Loaded(server, slots, size, "tools" in header.chat_template, names, tiles)

    async def _make_room(self, size: int) -> None:
        """Unload idle models, the longest unused first, until there is room or nothing is left to unload."""
        while self._loaded and sum(one.bytes for one in self._loaded.values()) + size > self.settings.memory_limit:
            idle = [key for key, one in self._loaded.items() if not one.users]
            if idle:
                await self._unload(idle[0])
            else:
                self._idle.clear()
                await self._idle.wait()

    async def _unload(self, key: str) -> None:
        loaded = self._loaded.pop(key)
        await asyncio.to_thread(loaded.threads.shutdown)
        del loaded.server


def _parameters(name: str, path: str, slots: int, context: int, threads: int, embedding: bool) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.model_alias = {name}
    parameters.n_parallel = slots
    parameters.n_ctx = context * slots
    parameters.n_batch = parameters.n_ubatch = context if embedding else _PREFILL_BATCH
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.embedding = embedding
    if embedding:
        parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    parameters.api_keys = [secrets.token_urlsafe(32)]
    parameters.endpoint_slots = parameters.ui = parameters.fit_params = parameters.warmup = False
    parameters.cache_ram_mib = 0
    parameters.verbosity = 0
    return parameters


def _started(parameters: Any) -> Any:
    """A server of llama.cpp that has answered once.

    One that is freed before its own loop has begun, as when whoever asked for it is gone, waits for that loop for ever.
    """
    server = xllamacpp.Server(parameters)
    if parameters.embedding:
        server.handle_embeddings(json.dumps({"input": "a"}))
    else:
        server.handle_completions(json.dumps({"prompt": "a", "max_tokens": 0}), lambda _: None)
    return server


def _call(handle: Callable[..., Any], text: str, flow: _Flow) -> None:
    """Answer one request in this thread. What llama.cpp raises, it raises while it reads the request."""
    try:
        handle(text, flow.push)
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"the request was not understood: {error}") from None


def _request(body: dict[str, Any], adapters: list[dict[str, Any]]) -> str:
    """An OpenAI request as llama.cpp takes it; only known fields are passed on."""
    request = {key: value for key, value in body.items() if key in _PASSED_ON and value is not None}
    if body.get("max_completion_tokens") is not None:
        request["max_tokens"] = body["max_completion_tokens"]
    if "seed" in request:
        request["seed"] = request["seed"] % _RANDOM_SEED
        request.setdefault("cache_prompt", False)  # the batches that the prompt was read in change the last bits
    if adapters:
        request["lora"] = adapters
    request |= {"stream": True, "return_progress": True, "stream_options": {"include_usage": True}}
    return json.dumps(request)


def _failure(batch: list[str]) -> Exception:
    error = json.loads(next(chunk for chunk in batch if chunk.startswith('{"error"')))["error"]
    message = str(error.get("message", error))
    if error.get("type") == "exceed_context_size_error":
        return context_exceeded(error.get("n_prompt_tokens"), error.get("n_ctx"))
    if error.get("code", 500) < 500:
        return RequestError(message)
    return OperationError(f"llama.cpp failed: {message}")


def _embedding_failure(error: dict[str, Any]) -> Exception:
    message = str(error.get("message", error))
    if "too large to process" in message:
        return RequestError(
            f"an input is longer than {_EMBEDDING_CONTEXT} tokens: {message.partition('.')[0]}",
            code="context_length_exceeded",
            param="input",
        )
    if error.get("code") == 501 or error.get("code", 500) < 500:
        return RequestError(f"this model can't embed: {message}", code="embeddings_not_supported", param="model")
    return OperationError(f"llama.cpp failed: {message}")


def context_exceeded(tokens: int | None, context: int | None) -> RequestError:
    """The error of a prompt that has more tokens than the model's context."""
    return RequestError(
        f"this model's maximum context length is {context} tokens and the prompt has {tokens}: shorten it",
        code="context_length_exceeded",
        param="messages",
    )
