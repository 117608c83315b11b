"""The short form of the soak: two minutes of faults, and not a bit's difference."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_meets_every_kind_of_fault_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    ended = subprocess.run(
        [sys.executable, str(_SOAK), "--minutes", "2", "--every", "3", "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(report.read_text())
    assert found["differing_tensors"] == []
    assert found["equal_losses"]
    assert found["lost_more_than_a_checkpoint_held"] == 0
    assert found["faults"] >= 2
    assert found["restarts_by_the_agent"] + found["resumes"] >= 1
    assert 0.0 < found["goodput"] < 1.0
    assert 0.0 < found["goodput_predicted"] < 1.0
