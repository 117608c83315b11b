"""One training step of a mixture of experts: ours against Hugging Face's Mixtral at each of its settings.

    python benchmarks/train_throughput.py [--rounds 7] [--json FILE]

A step is forward, backward and AdamW on the same batch of random tokens: hidden 384, 6 layers, 6 heads, 2 key-value
heads, 8 experts of width 1,024 (top-2), vocabulary 8,192, 4 sequences of 512. Each candidate lives in a process of its
own, so that its peak memory is its own. Hugging Face's settings are tried alone first; the fastest of them and ours
then take their steps in turn, one at a time, and the medians are compared. Settings that this machine has no use for
are named with the reason. The last lines give the time of the step's matrix multiplications alone: what no
implementation in that precision can beat without multiplying faster.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCH, LENGTH, VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 512, 8192, 384, 6, 6, 2, 64
EXPERTS, TOP_K, WIDTH = 8, 2, 1024
TOKENS = BATCH * LENGTH
TARGET = 2.0
SLOW = 5.0
"""A precision whose matmul is so many times slower than fp32's is left out."""
QUALIFYING_ROUNDS, FINAL_RIVALS = 3, 3
"""Steps by which Hugging Face's settings are chosen, and how many of them meet ours."""
WARMUP = 3
"""Steps before the measured ones: compilation, the allocator's growth, the optimizer's state."""


@dataclass(frozen=True)
class Candidate:
    """One implementation at one setting."""

    name: str
    kind: str
    """`hf`, `mixtral` (ours, the same network) or `grok` (ours, the Grok family's network of that size)."""
    precision: str = "fp32"
    compiled: bool = False
    experts: str = ""


@dataclass(frozen=True)
class Result:
    """What a candidate did."""

    name: str
    tokens_per_s: float
    step_s: float
    peak_gib: float


def candidates() -> tuple[list[Candidate], list[str]]:
    """Who takes part on this machine, and why others don't.

    Ours are in the precision that ``train.precision = "auto"`` finds, compiled as ``train.compile = "auto"`` compiles a
    run of this size; the first is the one that is compared.
    """
    import torch

    from modelworks.model.precision import fastest_precision, matmul_s

    fp32_s, bf16_s = matmul_s((torch.float32, torch.bfloat16))
    bfloat16 = bf16_s <= SLOW * fp32_s
    precisions = ["fp32", "bf16"] if bfloat16 else ["fp32"]
    fastest = "bf16" if fastest_precision() == torch.bfloat16 else "fp32"
    taking_part = [
        Candidate(
            f"modelworks, {shape}'s shape, {fastest}, {'compiled' if compiled else 'eager'}",
            shape.lower(),
            fastest,
            compiled,
        )
        for shape in ("Mixtral", "Grok")
        for compiled in (True, False)
    ]
    taking_part += [
        Candidate(
            f"Hugging Face, {precision}, {'compiled' if compiled else 'eager'}, {experts}",
            "hf",
            precision,
            compiled,
            experts,
        )
        for precision in precisions
        for compiled in (False, True)
        for experts in ("eager", "grouped_mm")
    ]
    copied_gib = TOKENS * TOP_K * 3 * HIDDEN * WIDTH * 4 / 2**30
    left_out = [
        f"Hugging Face with experts batched_mm: copies every token's expert matrices, {copied_gib:.0f} GiB a layer"
    ]
    if not bfloat16:
        left_out.append("every setting in bf16: this machine has no units for it")
    return taking_part, left_out


