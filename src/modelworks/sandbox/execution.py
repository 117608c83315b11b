"""One run: the code is started in its sandbox, watched, and ended with all that it has started.

Whatever it starts lives in one process namespace, whose first process ends when the code does, when `run` returns,
and when the process that called `run` dies; the kernel then kills the rest.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Literal

import psutil

from modelworks.sandbox.isolation import MAIN, command, identity
from modelworks.spec.errors import InputError, OperationError

Ended = Literal["finished", "time", "memory", "output", "killed"]
"""By itself, with whatever exit code; for one of its limits; or because the caller wanted no more of it."""

_LOOK_S = 0.1
"""How often its memory is added up."""
_CHUNK = 65536
_CPU_SIGNALS = (128 + 24, 128 + 9)
"""How bubblewrap passes on that the kernel's limit of computing time has ended the code."""


@dataclass(frozen=True)
class Limits:
    """What the code may take.

    Parameters
    ----------
    wall_s
        Seconds from the start to the end.
    cpu_s
        Seconds of computing, for each process.
    memory_bytes
        Memory, of each process and of all together.
    disk_bytes
        What its folder can hold. The folder is in memory.
    file_bytes
        The size of one file.
    output_bytes
        What it may print, to each of stdout and stderr.
    processes
        Processes and threads at a time.
    """

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 512 << 20
    disk_bytes: int = 64 << 20
    file_bytes: int = 32 << 20
    output_bytes: int = 1 << 20
    processes: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InputError(f"{name}: {value} is not accepted; a limit is more than 0")


@dataclass(frozen=True)
class Result:
    """What became of the code. `exit_code` is None if it was ended."""

    stdout: str
    stderr: str
    exit_code: int | None
    ended: Ended
    seconds: float


def run(
    code: str,
    limits: Limits | None = None,
    stdin: str = "",
    files: Mapping[str, str | bytes] | None = None,
    stop: threading.Event | None = None,
) -> Result:
    """Run Python code in a sandbox. Blocks; any number of threads may run code at a time.

    Parameters
    ----------
    code
        A program.
    limits
        What it may take.
    stdin
        What it can read.
    files
        Further files in its folder, by their names.
    stop
        Ends the run when it is set.

    Raises
    ------
    InputError
        If a file's name leads out of the folder, or the files don't fit into it.
    OperationError
        If there can't be a sandbox here, with the reason.
    """
    missing = unavailable()
    if missing is not None:
        raise OperationError(missing)
    return _run(code, limits or Limits(), stdin, files or {}, stop)


@cache
def unavailable() -> str | None:
    """Why code can't be run on this machine, in one sentence; None if it can."""
    try:
        result = _run("print(6 * 7)", Limits(wall_s=60), "", {}, None)
    except OperationError as error:
        return str(error)
    if result.stdout == "42\n":
        return None
    said = " ".join(result.stderr.split()) or f"the trial {result.ended} with exit code {result.exit_code}"
    return f"code is not run: this machine or container doesn't allow the sandbox its namespaces ({said})"


def _run(
    code: str, limits: Limits, stdin: str, files: Mapping[str, str | bytes], stop: threading.Event | None
) -> Result:
    contents = {**files, MAIN: code}
    sizes = (len(one.encode(errors="surrogatepass") if isinstance(one, str) else one) for one in contents.values())
    if sum(sizes) > limits.disk_bytes:
        raise InputError(f"files: more than the {limits.disk_bytes:,} bytes that disk_bytes allows")
    line, given = command(
        contents,
        limits.disk_bytes,
        (
            *(f"--as={limits.memory_bytes}", f"--cpu={limits.cpu_s}:{limits.cpu_s + 1}", "--core=0"),
            *(f"--fsize={limits.file_bytes}", f"--nproc={limits.processes}", "--nofile=128", "--memlock=0"),
        ),
    )
    someone = identity()
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=given,
            env={},
            cwd="/",
            user=someone,
            group=someone,
            extra_groups=None if someone is None else [],
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise OperationError(f"code is not run: bwrap can't be started ({error})") from None
    finally:
        for descriptor in given:
            os.close(descriptor)
    watch = _Watch(process, limits, begin + limits.wall_s, stop)
    try:
        ended = watch.listen(stdin.encode(errors="surrogatepass"))
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
    stdout, stderr = (bytes(said).decode(errors="replace") for said in (watch.stdout, watch.stderr))
    if ended == "finished" and process.returncode in _CPU_SIGNALS:
        ended = "time"
    elif ended == "finished" and process.returncode and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        ended = "memory"
    exit_code = process.returncode if ended == "finished" else None
    return Result(stdout, stderr, exit_code, ended, time.monotonic() - begin)


class _Watch:
    """What a process says, until it ends or has had enough."""

    def __init__(
        self, process: subprocess.Popen[bytes], limits: Limits, deadline: float, stop: threading.Event | None
    ) -> None:
        self._process, self._limits, self._deadline, self._stop = process, limits, deadline, stop
        self.stdout, self.stderr = bytearray(), bytearray()

    def listen(self, stdin: bytes) -> Ended:
        """Give it what it can read, take what it says, and look after its limits; how it ended."""
        process, waiting = self._process, memoryview(stdin)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, self.stdout)
            selector.register(process.stderr, selectors.EVENT_READ, self.stderr)
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            look = time.monotonic() + _LOOK_S
            while selector.get_map():
                now = time.monotonic()
                if now >= self._deadline:
                    return "time"
                if now >= look:
                    if self._stop is not None and self._stop.is_set():
                        return "killed"
                    if self._memory() > self._limits.memory_bytes:
                        return "memory"
                    look = time.monotonic() + _LOOK_S
                for key, _ in selector.select(max(min(look, self._deadline) - now, 0)):
                    if key.fileobj is process.stdin:
                        waiting = self._give(waiting)
                        if not waiting:
                            selector.unregister(process.stdin)
                            with suppress(BrokenPipeError):
                                process.stdin.close()
                        continue
                    chunk = os.read(key.fd, _CHUNK)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    said: bytearray = key.data
                    said += chunk
                    if len(said) > self._limits.output_bytes:
                        del said[self._limits.output_bytes :]
                        return "output"
        return self._wait()

    def _give(self, waiting: memoryview) -> memoryview:
        assert self._process.stdin is not None
        try:
            return waiting[os.write(self._process.stdin.fileno(), waiting[:_CHUNK]) :] if waiting else waiting
        except BlockingIOError:
            return waiting
        except BrokenPipeError:
            return waiting[:0]

    def _wait(self) -> Ended:
        """It has closed its output, which isn't yet its end."""
        while True:
            try:
                self._process.wait(timeout=max(min(self._deadline - time.monotonic(), _LOOK_S), 0))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= self._deadline:
                    return "time"
                if self._stop is not None and self._stop.is_set():
                    return "killed"
                if self._memory() > self._limits.memory_bytes:
                    return "memory"
            else:
                return "finished"

    def _memory(self) -> int:
        """Bytes that its processes have for themselves."""
        total = 0
        with suppress(psutil.NoSuchProcess):
            for one in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    used = one.memory_info()
                    total += used.rss - used.shared
        return total
