"""A run's data, made ready in its folder: by the process that holds the run, before there are those that train it."""

from __future__ import annotations

import json
import shutil
import time

from modelworks.data.answers import DialogueDataset
from modelworks.data.packed import PackedDataset
from modelworks.data.preparation import prepare
from modelworks.data.tasks import TaskDataset
from modelworks.model.initial import FOLDER, TOKENIZER
from modelworks.spec.home import data_folder, write_atomically
from modelworks.train.session import RunSession
from modelworks.train.view import View

_SAY_EVERY_S = 0.5


def prepare_data(session: RunSession, view: View, keep: bool = True) -> PackedDataset:
    """Pack the run's text, or find it packed, and `keep` in the run's folder what it was made of."""
    said_at = float("-inf")

    def say(documents: int, done: int, total: int | None) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= _SAY_EVERY_S:
            said_at = time.monotonic()
            share = f": {documents:,} documents" + (f", {done / total:.0%}" if total else "") if documents else ""
            session.report(message=f"preparing the data{share}")
            view.show(session.status)

    say(0, 0, None)
    section = session.spec.data
    if session.spec.train.init_from is not None and section.tokenizer == "bpe":
        section = section.model_copy(update={"tokenizer": str(session.folder / FOLDER / TOKENIZER)})
    data = prepare(section, session.spec.model.vocab, data_folder(), say, session.spec.model.vision)
    if keep:
        shutil.copyfile(data.tokenizer_file, session.folder / "tokenizer.json")
        manifest = data.manifest
        template = data.folder / "chat_template.jinja"
        if template.is_file():
            shutil.copyfile(template, session.folder / template.name)
        if isinstance(data, DialogueDataset):
            manifest = manifest | {"longer_than_a_sequence": data.cut("train", session.spec.train.seq_len)}
        elif isinstance(data, TaskDataset):
            fitting = data.fitting("train", session.spec.train.seq_len - session.spec.grpo.max_new_tokens)
            manifest = manifest | {"longer_than_a_sequence": len(data.documents("train")) - 1 - len(fitting)}
        write_atomically(session.folder / "data.json", json.dumps(manifest, indent=1) + "\n")
    return data
