"""The evaluations that go with a release: those of the weights in it, and those that stood in the release before."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = "evals"
"""Beside the model: in a run's folder, or a release's."""


def digest_of(weights: Iterable[Path]) -> str:
    """SHA-256 of files' own SHA-256, in the order given."""
    whole = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def keep_evaluations(run: Path, checkpoint: str, before: Path, folder: Path) -> None:
    """Copy into a release's folder what was evaluated of a run's checkpoint, and all that an earlier release holds."""
    if (before / FOLDER).is_dir():
        shutil.copytree(before / FOLDER, folder / FOLDER)
    for path, report in _reports(run):
        if report.get("version") == checkpoint:
            (folder / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / FOLDER / path.name)


def evaluations_of(folder: Path, checkpoint: str) -> list[dict[str, Any]]:
    """The reports in a release's folder that are of its own weights: of the checkpoint, or of one of its files."""
    reports = [report for _, report in _reports(folder)]
    if all(report.get("version") == checkpoint for report in reports):
        return reports
    weights = [sorted(folder.glob("*.safetensors")), *([path] for path in folder.glob("*.gguf"))]
    digests = {digest_of(files) for files in weights if files}
    return [report for report in reports if report.get("version") == checkpoint or report.get("digest") in digests]


def _reports(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of a folder's evaluations that are reports with scores by task."""
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(report, dict) and {"scores", "tasks", "date"} <= report.keys():
            yield path, report
