"""Evaluations by samples: equal to the library's own, kept, resumed, compared; what brings code is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.data.tokenizer import train_tokenizer
from modelworks.evaluate import registry, sampled
from modelworks.evaluate.comparison import aggregate, compare, mcnemar
from modelworks.evaluate.harness import ask_tasks, find_tasks
from modelworks.evaluate.haystack import held_out
from modelworks.evaluate.models import load_model
from modelworks.evaluate.registry import Asked, Outcome
from modelworks.evaluate.reports import Answers, read_report
from modelworks.evaluate.sampled import Sampling, evaluate_samples
from modelworks.evaluate.task_index import library_tasks
from modelworks.model.decoder import Decoder
from modelworks.release.huggingface import save_pretrained
from modelworks.release.vocabulary import read_vocabulary, write_tokenizer_config
from modelworks.spec.errors import InputError
from modelworks.spec.model import ModelSpec

pytest.importorskip("lm_eval")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choice.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/text.jsonl"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choice.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def network(folder: Path, seed: int, **more: Any) -> Path:
    """A random network of 64 tokens of context, released with a tokenizer."""
    torch.manual_seed(seed)
    shape = {"layers": 2, "hidden": 32, "ffn_hidden": 64, "heads": 4, "kv_heads": 2, "vocab": 512, "context": 64}
    decoder = Decoder(ModelSpec.model_validate(shape | more))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4.0)
    save_pretrained(decoder, folder)
    texts = ["\n".join(lines[:50]) for lines in held_out(True)[:20]]
    train_tokenizer(texts, 512).save(str(folder / "tokenizer.json"))
    write_tokenizer_config(read_vocabulary(folder / "tokenizer.json", 512), folder, 64)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(network(folder / "one", 1)), str(network(folder / "two", 2))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"def {word}(self, ", "choices": ["a", "value, other", "name)", "key: str"], "answer": number % 4}
        for number, word in enumerate(["read", "write", "close_all", "seek", "parse_the_header", "run", "get", "put"])
    ]
    texts = [{"text": "\n".join(lines[:20])} for lines in held_out(True)[20:24]] + [{"text": "import os"}]
    for name, content in (("choice", rows), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in content))
    for name, text in (("choice", CHOICE), ("text", TEXT), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, so that the library's tasks are looked for once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELWORKS_HOME", str(home))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_likelihoods_and_texts_are_those_of_the_librarys_own_model(models: tuple[str, str], tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from modelworks.evaluate.loaded import LoadedModel

    theirs = HFLM(pretrained=models[0], device="cpu", dtype="float32", batch_size=1, max_length=64)
    ours = LoadedModel(load_model(models[0]))
    long = "\n".join(held_out(True)[30][:30])
    asked = [("def f(self, ", "a"), ("def f(self, ", "value, other"), ("", "import os"), (long, " return"), ("x ", "y")]
    requests = [SimpleNamespace(args=args) for args in asked]
    for (value, greedy), (expected, expected_greedy) in zip(
        ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    texts = [SimpleNamespace(args=(text,)) for text in (long, "import os", "")]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )
    wanted = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = [SimpleNamespace(args=(prompt, wanted)) for prompt in ("def f(self, ", "import os")]
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


def test_a_mixture_of_experts_scores_a_text_the_same_in_any_batch(tmp_path: Path) -> None:
    from modelworks.evaluate.loaded import LoadedModel

    experts = {"experts": 4, "top_k": 2, "expert_hidden": 32, "renormalize": True}
    ours = LoadedModel(load_model(str(network(tmp_path / "mixture", 3, moe=experts))))
    asked = [("def f(self, ", "a"), ("", "import os"), ("\n".join(held_out(True)[30][:30]), " return"), ("x ", "y z")]
    requests = [SimpleNamespace(args=args) for args in asked]
    together = ours.loglikelihood(requests, disable_tqdm=True)
    for request, (value, greedy) in zip(requests, together, strict=True):
        [(expected, expected_greedy)] = ours.loglikelihood([request], disable_tqdm=True)
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_a_report_is_kept_with_its_model_and_goes_on_where_it_stopped(
    models: tuple[str, str], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(("tiny_answer", "tiny_choice", "tiny_text"), include=tasks)
    kept = Answers.keep
    calls = 0

    def interrupted(self: Answers, answered: dict[str, Any]) -> None:
        nonlocal calls
        kept(self, answered)
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_samples(models[0], sampling)
    folder = Path(models[0]) / "evals"
    assert not list(folder.glob("*.json"))
    [part] = folder.glob(".*.part")
    part.write_text(part.read_text() + '["half a li')
    asked: list[str] = []

    def noted(self: Answers, answered: dict[str, Any]) -> None:
        asked.extend(answered)
        kept(self, answered)

    monkeypatch.setattr(Answers, "keep", noted)
    known = {json.loads(line)[0] for line in part.read_text().splitlines()[:-1]}
    report, path = evaluate_samples(models[0], sampling)
    assert known
    assert not known & set(asked)
    assert path.parent == folder
    assert not list(folder.glob(".*"))
    assert read_report(path) == report
    assert report["tasks"]["tiny_choice"]["version"] == 2.0
    assert len(report["digest"]) == 64
    for task, metric in (
        ("tiny_choice", "acc,none"),
        ("tiny_text", "word_perplexity,none"),
        ("tiny_text", "bits_per_byte,none"),
    ):
        values = [
            value if isinstance(value, list) else [value, 1.0] for value in report["samples"][task][metric].values()
        ]
        assert report["scores"][task][metric]["value"] == pytest.approx(
            float(aggregate(metric.partition(",")[0], np.array(values)))
        )
        assert report["scores"][task][metric]["standard_error"] > 0


def test_two_models_stand_side_by_side(models: tuple[str, str], tasks: Path, tmp_path: Path) -> None:
    call = ["eval", models[0], "--against", models[1], "--task", "tiny_choice,tiny_text", "--include", str(tasks)]
    result = CliRunner().invoke(app, [*call, "--json", "--plot", str(tmp_path / "difference.svg")])
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout)
    for row in compared["rows"]:
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        assert row["difference"] == pytest.approx(row["score"] - row["against"])
    assert "tiny_choice acc" in (tmp_path / "difference.svg").read_text()
    files = [next(path for path in (Path(model) / "evals").glob("tiny_choice,tiny_text-*.json")) for model in models]
    again = CliRunner().invoke(app, ["eval", str(files[0]), "--against", str(files[1]), "--json"])
    assert json.loads(again.stdout)["rows"] == compared["rows"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('doc_to_text: !function "trap.run"', "runs code"),
        ("metric_list: [{metric: ./trap.py}]", "is a script"),
        ("dataset_path: ./trap.py", "may run code"),
        ("dataset_path: pandas", "may run code"),
        ("include: ../elsewhere.yaml", "leaves the folder"),
        ("unsafe_code: true", "asks to run code"),
        ("doc_to_text: !!python/name:os.system", "runs code"),
    ],
    ids=["function", "metric", "data", "pickle", "include", "unsafe", "python"],
)
def test_an_included_task_that_brings_code_is_refused(tmp_path: Path, change: str, words: str) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('ran')")
    (tmp_path / "task.yaml").write_text(f"task: trap\n{change}\n")
    with pytest.raises(InputError, match=words):
        find_tasks(["trap"], tmp_path)


def test_a_template_reaches_no_python(models: tuple[str, str], tasks: Path, tmp_path: Path) -> None:
    text = CHOICE.format(folder=tasks).replace('"{{question}}"', "\"{{ ''.__class__.__mro__ }}\"")
    (tmp_path / "task.yaml").write_text(text)
    from jinja2.exceptions import SecurityError

    manager = find_tasks(["tiny_choice"], tmp_path)
    with pytest.raises((SecurityError, InputError), match="unsafe"):
        ask_tasks(load_model(models[0]), manager, ["tiny_choice"], Answers(models[0], {"trap": 1}))


def test_a_task_that_does_not_exist_is_one_sentence_and_leaves_nothing(models: tuple[str, str]) -> None:
    before = sorted(Path(models[1]).rglob("*"))
    result = CliRunner().invoke(app, ["eval", models[1], "--task", "helaswag"])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith("--task helaswag is not accepted: there is no such task; near it are hella")
    assert sorted(Path(models[1]).rglob("*")) == before


def test_names_stand_for_what_the_library_finds_under_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("MODELWORKS_HOME", str(tmp_path))
    found = library_tasks()
    folder = Path(str(found["hellaswag"].path)).parent.parent
    parts = [folder / name for name in ("aclue", "eus_exams", "glue", "lingoly", "mmlu/default", "super_glue", "wmdp")]
    theirs = TaskManager(include_path=[str(part) for part in parts], include_defaults=False).task_index
    assert len(theirs) > 150
    for name, entry in theirs.items():
        assert (found[name].kind, found[name].path) == (entry.kind.name, entry.yaml_path and str(entry.yaml_path)), name
        assert entry.kind.name != "TAG" or entry.tags <= found[name].tasks
    assert library_tasks() == found  # as it was kept


def test_mcnemar_is_the_binomial_of_what_one_alone_gets_right() -> None:
    outcomes = np.array([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 2 + [[1.0, 1.0]] * 5)
    assert mcnemar(outcomes) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(outcomes[10:]) == 1.0


def made_report(model: str, outcomes: list[float], *, higher: bool = True) -> dict[str, Any]:
    samples = {f"{number}": value for number, value in enumerate(outcomes)}
    task = {"version": 1, "shots": 0, "higher_is_better": {"acc": higher}}
    return {"model": model, "tasks": {"t": task}, "samples": {"t": {"acc": samples}}}


def test_the_verdict_needs_samples_and_knows_which_way_is_better() -> None:
    chance = np.random.default_rng(0)
    good, bad = (chance.random(400) < 0.7).astype(float), (chance.random(400) < 0.4).astype(float)
    [row] = compare(made_report("a", list(good)), made_report("b", list(bad)))["rows"]
    assert row["verdict"] == "better"
    # The paired difference's normal interval; the bootstrap's agrees with it for many samples.
    half = 1.96 * float(np.std(good - bad)) / math.sqrt(400)
    assert row["interval"] == pytest.approx([row["difference"] - half, row["difference"] + half], abs=0.01)
    [row] = compare(made_report("a", list(good), higher=False), made_report("b", list(bad), higher=False))["rows"]
    assert row["verdict"] == "worse"
    [row] = compare(made_report("a", [1.0, 1.0, 0.0]), made_report("b", [0.0, 1.0, 0.0]))["rows"]
    assert row["verdict"] == "no difference shown with 3 samples"


def test_an_own_suite_goes_on_with_the_samples_that_are_left(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def outcomes(asked: Asked) -> Iterator[tuple[int, Outcome]]:
        for name in ("a", "b", "c"):
            if name not in asked.done:
                if name == "c" and len(given) == 2 and not asked.done:
                    raise KeyboardInterrupt
                given.append(name)
                yield 3, Outcome(name, {"right": float(name != "b")}, {"answer": name})

    monkeypatch.setitem(registry.SUITES, "letters", "letters")
    monkeypatch.setattr(
        sampled, "own_suite", lambda _: SimpleNamespace(VERSION="1", check=lambda _: {}, outcomes=outcomes)
    )
    with pytest.raises(KeyboardInterrupt):
        evaluate_samples(models[0], Sampling(("letters",)))
    report, _ = evaluate_samples(models[0], Sampling(("letters",)))
    assert given == ["a", "b", "c"]
    assert report["scores"]["letters"]["right"]["value"] == pytest.approx(2 / 3)
