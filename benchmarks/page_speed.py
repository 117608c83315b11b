"""How fast the chat page is: first paint, a conversation of 2,000 messages, the first token, and what open pages take.

A real server (`modelworks up`, in a process and a folder of its own) and real Chromium; the engine is a stub that
computes nothing and writes into each token when it was sent, so that no model's speed hides ours. Times are the
browser's own (Paint Timing; a MutationObserver for what is drawn), medians over the rounds. Scrolling goes up
through the conversation a screen at a time; a jump is how far the turn that is being read moves by itself when older
ones are drawn above it. Open pages are websockets that have fetched the page as a browser does; memory is the server
process's.

    python benchmarks/page_speed.py [--rounds 7] [--messages 2000] [--scroll 300] [--pages 100] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS / "web"))
CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TOKENS = 20
"""Of an answer."""
_STARTS_S = 300.0
_FIRST_TOKEN = """(answers) => new Promise((done) => {
  const look = () => {
    const found = /(?<!\\d)0@(\\d+)/.exec([...document.querySelectorAll(answers)].at(-1)?.innerText ?? "");
    if (!found) return;
    watch.disconnect();
    requestAnimationFrame(() => done([found[1], performance.timeOrigin + performance.now()]));
  };
  const watch = new MutationObserver(look);
  watch.observe(document.body, {childList: true, subtree: true, characterData: true});
})"""
_SCROLL = """async (most) => {
  const region = document.querySelector(".thread");
  const frame = () => new Promise(requestAnimationFrame);
  let jump = 0, drawn = 0, slowest = 0;
  for (;;) {
    const turns = region.querySelectorAll(".turn").length;
    region.scrollTop = Math.max(0, region.scrollTop - region.clientHeight);
    await frame();
    const read = document.elementFromPoint(innerWidth / 2, 200)?.closest(".turn");
    const place = read?.getBoundingClientRect().top;
    const began = performance.now();
    if (!region.querySelector(".older:not(.hidden)")) {
      if (region.scrollTop === 0) return {jump, drawn, slowest};
      continue;
    }
    if (drawn >= most) return {jump, drawn, slowest};
    if (region.scrollTop > 3 * region.clientHeight) continue;
    while (region.querySelectorAll(".turn").length === turns && performance.now() - began < 10000) await frame();
    await frame();
    slowest = Math.max(slowest, performance.now() - began);
    drawn = region.querySelectorAll(".turn").length;
    if (read) jump = Math.max(jump, Math.abs(read.getBoundingClientRect().top - place));
  }
}"""


@dataclass(frozen=True)
class Site:
    """A chat to be measured: its address, and where its pages have what is looked at."""

    url: str
    process: psutil.Process
    message: str
    """Where one writes."""
    answers: str
    """What holds an answer's words."""
    conversation: str
    """The path of the long conversation."""


