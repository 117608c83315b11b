"""Where Modelworks keeps things on this machine, and how a file is written so that it is whole or absent.

::

    home()/
      models/NAME/          models that can be served: NAME.gguf and model.json
      runs/NAME/            run.toml, plan.json, data.json, status.json, metrics.jsonl, tokenizer.json, checkpoints/,
                            release/; on an engine also engine.json and nodes/
      data/HASH/            packed tokens, shared by runs with the same data section
      hardware.toml         what `modelworks bench` measured
      modelworks.db         conversations, users, usage
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from platformdirs import user_data_path

ENGINE_FILE = "engine.json"
"""In the folder of a run that was given to an engine: to which, and as what."""


def home() -> Path:
    """The folder of everything: ``$MODELWORKS_HOME``, or the user's data folder."""
    given = os.environ.get("MODELWORKS_HOME")
    return Path(given).expanduser().absolute() if given else user_data_path("modelworks")


def models_folder() -> Path:
    """Where models that can be served are kept."""
    return home() / "models"


def runs_folder() -> Path:
    """Where runs are kept."""
    return home() / "runs"


def data_folder() -> Path:
    """Where packed tokens are kept."""
    return home() / "data"


def hardware_file() -> Path:
    """What `modelworks bench` measured of this machine."""
    return home() / "hardware.toml"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part.

    Raises
    ------
    OSError
        If the folder can't be written; the old file then stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
