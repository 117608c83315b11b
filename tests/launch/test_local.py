"""Runs in the background: they outlive the caller, report themselves, and say why when they can't begin."""

import os
import time
from pathlib import Path

import psutil
import pytest

from modelworks.launch import local
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import run_from
from modelworks.spec.run import RunSpec
from modelworks.train.record import RunRecord

pytestmark = pytest.mark.slow


@pytest.fixture
def spec(home: Path, tmp_path: Path) -> RunSpec:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 500)
    return run_from(
        {
            "name": "background",
            "model": {"layers": 1, "hidden": 32, "ffn_hidden": 64, "heads": 2, "vocab": 300, "context": 32},
            "data": {"source": "files", "files": [str(text)], "validation_fraction": 0.0},
            "train": {"tokens": 10_000_000, "seq_len": 16, "global_batch": 2, "precision": "fp32"},
        }
    )


def test_a_run_starts_stops_and_goes_on_in_a_process_of_its_own(spec: RunSpec) -> None:
    process = psutil.Process(local.start(spec, threads=1))
    record = RunRecord("background")
    try:
        assert record.status().active
        assert record.status().pid == process.pid
        assert process.nice() == 10
        assert os.getsid(process.pid) != os.getsid(0)
        assert process.environ()["OMP_NUM_THREADS"] == "1"
        with pytest.raises(InputError, match="taken"):
            local.start(spec)
        assert record.stop(wait_s=60)
        stopped = record.status()
        assert stopped.state == "stopped"

        process = psutil.Process(local.resume("background", threads=1))
        deadline = time.monotonic() + 60
        while record.status().step <= stopped.step:
            assert time.monotonic() < deadline, record.log()
            time.sleep(0.05)
        assert record.stop(wait_s=60)
        assert record.status().state == "stopped"
        assert "background stopped by SIGTERM" in record.log()
        assert "background stopped after" in record.log()
    finally:
        if process.is_running():
            process.kill()


def test_a_run_that_cannot_begin_says_why(spec: RunSpec) -> None:
    broken = spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"gpus": 2})})
    with pytest.raises((OperationError, InputError), match="gpus"):
        local.start(broken, threads=1)


def test_resuming_a_run_that_is_not_there_is_refused(home: Path) -> None:
    with pytest.raises(InputError, match="no run 'nowhere'"):
        local.resume("nowhere")
