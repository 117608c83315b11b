"""The plan command, as people and programs call it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from modelworks.plan_command import describe, run_of
from modelworks.spec import InputError, loads_run

RUN = (
    'name = "{name}"\nmodel = "llama-3.1-8b"\ncluster = {{preset = "h100-superpod", gpus = 16, device = "{device}"}}\n'
)
Typed = Callable[..., subprocess.CompletedProcess[str]]


def test_a_model_on_a_cluster_gets_usual_numbers_where_none_are_given() -> None:
    run = run_of(None, [], model="grok-1", cluster="colossus-100k", gpus=1024)
    assert (run.train.seq_len, run.cluster.gpus) == (8192, 1024)
    # 4 million tokens, or one sequence for 8 devices where that is more.
    assert run.train.global_batch == 512
    assert run_of(None, [], model="grok-1", cluster="colossus-100k").train.global_batch == 16384
    assert run.train.tokens == 20 * run.model.parameters.active
    assert run.parallel.tensor == "auto"


def test_words_win_over_defaults_and_settings_over_words(tmp_path: Path) -> None:
    run = run_of(None, ["train.seq_len=2048"], model="grok-1", gpus=64, tokens="2T", seq_len=4096, global_batch=100)
    assert (run.train.tokens, run.train.seq_len, run.train.global_batch) == (2 * 10**12, 2048, 100)
    file = tmp_path / "run.toml"
    file.write_text(RUN.format(name="x", device="h100-sxm"))
    changed = run_of(file, [], gpus=32, tokens="1B", software="torchtitan")
    assert (changed.cluster.gpus, changed.train.tokens, changed.software) == (32, 10**9, "torchtitan")
    assert changed.cluster.device == "h100-sxm"


def test_a_hugging_face_config_is_a_model(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100,
        "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_of(None, [], model=str(tmp_path / "config.json"), gpus=8).model.layers == 2
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "rwkv"}))
    with pytest.raises(InputError, match="model_type = 'rwkv' is not known here"):
        run_of(None, [], model=str(tmp_path / "config.json"), gpus=8)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "nothing to plan: give a run spec"),
        (("--model", "grok1"), "no preset 'grok1' in models; did you mean 'grok-1'?"),
        (("--model", "grok-1", "--gpus", "0"), "--gpus 0 is not accepted"),
        (("--model", "grok-1", "--gpus", "-8"), "--gpus -8 is not accepted"),
        (("--model", "grok-1", "--gpus", "12"), "gpus = 12 doesn't fill nodes of gpus_per_node = 8"),
        (("--model", "grok-1", "--gpus", "1000000"), "cluster.gpus = 1000000 is not accepted"),
        (("--model", "grok-1", "--gpus", "8"), "doesn't fit 8 x h100-sxm at any layout"),
        (("--model", "grok-1", "--gpus", "64", "--tokens", "0"), "train.tokens = '0' is not accepted"),
        (
            ("--model", "grok-1", "--gpus", "64", "--set", "parallel.tensor=5"),
            "parallel.tensor = 5 doesn't divide model.heads",
        ),
        (("--model", "grok-1", "--gpus", "128", "--emit", "deepspeed"), "--emit deepspeed is not accepted"),
        (("--budget", "lots"), "--budget lots is not accepted: a sum in US dollars"),
        (("--power", "150"), "--power 150 is not accepted: a power with its unit"),
        (("--by", "soon", "--budget", "1B"), "--by soon is not accepted: a month or a day"),
        (("--compare", "missing.toml", "missing.toml"), "the run spec missing.toml cannot be read"),
    ],
)
def test_bad_input_is_one_clear_sentence(typed: Typed, words: tuple[str, ...], sentence: str) -> None:
    done = typed("plan", *words)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_the_command_plans_a_file_compares_two_and_writes_flags(typed: Typed, tmp_path: Path) -> None:
    for name, device in (("hopper", "h100-sxm"), ("blackwell", "b200")):
        (tmp_path / f"{name}.toml").write_text(RUN.format(name=name, device=device))
    one = typed("plan", str(tmp_path / "hopper.toml"), "--json", "--top", "1")
    assert one.returncode == 0, one.stderr
    planned = json.loads(one.stdout)
    assert (planned["name"], planned["device"], planned["devices"]) == ("hopper", "h100-sxm", 16)
    assert len(planned["alternatives"]) == 1
    both = typed("plan", "--compare", str(tmp_path / "hopper.toml"), str(tmp_path / "blackwell.toml"), "--json")
    assert both.returncode == 0, both.stderr
    compared = json.loads(both.stdout)
    assert [plan["device"] for plan in compared["plans"]] == ["h100-sxm", "b200"]
    assert compared["ratios_to_first"][0]["step_time_s"] == 1.0
    assert compared["ratios_to_first"][1]["step_time_s"] < 1.0
    flags = typed("plan", str(tmp_path / "hopper.toml"), "--emit", "megatron")
    assert flags.returncode == 0, flags.stderr
    assert "--tensor-model-parallel-size" in flags.stdout
    ours = typed("plan", str(tmp_path / "hopper.toml"), "--emit", "modelworks")
    assert loads_run(ours.stdout).cluster.gpus == 16


def test_tables_are_printed_for_people(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN.format(name="x", device="h100-sxm"))
    shown = typed("plan", str(tmp_path / "run.toml"))
    assert shown.returncode == 0, shown.stderr
    assert "MFU" in shown.stdout
    spent = typed("plan", "--power", "15MW")
    assert spent.returncode == 0, spent.stderr
    assert "besiroglu-2024" in spent.stdout


def test_planning_needs_none_of_the_heavy_parts(loaded: Callable[..., list[str]]) -> None:
    code = (
        "from modelworks.plan_command import run_of; from modelworks.plan.planner import plan;"
        "plan(run_of(None, [], model='llama-3.1-8b', gpus=8))"
    )
    assert loaded(code, "torch", "pandas", "scipy", "nicegui", "transformers") == []


def test_a_described_run_is_a_whole_one() -> None:
    values = describe("mixtral-8x7b", "h100-superpod", 64, None, None, None)
    assert values["train"]["global_batch"] * values["train"]["seq_len"] == 4 * 2**20
