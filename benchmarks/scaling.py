"""Training on 1, 2 and 4 processes of this machine: each layout of ours beside plain PyTorch DDP and FSDP2.

    python benchmarks/scaling.py [--processes 1,2,4] [--rounds 5] [--steps 2] [--precision fp32] [--json FILE]

The network is a mixture of experts of 6 million parameters; a step is 8 sequences of 256 tokens, in two micro batches
on each process. For each layout the same processes hold our trainer, whole (data, exchanges, clipping, AdamW, the
measurement of what it waits for, the log's line), and a minimal script on the same network and data: PyTorch's DDP
beside ZeRO 0, FSDP2 with the same mesh and resharding beside ZeRO 1 to 3. They take their steps in turn, and the
medians of the rounds are compared; their first losses must agree. Tensor, context and expert parallelism have no plain
counterpart that runs here, and are shown beside plain FSDP2 on as many processes. Processes share the cores: per-core
efficiency is the tokens per second over those of one process with one thread, for each core in use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEQUENCES, LENGTH, SEED = 8, 256, 1337
MODEL = {
    "layers": 4,
    "hidden": 256,
    "heads": 4,
    "kv_heads": 4,
    "vocab": 2048,
    "context": LENGTH,
    "tied_embeddings": False,
    "moe": {"experts": 4, "top_k": 2, "expert_hidden": 512},
}
TARGET = 1.03
_CONTEXT = multiprocessing.get_context("forkserver")
_LATE_S = 300.0


@dataclass(frozen=True)
class Case:
    """A layout on so many processes, and what of plain PyTorch stands beside it."""

    name: str
    processes: int
    threads: int
    parallel: dict[str, int]
    rival: str | None
    """`DDP`, `FSDP2`; None where there is one process."""
    counterpart: bool
    """Whether the rival does the same work, so that the target holds."""


@dataclass(frozen=True)
class Result:
    """Medians over the rounds."""

    name: str
    processes: int
    tokens_per_s: float
    efficiency: float | None
    """Of each core in use, over one process with one thread, where that was measured."""
    rival: str | None
    counterpart: bool
    ratio: float | None
    """Our time over the rival's."""
    spread: float | None
    """Of the rounds' ratios: the interquartile range."""


def cases(processes: list[int]) -> list[Case]:
    """Each family of layouts on each number of processes."""
    cores = os.cpu_count() or 1
    found = []
    for count in processes:
        threads = max(1, cores // count)
        if count == 1:
            found.append(Case("one process, one thread", 1, 1, {}, None, False))
            if cores > 1:
                found.append(Case(f"one process, {cores} threads", 1, cores, {}, None, False))
            continue
        for stage in range(4):
            rival = "FSDP2" if stage else "DDP"
            found.append(Case(f"ZeRO {stage}", count, threads, {"zero_stage": stage}, rival, True))
        others: list[dict[str, int]] = [
            {"tensor": count, "expert_tensor": count},
            {"context": count, "zero_stage": 2},
            {"expert": count, "zero_stage": 2},
        ]
        if count >= 4:
            others += [{"tensor": 2, "expert_tensor": 2, "zero_stage": 2}, {"shard": 2, "zero_stage": 2}]
        for parallel in others:
            degrees = {name: degree for name, degree in parallel.items() if name not in ("zero_stage", "expert_tensor")}
            name = ", ".join(f"{axis} {degree}" for axis, degree in degrees.items())
            found.append(Case(name, count, threads, parallel, "FSDP2", "shard" in parallel))
    return found


def run_spec(case: Case, precision: str, text: Path) -> Any:
    """The run of a case."""
    from modelworks.spec.files import run_from

    share = SEQUENCES // _data(case)
    return run_from(
        {
            "name": "scaling",
            "model": MODEL,
            "data": {"source": "files", "files": [str(text)]},
            "train": {
                "tokens": 1_000_000_000,
                "seq_len": LENGTH,
                "global_batch": SEQUENCES,
                "micro_batch": max(1, share // 2),
                "precision": precision,
                "compile": False,
                "seed": SEED,
            },
            "parallel": case.parallel,
            "cluster": {"preset": "local"}
            | dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), case.processes),
        }
    )


