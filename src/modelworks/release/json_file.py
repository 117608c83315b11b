"""JSON files that others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modelworks.spec.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's table; an `InputError` if it can't be read or isn't one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise InputError(f"{path}: is damaged: it isn't JSON") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a table of fields is accepted, and this is a {type(values).__name__}")
    return values
