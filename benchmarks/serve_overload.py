"""What becomes of the gateway's users when three times as much is asked as its engine can answer.

A stub engine that answers so many requests at once, each in a known time, so that its capacity is known; the gateway,
started as a user starts it, with accounts; and this client, over HTTP. Requests come at random times that don't
depend on the answers (a Poisson process for each user), first half as many as can be answered, then three times as
many, then half as many again. In the overload three users ask for most of it, and four for little.

Written down are, for each user, what was asked for, answered and refused, and its fair part: what max-min fairness
gives it of all that was answered (who asks for less than an equal part gets all of it, the others share the rest); how
long a refusal took and what it said of when to come back; and how long after the overload's end requests still were
refused or waited longer than a second and twice as long as 99 of 100 did before it.

    python benchmarks/serve_overload.py [--seconds 20] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from modelworks.assistant.accounts import Accounts
from modelworks.assistant.database import Database

_STUB = Path(__file__).parents[1] / "tests" / "serve" / "stub_engine.py"
SHARES = {"flood": 0.5, "much": 0.3, "more": 0.14, "a": 0.015, "b": 0.015, "c": 0.015, "d": 0.015}
"""Whose requests they are."""
CALM = 0.5
_BODY = {"model": "stub", "messages": [{"role": "user", "content": "Count."}], "stream": True}


@dataclass(frozen=True)
class Asked:
    """One request: when it was sent, and what came of it, in seconds."""

    user: str
    sent: float
    status: int
    answered: float
    """From its sending to its status."""
    first: float | None
    """From its sending to its first token."""
    ended: float
    retry_after: str | None
    whole: bool


class Load:
    """All requests of one run."""

    def __init__(self, address: str, keys: dict[str, str], seed: int) -> None:
        self.asked: list[Asked] = []
        self._address, self._keys = address, keys
        self._chance = random.Random(seed)

    async def run(self, phases: list[tuple[float, float]]) -> list[float]:
        """Ask, so many requests a second for so many seconds, one phase after the other.

        Returns
        -------
        list of float
            When each phase began, and the last one's end.
        """
        began, bounds, tasks = time.monotonic(), [0.0], []
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(self._address, connector=connector, timeout=timeout) as session:
            for rate, seconds in phases:
                bounds.append(bounds[-1] + seconds)
                for due, user in self._arrivals(rate, bounds[-2], bounds[-1]):
                    await asyncio.sleep(max(0.0, began + due - time.monotonic()))
                    tasks.append(asyncio.create_task(self._ask(session, user, began)))
            await asyncio.gather(*tasks)
        return bounds

    def _arrivals(self, rate: float, start: float, end: float) -> list[tuple[float, str]]:
        found = []
        for user, share in SHARES.items():
            due = start + self._chance.expovariate(rate * share)
            while due < end:
                found.append((due, user))
                due += self._chance.expovariate(rate * share)
        return sorted(found)

    async def _ask(self, session: aiohttp.ClientSession, user: str, began: float) -> None:
        headers = {"Authorization": f"Bearer {self._keys[user]}"}
        sent = time.monotonic()
        first, last = None, b""
        async with session.post("/v1/chat/completions", json=_BODY, headers=headers) as answer:
            answered = time.monotonic() - sent
            async for block in answer.content.iter_any():
                first = first or time.monotonic() - sent
                last = (last + block)[-100:]
        self.asked.append(
            Asked(
                user,
                sent - began,
                answer.status,
                answered,
                first if answer.status == 200 else None,
                time.monotonic() - sent,
                answer.headers.get("Retry-After"),
                b"[DONE]" in last,
            )
        )


def fair_parts(wanted: dict[str, float], total: float) -> dict[str, float]:
    """What max-min fairness gives each, of a total: nobody more than wanted, and nobody less for another's more."""
    parts: dict[str, float] = {}
    left = total
    for user in sorted(wanted, key=wanted.__getitem__):
        parts[user] = min(wanted[user], left / (len(wanted) - len(parts)))
        left -= parts[user]
    return parts


def figures(asked: list[Asked], bounds: list[float]) -> dict[str, Any]:
    """What a run shows; `bounds` are the calm's, the overload's and the recovery's beginning and the end."""
    before = [one for one in asked if one.sent < bounds[1]]
    during = [one for one in asked if bounds[1] <= one.sent < bounds[2]]
    after = [one for one in asked if one.sent >= bounds[2]]
    wanted = Counter(one.user for one in during)
    answered = Counter(one.user for one in during if one.status == 200)
    fair = fair_parts({user: float(wanted[user]) for user in SHARES}, answered.total())
    refusals = [one for one in asked if one.status == 429]
    late = max(1.0, 2 * _percentile([one.first for one in before if one.first is not None], 99))
    slow = [one.sent for one in after if one.status != 200 or (one.first or 0.0) > late]
    said = [float(one.retry_after) for one in refusals if one.retry_after]
    return {
        "statuses": dict(Counter(one.status for one in asked)),
        "cut_short": sum(one.status == 200 and not one.whole for one in asked),
        "users": {
            user: {
                "asked": wanted[user],
                "answered": answered[user],
                "refused": wanted[user] - answered[user],
                "fair": round(fair[user], 1),
                "of_fair": round(answered[user] / fair[user], 3) if fair[user] else None,
                "first_token_s": _spread([one.first for one in during if one.user == user and one.first is not None]),
            }
            for user in SHARES
        },
        "refusal_s": _spread([one.answered for one in refusals]),
        "refusals_without_retry_after": sum(one.retry_after is None for one in refusals),
        "retry_after_s": [min(said), max(said)] if said else None,
        "first_token_before_s": _spread([one.first for one in before if one.first is not None]),
        "late_is_s": round(late, 3),
        "recovery_s": round(max(slow) - bounds[2], 3) if slow else 0.0,
    }


