"""What our API costs on top of llama.cpp: time to first token and tokens/s at 1, 4 and 16 chats.

Two servers in processes of their own, with the same file, slots, threads, context and batch: ours (FastAPI over the
embedded engine) and llama.cpp's own HTTP server. A third process is the client: it streams over bare sockets and looks
at no more than it must. Rounds alternate between the servers, the order changing from round to round; a figure is the
median of the rounds' figures. A prompt is never repeated within a server (its first words differ), so that neither
has it in its cache, and both servers get the same prompts.

    python benchmarks/serve_overhead.py [--rounds 8] [--tokens 48] [--threads 1] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
CHATS = (1, 4, 16)
CONTEXT = 512
BATCH = 256
TOPICS = ("rivers", "bread", "clocks", "birds", "music", "glass", "trains", "maps")


def ours(pipe: Connection, slots: int, threads: int) -> None:
    """Serve through our API until the pipe speaks."""
    import threading

    import uvicorn

    from modelworks.serve.api import create_app
    from modelworks.serve.listen import open_port
    from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
    from modelworks.serve.store import Store

    store = Store()
    engine = LlamaCppEngine(store, EngineSettings(slots=slots, threads=threads, context=CONTEXT))
    server = uvicorn.Server(uvicorn.Config(create_app(engine, store, preload=MODEL), log_level="warning"))
    listener = open_port("127.0.0.1", 0)

    def attend() -> None:
        while not server.started:
            time.sleep(0.05)
        pipe.send(("127.0.0.1", listener.getsockname()[1]))
        pipe.recv()
        server.should_exit = True

    threading.Thread(target=attend, daemon=True).start()
    server.run([listener])


def llama_cpp(pipe: Connection, slots: int, threads: int, file: str) -> None:
    """Serve through llama.cpp's own HTTP server until the pipe speaks."""
    import os

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.model_alias = {MODEL}
    parameters.n_parallel, parameters.n_ctx = slots, CONTEXT * slots
    parameters.n_batch = parameters.n_ubatch = BATCH
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.fit_params = parameters.warmup = parameters.ui = parameters.endpoint_slots = False
    parameters.cache_ram_mib = parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    host, port = server.listening_address.removeprefix("http://").split(":")
    pipe.send((host, int(port)))
    pipe.recv()
    del server


def client(pipe: Connection) -> None:
    """Take `(address, bodies)`, stream all at once, give `(times to first token, tokens, seconds)`."""
    while (job := pipe.recv()) is not None:
        pipe.send(asyncio.run(_round(*job)))


async def _round(address: tuple[str, int], bodies: list[bytes]) -> tuple[list[float], int, float]:
    started = time.perf_counter()
    results = await asyncio.gather(*(_stream(address, body) for body in bodies))
    seconds = time.perf_counter() - started
    return [first for first, _ in results], sum(tokens for _, tokens in results), seconds


async def _stream(address: tuple[str, int], body: bytes) -> tuple[float, int]:
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += "Content-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    first, received = 0.0, bytearray()
    while block := await reader.read(1 << 16):
        received += block
        if not first and b'"content":"' in received:
            first = time.perf_counter() - started
    writer.close()
    if b"[DONE]" not in received or not received.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"no whole answer: {bytes(received[:300])!r}")
    return first, received.count(b'"content":"')


def bodies(round_number: int, count: int, tokens: int) -> list[bytes]:
    """One round's requests: the same for both servers, none with another's beginning."""
    made = []
    for index in range(count):
        topic = TOPICS[index % len(TOPICS)]
        text = f"Part {round_number}-{count}-{index}: write a long story about {topic}, with many people in it."
        messages = [{"role": "system", "content": f"{topic} {round_number} {count}"}, {"role": "user", "content": text}]
        request = {"model": MODEL, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
        made.append(json.dumps(request).encode())
    return made


class Process:
    """A process of the benchmark and the pipe to it."""

    def __init__(self, work: Any, *arguments: Any) -> None:
        self.pipe, other = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=work, args=(other, *arguments))
        self._process.start()

    def end(self) -> None:
        """Let it end by itself, or end it."""
        self.pipe.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()


def measure(chats: int, slots: int, rounds: int, tokens: int, threads: int, file: Path) -> dict[str, Any]:
    """Both servers' medians at one number of chats, and the ratios (over 1 is better for us)."""
    servers = {"ours": Process(ours, slots, threads), "llama.cpp": Process(llama_cpp, slots, threads, str(file))}
    asking = Process(client)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    try:
        addresses = {name: server.pipe.recv() for name, server in servers.items()}
        for number in range(rounds + 1):  # the first one warms both up
            order = list(servers) if number % 2 else list(servers)[::-1]
            for name in order:
                asking.pipe.send((addresses[name], bodies(number, chats, tokens)))
                firsts, count, seconds = asking.pipe.recv()
                if number:
                    results[name].append((statistics.mean(firsts), count / seconds))
    finally:
        for process in (*servers.values(), asking):
            process.end()
    row: dict[str, Any] = {"chats": chats, "slots": slots}
    for name, figures in results.items():
        row[name] = {
            "ttft_s": statistics.median(first for first, _ in figures),
            "tokens_per_s": statistics.median(rate for _, rate in figures),
        }
    pairs = list(zip(results["ours"], results["llama.cpp"], strict=True))
    row["ttft_ratio"] = statistics.median(own[0] / other[0] for own, other in pairs)
    row["tokens_per_s_ratio"] = statistics.median(own[1] / other[1] for own, other in pairs)
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, help="slots of both servers; default: one per chat")
    parser.add_argument("--chats", type=int, nargs="+", default=CHATS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    from modelworks.serve.store import Store

    store = Store()
    store.pull(MODEL)
    rows = []
    for chats in options.chats:
        slots = options.slots or chats
        row = measure(chats, slots, options.rounds, options.tokens, options.threads, store.path(MODEL))
        rows.append(row)
        if not options.json:
            own, other = row["ours"], row["llama.cpp"]
            print(
                f"{chats:3} chats: first token {own['ttft_s'] * 1e3:7.1f} ms against {other['ttft_s'] * 1e3:7.1f} ms "
                f"({row['ttft_ratio']:.3f}x), {own['tokens_per_s']:6.1f} tokens/s against "
                f"{other['tokens_per_s']:6.1f} ({row['tokens_per_s_ratio']:.3f}x)",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
