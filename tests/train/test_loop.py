"""The loop in one process: its arithmetic against hand calculations, its resume to the bit, its refusals."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modelworks.data.preparation import prepare
from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import data_folder, runs_folder
from modelworks.spec.run import RunSpec
from modelworks.train.loop import Trainer, train
from modelworks.train.record import RunRecord
from modelworks.train.result import TrainResult
from modelworks.train.session import open_run
from modelworks.train.view import NoView

MakeSpec = Callable[..., RunSpec]
TIMING = {"time_s", "step_time_s", "reasons", "tokens_per_s", "mfu"}


def _train(spec: RunSpec, resume: bool = False) -> TrainResult:
    with open_run(spec, resume) as session:
        return train(session)


def _weights(spec: RunSpec, step: int) -> dict[str, torch.Tensor]:
    decoder = Decoder(spec.model)
    checkpoint.load_weights(runs_folder() / spec.name / "checkpoints" / f"step-{step:08d}", decoder)
    return decoder.state_dict()


def _rows(name: str) -> list[dict[str, Any]]:
    rows = RunRecord(name).metrics()
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def _one_gradient(spec: RunSpec) -> dict[str, Any]:
    """The row of a new run's first step."""
    with open_run(spec) as session:
        trainer = Trainer(session, NoView())
        try:
            return trainer.one_step()
        finally:
            trainer.close()


