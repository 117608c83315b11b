"""The assistant's character: what it is tuned on, and how often a tuned model is preferred to its base.

python benchmarks/character.py data FOLDER             writes train.jsonl and held-out.jsonl
python benchmarks/character.py prefer TUNED BASE       compares two reports of `modelworks eval --task character`
python benchmarks/character.py ship RUN                puts a run's adapter into the package, in place of the one there
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tomli_w

from modelworks.data.character import training, write_dialogues
from modelworks.evaluate.character import preference, prompts
from modelworks.evaluate.tone import learnt_tone
from modelworks.serve.download import ADAPTERS, sources
from modelworks.serve.store import Store, check_adapter, sha256
from modelworks.spec.errors import InputError
from modelworks.spec.files import load_run
from modelworks.spec.gguf_header import read_gguf_header
from modelworks.spec.run import RunSpec
from modelworks.train.record import RunRecord

NAME, BASE = "smollm2-135m-character", "smollm2-135m"
TITLE = f"Character ({BASE})"
EXAMPLE = Path(__file__).parent.parent / "examples" / "character.toml"


def prefer(tuned: Path, base: Path) -> dict[str, Any]:
    """The share of prompts on which the first report's score is higher, over all prompts and by their mode and kind."""
    ours, theirs = (
        json.loads(file.read_text(encoding="utf-8"))["samples"]["character"]["score"] for file in (tuned, base)
    )
    _, accuracy, kept = learnt_tone()
    groups: dict[str, list[str]] = {"all": list(ours)}
    for prompt in prompts():
        if prompt.id in ours:
            groups.setdefault(prompt.mode, []).append(prompt.id)
            groups.setdefault(prompt.kind, []).append(prompt.id)
    found = {
        group: dataclasses.asdict(
            preference({name: ours[name] for name in names}, {name: theirs[name] for name in names if name in theirs})
        )
        for group, names in groups.items()
    }
    return {"prompts": len(ours), "tone": {"accuracy": accuracy, "held_out": kept}, "preference": found}


def ship(run: str) -> dict[str, Any]:
    """Write a finished run's adapter into the package, its matrices in half precision, and its facts beside it.

    Raises
    ------
    InputError
        If there is no such run or model, the run has released no adapter, or that doesn't fit the model.
    """
    record, store = RunRecord(run), Store()
    spec, status = record.spec(), record.status()
    released = record.folder / "release" / f"{spec.name}-adapter.gguf"
    base = store.get(BASE)
    if base.sha256 != sources()[BASE].sha256:
        raise InputError(f"the stored {BASE} is another than the one that `modelworks models pull {BASE}` fetches")
    check_adapter(read_gguf_header(released, arrays=False), read_gguf_header(store.path(BASE), arrays=False))
    file = ADAPTERS / f"{NAME}.gguf"
    file.parent.mkdir(exist_ok=True)
    write_half(released, file)
    seconds = (status.updated or 0) - (status.started or 0)
    facts = {
        "title": TITLE,
        "license": spec.release.license,
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "adapts": BASE,
        "adapts_sha256": base.sha256,
        "made": f"{command(spec)}: {status.step} of {status.steps} steps, {status.tokens:,} tokens of the "
        f"{len(training())} dialogues of modelworks/data/character that aren't held out, in {seconds / 60:.0f} minutes",
    }
    header = "# Written by `python benchmarks/character.py ship RUN`; see docs/explanation/character.md.\n"
    (ADAPTERS / f"{NAME}.toml").write_text(header + tomli_w.dumps(facts), encoding="utf-8")
    return facts


def write_half(released: Path, file: Path) -> None:
    """Write a LoRA adapter of the GGUF format anew, in fp16 and under the name that it is shipped by."""
    header, reader = read_gguf_header(released, arrays=False), gguf.GGUFReader(released)
    writer = gguf.GGUFWriter(file, header.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(NAME)
    writer.add_license(str(header.metadata["general.license"]))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, header.metadata[gguf.Keys.Adapter.LORA_ALPHA])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def command(spec: RunSpec) -> str:
    """The command that trains a run as the example, with what differs from it."""
    words = [f"modelworks train examples/{EXAMPLE.name}"]
    for section in ("adapter", "train"):
        ours, example = (getattr(one, section).model_dump(mode="json") for one in (spec, load_run(EXAMPLE)))
        words += [
            f"--set {section}.{key}={value}"
            for key, value in ours.items()
            if key != "init_from" and value != example[key]
        ]
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("data").add_argument("folder", type=Path)
    comparing = commands.add_parser("prefer")
    comparing.add_argument("tuned", type=Path)
    comparing.add_argument("base", type=Path)
    commands.add_parser("ship").add_argument("run")
    given = parser.parse_args()
    report: dict[str, Any]
    if given.command == "data":
        report = write_dialogues(given.folder)
    elif given.command == "prefer":
        report = prefer(given.tuned, given.base)
    else:
        report = ship(given.run)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
