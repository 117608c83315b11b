"""Reading a run: without PyTorch, without the process that trains, and without being fooled by either."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import dumps, run_from
from modelworks.spec.home import runs_folder
from modelworks.train.record import MetricsReader, RunRecord, Status, list_runs, own_process, write_status


def _make_run(name: str, **status: Any) -> Path:
    folder = runs_folder() / name
    folder.mkdir(parents=True)
    spec = run_from({"name": name, "model": {"preset": "grok-tiny"}})
    (folder / "run.toml").write_text(dumps(spec))
    if status:
        write_status(folder, Status(**status))
    return folder


def _append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_importing_the_record_loads_no_pytorch() -> None:
    modules = "modelworks.train.record, modelworks.train.view, modelworks.launch.local, modelworks.train_command"
    check = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_runs_are_listed_newest_first_and_a_wrong_name_is_answered_with_the_nearest(home: Path) -> None:
    for age, name in enumerate(["newest", "middle", "oldest"]):
        folder = _make_run(name, state="finished")
        os.utime(folder / "run.toml", (1e9 - age, 1e9 - age))
    assert [record.name for record in list_runs()] == ["newest", "middle", "oldest"]
    with pytest.raises(InputError, match="did you mean 'middle'"):
        RunRecord("midle")


def test_a_running_run_whose_process_is_gone_has_crashed(home: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    _make_run("gone", state="running", pid=ended.pid, process_started=1.0)
    assert RunRecord("gone").status().state == "crashed"


def test_a_process_with_a_reused_id_is_not_taken_for_the_runs_own(home: Path) -> None:
    mine = own_process()
    _make_run("mine", state="running", **mine)
    _make_run("reused", state="running", **{**mine, "process_started": mine["process_started"] - 3600})
    assert RunRecord("mine").status().state == "running"
    assert RunRecord("reused").status().state == "crashed"
    with pytest.raises(OperationError, match="not at work: it is crashed"):
        RunRecord("reused").stop()


def test_a_finished_run_stays_finished_after_its_process_has_gone(home: Path) -> None:
    _make_run("done", state="finished", pid=1, process_started=1.0)
    assert RunRecord("done").status().state == "finished"
    with pytest.raises(OperationError, match="not at work: it is finished"):
        RunRecord("done").stop()


def test_a_new_run_is_preparing_until_it_is_late(home: Path) -> None:
    folder = _make_run("new")
    assert RunRecord("new").status().state == "preparing"
    os.utime(folder / "run.toml", (1e9, 1e9))
    assert RunRecord("new").status().state == "crashed"


def test_metrics_are_read_on_from_where_the_last_reading_ended(home: Path) -> None:
    folder = _make_run("run", state="finished")
    reader = MetricsReader(folder)
    assert reader.read() == ([], False)
    _append(folder, '{"step": 1}\n{"step": 2}\n{"step":')
    assert reader.read() == ([{"step": 1}, {"step": 2}], False)
    assert reader.read() == ([], False)
    _append(folder, " 3}\n")
    assert reader.read() == ([{"step": 3}], False)
    assert RunRecord("run").metrics() == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("regrown", ["", '{"step": 2, "loss": 5.0}\n', '{"step": 2, "loss": 5.0}\n' * 9])
def test_metrics_cut_back_by_a_resume_are_read_anew(home: Path, regrown: str) -> None:
    folder = _make_run("run", state="running")
    _append(folder, '{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    reader = MetricsReader(folder)
    reader.read()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n' + regrown)
    rows, restarted = reader.read()
    assert restarted
    assert rows == [{"step": 1}] + [json.loads(line) for line in regrown.splitlines()]


def test_a_status_of_a_newer_version_with_more_keys_is_read(home: Path) -> None:
    folder = _make_run("run", state="finished")
    values = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**values, "from_the_future": 1}))
    assert RunRecord("run").status().state == "finished"


def test_a_run_on_another_machine_is_taken_at_its_word_and_stopped_there(home: Path) -> None:
    _make_run("far", state="running", pid=1, process_started=1.0, host="another-machine")
    assert RunRecord("far").status().state == "running"
    with pytest.raises(OperationError, match="process 1 on another-machine: stop it there"):
        RunRecord("far").stop()
