"""`spec show` prints a complete spec and the source of each number."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelworks.spec import InputError, loads_run, model_spec
from modelworks.spec.catalog import Kind, entry, names
from modelworks.spec.show import sourced

Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("kind", ["models", "hardware", "clusters"])
def test_every_field_that_a_catalog_file_states_is_shown_with_that_files_source(kind: Kind) -> None:
    for name in names(kind):
        found, shown = entry(kind, name), sourced(f"{kind}/{name}")
        for field, value in found.values.items():
            if not isinstance(value, dict):
                assert shown.sources[field] == found.provenance.of(field)


def test_a_run_shows_what_its_file_states_what_its_preset_states_and_what_is_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\npreset = "grok-1"\nlayers = 2\n[train]\nseed = 7\n')
    shown = sourced(str(file))
    assert shown.sources["model.layers"].source == f"file {file}"
    assert shown.sources["train.seed"].source == f"file {file}"
    assert shown.sources["model.moe.experts"] == entry("models", "grok-1").provenance.of("moe.experts")
    assert "default" in shown.sources["train.clip"].source
    assert set(shown.sources) == set(flat(shown.as_dict()["spec"]))


def flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


def test_a_name_of_two_kinds_asks_for_the_kind() -> None:
    with pytest.raises(InputError, match="hardware/local and clusters/local"):
        sourced("local")
    assert sourced("hardware/local").kind == "hardware"
    assert sourced("clusters/local").kind == "clusters"


def test_json_holds_the_spec_the_sources_and_the_parameters(typed: Typed) -> None:
    done = typed("spec", "show", "mixtral-8x7b", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert model_spec("mixtral-8x7b").parameters.total == shown["parameters"]["total"] == 46_702_792_704
    assert loads_run(f'name = "x"\nmodel = "{shown["name"]}"').model.model_dump(exclude_none=True) == shown["spec"]
    assert shown["sources"]["moe.experts"]["certainty"] == "published"


def test_the_table_names_fields_values_and_sources(typed: Typed) -> None:
    done = typed("spec", "show", "colossus-100k")
    assert done.returncode == 0, done.stderr
    for expected in ("gpus", "100_000", "published", "NVIDIA press release of 28 October 2024"):
        assert expected in done.stdout


def test_an_unknown_name_is_bad_input_in_one_sentence(typed: Typed) -> None:
    done = typed("spec", "show", "grok1")
    assert done.returncode == 2
    assert "'grok1' is no catalog entry, run spec (.toml) or Hugging Face config (.json); did you mean 'grok-1'?" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def test_showing_and_planning_start_without_the_heavy_parts(loaded: Callable[..., list[str]]) -> None:
    """What the import contracts can't see: nothing heavy is loaded by importing the light rooms."""
    code = (
        "import modelworks.cli, modelworks.plan, modelworks.spec.show, modelworks.serve.store\n"
        "import modelworks.train.record, modelworks.model, modelworks.data, modelworks.release, modelworks.assistant\n"
        "import modelworks.train_command, modelworks.train.refusals, modelworks.engine_command"
    )
    assert loaded(code, "torch", "transformers", "xllamacpp", "nicegui") == []
