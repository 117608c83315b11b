"""An engine that computes nothing: it speaks as much of OpenAI's API as the gateway asks for, at a given rate.

Each token says when it was sent (``time.monotonic_ns``, one clock for all processes of a machine) and its number, so
that whoever receives it knows its delay and whether one is missing. It also fails on demand, for tests:
``POST /control`` takes what it shall do from now on, ``GET /seen`` tells what has happened. With ``says`` its tokens
are words of that text.

    python tests/serve/stub_engine.py [--port 0] [--rate 50] [--tokens 32] [--model stub]

Faults: ``none``, ``refuse`` (500), ``redirect`` (302 to ``elsewhere``), ``busy`` (429), ``silent`` (never answers),
``die`` (hangs up at once), ``break`` (hangs up after three tokens), ``stall`` (says nothing after three tokens),
``bad`` (400), ``error`` (an error after three tokens), ``error at once`` (two of them come with it).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class State:
    """What all connections share."""

    def __init__(self, rate: float, tokens: int, models: list[str]) -> None:
        self.rate, self.tokens, self.models = rate, tokens, models
        self.fault, self.elsewhere, self.says = "none", "", ""
        self.seen: dict[str, Any] = {"connections": 0, "requests": 0, "running": 0, "finished": 0, "gone": 0}
        self.last: dict[str, Any] = {}
        self.authorization = ""


class Connection(asyncio.Protocol):
    """One connection: requests one after the other."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._received = b""
        self._said = b""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._streaming = False

    def connection_made(self, transport: Any) -> None:
        """Somebody calls."""
        self._transport = transport
        self._state.seen["connections"] += 1

    def connection_lost(self, _: Exception | None) -> None:
        """They have hung up."""
        if self._timer:
            self._timer.cancel()
        if self._streaming:
            self._end("gone")

    def data_received(self, data: bytes) -> None:
        """Take whole requests out of what has come."""
        self._received += data
        while (cut := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:cut].decode("latin-1").split("\r\n")
            fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            end = cut + 4 + int(fields.get("content-length", 0))
            if len(self._received) < end:
                return
            body, self._received = self._received[cut + 4 : end], self._received[end:]
            method, path, _ = head[0].split(" ")
            if method == "POST" and path.startswith("/v1"):
                self._state.authorization = fields.get("authorization", "")
            self._answer(method, path, json.loads(body) if body else {})

    def _answer(self, method: str, path: str, asked: dict[str, Any]) -> None:
        state = self._state
        if path == "/control":
            state.fault = asked.get("fault", state.fault)
            state.elsewhere = asked.get("elsewhere", state.elsewhere)
            state.says = asked.get("says", state.says)
            state.rate = asked.get("rate", state.rate)
            state.tokens = asked.get("tokens", state.tokens)
            self._send({})
        elif path == "/seen":
            self._send(state.seen | {"last": state.last, "authorization": state.authorization})
        elif state.fault == "silent":
            return
        elif state.fault == "die":
            self._transport.abort()
        elif method == "GET" and path == "/v1/models":
            data = [{"id": name, "object": "model", "created": 1, "max_model_len": 4096} for name in state.models]
            self._send({"object": "list", "data": data}, 500 if state.fault == "refuse" else 200)
        elif path == "/v1/embeddings":
            data = [{"index": index, "embedding": [1.0, 0.0]} for index, _ in enumerate(asked["input"])]
            self._send({"data": data, "usage": {"prompt_tokens": len(data)}})
        else:
            self._generate(asked)

    def _send(self, content: Any, status: int = 200, extra: str = "") -> None:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)

    def _generate(self, asked: dict[str, Any]) -> None:
        state = self._state
        state.last = asked
        state.seen["requests"] += 1
        match state.fault:
            case "refuse":
                self._send({"error": {"message": "out of memory at /srv/secret"}}, 500)
            case "redirect":
                self._send({}, 302, f"Location: {state.elsewhere}\r\n")
            case "busy":
                self._send({"error": {"message": "busy"}}, 429, "Retry-After: 7\r\n")
            case "bad":
                self._send({"error": {"message": "temperature is too hot", "code": 400, "param": "temperature"}}, 400)
            case _:
                self._transport.write(_HEAD)
                self._streaming = True
                state.seen["running"] += 1
                model = json.dumps(asked["model"])
                chat = "messages" in asked
                kind = "chat.completion.chunk" if chat else "text_completion"
                start = f'{{"id":"stub-1","object":"{kind}","created":1,"model":{model},'
                longest = len(state.says.split()) or state.tokens
                tokens = min(asked.get("max_tokens") or longest, longest)
                self._token(start, chat, 0, tokens, asyncio.get_running_loop().time())

    def _token(self, start: str, chat: bool, number: int, tokens: int, due: float) -> None:
        state = self._state
        if number == 3 and state.fault in {"break", "stall", "error", "error at once"}:
            if state.fault == "break":
                self._transport.abort()
            elif state.fault != "stall":
                self._event('{"error":{"message":"CUDA error at /srv/secret","code":500}}')
            return
        if number < tokens:
            words = state.says.split()
            text = json.dumps(f"{words[number]} ") if words else f'"{number}@{time.monotonic_ns()} "'
            part = f'"delta":{{"content":{text}}}' if chat else f'"text":{text}'
            self._event(f'{start}"choices":[{{"index":0,{part},"finish_reason":null}}],"usage":null}}')
            due += 1 / state.rate
            next_token = (self._token, start, chat, number + 1, tokens, due)
            self._timer = asyncio.get_running_loop().call_at(due, *next_token)
            return
        part = '"delta":{}' if chat else '"text":""'
        self._event(f'{start}"choices":[{{"index":0,{part},"finish_reason":"stop"}}],"usage":null}}')
        usage = f'{{"prompt_tokens":5,"completion_tokens":{tokens},"total_tokens":{tokens + 5}}}'
        self._event(f'{start}"choices":[],"usage":{usage}}}')
        self._event("[DONE]")
        self._transport.write(b"0\r\n\r\n")
        self._end("finished")

    def _event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self._said += b"%x\r\n%b\r\n" % (len(event), event)
        if self._state.fault != "error at once" or '"error"' in data or '"0@' in data:
            self._transport.write(self._said)
            self._said = b""

    def _end(self, how: str) -> None:
        self._streaming = False
        self._state.seen["running"] -= 1
        self._state.seen[how] += 1


async def run(state: State, port: int) -> None:
    """Serve until the process ends; the port is printed."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(state), "127.0.0.1", port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Read the options and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens per second of each stream")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer, at most")
    parser.add_argument("--model", action="append", help="a model that it lists; may be given again")
    options = parser.parse_args()
    state = State(options.rate, options.tokens, options.model or ["stub"])
    try:
        import uvloop

        uvloop.run(run(state, options.port))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
