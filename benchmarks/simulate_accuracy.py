"""How near the simulation comes to published runs: interruptions, ETTR and mean time to failure of each, side by side.

The failure rates are calibrated on one of them (Llama 3 405B); the others get the same rates and the default practices.
The table in docs/accuracy.md is what this prints.

    python benchmarks/simulate_accuracy.py [--samples 200] [--json]
"""

from __future__ import annotations

import argparse
import json

from modelworks.simulate.published import Check, check
from modelworks.spec.facts import published_runs


def row(found: Check) -> dict[str, object]:
    """A line of the table."""
    run = found.run
    return {
        "run": run.title,
        "gpus": run.gpus,
        "days": run.days,
        "published_interruptions": run.interruptions,
        "at_least": run.at_least,
        "simulated_interruptions": found.interruptions,
        "low": found.low,
        "high": found.high,
        "published_ettr": run.ettr,
        "simulated_ettr": found.ettr,
        "published_mttf_hours": run.mttf_hours,
        "simulated_mttf_hours": found.mttf_hours,
    }


def main() -> None:
    """Simulate all and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row(check(run, options.samples)) for run in published_runs()]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("| run | GPUs | days | what | published | simulated |")
    print("|---|---|---|---|---|---|")
    for each in sorted(rows, key=lambda each: (str(each["run"]), str(each["gpus"]))):
        days = f"{each['days']:g}" if each["days"] else "-"
        head = f"| {each['run']} | {each['gpus']:,} | {days} "
        if each["published_interruptions"]:
            more = "at least " if each["at_least"] else ""
            print(
                f"{head}| interruptions | {more}{each['published_interruptions']:g} | "
                f"{each['simulated_interruptions']:.1f} ({each['low']:.0f} to {each['high']:.0f}) |"
            )
        if each["published_ettr"]:
            print(f"{head}| ETTR | {each['published_ettr']:.0%} | {each['simulated_ettr']:.1%} |")
        if each["published_mttf_hours"]:
            print(f"{head}| MTTF, h | {each['published_mttf_hours']:g} | {each['simulated_mttf_hours']:.2f} |")


if __name__ == "__main__":
    main()
