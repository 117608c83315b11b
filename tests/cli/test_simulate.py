"""`modelworks simulate` as it is typed: its JSON keys are a contract, its files are whole, its errors are sentences."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "simulate"
CLUSTER = ["--cluster", "colossus-100k", "--gpus", "4096", "--days", "5", "--samples", "20"]


Ended = subprocess.CompletedProcess[str]
Simulate = Callable[..., Ended]


@pytest.fixture
def simulate(typed: Callable[..., Ended]) -> Simulate:
    return functools.partial(typed, "simulate")


def as_a_process(*words: str) -> Ended:
    command = [sys.executable, "-m", "modelworks", "simulate", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_json_keys_are_the_contract(simulate: Simulate) -> None:
    done = simulate(*CLUSTER, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["interruptions"]) == {"mean", "p5", "p95", "by_cause"}
    assert set(found["ettr"]) == {"mean", "p5", "p95"}
    assert 0 < found["ettr"]["p5"] <= found["ettr"]["mean"] <= found["ettr"]["p95"] < 1
    assert sum(found["interruptions"]["by_cause"].values()) == pytest.approx(found["interruptions"]["mean"])
    assert {"best_interval_s", "young_daly_s"} <= set(found["checkpoint"])
    assert found["mttf_hours"] == pytest.approx(3.0925 * 4, rel=0.01)  # 54 days over 419, of a quarter of the GPUs
    assert found["lost_gpu_hours"] == pytest.approx((1 - found["ettr"]["mean"]) * 4096 * 5 * 24, rel=1e-6)
    assert found["days_to_finish"] is None
    assert (found["gpus"], found["samples"]) == (4096, 20)


def test_the_same_command_gives_the_same_answer() -> None:
    assert (
        as_a_process(*CLUSTER, "--seed", "7", "--json").stdout == as_a_process(*CLUSTER, "--seed", "7", "--json").stdout
    )


def test_a_run_with_tokens_says_when_they_are_done(simulate: Simulate) -> None:
    done = simulate(EXAMPLES / "grok-2-on-20k-h100.toml", "--samples", "20", "--json")
    found = json.loads(done.stdout)
    days = found["days_to_finish"]
    assert days["p10"] <= days["p50"] <= days["p90"]
    # 3e25 FLOPs at 38 % of 20,000 x 989.4 TFLOP/s take 46 days, and failures make it longer.
    assert 46 < days["p50"] < 60


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_can_be_simulated(simulate: Simulate, example: Path) -> None:
    done = simulate(example, "--samples", "2", "--set", "simulate.samples=2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["name"] == example.stem
    assert 0.2 < found["ettr"]["mean"] < 1
    assert ("comparison" in found) == (example.stem in {"h100-now-or-b200-later", "autumn-2025"})


def test_the_step_can_be_given_instead_of_planned(simulate: Simulate) -> None:
    found = json.loads(simulate(*CLUSTER, "--step-time", "5s", "--tokens-per-step", "4M", "--json").stdout)
    assert found["step_time_s"] == 5.0
    assert found["tokens_per_day"] == pytest.approx(4e6 / 5 * 86400 * found["ettr"]["mean"])


def test_page_and_trace_are_written_and_named(simulate: Simulate, tmp_path: Path) -> None:
    page, trace = tmp_path / "page.html", tmp_path / "trace.jsonl"
    done = simulate(*CLUSTER, "--html", page, "--trace", trace, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == {"trace": str(trace), "page": str(page)}
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(trace.read_text().splitlines()[0])["nodes"] == 512
    assert sorted(tmp_path.iterdir()) == [page, trace]


def test_a_folder_that_cannot_be_written_fails_with_a_sentence(simulate: Simulate) -> None:
    done = simulate(*CLUSTER, "--trace", "/proc/none/trace.jsonl")
    assert done.returncode == 1
    assert "failed:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_has_a_row_for_each_value(simulate: Simulate) -> None:
    done = simulate(*CLUSTER, "--sweep", "checkpoint.every=1min..60min:4", "--json")
    rows = json.loads(done.stdout)["sweep"]
    assert [row["values"]["checkpoint.every"] for row in rows] == pytest.approx([60, 234.892, 919.524, 3600], rel=1e-4)
    assert rows[0]["ettr"]["mean"] > rows[-1]["ettr"]["mean"]


def test_the_report_for_people_names_what_it_found(simulate: Simulate) -> None:
    done = simulate(*CLUSTER, "--top500", "--tornado")
    assert done.returncode == 0, done.stderr
    for word in (
        "ETTR",
        "mean time to failure",
        "What stops the run",
        "What matters most",
        "Frontier",
        "Young and Daly",
    ):
        assert word in done.stdout


def test_two_runs_are_compared(simulate: Simulate) -> None:
    files = [EXAMPLES / "grok-2-on-20k-h100.toml", "--compare", EXAMPLES / "six-billion-dollars.toml"]
    found = json.loads(simulate(*files, "--samples", "5", "--json").stdout)["comparison"]
    assert len(found["machines"]) == 2
    assert found["first"] in {row["name"] for row in found["machines"]}
    assert len(found["dates"]) == len(found["machines"][0]["tokens_over_time"])


@pytest.mark.parametrize("gpus", ["1", "8", "64", "1016"])
def test_a_small_cluster_gets_a_model_that_suits_it(simulate: Simulate, gpus: str) -> None:
    cluster = "h100-superpod" if gpus != "1" else "local"
    done = simulate("--cluster", cluster, "--gpus", gpus, "--days", "3", "--samples", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ettr"]["mean"] > 0.9


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give RUN.toml, or --cluster NAME"),
        (["--cluster", "colossus"], "no preset 'colossus' in clusters"),
        ([*CLUSTER, "--gpus", "10000000"], "cluster.gpus = 10_000_000 is not accepted"),
        ([*CLUSTER, "--samples", "0"], "--samples 0"),
        ([*CLUSTER, "--days", "-1"], "simulate.days = -1"),
        ([*CLUSTER, "--set", "simulate.rate=1e9"], "the run can never progress"),
        ([*CLUSTER, "--sweep", "checkpoint.every=5"], ""),
        ([*CLUSTER, "--sweep", "checkpoint.every=a..b"], "is not accepted"),
        (["missing.toml"], "missing.toml cannot be read"),
        (["missing.toml", "--cluster", "colossus-100k"], "give either RUN.toml or --cluster"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(simulate: Simulate, words: list[str], sentence: str) -> None:
    done = simulate(*words)
    if not sentence:
        assert done.returncode == 2  # 5 s is shorter than a checkpoint can be written
        assert "writing one takes" in done.stderr
        return
    assert done.returncode == 2, done.stdout
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
