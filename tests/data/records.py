"""Files of records in ChatML, prepared, and their tokens as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from modelworks.data import prepare
from modelworks.spec import DataSpec

VOCAB = 300
Data = TypeVar("Data")


def prepared_as(
    kind: type[Data], source: str, tokenizer: Path, records: tuple[Any, ...], fields: dict[str, Any]
) -> Data:
    """A data set of a source's records, in a file beside the tokenizer; none are held out unless `fields` say so."""
    file = tokenizer.parent / f"{source}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    values = {"source": source, "files": [str(file)], "tokenizer": str(tokenizer), "validation_fraction": 0.0}
    data = prepare(DataSpec.model_validate(values | fields), VOCAB, tokenizer.parent / "prepared")
    assert isinstance(data, kind)
    return data


def text(tokenizer: Path, ids: np.ndarray) -> str:
    """What tokens say, special ones included."""
    return str(Tokenizer.from_file(str(tokenizer)).decode(ids.tolist(), skip_special_tokens=False))
