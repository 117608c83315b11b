"""What `up` begins, and what it takes over from a server that was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from modelworks.serve.store import Store
from modelworks.spec.files import dumps
from modelworks.spec.home import runs_folder
from modelworks.train.record import Status, own_process, write_status
from modelworks.web.services import Services
from modelworks.web.up import begin_first_run, first_run_spec


def test_a_first_run_that_outlived_its_server_is_taken_over_so_that_it_ends_with_this_one(home: Path) -> None:
    spec = first_run_spec()
    folder = runs_folder() / spec.name
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(dumps(spec))
    own = own_process()
    write_status(folder, Status(state="running", **own))
    unused = cast("Any", None)
    services = Services(Store(home / "models"), unused, unused)
    assert f"being trained by process {own['pid']}" in begin_first_run(services)
    assert services.begun_runs == {spec.name}
