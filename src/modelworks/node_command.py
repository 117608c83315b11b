"""What an engine runs on each node: ``python -m modelworks.node_command FOLDER --nodes N --meet HOST:PORT``.

Node 0 holds the run's folder: it prepares the data, reports, and releases, as `modelworks train` does on one machine.
The others lend their processes. The folder is on a file system that all nodes share, and holds the spec; a run always
goes on from its last checkpoint if it has one. How a node ended is its exit code and stands in its log as well, where
the engine finds it: 0 finished or saved, 2 bad input, 3 work that would fail anywhere, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import signal
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from modelworks.launch.losses import LostError
from modelworks.launch.submission import NodeLog
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.fields import validate
from modelworks.spec.run import RunSpec
from modelworks.train.interrupt import Interrupt, Interrupted
from modelworks.train.record import LOCK, RunRecord

if TYPE_CHECKING:
    from modelworks.launch.meeting import Meeting

_NODE_VARIABLES = ("SLURM_NODEID", "JOB_COMPLETION_INDEX", "MODELWORKS_NODE")
"""Where engines say which node this is."""
_PREDECESSOR_S = 120.0
"""How long the process of an earlier attempt may take to leave the run's folder."""
_FAILS_ANYWHERE, _MAY_SUCCEED = 3, 1
_BEAT_S = 5.0


def main(arguments: list[str]) -> int:
    """Take part in a run until it ends; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    given = _parser().parse_args(arguments)
    log = NodeLog(given.folder, given.name, given.attempt)
    code, words = _MAY_SUCCEED, None
    try:
        if given.with_parent:
            _end_with_parent()
        with _beating(given.heartbeat):
            log.write("began")
            code = _take_part(given, log)
    except Interrupted as stop:
        code, words = 0, str(stop)
    except InputError as error:
        code, words = 2, str(error)
    except OperationError as error:
        code = _MAY_SUCCEED if isinstance(error, LostError) else _FAILS_ANYWHERE
        words = str(error)
    finally:
        if words is not None:
            print(f"{given.name}: {words}", file=sys.stderr)
        with contextlib.suppress(OSError):
            log.write("ended", code, words)
    return code


def _take_part(given: argparse.Namespace, log: NodeLog) -> int:
    from modelworks.launch.meeting import Meeting, Place

    host, _, port = given.meet.rpartition(":")
    place = Place(given.nodes, given.node, host, int(port), given.attempt, given.topology)
    spec = validate(RunSpec, tomllib.loads((given.folder / "run.toml").read_text(encoding="utf-8")), str(given.folder))
    if place.first:
        return _hold(given.folder, spec, Meeting(place, log) if place.nodes > 1 else None)
    from modelworks.train.worker import FINAL_CODES
    from modelworks.train_command import attend

    meeting = Meeting(place, log)
    with Interrupt() as interrupt:
        meeting.wait_until_ready()
        failure = attend(RunRecord(given.folder), interrupt, resume=True, look=lambda: None, meeting=meeting)
    if failure is None or interrupt.received is not None:
        return 0
    kind = FINAL_CODES.get(failure.exit_code, LostError)
    raise kind(str(failure))


def _hold(folder: Path, spec: RunSpec, meeting: Meeting | None) -> int:
    """Node 0's part: the run as a whole."""
    from modelworks.train.view import NoView
    from modelworks.train_command import train_and_release

    try:
        with FileLock(folder / LOCK, timeout=_PREDECESSOR_S):
            pass
    except Timeout:
        raise LostError(f"another process is still at work in {folder}") from None
    result, _ = train_and_release(spec, resume=True, view=NoView(), say=_say, meeting=meeting)
    _say(f"{spec.name} {result.state} after {result.step:,} steps")
    return 0


@contextlib.contextmanager
def _beating(path: Path | None) -> Iterator[None]:
    """Touch a file every few seconds meanwhile, for probes of whether this process is alive."""
    if path is None:
        yield
        return
    done = threading.Event()

    def beat() -> None:
        while True:
            path.touch()
            if done.wait(_BEAT_S):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _end_with_parent() -> None:
    """Take the end of standard input, which whoever started this process holds open, for a request to stop."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    number = next((os.environ[name] for name in _NODE_VARIABLES if name in os.environ), "0")
    # Slurm names the switches above a node, and the node itself at the end.
    switches = os.environ.get("SLURM_TOPOLOGY_ADDR", "").rpartition(".")[0]
    parser = argparse.ArgumentParser(prog="modelworks.node_command", description="One node's part in a run.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=int(number), help="this node's number; the engine's by default")
    parser.add_argument("--meet", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--name", default=os.environ.get("SLURMD_NODENAME") or platform.node())
    parser.add_argument("--attempt", default=os.environ.get("MODELWORKS_ATTEMPT", "1"))
    parser.add_argument("--topology", default=switches)
    parser.add_argument("--heartbeat", type=Path, default=None, metavar="FILE")
    parser.add_argument("--with-parent", action="store_true", help="stop when standard input is closed")
    return parser


if __name__ == "__main__":
    ended = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that wait for other nodes, deep in PyTorch, would bring the interpreter's own end to a bad one.
    os._exit(ended)
