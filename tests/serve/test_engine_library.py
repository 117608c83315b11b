"""llama.cpp's library: missing, or with a server that nobody waits for any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelworks.serve.store import Store

_FREED = """
import sys
from modelworks.serve.llamacpp import _parameters, _started

for embedding in (False, True) * 4:
    server = _started(_parameters("one", sys.argv[1], 1, 256, 1, embedding))
    del server
"""


@pytest.mark.parametrize("command", [["serve", "x"], ["up", "--port", "0", "--no-run"]])
def test_a_machine_without_openmp_is_told_which_library_is_missing(tmp_path: Path, command: list[str]) -> None:
    broken = tmp_path / "packages" / "xllamacpp.py"
    broken.parent.mkdir()
    broken.write_text('raise ImportError("libgomp.so.1: cannot open shared object file: No such file or directory")')
    path = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "MODELWORKS_HOME": str(tmp_path / "home")}
    ended = subprocess.run(
        [sys.executable, "-m", "modelworks", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert "libgomp1" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_server_that_nobody_waits_for_any_more_can_be_freed_at_once(store: Store) -> None:
    # Else Ctrl-C while a model loads may never end: a server whose loop has not begun waits for that when it is freed.
    model = str(store.path("smollm2-135m"))
    ended = subprocess.run(
        [sys.executable, "-c", _FREED, model], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
