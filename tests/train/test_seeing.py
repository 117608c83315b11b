"""Training of networks that see: what changes, what is learnt, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.processes import together
from tests.train.tuned import steps_of
from tokenizers import Tokenizer

from modelworks.data.packed import PackedDataset
from modelworks.data.pictures import write_pictures
from modelworks.data.preparation import prepare
from modelworks.evaluate.questions import written
from modelworks.evaluate.sight import Sight
from modelworks.model.rotary import Documents
from modelworks.model.vision import SeeingDecoder
from modelworks.release.beginning import bring_weights
from modelworks.release.huggingface import save_pretrained
from modelworks.release.package import release_run
from modelworks.release.runs import load_run_content
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import run_from
from modelworks.spec.home import data_folder, runs_folder
from modelworks.spec.run import RunSpec
from modelworks.spec.stages import chain
from modelworks.train.batching import Seen, inputs_and_targets, take
from modelworks.train.loop import Trainer, train
from modelworks.train.refusals import refuse_unsupported
from modelworks.train.session import open_run
from modelworks.train.view import NoView

VISION = {
    "image_size": 64, "patch_size": 8, "layers": 1, "hidden": 48, "heads": 2, "ffn_hidden": 96, "pixel_shuffle": 2,
    "tiles": 5, "images": 2, "image_token": 3,
}  # fmt: skip
MODEL = {
    "layers": 2, "hidden": 64, "ffn_hidden": 128, "heads": 2, "kv_heads": 2, "head_dim": 32, "vocab": 320,
    "context": 512, "vision": VISION,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One home for all tests, so that the tokenizer of drawn pictures is trained once."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELWORKS_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with their questions, two of bars and two of text."""
    folder = tmp_path_factory.mktemp("pictures") / "four"
    write_pictures(folder, 4, kinds=("bars", "text"))
    return folder


def make(name: str, steps: int, files: Path | None = None, spec: dict[str, Any] | None = None, **given: Any) -> RunSpec:
    """A small run on pictures in files, or on drawn ones."""
    data: dict[str, Any] = {"source": "pictures"}
    data |= {"kinds": ["bars", "text"]} if files is None else {"files": [str(files)], "validation_fraction": 0.0}
    values = {
        "tokens": steps * 2 * 480, "seq_len": 480, "global_batch": 2, "micro_batch": 1, "precision": "fp32",
        "compile": False, "validation_tokens": 480, "validate_every": 0,
    }  # fmt: skip
    return run_from({"name": name, "model": MODEL, "data": data, "train": values | given, **(spec or {})})


def prepared(spec: RunSpec) -> PackedDataset:
    return prepare(spec.data, spec.model.vocab, data_folder(), vision=spec.model.vision)


def trained(spec: RunSpec, resume: bool = False) -> dict[str, torch.Tensor]:
    """Train a run to its end; its weights."""
    with open_run(spec, resume) as session:
        bring_weights(spec, session.folder)
        train(session)
    return load_run_content(session.folder).decoder.state_dict()


@pytest.mark.slow
def test_four_pictures_are_learnt_until_each_question_is_answered_exactly(pictures: Path) -> None:
    spec = make("learns", 150, pictures / "pictures.jsonl", learning_rate=3e-3, weight_decay=0.0)
    trained(spec)
    sight = Sight("learns")
    first = [one for one in written(pictures, ("bars", "text")) if one.id.endswith("-0")]  # others came behind it
    assert len(first) == 4
    assert [(sight.ask(one.content, 20),) for one in first] == [one.answers for one in first]

    released = release_run(runs_folder() / "learns", quantize=["f32"])
    assert released.gguf is not None
    assert released.eyes is not None
    stored = Store(runs_folder() / "models").add("learns", released.gguf, source="a test", eyes=released.eyes)
    assert stored.eyes_bytes == released.eyes.stat().st_size
    assert (Sight(str(released.folder)).ask(first[0].content, 20),) == first[0].answers


