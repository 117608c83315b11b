"""The planner on this machine: predicted against measured training steps, 12 networks on 1, 2 and 4 processes.

    python benchmarks/plan_local.py [--processes 1,2,4] [--shapes 12] [--steps 8] [--json FILE]

The networks are dense and mixtures of experts, hidden 128 to 512, sequences of 128 to 1,024, several batch sizes. Each
is trained for a few steps by `modelworks train`; a step's time is the median of those after the first two, as
metrics.jsonl has them. The machine is measured first by `modelworks bench`, unless its hardware file already has
tables by shape. The last lines give the mean absolute percentage error over what could be predicted, and name what
could not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelworks.plan import predict
from modelworks.spec.errors import InputError
from modelworks.spec.files import device_spec, run_from
from modelworks.spec.hardware import DeviceSpec
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec

TARGET = 0.15
WARMUP = 2
"""Steps before the measured ones: allocations, the optimizer's state."""


@dataclass(frozen=True)
class Shape:
    """One network and batch."""

    hidden: int
    layers: int
    seq_len: int
    global_batch: int
    experts: int = 0
    """0 is a dense network; of more, each token takes 2."""
    grok: bool = False
    """Norms after each part too, and capped attention logits."""
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        """What it is, in short."""
        kind = f"{self.experts} experts" if self.experts else "dense"
        return (
            f"{kind}{' (Grok)' if self.grok else ''}, hidden {self.hidden} x {self.layers}, {self.global_batch} x "
            + (f"{self.seq_len}{', muon' if self.optimizer == 'muon' else ''}")
        )

    def run(self, name: str, text: Path, processes: int, steps: int) -> RunSpec:
        """The run that trains it for some steps."""
        heads = self.hidden // 64
        model: dict[str, Any] = {
            "layers": self.layers,
            "hidden": self.hidden,
            "heads": heads,
            "kv_heads": max(1, heads // 2),
            "head_dim": 64,
            "vocab": 2048,
            "context": self.seq_len,
            "activation": "gelu" if self.grok else "silu",
            "norm_placement": "sandwich" if self.grok else "pre",
            "tied_embeddings": True,
        }
        if self.grok:
            model |= {"attention_softcap": 30.0}
        if self.experts:
            model |= {"moe": {"experts": self.experts, "top_k": 2, "expert_hidden": 2 * self.hidden}}
        else:
            model |= {"ffn_hidden": 4 * self.hidden}
        train = {
            "tokens": (steps + WARMUP) * self.global_batch * self.seq_len,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "optimizer": self.optimizer,
            "validation_tokens": 1,
            "validate_every": 0,
        }
        devices = dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), processes)
        return run_from(
            {
                "name": name,
                "model": model,
                "data": {"source": "files", "files": [str(text)]},
                "train": train,
                "cluster": {"preset": "local", **devices},
                "checkpoint": {"every_steps": 1_000_000},
            }
        )


SHAPES = (
    Shape(128, 2, 128, 8),
    Shape(128, 4, 1024, 4),
    Shape(256, 4, 256, 16),
    Shape(256, 2, 1024, 8),
    Shape(512, 2, 512, 4),
    Shape(512, 4, 256, 8),
    Shape(128, 2, 256, 32, experts=4),
    Shape(256, 2, 512, 8, experts=8),
    Shape(384, 4, 512, 4, experts=8, grok=True),
    Shape(512, 2, 128, 16, experts=4, grok=True),
    Shape(256, 4, 512, 8, grok=True, optimizer="muon"),
    Shape(256, 2, 256, 16, experts=8, optimizer="muon"),
)


@dataclass(frozen=True)
class Point:
    """One network on a number of processes: what was said and what was found."""

    shape: str
    processes: int
    predicted_s: float | None
    measured_s: float
    error: float | None
    """Predicted over measured, less one."""
    reason: str | None
    """Why there is no prediction."""


def measured(run: RunSpec, file: Path) -> float:
    """Train a run by the command and give the median time of its steps after the first two."""
    from modelworks.spec.files import dumps
    from modelworks.train.record import RunRecord

    file.write_text(dumps(run), encoding="utf-8")
    command = [sys.executable, "-m", "modelworks", "train", str(file), "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{run.name} cannot be trained: {done.stderr.strip()}")
    return statistics.median(row["step_time_s"] for row in RunRecord(run.name).metrics()[WARMUP:])


def point(shape: Shape, name: str, text: Path, processes: int, steps: int, device: DeviceSpec) -> Point:
    """Predict and measure one network on a number of processes."""
    run = shape.run(name, text, processes, steps)
    predicted, reason = None, None
    try:
        predicted = predict(run, device).step_time_s
    except InputError as error:
        reason = str(error)
    found = measured(run, text.parent / f"{name}.toml")
    return Point(shape.name, processes, predicted, found, predicted / found - 1 if predicted else None, reason)


def write_text(path: Path) -> None:
    """Three megabytes of made-up words, the same every time."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(4000)]
    lines = (" ".join(draw.choices(words, weights=range(4000, 0, -1), k=80)) for _ in range(7000))
    path.write_text("\n".join(lines), encoding="utf-8")


def this_machine() -> DeviceSpec:
    """The machine as it was measured by shape; measured now if it wasn't."""
    if not device_spec("local").gemm_measured:
        print("measuring this machine", flush=True)
        subprocess.run([sys.executable, "-m", "modelworks", "bench"], check=True, stdout=subprocess.DEVNULL)
    return device_spec("local")


def main() -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes, with commas between")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the networks")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured")
    parser.add_argument("--json", type=Path, help="also write every point here")
    options = parser.parse_args()
    device, points = this_machine(), []
    # The runs are kept apart from the user's own; the machine's figures are read before.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MODELWORKS_HOME"] = folder
        assert str(runs_folder()).startswith(folder)
        text = Path(folder) / "text.txt"
        write_text(text)
        print(f"{'network':<52}{'processes':>10}{'predicted':>12}{'measured':>12}{'error':>9}")
        for index, shape in enumerate(SHAPES[: options.shapes]):
            for processes in map(int, options.processes.split(",")):
                found = point(shape, f"shape-{index}-{processes}", text, processes, options.steps, device)
                points.append(found)
                said = f"{found.predicted_s * 1e3:.1f} ms" if found.predicted_s else "-"
                error = f"{found.error:+.1%}" if found.error is not None else "-"
                print(
                    f"{found.shape:<52}{processes:>10}{said:>12}{found.measured_s * 1e3:>9.1f} ms{error:>9}", flush=True
                )
    for reason in dict.fromkeys(p.reason for p in points if p.reason):
        print(f"not predicted ({sum(p.reason == reason for p in points)}): {reason}")
    errors = [abs(p.error) for p in points if p.error is not None]
    if options.json:
        options.json.write_text(json.dumps([asdict(p) for p in points], indent=1) + "\n", encoding="utf-8")
    if errors:
        print(
            f"mean absolute percentage error of {len(errors)} of {len(points)}: {statistics.mean(errors):.1%}", end=""
        )
        print(f" (to reach: {TARGET:.0%})")


if __name__ == "__main__":
    main()
