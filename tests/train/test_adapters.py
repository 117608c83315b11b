"""An adapter learns from dialogues while the network stays as it was: kept, resumed and shared like any other run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
from processes import together
from tuned import steps_of, train

from modelworks.data.tokenizer import train_tokenizer
from modelworks.model import adapters, checkpoint
from modelworks.model.decoder import Decoder
from modelworks.release.beginning import bring_weights
from modelworks.release.huggingface import save_pretrained
from modelworks.release.runs import load_run_content
from modelworks.spec import InputError, ModelSpec, run_from
from modelworks.spec.run import AdapterSpec, RunSpec
from modelworks.train.layout import layout
from modelworks.train.loop import Trainer
from modelworks.train.refusals import refuse_unsupported
from modelworks.train.session import open_run
from modelworks.train.view import NoView

MODEL = {
    "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn_hidden": 48, "vocab": 300, "context": 64,
    "tied_embeddings": True,
}  # fmt: skip


@pytest.fixture
def base(home: Path) -> Path:
    """A folder with a small network, its tokenizer, and dialogues beside it."""
    save_pretrained(Decoder(ModelSpec.model_validate(MODEL)), home / "base")
    train_tokenizer(["red green blue one two three"] * 3, 300).save(str(home / "base" / "tokenizer.json"))
    with (home / "dialogues.jsonl").open("w") as file:
        for number in range(60):
            answer = "blue " * (number % 4 + 1)
            turns = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return home / "base"


def make(base: Path, name: str, processes: int = 1, adapter: dict[str, Any] | None = None, **train: Any) -> RunSpec:
    values: dict[str, Any] = {
        "name": name,
        "model": MODEL,
        "data": {
            "source": "dialogues",
            "files": [str(base.parent / "dialogues.jsonl")],
            "validation_fraction": 0.2,
        },
        "train": {
            "init_from": str(base), "tokens": 8 * 4 * 48, "seq_len": 48, "global_batch": 4, "micro_batch": 2,
            "precision": "fp32", "learning_rate": 1e-2, "validate_every": 0, "schedule": "constant",
        }
        | train,
        "checkpoint": {"every_steps": 100, "asynchronous": False},
        "cluster": {"preset": "local"} | dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), processes),
    }  # fmt: skip
    if adapter is not None:
        values["adapter"] = {"rank": 4, "alpha": 8.0} | adapter
    return run_from(values)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_checkpoint_holds_the_adapter_alone_and_resumes_to_the_bit(base: Path, kind: str) -> None:
    spec = make(base, kind, adapter={"kind": kind, "dropout": 0.1})
    whole = train(spec, base.parent / "whole")
    train(spec, base.parent / "parts", steps=3)
    resumed = train(spec, base.parent / "parts", resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(adapters.is_of_adapter(name) for name in whole)
    for file in checkpoint.newest_good(base.parent / "whole").glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            of_network = [key.split("/")[0] for key in content.keys() if not key.startswith("random.")]  # noqa: SIM118
        assert of_network
        assert all(adapters.is_of_adapter(key) for key in of_network)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_answers_are_learnt_and_the_merged_network_does_what_the_adapted_one_does(base: Path, kind: str) -> None:
    spec = make(base, kind, adapter={"kind": kind}, tokens=40 * 4 * 48)
    with open_run(spec, folder=base.parent / "run") as session:
        bring_weights(spec, session.folder)
        trainer = Trainer(session, NoView())
        before = trainer._validate()
        for _ in range(40):
            trainer.one_step()
        after = trainer._validate()
        assert before is not None
        assert after is not None
        assert after < 0.95 * before
        trainer._save()
        trainer.saving.finish()
        tokens = torch.arange(40).unsqueeze(0)
        trainer.decoder.documents = None
        with torch.no_grad():
            adapted = trainer.decoder.eval()(tokens)
        trainer.close()
    merged = load_run_content(base.parent / "run").decoder
    assert not list(adapters.adapted(merged))
    assert (merged(tokens) - adapted).abs().max() < 1e-4


def test_an_adapter_begins_as_the_network_itself() -> None:
    decoder, tokens = Decoder(ModelSpec.model_validate(MODEL)), torch.arange(20).unsqueeze(0)
    before = decoder(tokens)
    for kind in ("lora", "dora"):
        fresh = Decoder(ModelSpec.model_validate(MODEL))
        adapters.adapt(fresh, AdapterSpec(kind=kind))
        for name, parameter in fresh.named_parameters():
            if adapters.is_of_adapter(name):
                adapters.fill(parameter.detach(), 1, name)
        adapters.settle(fresh)
        assert (fresh(tokens) - before).abs().max() < 1e-5, kind


@pytest.mark.parametrize("adapter", [None, {"kind": "lora"}], ids=["whole", "lora"])
def test_two_processes_learn_what_one_does_whatever_answers_each_has(
    base: Path, adapter: dict[str, Any] | None
) -> None:
    found = []
    for processes, micro_batch in ((1, 4), (1, 1), (2, 1)):
        spec = make(base, f"on-{processes}-{micro_batch}", processes, adapter, micro_batch=micro_batch)
        with open_run(spec, folder=base.parent / spec.name) as session:
            bring_weights(spec, session.folder)
            found.append(together(processes, steps_of, session.folder, spec, 4, ("loss", "grad_norm"))[0])
    for other in found[1:]:
        for row, expected in zip(other, found[0], strict=True):
            assert row == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("parallel", "sentence"),
    [({"tensor": 2}, r"parallel\.tensor = 2"), ({"zero_stage": 3, "data": 2}, r"parallel\.zero_stage = 3")],
    ids=["tensor", "zero"],
)
def test_what_would_split_frozen_weights_is_refused(base: Path, parallel: dict[str, Any], sentence: str) -> None:
    spec = make(base, "split", 2, {})
    spec = spec.model_copy(update={"parallel": type(spec.parallel)(**parallel)})
    with pytest.raises(InputError, match=sentence + r" is not accepted with \[adapter\]"):
        refuse_unsupported(spec, 2)
    assert layout(make(base, "whole", 2, {}), 2).zero_stage == 0
