"""The planner against runs that others measured: `python benchmarks/plan_accuracy.py [RUNS.csv]`.

Prints, for each set of runs, the mean absolute error of the predicted step times beside what the set's own authors or
the best other tool reach, and the target; and the same for memory. Without the list of runs it says where to put one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modelworks.plan.accuracy import RunResult, predict_runs, summary
from modelworks.plan.measured_runs import read_runs

DEFAULT = Path(__file__).parents[2] / "shared" / "data" / "measured" / "runs.csv"


@dataclass(frozen=True)
class Set:
    """Runs that are judged together."""

    name: str
    chosen: Callable[[RunResult], bool]
    target: float
    others: str = "-"


def of(source: str, word: str = "") -> Callable[[RunResult], bool]:
    return lambda run: run.source == source and word in run.run_id


SETS = (
    Set("A100, many nodes (vTrain's measurements)", of("vtrain-multi"), 0.07, "vTrain 14.7 %, Calculon 15.3 %"),
    Set("A100, one node (vTrain's measurements)", of("vtrain-single"), 0.08, "vTrain 8.4 %, Calculon 39 %"),
    Set("Korthikanti et al. 2022", of("korthikanti"), 0.035, "Calculon 3.65 % (fitted on these)"),
    Set("H100 recipes, dense and experts, bf16 and fp8", of("dgxc", "h100"), 0.08),
    Set("Grok-1's shape on H100", of("dgxc", "grok"), 0.05),
    Set("GB200 recipes", of("dgxc", "gb200"), 0.10),
    Set("B200, few layers (SimuMax's measurements)", of("simumax"), 0.10, "SimuMax 0-13 % (own machine)"),
)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    if not path.is_file():
        raise SystemExit("there is no list of measured runs: python benchmarks/plan_accuracy.py RUNS.csv")
    results = predict_runs(read_runs(path))
    table = Table("set", "runs", "failed", "mean error", "median", "90 %", "bias", "target", "", "others")
    for group in SETS:
        found = summary([run for run in results if group.chosen(run)])
        if found.mape is None or found.median is None or found.p90 is None or found.bias is None:
            continue
        table.add_row(
            group.name,
            str(found.n),
            str(found.failed),
            f"{found.mape:.1%}",
            f"{found.median:.1%}",
            f"{found.p90:.1%}",
            f"{found.bias:+.1%}",
            f"{group.target:.1%}",
            "met" if found.mape <= group.target else "missed",
            group.others,
        )
    memory = summary([run for run in results if run.source == "simumax"])
    if memory.memory_mape is not None:
        table.add_row(
            "memory on B200", str(memory.n), "0", f"{memory.memory_mape:.1%}", "", "", "", "5.0%",
            "met" if memory.memory_mape <= 0.05 else "missed", "SimuMax 0.5 % (own)",
        )  # fmt: skip
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
