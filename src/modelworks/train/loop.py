"""The training loop: batches in, weights out, everything that happens on the way logged and kept.

Three ideas. The run's whole state is in `Trainer` and goes into a checkpoint; what isn't in it (learning rate, batch)
follows from the spec and the step, so a resumed run repeats the uninterrupted one to the bit. A step is made whole or
not at all: signals are looked at between steps, and a loss that is no number ends the run before it reaches the
weights. The loop knows one device and no parallelism; that is applied to the network from outside.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelworks.data.packed import PackedDataset
from modelworks.data.preparation import prepare
from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder, Losses
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.flops import training_flop_per_token
from modelworks.spec.home import data_folder, write_atomically
from modelworks.spec.run import RunSpec
from modelworks.train import schedule
from modelworks.train.batching import micro_batch
from modelworks.train.compiling import try_compile, wanted
from modelworks.train.evaluate import Validation
from modelworks.train.machine import peak_flops
from modelworks.train.metrics import MetricsLog
from modelworks.train.optimizers import Optimizers
from modelworks.train.precision import Precision, resolve
from modelworks.train.session import RunSession
from modelworks.train.view import NoView, View

_SAY_EVERY_S = 0.5


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `finished`, or `stopped` by the signal `received`."""

    state: str
    received: int | None
    step: int
    tokens: int
    loss: float | None
    validation_bpb: float | None
    elapsed_s: float
    checkpoint: Path

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self) | {"checkpoint": str(self.checkpoint)}


def train(session: RunSession, view: View | None = None) -> TrainResult:
    """Train the session's run to its end, or until a signal asks to stop.

    Raises
    ------
    InputError
        If the spec asks for what isn't to be had here.
    OperationError
        If the work fails: unreadable data, a full disk, a loss that is no number. The last checkpoint stands.
    """
    refuse_unsupported(session.spec)
    view = view or NoView()
    with view, contextlib.closing(Trainer(session, view)) as trainer:
        return trainer.run()


def refuse_unsupported(spec: RunSpec) -> None:
    """Refuse what one process on this machine can't do, before anything is prepared."""
    for field in ("data", "tensor", "pipeline", "context", "expert", "expert_tensor"):
        if (degree := getattr(spec.parallel, field)) not in (1, "auto"):
            raise InputError(f"parallel.{field} = {degree} is not accepted: train runs on one process, which takes 1")
    if spec.parallel.recompute != "none":
        raise InputError(
            f"parallel.recompute = {spec.parallel.recompute!r} is not accepted: train keeps activations: none"
        )
    if spec.cluster.gpus != 1:
        raise InputError(f"cluster.gpus = {spec.cluster.gpus} is not accepted: train runs on this machine, which is 1")


