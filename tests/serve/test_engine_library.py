"""What is said where llama.cpp's library can't be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


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
