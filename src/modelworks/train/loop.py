"""The training loop: batches in, weights out, everything that happens on the way logged and kept.

Three ideas. The run's whole state is in `Trainer` and goes into a checkpoint; what isn't in it (learning rate, batch)
follows from the spec and the step, so a resumed run repeats the uninterrupted one to the bit. A step is made whole or
not at all: signals are looked at between steps, and a loss that is no number never reaches the weights (`spikes`). The
loop reads the same on one process and on many: how the network is split over them is applied to it from outside
(`parallelize`), each process takes its share of a batch, and what decides the next turn is agreed (`ranks`).
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelworks.data.answers import DialogueDataset
from modelworks.data.lessons import DrawnPictures, SeeingDataset
from modelworks.data.tokenizer import separator_of
from modelworks.model import adapters, checkpoint
from modelworks.model.decoder import Losses
from modelworks.model.initial import FOLDER, InitialWeights
from modelworks.model.rotary import Documents
from modelworks.model.vision import network_of
from modelworks.spec.errors import OperationError
from modelworks.spec.flops import training_flop_per_token
from modelworks.spec.run import TrainSpec
from modelworks.train import schedule
from modelworks.train.agreement import Agreement
from modelworks.train.ahead import Ahead
from modelworks.train.batching import micro_batch, micro_batches, take
from modelworks.train.compiling import try_compile, wanted
from modelworks.train.grpo import GroupRelative
from modelworks.train.layout import layout
from modelworks.train.machine import peak_flops
from modelworks.train.metrics import MetricsLog, NoMetrics
from modelworks.train.objectives import Learning, NextToken, Objective, Preference
from modelworks.train.optimizers import Optimizers
from modelworks.train.parallelize import Parallel, local
from modelworks.train.precision import PRECISIONS, Precision, resolve
from modelworks.train.preparing import prepare_data
from modelworks.train.ranks import Ranks
from modelworks.train.refusals import not_compiled, refuse_unsupported
from modelworks.train.result import TrainResult
from modelworks.train.rollouts import Sampler
from modelworks.train.saving import Saving
from modelworks.train.session import RunSession
from modelworks.train.signs import Signs
from modelworks.train.spikes import Rollback, Spikes
from modelworks.train.trace import Traces
from modelworks.train.view import NoView, View
from modelworks.train.waits import Waits
from modelworks.train.watchdog import patience_s


def train(
    session: RunSession, view: View | None = None, ranks: Ranks | None = None, sampler: Sampler | None = None
) -> TrainResult:
    """Train the session's run to its end, or until a signal asks to stop.

    Parameters
    ----------
    session
        The run.
    view
        Shows it.
    ranks
        The processes that train it together; this one alone if unset.
    sampler
        What draws the network's replies for ``train.objective = "grpo"``; the network itself if unset.

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
    with view, contextlib.closing(Trainer(session, view, ranks, sampler)) as trainer:
        try:
            return trainer.run()
        except RuntimeError:  # such as of a connection to a peer that leaves
            trainer.saving.settle()
            raise


