"""What the gateway adds to each token when many chats stream through it at once; loopback only.

Four kinds of processes: stub engines that send tokens at a steady rate and write into each when it was sent; the
gateway, started as a user starts it; this client, over bare sockets; and, if it is asked for, other gateways on the
same stub. First the client streams from the stub itself, then through one gateway after the other. A token's delay is
the time from its sending to its receipt; what a gateway adds to it is the difference to the direct one. What it adds to
a gap is how much later than its predecessor a token comes than it was sent later: positive and negative cancel out over
a stream, so the absolute value is taken. Streams per core are the tokens that came through in a second, divided by a
stream's rate and by the cores that the gateway used: so one that can't keep up is counted by what it did.

    python benchmarks/serve_load.py [--streams 200] [--seconds 60] [--rate 50] [--json]
    python benchmarks/serve_load.py --litellm /path/to/bin/litellm
    python benchmarks/serve_load.py --stub-port 9000 --beside open-webui=http://127.0.0.1:3000/api --pid PID --key KEY

LiteLLM's proxy is started before the stub with one worker, as ours has one process; another gateway has to stand
before a stub with the port given by ``--stub-port`` already. `pip install 'litellm[proxy]'` belongs into an environment
of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import psutil

_STUB = Path(__file__).parents[1] / "tests" / "serve" / "stub_engine.py"
_TOKEN = re.compile(rb'"content": ?"(\d+)@(\d+) "')
_WARM_UP_S = 3.0
_GRACE_S = 10.0
"""How much later than it is due an answer may end."""


class Chat(asyncio.Protocol):
    """One client: it asks, reads to the end, and asks again until the time is up."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: Any = None
        self._rest = b""
        self._next = 0
        self._last: tuple[int, int] | None = None
        self.finished = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        """Ask."""
        self._transport = transport
        transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        """Note each token's delay, and whether it is the one that was due."""
        now = time.monotonic_ns()
        load = self._load
        text = self._rest + data
        end = 0
        for found in _TOKEN.finditer(text):
            number, sent = int(found[1]), int(found[2])
            load.misplaced += number != self._next
            self._next = number + 1
            if now >= load.measure_from_ns:
                load.in_time += now < load.until_ns
                load.delays.append((now - sent) / 1e6)
                if self._last is not None and number:
                    load.gaps.append(abs((now - self._last[0]) - (sent - self._last[1])) / 1e6)
            self._last = (now, sent)
            end = found.end()
        self._rest = text[end:][-400:]
        if b"[DONE]" in self._rest:
            load.misplaced += self._next != load.tokens
            load.answers += 1
            self._rest, self._next, self._last = b"", 0, None
            if time.monotonic() < load.until:
                asyncio.get_running_loop().call_later(0.005, self._transport.write, load.request)
            else:
                self._transport.close()

    def leave(self) -> None:
        """End an answer that has not come to its end in time."""
        if not self.finished.done():
            self._load.unfinished += 1
            self._next = 0
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """The end, or something wrong."""
        if not self.finished.done():
            self._load.broken += bool(error or self._next)
            self.finished.set_result(None)


