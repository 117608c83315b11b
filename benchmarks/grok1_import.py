"""Import of Grok-1's release at its real shapes: peak memory, speed, and every value compared.

The release has 318 GB and isn't here. This writes one layer of it (6,144 wide, eight experts of 32,768, the vocabulary
of 131,072) in the release's own format from random numbers, imports it as safetensors and as a GGUF file in processes
of their own whose peak memory is read from the kernel, and compares what they wrote with what was drawn. A run takes
22 GB of disk for a while, and some minutes.

    python benchmarks/grok1_import.py [--folder FOLDER] [--vocabulary 131072] [--json]
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from modelworks.release.grok1 import release_manifest

HIDDEN, WIDTH, EXPERTS, HEADS, KV_HEADS, HEAD = 6144, 32768, 8, 48, 8, 128
LAYER = "params/transformer/decoder_layer_0/"
EMBEDDING = "params/language_model/in_out_embed/embeddings"
ROW_BLOCKS = 8
"""In how many row blocks the release's scales come where a matrix was split over devices."""


class QuantizedWeight8bit:
    """What the release calls its matrices of eight bits."""

    def __init__(self, weight: np.ndarray, scales: np.ndarray) -> None:
        self.weight, self.scales = weight, scales


def main() -> None:
    """Write a release, import it both ways, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        parts = write_release(folder, arguments.vocabulary)
        tokenizer = write_tokenizer(folder, arguments.vocabulary)
        figures = []
        for kind in ("safetensors", "gguf"):
            figures.append(imported(folder, kind, tokenizer))
            figures[-1]["values"] = compare(folder, kind, parts)
            shutil.rmtree(folder / kind)
            if not arguments.json:
                one = figures[-1]
                print(
                    f"{kind}: {one['bytes'] / 1e9:.1f} GB read in {one['seconds']:.0f} s, "
                    f"peak memory {one['peak_gib']:.2f} GiB, {one['values']:,} values compared",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps(figures))


def write_release(folder: Path, vocabulary: int) -> dict[str, int]:
    """Write the checkpoint and its manifest; returns each path's number."""

    generator = np.random.default_rng(1)
    QuantizedWeight8bit.__module__ = "__main__"
    (folder / "ckpt-0").mkdir()
    shapes = {
        "multi_head_attention/query/w": (HIDDEN, HEADS * HEAD),
        "multi_head_attention/key/w": (HIDDEN, KV_HEADS * HEAD),
        "multi_head_attention/value/w": (HIDDEN, KV_HEADS * HEAD),
        "multi_head_attention/linear/w": (HEADS * HEAD, HIDDEN),
        "moe/linear/w": (EXPERTS, HIDDEN, WIDTH),
        "moe/linear_v/w": (EXPERTS, HIDDEN, WIDTH),
        "moe/linear_1/w": (EXPERTS, WIDTH, HIDDEN),
    }
    _, whole = release_manifest()
    paths = sorted(one.path for one in whole if one.path.startswith(LAYER) or "/decoder_layer_" not in one.path)
    manifest: list[dict[str, Any]] = []
    for index, path in enumerate(paths):
        part = path.removeprefix(LAYER)
        content: Any
        if part in shapes:
            shape = shapes[part]
            weight = generator.integers(-127, 128, shape, np.int8)
            blocks = ROW_BLOCKS if part in ("moe/linear_1/w", "multi_head_attention/linear/w") else 1
            scales = generator.uniform(1e-4, 2e-4, (*shape[:-2], blocks, shape[-1])).astype(np.float32)
            content = QuantizedWeight8bit(weight, scales)
        else:
            shape = {EMBEDDING: (vocabulary, HIDDEN), "router/w": (HIDDEN, EXPERTS)}.get(part, (HIDDEN,))
            content = generator.standard_normal(shape, np.float32)
        with (folder / "ckpt-0" / f"tensor{index:05d}_000").open("wb") as file:
            pickle.dump(content, file, 4)
        manifest.append({"index": index, "path": path, "shape": shape})
    sizes = {"emb": HIDDEN, "layers": 1, "q": HEADS, "kv": KV_HEADS, "key": HEAD, "vocab": vocabulary, "seq": 8192}
    (folder / "manifest.json").write_text(json.dumps({"config": sizes, "manifest": manifest}))
    return {path: index for index, path in enumerate(paths)}


