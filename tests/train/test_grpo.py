"""Reinforcement with checkable answers: its loss and gradient, what it learns, who draws, and how it goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from tuned import train

from modelworks.cli import app
from modelworks.data.tokenizer import train_tokenizer
from modelworks.model import adapters
from modelworks.release.beginning import bring_weights
from modelworks.rollout_engine import EngineSampler, refuse_unloadable
from modelworks.spec import ModelSpec, run_from
from modelworks.spec.errors import InputError
from modelworks.spec.files import dumps
from modelworks.spec.reinforcement import GrpoSpec
from modelworks.spec.run import RunSpec
from modelworks.train.grpo import GroupRelative, advantages, token_losses
from modelworks.train.loop import Trainer
from modelworks.train.refusals import refuse_unsupported
from modelworks.train.rollouts import Sampling
from modelworks.train.session import open_run
from modelworks.train.view import NoView

MODEL = {
    "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn_hidden": 64, "vocab": 300, "context": 64,
    "tied_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose network says red or blue, whatever it is asked, and beside it tasks whose answer is blue."""
    folder = tmp_path_factory.mktemp("grpo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELWORKS_HOME", str(folder))
        torch.set_num_threads(1)
        train_tokenizer(["red blue say 1 2 3"] * 3, 300).save(str(folder / "tokenizer.json"))
        with (folder / "dialogues.jsonl").open("w") as file:
            for number in range(60):
                answer = ["red", "blue"][number % 2]
                messages = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": messages}) + "\n")
        with (folder / "tasks.jsonl").open("w") as file:
            for number in range(60):
                file.write(json.dumps({"prompt": f"say {number}", "answer": "blue"}) + "\n")
        values = {
            "name": "base",
            "model": MODEL,
            "data": {
                "source": "dialogues", "files": [str(folder / "dialogues.jsonl")],
                "tokenizer": str(folder / "tokenizer.json"), "validation_fraction": 0.0,
            },
            "train": {
                "tokens": 60 * 8 * 64, "seq_len": 64, "global_batch": 8, "precision": "fp32", "learning_rate": 1e-2,
                "validate_every": 0,
            },
            "checkpoint": {"every_steps": 1000, "asynchronous": False},
        }  # fmt: skip
        train(run_from(values), folder / "base")
        yield folder / "base"


def make(base: Path, name: str, grpo: dict[str, Any] | None = None, **sections: Any) -> RunSpec:
    values: dict[str, Any] = {
        "name": name,
        "model": MODEL,
        "data": {
            "source": "tasks", "files": [str(base.parent / "tasks.jsonl")], "validation_fraction": 0.2,
        },
        "train": {
            "objective": "grpo", "init_from": str(base), "tokens": 8 * 16 * 40, "seq_len": 40, "global_batch": 16,
            "micro_batch": 8, "precision": "fp32", "learning_rate": 3e-3, "weight_decay": 0.0, "validate_every": 0,
            "schedule": "constant",
        },
        "grpo": {"group": 4, "max_new_tokens": 6, "engine": "trainer"} | (grpo or {}),
        "rewards": {"marks": [], "format": 0.0},
        "checkpoint": {"every_steps": 100, "asynchronous": False},
    }  # fmt: skip
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return run_from(values)


def test_an_advantage_is_the_distance_from_the_groups_mean_in_standard_deviations() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [2.0, 0.0, 0.0, 0.0]])
    found = advantages(rewards, divide=True)
    assert found[0].tolist() == [1.0, -1.0, -1.0, 1.0]
    assert found[1].tolist() == [0.0] * 4  # nothing to tell them by, whatever rounding leaves of the difference
    assert found[2].tolist() == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])
    assert advantages(rewards, divide=False)[2].tolist() == [1.5, -0.5, -0.5, -0.5]


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.0, 1.0, True), (1.5, 1.0, False), (1.5, -1.0, True), (0.5, -1.0, False), (0.5, 1.0, True), (1.25, 1.0, True)],
)
def test_a_token_beyond_the_bounds_is_moved_only_back(ratio: float, advantage: float, moves: bool) -> None:
    now = torch.tensor([ratio]).log().requires_grad_()
    losses, clipped, _ = token_losses(
        now, torch.zeros(1), torch.tensor([advantage]), GrpoSpec(clip_low=0.2, clip_high=0.3)
    )
    losses.sum().backward()
    assert now.grad is not None
    assert now.grad.tolist() == pytest.approx([-ratio * advantage if moves else 0.0])
    assert clipped.tolist() == [not moves]


