"""What Schemathesis makes of the gateway's own OpenAPI schema; `benchmarks/api_fuzz.py` sends 10,000 requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_FUZZ = Path(__file__).parents[2] / "benchmarks" / "api_fuzz.py"


@pytest.mark.timeout(300)
def test_no_request_that_the_schema_allows_or_nearly_allows_is_an_error_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    report = tmp_path / "fuzz.json"
    command = [sys.executable, str(_FUZZ), "--requests", "500", "--json", str(report)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(report.read_text())
    assert found["failures"] == []
    assert found["requests"] >= 500
    assert len(found["operations"]) >= 30
    assert found["statuses"]["200"] >= 20
