"""Questions about pictures: our own, and those of benchmarks, in the files in which they are published.

RealWorldQA, DocVQA, ChartQA and MMMU are read from the parquet files of the Hugging Face hub, with the pictures in
them. Their columns are those of xai-org/RealworldQA, lmms-lab/DocVQA, lmms-lab/ChartQA or HuggingFaceM4/ChartQA, and
MMMU/MMMU or lmms-lab/MMMU. Rows are read a few at a time, so a benchmark needs no more memory than a few pictures.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelworks.data.pictures import KINDS, picture
from modelworks.data.pictures.written import LINES
from modelworks.spec.errors import InputError, OperationError

_ROWS = 8
"""Of a parquet file that stand in memory together."""
_IMAGE = re.compile(r"<image (\d)>")
_OPTION = re.compile(r"^\(?([A-Z])[.)]\s*(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """A question about one picture or several.

    Attributes
    ----------
    id
        What it is called in a report.
    kind
        What it is counted under.
    about
        What it is also counted under, if anything.
    content
        Texts, and pictures as the bytes of their files, in their order.
    answers
        Each of which is right.
    options
        Of a choice; the answer then is a letter.
    """

    id: str
    kind: str
    content: tuple[str | bytes, ...]
    answers: tuple[str, ...]
    about: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is published, asked and judged.

    Attributes
    ----------
    metric
        The score that it is known by: ``exact``, ``relaxed``, ``anls`` or ``accuracy`` (of choices).
    hint
        What is said behind each question, so that the answer is short.
    splits
        Beginnings of the names of the files that have answers and are used, the first that there is.
    columns
        The columns of a file; several sets where it is published in several ways.
    read
        A row and its number to a question; None where the answer is kept back.
    """

    metric: str
    hint: str
    splits: tuple[str, ...] = ()
    columns: tuple[frozenset[str], ...] = ()
    read: Callable[[dict[str, Any], int], Question | None] | None = None


def _realworldqa(row: dict[str, Any], number: int) -> Question:
    answer = str(row["answer"]).strip()
    options = tuple(text for _, text in _OPTION.findall(row["question"]))
    chosen = options if re.fullmatch("[A-Z]", answer) else ()
    return Question(
        str(number), "choice" if chosen else "words", (_bytes(row["image"], number), row["question"]), (answer,),
        options=chosen,
    )  # fmt: skip


def _docvqa(row: dict[str, Any], number: int) -> Question | None:
    if not row["answers"]:
        return None
    kind = (row.get("question_types") or ["other"])[0]
    return Question(
        str(row["questionId"]), kind, (_bytes(row["image"], number), row["question"]), tuple(map(str, row["answers"]))
    )


def _chartqa(row: dict[str, Any], number: int) -> Question:
    if "query" in row:
        kind = {0: "human", 1: "machine"}.get(row["human_or_machine"], str(row["human_or_machine"]))
        return Question(str(number), kind, (_bytes(row["image"], number), row["query"]), tuple(map(str, row["label"])))
    return Question(str(number), row["type"], (_bytes(row["image"], number), row["question"]), (str(row["answer"]),))


def _mmmu(row: dict[str, Any], number: int) -> Question | None:
    if row["answer"] in (None, "", "?"):
        return None
    options = tuple(map(str, _listed(row["options"], number)))
    if row["question_type"] != "multiple-choice":
        options = ()
    lines = [row["question"], *(f"({chr(ord('A') + place)}) {option}" for place, option in enumerate(options))]
    content: list[str | bytes] = []
    for place, part in enumerate(_IMAGE.split("\n".join(lines))):
        if place % 2 == 0:
            content += [part.strip()] if part.strip() else []
        elif row.get(f"image_{part}") is not None:
            content.append(_bytes(row[f"image_{part}"], number))
    if not any(isinstance(part, bytes) for part in content):
        content.insert(0, _bytes(row["image_1"], number))
    answer = row["answer"]
    answers = [answer] if options or not str(answer).startswith("[") else _listed(answer, number)
    subject = re.sub(r"^[a-z]+_|_\d+$", "", str(row["id"]))
    return Question(str(row["id"]), subject, tuple(content), tuple(map(str, answers)), row.get("subfield"), options)


