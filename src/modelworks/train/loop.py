"""The training loop: batches in, weights out, everything that happens on the way logged and kept.

Three ideas. The run's whole state is in `Trainer` and goes into a checkpoint; what isn't in it (learning rate, batch)
follows from the spec and the step, so a resumed run repeats the uninterrupted one to the bit. A step is made whole or
not at all: signals are looked at between steps, and a loss that is no number never reaches the weights (`spikes`). The
loop reads the same on one process and on many: how the network is split over them is applied to it from outside
(`parallelize`), each process takes its share of a batch, and what decides the next turn is agreed (`ranks`).
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
from modelworks.data.tokenizer import separator_of
from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder, Losses
from modelworks.model.initial import FOLDER, TOKENIZER, InitialWeights
from modelworks.model.rotary import Documents
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.flops import training_flop_per_token
from modelworks.spec.home import data_folder, write_atomically
from modelworks.spec.run import RunSpec
from modelworks.train import schedule
from modelworks.train.agreement import Agreement
from modelworks.train.batching import micro_batch
from modelworks.train.compiling import try_compile, wanted
from modelworks.train.evaluate import Validation
from modelworks.train.layout import Layout, layout
from modelworks.train.machine import peak_flops
from modelworks.train.metrics import MetricsLog, NoMetrics
from modelworks.train.optimizers import Optimizers
from modelworks.train.parallelize import Parallel, local
from modelworks.train.precision import PRECISIONS, Precision, resolve
from modelworks.train.ranks import Ranks
from modelworks.train.saving import Saving
from modelworks.train.session import RunSession
from modelworks.train.spikes import Rollback, Spikes
from modelworks.train.trace import Traces
from modelworks.train.view import NoView, View
from modelworks.train.waits import Waits
from modelworks.train.watchdog import patience_s

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

    @classmethod
    def of_checkpoint(cls, folder: Path, state: str, received: int | None) -> TrainResult:
        """How a run ended whose last checkpoint stands in `folder`."""
        saved = checkpoint.read_state(folder)
        facts = {key: saved[key] for key in ("step", "tokens", "loss", "validation_bpb", "elapsed_s")}
        return cls(state=state, received=received if state == "stopped" else None, checkpoint=folder, **facts)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self) | {"checkpoint": str(self.checkpoint)}


def train(session: RunSession, view: View | None = None, ranks: Ranks | None = None) -> TrainResult:
    """Train the session's run to its end, or until a signal asks to stop.

    Parameters
    ----------
    session
        The run.
    view
        Shows it.
    ranks
        The processes that train it together; this one alone if unset.

    Raises
    ------
    InputError
        If the spec asks for what isn't to be had here.
    OperationError
        If the work fails: unreadable data, a full disk, a loss that is no number. The last checkpoint stands.
    """
    ranks = ranks or Ranks()
    refuse_unsupported(session.spec, ranks.world)
    view = view or NoView()
    with view, contextlib.closing(Trainer(session, view, ranks)) as trainer:
        return trainer.run()


def refuse_unsupported(spec: RunSpec, processes: int) -> None:
    """Refuse what can't be done on so many processes of this machine, before anything is prepared."""
    if spec.cluster.gpus != processes:
        raise InputError(
            f"cluster.gpus = {spec.cluster.gpus} is not accepted: this run is trained by {processes} processes, one "
            "for each"
        )
    one = layout(spec, processes)
    if spec.train.document_mask and one.pipeline > 1:
        raise InputError(
            f"train.document_mask = true is not accepted with parallel.pipeline = {one.pipeline}, whose later stages "
            "don't see the tokens: 1 is"
        )
    if spec.train.restart_positions and spec.model.attention_temperature_length is not None:
        raise InputError(
            "train.restart_positions = true is not accepted with model.attention_temperature_length, which counts from "
            "a sequence's beginning: false is"
        )
    if spec.train.compile is True and (reason := _not_compiled(spec, one)):
        raise InputError(f"train.compile = true is not accepted with {reason}: auto is")


def _not_compiled(spec: RunSpec, one: Layout) -> str | None:
    """Why the blocks of a run on several processes are not compiled, in words that follow "with"."""
    for name in ("tensor", "context", "expert"):
        if (degree := getattr(one, name)) > 1:
            # Compiled blocks with exchanges in them are known to have given wrong gradients without a word.
            return f"parallel.{name} = {degree}, whose exchanges within a block are not compiled"
    if one.schedule == "zero-bubble":
        return "parallel.schedule = 'zero-bubble', which splits a backward pass that compilation joins"
    if spec.parallel.recompute in ("selective", "projections"):
        return f"parallel.recompute = {spec.parallel.recompute!r}, which looks at each product by itself"
    return None


