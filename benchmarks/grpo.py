"""GRPO from the start to a figure: a tiny network learns to add from dialogues, half-way, and then from its replies.

python benchmarks/grpo.py FOLDER        everything is kept there; what is trained already isn't trained again

Both runs are made by `modelworks train`, the second one with llama.cpp drawing the replies. Before and after, the
network answers the same held-out problems, which neither run has trained on: by its likeliest reply, and by one drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch

from modelworks.data.preparation import prepare
from modelworks.data.tasks import TaskDataset
from modelworks.data.tokenizer import train_tokenizer
from modelworks.release.runs import load_run_content
from modelworks.spec.files import dumps, run_from
from modelworks.spec.run import RunSpec
from modelworks.train.precision import FP32
from modelworks.train.rewards import is_answer
from modelworks.train.rollouts import OwnSampler, Sampling

MODEL = {
    "layers": 3, "hidden": 128, "heads": 4, "kv_heads": 4, "ffn_hidden": 384, "vocab": 280, "context": 128,
    "tied_embeddings": True,
}  # fmt: skip
TASKS = {"operations": ["+"], "digits": 2, "count": 8000, "prompt": "{problem} ="}
HELD_OUT, SHARE = 500, 0.1
REPLY = 5
"""Tokens that a reply has at most: three digits and the mark of its end, and one to spare."""
Z = 1.96


def specs(folder: Path, sft_steps: int, grpo_steps: int) -> tuple[RunSpec, RunSpec]:
    """The two runs."""
    data = {"tokenizer": str(folder / "tokenizer.json"), "validation_fraction": 0.0}
    common = {"model": MODEL, "checkpoint": {"every_steps": 200}}
    train = {"precision": "fp32", "weight_decay": 0.0, "validate_every": 0, "log_every": 5}
    learns = {
        "name": "adds",
        "data": data | {"source": "dialogues", "files": [str(folder / "dialogues.jsonl")]},
        "train": train
        | {"tokens": sft_steps * 16 * 128, "seq_len": 128, "global_batch": 16, "learning_rate": 2e-3, "seed": 1},
    }
    improves = {
        "name": "adds-better",
        "data": data | {"source": "tasks", "tasks": TASKS, "validation_fraction": SHARE},
        "train": train
        | {
            "objective": "grpo", "init_from": str(folder / "runs" / "adds"), "tokens": grpo_steps * 512 * 40,
            "seq_len": 40, "global_batch": 512, "learning_rate": 1e-4, "schedule": "constant", "warmup_fraction": 0.0,
        },
        "grpo": {"group": 16, "max_new_tokens": REPLY, "clip_high": 0.28},
        "rewards": {"marks": [], "format": 0.0},
    }  # fmt: skip
    return run_from(common | learns), run_from(common | improves)


def prepared(folder: Path) -> TaskDataset:
    """The problems, with those that are held out; of the others, the dialogues that the first run learns from."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        train_tokenizer(["user\n", "assistant\n"], 280).save(str(tokenizer))  # digits stay single
    spec = specs(folder, 1, 1)[1].data
    tasks = cast(TaskDataset, prepare(spec, 280, folder / "data"))
    with (folder / "dialogues.jsonl").open("w", encoding="utf-8") as file:
        for number in tasks.fitting("train", 99):
            task = tasks.task("train", int(number))
            messages = [*task.asked.messages, {"role": "assistant", "content": task.answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return tasks


def trained(folder: Path, spec: RunSpec) -> Path:
    """A run's folder, once it is trained."""
    run, file = folder / "runs" / spec.name, folder / f"{spec.name}.toml"
    file.write_text(dumps(spec), encoding="utf-8")
    status = run / "status.json"
    if not status.exists() or json.loads(status.read_text())["state"] != "finished":
        command = [sys.executable, "-m", "modelworks", "train", str(file)]
        begun = [*command, "--resume"] if any(run.glob("checkpoints/step-*")) else command
        subprocess.run(begun, check=True, env=os.environ | {"MODELWORKS_HOME": str(folder)}, stdout=sys.stderr)
    return run


def measured(run: Path, tasks: TaskDataset) -> dict[str, Any]:
    """The share of held-out problems that a run's network answers rightly, with its 95 % interval (Wilson 1927)."""
    from tokenizers import Tokenizer

    decoder, words = load_run_content(run).decoder.eval(), Tokenizer.from_file(str(tasks.tokenizer_file))
    asked = tasks.tasks("validation", 0, HELD_OUT, 99, 0)
    found: dict[str, Any] = {}
    for name, temperature in (("likeliest", 0.0), ("drawn", 1.0)):
        sampling, seeds = Sampling(REPLY, temperature, tasks.end), list(range(len(asked)))
        replies = OwnSampler(FP32)(decoder, [task.prompt for task in asked], sampling, seeds)
        right = sum(
            is_answer(words.decode(reply.tokens), cast(str, task.answer), [])
            for task, reply in zip(asked, replies, strict=True)
        )
        found[name] = wilson(right / len(asked), len(asked))
    return found


def wilson(share: float, count: int) -> dict[str, float]:
    """A share and its 95 % interval."""
    middle, width = share + Z**2 / (2 * count), Z * (share * (1 - share) / count + Z**2 / (4 * count**2)) ** 0.5
    return {"share": share, "from": (middle - width) / (1 + Z**2 / count), "to": (middle + width) / (1 + Z**2 / count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sft-steps", type=int, default=600)
    parser.add_argument("--grpo-steps", type=int, default=150)
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tasks = prepared(folder)
    first, second = specs(folder, given.sft_steps, given.grpo_steps)
    report: dict[str, Any] = {"held_out": HELD_OUT, "before": measured(trained(folder, first), tasks)}
    print(json.dumps(report), file=sys.stderr)
    report["after"] = measured(trained(folder, second), tasks)
    rows = [json.loads(line) for line in (folder / "runs" / second.name / "metrics.jsonl").open()]
    report["steps"] = {key: [rows[0][key], rows[-1][key]] for key in ("reward", "groups_without_signal", "step_time_s")}
    report["drawn_difference"] = max(row["drawn_difference"] for row in rows)
    report["time_s"] = rows[-1]["time_s"]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
