"""The short form of the soak: a minute of faults, and not a bit's difference."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
_SEED = 3868
"""Such that the first faults are of different kinds: a process killed, the parent, a checkpoint damaged."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_meets_several_kinds_of_faults_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--minutes", "1", "--every", "3", "--seed", str(_SEED), "--json", str(report)]
    ended = subprocess.run([sys.executable, str(_SOAK), *options], capture_output=True, text=True, timeout=1700)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(report.read_text())
    assert found["differing_tensors"] == []
    assert found["equal_losses"]
    assert found["lost_more_than_a_checkpoint_held"] == 0
    assert found["faults"] >= 2
    assert found["restarts_by_the_agent"] + found["resumes"] >= 1
    assert 0.0 < found["goodput"] < 1.0
    assert 0.0 < found["goodput_predicted"] < 1.0
