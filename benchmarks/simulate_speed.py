"""How fast a failing cluster is simulated: 100,000 GPUs, 100 days, 1,000 replicas, beside a plain SimPy model.

Ours is the vectorised engine on one core. The other is the discrete-event engine of the same room, one process for the
job, one for its failures, one for each node under repair: what one would write with SimPy; it takes a few replicas, and
its time for all is that of those in proportion. Both meet the same failures, and their ETTR is printed, so that it can
be seen that they computed the same. Times are of the processor, not of the wall. Fewer days and fewer GPUs show how the
cost grows with the failures.

    python benchmarks/simulate_speed.py [--replicas 1000] [--simpy 3] [--json]
"""

from __future__ import annotations

import os

# One core: must be set before NumPy is loaded.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import time
from typing import Any

import numpy as np

from modelworks.simulate.events import replay
from modelworks.simulate.failures import draw
from modelworks.simulate.montecarlo import simulate
from modelworks.simulate.scenario import Scenario, scenario
from modelworks.spec import loads_run

RUN = """
model = "llama-3.1-405b"
[train]
tokens = 1_000_000_000_000_000_000
seq_len = 8192
global_batch = 2048
[cluster]
preset = "colossus-100k"
gpus = {gpus}
[simulate]
days = {days}
"""
TARGET_S = 10.0


def ours(resolved: Scenario, replicas: int) -> tuple[float, float, float]:
    """Processor seconds, failures and ETTR of all replicas."""
    begin = time.process_time()
    out = simulate(resolved, replicas, seed=0)
    return time.process_time() - begin, float(out.interruptions.sum()), float(out.ettr.mean())


def simpys(resolved: Scenario, replicas: int) -> tuple[float, float]:
    """Processor seconds and ETTR of some replicas."""
    begin = time.process_time()
    stream = draw(resolved, replicas, np.random.SeedSequence(0))
    ratios = [float(replay(resolved, stream, replica).outcome.ettr[0]) for replica in range(replicas)]
    return time.process_time() - begin, float(np.mean(ratios))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--simpy", type=int, default=3, help="replicas for SimPy")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for gpus, days in ((100_000, 100), (100_000, 50), (100_000, 25), (25_000, 100)):
        resolved = scenario(loads_run(RUN.format(gpus=gpus, days=days)))
        seconds, failures, ettr = ours(resolved, options.replicas)
        row = {
            "gpus": gpus,
            "days": days,
            "seconds": seconds,
            "failures": failures,
            "us_per_failure": seconds / failures * 1e6,
        }
        rows.append(row | {"ettr": ettr})
    resolved = scenario(loads_run(RUN.format(gpus=100_000, days=100)))
    few_s, simpy_ettr = simpys(resolved, options.simpy)
    simpy_s = few_s / options.simpy * options.replicas
    found = {
        "replicas": options.replicas,
        "target_s": TARGET_S,
        "ours": rows,
        "simpy_s": simpy_s,
        "simpy_replicas_measured": options.simpy,
        "simpy_ettr": simpy_ettr,
        "ratio": simpy_s / rows[0]["seconds"],
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{options.replicas:,} replicas, processor seconds on one core (target for the first: {TARGET_S:g} s)")
    for row in rows:
        print(
            f"  {row['gpus']:>7,} GPUs, {row['days']:>3} days: {row['seconds']:6.2f} s, "
            f"{row['failures'] / 1e6:5.2f} M failures, {row['us_per_failure']:5.2f} us each, ETTR {row['ettr']:.4f}"
        )
    print(f"  SimPy for the first: {simpy_s:,.0f} s (from {options.simpy} replicas, ETTR {simpy_ettr:.4f})")
    print(f"  ratio: {found['ratio']:,.0f}x")


if __name__ == "__main__":
    main()