def test_a_run_learns_and_leaves_what_others_read(make_spec: MakeSpec) -> None:
    result = _train(make_spec())
    record = RunRecord("tiny")
    rows, status = record.metrics(), record.status()
    assert (result.state, result.step, result.tokens) == ("finished", 40, 40 * 128)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if "validation_bpb" in row] == [10, 20, 30, 40]
    assert all(1.0 <= load <= 4.0 for row in rows for load in row["expert_load"])
    assert {len(row["expert_load"]) for row in rows} == {2}
    assert (status.state, status.step, status.steps) == ("finished", 40, 40)
    assert status.validation_bpb == rows[-1]["validation_bpb"] == result.validation_bpb
    assert [path.name for path in record.checkpoints()] == ["step-00000030", "step-00000040"]
    assert json.loads((record.folder / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert list((record.folder / "tensorboard").iterdir())
    assert record.spec() == make_spec()


@pytest.mark.parametrize(
    ("optimizer", "compiled"),
    [("adamw", False), ("muon", False), pytest.param("muon", True, marks=pytest.mark.slow)],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    make_spec: MakeSpec, optimizer: str, compiled: bool
) -> None:
    whole = make_spec("whole", optimizer=optimizer, compile=compiled)
    _train(whole)
    parts = make_spec("parts", optimizer=optimizer, compile=compiled)
    _train(parts)
    # As a crash after step 30 leaves it: the metrics run on, the checkpoint of step 40 was never committed.
    folder = RunRecord("parts").folder
    (folder / "checkpoints" / "step-00000040").rename(folder / "checkpoints" / ".step-00000040.tmp")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    _train(parts, resume=True)
    assert _rows("parts") == _rows("whole")
    expected = _weights(whole, 40)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(parts, 40).items())


def test_a_resumed_run_takes_up_the_random_numbers_where_they_were(make_spec: MakeSpec) -> None:
    spec = make_spec(tokens=10 * 128)
    _train(spec)
    saved = {"random.torch": torch.zeros_like(torch.get_rng_state())}
    checkpoint.load(RunRecord("tiny").checkpoints()[-1], saved)
    with open_run(spec, resume=True) as session:
        trainer = Trainer(session, NoView())
        trainer.close()
    assert torch.equal(torch.get_rng_state(), saved["random.torch"])


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(
    make_spec: MakeSpec, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_spec()
    _train(spec)
    expected = _weights(spec, 40)
    newest = RunRecord("tiny").checkpoints()[-1]
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0x80
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        result = _train(spec, resume=True)
    assert "step-00000040" in caplog.text
    assert "damaged" in caplog.text
    assert result.step == 40
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(spec, 40).items())


def test_a_damaged_checkpoint_is_not_the_newest_of_a_run_that_has_passed_it_over(make_spec: MakeSpec) -> None:
    def spec(steps: int) -> RunSpec:
        return make_spec(tokens=128 * steps, sections={"checkpoint": {"every_steps": 2, "keep": 2}})

    _train(spec(6))
    (RunRecord("tiny").checkpoints()[-1] / "state.json").write_bytes(b"damaged")
    result = _train(spec(5), resume=True)
    assert result.step == 5
    assert RunRecord("tiny").checkpoints()[-1] == result.checkpoint
    assert [path.name for path in RunRecord("tiny").checkpoints()] == ["step-00000004", "step-00000005"]


def test_without_any_whole_checkpoint_a_resume_says_so(make_spec: MakeSpec) -> None:
    spec = make_spec(tokens=4 * 32 * 2)
    _train(spec)
    for folder in RunRecord("tiny").checkpoints():
        (folder / "state.json").write_text("{}")
    with pytest.raises(OperationError, match="none of the 1 checkpoints of run tiny is whole"):
        _train(spec, resume=True)
    assert RunRecord("tiny").status().state == "failed"


def test_a_finished_run_goes_on_when_it_is_given_more_tokens(make_spec: MakeSpec) -> None:
    _train(make_spec(tokens=128 * 4))
    assert _train(make_spec(tokens=128 * 6), resume=True).step == 6
    assert [row["step"] for row in _rows("tiny")] == [1, 2, 3, 4, 5, 6]


def test_four_micro_batches_of_one_have_the_gradient_of_one_of_four(make_spec: MakeSpec) -> None:
    # Cross-entropy is a mean over tokens; the balancing losses are not linear in the batch and are left out.
    linear = {"load_balance_loss": 0.0, "router_z_loss": 0.0}
    split = _one_gradient(make_spec("split", micro_batch=1, **linear))
    whole = _one_gradient(make_spec("whole", micro_batch=4, **linear))
    for key in ("loss", "cross_entropy", "grad_norm"):
        assert split[key] == pytest.approx(whole[key], rel=2e-6)


def test_the_loss_is_the_weighted_sum_of_its_parts(make_spec: MakeSpec) -> None:
    row = _one_gradient(make_spec(load_balance_loss=0.3, router_z_loss=0.05))
    parts = row["cross_entropy"] + 0.3 * row["load_balance_loss"] + 0.05 * row["router_z_loss"]
    assert row["loss"] == pytest.approx(parts, rel=1e-6)


def test_validation_is_the_bits_that_the_logits_give_each_byte(make_spec: MakeSpec) -> None:
    spec = make_spec(tokens=128 * 2, validation_tokens=320)
    bpb = _train(spec).validation_bpb
    data = prepare(spec.data, spec.model.vocab, data_folder())
    decoder = Decoder(spec.model)
    decoder.load_state_dict(_weights(spec, 2))
    sequences = torch.from_numpy(data.sequences("validation", 0, 10, 32, 0))
    with torch.no_grad():
        logits = decoder(sequences[:, :-1])
    probabilities = logits.double().softmax(-1).gather(-1, sequences[:, 1:, None])
    bits = -probabilities.log2().sum().item()
    bytes_per_token = data.bytes("validation") / data.tokens("validation")
    assert bpb == pytest.approx(bits / (10 * 32 * bytes_per_token), rel=1e-5)


def test_the_gradient_is_clipped_before_it_reaches_the_optimizer(make_spec: MakeSpec) -> None:
    with open_run(make_spec(clip=0.01)) as session:
        trainer = Trainer(session, NoView())
        seen: list[float] = []
        step = trainer.optimizers.step

        def spy(factor: float, number: int) -> None:
            seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.decoder.parameters())))  # type: ignore[union-attr]
            step(factor, number)

        trainer.optimizers.step = spy  # type: ignore[method-assign]
        row = trainer.one_step()
        trainer.close()
    assert row["grad_norm"] > 0.01
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_last_checkpoint(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    weighted = Trainer._weighted

    def diverge_at_step_15(self: Trainer, losses: Any) -> torch.Tensor:
        return weighted(self, losses) * (math.nan if self.step == 14 else 1.0)

    monkeypatch.setattr(Trainer, "_weighted", diverge_at_step_15)
    with pytest.raises(OperationError, match=r"loss is nan .* step 15.*train\.learning_rate"):
        _train(spec)
    record = RunRecord("tiny")
    assert record.status().state == "failed"
    assert "nan" in (record.status().message or "")
    assert checkpoint.newest_good(record.folder).name == "step-00000010"
    assert all(tensor.isfinite().all() for tensor in _weights(spec, 10).values())


def test_a_learning_rate_far_too_high_ends_in_a_sentence(make_spec: MakeSpec) -> None:
    with pytest.raises(OperationError, match=r"train\.learning_rate"):
        _train(make_spec(learning_rate=1e30, clip=0.0))


def test_missing_text_is_said_and_the_run_is_failed(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(sections={"data": {"files": [str(tmp_path / "nowhere")]}})
    with pytest.raises(InputError, match="nowhere"):
        _train(spec)
    assert RunRecord("tiny").status().state == "failed"


def test_text_that_changed_between_is_not_gone_on_with(make_spec: MakeSpec, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven " * 400)
    spec = make_spec(tokens=256, sections={"data": {"files": [str(text)], "validation_fraction": 0.0}})
    _train(spec)
    text.write_text("another text " * 900)
    with pytest.raises(OperationError, match="data has changed"):
        _train(
            make_spec(tokens=512, sections={"data": {"files": [str(text)], "validation_fraction": 0.0}}), resume=True
        )


def test_a_run_without_validation_text_has_no_bits_per_byte(make_spec: MakeSpec) -> None:
    result = _train(make_spec(tokens=256, sections={"data": {"validation_fraction": 0.0}}))
    assert result.validation_bpb is None


def test_a_time_budget_ends_the_run_with_the_schedule_decayed(make_spec: MakeSpec) -> None:
    result = _train(make_spec(tokens=10_000_000, max_time=1.5, validate_every=0, warmup_fraction=0.0))
    rows = RunRecord("tiny").metrics()
    assert result.state == "finished"
    assert result.elapsed_s >= 1.5
    assert rows[0]["learning_rate"] == pytest.approx(1e-3)
    assert rows[-1]["learning_rate"] < 6e-4  # it ends at 0, but a busy machine takes few steps in that time


def test_time_used_up_by_a_checkpoint_still_ends_the_run_with_its_final_rate_and_a_validation(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def slowly(*arguments: Any) -> Path:
        time.sleep(3.1)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slowly)
    budget = {"max_time": 3.0, "validate_every": 0, "warmup_fraction": 0.0, "final_fraction": 0.25}
    result = _train(
        make_spec(tokens=10_000_000, sections={"checkpoint": {"every_steps": 1, "asynchronous": False}}, **budget)
    )
    rows = RunRecord("tiny").metrics()
    assert result.state == "finished"
    assert rows[-1]["step"] == result.step == 2
    assert rows[-1]["validation_bpb"] == result.validation_bpb is not None
    assert rows[-1]["learning_rate"] == pytest.approx(0.25e-3)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"train": {"precision": "fp8"}}, "train.precision = 'fp8'"),
        ({"cluster": {"gpus": 2, "gpus_per_node": 2}}, "cluster.gpus = 2"),
        ({"model": {"layers": 100, "hidden": 65536, "ffn_hidden": 65536}}, "GiB to train"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_in_a_sentence(
    make_spec: MakeSpec, sections: dict[str, dict[str, object]], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        _train(make_spec(sections=sections))


def test_compilation_that_fails_is_a_warning_and_the_run_goes_on(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    with caplog.at_level(logging.WARNING):
        assert _train(make_spec(tokens=256, compile=True)).state == "finished"
    assert "no such compiler" in caplog.text