class Trainer:
    """One run in progress: network, optimizers, data, and how far it has come."""

    def __init__(self, session: RunSession, view: View) -> None:
        self.session, self.view, self.interrupt = session, view, session.interrupt
        self.spec, self.folder = session.spec, session.folder
        self.train_spec = session.spec.train
        self.step, self.elapsed_s, self._metrics_bytes = 0, 0.0, 0
        self.loss: float | None = None
        self.validation_bpb: float | None = None
        self.micro_batch = micro_batch(self.spec)
        self.precision: Precision = resolve(self.train_spec.precision)
        self.data = self._prepare_data()
        self.validation = Validation(
            self.data, self.train_spec.validation_tokens, self.train_spec.seq_len, self.micro_batch
        )
        self._say("building the network")
        torch.manual_seed(self.train_spec.seed)
        self.decoder = Decoder(self.spec.model)
        self.decoder.initialize(self.train_spec.seed)
        self.optimizers = Optimizers(self.decoder, self.train_spec, self.precision.dtype)
        self.last_checkpoint = self._resume() if session.resume else None
        self.log = self._open_log()
        self._peak_flops = peak_flops(self.precision.name)
        self._flop_per_token = training_flop_per_token(self.spec.model, self.train_spec.seq_len)
        self._saved_at = time.monotonic()
        self._step_times: list[float] = []

    def close(self) -> None:
        """Close the metrics' files."""
        self.log.close()

    def run(self) -> TrainResult:
        """Make steps until the run is done or asked to stop; the last thing done is a checkpoint."""
        self._compile()
        self.interrupt.graceful = True
        self.session.report(state="running", message=None, steps=self.train_spec.steps)
        while not self._done() and self.interrupt.received is None:
            row = self._timed_step()
            done = self._done()
            if done or (self.train_spec.validate_every and self.step % self.train_spec.validate_every == 0):
                row["validation_bpb"] = self._validate()
            self._report(row, log=done or "validation_bpb" in row or self.step % self.train_spec.log_every == 0)
            if self._checkpoint_due() and not done:
                self._save()
        if self.last_checkpoint is None or self.last_checkpoint.name != f"step-{self.step:08d}":
            self._save()
        self.interrupt.graceful = False
        return self._end()

    def one_step(self) -> dict[str, Any]:
        """Make one optimizer step and say what came of it.

        Raises
        ------
        OperationError
            If loss or gradient is no number; the weights are then as before.
        """
        spec = self.train_spec
        factor = schedule.factor(spec, schedule.progress(spec, self.step + 1, self.elapsed_s))
        first = self.step * spec.global_batch
        sequences = self.data.sequences("train", first, spec.global_batch, spec.seq_len, spec.seed)
        accumulations = spec.global_batch // self.micro_batch
        total, parts, loads = 0.0, torch.zeros(3), []
        for batch in torch.split(torch.from_numpy(sequences), self.micro_batch):
            losses = self._losses(batch)
            loss = self._weighted(losses) / accumulations
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            parts += torch.stack([part.detach() for part in losses[:3]]) / accumulations
            loads.append(losses.expert_load.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), spec.clip or math.inf))
        if not math.isfinite(total) or not math.isfinite(norm):
            raise OperationError(
                f"the loss is {total} and the gradient's norm {norm} at step {self.step + 1}; the last checkpoint is "
                f"good: go on from it with a lower train.learning_rate (now {spec.learning_rate}) in a new run"
            )
        self.optimizers.step(factor)
        self.optimizers.zero_grad()
        self.step += 1
        self.loss = total
        cross_entropy, load_balance, router_z = parts.tolist()
        return {
            "step": self.step,
            "tokens": self.step * spec.tokens_per_step,
            "loss": total,
            "cross_entropy": cross_entropy,
            "load_balance_loss": load_balance,
            "router_z_loss": router_z,
            "learning_rate": spec.learning_rate * factor,
            "grad_norm": norm,
            "expert_load": _largest_loads(torch.stack(loads).mean(0)),
        }

    def _losses(self, sequences: Tensor) -> Losses:
        """The losses of sequences (B, T + 1)."""
        with self.precision.autocast():
            losses = self.decoder(sequences[:, :-1], sequences[:, 1:])
        assert isinstance(losses, Losses)
        return losses

    def _weighted(self, losses: Losses) -> Tensor:
        spec = self.train_spec
        return (
            losses.cross_entropy + spec.load_balance_loss * losses.load_balance + spec.router_z_loss * losses.router_z
        )

    def _validate(self) -> float | None:
        begun = time.perf_counter()

        @torch.no_grad()
        def cross_entropy(sequences: Tensor) -> float:
            return float(self._losses(sequences).cross_entropy)

        with torch.compiler.set_stance("force_eager"):  # its last batch has a shape of its own
            self.validation_bpb = self.validation.bits_per_byte(cross_entropy)
        self.elapsed_s += time.perf_counter() - begun
        return self.validation_bpb

    def _timed_step(self) -> dict[str, Any]:
        begun = time.perf_counter()
        row = self.one_step()
        taken = time.perf_counter() - begun
        self.elapsed_s += taken
        self._step_times = [*self._step_times[-19:], taken]
        tokens_per_s = self.train_spec.tokens_per_step / taken
        timing = {
            "time_s": self.elapsed_s,
            "step_time_s": taken,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self._flop_per_token / self._peak_flops,
        }
        return row | timing

    def _done(self) -> bool:
        return schedule.progress(self.train_spec, self.step, self.elapsed_s) >= 1.0

    def _eta_s(self) -> float:
        """Seconds until the tokens or the time are used up, at the pace of the last steps."""
        by_tokens = (self.train_spec.steps - self.step) * sum(self._step_times) / max(1, len(self._step_times))
        limit = self.train_spec.max_time
        return max(0.0, by_tokens if limit is None else min(by_tokens, limit - self.elapsed_s))

    def _report(self, row: dict[str, Any], log: bool) -> None:
        if log:
            self.log.write(row)
        pace = sum(self._step_times) / len(self._step_times)
        tokens_per_s = self.train_spec.tokens_per_step / pace
        self.session.report(
            step=self.step,
            tokens=row["tokens"],
            loss=row["loss"],
            validation_bpb=self.validation_bpb,
            tokens_per_s=tokens_per_s,
            mfu=tokens_per_s * self._flop_per_token / self._peak_flops,
            eta_s=self._eta_s(),
        )
        self.view.show(self.session.status, [row] if log else [])

    def _checkpoint_due(self) -> bool:
        spec = self.spec.checkpoint
        if spec.every_steps is not None:
            return self.step % spec.every_steps == 0
        return time.monotonic() - self._saved_at >= spec.every

    def _tensors(self) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in self.optimizers.state().items()}
        return state | {"random.torch": torch.get_rng_state()}

    def _save(self) -> None:
        begun = time.perf_counter()
        state = {
            "data": self.data.folder.name,
            "sequences": self.step * self.train_spec.global_batch,
            "tokens": self.step * self.train_spec.tokens_per_step,
            "elapsed_s": self.elapsed_s,
            "loss": self.loss,
            "validation_bpb": self.validation_bpb,
            "metrics_bytes": self.log.position(),
        }
        self.last_checkpoint = checkpoint.save(self.folder, self.step, self._tensors(), state)
        checkpoint.rotate(self.folder, self.spec.checkpoint.keep)
        self.elapsed_s += time.perf_counter() - begun
        self._saved_at = time.monotonic()

    def _resume(self) -> Path | None:
        """Take up the newest checkpoint that is whole; a run that has none yet begins anew."""
        if not checkpoint.folders(self.folder):
            return None
        folder = checkpoint.newest_good(self.folder)
        self.optimizers.prepare_state()
        tensors = self._tensors()
        checkpoint.load(folder, tensors)
        torch.set_rng_state(tensors["random.torch"])
        state = checkpoint.read_state(folder)
        if state["data"] != self.data.folder.name:
            raise OperationError(
                f"the data has changed since the checkpoint {folder.name}: the run cannot go on as it began; bring "
                "the text back as it was, or train anew under another name"
            )
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.loss, self.validation_bpb = state["loss"], state["validation_bpb"]
        self._metrics_bytes = state["metrics_bytes"]
        return folder

    def _open_log(self) -> MetricsLog:
        try:
            return MetricsLog(self.folder, self._metrics_bytes, self.step)
        except OSError as error:
            raise OperationError(f"{self.folder} cannot be written: {checkpoint.reason(error)}") from error

    def _prepare_data(self) -> PackedDataset:
        self._say("preparing the data")
        data = prepare(self.spec.data, self.spec.model.vocab, data_folder(), self._show_preparation)
        shutil.copyfile(data.tokenizer_file, self.folder / "tokenizer.json")
        write_atomically(self.folder / "data.json", json.dumps(data.manifest, indent=1) + "\n")
        return data

    def _show_preparation(self, documents: int, done: int, total: int | None) -> None:
        if time.monotonic() - self._said_at >= _SAY_EVERY_S:
            share = f", {done / total:.0%}" if total else ""
            self._say(f"preparing the data: {documents:,} documents{share}")

    def _compile(self) -> None:
        spec, flop = self.train_spec, self._flop_per_token * self.train_spec.steps * self.train_spec.tokens_per_step
        if wanted(spec.compile, torch.device("cpu"), flop, spec.max_time):
            self._say("compiling the network")
            probe = self.data.sequences("train", 0, self.micro_batch, self.train_spec.seq_len, self.train_spec.seed)
            try_compile(self.decoder, lambda: self._weighted(self._losses(torch.from_numpy(probe))))

    def _say(self, message: str) -> None:
        self._said_at = time.monotonic()
        self.session.report(message=message)
        self.view.show(self.session.status)

    def _end(self) -> TrainResult:
        received = None if self._done() else self.interrupt.received
        state = "finished" if received is None else "stopped"
        assert self.last_checkpoint is not None
        self.session.report(
            state=state,
            step=self.step,
            tokens=self.step * self.train_spec.tokens_per_step,
            loss=self.loss,
            validation_bpb=self.validation_bpb,
            eta_s=None,
            message=None if received is None else "saved; go on with --resume",
        )
        self.view.show(self.session.status)
        return TrainResult(
            state=state,
            received=received,
            step=self.step,
            tokens=self.step * self.train_spec.tokens_per_step,
            loss=self.loss,
            validation_bpb=self.validation_bpb,
            elapsed_s=self.elapsed_s,
            checkpoint=self.last_checkpoint,
        )


def _largest_loads(loads: Tensor) -> list[float]:
    """Per layer with experts, the fullest expert's share times the number of experts: 1 when balanced."""
    if loads.numel() == 0:
        return []
    return [float(value) for value in loads.amax(-1) * loads.shape[-1]]