def write_tokenizer(folder: Path, vocabulary: int) -> Path:
    """A small SentencePiece model: a network may have more pieces than its tokenizer."""
    from sentencepiece import SentencePieceTrainer

    (folder / "text").write_text("\n".join(f"line {number} of some text" for number in range(500)))
    size = min(vocabulary, 300)
    SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def imported(folder: Path, kind: str, tokenizer: Path) -> dict[str, Any]:
    """Import in a child process; its seconds and its peak resident memory."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "modelworks", "import", "grok-1", str(folder), "--out", str(folder / kind)]
    command += ["--config", str(folder / "manifest.json"), "--to", kind, "--dtype", "bfloat16"]
    command += ["--tokenizer", str(tokenizer)]
    child = subprocess.Popen(command)
    peak = 0
    while child.poll() is None:
        peak = max(peak, peak_kib(child.pid))
        time.sleep(0.02)
    if child.returncode:
        raise SystemExit(f"the import ended with status {child.returncode}")
    read = sum(path.stat().st_size for path in (folder / "ckpt-0").iterdir())
    seconds = time.perf_counter() - begun
    return {"kind": kind, "seconds": seconds, "bytes": read, "peak_gib": peak / (1 << 20)}


def peak_kib(process: int) -> int:
    """A process' peak resident memory since it began its program, in KiB; 0 once it has ended.

    ``ru_maxrss`` won't do: it begins with the peak of the process that started this one.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def compare(folder: Path, kind: str, parts: dict[str, int]) -> int:
    """Compare every matrix of the experts with what was drawn; returns the number of values."""
    import gguf
    import torch
    from safetensors import safe_open

    from modelworks.release.pickles import QuantizedTensor, read_array
    from modelworks.spec.gguf_header import read_gguf_header

    compared = 0
    names = {"linear": ("gate", "w1"), "linear_v": ("up", "w3"), "linear_1": ("down", "w2")}
    for part, (ours, theirs) in names.items():
        content = read_array(folder / "ckpt-0" / f"tensor{parts[f'{LAYER}moe/{part}/w']:05d}_000")
        assert isinstance(content, QuantizedTensor)
        for expert in range(EXPERTS):
            weight, scales = content.weight[expert], content.scales[expert]
            if kind == "gguf":
                header = read_gguf_header(folder / kind / f"{kind}-q8_0.gguf")
                stored = header.tensors[f"blk.0.ffn_{ours}_exps.weight"]
                assert stored.kind == gguf.GGMLQuantizationType.Q8_0
                size = stored.size // EXPERTS
                mapped = np.memmap(header.path, np.uint8, "r", stored.offset + expert * size, (size,))
                blocks = mapped.reshape(weight.shape[1], -1, 34)
                assert np.array_equal(blocks[..., 2:].view(np.int8).reshape(weight.shape[::-1]), weight.T)
                found = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
                wanted = np.repeat(scales.T, weight.shape[0] // 32 // len(scales), axis=1)
                assert np.all(np.abs(found - wanted) <= wanted * 2**-11 + 2**-25)
            else:
                name = f"model.layers.0.block_sparse_moe.experts.{expert}.{theirs}.weight"
                index = json.loads((folder / kind / "model.safetensors.index.json").read_text())["weight_map"]
                with safe_open(folder / kind / index[name], framework="pt") as file:
                    found_tensor = file.get_tensor(name)
                rows = weight.shape[0] // len(scales)
                for block, scale in enumerate(scales):
                    values = weight[block * rows : (block + 1) * rows].astype(np.float32) * scale
                    expected = torch.from_numpy(values).to(torch.bfloat16).T
                    assert torch.equal(found_tensor[:, block * rows : (block + 1) * rows], expected)
            compared += weight.size
    return compared


if __name__ == "__main__":
    main()
