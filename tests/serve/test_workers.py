"""Several workers on one port: they answer together, are measured together, and end and reload together."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gateways import HELLO, Stub, client_of, numbers_of, plain_client, text_of, wait_for

from modelworks.serve.config import ServeConfig
from modelworks.serve.listen import shared_among
from modelworks.spec.fields import validate


class Fleet:
    """`modelworks serve --workers 2` over a stub, in a process of its own."""

    def __init__(self, home: Path, stub: Stub) -> None:
        self.config = home / "serve.toml"
        self.config.write_text(f'drain_s = "10s"\n[engines.a]\nurl = "{stub.url}"\nconcurrency = 8\n')
        self.log = home / "requests.jsonl"
        environment = {**os.environ, "MODELWORKS_HOME": str(home)}
        environment.pop("MODELWORKS_DATABASE", None)
        words = ["serve", "--config", str(self.config), "--workers", "2", "--port", "0", "--log", str(self.log)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelworks", *words], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        found = re.search(r"http://[^/]+", said)
        assert found is not None, said
        self.address = found[0]
        self.http = plain_client(base_url=self.address)
        wait_for(lambda: self.up(), 120)  # a busy machine is not a failure

    def up(self) -> bool:
        try:
            return self.http.get("/health").is_success and len(self.pids()) == 2
        except (OSError, httpx.HTTPError):
            return False

    def pids(self) -> list[int]:
        """The workers that live, without multiprocessing's own tracker."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; on a new connection each time, so by whichever worker."""
        with plain_client(base_url=self.address) as client:
            page = client.get("/metrics").text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name}{{"))


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    stub = Stub("stub")
    yield stub
    stub.end()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, stub: Stub) -> Iterator[Fleet]:
    """One for all, as it takes seconds to start; the last test ends it."""
    fleet = Fleet(tmp_path_factory.mktemp("home"), stub)
    yield fleet
    fleet.http.close()
    if fleet.process.poll() is None:
        fleet.process.send_signal(signal.SIGTERM)
        fleet.process.wait(60)


def ask(address: str) -> list[int]:
    with client_of(address) as client:
        return numbers_of(text_of(client.chat.completions.create(model="stub", messages=HELLO, stream=True)))


def test_workers_answer_are_counted_together_and_one_that_is_killed_is_replaced(fleet: Fleet) -> None:
    for _ in range(12):
        assert ask(fleet.address) == list(range(8))
    assert {fleet.metric("modelworks_requests_total") for _ in range(6)} == {12.0}
    victim = fleet.pids()[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(fleet.pids()) == 2 and victim not in fleet.pids(), 60)
    assert ask(fleet.address) == list(range(8))
    assert fleet.metric("modelworks_requests_total") == 13.0
    lines = [json.loads(line) for line in fleet.log.read_text().splitlines()]
    assert [line["status"] for line in lines if line["message"] == "request"] == [200] * 13
    assert [line["message"] for line in lines if line["from"] == "modelworks.workers"] == [
        "a worker has died (-9); another one begins"
    ]


def test_hangup_has_every_worker_read_the_configuration_again(fleet: Fleet, stub: Stub) -> None:
    fleet.config.write_text(f'[engines.a]\nurl = "{stub.url}"\n[models.renamed]\non = {{ a = "stub" }}\n')
    fleet.process.send_signal(signal.SIGHUP)

    def names() -> set[str]:
        with plain_client(base_url=fleet.address) as client:
            return {model["id"] for model in client.get("/v1/models").json()["data"]}

    wait_for(lambda: all("renamed" in names() for _ in range(8)), 20)


def test_answers_that_run_end_before_the_workers_do(fleet: Fleet, stub: Stub) -> None:
    stub.control(rate=20, tokens=40)  # two seconds
    got: list[list[int]] = []
    threads = [threading.Thread(target=lambda: got.append(ask(fleet.address))) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: stub.seen()["running"] == 4)
    fleet.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert got == [list(range(40))] * 4
    assert fleet.process.wait(30) == 0


def test_workers_are_refused_where_one_process_answers(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text("[engines.here]\nembedded = true\n")
    for words, reason in (
        ([], "without --config"),
        (["--config", str(config)], "engines.here.embedded = true is not accepted with --workers 2"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "modelworks", "serve", "--workers", "2", "--port", "0", *words],
            env={**os.environ, "MODELWORKS_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert reason in " ".join(done.stderr.split())


def test_workers_give_an_engine_together_what_one_would(tmp_path: Path) -> None:
    engines = {"a": {"url": "http://localhost:1/v1", "concurrency": 10}}
    config = validate(ServeConfig, {"engines": engines, "queue": {"waiting": 9}})
    part = shared_among(config, 4)
    assert part.engines["a"].concurrency == 3
    assert part.queue.waiting == 3
