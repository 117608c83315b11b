"""A gateway with accounts over a stub engine; a PostgreSQL server of the tests' own, on a Unix socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from accounted import Gateway, gateway_over
from gateways import Stub


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    """A stub engine."""
    stub = Stub("stub", "hidden")
    yield stub
    stub.end()


@pytest.fixture
def gateway(stub: Stub, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway over it."""
    with gateway_over(stub, tmp_path) as gateway:
        yield gateway


def _programs() -> Path | None:
    """Where Debian's package, or another, has put initdb and pg_ctl."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    folders += [Path(found).resolve().parent] if found else []
    return next((folder for folder in folders if (folder / "pg_ctl").exists()), None)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The folder of the socket of a server that runs."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'modelworks[postgres]'")
    programs = _programs()
    if programs is None:
        pytest.skip("there is no initdb on this machine; Debian's package is postgresql")
    user = None
    if os.getuid() == 0:
        names = [name for name in ("postgres", "nobody") if _exists(name)]
        user = names[0]
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path has to be short
    if user is not None:
        shutil.chown(folder, user)

    def run(program: str, *words: str) -> None:
        command = [str(programs / program), *words]
        subprocess.run(command, user=user, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120)

    data = str(folder / "data")
    run("initdb", "-D", data, "-U", "modelworks", "-A", "trust", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=100"
    run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield str(folder)
    finally:
        run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


@pytest.fixture
def shared_database(postgresql: str, request: pytest.FixtureRequest) -> str:
    """The address of an empty database of this test's own."""
    import psycopg

    name = f"test_{abs(hash(request.node.nodeid)) % 10**12}"
    with psycopg.connect(f"postgresql://modelworks@/postgres?host={postgresql}", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://modelworks@/{name}?host={postgresql}"