def step_of(candidate: Candidate) -> Callable[[], None]:
    """A function that takes one training step of the candidate."""
    import torch

    torch.manual_seed(0)
    network, loss = hugging_face(candidate) if candidate.kind == "hf" else modelworks(candidate)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=candidate.precision == "bf16"):
            value = loss(tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hugging_face(candidate: Candidate) -> tuple[Any, Callable[[Any], Any]]:
    """Hugging Face's Mixtral with fused attention, and its loss with the router's term."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=LENGTH,
        sliding_window=None,
    )
    network = MixtralForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation=candidate.experts
    )
    run = torch.compile(network) if candidate.compiled else network
    return network, lambda tokens: run(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss


def modelworks(candidate: Candidate) -> tuple[Any, Callable[[Any], Any]]:
    """Our decoder, and its loss with the router's two terms."""
    import torch

    from modelworks.model.decoder import Decoder
    from modelworks.spec.model import ModelSpec
    from modelworks.train.compiling import try_compile

    family: dict[str, Any] = {}
    if candidate.kind == "grok":
        family = {
            "activation": "gelu",
            "norm_placement": "sandwich",
            "attention_softcap": 30.0,
            "embedding_multiplier": HIDDEN**0.5,
            "output_multiplier": 3**-0.5,
            "tied_embeddings": True,
        }
    experts = {"experts": EXPERTS, "top_k": TOP_K, "expert_hidden": WIDTH, "renormalize": candidate.kind == "mixtral"}
    spec = ModelSpec(
        layers=LAYERS,
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        ffn_hidden=WIDTH,
        vocab=VOCAB,
        context=LENGTH,
        moe=experts,
        **family,
    )
    network = Decoder(spec)

    def loss(tokens: Any) -> Any:
        losses = network(tokens[:, :-1], tokens[:, 1:])
        return losses.cross_entropy + 0.01 * losses.load_balance + 0.001 * losses.router_z

    if candidate.compiled:
        assert try_compile(network, lambda: loss(torch.randint(0, VOCAB, (BATCH, LENGTH + 1))).backward())
    return network, loss


def matmul_shapes() -> list[tuple[int, int, int]]:
    """The weights' matmuls of one forward pass as (rows, in, out): balanced experts, the head, no attention scores."""
    rows = TOKENS * TOP_K // EXPERTS
    layer = [(TOKENS, HIDDEN, HEADS * HEAD_DIM), (TOKENS, HEADS * HEAD_DIM, HIDDEN)]
    layer += [(TOKENS, HIDDEN, KV_HEADS * HEAD_DIM)] * 2
    layer += [(rows, HIDDEN, WIDTH), (rows, HIDDEN, WIDTH), (rows, WIDTH, HIDDEN)] * EXPERTS
    return layer * LAYERS + [(TOKENS, HIDDEN, VOCAB)]


def ceiling_step(precision: str) -> Callable[[], None]:
    """A function that does only the matmuls of one step: each product, and its two gradients."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = matmul_shapes()
    sizes = {shape: ((shape[0], shape[1]), (shape[1], shape[2]), (shape[0], shape[2])) for shape in shapes}
    factors = {shape: [torch.randn(size).to(dtype) for size in sizes[shape]] for shape in sizes}
    products = {shape: [torch.empty(size, dtype=dtype) for size in sizes[shape]] for shape in sizes}

    def step() -> None:
        for shape in shapes:
            rows, weight, above = factors[shape]
            to_rows, to_weight, product = products[shape]
            torch.mm(rows, weight, out=product)
            torch.mm(above, weight.t(), out=to_rows)
            torch.mm(rows.t(), above, out=to_weight)

    return step


def work(candidate: Candidate | None, precision: str) -> None:
    """The worker: get warm, take one step per line read and answer with its seconds, and at the end with the peak."""
    step = ceiling_step(precision) if candidate is None else step_of(candidate)
    for _ in range(WARMUP):
        step()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - start), flush=True)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20), flush=True)


class Worker:
    """A candidate in a process of its own."""

    def __init__(self, candidate: Candidate | None, precision: str = "fp32") -> None:
        self.name = candidate.name if candidate else "matmuls alone"
        given = json.dumps([asdict(candidate) if candidate else None, precision])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.steps_s: list[float] = []

    def answer(self) -> Any:
        """The next answer, or an error that ends with what the process said last."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise RuntimeError(f"{self.name} ended: {self.process.stderr.read()[-500:]}")
        return json.loads(line)

    def step(self) -> None:
        """Take one step and remember its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps_s.append(self.answer())

    def finish(self) -> Result:
        """End the process and sum up."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak_gib, median_s = self.answer(), statistics.median(self.steps_s)
        self.process.wait()
        return Result(self.name, TOKENS / median_s, median_s, peak_gib)


def heat(taking_part: list[Candidate | None], precision: str, rounds: int) -> list[Result]:
    """Warm the candidates up, one after another, and let them take their steps in turn."""
    workers: list[Worker] = []
    try:
        for candidate in taking_part:
            workers.append(Worker(candidate, precision))
            workers[-1].answer()
        for _ in range(rounds):
            for worker in workers:
                worker.step()
        return [worker.finish() for worker in workers]
    finally:
        for worker in workers:
            worker.process.kill()


def finalists(taking_part: list[Candidate], precision: str) -> list[Candidate]:
    """Ours and the fastest of Hugging Face's settings, each tried alone: all at once would not fit a small memory."""
    rivals = [candidate for candidate in taking_part if candidate.kind == "hf"]
    tried = [heat([rival], precision, QUALIFYING_ROUNDS)[0] for rival in rivals]
    for result in tried:
        print(f"alone: {result.name}: {result.tokens_per_s:.0f} tokens/s, {result.peak_gib:.2f} GiB", flush=True)
    fastest = sorted(range(len(rivals)), key=lambda place: -tried[place].tokens_per_s)[:FINAL_RIVALS]
    return [candidate for candidate in taking_part if candidate.kind != "hf"] + [rivals[place] for place in fastest]


def report(results: list[Result], left_out: list[str], precision: str) -> dict[str, Any]:
    """Print the table and the ratios, and return them."""
    *rows, ceiling = results
    ours, rivals = rows[0], [row for row in rows if row.name.startswith("Hugging Face")]
    best = max(rivals, key=lambda row: row.tokens_per_s)
    print(f"{'':46}{'tokens/s':>10}{'step, s':>10}{'peak, GiB':>11}{'to best HF':>12}")
    for row in rows:
        ratio = row.tokens_per_s / best.tokens_per_s
        print(f"{row.name:46}{row.tokens_per_s:10.0f}{row.step_s:10.3f}{row.peak_gib:11.2f}{ratio:12.2f}")
    for reason in left_out:
        print(f"left out: {reason}")
    speed, memory = ours.tokens_per_s / best.tokens_per_s, ours.peak_gib / best.peak_gib
    flop = 3 * 2 * sum(rows * inner * outer for rows, inner, outer in matmul_shapes())
    print(f"ours to the best of Hugging Face: {speed:.2f}x tokens/s, {memory:.2f}x peak memory (target: {TARGET}x, 1x)")
    print(
        f"matmuls alone, {precision}: {ceiling.step_s:.3f} s, {flop / ceiling.step_s / 1e9:.0f} GFLOP/s, a ceiling of "
        f"{ceiling.tokens_per_s:.0f} tokens/s or {ceiling.tokens_per_s / best.tokens_per_s:.2f}x the best of "
        f"Hugging Face; ours reaches {ours.tokens_per_s / ceiling.tokens_per_s:.0%} of it"
    )
    return {
        "results": [asdict(row) for row in rows],
        "left_out": left_out,
        "best": best.name,
        "ratio": speed,
        "memory_ratio": memory,
        "matmuls_alone_s": ceiling.step_s,
        "target": TARGET,
        "met": speed >= TARGET and memory <= 1.0,
    }


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each candidate")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        values, precision = json.loads(arguments.worker)
        work(Candidate(**values) if values else None, precision)
        return
    taking_part, left_out = candidates()
    precision = taking_part[0].precision
    last = [*finalists(taking_part, precision), None]
    figures = report(heat(last, precision, arguments.rounds), left_out, precision)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
