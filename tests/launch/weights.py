"""What two runs must have in common to have ended alike."""

from __future__ import annotations

from safetensors import safe_open

from modelworks.model import checkpoint
from modelworks.spec.home import runs_folder


def tensors_of(run: str, step: int) -> dict[str, bytes]:
    """The bytes of every tensor of network and optimizer in a checkpoint, by file and name."""
    found: dict[str, bytes] = {}
    for path in sorted(checkpoint.folder_of(runs_folder() / run, step).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if not key.startswith("random."):
                    found[f"{path.name}:{key}"] = file.get_tensor(key).numpy().tobytes()
    return found
