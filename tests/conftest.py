"""What tests of several rooms need: a home folder of their own, and the folder of reference data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is not a failure.
settings.register_profile("modelworks", deadline=None)
settings.load_profile("modelworks")

_REPOSITORY = Path(__file__).parent.parent


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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of reference data, from `MODELWORKS_SHARED_DATA` or beside the repository."""
    given = os.environ.get("MODELWORKS_SHARED_DATA")
    folder = Path(given) if given else _REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no reference data in {folder}; set MODELWORKS_SHARED_DATA to the folder that holds it")
    return folder
