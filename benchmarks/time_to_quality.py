"""How long a training takes to a quality: Modelworks' recipe against a dense GPT of nanochat's, on this machine.

Both see the same text in the same order through the same tokenizer, on the same threads, and are measured on the same
held-out tokens by the same function (bits per byte). A budget is seconds of training: preparing, compiling and
measuring are not in it (the baseline runs in the faster of its forms, ours compiled), and each budget is a training of
its own with its schedule fitted to it. The baseline trains for the budget with each batch size and its best counts;
ours trains for a quarter, a half and the whole of it. The target is the baseline's bits per byte in half the time.

    python benchmarks/time_to_quality.py --minutes 4
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from modelworks.data import PackedDataset, prepare
from modelworks.model.precision import fastest_precision
from modelworks.spec import RunSpec, load_run
from modelworks.spec.home import data_folder
from modelworks.train.evaluate import Validation
from modelworks.train.loop import train as train_ours
from modelworks.train.session import open_run
from nanochat_recipe import GPT, multiplied_in, train

RECIPE = Path(__file__).parent.parent / "src" / "modelworks" / "web" / "first_run.toml"
EVALUATION_BATCH = 8
SHARES = (0.25, 0.5, 1.0)


def main() -> None:
    """Run the benchmark and print its figures."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    spec = load_run(RECIPE)
    data = prepare(spec.data, spec.model.vocab, data_folder())
    dtype = fastest_precision()
    budget = arguments.minutes * 60
    say(f"{arguments.threads} threads, {dtype}, {data.tokens('train'):,} tokens to train on, budget {budget:.0f} s")
    baselines = [baseline(data, spec, batch, budget, dtype, arguments.depth) for batch in arguments.batches]
    best = min(baselines, key=lambda run: run["bpb"])
    curve = [ours(share * budget) for share in SHARES]
    at_half = curve[SHARES.index(0.5)]["bpb"]
    equal = seconds_to(best["bpb"], curve)
    summary = {
        "budget_s": budget,
        "baseline": baselines,
        "baseline_bpb": best["bpb"],
        "ours": curve,
        "met": at_half <= best["bpb"],
        "seconds_to_baseline_bpb": equal,
        "ratio": budget / equal if equal else None,
    }
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return
    say(f"baseline, best batch {best['batch']}: {best['bpb']:.4f} bits per byte in {budget:.0f} s")
    say(
        f"ours: {at_half:.4f} in half of that; target (at most the baseline's) {'met' if summary['met'] else 'not met'}"
    )
    say(f"the baseline's bits per byte {reached(best['bpb'], equal, budget, curve)}")


def baseline(
    data: PackedDataset, spec: RunSpec, batch: int, budget_s: float, dtype: torch.dtype, depth: int
) -> dict[str, Any]:
    """Train nanochat's recipe for a budget and measure it."""
    seq_len, seed = spec.train.seq_len, spec.train.seed
    network = GPT(depth, spec.model.vocab, seq_len, seed)
    loss, form = faster_form(network, next(batches(data, batch, seq_len, seed)), dtype)
    trained = train(network, loss, batches(data, batch, seq_len, seed), budget_s, dtype)

    @torch.no_grad()
    def cross_entropy(sequences: torch.Tensor) -> float:
        with multiplied_in(dtype):
            return float(network(sequences))

    bpb = Validation(data, data.tokens("validation"), seq_len, EVALUATION_BATCH).bits_per_byte(cross_entropy)
    assert bpb is not None
    row = {"batch": batch, "seconds": trained.seconds, "steps": trained.steps, "tokens": trained.tokens, "bpb": bpb}
    say(f"baseline, depth {depth}, batch {batch}, {form}: {shown(row)}")
    return row | {"form": form}


def faster_form(
    network: GPT, batch: torch.Tensor, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """The network as it is or compiled, whichever takes less time here."""
    compiled = torch.compile(network, dynamic=False)
    plain_s, compiled_s = (seconds_of(form, network, batch, dtype) for form in (network, compiled))
    return (compiled, "compiled") if compiled_s < plain_s else (network, "eager")


def seconds_of(
    form: Callable[[torch.Tensor], torch.Tensor], network: GPT, batch: torch.Tensor, dtype: torch.dtype
) -> float:
    """The fastest of four forward and backward passes after the first; gradients are thrown away."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        with multiplied_in(dtype):
            form(batch).backward()
        network.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def ours(budget_s: float) -> dict[str, Any]:
    """Train the recipe by Modelworks' own loop for a budget; its last validation is the measurement."""
    overrides = [
        f"train.max_time={budget_s}",
        "train.compile=true",
        "train.tokens=1_000_000_000",
        "train.validate_every=0",
        "train.validation_tokens=1_000_000_000",
        'checkpoint.every="10d"',
    ]
    with tempfile.TemporaryDirectory() as folder:
        spec = load_run(RECIPE, overrides)
        with open_run(spec, folder=Path(folder) / spec.name) as session:
            result = train_ours(session)
    if result.validation_bpb is None:
        raise SystemExit(f"the training was stopped by signal {result.received}: nothing to compare")
    row = {"seconds": budget_s, "steps": result.step, "tokens": result.tokens, "bpb": result.validation_bpb}
    count = spec.model.parameters
    say(f"ours, {count.active / 1e6:.1f} M active of {count.total / 1e6:.1f} M: {shown(row)}")
    return row


def batches(data: PackedDataset, batch: int, seq_len: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches (B, T + 1) without end."""
    position = 0
    while True:
        yield torch.from_numpy(data.sequences("train", position, batch, seq_len, seed))
        position += batch


def seconds_to(bpb: float, curve: list[dict[str, Any]]) -> float | None:
    """When our curve crosses `bpb`, linear in the logarithm of time; None outside of what was measured."""
    for before, after in pairwise(curve):
        if before["bpb"] >= bpb >= after["bpb"]:
            share = (before["bpb"] - bpb) / max(1e-12, before["bpb"] - after["bpb"])
            return before["seconds"] * (after["seconds"] / before["seconds"]) ** share
    return None


def reached(bpb: float, equal_s: float | None, budget_s: float, curve: list[dict[str, Any]]) -> str:
    """When ours reached the baseline's quality, in words."""
    if equal_s is not None:
        return f"are reached by ours after about {equal_s:.0f} s (interpolated): {budget_s / equal_s:.2f}x faster"
    if curve[0]["bpb"] < bpb:
        first = curve[0]["seconds"]
        return f"are passed by ours before {first:.0f} s: more than {budget_s / first:.0f}x faster"
    return f"are not reached by ours in {curve[-1]['seconds']:.0f} s"


def shown(row: dict[str, Any]) -> str:
    """A training in words."""
    pace = row["tokens"] / row["seconds"]
    return f"{row['bpb']:.4f} after {row['seconds']:.0f} s, {row['steps']:,} steps, {pace:,.0f} tokens/s"


def say(line: str) -> None:
    """Print a line of the account (on stderr, which keeps --json clean)."""
    print(line, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """The command's words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="the baseline's training time")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[2, 4, 8])
    parser.add_argument("--depth", type=int, default=4, help="the baseline's layers; its width is 64 times that")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
