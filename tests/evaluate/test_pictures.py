"""Questions about pictures put to a real server: our own and the benchmarks', in small files of the published form."""

from __future__ import annotations

import json
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.data.pictures import write_pictures
from modelworks.evaluate.questions import generated
from modelworks.evaluate.scores import wilson
from modelworks.spec.errors import InputError, OperationError

Answer = Callable[[list[bytes], str], str]


class Server:
    """An OpenAI-compatible API on this machine; `answer` is given the pictures' bytes and the text."""

    def __init__(self) -> None:
        self.answer: Answer = lambda images, text: ""
        self.asked: list[dict[str, Any]] = []
        self.refusals: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._say(200, {"data": [{"id": "first"}, {"id": "second"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.refusals:
                    self._say(outer.refusals.pop(), {"error": {"message": "not now"}})
                    return
                outer.asked.append(body)
                parts = body["messages"][0]["content"]
                images = [b64decode(p["image_url"]["url"].split(",")[1]) for p in parts if p["type"] == "image_url"]
                text = "\n".join(part["text"] for part in parts if part["type"] == "text")
                said = outer.answer(images, text)
                self._say(200, {"choices": [{"message": {"role": "assistant", "content": said}}]})

            def _say(self, status: int, content: dict[str, Any]) -> None:
                sent = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MODELWORKS_HOME", str(tmp_path / "home"))
    server = Server()
    yield server
    server.close()


def evaluated(server: Server, *arguments: object) -> dict[str, Any]:
    told = CliRunner().invoke(app, ["eval", server.url, "--served-as", "second", *map(str, arguments), "--json"])
    if told.exception is not None:
        raise told.exception
    return dict(json.loads(told.stdout))


def shares(report: dict[str, Any], task: str, metric: str) -> dict[str, float]:
    """The score of each kind."""
    return {kind: scores[metric]["value"] for kind, scores in report["tasks"][task]["by_kind"].items()}


def values(report: dict[str, Any], task: str) -> dict[str, float]:
    """The score by each metric."""
    return {metric: score["value"] for metric, score in report["scores"][task].items()}


def image(color: str, form: str = "PNG") -> dict[str, Any]:
    file = BytesIO()
    Image.new("RGB", (8, 8), color).save(file, form)
    return {"bytes": file.getvalue(), "path": None}


def seen(content: bytes) -> tuple[int, ...]:
    with Image.open(BytesIO(content)) as opened:
        return tuple(opened.convert("RGB").getpixel((4, 4)))  # type: ignore[arg-type]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_generated_pictures_arrive_as_they_were_drawn_and_are_scored_by_kind(server: Server) -> None:
    right = {(q.content[0], q.content[1]): (q.answers[0], q.kind) for q in generated(40, 7, ("bars", "text"))}

    def answer(images: list[bytes], text: str) -> str:
        said, kind = right[images[0], text]
        return said if kind == "bars" else "?"

    server.answer = answer
    arguments = ["--task", "pictures", "--kinds", "bars,text", "--limit", 40, "--seed", 7, "--hint", ""]
    report = evaluated(server, *arguments)
    kinds, score = report["tasks"]["pictures"]["by_kind"], report["scores"]["pictures"]["exact"]
    assert next(iter(report["scores"]["pictures"])) == "exact"
    assert kinds["bars"]["exact"]["value"] == 1
    assert kinds["text"]["exact"]["value"] == 0
    assert kinds["bars"]["exact"]["samples"] + kinds["text"]["exact"]["samples"] == 40
    assert score["value"] == kinds["bars"]["exact"]["samples"] / 40
    assert score["interval"] == list(wilson(score["value"], 40))
    assert kinds["bars: value"]["exact"]["value"] == 1
    assert {body["model"] for body in server.asked} == {"second"}
    told = CliRunner().invoke(app, ["eval", server.url, "--served-as", "second", *map(str, arguments)])
    assert "bars: value" in told.stdout


def test_two_models_are_compared_by_the_questions_that_both_answered(server: Server, tmp_path: Path) -> None:
    right = {(q.content[0], q.content[1]): q.answers[0] for q in generated(24, 3)}
    server.answer = lambda images, text: right[images[0], text]
    one, other, elsewhere = (tmp_path / f"{name}.json" for name in ("one", "other", "elsewhere"))
    asked = ("--task", "pictures", "--hint", "", "--limit")
    evaluated(server, *asked, 24, "--seed", 3, "--out", one)
    server.answer = lambda images, text: "?"
    evaluated(server, *asked, 16, "--seed", 3, "--out", other)
    evaluated(server, *asked, 16, "--seed", 4, "--out", elsewhere)
    told = CliRunner().invoke(app, ["eval", str(one), "--against", str(other), "--json"])
    row = next(row for row in json.loads(told.stdout)["rows"] if row["metric"] == "exact")
    assert (row["samples"], row["score"], row["against"], row["verdict"]) == (16, 1, 0, "better")
    told = CliRunner().invoke(app, ["eval", str(one), "--against", str(elsewhere)])
    assert "no sample in common" in str(told.exception)


def test_a_written_folder_is_asked_a_question_at_a_time_each_with_its_picture(server: Server, tmp_path: Path) -> None:
    written = write_pictures(tmp_path / "set", 4, split="held-out", kinds=("pie",))
    report = evaluated(server, "--task", "pictures", "--data", tmp_path / "set")
    assert report["tasks"]["pictures"]["samples"] == written["questions"] == len(server.asked)
    assert all(
        [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"] for body in server.asked
    )


def test_a_stopped_call_goes_on_and_asks_nothing_twice(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    server.answer = lambda images, text: "10" if len(server.asked) < 9 else server.refusals.append(400) or "10"
    arguments = ["--task", "pictures", "--kinds", "bars", "--limit", 16, "--out", out]
    with pytest.raises(OperationError, match="400 not now"):
        evaluated(server, *arguments)
    first = len(server.asked)
    assert list((tmp_path / "home" / "evals").glob(".*.part"))
    assert not out.exists()
    server.answer = lambda images, text: "10"
    server.refusals.clear()
    report = evaluated(server, *arguments)
    assert 16 <= len(server.asked) <= 16 + 4  # those on their way when it stopped are asked again
    assert 0 < first < 16
    assert report["tasks"]["pictures"]["samples"] == 16
    assert json.loads(out.read_text()) == report
    assert not list((tmp_path / "home" / "evals").iterdir())


def test_a_server_that_is_busy_is_asked_again(server: Server) -> None:
    server.refusals = [503]
    assert evaluated(server, "--task", "pictures", "--limit", 1)["tasks"]["pictures"]["samples"] == 1


def test_chartqa_in_both_published_forms(server: Server, tmp_path: Path) -> None:
    server.answer = lambda images, text: {(255, 0, 0): "41", (0, 0, 255): "39"}[seen(images[0])]
    one = parquet(
        tmp_path / "one" / "data" / "test-00000-of-00001.parquet",
        [
            {"type": "human_test", "question": "How many?", "answer": "40", "image": image("red")},
            {"type": "augmented_test", "question": "And here?", "answer": "60", "image": image("blue")},
        ],
    )
    parquet(tmp_path / "one" / "data" / "train-00000-of-00001.parquet", [{"other": 1}])
    report = evaluated(server, "--task", "chartqa", "--data", tmp_path / "one")
    assert next(iter(report["scores"]["chartqa"])) == "relaxed"
    assert values(report, "chartqa") == {"exact": 0, "relaxed": 0.5, "anls": pytest.approx(0.0)}
    assert shares(report, "chartqa", "relaxed") == {"human_test": 1, "augmented_test": 0}
    assert Path(report["settings"]["chartqa"]["files"][0][0]) == one
    other = parquet(
        tmp_path / "test-00000-of-00001.parquet",
        [{"image": image("blue"), "query": "How many?", "label": ["39"], "human_or_machine": 1}],
    )
    assert shares(evaluated(server, "--task", "chartqa", "--data", other), "chartqa", "relaxed") == {"machine": 1}


def test_docvqa_takes_the_nearest_answer_and_leaves_out_what_has_none(server: Server, tmp_path: Path) -> None:
    row = {
        "question": "Who?", "question_types": ["form", "layout"], "image": image("red"), "docId": 1,
        "ucsf_document_id": "x", "ucsf_document_page_no": "1", "data_split": "val",
    }  # fmt: skip
    rows = [row | {"questionId": "1", "answers": ["ITC Limitd", "x"]}, row | {"questionId": "2", "answers": None}]
    parquet(tmp_path / "DocVQA" / "validation-00000-of-00006.parquet", rows)
    server.answer = lambda images, text: "ITC Limited"
    report = evaluated(server, "--task", "docvqa", "--data", tmp_path)
    assert report["tasks"]["docvqa"]["samples"] == 1
    assert shares(report, "docvqa", "anls") == {"form": pytest.approx(1 - 1 / 11)}


def test_mmmu_puts_pictures_where_the_question_names_them(server: Server, tmp_path: Path) -> None:
    row = {
        "explanation": "", "img_type": "['Diagrams']", "topic_difficulty": "Easy", "subfield": "Sound",
        "image_1": image("red"), "image_2": image("blue", "JPEG"),
    }  # fmt: skip
    rows = [
        row | {
            "id": "validation_Music_1", "question_type": "multiple-choice", "answer": "B",
            "question": "Unlike <image 1>, what is like <image 2>?", "options": "['Sea, and sky', '<image 2>']",
        },
        row | {"id": "validation_Music_2", "question_type": "open", "answer": "['9.5', '19/2']", "options": "[]",
               "question": "How long is <image 1>?"},
        row | {"id": "test_Music_3", "question_type": "open", "answer": "?", "options": "[]", "question": "?"},
    ]  # fmt: skip
    parquet(tmp_path / "Music" / "validation-00000-of-00001.parquet", rows)
    server.answer = lambda images, text: "The answer is (B)" if len(images) == 3 else "About 9.50 m"
    report = evaluated(server, "--task", "mmmu", "--data", tmp_path)
    assert values(report, "mmmu") == {"accuracy": 1}
    assert list(report["tasks"]["mmmu"]["by_kind"]) == ["Music", "Music: Sound"]
    parts = next(body for body in server.asked if "Unlike" in str(body))["messages"][0]["content"]
    assert [part.get("text", "picture") for part in parts] == [
        "Unlike", "picture", ", what is like", "picture", "?\n(A) Sea, and sky\n(B)", "picture",
        "Answer with the letter of the right option, or with one word or number.",
    ]  # fmt: skip
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert [url[:16] for url in urls] == ["data:image/png;b", "data:image/jpeg;", "data:image/jpeg;"]


def test_realworldqa_reads_the_choices_in_the_question(server: Server, tmp_path: Path) -> None:
    choices = "Which way?\nA. Left\nB. Right\nC. Straight on\nPlease answer with the letter of the option."
    rows = [
        {"question": choices, "answer": "B", "image": image("red", "WEBP")},
        {"question": "How many lamps?", "answer": "2", "image": image("blue", "WEBP")},
    ]
    file = parquet(tmp_path / "test-00000-of-00002.parquet", rows)
    server.answer = lambda images, text: "right" if "lamps" not in text else "I see 2 lamps"
    report = evaluated(server, "--task", "realworldqa", "--data", file)
    assert shares(report, "realworldqa", "accuracy") == {"choice": 1, "words": 1}


@pytest.mark.parametrize("task", ["chartqa", "docvqa", "mmmu", "realworldqa"])
def test_data_that_is_not_there_is_said_in_a_sentence(server: Server, tmp_path: Path, task: str) -> None:
    with pytest.raises(InputError, match=f"--task {task} takes --data PATH"):
        evaluated(server, "--task", task)
    with pytest.raises(InputError, match=f"holds no {task}"):
        evaluated(server, "--task", task, "--data", tmp_path)
    other = parquet(tmp_path / "test-0.parquet", [{"text": "x"}])
    with pytest.raises(InputError, match=f"is no {task}: a file with the columns"):
        evaluated(server, "--task", task, "--data", other)
    other.write_text("no parquet")
    with pytest.raises(InputError, match="is no parquet file"):
        evaluated(server, "--task", task, "--data", other)
    assert not server.asked


def test_a_model_that_is_not_there_is_said_in_a_sentence(server: Server) -> None:
    for arguments, said in (
        (["my-run", "--task", "pictures"], "there is no model 'my-run'"),
        ([server.url, "--task", "pictures", "--served-as", "third"], "has no model 'third'"),
        ([server.url, "--task", "pictures"], "--served-as is needed"),
        ([server.url, "--task", "character", "--kinds", "bars"], "--kinds bars is not accepted"),
    ):
        told = CliRunner().invoke(app, ["eval", *arguments])
        assert isinstance(told.exception, InputError)
        assert said in str(told.exception)
    assert not server.asked
