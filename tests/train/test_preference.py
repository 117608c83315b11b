"""Preference training: its loss and gradient, what it learns, and that the reference stays where it was."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from processes import together
from tuned import steps_of, train

from modelworks.data.tokenizer import train_tokenizer
from modelworks.model import adapters
from modelworks.model.decoder import Decoder
from modelworks.release.beginning import bring_weights
from modelworks.release.huggingface import save_pretrained
from modelworks.spec import ModelSpec, run_from
from modelworks.spec.run import AdapterSpec, DpoSpec, RunSpec
from modelworks.train.loop import Trainer
from modelworks.train.preference import compare, preference_losses, report
from modelworks.train.session import open_run
from modelworks.train.view import NoView

MODEL = {
    "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn_hidden": 48, "vocab": 300, "context": 128,
    "tied_embeddings": True, "output_softcap": 20.0,
}  # fmt: skip


def adapted(kind: Literal["lora", "dora"]) -> Decoder:
    """A tiny network whose adapter has learnt something already."""
    decoder = Decoder(ModelSpec.model_validate(MODEL))
    decoder.initialize(1)
    adapters.adapt(decoder, AdapterSpec(kind=kind, rank=2))
    drawn = torch.Generator().manual_seed(3)
    for name, parameter in decoder.named_parameters():
        if adapters.is_of_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=drawn) * 0.3
    adapters.settle(decoder)
    return decoder


SEQUENCES = torch.tensor(
    [
        [[5, 6, 7, 8, 9, 5, 6, 17, 18, 3], [0, 0, 1, 1, 1, 0, 0, 2, 2, 0]],
        [[5, 20, 5, 21, 6, 30, 31, 6, 40, 3], [0, 1, 0, 2, 0, 3, 3, 0, 4, 0]],
    ]
)
"""Three pairs in two sequences; documents see each other, for the sake of a short oracle."""


def hand_calculated(policy: Decoder, spec: DpoSpec) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """The mean loss of the three pairs out of whole logits, and of each pair both rewards."""
    frozen = Decoder(ModelSpec.model_validate(MODEL))
    frozen.load_state_dict({name: t for name, t in policy.state_dict().items() if not adapters.is_of_adapter(name)})

    def answers(network: Decoder) -> list[list[torch.Tensor]]:
        found = []
        for tokens, numbers in SEQUENCES:
            hidden, _ = network.hidden_states(tokens[None, :-1])
            logits = 20.0 * torch.tanh(hidden[0] @ network.output_weight.t() / 20.0)
            spoken = torch.log(torch.softmax(logits, -1)).gather(1, tokens[1:, None])[:, 0]
            sums = [
                sum(spoken[at] for at in range(9) if numbers[at + 1] == n) for n in range(1, int(numbers.max()) + 1)
            ]
            found += [sums[at : at + 2] for at in range(0, len(sums), 2)]
        return found

    rewards, losses = [], []
    for now, before, length in zip(answers(policy), answers(frozen), (3, 1, 2), strict=True):
        pair = [spec.beta * (one - other.detach()) for one, other in zip(now, before, strict=True)]
        right = 1 / (1 + torch.exp(pair[1] - pair[0]))
        wrong = spec.label_smoothing
        losses.append(-(1 - wrong) * right.log() - wrong * (1 - right).log() - spec.sft_weight * now[0] / length)
        rewards.append(pair)
    return torch.stack(losses).mean(), rewards


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("lora", DpoSpec(beta=0.5)), ("dora", DpoSpec(beta=0.2, label_smoothing=0.1, sft_weight=0.7))],
    ids=["plain", "smoothed with sft"],
)
def test_the_loss_and_its_gradient_are_those_of_a_calculation_by_hand(
    kind: Literal["lora", "dora"], spec: DpoSpec
) -> None:
    decoder = adapted(kind)
    expected, rewards = hand_calculated(decoder, spec)
    trained = {name: part for name, part in decoder.named_parameters() if part.requires_grad}
    gradients = torch.autograd.grad(expected, list(trained.values()))
    found = compare(decoder, SEQUENCES, spec)
    assert float(found.losses.detach().mean()) == pytest.approx(float(expected.detach()), rel=1e-5)
    again = torch.autograd.grad(found.losses.mean(), list(trained.values()))
    largest = max(float(oracle.abs().max()) for oracle in gradients)
    for name, gradient, oracle in zip(trained, again, gradients, strict=True):
        assert (gradient - oracle).abs().max() <= 1e-3 * largest, name  # fp32, through logits of some 20
    reported = report(found.figures)
    chosen, rejected = (sum(float(pair[side].detach()) for pair in rewards) / 3 for side in (0, 1))
    assert reported["chosen_reward"] == pytest.approx(chosen, abs=1e-5)
    assert reported["reward_margin"] == pytest.approx(chosen - rejected, abs=1e-5)
    assert reported["preference_accuracy"] == sum(bool(pair[0] > pair[1]) for pair in rewards) / 3


def test_the_gradient_of_a_pair_has_the_weight_that_the_paper_states() -> None:
    policy = torch.tensor([[-3.0, -2.5]], requires_grad=True)
    losses, _ = preference_losses(policy, torch.tensor([[-3.5, -2.0]]), torch.ones(1, 2), DpoSpec(beta=0.3))
    losses.sum().backward()
    weight = 0.3 / (1 + math.exp(0.3 * (0.5 - -0.5)))  # beta sigmoid(rejected reward - chosen reward), section 4
    assert policy.grad is not None
    assert policy.grad.tolist()[0] == pytest.approx([-weight, weight])


@pytest.fixture
def base(home: Path) -> Path:
    """A folder with a small network, its tokenizer, and pairs beside it whose chosen answer says blue."""
    save_pretrained(Decoder(ModelSpec.model_validate(MODEL | {"output_softcap": None})), home / "base")
    train_tokenizer(["red green blue one two three"] * 3, 300).save(str(home / "base" / "tokenizer.json"))
    with (home / "pairs.jsonl").open("w") as file:
        for number in range(60):
            count = number % 3 + 1
            pair = {"prompt": f"say {number}", "chosen": "blue " * count, "rejected": "red " * (4 - count)}
            file.write(json.dumps(pair) + "\n")
    return home / "base"


def make(base: Path, name: str, processes: int = 1, adapter: dict[str, Any] | None = None, **train: Any) -> RunSpec:
    return run_from(
        {
            "name": name,
            "model": MODEL | {"output_softcap": None},
            "data": {"source": "pairs", "files": [str(base.parent / "pairs.jsonl")], "validation_fraction": 0.2},
            "adapter": {"rank": 4, "alpha": 8.0} | (adapter or {}),
            "dpo": {"beta": 0.5},
            "train": {
                "objective": "dpo", "init_from": str(base), "tokens": 8 * 4 * 96, "seq_len": 96, "global_batch": 4,
                "micro_batch": 2, "precision": "fp32", "learning_rate": 1e-2, "validate_every": 0,
                "schedule": "constant",
            }
            | train,
            "checkpoint": {"every_steps": 100, "asynchronous": False},
            "cluster": {"preset": "local"} | dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), processes),
        }
    )  # fmt: skip


def test_a_run_learns_to_prefer_and_logs_it_while_the_reference_stays(base: Path) -> None:
    spec = make(base, "learns", tokens=25 * 4 * 96, validate_every=5)
    with open_run(spec, folder=base.parent / "run") as session:
        bring_weights(spec, session.folder)
        trainer = Trainer(session, NoView())
        tokens = torch.arange(40).unsqueeze(0)
        with torch.no_grad():
            before = trainer.decoder(tokens)
        assert trainer._validate() is not None
        # The network begins as the reference: no reward, every pair a tie, the loss of a coin.
        assert trainer._validated["validation_loss"] == pytest.approx(math.log(2))
        assert trainer._validated["validation_preference_accuracy"] == 0.5
        assert trainer._validated["validation_reward_margin"] == 0.0
        trainer.run()
        with torch.no_grad(), adapters.set_aside(trainer.decoder):
            assert torch.equal(trainer.decoder(tokens), before)
        trainer.close()
    rows = [json.loads(line) for line in (base.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert last["validation_preference_accuracy"] == 1.0
    assert last["preference_accuracy"] == 1.0
    assert last["loss"] < 0.5 * first["loss"]
    assert last["chosen_reward"] - last["rejected_reward"] == pytest.approx(last["reward_margin"])
    assert last["validation_loss"] < 0.5 * rows[4]["validation_loss"]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(base: Path) -> None:
    spec = make(base, "resumed", adapter={"dropout": 0.1})
    whole = train(spec, base.parent / "whole")
    train(spec, base.parent / "parts", steps=3)
    resumed = train(spec, base.parent / "parts", resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_processes_learn_what_one_does_however_many_pairs_each_has(base: Path) -> None:
    found = []
    kept = ("loss", "grad_norm", "cross_entropy", "chosen_reward", "reward_margin", "preference_accuracy")
    for processes, micro_batch in ((1, 4), (2, 1)):
        spec = make(base, f"on-{processes}-{micro_batch}", processes, micro_batch=micro_batch)
        with open_run(spec, folder=base.parent / spec.name) as session:
            bring_weights(spec, session.folder)
            found.append(together(processes, steps_of, session.folder, spec, 3, kept)[0])
    for row, expected in zip(found[1], found[0], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter": None}, r"train\.objective = 'dpo' needs an \[adapter\]"),
        ({"data": {"source": "stdlib"}}, r"train\.objective = 'dpo' needs data\.source = 'pairs', not 'stdlib'"),
        ({"train": {"init_from": "./base"}}, r"data\.source = 'pairs' is not accepted without train\.objective"),
        ({"data": {"source": "stdlib"}, "train": {}, "adapter": None}, r"\[dpo\] is not accepted without"),
        ({"dpo": {"label_smoothing": 0.5}}, r"dpo\.label_smoothing = 0\.5 is not accepted: less than 0\.5 is"),
    ],
    ids=["all weights", "text", "pairs alone", "settings alone", "smoothing"],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], sentence: str) -> None:
    values: dict[str, Any] = {
        "model": MODEL,
        "data": {"source": "pairs", "files": ["pairs.jsonl"]},
        "train": {"objective": "dpo", "init_from": "./base", "seq_len": 64},
        "adapter": {},
        "dpo": {"beta": 0.5},
    } | changes
    values["train"] = {"seq_len": 64} | values["train"]
    with pytest.raises(ValueError, match=sentence):
        run_from({name: section for name, section in values.items() if section is not None})
