"""What tests of several rooms need: their order, a home folder of their own, commands, the folder of reference data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from modelworks.spec import catalog

# A busy machine is not a failure.
settings.register_profile("modelworks", deadline=None)
settings.load_profile("modelworks")

Ended = subprocess.CompletedProcess[str]
_REPOSITORY = Path(__file__).parent.parent
_WAITING = ("test_ray.py", "test_slurm.py")
"""Tests that wait for minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits for others: the tests of the other workers use that time."""
    items.sort(key=lambda item: item.path.name not in _WAITING)


@pytest.fixture(scope="session", autouse=True)
def _no_ones_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests away from the folder of whoever runs them: a machine measured there would change plans."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MODELWORKS_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder; what the test stores stays in it."""
    monkeypatch.setenv("MODELWORKS_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured_home(home: Path) -> Path:
    """The same with a hardware file, so that each process of a run needn't measure the machine for half a second."""
    shutil.copy(Path(catalog.__file__).parent / "hardware" / "local.toml", home / "hardware.toml")
    return home


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs a command of Modelworks as it is typed, but in this process: starting another one takes seconds."""

    from modelworks import cli

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["modelworks", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said, code = capsys.readouterr(), ended.value.code
        assert code is None or isinstance(code, int)
        return Ended(sys.argv, code or 0, said.out, said.err)

    return run


@pytest.fixture
def loaded() -> Callable[..., list[str]]:
    """Says which of some modules code has loaded that ran in a process of its own."""

    def which(code: str, *names: str) -> list[str]:
        code = f"import json, sys\n{code}\nprint(json.dumps([name for name in {names} if name in sys.modules]))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found: list[str] = json.loads(done.stdout)
        return found

    return which


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference data, from `MODELWORKS_SHARED_DATA` or beside the repository."""
    given = os.environ.get("MODELWORKS_SHARED_DATA")
    folder = Path(given) if given else _REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no reference data in {folder}; set MODELWORKS_SHARED_DATA to the folder that holds it")
    return folder
