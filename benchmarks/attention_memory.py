"""How much memory one layer's attention takes, and how long, by the length of its sequence: forward and backward.

Each length is measured in a process of its own. What is printed is the peak of its resident memory (VmHWM of
/proc/PID/status) above what it had before, and what it would have taken to hold one matrix of logits; a length that
does not fit in --limit GiB is not tried without blocks.

    python benchmarks/attention_memory.py --lengths 8192,32768,131072
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure each length and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,8192,32768,131072")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--softcap", type=float, default=30.0, help="0 for none")
    parser.add_argument("--window", type=int, default=0, help="0 for none")
    parser.add_argument("--plain", action="store_true", help="the formula, with the whole matrix of logits")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments)))
        return
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", str(length)], check=True, capture_output=True, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if not arguments.json:
            row = rows[-1]
            print(
                f"{row['length']:>8,} tokens: {row['peak_bytes'] / 2**20:8,.0f} MiB, "
                f"{row['peak_bytes'] / row['length']:6,.0f} bytes a token (one matrix of logits: "
                f"{row['logits_bytes'] / 2**20:9,.0f} MiB), forward {row['forward_s']:7.1f} s, "
                f"backward {row['backward_s']:7.1f} s",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(rows, indent=1))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """One length, in this process."""
    import torch

    from modelworks.model.attention import attention

    torch.set_num_threads(1)
    length, heads = arguments.one, arguments.heads

    def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scale, softcap, window = arguments.head_dim**-0.5, arguments.softcap or None, arguments.window or None
        if not arguments.plain:
            return attention(queries, keys, values, scale, softcap, window)
        groups = heads // arguments.kv_heads
        logits = queries @ keys.repeat_interleave(groups, 1).transpose(-1, -2) * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return logits.masked_fill(later, -torch.inf).softmax(-1) @ values.repeat_interleave(groups, 1)

    def inputs(positions: int) -> list[torch.Tensor]:
        counts = (heads, arguments.kv_heads, arguments.kv_heads)
        return [torch.randn(1, count, positions, arguments.head_dim, requires_grad=True) for count in counts]

    small = inputs(256)
    torch.autograd.grad(attend(*small).sum(), small)  # what is loaded once
    before = resident("VmRSS")
    large = inputs(length)
    begun = time.perf_counter()
    output = attend(*large)
    forward_s = time.perf_counter() - begun
    begun = time.perf_counter()
    torch.autograd.grad(output, large, torch.ones_like(output))
    backward_s = time.perf_counter() - begun
    return {
        "length": length,
        "peak_bytes": resident("VmHWM") - before,
        "logits_bytes": 4 * heads * length**2,
        "forward_s": forward_s,
        "backward_s": backward_s,
    }


def resident(field: str) -> int:
    """A figure of this process's memory, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