@pytest.mark.parametrize(
    "grpo",
    [
        {},
        {"updates": 2, "kl": 0.5, "mean_over": "tokens", "clip_low": 0.01, "clip_high": 0.02},
        {"updates": 2, "mean_over": "room", "divide_by_deviation": False, "clip_low": 0.01, "clip_high": 0.5},
        {"updates": 2, "temperature": 1.7, "kl": 0.1},
    ],
    ids=["deepseekmath", "tokens with kl", "dr grpo", "temperature"],
)
def test_the_loss_and_its_gradient_are_those_of_a_calculation_by_hand(base: Path, grpo: dict[str, Any]) -> None:
    spec = make(base, "by-hand", grpo, adapter={"rank": 2}).model_copy(update={"name": "by-hand"})
    with open_run(spec, folder=base.parent / f"by-hand-{len(str(grpo))}") as session:
        bring_weights(spec, session.folder)
        trainer = Trainer(session, NoView())
        decoder, objective = trainer.decoder, trainer.objective
        trained = {name: part for name, part in decoder.named_parameters() if part.requires_grad}
        parts = objective.batch(0)
        kept = [json.loads(line) for line in (session.folder / "rollouts" / "step-00000001.jsonl").open()]
        sequences = torch.cat([part.sequences for part in parts])

        def spoken() -> list[torch.Tensor]:
            """The log-probabilities of each reply's tokens, out of whole logits."""
            found = []
            for tokens, counts in sequences:
                hidden, _ = decoder.hidden_states(tokens[None, :-1])
                logits = hidden[0] @ decoder.output_weight.t() / spec.grpo.temperature
                likelihoods = torch.log(torch.softmax(logits, -1)).gather(1, tokens[1:, None])[:, 0]
                found.append(likelihoods[counts[1:] == 1])
            return found

        before = [one.detach() for one in spoken()]
        drawn = torch.Generator().manual_seed(5)
        if spec.grpo.updates > 1:  # the second update, with what the first one has moved
            for part in trained.values():
                part.data += 0.05 * torch.randn(part.shape, generator=drawn)
        with adapters.set_aside(decoder), torch.no_grad():
            reference = spoken()
        by_reply = []
        rewards = [float(one["reply"] == "blue") for one in kept]
        assert 0 < sum(rewards) < len(rewards) == 16
        for number, now in enumerate(spoken()):
            group = rewards[number // 4 * 4 : number // 4 * 4 + 4]
            mean = sum(group) / 4
            deviation = (sum((one - mean) ** 2 for one in group) / 4) ** 0.5
            scale = deviation if spec.grpo.divide_by_deviation and deviation else 1.0
            advantage = (rewards[number] - mean) / scale
            ratio = torch.exp(now - before[number])
            low, high = 1 - spec.grpo.clip_low, 1 + spec.grpo.clip_high
            gain = [
                min(one * advantage, max(low, min(high, value)) * advantage)
                if not low <= value <= high
                else one * advantage
                for one, value in zip(ratio, ratio.tolist(), strict=True)
            ]
            other = torch.exp(reference[number] - now)
            by_reply.append(-sum(gain) + spec.grpo.kl * (other - torch.log(other) - 1).sum())
        lengths = [len(one) for one in before]
        if spec.grpo.mean_over == "replies":
            expected = sum(one / length for one, length in zip(by_reply, lengths, strict=True)) / 16
        else:
            expected = sum(by_reply) / (sum(lengths) if spec.grpo.mean_over == "tokens" else 16 * 6)
        oracle = torch.autograd.grad(expected, list(trained.values()))
        losses = trainer._gradients(parts)
        assert float(losses.cross_entropy) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
        largest = max(float(one.abs().max()) for one in oracle)
        assert largest > 0
        for (name, part), gradient in zip(trained.items(), oracle, strict=True):
            assert part.grad is not None
            assert (part.grad - gradient).abs().max() <= 1e-3 * largest, name
        found = objective.report()
        assert found["reward"] == pytest.approx(sum(rewards) / 16)
        assert found["reply_tokens"] == sum(lengths) / 16
        assert ("kl" in found) == (spec.grpo.kl > 0)
        if spec.grpo.updates == 1:
            assert found["clip_share"] == 0.0
        trainer.close()


def test_replies_that_are_all_worth_the_same_move_nothing(base: Path) -> None:
    spec = make(base, "silent", rewards={"answer": 0.0})
    with open_run(spec, folder=base.parent / "silent") as session:
        bring_weights(spec, session.folder)
        trainer = Trainer(session, NoView())
        before = {name: part.clone() for name, part in trainer.decoder.state_dict().items()}
        row = trainer.one_step()
        assert (row["loss"], row["grad_norm"], row["groups_without_signal"]) == (0.0, 0.0, 1.0)
        assert all(torch.equal(part, before[name]) for name, part in trainer.decoder.state_dict().items())
        trainer.close()


def test_a_run_learns_what_is_rewarded_and_logs_it(base: Path) -> None:
    spec = make(base, "learns", train={"tokens": 20 * 16 * 40, "validate_every": 10})
    with open_run(spec, folder=base.parent / "learns") as session:
        bring_weights(spec, session.folder)
        trainer = Trainer(session, NoView())
        trainer.run()
        trainer.close()
    rows = [json.loads(line) for line in (base.parent / "learns" / "metrics.jsonl").open()]
    assert rows[0]["reward"] < 0.8
    assert sum(row["reward"] for row in rows[-3:]) / 3 > 0.95
    assert rows[-1]["validation_reward"] == rows[-1]["validation_reward_answer"] == 1.0
    assert rows[-1]["validation_bpb"] is None
    assert max(row["drawn_difference"] for row in rows) < 1e-4  # the network that draws is the one that learns
    assert all(0 < row["reply_tokens"] <= 6 and 0 <= row["cut_replies"] <= 1 for row in rows)
    files = sorted((base.parent / "learns" / "rollouts").iterdir())
    assert len(files) == 20
    kept = [json.loads(line) for line in files[-1].open()]
    assert {one["reply"] == "blue" for one in kept if one["reward"]} == {True}
    assert kept[0]["asked"][0]["content"].startswith("say ")


@pytest.mark.parametrize("updates", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(base: Path, updates: int) -> None:
    spec = make(base, "resumed", {"updates": updates}, train={"tokens": 4 * 16 * 40})
    folders = [base.parent / f"{name}-{updates}" for name in ("whole", "parts")]
    whole = train(spec, folders[0])
    train(spec, folders[1], steps=2)
    resumed = train(spec, folders[1], resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    replies = [(folder / "rollouts" / "step-00000004.jsonl").read_text() for folder in folders]
    assert replies[0] == replies[1]


ENGINES = {"whole": None, "lora": {"rank": 2}, "dora": {"rank": 2, "kind": "dora"}}


@pytest.mark.parametrize("adapter", ENGINES.values(), ids=ENGINES)
def test_the_engine_draws_from_the_network_as_it_is(base: Path, adapter: dict[str, Any] | None) -> None:
    """Held against the trainer: the likeliest tokens are its own, and drawn ones have the probabilities it gives."""
    spec = make(base, "engine", {"engine": "llama.cpp"}, **({} if adapter is None else {"adapter": adapter}))
    folder = base.parent / f"engine-{(adapter or {}).get('kind', len(adapter or {}))}"
    with open_run(spec, folder=folder) as session:
        bring_weights(spec, session.folder)
        sampler = EngineSampler(spec, session.folder)
        trainer = Trainer(session, NoView(), sampler=sampler)
        drawn = torch.Generator().manual_seed(7)
        objective = trainer.objective
        assert isinstance(objective, GroupRelative)
        for moved in (0.0, 0.2):
            for part in trainer.decoder.parameters():
                if part.requires_grad:
                    part.data += moved * torch.randn(part.shape, generator=drawn)
            parts = objective.batch(0)
            with torch.no_grad():
                for part in parts:
                    objective.losses(part)
            found = objective.report()
            assert found["drawn_difference"] < 0.02  # keys and values are in fp16 there
            prompts = [task.prompt for task in trainer.data.tasks("train", 0, 8, 30, 0)]  # type: ignore[attr-defined]
            greedy = Sampling(6, 0.0, trainer.data.end)  # type: ignore[attr-defined]
            replies = sampler(trainer.decoder, prompts, greedy, [0] * 8)
            certain = [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if reply.certain]
            assert len(certain) == 8 or moved  # else halves of characters are said
            for prompt, reply in certain:
                with torch.no_grad():
                    logits = trainer.decoder(torch.tensor([[*prompt, *reply.tokens]]))[0, len(prompt) - 1 : -1]
                chosen = logits.gather(1, torch.tensor(reply.tokens).unsqueeze(1))[:, 0]
                assert (logits.amax(1) - chosen).max() < 0.05  # two that are about as likely may change places
        sampler.close()
        trainer.close()


def test_the_command_trains_with_the_engines_replies(base: Path) -> None:
    spec = make(base, "commanded", {"engine": "llama.cpp"})
    file = base.parent / "commanded.toml"
    file.write_text(dumps(spec))
    planned = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    done = CliRunner().invoke(app, ["train", str(file)])
    assert done.exit_code == 0, done.output
    folder = base.parent / "runs" / "commanded"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert len(rows) == 8
    assert rows[-1]["reward"] > rows[0]["reward"]
    assert max(row["drawn_difference"] for row in rows) < 0.02
    assert rows[-1]["validation_reward"] == rows[-1]["validation_reward_answer"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": {"source": "stdlib"}}, r"objective = 'grpo' needs data\.source = 'tasks', not 'stdlib'"),
        ({"train": {"objective": "next-token"}}, r"data\.source = 'tasks' is not accepted without train\.objective"),
        ({"train": {"init_from": None}}, r"objective = 'grpo' needs train\.init_from"),
        ({"grpo": {"group": 3}}, r"grpo\.group = 3 doesn't divide train\.global_batch = 16"),
        ({"grpo": {"group": 1}}, r"grpo\.group = 1 is not accepted"),
        ({"grpo": {"max_new_tokens": 40}}, r"grpo\.max_new_tokens = 40 leaves a prompt no room in train\.seq_len = 40"),
        ({"grpo": {"kl": 0.1}}, r"grpo\.kl is not accepted above 0 without an \[adapter\]"),
        ({"rewards": {"marks": ["<a>"]}}, r"rewards\.marks = \['<a>'\] is not accepted"),
        ({"rewards": {"marks": [], "format": 1.0}}, r"rewards\.format is not accepted above 0 without rewards\.marks"),
        ({"data": {"tasks": {"prompt": "2 + 2?"}}}, r"tasks\.prompt = '2 \+ 2\?' is not accepted"),
        ({"data": {"tasks": {"digits": 1}}}, r"\[data\.tasks\] is not accepted with data\.files"),
    ],
    ids=["text", "alone", "noise", "odd group", "no group", "no room", "kl", "one mark", "format", "prompt", "both"],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(base: Path, changes: dict[str, Any], sentence: str) -> None:
    values = make(base, "refused").model_dump(mode="json")
    for section, fields in changes.items():
        values[section] |= fields
    with pytest.raises(InputError, match=sentence):
        run_from({name: section for name, section in values.items() if section is not None})


def test_what_cannot_be_done_is_refused_before_anything_is_prepared(base: Path) -> None:
    spec = make(base, "refused", {"engine": "llama.cpp"})
    gpus = dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), 2)
    several = spec.model_copy(update={"cluster": spec.cluster.model_copy(update=gpus)})
    with pytest.raises(InputError, match=r"cluster\.gpus = 2 is not accepted with train\.objective = 'grpo'"):
        refuse_unsupported(several, 2)
    compiled = spec.model_copy(update={"train": spec.train.model_copy(update={"compile": True})})
    with pytest.raises(InputError, match=r"train\.compile = true is not accepted with train\.objective = 'grpo'"):
        refuse_unsupported(compiled, 1)
    unknown = ModelSpec.model_validate(MODEL | {"output_softcap": 20.0})
    with pytest.raises(InputError, match=r"grpo\.engine = 'llama\.cpp' is not accepted: .*'trainer' is"):
        refuse_unloadable(spec.model_copy(update={"model": unknown}))