def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit() -> None:
    whole = trained(make("whole", 4, schedule="constant"))
    trained(make("parts", 2, schedule="constant"))
    resumed = trained(make("parts", 4, schedule="constant"), resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_begins_with_the_eyes_of_a_hugging_face_folder_however_many_pictures_they_saw(tmp_path: Path) -> None:
    spec = make("theirs", 1)
    theirs = SeeingDecoder(spec.model)
    theirs.initialize(5)
    save_pretrained(theirs, tmp_path / "theirs")
    shutil.copy(prepared(spec).tokenizer_file, tmp_path / "theirs" / "tokenizer.json")
    one = {"model": MODEL | {"vision": VISION | {"images": 1}}}
    with open_run(make("begins", 1, spec=one, init_from=str(tmp_path / "theirs"))) as session:
        bring_weights(session.spec, session.folder)
        trainer = Trainer(session, NoView())
        trainer.close()
        begun = trainer.decoder.state_dict()
    assert all(torch.equal(begun[name], value) for name, value in theirs.state_dict().items())


def test_the_connector_alone_changes_first_and_then_everything() -> None:
    stages = {"stages": [{"name": "all", "trains": "all", "tower_learning_rate": 1e-6}]}
    first, second = chain(make("eyes", 2, spec=stages, trains="connector"))
    begun = SeeingDecoder(first.model)
    begun.initialize(first.train.seed)
    before, joined = begun.state_dict(), trained(first)
    changed = {name for name in before if not torch.equal(before[name], joined[name])}
    assert changed == {name for name in before if name.startswith("eyes.connector.")}
    after = trained(second)
    assert all(not torch.equal(joined[name], after[name]) for name in after)
    # Adam moves by about the rate: the tower by a thousandth of what the rest does.
    moved = {name: float((after[name] - joined[name]).abs().max()) for name in after}
    tower = {name for name in moved if name.startswith("eyes.tower.")}
    assert 10 * max(moved[name] for name in tower) < min(moved[name] for name in moved.keys() - tower)


def test_the_eyes_learn_signs_alone_and_go_on_beside_the_questions() -> None:
    whole = {"model": MODEL | {"vision": VISION | {"tiles": 1, "pixel_shuffle": 1}}}
    stages = [{"name": "asks", "objective": "next-token", "sign_weight": 0.5, "kinds": ["text"]}]
    spec = make("signs", 30, spec=whole | {"stages": stages}, objective="signs", learning_rate=3e-3, log_every=1)
    first, second = chain(spec)
    begun = SeeingDecoder(first.model)
    begun.initialize(first.train.seed)
    before, read = begun.state_dict(), trained(first)
    changed = {name for name in before if not torch.equal(before[name], read[name])}
    assert changed == {name for name in before if not name.startswith(("blocks.", "embed."))}
    data = prepared(first)
    batch = take(data, "train", 0, 2, 480, 1337, signs=True)
    assert isinstance(batch, Seen)
    expected = 0.0
    with torch.no_grad():
        for tiles, written in zip(batch.tiles, batch.signs, strict=True):  # a micro batch each
            seen = begun.eyes(tiles)
            size = begun.size_beside_words(seen)
            expected += float(begun.sign_loss(seen, written) + 0.1 * size**2) / len(batch.tiles)
            assert float(begun.size_beside_words(seen / size.exp())) == pytest.approx(0, abs=1e-5)
    rows = _rows_of("signs")
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert rows[-1]["validation_sign_loss"] < 0.5 * rows[0]["loss"]
    assert 0 <= rows[-1]["validation_sign_accuracy"] <= 1
    assert second.data.kinds == ["text"]
    after = trained(second)
    assert all(not torch.equal(read[name], after[name]) for name in after)
    rows = _rows_of("signs-asks")
    assert rows[-1]["validation_bpb"] < 8
    # Both losses are minimised, each by its weight.
    given = second.data.model_copy(update={"tokenizer": str(data.tokenizer_file)})  # a stage takes that along
    data = prepared(second.model_copy(update={"data": given}))
    batch = take(data, "train", 0, 2, 480, 1337, signs=True)
    assert isinstance(batch, Seen)
    network = SeeingDecoder(second.model)
    network.documents = Documents(data.separator, True, network.image_token)
    network.load_state_dict(read)
    with torch.no_grad():
        answers = network(*inputs_and_targets(batch.sequences), tiles=torch.cat(batch.tiles)).cross_entropy
        signs = sum(map(network.sign_loss, map(network.eyes, batch.tiles), batch.signs)) / len(batch.tiles)
    assert rows[0]["sign_loss"] == pytest.approx(float(signs), rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(float(answers + 0.5 * signs), rel=1e-4)


@pytest.mark.parametrize("given", [{"objective": "signs"}, {"sign_weight": 1.0}, {}], ids=["signs", "both", "answers"])
def test_two_processes_learn_what_one_does_whatever_pictures_each_has(given: dict[str, Any], pictures: Path) -> None:
    whole = {"model": MODEL | {"vision": VISION | {"tiles": 1, "pixel_shuffle": 1, "images": 1}}}
    files = None if given else pictures / "pictures.jsonl"
    kept = ("loss", "grad_norm", *(["sign_loss"] if "sign_weight" in given else []))
    found = []
    for processes in (1, 2):
        cluster = {"cluster": {"gpus": processes, "gpus_per_node": processes}}
        asked = "-".join(given) or "answers"
        spec = make(f"{asked}-{processes}", 3, files, whole | cluster, optimizer="muon", **given)
        with open_run(spec) as session:
            found.append(together(processes, steps_of, session.folder, spec, 3, kept)[0])
    for row, expected in zip(found[1], found[0], strict=True):
        assert row.keys() == expected.keys()
        assert row == pytest.approx(expected, rel=1e-4)


def _rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs_folder() / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"objective": "signs"}, r"train\.objective = 'signs' is not accepted with model\.vision\.tiles = 5: 1 is"),
        ({"sign_weight": 1.0, "trains": "connector"}, r"train\.sign_weight = 1\.0 is not accepted with"),
        ({"objective": "signs", "sign_weight": 1.0}, r"train\.sign_weight is not accepted with train\.objective"),
    ],
    ids=["tiles", "connector", "twice"],
)
def test_signs_are_refused_where_they_cannot_be_learnt(given: dict[str, Any], says: str) -> None:
    model = MODEL if given == {"objective": "signs"} else MODEL | {"vision": VISION | {"tiles": 1}}
    with pytest.raises(InputError, match=says):
        make("refused", 1, spec={"model": model}, **given)


