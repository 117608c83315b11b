"""Long-context evaluations: prompts as they are described, answers judged as greedy decoding gives them, resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.data.tokenizer import train_tokenizer
from modelworks.evaluate import suite
from modelworks.evaluate.haystack import Haystack, held_out
from modelworks.evaluate.models import Model, changed, load_model
from modelworks.evaluate.picture import drawing
from modelworks.evaluate.suite import answered, evaluate
from modelworks.evaluate.tasks import KEYS, QUESTION, RULER, needle
from modelworks.model.decoder import Decoder
from modelworks.release.huggingface import save_pretrained
from modelworks.spec.errors import InputError
from modelworks.spec.model import ModelSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of 600 tokens of context, released with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    decoder = Decoder(ModelSpec(layers=1, hidden=32, ffn_hidden=32, heads=2, vocab=512, context=600))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(6.0)
    save_pretrained(decoder, folder)
    texts = ["\n".join(lines[:50]) for lines in held_out(True)[:20]]
    train_tokenizer(texts, 512).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder))


def decoded(model: Model, folder: Path, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [128, 550])
def test_a_needle_lies_at_its_depth_and_is_asked_for_at_the_end(
    model: Model, folder: Path, length: int, depth: float
) -> None:
    sample = needle(Haystack(model.encode), length, depth, "1")
    assert length - 64 < len(sample.ids) <= length
    [(start, end)] = sample.answers
    assert end == len(sample.ids)
    value = decoded(model, folder, sample.ids[start:end]).strip()
    text = decoded(model, folder, sample.ids[:start])
    key = next(key for key in KEYS if text.endswith(QUESTION.format(key=key)))
    lines = text.splitlines()
    at = lines.index(f"Note {key} {value}.")
    before = len(model.encode("\n".join(lines[:at])))
    assert before == pytest.approx(depth * (len(sample.ids) - 16), abs=48)
    assert sample == needle(Haystack(model.encode), length, depth, "1")
    assert sample != needle(Haystack(model.encode), length, depth, "2")


@pytest.mark.parametrize("name", RULER)
def test_rulers_tasks_fit_their_length_and_hold_their_answers(model: Model, folder: Path, name: str) -> None:
    sample = RULER[name](Haystack(model.encode), 590, "1")
    assert 590 * 0.5 < len(sample.ids) <= 590
    prompt = decoded(model, folder, sample.ids[: sample.answers[0][0]])
    answers = [decoded(model, folder, sample.ids[start:end]).strip() for start, end in sample.answers]
    assert len(set(answers)) >= len(answers) - 1
    assert all(answer in prompt for answer in answers)
    if name == "common-words":
        assert min(prompt.count(f" {answer}") for answer in answers) >= 20
    if name == "frequent-words":
        counts = [prompt.split().count(answer) for answer in answers]
        assert counts == sorted(counts, reverse=True)
        others = {word: prompt.split().count(word) for word in prompt.split() if word not in answers}
        assert counts[-1] >= max(count for word, count in others.items() if len(word) == 6)


def test_an_answer_is_found_where_greedy_decoding_gives_it(model: Model) -> None:
    haystack = Haystack(model.encode)
    for seed in range(4):
        sample = needle(haystack, 100, 0.5, str(seed))
        [(start, end)] = sample.answers
        prompt = torch.tensor([sample.ids[:start]])
        continued = model.decoder.generate(prompt, end - start)[0, start:].tolist()
        assert answered(model, sample) == [continued == sample.ids[start:end]]
        right = type(sample)([*sample.ids[:start], *continued], sample.answers, sample.length)
        assert answered(model, right) == [True]


def test_losses_by_position_are_those_of_the_network(model: Model) -> None:
    report = evaluate(model, "position-perplexity", [256])
    ids: list[int] = []
    for lines in held_out(True):
        ids += model.encode("\n".join(lines) + "\n")
    tokens = torch.tensor([ids[:257]])
    logits = model.decoder(tokens[:, :-1])[0].detach()
    nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none").view(16, 16).mean(1)
    assert [part["nats"] for part in report["cells"][0]["positions"]] == pytest.approx(nats.tolist(), rel=1e-5)


def test_a_stopped_evaluation_goes_on_where_it_was(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "report.json", []
    score = suite._score

    def counted(*arguments: Any) -> float:
        asked.append(arguments[2])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return score(*arguments)

    whole = evaluate(model, "needle", [128, 256], depths=3)
    monkeypatch.setattr(suite, "_score", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, "needle", [128, 256], depths=3, out=out)
    assert not out.exists()
    with (tmp_path / "report.json.part").open("a") as part:
        part.write('["needle 256 0.0", {"sco')  # as a killed process leaves it
    assert evaluate(model, "needle", [128, 256], depths=3, out=out) == whole
    assert len(asked) == 4 + 3
    assert json.loads(out.read_text()) == whole
    assert not (tmp_path / "report.json.part").exists()
    evaluate(model, "needle", [128], depths=1, seed=1, out=out)
    assert len(asked) == 8  # another seed begins anew


def test_the_command_draws_and_reports(folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "needle.svg"
    called = ["eval", str(folder), "--task", "needle", "--lengths", "128,256", "--depths", "2", "--json"]
    result = CliRunner().invoke(app, [*called, "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(cell["length"], cell["depth"]) for cell in report["cells"]] == [(128, 0), (128, 1), (256, 0), (256, 1)]
    assert plot.read_text().count("<rect") == 4
    shown = CliRunner().invoke(app, called[:-1])
    assert "depth" in shown.output
    assert "256" in shown.output


def test_names_in_a_picture_are_text(model: Model) -> None:
    report = evaluate(model, "needle", [128], depths=1) | {"model": "<script>"}
    assert "<script>" not in drawing([report])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "needles"], "--task needles is not accepted: there is no such task; near it are needle"),
        (["--task", "needle", "--lengths", "700"], "takes 600 tokens; more are tried with --set model.context=700"),
        (["--task", "needle", "--lengths", "64,a"], "--lengths a is not accepted: positive whole numbers"),
        (["--task", "needle", "--lengths", "32"], "--lengths 32 is not accepted: 64 tokens or more are"),
        (["--task", "ruler", "--lengths", "64"], "a length of 64 tokens is not accepted: what is hidden and asked"),
        (["--task", "needle", "--depths", "0"], "--depths 0 is not accepted"),
        (["--task", "needle", "--samples", "0"], "--samples 0 is not accepted"),
        (["--task", "needle", "--plot", "x.gif"], "--plot x.gif is not accepted: a file that ends in .svg or .html"),
        (["--task", "needle", "--set", "model.layers=2"], "--set model.layers=2 is not accepted: of a trained network"),
        (["--task", "needle", "--set", "model.rope_base=-1"], "model.rope_base = -1 is not accepted"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["eval", str(folder), *arguments])
    assert isinstance(result.exception, InputError)
    assert sentence in str(result.exception).replace("rope_base", "model.rope_base", sentence.count("model.rope_base"))


def test_a_model_that_is_not_there_is_refused(home: Path) -> None:
    with pytest.raises(InputError, match="there is no model 'nobody'"):
        load_model("nobody")


def test_a_network_is_tried_with_another_context_and_scaling(model: Model) -> None:
    spec = changed(
        model.decoder.spec,
        ["model.context=1200", "model.rope_scaling.rope_type=linear", "model.rope_scaling.factor=2"],
    )
    assert spec.context == 1200
    assert spec.rope_scaling is not None
    assert spec.rope_scaling.factor == 2