class Trainer:
    """One run in progress: network, optimizers, data, and how far it has come."""

    def __init__(
        self, session: RunSession, view: View, ranks: Ranks | None = None, sampler: Sampler | None = None
    ) -> None:
        self.session, self.view, self.interrupt = session, view, session.interrupt
        self.ranks = ranks or Ranks()
        self.spec, self.folder = session.spec, session.folder
        self.train_spec = session.spec.train
        self.step, self.elapsed_s, self._metrics_bytes = 0, 0.0, 0
        self._event: str | None = None
        self.loss: float | None = None
        self.validation_bpb: float | None = None
        self._validated: dict[str, float] = {}
        self._compiled = False
        self.parallel = Parallel(layout(self.spec, self.ranks.world), self.ranks)
        self.data = prepare_data(session, view, keep=self.ranks.first)
        # Free memory and speed are measured, and each process measures something else.
        self.micro_batch = int(self.ranks.of_first(micro_batch(self.spec, self.parallel.layout)))
        self.precision = self._agreed_precision()
        # Before the seed is set: measuring the peak draws random numbers.
        self._peak_flops = peak_flops("fp32" if self.precision.name == "fp32" else "bf16", self.ranks.world)
        session.report(message="building the network")
        view.show(session.status)
        torch.manual_seed(self.train_spec.seed)
        with torch.device("meta"):
            self.decoder = network_of(self.spec.model)
        for name, parameter in self.decoder.named_parameters():
            parameter.requires_grad_(_learns(name, self.train_spec))
        if self.spec.adapter is not None:
            adapters.adapt(self.decoder, self.spec.adapter)
        if isinstance(self.data, DialogueDataset):
            restart = self.spec.model.attention_temperature_length is None
            drawn = self.spec.model.vision if isinstance(self.data, DrawnPictures) else None
            self.decoder.documents = Documents(self.data.separator, restart, drawn.image_token if drawn else None)
        elif self.train_spec.document_mask:
            separator = separator_of(self.data.tokenizer_file)
            self.decoder.documents = Documents(separator, self.train_spec.restart_positions)
        resumes = session.resume and bool(checkpoint.folders(self.folder))
        begins = self.train_spec.init_from is not None and (not resumes or self.spec.adapter is not None)
        initial = InitialWeights(self.folder / FOLDER) if begins else None
        self.parallel.apply(
            self.decoder, self.spec.parallel, self.precision, seed=self.train_spec.seed, initial=initial
        )
        adapters.settle(self.decoder, self.precision.dtype)
        self.objective = self._objective(sampler)
        flop_per_token = training_flop_per_token(self.spec.model, self.train_spec.seq_len)
        self._flop_per_token = flop_per_token * self.objective.flop_share
        looks_ahead = isinstance(self.data, SeeingDataset)
        self.ahead = Ahead(self.objective.batch, self.train_spec.global_batch) if looks_ahead else None
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

    def _objective(self, sampler: Sampler | None) -> Objective:
        learning = Learning(
            self.spec, self.folder, self.data, self.decoder, self.parallel, self.precision, self.micro_batch
        )
        if self.train_spec.objective == "grpo":
            return GroupRelative(learning, sampler)
        if self.train_spec.objective == "signs":
            return Signs(learning)
        return Preference(learning) if self.train_spec.objective == "dpo" else NextToken(learning)

    def close(self) -> None:
        """Let a checkpoint in the air come down, and close the metrics' files."""
        if self.ahead is not None:
            self.ahead.close()
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
                row |= self._validated
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
        place = self.spikes.batch(self.step) * spec.global_batch
        batch = self.objective.batch(place) if self.ahead is None else self.ahead(place)
        self.waits.lap("host")
        for number in range(self.step * self.objective.updates, (self.step + 1) * self.objective.updates):
            losses, total, norm, spike = self._update(batch, factor, number)
            self._event = self._event or spike
        reported = self.objective.report()
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
        } | reported
        event, self._event = self._event, None
        return row if event is None else row | {"event": event}

    def _update(self, batch: Any, factor: float, number: int) -> tuple[Losses, float, float, str | None]:
        """Make one optimizer update, the run's `number`; the losses, what was minimised, the gradient's norm, and why
        the update was dropped, if it was."""
        spec = self.train_spec
        losses = self._gradients(batch)
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
                self.optimizers.step(factor, number)
                self.loss = total
        finally:
            self.optimizers.zero_grad()
        self.waits.lap("optimizer")
        return losses, total, norm, spike

    def _gradients(self, batch: Any) -> Losses:
        """Add up the gradients of this process's sequences; returns the losses of the whole global batch."""
        found = self.parallel.backward(self.objective.parts(batch), self.objective.losses, self._weighted)
        figures = [
            torch.cat((torch.stack(losses[:3]).double(), losses.expert_load.double().flatten())) for losses in found
        ]
        mean = self.parallel.mean(torch.stack(figures).mean(0))
        cross_entropy, load_balance, router_z = mean[:3]
        return Losses(cross_entropy, load_balance, router_z, mean[3:].view_as(found[0].expert_load))

    def _weighted(self, losses: Losses) -> Tensor:
        spec = self.train_spec
        return (
            losses.cross_entropy + spec.load_balance_loss * losses.load_balance + spec.router_z_loss * losses.router_z
        )

    def _validate(self) -> float | None:
        begun = time.perf_counter()
        self.decoder.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # its last batch has a shape of its own
            self.validation_bpb, self._validated = self.objective.validate()
        self.decoder.train()
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
            reward=row.get("reward"),
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
        state = {f"model.{name}": whole(name, tensor) for name, tensor in self._trained().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in self.optimizers.state(whole).items()}
        return state | {"random.torch": torch.get_rng_state()}

    def _trained(self) -> dict[str, Tensor]:
        """The weights that change: an adapter's alone, where there is one."""
        if self.spec.adapter is None:
            return self.decoder.state_dict()
        return {name: tensor for name, tensor in self.decoder.state_dict().items() if adapters.is_of_adapter(name)}

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
        step = 0
        if self.ranks.first:
            step = checkpoint.step_of(checkpoint.newest_good(self.folder))
            checkpoint.set_aside_after(self.folder, step)
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
        if self.ranks.of_first(to_compile) and not_compiled(self.spec, self.parallel.layout) is None:
            self.session.report(message="compiling the network")
            self.view.show(self.session.status)
            pipelined = self.parallel.layout.pipeline > 1  # its micro batches pass through together
            count = self.parallel.share(spec.global_batch)[1] if pipelined else self.micro_batch
            batch = take(self.data, "train", 0, count, spec.seq_len, spec.seed, spec.learns_signs)
            batches = micro_batches(batch, self.micro_batch)
            self._compiled = try_compile(
                self.decoder, lambda: self.parallel.backward(batches, self.objective.losses, self._weighted), self.ranks
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


def _learns(parameter: str, spec: TrainSpec) -> bool:
    if spec.trains == "connector":
        return parameter.startswith("eyes.connector.")
    return spec.objective != "signs" or not parameter.startswith("blocks.")  # the decoder isn't run


def _part(_: str, tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return local(tensor)


def _largest_loads(loads: Tensor) -> list[float]:
    """Per layer with experts, the fullest expert's share times the number of experts: 1 when balanced."""
    if loads.numel() == 0:
        return []
    return [float(value) for value in loads.amax(-1) * loads.shape[-1]]