def test_each_question_about_a_drawn_picture_is_learnt_as_if_it_were_the_only_one() -> None:
    spec = make("packed", 1)
    assert spec.model.vision is not None
    data = prepared(spec)
    network = SeeingDecoder(spec.model)
    network.documents = Documents(data.separator, True, spec.model.vision.image_token)
    batch = take(data, "train", 0, 1, 480, 7)
    assert isinstance(batch, Seen)
    tokens, targets = inputs_and_targets(batch.sequences)
    tokenizer = Tokenizer.from_file(str(data.tokenizer_file))
    ends = [-1, *(tokens[0] == data.separator).nonzero().flatten().tolist()]
    parts = [slice(before + 1, end) for before, end in itertools.pairwise(ends) if end > before + 1]
    tiles, told = iter(torch.split(batch.tiles[0], 5)), []
    pictures = 0
    with torch.no_grad():
        together = network(tokens, tiles=batch.tiles[0])[0]
        for part in parts:
            asked = tokens[0, part]
            places = (asked == network.image_token).nonzero().flatten()
            if len(places):
                picture, seen, begin = asked[: places[-1] + 2], next(tiles), 0
                pictures += 1
            else:
                begin, asked = len(picture), torch.cat((picture, asked))
            assert (targets[0, part] >= 0).sum() > 1
            alone = network(asked[None], tiles=seen)[0, begin:]
            assert torch.allclose(together[part], alone, atol=1e-4)
            told.append(tokenizer.decode(asked[len(picture) :].tolist()))
    assert pictures == 2
    assert len(parts) > 4
    assert all("?" in one or "List" in one for one in told)


