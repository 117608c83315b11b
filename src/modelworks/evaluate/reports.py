"""Evaluations as they are kept: one JSON file each, and the answers of one that is not finished.

A report stands in ``evals/`` beside the model: in the run's folder or the release's, or in the home's for a served
model. It holds each sample's outcome, so that two reports can be compared sample by sample.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from modelworks.evaluate.models import found_model
from modelworks.release.evaluations import FOLDER
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import home, write_atomically

KIND = "modelworks.evaluation"


def is_address(model: str) -> bool:
    """Whether a model is named by the address of its server."""
    return model.startswith(("http://", "https://"))


def folder_of(model: str) -> Path:
    """Where a model's reports are kept."""
    if is_address(model):
        return home() / FOLDER
    path = found_model(model)
    return (path.parent if path.is_file() else path) / FOLDER


def software() -> dict[str, str]:
    """The versions of what computes a score."""
    found = {}
    for name in ("modelworks", "torch", "lm_eval", "transformers", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def place_of(report: dict[str, Any]) -> Path:
    """The file that a report is kept in, if no other is asked for."""
    tasks = re.sub(r"[^A-Za-z0-9._,-]+", "_", ",".join(report["settings"]["tasks"]))[:80]
    return folder_of(report["model"]) / f"{tasks}-{report['date'].replace(':', '')}.json"


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report whole.

    Raises
    ------
    OperationError
        If it can't be written.
    """
    try:
        write_atomically(path, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise OperationError(f"{path} cannot be written: {error.strerror or error}") from None


def read_report(path: Path) -> dict[str, Any]:
    """Read a report that was kept.

    Raises
    ------
    InputError
        If it is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as an evaluation's report: {error}") from None
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise InputError(f"{path}: is no evaluation's report with samples, as `modelworks eval --task` keeps it")
    return report


class Answers:
    """What a model answered in an evaluation that is not finished, by request.

    It stands in a file of one JSON line each. What is interrupted goes on from there; the finished report replaces it.
    """

    def __init__(self, model: str, head: dict[str, Any]) -> None:
        text = json.dumps(head, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._path = folder_of(model) / f".{name}.part"
        self._known: dict[str, Any] = {}
        if self._path.is_file():
            written = self._path.read_text(encoding="utf-8")
            whole = written[: written.rfind("\n") + 1]  # what was killed while it wrote left half a line
            self._known = dict(json.loads(line) for line in whole.splitlines())
            if whole != written:
                self._write(whole, "w")

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def __len__(self) -> int:
        return len(self._known)

    def items(self) -> list[tuple[str, Any]]:
        """All that is known."""
        return list(self._known.items())

    def keep(self, answered: dict[str, Any]) -> None:
        """Note answers."""
        self._write("".join(f"{json.dumps([key, answer])}\n" for key, answer in answered.items()), "a")
        self._known |= answered

    def finish(self) -> None:
        """Forget all: the report has it."""
        self._path.unlink(missing_ok=True)

    def _write(self, text: str, mode: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OperationError(f"{self._path} cannot be written: {error.strerror or error}") from None
