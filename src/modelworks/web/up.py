"""`modelworks up`: the server, a model to talk to, and a first run to watch, started and ended together.

The page answers at once and says what is still on its way. The home folder is held by a lock, so that two servers
never write to one database. At the end the runs that this server began are asked to save and stop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import signal
import socket
from collections.abc import Collection, Coroutine, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import uvicorn
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from modelworks.assistant.retention import keep
from modelworks.launch import local
from modelworks.serve.download import offer
from modelworks.serve.llamacpp import EngineSettings
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import loads_run
from modelworks.spec.home import home, write_atomically
from modelworks.spec.run import RunSpec
from modelworks.train.record import RunRecord
from modelworks.web.chat import FIRST_MODEL
from modelworks.web.server import Server, build, listen, url_of
from modelworks.web.services import Services

FIRST_RUN_LOOK_S = 2.0
STOP_S = 120.0
"""How long a run may take to save and stop."""


def up(
    host: str,
    port: int,
    first_run: bool,
    console: Console,
    hosts: Collection[str] = (),
    config_file: Path | None = None,
    titles: bool = True,
) -> None:
    """Start everything and stay until Ctrl-C or SIGTERM.

    Parameters
    ----------
    host, port
        Where to listen; port 0 takes a free one.
    first_run
        Whether to train the first run in the background.
    console
        Told where the server is and what it does.
    hosts
        Names that browsers may call it by, beside those of `modelworks.serve.origin`.
    config_file
        The engines that answer instead of the one inside this process.
    titles
        Whether models give conversations their titles.

    Raises
    ------
    InputError
        If a server holds the home folder already, the port or the configuration can't be used.
    OperationError
        If the database can't be used.
    """
    with hold_home() as announce:
        listener = listen(host, port)
        announce(url_of(listener))
        own = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        server = build(_settings(first_run), hosts=hosts, config_file=config_file, titles=titles, any_folder=own)
        chores = []
        if config_file is not None and server.services.access is None:  # with users, the accounts do it
            chores.append(keep(server.services.assistant.store.database, config_file))
        previous = signal.signal(signal.SIGTERM, _as_interrupt)
        try:
            asyncio.run(_serve(server, listener, first_run, console, chores))
        except KeyboardInterrupt:
            pass
        finally:
            _stop_runs(server.services, console)
            server.services.assistant.store.close()
            signal.signal(signal.SIGTERM, previous)


@contextmanager
def hold_home() -> Iterator[Announce]:
    """Hold the home folder for one server; what is yielded tells others where that server is.

    Raises
    ------
    InputError
        If another process holds it, naming its address.
    """
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".up.lock", timeout=0):
            announced = Announce()
            try:
                yield announced
            finally:
                announced.withdraw()
    except Timeout:
        raise InputError(f"Modelworks runs already on the data folder {folder}{_where()}") from None
    except PermissionError as error:
        raise InputError(f"the data folder {folder} can't be written: {error.strerror}; set MODELWORKS_HOME") from None


class Announce:
    """Tells other processes where the server is: ``up.json`` in the home folder."""

    def __call__(self, url: str) -> None:
        write_atomically(home() / "up.json", json.dumps({"url": url, "pid": os.getpid()}))

    def withdraw(self) -> None:
        """Take the word back."""
        (home() / "up.json").unlink(missing_ok=True)


def first_run_spec() -> RunSpec:
    """The run that is trained in the background, as ``web/first_run.toml`` has it."""
    return loads_run((files("modelworks.web") / "first_run.toml").read_text(encoding="utf-8"), where="first_run.toml")


def begin_first_run(services: Services) -> str:
    """Start the first run, or go on with it if it is unfinished; returns what was done.

    It may compute with all processors: it is nice, so whoever talks to a model goes first.

    Raises
    ------
    OperationError
        If it can't begin.
    """
    spec = first_run_spec()
    try:
        record = RunRecord(spec.name)
    except InputError:
        services.begun_runs.add(spec.name)
        local.start(spec)
        return f"The run {spec.name} trains in the background"
    status = record.status()
    if status.active:
        # By a server that was killed: this one takes it over, so that it ends with Ctrl-C as it would have there.
        services.begun_runs.add(spec.name)
        return f"The run {spec.name} is being trained by process {status.pid}"
    if status.state == "finished" and status.released:
        return f"The run {spec.name} is finished"
    services.begun_runs.add(spec.name)
    local.resume(spec.name)
    return f"The run {spec.name} goes on in the background"


def _settings(first_run: bool) -> EngineSettings:
    """Few threads for the engine while a run trains: llama.cpp's workers spin, and the two would starve each other."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return EngineSettings(threads=max(1, cores // 4)) if first_run else EngineSettings()


