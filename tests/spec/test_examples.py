"""The run specs to copy are whole, and the plan takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelworks.plan.planner import plan
from modelworks.spec import load_run

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


def test_there_are_examples() -> None:
    assert {"grok-tiny", "own-files"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_whole_run_that_can_be_planned(path: Path) -> None:
    run = load_run(path)
    assert run.name == path.stem
    planned = plan(run)
    assert planned.step_time_s > 0
    assert planned.best.fits


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_files_that_an_example_names_are_there(path: Path) -> None:
    if path.stem in ("needle", "sft", "dpo", "character"):
        pytest.skip("its first lines say where its files come from")
    for file in load_run(path).data.files:
        assert Path(file).exists()