def _percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else 0.0


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": round(_percentile(values, 50), 4), "p99": round(_percentile(values, 99), 4)}


@contextmanager
def gateway(
    folder: Path,
    users: list[str],
    concurrency: int,
    answer_s: float,
    waiting: int,
    scopes: Sequence[str] = ("generate",),
) -> Iterator[tuple[str, dict[str, str], int]]:
    """A gateway with accounts before a stub engine: its address, the users' keys, its process."""
    rate = 20.0
    stub = [sys.executable, str(_STUB), "--rate", str(rate), "--tokens", str(max(1, round(answer_s * rate)))]
    database = Database(folder / "modelworks.db")
    accounts, keys = Accounts(database), {}
    accounts.set_tier("load", ["models=['*']", "parallel=100000"])
    for user in users:
        accounts.add_user(user, tier="load", admin="admin" in scopes)
        keys[user] = accounts.create_key(user, scopes=scopes)[1]
    database.close()
    with _process(stub) as engine:
        config = folder / "serve.toml"
        config.write_text(
            f'[engines.stub]\nurl = "http://127.0.0.1:{int(_line(engine))}/v1"\nconcurrency = {concurrency}\n'
            f"[queue]\nwaiting = {waiting}\n"
        )
        environment = {**os.environ, "MODELWORKS_HOME": str(folder)}
        environment.pop("MODELWORKS_DATABASE", None)
        serve = [sys.executable, "-m", "modelworks", "serve", "--config", str(config), "--port", "0"]
        with _process(serve, environment) as server:
            address = next(word for word in _line(server).split() if word.startswith("http"))
            yield address.removesuffix("/v1"), keys, server.pid


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        raise RuntimeError("a process of the benchmark ended before it was ready")
    return line


@contextmanager
def _process(command: list[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Calm, overload, calm."""
    capacity = options.concurrency / options.answer_s
    with tempfile.TemporaryDirectory() as folder:
        served = gateway(Path(folder), list(SHARES), options.concurrency, options.answer_s, options.waiting)
        with served as (address, keys, _):
            load = Load(address, keys, options.seed)
            calm = CALM * capacity, options.calm_seconds
            bounds = asyncio.run(load.run([calm, (options.times * capacity, options.seconds), calm]))
    found = {"capacity_per_s": capacity, "times": options.times, "waiting": options.waiting, "seconds": options.seconds}
    during = [one for one in load.asked if bounds[1] <= one.sent < bounds[2] and one.status == 200]
    found["answered_per_s"] = round(len(during) / options.seconds, 1)
    return found | figures(load.asked, bounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=24, help="requests that the engine answers at once")
    parser.add_argument("--answer-s", type=float, default=1.0, help="how long an answer takes")
    parser.add_argument("--times", type=float, default=3.0, help="the overload, in capacities")
    parser.add_argument("--waiting", type=int, default=48, help="requests that may wait in the gateway")
    parser.add_argument("--seconds", type=float, default=20.0, help="of overload")
    parser.add_argument("--calm-seconds", type=float, default=10.0, help="before it, and after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"capacity {found['capacity_per_s']:g} answers/s, {found['times']:g} times as many asked for")
    print(f"answered in the overload: {found['answered_per_s']:g} a second; statuses {found['statuses']}")
    print(
        f"{'user':8}{'asked':>8}{'answered':>10}{'refused':>9}{'fair part':>11}{'first token, s: median':>24}{'p99':>8}"
    )
    for user, row in found["users"].items():
        first = row["first_token_s"]
        print(
            f"{user:8}{row['asked']:8}{row['answered']:10}{row['refused']:9}{row['fair']:11.1f}"
            f"{first.get('median', float('nan')):24.3f}{first.get('p99', float('nan')):8.3f}"
        )
    refusal = found["refusal_s"]
    if refusal:
        low, high = found["retry_after_s"]
        print(
            f"a refusal took {refusal['median']} s (median) and {refusal['p99']} s (p99); Retry-After {low:g}-{high:g}"
        )
    print(f"as before {found['recovery_s']:g} s after its end")


if __name__ == "__main__":
    main()