def test_a_role_is_one_piece() -> None:
    spec = make("roles", 1)
    data = prepared(spec)
    tokenizer = Tokenizer.from_file(str(data.tokenizer_file))
    assert [len(tokenizer.encode(role).ids) for role in ("user", "assistant")] == [1, 1]


def test_no_drawn_picture_comes_twice_and_another_seed_sees_others() -> None:
    spec = make("drawn", 1)
    data = prepared(spec)
    seen = [take(data, "train", place, 1, 480, seed) for place, seed in ((0, 1), (1, 1), (10**6, 1), (0, 2))]
    pixels = [batch.tiles[0] for batch in seen if isinstance(batch, Seen)]
    assert len({tiles.numpy().tobytes() for tiles in pixels}) == 4
    again = take(data, "train", 0, 1, 480, 1)
    assert isinstance(again, Seen)
    assert torch.equal(again.tiles[0], pixels[0])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", "gone.png: there is no such file"),
        ("cut off", "cut.png is cut off or damaged"),
        ("empty turn", r"messages\[1\], the assistant's, is empty"),
        ("no answer", "the last one is not accepted"),
    ],
)
def test_a_conversation_that_cannot_be_learnt_from_is_named_and_nothing_is_kept(
    pictures: Path, tmp_path: Path, what: str, says: str
) -> None:
    picture = pictures / "images" / "000000" / "0000000.png"
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    shown = {"missing": "gone.png", "cut off": "cut.png"}.get(what, str(picture))
    asked = {"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": "  " if what == "empty turn" else "That"}
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [asked, *([] if what == "no answer" else [answer])]}))
    spec = make("bad", 1, tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match=says) as raised:
        prepare(spec.data, spec.model.vocab, tmp_path / "prepared", vision=spec.model.vision)
    assert "bad.jsonl:1" in str(raised.value)
    assert not [path for path in (tmp_path / "prepared").iterdir() if path.suffix != ".lock"]


def test_a_picture_that_is_gone_after_it_was_prepared_is_said(tmp_path: Path) -> None:
    write_pictures(tmp_path / "two", 2, kinds=("text",))
    spec = make("gone", 1, tmp_path / "two" / "pictures.jsonl")
    data = prepared(spec)
    next((tmp_path / "two").rglob("*.png")).unlink()
    with pytest.raises(OperationError, match=r"has changed since it was prepared: .*there is no such file"):
        take(data, "train", 0, data.sequence_count("train", 480), 480, 0)


def test_what_does_not_go_with_eyes_is_refused_in_a_sentence() -> None:
    spec = make("other", 1, spec={"model": MODEL | {"vision": VISION | {"image_token": 9}}})
    with pytest.raises(InputError, match=r"image_token = 9 is not accepted: the tokenizer's token <image> is 3"):
        prepared(spec)
    two = {"cluster": {"gpus": 2, "gpus_per_node": 2}}
    for parallel in ({"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"zero_stage": 3}):
        name, degree = next(iter(parallel.items()))
        with pytest.raises(InputError, match=rf"parallel\.{name} = {degree} is not accepted with \[model\.vision\]"):
            refuse_unsupported(make("two", 1, spec=two | {"parallel": parallel}), 2)
    with pytest.raises(InputError, match=r"needs a network that sees"):
        make("blind", 1, spec={"model": {name: value for name, value in MODEL.items() if name != "vision"}})