class Trainer:
    """One run in progress: network, optimizers, data, and how far it has come."""

    def __init__(self, session: RunSession, view: View, ranks: Ranks | None = None) -> None:
        self.session, self.view, self.interrupt = session, view, session.interrupt
        self.ranks = ranks or Ranks()
        self.spec, self.folder = session.spec, session.folder
        self.train_spec = session.spec.train
        self.step, self.elapsed_s, self._metrics_bytes = 0, 0.0, 0
        self._event: str | None = None
        self.loss: float | None = None
        self.validation_bpb: float | None = None
        self._compiled = False
        self.parallel = Parallel(layout(self.spec, self.ranks.world), self.ranks)
        self.data = prepare_data(session, view, keep=self.ranks.first)
        # Free memory and speed are measured, and each process measures something else.
        self.micro_batch = int(self.ranks.of_first(micro_batch(self.spec, self.parallel.layout)))
        self.precision = self._agreed_precision()
        self.validation = Validation(
            self.data, self.train_spec.validation_tokens, self.train_spec.seq_len, self.micro_batch, self.parallel
        )
        # Before the seed is set: measuring the peak draws random numbers.
        self._peak_flops = peak_flops("fp32" if self.precision.name == "fp32" else "bf16", self.ranks.world)
        self._flop_per_token = training_flop_per_token(self.spec.model, self.train_spec.seq_len)
        session.report(message="building the network")
        view.show(session.status)
        torch.manual_seed(self.train_spec.seed)
        with torch.device("meta"):
            self.decoder = Decoder(self.spec.model)
        if self.train_spec.document_mask:
            separator = separator_of(self.data.tokenizer_file)
            self.decoder.documents = Documents(separator, self.train_spec.restart_positions)
        resumes = session.resume and bool(checkpoint.folders(self.folder))
        initial = None if resumes or self.train_spec.init_from is None else InitialWeights(self.folder / FOLDER)
        self.parallel.apply(
            self.decoder, self.spec.parallel, self.precision, seed=self.train_spec.seed, initial=initial
        )
        self.optimizers = Optimizers(self.decoder, self.train_spec, self.precision.dtype, self.parallel.whole)
        self.saving = Saving(
            self.folder, self.spec.checkpoint.keep, self.ranks, asynchronous=self.spec.checkpoint.asynchronous
        )
        self.spikes = Spikes(self.spec.guard)
        compares = self.spec.guard.agreement_every > 0 and self.ranks.world > 1
        self.agreement = Agreement(self.decoder, self.parallel) if compares else None
        self.last_checkpoint = self._resume() if session.resume else None
        self.log = self._open_log()
        self._saved_at = time.monotonic()
        self._step_times: list[float] = []
        self.waits = Waits(self.ranks, self.parallel.purposes())
        self.traces = Traces(self.folder, self.train_spec.trace_steps, self.ranks.rank)

    def close(self) -> None:
        """Let a checkpoint in the air come down, and close the metrics' files."""
        self.saving.close()
        self.log.close()

    def run(self) -> TrainResult:
        """Make steps until the run is done or asked to stop; the last thing done is a checkpoint."""
        self._compile()
        self.interrupt.graceful = True
        self.session.report(state="running", message=None, steps=self.train_spec.steps)
        done = self._done()
        while not done and self._stop() is None:
            try:
                row = self._timed_step()
            except Rollback as why:
                self._roll_back(str(why))
                continue
            # Looked at behind a step alone: if a validation or a checkpoint uses up the time, one more step is made, so
            # that a run always ends with its final rate and with a validation of what it ends with.
            done = self._done()
            if done or (self.train_spec.validate_every and self.step % self.train_spec.validate_every == 0):
                row["validation_bpb"] = self._validate()
            self._report(row, log=done or "validation_bpb" in row or self.step % self.train_spec.log_every == 0)
            self.saving.look()
            if self.agreement is not None and self.step % self.spec.guard.agreement_every == 0:
                self.agreement.check(self.step)
            if self._checkpoint_due() and not done:
                self._save()
        if self.last_checkpoint != checkpoint.folder_of(self.folder, self.step):
            self._save()
        self.saving.finish()
        self.interrupt.graceful = False
        return self._end(done)

    def one_step(self) -> dict[str, Any]:
        """Make one optimizer step and say what came of it.

        Raises
        ------
        OperationError, Rollback
            If the loss or the gradient is out of order, as `guard.on_spike` has it; the weights are then as before.
        """
        spec = self.train_spec
        factor = schedule.factor(spec, schedule.progress(spec, self.step + 1, self.elapsed_s))
        begin, count = self.parallel.share(spec.global_batch)
        place = self.spikes.batch(self.step) * spec.global_batch + begin
        sequences = self.data.sequences("train", place, count, spec.seq_len, spec.seed)
        self.waits.lap("host")
        losses = self._gradients(torch.from_numpy(sequences))
        total = float(self._weighted(losses))
        self.parallel.finish_gradients()
        self.waits.lap("compute")
        norm = self.parallel.clip(self.decoder, spec.clip or math.inf)
        advice = (
            f"the last checkpoint is good: go on from it with a lower train.learning_rate (now {spec.learning_rate}) "
            "in a new run, or with --resume and guard.on_spike = 'skip' or 'rollback'"
        )
        try:
            spike = self.spikes.judge(self.step, total, norm, advice)
            if spike is None:
                self.optimizers.step(factor, self.step)
                self.loss = total
        finally:
            self.optimizers.zero_grad()
        self.waits.lap("optimizer")
        self.step += 1
        row = {
            "step": self.step,
            "tokens": self.step * spec.tokens_per_step,
            "loss": total,
            "cross_entropy": float(losses.cross_entropy),
            "load_balance_loss": float(losses.load_balance),
            "router_z_loss": float(losses.router_z),
            "learning_rate": spec.learning_rate * factor,
            "grad_norm": norm,
            "expert_load": _largest_loads(losses.expert_load),
        }
        event, self._event = self._event or spike, None
        return row if event is None else row | {"event": event}

    def _gradients(self, sequences: Tensor) -> Losses:
        """Add up the gradients of this process's sequences (B, T + 1); returns the losses of the whole global batch."""
        batches = torch.split(sequences, self.micro_batch)
        found = self.parallel.backward(batches, self._losses, self._weighted)
        figures = [
            torch.cat((torch.stack(losses[:3]).double(), losses.expert_load.double().flatten())) for losses in found
        ]
        mean = self.parallel.mean(torch.stack(figures).mean(0))
        cross_entropy, load_balance, router_z = mean[:3]
        return Losses(cross_entropy, load_balance, router_z, mean[3:].view_as(found[0].expert_load))

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
        self._add_elapsed(time.perf_counter() - begun)
        return self.validation_bpb

    def _timed_step(self) -> dict[str, Any]:
        # Exchanges inside of compiled blocks can't be looked at.
        measured = (self.step + 1) % self.train_spec.log_every == 0 and not (self._compiled and self.ranks.world > 1)
        with self.traces.step(self.step + 1), self.waits.measured(measured):
            begun = time.perf_counter()
            self.session.pulse(patience_s(self.spec.guard.hang, self._step_times))
            try:
                row = self.one_step()
            finally:
                self.session.pulse(math.inf)
            taken = time.perf_counter() - begun
        if measured:
            row["reasons"] = self.waits.reasons(taken)
        self._add_elapsed(taken)
        self._step_times = [*self._step_times[-19:], taken]
        tokens_per_s = self.train_spec.tokens_per_step / taken
        timing = {
            "time_s": self.elapsed_s,
            "step_time_s": taken,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self._flop_per_token / self._peak_flops,
        }
        return row | timing

    def _add_elapsed(self, taken: float) -> None:
        """Move the run's clock on, which is the first process's: with `train.max_time` the schedule follows it."""
        self.elapsed_s = self.ranks.of_first(self.elapsed_s + taken)

    def _stop(self) -> int | None:
        """The signal that asked any of the processes to stop."""
        return self.ranks.largest(self.interrupt.received or 0) or None

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
            loss=self.loss,
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
        return self.ranks.of_first(time.monotonic() - self._saved_at) >= spec.every

    def _tensors(self, as_part: bool = False) -> dict[str, Tensor]:
        """All that a checkpoint holds: whole tensors, or this process's parts of them."""
        whole = _part if as_part else self.parallel.whole
        state = {f"model.{name}": whole(name, tensor) for name, tensor in self.decoder.state_dict().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in self.optimizers.state(whole).items()}
        return state | {"random.torch": torch.get_rng_state()}

    def _save(self) -> None:
        """Begin to save; with `checkpoint.asynchronous` the rest is done while the next steps are made."""
        begun = time.perf_counter()
        if self.agreement is not None:  # What differs between processes must not become the state to go back to.
            self.agreement.check(self.step)
        state = {
            "data": self.data.folder.name,
            "sequences": self.spikes.batch(self.step) * self.train_spec.global_batch,
            "tokens": self.step * self.train_spec.tokens_per_step,
            "elapsed_s": self.elapsed_s,
            "loss": self.loss,
            "validation_bpb": self.validation_bpb,
            "metrics_bytes": self.log.position(),
            "spikes": self.spikes.state(),
        }
        self.last_checkpoint = self.saving.save(
            self.step, self._tensors(as_part=True), self._tensors, state, self.log.flush_to_disk
        )
        self._add_elapsed(time.perf_counter() - begun)
        self._saved_at = time.monotonic()

    def _resume(self) -> Path | None:
        """Take up the newest checkpoint that is whole; a run that has none yet begins anew."""
        if not checkpoint.folders(self.folder):
            return None
        step = checkpoint.step_of(checkpoint.newest_good(self.folder)) if self.ranks.first else 0
        return self._load(checkpoint.folder_of(self.folder, int(self.ranks.of_first(step))))

    def _roll_back(self, why: str) -> None:
        """Go on from an earlier checkpoint with the data behind the batch that can't be learnt from."""
        fled, elapsed_s, spikes = self.step, self.elapsed_s, self.spikes
        self.saving.finish()
        target = -1
        if self.ranks.first:
            earlier = checkpoint.newest_good_until(self.folder, fled - self.spec.guard.rollback_steps)
            if earlier is not None:
                checkpoint.remove_after(self.folder, target := checkpoint.step_of(earlier))
        target = int(self.ranks.of_first(target))
        if target < 0:
            raise OperationError(
                f"{why}; there is no checkpoint {self.spec.guard.rollback_steps} steps before or more to go back to"
            )
        self.spikes = Spikes(self.spec.guard)
        self.last_checkpoint = self._load(checkpoint.folder_of(self.folder, target))
        self.elapsed_s = elapsed_s
        self.spikes.rolled_back(spikes, fled, target, why)
        self.log.close()
        self.log = self._open_log()
        self._event = f"{why}; went back to step {target}, and on behind the data since"

    def _load(self, folder: Path) -> Path:
        """Take up the state in a checkpoint."""
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
        if "spikes" in state:  # Checkpoints of earlier versions have none.
            self.spikes.load(state["spikes"])
        return folder

    def _open_log(self) -> MetricsLog | NoMetrics:
        if not self.ranks.first:
            return NoMetrics()
        try:
            return MetricsLog(self.folder, self._metrics_bytes, self.step)
        except OSError as error:
            raise OperationError(f"{self.folder} cannot be written: {checkpoint.reason(error)}") from error

    def _agreed_precision(self) -> Precision:
        """The stated precision, or the one that the first process multiplies faster."""
        mine = resolve(self.train_spec.precision)
        return PRECISIONS[int(self.ranks.of_first(PRECISIONS.index(mine)))]

    def _compile(self) -> None:
        spec, flop = self.train_spec, self._flop_per_token * self.train_spec.steps * self.train_spec.tokens_per_step
        to_compile = wanted(spec.compile, torch.device("cpu"), flop, spec.max_time)
        if self.ranks.of_first(to_compile) and _not_compiled(self.spec, self.parallel.layout) is None:
            self.session.report(message="compiling the network")
            self.view.show(self.session.status)
            pipelined = self.parallel.layout.pipeline > 1  # its micro batches pass through together
            count = self.parallel.share(spec.global_batch)[1] if pipelined else self.micro_batch
            probe = torch.from_numpy(self.data.sequences("train", 0, count, spec.seq_len, spec.seed))
            batches = torch.split(probe, self.micro_batch)
            self._compiled = try_compile(
                self.decoder, lambda: self.parallel.backward(batches, self._losses, self._weighted), self.ranks
            )

    def _end(self, done: bool) -> TrainResult:
        received = None if done else self._stop()
        state = "finished" if received is None else "stopped"
        assert self.last_checkpoint is not None
        self.session.report(
            state=state,
            step=self.step,
            tokens=self.step * self.train_spec.tokens_per_step,
            loss=self.loss,
            validation_bpb=self.validation_bpb,
            eta_s=None,
            message=None if received is None else "saved; it can be resumed",
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


def prepare_data(session: RunSession, view: View, keep: bool = True) -> PackedDataset:
    """Pack the run's text, or find it packed, and `keep` in the run's folder what it was made of."""
    said_at = float("-inf")

    def say(documents: int, done: int, total: int | None) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= _SAY_EVERY_S:
            said_at = time.monotonic()
            share = f": {documents:,} documents" + (f", {done / total:.0%}" if total else "") if documents else ""
            session.report(message=f"preparing the data{share}")
            view.show(session.status)

    say(0, 0, None)
    section = session.spec.data
    if session.spec.train.init_from is not None and section.tokenizer == "bpe":
        section = section.model_copy(update={"tokenizer": str(session.folder / FOLDER / TOKENIZER)})
    data = prepare(section, session.spec.model.vocab, data_folder(), say)
    if keep:
        shutil.copyfile(data.tokenizer_file, session.folder / "tokenizer.json")
        write_atomically(session.folder / "data.json", json.dumps(data.manifest, indent=1) + "\n")
    return data


def _part(_: str, tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return local(tensor)


def _largest_loads(loads: Tensor) -> list[float]:
    """Per layer with experts, the fullest expert's share times the number of experts: 1 when balanced."""
    if loads.numel() == 0:
        return []
    return [float(value) for value in loads.amax(-1) * loads.shape[-1]]
