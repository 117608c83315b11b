"""Moments in bf16: rounded without bias, the same on every layout and after a resume, and no worse to learn with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from processes import together
from tiny_runs import make, run, train_on

from modelworks.model import checkpoint
from modelworks.spec.run import RunSpec
from modelworks.train.adamw import LowAdamW
from modelworks.train.loop import train
from modelworks.train.record import RunRecord
from modelworks.train.rounding import Part, keep, noise_of
from modelworks.train.session import open_run

MakeSpec = Callable[..., RunSpec]


def _kept(values: torch.Tensor, step: int) -> torch.Tensor:
    target = torch.empty_like(values, dtype=torch.bfloat16)
    part = Part("moment", values.shape, (0,) * values.ndim)
    keep(target, values.clone(), noise_of(part, values, seed=3, step=step))
    return target


def test_rounding_gives_one_of_two_neighbours_and_on_average_the_number() -> None:
    values = torch.tensor([[1.0, 1.0 + 2**-9, -3.003], [1e-12, -0.0, 7.77]])
    drawn = torch.stack([_kept(values, step) for step in range(4000)]).float()
    below, above = drawn.amin(0), drawn.amax(0)
    assert ((below <= values) & (values <= above)).all()
    assert (torch.tensor([len(column.unique()) for column in drawn.flatten(1).T]) <= 2).all()
    # Five standard errors of the mean of a choice between two neighbours.
    assert ((drawn.mean(0) - values).abs() <= 5 * (above - below) / 2 / 4000**0.5).all()
    exact = values.to(torch.bfloat16)
    assert torch.equal(_kept(exact.float(), 0), exact)


def test_a_slow_average_in_bf16_follows_what_it_averages() -> None:
    """From 1 towards 2 by a thousandth of the way a step, which to the nearest bf16 number is no way at all."""
    average = torch.ones(64, 64, dtype=torch.bfloat16)
    part = Part("moment", average.shape, (0, 0))
    for step in range(2000):
        keep(average, average.float().lerp_(torch.tensor(2.0), 0.001), noise_of(part, average, 3, step))
    assert float(average.float().mean()) == pytest.approx(2.0 - 0.999**2000, rel=0.01)
    assert float(torch.tensor(1.0).lerp(torch.tensor(2.0), 0.001).to(torch.bfloat16)) == 1.0


def test_a_part_is_rounded_as_in_the_whole() -> None:
    values = torch.randn(6, 10, 8)
    whole = _kept(values, 5)
    part = values[2:4, :, 3:7].contiguous()
    target = torch.empty_like(part, dtype=torch.bfloat16)
    keep(target, part.clone(), noise_of(Part("moment", values.shape, (2, 0, 3)), part, 3, 5))
    assert torch.equal(target, whole[2:4, :, 3:7])
    assert not torch.equal(_kept(values, 6), whole)


def test_an_update_is_that_of_fp32_moments() -> None:
    """Its first one to the last bits; later ones as far as moments of 8 bits go."""
    torch.manual_seed(1)
    start = torch.randn(300, 900)  # more than one block of rows
    low, full = (nn.Parameter(start.clone()) for _ in range(2))
    given = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = (
        LowAdamW([low], part_of=lambda _: Part("low", start.shape, (0, 0)), seed=3, **given),  # type: ignore[arg-type]
        torch.optim.AdamW([full], **given),  # type: ignore[arg-type]
    )
    for step in range(20):
        gradient = torch.randn_like(start)
        before = full.detach().clone()
        for parameter, optimizer in zip((low, full), optimizers, strict=True):
            parameter.grad = gradient.clone()
            if isinstance(optimizer, LowAdamW):
                optimizer.now = step
            optimizer.step()
        if step == 0:
            torch.testing.assert_close(low - start, full - before, rtol=1e-4, atol=1e-7)
    moved = (full - start).detach().norm()
    assert float((low - full).detach().norm() / moved) < 0.005
    assert {state.dtype for name, state in optimizers[0].state[low].items() if name != "step"} == {torch.bfloat16}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_learns_as_well_and_resumes_to_the_same_bits(make_spec: MakeSpec, optimizer: str) -> None:
    """As well: the validation within a half per cent of that with fp32 moments."""

    def final(name: str, resume: bool = False, **fields: object) -> dict[str, torch.Tensor]:
        spec = make_spec(name, {"checkpoint": {"every_steps": 20, "keep": 5}}, optimizer=optimizer, **fields)
        with open_run(spec, resume) as session:
            train(session)
        files = sorted(RunRecord(name).checkpoints()[-1].glob("*.safetensors"))
        return {key: value for file in files for key, value in load_file(file).items()}

    final("fp32")
    whole = final("whole", optimizer_state="bf16")
    reached, asked = (RunRecord(name).metrics()[-1]["validation_bpb"] for name in ("whole", "fp32"))
    assert reached == pytest.approx(asked, rel=0.005)
    assert asked < 0.9 * RunRecord("fp32").metrics()[0]["loss"]
    kinds = {key.rpartition("/")[2]: value.dtype for key, value in whole.items()}
    assert {kinds[kind] for kind in kinds if kind in ("exp_avg", "exp_avg_sq", "momentum")} == {torch.bfloat16}
    final("parts", optimizer_state="bf16")
    for path in RunRecord("parts").checkpoints():
        if checkpoint.step_of(path) > 20:
            path.rename(path.with_name(f".{path.name}.tmp"))
    parts = final("parts", resume=True, optimizer_state="bf16")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_moments_in_bf16_move_to_other_layouts(text_folder: Path, folder: Path) -> None:
    """Muon's, and AdamW's of what isn't a matrix: on two processes that share experts, then four with stages, then one.

    The losses are those of one process all the way, but for what a moment that was rounded the other way, since its
    last fp32 bits are others, does to a weight.
    """

    def low(name: str, processes: int, **parallel: object) -> RunSpec:
        spec = make("mixture", "muon", text_folder, processes, 3, micro_batch=2, **parallel)
        trained = spec.train.model_copy(update={"optimizer_state": "bf16"})
        return spec.model_copy(update={"name": name, "train": trained})

    alone = run(low("alone-low", 1), folder, 6)[0]
    losses: list[float] = []
    hops = [(2, {"zero_stage": 3, "expert": 2}), (4, {"pipeline": 2, "zero_stage": 1, "tensor": 2}), (1, {})]
    for place, (processes, parallel) in enumerate(hops):
        moved = low("moved-low", processes, **parallel)
        with open_run(moved, resume=place > 0, folder=folder / "runs" / "moved-low") as session:
            losses += together(processes, train_on, session.folder, moved, place > 0, 2)[0]
    assert losses == pytest.approx([row["loss"] for row in alone["rows"]], rel=3e-5)