class Load:
    """One measurement against one server."""

    def __init__(self, url: str, tokens: int, seconds: float, rate: float, key: str, model: str) -> None:
        place = urlsplit(url)
        self.address = place.hostname or "127.0.0.1", place.port or 80
        self.tokens, self.seconds, self.rate = tokens, seconds, rate
        body = {"model": model, "messages": [{"role": "user", "content": "Count."}], "max_tokens": tokens}
        content = json.dumps(body | {"stream": True}).encode()
        head = f"POST {place.path}/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self.request = head.encode() + content
        self.delays, self.gaps = array("f"), array("f")
        self.answers = self.misplaced = self.broken = self.unfinished = 0
        self.in_time = 0
        self.until, self.until_ns = 0.0, 0
        self.measure_from_ns = 0

    async def run(self, streams: int, process: psutil.Process | None) -> dict[str, Any]:
        """Stream, and give the figures."""
        loop = asyncio.get_running_loop()
        self.measure_from_ns = time.monotonic_ns() + int(_WARM_UP_S * 1e9)
        self.until = time.monotonic() + _WARM_UP_S + self.seconds
        self.until_ns = int(self.until * 1e9)
        chats = []
        for _ in range(streams):
            _, chat = await loop.create_connection(lambda: Chat(self), *self.address)
            chats.append(chat)
            await asyncio.sleep(1 / streams)  # so that tokens don't come in step
        watching = asyncio.create_task(_watch(process, self.until))
        # A gateway that can't keep up has so much to catch up on that its answers would take minutes to end.
        longest_s = self.until - time.monotonic() + self.tokens / self.rate + _GRACE_S
        await asyncio.wait([chat.finished for chat in chats], timeout=longest_s)
        for chat in chats:
            chat.leave()
        await asyncio.gather(*(chat.finished for chat in chats))
        memory, cpu = await watching
        delays, gaps = np.frombuffer(self.delays, np.float32), np.frombuffer(self.gaps, np.float32)
        figures: dict[str, Any] = {
            "tokens": len(delays),
            "answers": self.answers,
            "lost_or_reordered": self.misplaced,
            "broken": self.broken,
            "unfinished": self.unfinished,
            "delay_ms": _spread(delays),
            "gap_ms": _spread(gaps),
        }
        if process is not None:
            through = self.in_time / self.seconds / self.rate
            per_core = round(through / cpu, 1) if cpu else None
            figures |= {"cores": cpu, "memory_mb": memory, "streams": round(through, 1), "streams_per_core": per_core}
        return figures


