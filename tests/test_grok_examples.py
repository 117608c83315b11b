"""The examples of the Grok family at their real size go through simulate and a dry run of their training.

`spec/test_examples` plans them, as it does all examples.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.spec import load_run
from modelworks.train_command import dry_run

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = ("grok-1", "grok-1.5-128k", "grok-1.5v", "grok-2-20k-h100", "grok-3-100k-h100")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_simulated(name: str) -> None:
    arguments = ["simulate", str(FOLDER / f"{name}.toml"), "--samples", "1", "--json"]
    simulated = CliRunner().invoke(app, arguments)
    assert simulated.exit_code == 0, simulated.output
    found = json.loads(simulated.stdout)
    assert found["gpus"] == load_run(FOLDER / f"{name}.toml").cluster.gpus
    assert found["days"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_of_an_example_holds_what_the_plan_says(name: str) -> None:
    run = load_run(FOLDER / f"{name}.toml")
    report = dry_run(run, [run.cluster.gpus // 2])
    assert report["processes"] == run.cluster.gpus
    assert report["without"] == (["model.vision"] if run.model.vision else [])
    for row in report["ranks"]:
        assert row["ratio"]["state"] == pytest.approx(1.0, abs=0.01)
        assert sum(row[part] for part in ("weights", "gradients", "optimizer")) < report["device_memory_bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_what_is_assumed_and_where_the_rest_is_from(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text()
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert "Published: " in head
    assert "Assumed" in head
    for field in ("tokens", "global_batch", "learning_rate"):
        [line] = [line for line in text.splitlines() if line.startswith(f"{field} =")]
        assert "# assumed" in line or "# estimated" in line, field
