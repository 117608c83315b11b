"""Runs that begin with imported weights, and with those of a dense network as a mixture of experts."""

from __future__ import annotations

import itertools
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from modelworks.model.decoder import Decoder
from modelworks.model.initial import FOLDER, InitialWeights
from modelworks.release.beginning import bring_weights, refuse_beginning
from modelworks.release.huggingface import save_pretrained
from modelworks.spec import InputError, ModelSpec, OperationError, RunSpec, run_from
from modelworks.spec.home import runs_folder
from modelworks.train.loop import Trainer
from modelworks.train.session import open_run
from modelworks.train.view import NoView
from modelworks.train_command import train_and_release

VOCAB = 400
DENSE: dict[str, Any] = {
    "layers": 2,
    "hidden": 64,
    "ffn_hidden": 96,
    "heads": 4,
    "kv_heads": 2,
    "vocab": VOCAB,
    "context": 64,
    "tied_embeddings": True,
}
EXPERTS: dict[str, Any] = {"experts": 8, "top_k": 2, "expert_hidden": 96, "renormalize": True}
STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the standard library's sources."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("textwrap.py", "bisect.py", "heapq.py", "shlex.py", "queue.py", "sched.py"):
        (folder / f"{name}.txt").write_text((STDLIB / name).read_text())
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A small Llama with its tokenizer, as a Hugging Face folder; its weights are anything but new ones."""
    folder = tmp_path_factory.mktemp("weights") / "llama"
    decoder = Decoder(ModelSpec.model_validate(DENSE))
    decoder.initialize(3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_pretrained(decoder, folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(text.iterdir())], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make(source: Path | str, text: Path, name: str = "continued", **changed: Any) -> RunSpec:
    values: dict[str, Any] = {
        "name": name,
        "model": dict(DENSE),
        "data": {
            "source": "files",
            "files": [str(text)],
            "validation_fraction": 0.3,
        },
        "train": {
            "init_from": str(source),
            "tokens": 12 * 4 * 32,
            "seq_len": 32,
            "global_batch": 4,
            "precision": "fp32",
            "validate_every": 0,
            "validation_tokens": 2048,
            "learning_rate": 2e-3,
        },
    }
    for section, fields in changed.items():
        values[section] = {**values[section], **fields}
    return run_from(values)


def begun(spec: RunSpec) -> Trainer:
    """The run's trainer before its first step."""
    with open_run(spec) as session:
        bring_weights(spec, session.folder)
        trainer = Trainer(session, NoView())
        trainer.close()
    return trainer


def test_a_run_begins_with_the_weights_that_it_is_given(home: Path, dense: Path, text: Path) -> None:
    trainer = begun(make(dense, text))
    from modelworks.release.huggingface import load_pretrained

    for (name, given), (_, found) in zip(
        load_pretrained(dense).named_parameters(), trainer.decoder.named_parameters(), strict=True
    ):
        assert torch.equal(given, found), name


@pytest.mark.parametrize("top_k", [2, 8])
def test_an_upcycled_network_has_the_dense_ones_loss_on_real_text(
    home: Path, dense: Path, text: Path, top_k: int
) -> None:
    before = begun(make(dense, text))._validate()
    experts = EXPERTS | {"top_k": top_k}
    after = begun(make(dense, text, "upcycled", model=DENSE | {"moe": experts}))._validate()
    assert before is not None
    assert after == pytest.approx(before, rel=1e-5)
    noise = begun(make(dense, text, "noise", train={"init_from": None}))._validate()
    assert noise is not None
    assert abs(noise - before) > 0.01 * before  # So that the weights made a difference.


def test_grok_shaped_networks_are_upcycled_without_rescaled_gates(home: Path, dense: Path, text: Path) -> None:
    """The norm after the experts takes their gates' sum away."""
    grok = DENSE | {"norm_placement": "sandwich", "attention_softcap": 30.0, "activation": "gelu"}
    source = runs_folder() / "grok"
    spec = make(dense, text, "grok", model=grok, train={"init_from": None})
    train_and_release(spec, False, NoView(), lambda _: None)
    before = begun(make("grok", text, "again", model=grok))._validate()
    sparse = grok | {"moe": EXPERTS | {"renormalize": False}}
    after = begun(make("grok", text, "sparse", model=sparse))._validate()
    last = json.loads((source / "status.json").read_text())["validation_bpb"]
    assert before == pytest.approx(last, rel=1e-6)
    assert after == pytest.approx(before, rel=1e-3)  # The norms' epsilon is not scaled along.


