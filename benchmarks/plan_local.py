"""The planner's step time for this machine against that of `modelworks train`, shape by shape.

    python benchmarks/plan_local.py [--quick] [--bench] [--rounds 2] [--steps 4] [--json FILE]

Twelve shapes: dense and mixtures of experts, Llama's and Grok's, hidden 128 to 512, 2 to 8 layers, sequences of 128 to
1,024, one to four micro batches, on 1, 2 and 4 processes. Each is planned by `plan` and trained for a few steps by the
train command, in a process as a user would start it. Measured is the median of the logged step times without the
first. The prediction stands on what `modelworks bench` has measured; it is run first where that is missing, or with
`--bench`.

Other work on the machine disturbs both sides. A matrix product is timed before and after every run: `speed` is its
rate over the best one seen, and below 0.9 the run was disturbed. With several rounds a shape's fastest one counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TARGET = 0.15
DISTURBED = 0.9
VOCAB = 4096


@dataclass(frozen=True)
class Shape:
    """One run: the network's family and size, its batch, and how many processes train it."""

    family: str
    """`llama` (dense), `mixtral` (experts) or `grok` (experts, soft caps, sandwich norms); `grok-dense` without
    experts."""
    hidden: int
    layers: int
    seq_len: int
    global_batch: int
    micro_batch: int
    processes: int
    zero_stage: int = 1
    experts: int = 8
    precision: str = "auto"

    @property
    def name(self) -> str:
        """What tells it apart."""
        size = f"{self.family} {self.hidden}x{self.layers} seq {self.seq_len}"
        return f"{size} batch {self.micro_batch} of {self.global_batch} on {self.processes} zero {self.zero_stage}"

    def run(self, steps: int) -> dict[str, Any]:
        """The run's spec."""
        hidden = self.hidden
        model: dict[str, Any] = {
            "layers": self.layers,
            "hidden": hidden,
            "ffn_hidden": hidden * 5 // 2,
            "heads": hidden // 64,
            "kv_heads": max(1, hidden // 128),
            "head_dim": 64,
            "vocab": VOCAB,
            "context": self.seq_len,
        }
        if self.family.startswith("grok"):
            model |= {
                "activation": "gelu",
                "norm_placement": "sandwich",
                "attention_softcap": 30.0,
                "embedding_multiplier": hidden**0.5,
                "output_multiplier": 0.577,
                "tied_embeddings": True,
            }
        if self.family in ("mixtral", "grok"):
            model["moe"] = {
                "experts": self.experts,
                "top_k": 2,
                "expert_hidden": 2 * hidden,
                "renormalize": self.family == "mixtral",
            }
        train = {
            "tokens": steps * self.global_batch * self.seq_len,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "micro_batch": self.micro_batch,
            "precision": self.precision,
            "validate_every": 0,
            "validation_tokens": self.seq_len * self.micro_batch * self.processes,
        }
        return {
            "name": "planned",
            "model": model,
            "data": {"source": "stdlib", "max_bytes": 4_000_000},
            "train": train,
            "parallel": {
                "data": self.processes,
                **dict.fromkeys(("tensor", "pipeline", "context", "expert", "expert_tensor"), 1),
                "zero_stage": self.zero_stage,
                "recompute": "none",
            },
            "cluster": {
                "preset": "local",
                "gpus": self.processes,
                "gpus_per_node": self.processes,
                "scale_up_domain": self.processes,
            },
        }


SHAPES = [
    Shape("llama", 256, 4, 512, 4, 4, 1),
    Shape("mixtral", 256, 4, 512, 4, 4, 1),
    Shape("grok", 384, 4, 512, 4, 2, 1),
    Shape("llama", 512, 8, 256, 4, 4, 1),
    Shape("llama", 128, 6, 1024, 8, 2, 1),
    Shape("grok-dense", 256, 6, 1024, 2, 2, 1),
    Shape("llama", 256, 4, 512, 8, 4, 2),
    Shape("mixtral", 256, 2, 256, 16, 8, 2, zero_stage=2),
    Shape("grok", 256, 3, 512, 8, 2, 2, zero_stage=3),
    Shape("llama", 512, 2, 256, 16, 4, 4),
    Shape("grok", 128, 4, 128, 32, 8, 4, zero_stage=3),
    Shape("llama", 256, 8, 128, 32, 8, 4, zero_stage=0),
]
QUICK = [SHAPES[index] for index in (0, 2, 6, 10)]


@dataclass
class Row:
    """A shape's prediction and its measurements."""

    shape: Shape
    predicted_s: float
    reasons: dict[str, float]
    measured_s: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    """GFLOP/s of the calibration product around each measurement."""

    @property
    def best_s(self) -> float:
        """The fastest round's median."""
        return min(self.measured_s)

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / self.best_s - 1.0


def predict(shape: Shape, steps: int) -> Row:
    """What `plan` says of a shape."""
    from modelworks.plan.planner import plan
    from modelworks.spec.files import run_from

    found = plan(run_from(shape.run(steps)))
    return Row(shape, found.step_time_s, found.best.reasons)


def measure(shape: Shape, steps: int) -> float:
    """The median step of a run of the train command, without the first step.

    The run has its own home folder, which sees the packed data and the hardware file of the real one.
    """
    import tomli_w

    from modelworks.spec.home import data_folder, hardware_file

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        data_folder().mkdir(parents=True, exist_ok=True)
        (home / "data").symlink_to(data_folder())
        (home / "hardware.toml").symlink_to(hardware_file())
        (home / "run.toml").write_text(tomli_w.dumps(shape.run(steps)), encoding="utf-8")
        command = [sys.executable, "-m", "modelworks", "train", str(home / "run.toml")]
        done = subprocess.run(
            [*command, "--nproc", str(shape.processes)],
            env=os.environ | {"MODELWORKS_HOME": str(home)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{shape.name}: train ended with code {done.returncode}: {done.stderr[-800:]}")
        lines = (home / "runs" / "planned" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(float(json.loads(line)["step_time_s"]) for line in lines[1:])


def calibration_gflops() -> float:
    """The best rate of a few products of a layer's size: what other work leaves of the processor right now."""
    import torch

    left, right, best = torch.randn(1024, 512), torch.randn(512, 512), 0.0
    for _ in range(20):
        begun = time.perf_counter()
        torch.mm(left, right)
        best = max(best, 2 * 1024 * 512 * 512 / (time.perf_counter() - begun))
    return best / 1e9


def table(rows: list[Row], fastest: float) -> str:
    """The rows, and the mean error at the end."""
    lines = [f"{'shape':52}{'planned, s':>11}{'measured':>10}{'error':>8}{'speed':>7}  planned by reason"]
    for row in rows:
        reasons = sorted(row.reasons.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {seconds / row.predicted_s:.0%}" for name, seconds in reasons[:5] if seconds > 0)
        speed = max(row.speeds) / fastest
        lines.append(
            f"{row.shape.name:52}{row.predicted_s:11.3f}{row.best_s:10.3f}{row.error:+8.0%}{speed:7.2f}  {parts}"
        )
    mape = statistics.fmean(abs(row.error) for row in rows)
    bias = statistics.fmean(row.error for row in rows)
    worst = max(abs(row.error) for row in rows)
    lines.append(f"MAPE {mape:.1%} over {len(rows)} shapes (target {TARGET:.0%}), bias {bias:+.1%}, worst {worst:.1%}")
    if disturbed := sum(max(row.speeds) < DISTURBED * fastest for row in rows):
        lines.append(f"{disturbed} of {len(rows)} shapes were measured while other work took the processor")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four shapes, one round")
    parser.add_argument("--bench", action="store_true", help="measure this machine anew first")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each shape; the fastest counts")
    parser.add_argument("--steps", type=int, default=6, help="steps of each run")
    parser.add_argument("--only", help="shapes whose name has this in it")
    parser.add_argument("--predict", action="store_true", help="print the predictions and train nothing")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    from modelworks.spec.home import hardware_file

    if arguments.bench or not hardware_file().is_file():
        subprocess.run([sys.executable, "-m", "modelworks", "bench"], check=True)
    shapes = QUICK if arguments.quick else SHAPES
    shapes = [shape for shape in shapes if arguments.only is None or arguments.only in shape.name]
    rows = [predict(shape, arguments.steps) for shape in shapes]
    if arguments.predict:
        for row in rows:
            print(row.shape.name, f"{row.predicted_s:.4f}", {k: round(v, 4) for k, v in row.reasons.items() if v})
        return
    print(f"load of the last minute: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors", flush=True)
    for number in range(1 if arguments.quick else arguments.rounds):
        for row in rows:
            before = calibration_gflops()
            row.measured_s.append(measure(row.shape, arguments.steps))
            row.speeds.append(min(before, calibration_gflops()))
            print(f"round {number + 1}: {row.shape.name}: {row.measured_s[-1]:.3f} s", file=sys.stderr, flush=True)
    fastest = max(speed for row in rows for speed in row.speeds)
    print(f"load of the last minute: {os.getloadavg()[0]:.1f}")
    print(table(rows, fastest))
    if arguments.json:
        figures = [asdict(row) | {"error": row.error} for row in rows]
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
