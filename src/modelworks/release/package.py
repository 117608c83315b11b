"""A run in, a release out: weights for others' tools, proof that they agree, and a card that says what they are.

Everything is built in a hidden folder beside its place and renamed when it is whole and verified: a release that
failed leaves what was there before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelworks.release.adapters import refuse_adapter_formats, write_gguf_adapter, write_peft
from modelworks.release.agreement import Agreement, fixed_prompts, measure_agreement
from modelworks.release.card import model_card, write_verification
from modelworks.release.evaluations import evaluations_of, keep_evaluations
from modelworks.release.gguf_export import Described, reading, write_gguf
from modelworks.release.gguf_eyes import eyes_file, refuse_eyes, write_eyes
from modelworks.release.huggingface import FORMATS, Progress, formats, write_model
from modelworks.release.quantization import Precision, precision
from modelworks.release.runs import RunContent, load_run_content
from modelworks.release.staging import staged_folder
from modelworks.release.vocabulary import Vocabulary, read_vocabulary, seeing, write_tokenizer_config
from modelworks.spec.errors import InputError

PEFT_FOLDER = "peft"


@dataclass(frozen=True)
class ReleaseResult:
    """What a release left."""

    folder: Path
    files: dict[str, Path]
    """By name within the folder."""
    gguf: Path | None
    """The first GGUF file of whole weights, for serving."""
    adapter: Path | None
    """The GGUF adapter."""
    eyes: Path | None = None
    """Of a network that sees, the file of its tower and connector beside `gguf`."""
    verification: dict[str, Agreement] = field(default_factory=dict)
    """By GGUF file."""


def release_run(
    run: Path,
    to: Iterable[str] = FORMATS,
    quantize: Iterable[str] | None = None,
    progress: Progress | None = None,
    *,
    dtype: str = "float32",
    vllm: bool = False,
) -> ReleaseResult:
    """Write `run`/release from the newest good checkpoint, in place of an earlier release, whose evaluations stay.

    Parameters
    ----------
    run
        The run's folder.
    to
        `safetensors` and `gguf`, whole weights with an adapter merged into them; of a run with an adapter also `peft`
        and `gguf-adapter`, the adapter alone.
    quantize
        Precisions of the GGUF files, one file each; those of the run's spec if unset.
    dtype, vllm
        Of the safetensors: the weights' precision, and vLLM's older names for Grok-1.

    Raises
    ------
    InputError
        If a format or precision isn't known, the run lacks something, or its tokenizer doesn't fit its network.
    OperationError
        If there is no good checkpoint, a file can't be written, or llama.cpp doesn't agree with PyTorch.
    """
    kinds = formats(to, (*FORMATS, "peft", "gguf-adapter"))
    content = load_run_content(run)
    refuse_adapter_formats(kinds, content.spec.adapter)
    precisions = list(dict.fromkeys(precision(name) for name in quantize or content.spec.release.quantize))
    if "gguf" in kinds and not precisions:
        raise InputError("quantize is empty: at least one precision of the GGUF is needed")
    vocabulary = read_vocabulary(content.tokenizer, content.spec.model.vocab)
    if content.chat_template is not None:
        vocabulary = replace(vocabulary, chat_template=content.chat_template)
    sees = content.spec.model.vision is not None
    if sees:
        vocabulary = seeing(vocabulary)
        if "gguf" in kinds:
            refuse_eyes(content.spec.model, vocabulary)
    target = run / "release"
    with staged_folder(target, replace=True) as folder:
        agreements: dict[str, Agreement] = {}
        if "safetensors" in kinds:
            write_model(folder, content.decoder, dtype=dtype, vllm=vllm, progress=progress)
        if "gguf" in kinds:
            agreements = _write_ggufs(folder, content, vocabulary, precisions, progress)
            write_verification(folder / "verification.json", agreements)
        if "peft" in kinds:
            # Apart from whole weights, which Hugging Face's libraries would put it on once more.
            (folder / PEFT_FOLDER).mkdir()
            write_peft(folder / PEFT_FOLDER, content)
        adapter = folder / f"{content.spec.name}-adapter.gguf"
        if "gguf-adapter" in kinds:
            write_gguf_adapter(adapter, content)
        _write_tokenizer(folder, content, vocabulary)
        keep_evaluations(run, content.checkpoint.name, target, folder)
        card = model_card(content, agreements, evaluations_of(folder, content.checkpoint.name))
        (folder / "README.md").write_text(card, encoding="utf-8")
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    first = next(iter(agreements), None)
    return ReleaseResult(
        folder=target,
        files={name: target / name for name in names},
        gguf=None if first is None else target / first,
        adapter=target / adapter.name if "gguf-adapter" in kinds else None,
        verification=agreements,
        eyes=None if first is None or not sees else eyes_file(target / first),
    )


def _write_ggufs(
    folder: Path,
    content: RunContent,
    vocabulary: Vocabulary,
    precisions: list[Precision],
    progress: Progress | None,
) -> dict[str, Agreement]:
    spec = content.spec
    prompts = fixed_prompts(content.tokenizer, spec.model.context)
    agreements = {}
    for done, wanted in enumerate(precisions):
        path = folder / f"{spec.name}-{wanted}.gguf"
        described = Described(spec.name, spec.release.license.lower())
        write_gguf(path, content.decoder, vocabulary, wanted, described, progress)
        if spec.model.vision is not None:
            half, read = wanted != "f32", reading(content.decoder)
            write_eyes(eyes_file(path), spec.model, read, described, half=half, progress=progress)
        if progress is not None:
            progress(f"comparing llama.cpp with PyTorch ({wanted})", done, len(precisions))
        agreements[path.name] = measure_agreement(path, content.decoder, prompts, wanted)
    return agreements


def _write_tokenizer(folder: Path, content: RunContent, vocabulary: Vocabulary) -> None:
    shutil.copyfile(content.tokenizer, folder / "tokenizer.json")
    write_tokenizer_config(vocabulary, folder, content.spec.model.context)
    ends = [vocabulary.eos] if vocabulary.eot is None else [vocabulary.eot, vocabulary.eos]
    generation = {"bos_token_id": vocabulary.bos, "eos_token_id": ends, "do_sample": True, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