def test_upcycled_experts_drift_apart_while_the_loss_falls(home: Path, dense: Path, text: Path) -> None:
    spec = make(dense, text, "upcycled", model=DENSE | {"moe": EXPERTS})
    first = begun(spec)._validate()
    shutil.rmtree(runs_folder() / "upcycled")
    result, _ = train_and_release(spec, False, NoView(), lambda _: None)
    assert result.state == "finished"
    assert result.validation_bpb is not None
    assert first is not None
    assert result.validation_bpb < first
    decoder = Decoder(spec.model)
    from modelworks.model import checkpoint

    checkpoint.load_weights(result.checkpoint, decoder)
    for block in decoder.blocks:
        for one, other in itertools.combinations(block.moe.up, 2):
            assert (one - other).abs().max() > 1e-5


def test_a_part_of_a_parameter_begins_with_its_part_of_the_weights(home: Path, dense: Path, text: Path) -> None:
    """As processes hold them that share a network: some experts, some of their rows."""
    spec = make(dense, text, "upcycled", model=DENSE | {"moe": EXPERTS})
    bring_weights(spec, home / "run")
    weights = InitialWeights(home / "run" / FOLDER)
    gate = torch.empty(8, 96, 64)
    assert weights.fill(gate, "blocks.1.moe.gate")
    part = torch.empty(3, 40, 64)
    assert weights.fill(part, "blocks.1.moe.gate", (8, 96, 64), (2, 50, 0))
    assert torch.equal(part, gate[2:5, 50:90])
    rows = torch.empty(10, 64)
    assert weights.fill(rows, "embed.weight", (VOCAB, 64), (100, 0))
    whole = torch.empty(VOCAB, 64)
    assert weights.fill(whole, "embed.weight")
    assert torch.equal(rows, whole[100:110])
    assert not weights.fill(torch.empty(8, 64), "blocks.1.moe.router.weight")
    with pytest.raises(OperationError, match=r"holds no head\.weight"):
        weights.fill(torch.empty(VOCAB, 64), "head.weight")


def test_weights_stay_in_the_runs_folder_when_their_source_is_gone(
    home: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "copy"
    shutil.copytree(dense, source)
    spec = make(source, text)
    first = begun(spec)
    (source / "model.safetensors").unlink()
    with open_run(spec) as session:
        again = Trainer(session, NoView())
        again.close()
    for one, other in zip(first.decoder.parameters(), again.decoder.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"train": {"init_from": "/nowhere"}}, "there is no folder /nowhere"),
        ({"train": {"init_from": "no-such-run"}}, "init_from = 'no-such-run' is not accepted"),
        ({"model": {"layers": 3}}, r"model.layers = 3 is not accepted: the weights of .* have 2"),
        ({"model": {"vocab": 500}}, "model.vocab = 500 is not accepted"),
        ({"model": {"moe": EXPERTS | {"expert_hidden": 64}}}, "model.moe.expert_hidden = 64 .* have 96"),
        ({"model": {"moe": EXPERTS | {"residual": True}}}, "model.moe.residual = True"),
        ({"model": {"moe": EXPERTS | {"renormalize": False}}}, "model.moe.renormalize = false is not accepted"),
    ],
)
def test_what_the_weights_do_not_fit_is_refused_by_name(
    home: Path, dense: Path, text: Path, changed: dict[str, Any], sentence: str
) -> None:
    spec = make(dense, text, **changed)
    with pytest.raises(InputError, match=sentence):
        refuse_beginning(spec)
    with pytest.raises(InputError, match=sentence):
        train_and_release(spec, False, NoView(), lambda _: None)
    assert not runs_folder().exists()


def test_a_tokenizer_with_other_pieces_is_refused(home: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((dense / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse_beginning(make(dense, text, data={"tokenizer": str(dense / "tokenizer.json")}))
    with pytest.raises(InputError, match="it has other pieces than the weights' own"):
        refuse_beginning(make(dense, text, data={"tokenizer": str(tmp_path / "tokenizer.json")}))


def test_the_weights_own_tokenizer_is_taken(home: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    begun(make(dense, text))
    given = (runs_folder() / "continued" / "tokenizer.json").read_text()
    assert json.loads(given)["model"] == json.loads((dense / "tokenizer.json").read_text())["model"]
    shutil.copytree(dense, tmp_path / "without")
    (tmp_path / "without" / "tokenizer.json").unlink()
    with pytest.raises(
        InputError, match=r"data\.tokenizer = 'bpe' is not accepted with train\.init_from, since .* missing"
    ):
        refuse_beginning(make(tmp_path / "without", text))