async def _watch(process: psutil.Process | None, until: float) -> tuple[list[float], float]:
    """Memory in MB after the warm-up and at the end, and cores used in between."""
    await asyncio.sleep(_WARM_UP_S)
    if process is None:
        return [], 0.0
    everyone = [process, *process.children(recursive=True)]
    began, cpu = time.monotonic(), sum(sum(one.cpu_times()[:2]) for one in everyone)
    memory = [sum(one.memory_info().rss for one in everyone) / 1e6]
    while time.monotonic() < until - 0.5:
        await asyncio.sleep(min(1.0, max(until - 0.5 - time.monotonic(), 0.01)))
    memory.append(sum(one.memory_info().rss for one in everyone) / 1e6)
    used = sum(sum(one.cpu_times()[:2]) for one in everyone) - cpu
    return [round(value, 1) for value in memory], round(used / (time.monotonic() - began), 3)


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    named = {"median": 50, "p99": 99, "p999": 99.9}
    spread = {name: round(float(np.percentile(values, share)), 3) for name, share in named.items()}
    return spread | {"max": round(float(values.max()), 3)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The stub by itself, the gateway on it, and the other gateway on it."""
    tokens = max(1, int(options.rate * options.answer_seconds))
    stub_command = [sys.executable, str(_STUB), "--rate", str(options.rate), "--tokens", str(tokens)]
    with tempfile.TemporaryDirectory() as folder, _Process([*stub_command, "--port", str(options.stub_port)]) as stub:
        port = int(stub.line())
        config = Path(folder) / "serve.toml"
        config.write_text(f'[engines.stub]\nurl = "http://127.0.0.1:{port}/v1"\nconcurrency = 100_000\n')
        command = [sys.executable, "-m", "modelworks", "serve", "--config", str(config), "--port", "0"]
        command += ["--workers", str(options.workers)]
        results: dict[str, Any] = {}

        def run(name: str, url: str, pid: int | None, key: str = "none", model: str = "stub") -> None:
            seconds = min(options.seconds, 20) if name == "direct" else options.seconds
            load = Load(url, tokens, seconds, options.rate, key, model)
            results[name] = asyncio.run(load.run(options.streams, psutil.Process(pid) if pid else None))
            if not options.json:
                print(f"{name}: {json.dumps(results[name])}", flush=True)

        run("direct", f"http://127.0.0.1:{port}/v1", None)
        with _Process(command) as gateway:
            url = next(word for word in gateway.line().split() if word.startswith("http"))
            time.sleep(1)
            run("gateway", url, gateway.pid)
        if options.litellm:
            with litellm(options.litellm, port, Path(folder)) as (process, url):
                run("litellm", url, process.pid)
        if options.beside:
            name, _, url = options.beside.partition("=")
            run(name, url, options.pid, options.key, options.model)
    for name in set(results) - {"direct"}:
        for figure in ("delay_ms", "gap_ms"):
            results[name][f"added_{figure}"] = {
                share: round(results[name][figure][share] - results["direct"][figure][share], 3)
                for share in ("median", "p99")
            }
        own, per_core = results["gateway"]["streams_per_core"], results[name].get("streams_per_core")
        if name != "gateway" and own and per_core:
            results[name]["gateway_is_ahead"] = round(own / per_core, 2)
    return {"streams": options.streams, "rate": options.rate, "seconds": options.seconds} | results


@contextmanager
def litellm(executable: Path, stub_port: int, folder: Path) -> Iterator[tuple[_Process, str]]:
    """LiteLLM's proxy before the stub, and its address."""
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n  - model_name: stub\n    litellm_params:\n      model: openai/stub\n"
        f"      api_base: http://127.0.0.1:{stub_port}/v1\n      api_key: none\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Its list of prices is its own, and not fetched from elsewhere; it asks for no key, as ours doesn't.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    environment["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"
    environment.pop("PYTHONPATH", None)
    command = [str(executable), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with _Process(command, environment, quiet=True) as process:
        until = time.monotonic() + 600
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5):
                    break
            except OSError:
                if process.ended or time.monotonic() > until:
                    raise RuntimeError("LiteLLM's proxy ended, or is not ready after ten minutes") from None
                time.sleep(0.5)
        yield process, f"http://127.0.0.1:{port}/v1"


class _Process:
    """A process that says one line when it is ready, or nothing that is listened to, and is ended with the block."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, quiet: bool = False) -> None:
        out, errors = (subprocess.DEVNULL, subprocess.DEVNULL) if quiet else (subprocess.PIPE, None)
        self._process = subprocess.Popen(command, stdout=out, stderr=errors, text=True, env=environment)
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("a process of the benchmark ended before it was ready")
        return line

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens per second of each stream")
    parser.add_argument("--answer-seconds", type=float, default=10.0, help="length of each answer")
    parser.add_argument("--workers", type=int, default=1, help="processes of the gateway")
    parser.add_argument("--stub-port", type=int, default=0)
    parser.add_argument("--litellm", type=Path, metavar="EXECUTABLE", help="LiteLLM's, to be measured as well")
    parser.add_argument("--beside", metavar="NAME=URL", help="another gateway on the same stub, by its base URL")
    parser.add_argument("--pid", type=int, help="its process, for memory and processor time")
    parser.add_argument("--key", default="none", help="a key for it")
    parser.add_argument("--model", default="stub", help="the stub's model as it names it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure(options)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for name, row in results.items():
        if not isinstance(row, dict) or name == "direct":
            continue
        print(
            f"{name} adds to a token's delay {row['added_delay_ms']['median']} ms (median) and "
            f"{row['added_delay_ms']['p99']} ms (p99), to a gap {row['added_gap_ms']['median']} and "
            f"{row['added_gap_ms']['p99']} ms; {row['lost_or_reordered']} of {row['tokens']:,} tokens lost or reordered"
        )
        if "gateway_is_ahead" in row:
            per_core = results["gateway"]["streams_per_core"], row["streams_per_core"]
            print(f"streams per core: {per_core[0]}, {name} {per_core[1]}; {row['gateway_is_ahead']} times as many")


if __name__ == "__main__":
    main()