async def _serve(
    server: Server,
    listener: socket.socket,
    first_run: bool,
    console: Console,
    more: Collection[Coroutine[Any, Any, None]] = (),
) -> None:
    config = uvicorn.Config(server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    running = uvicorn.Server(config)
    serving = asyncio.create_task(running.serve(sockets=[listener]))
    while not running.started and not serving.done():
        await asyncio.sleep(0.02)
    if running.started:
        console.print(f"[bold]Modelworks[/bold] is on {url_of(listener)}   (Ctrl-C ends it)", highlight=False)
    chores = [asyncio.create_task(chore) for chore in more]
    if server.services.members is None:
        chores.append(asyncio.create_task(_first_model(server.services, console)))
    if first_run:
        chores.append(asyncio.create_task(_first_run(server.services, console)))
    try:
        await serving
    finally:
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)


async def _first_model(services: Services, console: Console) -> None:
    """Fetch the model to begin with, if it isn't here, and have it and its adapters ready before anyone asks."""
    if FIRST_MODEL not in {model.name for model in services.store.list()}:
        pull = services.pull(FIRST_MODEL)
        columns = [TextColumn("Fetching {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(FIRST_MODEL, total=None)
            while pull.task is not None and not pull.task.done():
                bar.update(task, completed=pull.done, total=pull.total or None)
                await asyncio.sleep(0.2)
        if pull.error:
            console.print(f"[yellow]{FIRST_MODEL} could not be fetched:[/yellow] {pull.error}", soft_wrap=True)
            return
    try:
        await asyncio.to_thread(offer, services.store)
    except (InputError, OperationError) as error:
        console.print(f"[yellow]{FIRST_MODEL} stays without its character:[/yellow] {error}", soft_wrap=True)
    try:
        await services.engine.load(FIRST_MODEL)
    except (InputError, OperationError) as error:
        console.print(f"[yellow]{FIRST_MODEL} can't be loaded:[/yellow] {error}", soft_wrap=True)
        return
    console.print(f"{FIRST_MODEL} is ready to talk to", highlight=False)


async def _first_run(services: Services, console: Console) -> None:
    try:
        done = await asyncio.to_thread(begin_first_run, services)
    except (InputError, OperationError) as error:
        console.print(f"[yellow]the first run can't begin:[/yellow] {error}", soft_wrap=True)
        return
    console.print(f"{done}; watch it on the page Runs", highlight=False)
    record = RunRecord(first_run_spec().name)
    while (status := await asyncio.to_thread(record.status)).active:
        await asyncio.sleep(FIRST_RUN_LOOK_S)
    if status.served_as:
        console.print(f"The run {record.name} is finished; pick {status.served_as} in the chat", highlight=False)
    elif status.message:
        console.print(f"The run {record.name} {status.state}: {status.message}", highlight=False, soft_wrap=True)


def _stop_runs(services: Services, console: Console) -> None:
    """Let the runs that this server began save and stop."""
    for name in sorted(services.begun_runs):
        try:
            record = RunRecord(name)
            if record.status().active:
                console.print(f"The run {name} saves and stops; it goes on with the next [bold]modelworks up[/bold]")
                if not record.stop(STOP_S):
                    console.print(f"[yellow]the run {name} has not stopped within {STOP_S:.0f} s[/yellow]")
        except (InputError, OperationError) as error:
            console.print(f"[yellow]{error}[/yellow]", soft_wrap=True)


def _where() -> str:
    try:
        return ": it is on " + str(json.loads((home() / "up.json").read_text())["url"])
    except (OSError, ValueError, KeyError):
        return "; end it first, or set MODELWORKS_HOME to another folder"


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