BENCHMARKS: dict[str, Benchmark] = {
    "pictures": Benchmark("exact", "Answer with the words or the number alone."),
    "chartqa": Benchmark(
        "relaxed", "Answer with one word, number or short phrase.", ("test", "val"),
        (
            frozenset({"question", "answer", "image", "type"}),
            frozenset({"query", "label", "image", "human_or_machine"}),
        ),
        _chartqa,
    ),
    "docvqa": Benchmark(
        "anls", "Answer with a word or a short phrase of the document.", ("validation", "val"),
        (frozenset({"questionId", "question", "image", "answers"}),), _docvqa,
    ),
    "mmmu": Benchmark(
        "accuracy", "Answer with the letter of the right option, or with one word or number.", ("validation", "dev"),
        (frozenset({"id", "question", "options", "answer", "question_type", "image_1"}),), _mmmu,
    ),
    "realworldqa": Benchmark("accuracy", "", ("test",), (frozenset({"question", "answer", "image"}),), _realworldqa),
}  # fmt: skip


def generated(count: int, seed: int, kinds: tuple[str, ...] = KINDS) -> Iterator[Question]:
    """The first questions of the held-out pictures, drawn as they are asked."""
    from io import BytesIO

    given, index = 0, 0
    while True:
        shown = picture(index, seed, "held-out", kinds)
        file = BytesIO()
        shown.image.save(file, "PNG")
        for place, question in enumerate(shown.questions):
            if given == count:
                return
            given += 1
            yield Question(
                f"{index}-{place}", shown.kind, (file.getvalue(), question.text), (question.answer,), question.about
            )
        index += 1


def written(folder: Path, kinds: tuple[str, ...] = KINDS) -> Iterator[Question]:
    """The questions of a folder that `modelworks data pictures` wrote, each with its picture and alone."""
    try:
        with (folder / LINES).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield from _spoken(folder, line, number, kinds)
    except OSError as error:
        raise OperationError(f"{folder} cannot be read: {error.strerror or error}") from None


def _spoken(folder: Path, line: str, number: int, kinds: tuple[str, ...]) -> Iterator[Question]:
    try:
        entry = json.loads(line)
        if entry["kind"] not in kinds:
            return
        asked, said = entry["messages"][::2], entry["messages"][1::2]
        name = next(part["image"] for part in asked[0]["content"] if part["type"] == "image")
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise InputError(f"{folder / LINES} line {number}: the image {name!r} is not in the folder")
        image = path.read_bytes()
        for place, (question, answer, about) in enumerate(zip(asked, said, entry["about"], strict=True)):
            text = next(part["text"] for part in question["content"] if part["type"] == "text")
            yield Question(f"{entry['id']}-{place}", entry["kind"], (image, text), (answer["content"],), about)
    except (KeyError, TypeError, StopIteration, json.JSONDecodeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / LINES} line {number}: is no conversation about a picture") from None


def files_of(task: str, path: Path) -> list[Path]:
    """The parquet files of a benchmark: one that is named, or those of a folder that have answers.

    Raises
    ------
    InputError
        If there is none, or one hasn't the benchmark's columns.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    benchmark = BENCHMARKS[task]
    for split in benchmark.splits:
        of_split = [file for file in found if file.name.startswith(split)]
        if path.is_dir() and of_split:
            found = of_split
            break
    if not found:
        raise InputError(f"--data {path} holds no {task}: its parquet files from the Hugging Face hub are accepted")
    for file in found:
        try:
            names = set(pyarrow.parquet.read_schema(file).names)
        except (OSError, pyarrow.ArrowException):
            raise InputError(f"--data {file} is no parquet file that can be read") from None
        if not any(columns <= names for columns in benchmark.columns):
            accepted = ", or ".join(", ".join(sorted(columns)) for columns in benchmark.columns)
            raise InputError(f"--data {file} is no {task}: a file with the columns {accepted} is accepted")
    return found


def published(task: str, files: list[Path]) -> Iterator[Question]:
    """The questions of a benchmark's files that have answers.

    Raises
    ------
    OperationError
        If a file breaks off.
    """
    import pyarrow
    import pyarrow.parquet

    read, number = BENCHMARKS[task].read, 0
    assert read is not None
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=_ROWS):
                    for row in batch.to_pylist():
                        asked = read(row, number)
                        number += 1
                        if asked is not None:
                            yield asked
        except (OSError, pyarrow.ArrowException) as error:
            raise OperationError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def _bytes(image: Any, number: int) -> bytes:
    """The file of a picture, in the hub's form (a struct of bytes and path) or plain."""
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not content:
        raise InputError(
            f"--data: row {number} has no bytes of a picture: files with the pictures in them are accepted"
        )
    return content


def _listed(text: str, number: int) -> list[Any]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, list):
        raise InputError(f"--data: row {number} has {text!r:.60} for a list")
    return value
