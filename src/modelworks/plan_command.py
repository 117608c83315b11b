"""What `modelworks plan` does: a run spec from a file or from words, and the plan, budget or comparison asked for.

It sits beside the command line since it puts rooms together; what is calculated is `plan/`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from modelworks.spec.errors import InputError
from modelworks.spec.files import cluster_spec, load_run, loads_run, model_spec
from modelworks.spec.model import ModelSpec
from modelworks.spec.run import RunSpec

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_CLUSTER = "h100-superpod"
BUDGET_CLUSTER = "colossus-100k"
"""Whose nodes and network a budget buys if none is named."""
_LONGEST_DEFAULT = 8192
_BATCH_TOKENS = 4_194_304
"""Tokens of a default step: what GPT-3 and Llama ended with (3.2 to 4 million); more devices take more."""
_DEVICES_PER_SEQUENCE = 8
"""A default step has at least one sequence for so many devices: 16,384 devices and 2,048 sequences, as Llama 3
(arXiv:2407.21783, table 4)."""
_TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022, table 3, for the parameters that a token passes through."""


def run_of(
    file: Path | None,
    overrides: Iterable[str],
    *,
    model: str | None = None,
    cluster: str | None = None,
    gpus: int | None = None,
    tokens: str | None = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    software: str | None = None,
) -> RunSpec:
    """The run that the words of a command describe: a file with changes, or a model on a cluster.

    Raises
    ------
    InputError
        If neither a file nor a model is given, or what is given can't be used.
    """
    for name, value in (("--gpus", gpus), ("--seq-len", seq_len), ("--global-batch", global_batch)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} is not accepted: a whole number of 1 or more is")
    changes = list(overrides)
    if file is not None:
        for field, given in (
            ("model", model), ("cluster.preset", cluster), ("cluster.gpus", gpus), ("train.tokens", tokens),
            ("train.seq_len", seq_len), ("train.global_batch", global_batch), ("software", software),
        ):  # fmt: skip
            if given is not None:
                changes.append(f"{field}={given}")
        return load_run(file, changes)
    if model is None:
        raise InputError("nothing to plan: give a run spec (RUN.toml) or a model (--model grok-1)")
    described = describe(model, cluster or DEFAULT_CLUSTER, gpus, tokens, seq_len, global_batch)
    if software is not None:
        described["software"] = software
    return loads_run(tomli_w.dumps(described), changes, where="command line", folder=Path.cwd())


def describe(
    model: str, cluster: str, gpus: int | None, tokens: str | None, seq_len: int | None, global_batch: int | None
) -> dict[str, Any]:
    """A run spec's values for a model on a cluster, with usual ones where none are given.

    Sequences as long as the model's context, up to 8,192 tokens; steps of 4 million tokens, and of at least one
    sequence for 8 devices; 20 tokens for each parameter that a token passes through.
    """
    network: ModelSpec = model_spec(model)
    machines = cluster_spec(cluster, gpus)
    length = seq_len or min(network.context, _LONGEST_DEFAULT)
    batch = global_batch or _default_batch(length, machines.gpus)
    chosen = {"hf": str(Path(model).expanduser().absolute())} if model.endswith(".json") else {"preset": model}
    if model.endswith(".toml"):
        chosen = {"preset": str(Path(model).expanduser().absolute())}
    return {
        "name": _run_name(network.name),
        "model": chosen,
        "train": {
            "tokens": tokens or _TOKENS_PER_PARAMETER * network.parameters.active,
            "seq_len": length,
            "global_batch": batch,
        },
        "cluster": {"preset": cluster, "gpus": machines.gpus},
    }


def _default_batch(seq_len: int, gpus: int) -> int:
    """The power of two of sequences that makes a usual step."""
    wanted = max(_BATCH_TOKENS // seq_len, gpus // _DEVICES_PER_SEQUENCE, 1)
    return 1 << (wanted - 1).bit_length()


def _run_name(model: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in model).lstrip("._-")
    return kept[:64] or "run"


def print_plan(
    run: RunSpec, search: bool, top: int, emit: str | None, html: Path | None, as_json: bool, console: Console
) -> None:
    """Plan a run; print the plan, or its layout in a framework's own words; write its page if a file is given."""
    from modelworks.plan.emit import FRAMEWORKS
    from modelworks.plan.emit import emit as written
    from modelworks.plan.planner import plan
    from modelworks.plan.report import answer, page

    if emit is not None and emit not in FRAMEWORKS:
        written(run, emit)
    if emit == "modelworks":
        _print_text(written(trainable(run, search), emit), emit, as_json)
        return
    made = plan(run, wide=search, top=top)
    if html is not None:
        from modelworks.plan.page import write_plan

        write_plan(made, html)
    if emit is not None:
        _print_text(written(made.run, emit), emit, as_json)
    elif as_json:
        print(json.dumps(made.as_dict(), indent=1))
    elif html is not None:
        console.print(answer(made))
        console.print(f"\nThe page is in {html}", soft_wrap=True, highlight=False, markup=False)
    else:
        console.print(page(made))


def _print_text(text: str, framework: str, as_json: bool) -> None:
    print(json.dumps({"framework": framework, "text": text}) if as_json else text, end="\n" if as_json else "")


def trainable(run: RunSpec, wide: bool = False) -> RunSpec:
    """The run in its fastest layout that `train` can do, every choice made.

    It is planned with this product's own trainer where the run doesn't say by whom it is trained.

    Raises
    ------
    InputError
        If no layout fits, or `train` can do none of those that do; with the reason for the fastest one.
    """
    from modelworks.plan.ranking import ranked
    from modelworks.train.layout import layout

    if run.software == "auto":
        run = run.model_copy(update={"software": "modelworks"})
    refusal: InputError | None = None
    for laid_out in ranked(run, idle=True, wide=wide):
        try:
            layout(laid_out, laid_out.cluster.gpus)
        except InputError as error:
            refusal = refusal or error
            continue
        return laid_out
    assert refusal is not None
    raise refusal


def print_budget(
    budget: str | None, power: str | None, by: str | None, cluster: str | None, as_json: bool, console: Console
) -> None:
    """Print the largest cluster and the best model under a sum of money, a power supply and a date."""
    from modelworks.plan.budget import Limits, parse_date, parse_power, parse_usd, table
    from modelworks.plan.budget import budget as reckon

    limits = Limits(
        usd=None if budget is None else parse_usd(budget),
        power_w=None if power is None else parse_power(power),
        by=None if by is None else parse_date(by),
    )
    found = reckon(cluster_spec(cluster or BUDGET_CLUSTER), limits)
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        console.print(table(found))


def print_comparison(
    files: Sequence[Path], overrides: Sequence[str], search: bool, html: Path | None, as_json: bool, console: Console
) -> None:
    """Plan several runs and print them side by side; or write a page of them."""
    from modelworks.plan.comparison import compared
    from modelworks.plan.page import write_comparison
    from modelworks.plan.planner import plan
    from modelworks.plan.report import comparison

    plans = [plan(load_run(file, overrides), wide=search, top=0) for file in files]
    if html is not None:
        write_comparison(plans, html)
    if as_json:
        print(json.dumps(compared(plans), indent=1))
    else:
        console.print(comparison(plans))
        if html is not None:
            console.print(f"\nThe page is in {html}", soft_wrap=True, highlight=False, markup=False)