def _data(case: Case) -> int:
    return case.processes // (case.parallel.get("tensor", 1) * case.parallel.get("context", 1))


class Plain:
    """The same network under plain PyTorch: forward, backward, clipping and AdamW, and nothing else."""

    def __init__(self, case: Case, trainer: Any, rank: int) -> None:
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
        from torch.nn.parallel import DistributedDataParallel

        from modelworks.model.decoder import Decoder

        self.kind, self.zero_stage, self.trainer = case.rival, case.parallel.get("zero_stage", 2), trainer
        self.share = SEQUENCES // case.processes
        self.rank, self.at = rank, 0
        decoder = Decoder(trainer.spec.model)
        decoder.initialize(SEED)
        if self.kind == "DDP":
            self.network: Any = DistributedDataParallel(decoder)
        else:
            shard = case.parallel.get("shard", case.processes)
            copies = case.processes // shard
            shape, names = ((copies, shard), ("copies", "shard")) if copies > 1 else ((shard,), ("shard",))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for block in decoder.blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=self.zero_stage == 3)
            self.network = fully_shard(decoder, mesh=mesh, reshard_after_forward=False)
            for module in decoder.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        spec = trainer.train_spec
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=spec.learning_rate, betas=(spec.beta1, spec.beta2), fused=True
        )

    def step(self) -> float:
        """One optimizer step; returns the mean loss over all processes."""
        import torch
        import torch.distributed as dist

        trainer, spec = self.trainer, self.trainer.train_spec
        begin = self.at * SEQUENCES + self.rank * self.share
        sequences = torch.from_numpy(trainer.data.sequences("train", begin, self.share, LENGTH, SEED))
        batches = torch.split(sequences, max(1, self.share // 2))
        total = torch.zeros(())
        for place, batch in enumerate(batches, start=1):
            with self._exchanging(place == len(batches)):
                with trainer.precision.autocast():
                    losses = self.network(batch[:, :-1], batch[:, 1:])
                loss = trainer._weighted(losses) / len(batches)
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), spec.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(total)
        self.at += 1
        return float(total) / dist.get_world_size()

    def _exchanging(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if self.kind == "DDP":
            return contextlib.nullcontext() if last else self.network.no_sync()
        if self.zero_stage < 2:
            self.network.set_requires_gradient_sync(last)
        self.network.set_is_last_backward(last)
        self.network.set_reshard_after_backward(last or self.zero_stage == 3)
        return contextlib.nullcontext()


def member(rank: int, case: Case, folder: Path, precision: str, rounds: int, steps: int, sender: Any) -> None:
    """One process of a case; the first sends the seconds of each round's steps, ours and the rival's."""
    import torch
    import torch.distributed as dist

    from modelworks.train.loop import Trainer
    from modelworks.train.ranks import Ranks, only_this_machine
    from modelworks.train.session import MemberSession, RunSession, open_run
    from modelworks.train.view import NoView

    torch.set_num_threads(case.threads)
    only_this_machine()
    os.environ["MODELWORKS_HOME"] = str(folder / "home")
    spec = run_spec(case, precision, folder / "text")
    if case.processes > 1:
        store = dist.FileStore(str(folder / f"store-{case.name}-{case.processes}"), case.processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.processes)

    def measure(session: RunSession) -> tuple[list[float], list[float]]:
        trainer = Trainer(session, NoView(), Ranks(rank, case.processes))
        ours: Callable[[], float] = lambda: _ours(trainer)  # noqa: E731
        runners = [ours]
        if case.rival:
            runners.append(Plain(case, trainer, rank).step)
        first = [runner() for runner in runners]
        # Where a data shard has more sequences than the rival's, so has a micro batch, and the experts' balance is
        # that of another micro batch.
        tolerance = 2e-2 if precision == "bf16" else 1e-4 if case.counterpart else 1e-3
        if len(first) == 2 and not math.isclose(*first, rel_tol=tolerance):
            raise AssertionError(f"{case.name}: the first losses are {first}: not the same work")
        for runner in runners:
            runner()
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds):
            order = list(enumerate(runners))
            for place, runner in order if number % 2 == 0 else reversed(order):
                if case.processes > 1:
                    dist.barrier()
                begun = time.perf_counter()
                for _ in range(steps):
                    runner()
                if case.processes > 1:
                    dist.barrier()
                times[place].append((time.perf_counter() - begun) / steps)
        trainer.close()
        return times

    run_folder = folder / "runs" / f"{case.name}-{case.processes}".replace(" ", "-").replace(",", "")
    if case.processes == 1:
        with open_run(spec, folder=run_folder) as session:
            times = measure(session)
    else:
        run_folder.mkdir(parents=True, exist_ok=True)
        times = measure(MemberSession(run_folder, spec, False, rank == 0))
    if rank == 0:
        sender.send(times)
    if case.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def _ours(trainer: Any) -> float:
    row = trainer._timed_step()
    trainer._report(row, log=True)
    return float(row["loss"])


def measure(case: Case, folder: Path, precision: str, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """The seconds of a step in each round, ours and the rival's."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    members = [
        _CONTEXT.Process(target=member, args=(rank, case, folder, precision, rounds, steps, sender), daemon=True)
        for rank in range(case.processes)
    ]
    try:
        for process in members:
            process.start()
        sender.close()
        if not receiver.poll(_LATE_S):
            raise SystemExit(f"{case.name} on {case.processes} processes has not answered within {_LATE_S:.0f} s")
        times: tuple[list[float], list[float]] = receiver.recv()
        return times
    except EOFError:
        raise SystemExit(f"{case.name} on {case.processes} processes has failed") from None
    finally:
        for process in members:
            if process.pid is not None:
                process.join(10.0)
                process.kill()


def write_text(folder: Path) -> None:
    """Documents of made-up words."""
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(4000)]
    folder.mkdir()
    for index in range(120):
        text = " ".join(draw.choices(words, weights=range(4000, 0, -1), k=2000))
        (folder / f"{index:03d}.txt").write_text(text + ".\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="numbers with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each in a round")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "modelworks.train.loop"])
    cores = os.cpu_count() or 1
    results: list[Result] = []
    one_thread: float | None = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text")
        chosen = [case for case in cases([int(n) for n in options.processes.split(",")]) if options.only in case.name]
        for place, case in enumerate(chosen, start=1):
            if sys.stderr.isatty():
                print(f"\r\x1b[K{place} of {len(chosen)}: {case.name}", end="\r", file=sys.stderr, flush=True)
            ours, rival = measure(case, folder, options.precision, options.rounds, options.steps)
            speed = SEQUENCES * LENGTH / statistics.median(ours)
            if case.processes == case.threads == 1:
                one_thread = speed
            used = min(cores, case.processes * case.threads)
            ratios = [mine / other for mine, other in zip(ours, rival, strict=True)] if rival else []
            results.append(
                Result(
                    name=case.name,
                    processes=case.processes,
                    tokens_per_s=speed,
                    efficiency=speed / (used * one_thread) if one_thread else None,
                    rival=case.rival,
                    counterpart=case.counterpart,
                    ratio=statistics.median(ratios) if ratios else None,
                    spread=_spread(ratios) if len(ratios) > 3 else None,
                )
            )
            print_result(results[-1])
    slow = [result for result in results if result.counterpart and (result.ratio or 0.0) > TARGET]
    print(
        f"slower than plain PyTorch by more than 3 %: {', '.join(f'{r.name} on {r.processes}' for r in slow) or 'none'}"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    return 0


def print_result(result: Result) -> None:
    """One line of the table."""
    beside = ""
    if result.ratio is not None:
        note = "" if result.counterpart else " (no counterpart)"
        beside = f"  {result.ratio:.3f} of {result.rival}'s time{note}"
        beside += f", spread {result.spread:.3f}" if result.spread is not None else ""
    each = "" if result.efficiency is None else f"  {result.efficiency:5.0%} per core"
    print(f"{result.processes} x  {result.name:26s} {result.tokens_per_s:7,.0f} tokens/s{each}{beside}", flush=True)


def _spread(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


if __name__ == "__main__":
    sys.exit(main())
