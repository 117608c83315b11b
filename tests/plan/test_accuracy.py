"""The planner against measured runs, and lists of runs that can't be used."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from modelworks.plan.accuracy import (
    RunResult,
    as_json,
    predict_runs,
    summaries,
    summary,
)
from modelworks.plan.measured_runs import prefix, read_runs, represent
from modelworks.spec.errors import InputError

MEASURED = Path(__file__).parents[3] / "shared" / "data" / "measured" / "runs.csv"
ROW = {
    "run_id": "lab-1",
    "framework": "nemo-25.02",
    "gpu": "H100-SXM5-80GB",
    "n_gpus": "64",
    "layers": "80",
    "hidden": "8192",
    "ffn_hidden": "28672",
    "heads": "64",
    "kv_heads": "8",
    "vocab": "128256",
    "gated_mlp": "true",
    "precision": "bf16",
    "seq_len": "8192",
    "tp": "4",
    "pp": "4",
    "cp": "2",
    "vpp": "5",
    "micro_batch": "1",
    "global_batch": "128",
    "step_time_s": "14.7",
    "memory_gib": "",
}


def written(folder: Path, *rows: dict[str, str], drop: str = "") -> Path:
    path = folder / "runs.csv"
    columns = [name for name in ROW if name != drop]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows or [ROW])
    return path


@pytest.fixture(scope="module")
def measured() -> list[RunResult]:
    if not MEASURED.is_file():
        pytest.skip(f"the measured runs are not there: {MEASURED.name} of the shared data")
    return predict_runs(read_runs(MEASURED))


@pytest.mark.parametrize(
    ("chosen", "target"),
    [
        ("vtrain-multi", 0.07),
        ("vtrain-single", 0.08),
        ("korthikanti", 0.035),
        ("dgxc h100", 0.08),
        ("dgxc grok", 0.05),
        ("dgxc gb200", 0.10),
    ],
)
def test_measured_runs_are_predicted_within_the_target(measured: list[RunResult], chosen: str, target: float) -> None:
    source, _, word = chosen.partition(" ")
    runs = [run for run in measured if run.source == source and word in run.run_id]
    assert len(runs) >= 4
    found = summary(runs)
    assert found.failed == 0
    assert found.mape is not None
    assert found.mape <= target


def test_memory_is_predicted_within_five_per_cent_on_b200(measured: list[RunResult]) -> None:
    found = summaries(measured)["simumax"]
    assert found.memory_mape is not None
    assert found.memory_mape <= 0.05


def test_every_measured_run_is_accounted_for(measured: list[RunResult]) -> None:
    contract = as_json(measured)
    assert sum(source["n"] for source in contract["sources"].values()) == len(contract["runs"]) == len(measured)
    assert all(run["failure"] or run["predicted_s"] > 0 for run in contract["runs"])


def test_sources_are_named_up_to_the_first_dash_and_vtrains_up_to_the_second() -> None:
    assert prefix("dgxc-v25.02-grok1") == "dgxc"
    assert prefix("vtrain-multi-0007") == "vtrain-multi"
    assert prefix("plain") == "plain"


def test_a_row_becomes_the_layout_that_it_states() -> None:
    filled: list[str] = []
    run = represent(ROW, filled)
    layout = run.layout.row(0)
    assert (layout["tensor"], layout["pipeline"], layout["context"], layout["data"]) == (4, 4, 2, 2)
    assert layout["virtual_stages"] == 5
    assert layout["precision"] == "bf16"
    assert run.cluster.nodes == 8
    assert run.model.parameters.total == pytest.approx(70.55e9, rel=0.001)
    # What the row leaves blank is filled with the framework's default, and said.
    assert "zero_stage = 1" in filled
    assert "recompute = none" in filled


@pytest.mark.parametrize(
    ("given", "kind", "share"),
    [
        ("", "none", 1.0),
        ("none", "none", 1.0),
        ("full", "full", 1.0),
        ("selective (attention core)", "selective", 1.0),
        ("full, 5 layers", "full", 0.25),
        ("SAVE_QKV_OUT_PROJ", "projections", 1.0),
        ("remat_policy=minimal", "selective", 1.0),
        ("homemade", "none", 1.0),
    ],
)
def test_recomputation_is_read_as_frameworks_name_it(given: str, kind: str, share: float) -> None:
    filled: list[str] = []
    layout = represent(ROW | {"recompute": given}, filled).layout.row(0)
    assert (layout["recompute"], layout["recompute_share"]) == (kind, share)
    assert any("recompute" in blank for blank in filled) == (given in ("", "homemade"))


def test_an_unknown_framework_is_taken_for_the_usual_one_and_said() -> None:
    filled: list[str] = []
    assert represent(ROW | {"framework": "homemade"}, filled).software.name == "megatron-core"
    assert "traits of megatron-core for an unknown framework" in filled


def test_equal_rows_with_other_batches_are_predicted_as_if_alone(tmp_path: Path) -> None:
    other = ROW | {"run_id": "lab-2", "global_batch": "256"}
    together = predict_runs(read_runs(written(tmp_path, ROW, other)))
    alone = [predict_runs(read_runs(written(tmp_path, row)))[0] for row in (ROW, other)]
    assert [run.predicted_s for run in together] == pytest.approx([run.predicted_s for run in alone])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"gpu": "TPU v5p"}, "gpu = 'TPU v5p' is not in the catalog"),
        ({"n_gpus": "60"}, "is not n_gpus = 60"),
        ({"global_batch": "127"}, "global_batch = 127 doesn't divide"),
        ({"precision": "int3"}, "precision = 'int3' has no counterpart"),
    ],
)
def test_a_row_without_counterpart_is_kept_with_its_reason_and_counts_as_a_failure(
    tmp_path: Path, changed: dict[str, str], reason: str
) -> None:
    results = predict_runs(read_runs(written(tmp_path, ROW, ROW | changed | {"run_id": "lab-odd"})))
    assert results[1].failure is not None
    assert reason in results[1].failure
    found = summary(results)
    assert (found.n, found.failed) == (2, 1)
    assert found.mape is not None
    assert found.mape >= 0.5


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"step_time_s": "-3"}, "line 2: step_time_s = '-3' is not accepted"),
        ({"step_time_s": ""}, "line 2: step_time_s is blank"),
        ({"step_time_s": "nan"}, "step_time_s = 'nan' is not accepted"),
        ({"layers": "0"}, "layers = 0 is not accepted"),
        ({"layers": "80.5"}, "layers = '80.5' is not accepted: a whole number"),
        ({"hidden": "1e30"}, "hidden = '1e30' is not accepted"),
        ({"heads": "many"}, "heads = 'many' is not accepted"),
    ],
)
def test_absurd_numbers_are_refused_by_line_and_column(tmp_path: Path, changed: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        read_runs(written(tmp_path, ROW | changed))
    assert sentence in str(caught.value)


def test_a_list_without_a_needed_column_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column 'heads' is missing"):
        read_runs(written(tmp_path, drop="heads"))


def test_files_that_are_no_list_of_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_runs(tmp_path / "absent.csv")
    empty = tmp_path / "empty.csv"
    empty.write_text(",".join(ROW) + "\n")
    with pytest.raises(InputError, match="no runs in it"):
        read_runs(empty)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="UTF-8"):
        read_runs(binary)
