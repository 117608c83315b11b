"""kill -9 in the middle of writes, again and again: what was acknowledged is there, and answers go on.

`modelworks up` is started over one home folder. Clients begin conversations, ask, and follow the answers by their
messages' ids; at a random moment the server is killed. Then SQLite itself checks the file (``integrity_check``,
``foreign_key_check``), the server is started again, and it is asked for everything that it had acknowledged so far:
each question by its id and words, each answer that had been seen whole, and of each that was cut short no more lost
than what a second brings. Each time one answer that was cut short is taken up by its message's id, and has to go on
from the words that are kept.

    python benchmarks/kill_server.py [--kills 100] [--clients 4] [--model smollm2-135m] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from modelworks.assistant.chat import SAVE_EVERY_S
from modelworks.serve.store import Store

_READY_S = 120.0


@dataclass
class Asked:
    """A question that was acknowledged, and what its client has seen of the answer."""

    chat: str
    text: str
    question_id: int
    answer_id: int
    seen: str = ""
    state: str = "writing"
    seen_at: list[tuple[float, int]] = field(default_factory=list)
    """When so many characters had been seen."""
    killed_at: float = 0.0
    """When the server that was writing it was killed."""

    @property
    def path(self) -> str:
        return f"/v1/chats/{self.chat}/messages/{self.answer_id}"


class Server:
    """`modelworks up` over a home folder."""

    def __init__(self, home: Path) -> None:
        environment = {**os.environ, "MODELWORKS_HOME": str(home)}
        environment.pop("MODELWORKS_DATABASE", None)
        command = [sys.executable, "-m", "modelworks", "up", "--no-run", "--port", "0"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "http" not in line:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {line}{self.process.stdout.read()}")
        self.url = next(word for word in line.split() if word.startswith("http"))
        self.client = httpx.Client(base_url=self.url, timeout=_READY_S, trust_env=False)

    def kill(self) -> float:
        """As the kernel kills; when it was."""
        self.process.kill()
        at = time.monotonic()
        self.process.wait()
        self.client.close()
        return at

    def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """One request; anything but 200 is an error."""
        found: dict[str, Any] = self.client.request(method, path, **options).raise_for_status().json()
        return found

    def follow(self, asked: Asked, most: int | None = None, until: float = float("inf")) -> None:
        """Read an answer from where its client is on: to its end, to so many more characters, or until a time."""
        wanted = len(asked.seen) + most if most is not None else None
        headers = {"Last-Event-ID": str(len(asked.seen))}
        with self.client.stream("GET", f"{asked.path}/events", headers=headers) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    part = json.loads(line[6:])
                    asked.seen = asked.seen[: part["offset"]] + part["text"]
                    asked.state = part["state"]
                    asked.seen_at.append((time.monotonic(), len(asked.seen)))
                if (wanted is not None and len(asked.seen) >= wanted) or time.monotonic() > until:
                    return


def work(server: Server, model: str, number: int, done: list[Asked], chance: random.Random) -> None:
    """One client: it asks, follows for a while, stops the answer and asks again, until the server is gone."""
    try:
        while True:
            chat = server.call("POST", "/v1/chats", json={"model": model})["id"]
            for turn in range(chance.randrange(1, 4)):
                text = f"Client {number}, question {turn}, {chance.random()}: tell a story about number {number}."
                ids = server.call("POST", f"/v1/chats/{chat}/messages", json={"text": text})
                done.append(asked := Asked(chat, text, ids["question_id"], ids["answer_id"]))
                server.follow(asked, until=time.monotonic() + chance.uniform(0.0, 0.6))
                if asked.state == "writing":
                    server.call("POST", f"/v1/chats/{chat}/stop")
                    server.follow(asked)
    except (httpx.HTTPError, httpx.StreamError):
        return


def check_file(file: Path) -> list[str]:
    """What SQLite finds wrong."""
    with sqlite3.connect(file) as connection:
        wrong = [str(row[0]) for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
        wrong += [f"a row of {row[0]} leads nowhere" for row in connection.execute("PRAGMA foreign_key_check")]
    connection.close()
    return wrong


def check(server: Server, asked: list[Asked]) -> list[str]:
    """What was acknowledged and is not there."""
    wrong = []
    for one in asked:
        question = server.client.get(f"/v1/chats/{one.chat}/messages/{one.question_id}")
        if question.status_code != 200 or question.json()["content"] != one.text:
            wrong.append(f"the question {one.question_id} is lost")
            continue
        kept = server.call("GET", one.path)
        if kept["parent_id"] != one.question_id or kept["state"] == "writing":
            wrong.append(f"the answer {one.answer_id} is {kept['state']} behind {kept['parent_id']}")
        elif one.state in {"complete", "stopped"}:
            if (kept["content"], kept["state"]) != (one.seen, one.state):
                wrong.append(f"the answer {one.answer_id} was {one.state} and is another one now")
        elif kept["state"] != "complete":
            # What was seen longer ago than two savings has to be there, and be the same.
            due = max((length for at, length in one.seen_at if at < one.killed_at - 2 * SAVE_EVERY_S), default=0)
            common = min(len(kept["content"]), len(one.seen))
            if kept["content"][:common] != one.seen[:common] or len(kept["content"]) < due:
                wrong.append(f"the answer {one.answer_id} has {len(kept['content'])} characters of {len(one.seen)}")
    return wrong


def resume(server: Server, one: Asked, most: int) -> list[str]:
    """Take up an answer that was cut short; what is wrong with how it goes on."""
    kept = server.call("GET", one.path)["content"]
    server.call("POST", f"{one.path}/resume")
    server.follow(one, most)
    if one.state == "writing":
        server.call("POST", f"/v1/chats/{one.chat}/stop")
        server.follow(one)
    after = server.call("GET", one.path)
    if not after["content"].startswith(kept) or after["content"] != one.seen or after["state"] == "interrupted":
        return [f"the answer {one.answer_id} did not go on from where it was"]
    return [] if len(after["content"]) > len(kept) or after["state"] == "complete" else ["an answer did not go on"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Kill so many times."""
    chance = random.Random(options.seed)
    model_file = Store().path(options.model)
    found: dict[str, Any] = {"kills": 0, "questions": 0, "answers_cut_short": 0, "resumed": 0, "wrong": []}
    everything: list[Asked] = []
    recent: list[Asked] = []
    start_s = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "models").symlink_to(model_file.parents[1])
        for round_ in range(options.kills + 1):
            began = time.monotonic()
            server = Server(home)
            start_s.append(time.monotonic() - began)
            last = round_ == options.kills
            # Everything at the end; on the way what the last kill could have hurt, and some of the rest.
            older = everything if last else chance.sample(everything, min(len(everything), 10))
            found["wrong"] += check(server, recent + older)
            everything += recent
            cut = [one for one in recent if one.state == "writing"]
            found["answers_cut_short"] += len(cut)
            if cut:
                found["wrong"] += resume(server, chance.choice(cut), 40)
                found["resumed"] += 1
            if last:
                server.kill()
                break
            recent = []
            clients = [
                threading.Thread(
                    target=work, args=(server, options.model, number, recent, random.Random(number + round_))
                )
                for number in range(options.clients)
            ]
            for client in clients:
                client.start()
            time.sleep(chance.uniform(0.1, 2.5))
            killed_at = server.kill()
            for client in clients:
                client.join()
            for one in recent:
                one.killed_at = killed_at
            found["wrong"] += check_file(home / "modelworks.db")
            found["kills"] += 1
            found["questions"] += len(recent)
            if not options.json:
                print(f"kill {round_ + 1}: {found['questions']} questions, {len(found['wrong'])} wrong", flush=True)
        found["wrong"] += check_file(home / "modelworks.db")
    found["start_s"] = round(sorted(start_s)[len(start_s) // 2], 2)
    return found


def main() -> None:
    """Kill, and print what was found; ends with 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--model", default="smollm2-135m", help="a stored model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    options = parser.parse_args()
    found = measure(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        f"{found['kills']} kills, {found['questions']} questions acknowledged, {found['answers_cut_short']} answers "
        f"cut short and {found['resumed']} of them taken up again: {len(found['wrong'])} wrong"
    )
    for line in found["wrong"]:
        print(line)
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