@contextmanager
def engine() -> Iterator[str]:
    """The stub engine; its address."""
    command = [sys.executable, str(TESTS / "serve" / "stub_engine.py"), "--rate", "20", "--tokens", str(TOKENS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


@contextmanager
def server(folder: Path, upstream: str, messages: int) -> Iterator[Site]:
    """`modelworks up` over an engine, with a long conversation."""
    from started import address_of, long_conversation

    (folder / "serve.toml").write_text(f'[engines.stub]\nurl = "{upstream}"\n')
    command = [sys.executable, "-m", "modelworks", "up", "--port", "0", "--no-run", "--no-titles"]
    environment = os.environ | {"MODELWORKS_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("MODELWORKS_DATABASE", None)
    process = subprocess.Popen(
        [*command, "--config", str(folder / "serve.toml")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # open pages that are no browsers don't answer what browsers are asked
        text=True,
    )
    try:
        url = address_of(process, folder)
        long_conversation(folder / "modelworks.db", messages)
        yield Site(url, psutil.Process(process.pid), 'textarea[aria-label="Message"]', ".said", "/c/long")
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def open_webui(program: Path, folder: Path, upstream: str, messages: int) -> Iterator[Site]:
    """Open WebUI over an engine, with the same conversation."""
    from started import long_messages

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    off = ("TITLE_GENERATION", "TAGS_GENERATION", "FOLLOW_UP_GENERATION", "AUTOCOMPLETE_GENERATION", "OLLAMA_API")
    environment = os.environ | {f"ENABLE_{one}": "False" for one in off}
    environment |= {
        "DATA_DIR": str(folder), "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "of this benchmark", "OFFLINE_MODE": "True",
        "OPENAI_API_BASE_URL": upstream, "OPENAI_API_KEY": "none", "BYPASS_EMBEDDING_AND_RETRIEVAL": "True",
    }  # fmt: skip
    command = [str(program), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _STARTS_S
    try:
        with httpx.Client(base_url=url, timeout=60) as http:
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"Open WebUI did not start:\n{(folder / 'log').read_text()[-2000:]}")
                try:
                    if http.get("/health").is_success:
                        break
                except httpx.HTTPError:
                    time.sleep(0.5)
            signed_in = http.post("/api/v1/auths/signin", json={"email": "", "password": ""}).raise_for_status()
            http.headers["Authorization"] = f"Bearer {signed_in.json()['token']}"
            version = http.get("/api/version").json()["version"]
            own = {"version": version, "models": ["stub"]}  # else news of the version stand before the page
            http.post("/api/v1/users/user/settings/update", json={"ui": own}).raise_for_status()
            chat = _as_open_webui_has_it(long_messages(messages))
            kept = http.post("/api/v1/chats/new", json={"chat": chat}).raise_for_status().json()
        yield Site(url, psutil.Process(process.pid), "#chat-input", ".chat-assistant", f"/c/{kept['id']}")
    finally:
        process.terminate()
        process.wait(60)


def _as_open_webui_has_it(said: list[tuple[str, str]]) -> dict[str, Any]:
    messages: dict[str, dict[str, Any]] = {}
    parent: str | None = None
    for role, content in said:
        one = str(uuid.uuid4())
        messages[one] = {"id": one, "parentId": parent, "childrenIds": [], "role": role, "content": content}
        messages[one] |= {"timestamp": int(time.time()), "models": ["stub"]}
        if role == "assistant":
            messages[one] |= {"model": "stub", "modelName": "stub", "modelIdx": 0, "done": True}
        if parent is not None:
            messages[parent]["childrenIds"] = [one]
        parent = one
    history = {"messages": messages, "currentId": parent}
    return {"title": "A long one", "models": ["stub"], "history": history, "messages": list(messages.values())}


def in_a_browser(site: Site, last: str, rounds: int) -> dict[str, Any]:
    """What a reader waits for, in milliseconds, and how much memory it took."""
    from playwright.sync_api import sync_playwright

    paints, ready, opened, tokens = [], [], [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(base_url=site.url, viewport={"width": 1200, "height": 800})
        page.set_default_timeout(120_000)
        for number in range(rounds + 1):  # the first one fills the browser's cache
            page.goto("/")
            page.locator(site.message).wait_for()
            there = page.evaluate("performance.now()")
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            page.wait_for_timeout(1000)  # until it is at rest
            first = page.evaluate_handle(f"(answers) => ({{answer: ({_FIRST_TOKEN})(answers)}})", site.answers)
            page.locator(site.message).fill("Count")
            page.locator(site.message).press("Enter")
            sent_ns, seen_ms = first.evaluate("(asked) => asked.answer")
            clocks_ms = (time.time_ns() - time.monotonic_ns()) / 1e6
            page.locator(site.answers, has_text=f"{TOKENS - 1}@").wait_for()
            page.goto(site.conversation)
            page.locator(site.answers, has_text=last).wait_for()
            drawn = page.evaluate("performance.now()")
            if number:
                paints.append(paint)
                ready.append(there)
                tokens.append(seen_ms - int(sent_ns) / 1e6 - clocks_ms)
                opened.append(drawn)
        rss = sum(one.memory_info().rss for one in [site.process, *site.process.children(recursive=True)])
        browser.close()
    return {
        "first_paint_ms": statistics.median(paints),
        "ready_ms": statistics.median(ready),
        "long_conversation_ms": statistics.median(opened),
        "first_token_ms": statistics.median(tokens),
        "first_token_slowest_ms": max(tokens),
        "rss_mib": rss / 2**20,
    }


def scroll_through(site: Site, last: str, most: int) -> dict[str, Any]:
    """How far a conversation jumps while it is scrolled through, in pixels."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(base_url=site.url, viewport={"width": 1200, "height": 800})
        page.goto(site.conversation)
        page.locator(site.answers, has_text=last).wait_for()
        page.locator(".thread[data-followed]").wait_for()  # it has gone to its end
        scrolled = page.evaluate(_SCROLL, most)
        browser.close()
    return {
        "turns_scrolled": scrolled["drawn"],
        "slowest_older_turns_ms": scrolled["slowest"],
        "jump_px": scrolled["jump"],
    }


async def open_pages(url: str, count: int, process: psutil.Process) -> dict[str, Any]:
    """The server's memory with so many pages of the long conversation open, and without."""
    import socketio

    clients = []
    before = process.memory_info().rss
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for _ in range(count):
            text = (await http.get("/c/long", headers={"Accept": "text/html"})).text
            found = re.search(r"'client_id': '([0-9a-f-]+)', 'next_message_id': (\d+)", text)
            assert found is not None, text[:300]
            query = f"client_id={found[1]}&next_message_id={found[2]}&implicit_handshake=true&document_id=d{found[1]}"
            client = socketio.AsyncClient()
            await client.connect(
                f"{url}?{query}&tab_id=t{found[1]}",
                socketio_path="/_nicegui_ws/socket.io",
                transports=["websocket"],
                headers={"Origin": url},
            )
            clients.append(client)
        await asyncio.sleep(15)  # longer than a page that never came is kept
        connected = sum(client.connected for client in clients)
        after = process.memory_info().rss
        for client in clients:
            await client.disconnect()
    return {"pages": connected, "rss_before_mib": before / 2**20, "rss_with_pages_mib": after / 2**20}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--messages", type=int, default=2000)
    parser.add_argument("--scroll", type=int, default=300, help="turns to scroll through, at least")
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument(
        "--open-webui", type=Path, metavar="PROGRAM", help="also measure it, such as .../bin/open-webui"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    last = f"End of {options.messages // 2 - 1}."
    with engine() as upstream, tempfile.TemporaryDirectory() as name:
        with server(Path(name), upstream, options.messages) as site:
            results = {"load": os.getloadavg()[0], "messages": options.messages}
            results |= in_a_browser(site, last, options.rounds) | scroll_through(site, last, options.scroll)
            results |= asyncio.run(open_pages(site.url, options.pages, site.process))
        if options.open_webui is not None:
            folder = Path(name) / "open-webui"
            folder.mkdir()
            with open_webui(options.open_webui, folder, upstream, options.messages) as site:
                results["open_webui"] = in_a_browser(site, last, options.rounds)
    if options.json:
        print(json.dumps(results, indent=1))
        return
    print(f"a conversation of {options.messages:,} messages; load {results['load']:.1f}")
    _print_waits("Modelworks", results)
    print(
        f"  scrolled through {results['turns_scrolled']:,} turns: largest jump {results['jump_px']:.1f} px, "
        f"slowest older turns {results['slowest_older_turns_ms']:.0f} ms\n"
        f"  {results['pages']} open pages: {results['rss_with_pages_mib']:.0f} MiB "
        f"({results['rss_before_mib']:.0f} before)"
    )
    if other := results.get("open_webui"):
        _print_waits("Open WebUI", other)
        named = {"first_paint_ms": "first paint", "ready_ms": "ready", "first_token_ms": "first token"}
        named |= {"long_conversation_ms": "the long conversation", "rss_mib": "memory"}
        ratios = ", ".join(f"{words} {other[key] / results[key]:.1f}" for key, words in named.items())
        print(f"Open WebUI over Modelworks: {ratios}")


def _print_waits(name: str, found: dict[str, Any]) -> None:
    print(
        f"{name}: first paint {found['first_paint_ms']:.0f} ms, ready {found['ready_ms']:.0f} ms; the long "
        f"conversation {found['long_conversation_ms']:.0f} ms\n"
        f"  first token {found['first_token_ms']:.0f} ms after the engine's "
        f"(slowest {found['first_token_slowest_ms']:.0f}); {found['rss_mib']:.0f} MiB"
    )


if __name__ == "__main__":
    main()
