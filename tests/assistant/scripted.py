"""An engine behind a real HTTP API that answers with what a test has written: words, calls of tools, or both."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Line = str | list[tuple[str, str]] | tuple[str, list[tuple[str, str]]]


class Scripted:
    """Answers each request with the next of its lines; `asked` are the bodies that have come."""

    def __init__(self, model: str = "scripted") -> None:
        self.lines: list[Line] = []
        self.asked: list[dict[str, Any]] = []
        self.most: int | None = None
        """Characters of all messages that it takes."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Nothing."""

            def do_GET(self) -> None:
                self._send("application/json", json.dumps({"data": [{"id": model, "object": "model"}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.most is not None and sum(len(one["content"]) for one in body["messages"]) > outer.most:
                    error = {"message": "it is too long", "code": "context_length_exceeded"}
                    self._send("application/json", json.dumps({"error": error}).encode(), 400)
                    return
                outer.asked.append(body)
                line = outer.lines.pop(0) if outer.lines else "I have nothing to say."
                events = [*map(_chunk, _deltas(line)), _chunk({}, "stop" if isinstance(line, str) else "tool_calls")]
                events.append({**_chunk({}), "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}})
                sent = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
                self._send("text/event-stream", sent.encode())

            def _send(self, kind: str, content: bytes, status: int = 200) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def end(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _deltas(line: Line) -> list[dict[str, Any]]:
    if isinstance(line, tuple):
        return [*_deltas(line[0]), *_deltas(line[1])]
    if isinstance(line, str):
        return [{"content": word} for word in line.split(" ")[:1]] + [
            {"content": f" {word}"} for word in line.split(" ")[1:]
        ]
    deltas: list[dict[str, Any]] = []
    for index, (name, arguments) in enumerate(line):
        begin = {"index": index, "id": f"x{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        halves = (arguments[: len(arguments) // 2], arguments[len(arguments) // 2 :])
        deltas += [{"tool_calls": [begin]}]
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": half}}]} for half in halves]
    return deltas


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "scripted", "choices": [choice]}
