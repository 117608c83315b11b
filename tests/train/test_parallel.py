"""Every layout of several processes trains like one process: the same losses and the same gradients.

The layouts are all that the spec's degrees allow. One process on the same micro batches is the oracle.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from processes import together
from tiny_runs import (
    DEEP,
    SHALLOW,
    TOLERANCE,
    assert_alike,
    first_step,
    largest_difference,
    make,
    oracle,
    run,
    train_on,
)

from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder
from modelworks.spec.errors import InputError
from modelworks.spec.files import run_from
from modelworks.train.layout import layout
from modelworks.train.parallelize import Parallel
from modelworks.train.ranks import Ranks
from modelworks.train.session import open_run

SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1))
"""With the chunks that each has on a stage."""


def layouts(network: str, processes: int) -> Iterator[dict[str, Any]]:
    """Every combination of degrees, schedule, ZeRO stage and shards that the spec allows on so many processes."""
    degrees = [degree for degree in range(1, processes + 1) if processes % degree == 0]
    axes = ("data", "shard", "context", "tensor", "expert", "expert_tensor", "pipeline")
    for zero_stage, (schedule, virtual_stages), *values in itertools.product(
        range(4), SCHEDULES, *[degrees] * len(axes)
    ):
        fields = {"zero_stage": zero_stage, **dict(zip(axes, values, strict=True))}
        # Where nothing is split over data or context ranks, all ZeRO stages are one, and without a pipeline all
        # schedules are.
        alone = fields["data"] * fields["context"] == 1 and fields["expert"] in (1, fields["tensor"])
        same = zero_stage < 3 and alone
        same |= schedule != "1f1b" and fields["pipeline"] == 1
        product = fields["data"] * fields["context"] * fields["tensor"] * fields["pipeline"]
        if product != processes or same:
            continue
        chosen: dict[str, Any] = {
            name: value for name, value in fields.items() if value > 1 or name in ("zero_stage", "shard")
        }
        if fields["pipeline"] > 1:
            chosen |= {"schedule": schedule, "virtual_stages": virtual_stages}
        if _legal(network, processes, chosen):
            yield chosen


def _legal(network: str, processes: int, fields: dict[str, Any]) -> bool:
    try:
        layout(make(network, "adamw", None, processes, **fields), processes)
    except InputError:
        return False
    return True


def _cases(processes: int) -> list[Any]:
    """All layouts; those that are not needed to have every pair of choices together once are marked `exhaustive`."""
    cases = [
        (network, optimizer, fields)
        for network, optimizer in itertools.product(("mixture", "dense"), ("adamw", "muon"))
        # On four processes there are many layouts: each network goes with the optimizer that is the harder for it.
        if processes == 2 or (network, optimizer) in (("mixture", "muon"), ("dense", "adamw"))
        for fields in layouts(network, processes)
    ]
    needed = _covering([_pairs(*case) for case in cases])
    return [
        pytest.param(
            network,
            optimizer,
            processes,
            fields,
            id=f"{network}-{optimizer}-{processes}-" + "-".join(f"{name}{value}" for name, value in fields.items()),
            marks=[] if index in needed else [pytest.mark.exhaustive],
        )
        for index, (network, optimizer, fields) in enumerate(cases)
    ]


def _pairs(network: str, optimizer: str, fields: dict[str, int]) -> set[Any]:
    """Which pairs of choices a case has together."""
    chosen = [("network", network), ("optimizer", optimizer), *fields.items()]
    return set(itertools.combinations(chosen, 2))


def _covering(cases: list[set[Any]]) -> set[int]:
    """A few of the cases that have every pair of choices together, found greedily."""
    missing, taken = set().union(*cases), set()
    while missing:
        best = max(range(len(cases)), key=lambda index: len(cases[index] & missing))
        taken.add(best)
        missing -= cases[best]
    return taken


def check_layout(
    network: str, optimizer: str, processes: int, fields: dict[str, Any], text: Path, folder: Path
) -> None:
    spec = make(network, optimizer, text, processes, **fields)
    expected = oracle(network, optimizer, text, folder, spec)
    assert expected["rows"][-1]["loss"] < expected["rows"][0]["loss"]
    assert_alike(run(spec, folder), expected)


@pytest.mark.parametrize(("network", "optimizer", "processes", "fields"), _cases(2))
def test_a_layout_of_two_processes_trains_like_one(
    network: str, optimizer: str, processes: int, fields: dict[str, Any], text_folder: Path, folder: Path
) -> None:
    check_layout(network, optimizer, processes, fields, text_folder, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "optimizer", "processes", "fields"), _cases(4))
def test_a_layout_of_four_processes_trains_like_one(
    network: str, optimizer: str, processes: int, fields: dict[str, Any], text_folder: Path, folder: Path
) -> None:
    check_layout(network, optimizer, processes, fields, text_folder, folder)


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        ("windowed", {"context": 2}),
        ("windowed", {"tensor": 2}),
        ("windowed", {"pipeline": 2}),
        ("biased", {"tensor": 2}),
        ("residual", {"context": 2}),
        ("residual", {"tensor": 2}),
    ],
)
def test_windows_and_networks_beside_experts_are_split_like_the_rest(
    network: str, fields: dict[str, int], text_folder: Path, folder: Path
) -> None:
    check_layout(network, "adamw", 2, fields, text_folder, folder)


@pytest.mark.parametrize(
    ("network", "optimizer", "processes", "fields"),
    [
        ("odd", "muon", 2, {"zero_stage": 3}),
        ("few", "adamw", 4, {"zero_stage": 1, "data": 4}),
        ("few", "muon", 4, {"zero_stage": 3, "data": 4, "expert": 2}),
    ],
)
def test_experts_that_are_too_few_to_be_dealt_out_are_split_within(
    network: str, optimizer: str, processes: int, fields: dict[str, Any], text_folder: Path, folder: Path
) -> None:
    check_layout(network, optimizer, processes, fields, text_folder, folder)


AXES = ("data", "context", "tensor", "pipeline")


def _eights() -> list[dict[str, Any]]:
    """Layouts of eight processes that split in three ways at once, few of them: all threes of axes, and with them
    every ZeRO stage, schedule and degree of expert parallelism."""
    base, found = make("mixture", "adamw", None, 8, DEEP, micro_batch=1), []
    for axes, zero_stage, (schedule, virtual_stages), expert, expert_tensor in itertools.product(
        itertools.combinations(AXES, 3), range(4), SCHEDULES, (1, 2, 4), (1, 2)
    ):
        fields: dict[str, Any] = dict.fromkeys(axes, 2) | {"zero_stage": zero_stage, "expert": expert}
        fields["expert_tensor"] = expert_tensor
        if "pipeline" in axes:
            fields |= {"schedule": schedule, "virtual_stages": virtual_stages}
        elif schedule != "1f1b":
            continue
        try:
            layout(base.model_copy(update={"parallel": base.parallel.model_copy(update=fields)}), 8)
        except InputError:
            continue
        found.append(fields)
    wanted: list[set[Any]] = [
        {tuple(name for name in AXES if name in one), *((name, one[name]) for name in one if name not in AXES)}
        for one in found
    ]
    return [found[index] for index in sorted(_covering(wanted))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [pytest.param(one, id="-".join(f"{k}{v}" for k, v in one.items())) for one in _eights()]
)
def test_a_layout_of_eight_processes_trains_like_one(fields: dict[str, Any], text_folder: Path, folder: Path) -> None:
    spec = make("mixture", "adamw", text_folder, 8, DEEP, micro_batch=1, **fields)
    assert_alike(run(spec, folder), oracle("mixture", "adamw", text_folder, folder, spec))


RECOMPUTED: list[tuple[str, int, dict[str, Any]]] = [
    ("full", 1, {}),
    ("full", 2, {"zero_stage": 3}),
    ("full", 2, {"zero_stage": 1, "expert": 2}),
    ("full", 2, {"tensor": 2, "expert_tensor": 2}),
    ("full", 2, {"pipeline": 2, "schedule": "zero-bubble"}),
    ("selective", 1, {"recompute_share": 0.5}),
    ("selective", 2, {"tensor": 2}),
    ("selective", 2, {"context": 2, "zero_stage": 3}),
    ("projections", 1, {}),
    ("projections", 2, {"zero_stage": 3, "expert": 2}),
    ("projections", 2, {"tensor": 2, "expert_tensor": 2}),
    ("projections", 2, {"pipeline": 2, "schedule": "zero-bubble", "recompute_share": 0.6}),
]


@pytest.mark.parametrize(("kind", "processes", "fields"), RECOMPUTED)
def test_recomputed_activations_change_nothing(
    kind: str, processes: int, fields: dict[str, Any], text_folder: Path, folder: Path
) -> None:
    spec = make("mixture", "adamw", text_folder, processes, recompute=kind, **fields)
    expected = oracle("mixture", "adamw", text_folder, folder, spec)
    assert_alike(run(spec, folder), expected)


def bytes_kept(decoder: Decoder) -> int:
    """What the forward pass keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(torch.zeros(4, 32, dtype=torch.long), torch.zeros(4, 32, dtype=torch.long))
    return sum(sizes.values())


def test_recomputed_activations_are_not_kept(text_folder: Path, folder: Path) -> None:
    kept = {}
    for kind, share in (("none", 1.0), ("full", 0.5), ("full", 1.0)):
        spec = make("dense", "adamw", text_folder, 1, recompute=kind, recompute_share=share)
        decoder = Decoder(spec.model)
        Parallel(layout(spec, 1), Ranks()).apply(decoder, spec.parallel)
        kept[kind, share] = bytes_kept(decoder)
    assert kept["full", 1.0] < kept["none", 1.0] / 2
    assert kept["full", 1.0] < kept["full", 0.5] < kept["none", 1.0]


def operations_backward(kind: str) -> Counter[str]:
    """How often the backward pass of a block's network runs some operations."""
    spec = make("mixture", "adamw", None, 1, recompute=kind)
    decoder = Decoder(spec.model)
    Parallel(layout(spec, 1), Ranks()).apply(decoder, spec.parallel)
    tokens = torch.zeros(4, 32, dtype=torch.long)
    loss = decoder(tokens, tokens).cross_entropy
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[operation.__name__] += 1
            return operation(*args, **(kwargs or {}))

    with Count():
        loss.backward()
    return counts


def test_each_kind_of_recomputation_computes_again_what_it_says() -> None:
    """Per layer: attention is one operation, its projections four of the products, the experts three of another."""
    plain = operations_backward("none")
    again = {kind: operations_backward(kind) - plain for kind in ("selective", "projections", "full")}
    attention, products, experts = "blockwise_attention.default", "mm.default", "grouped_linear.default"
    assert [again[kind][attention] for kind in again] == [SHALLOW] * 3
    assert [again[kind][experts] for kind in again] == [0, 3 * SHALLOW, 3 * SHALLOW]
    # The router's is a product as well.
    assert [again[kind][products] for kind in again] == [0, SHALLOW, 5 * SHALLOW]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("fields", [{"zero_stage": 3}, {"pipeline": 2, "virtual_stages": 2}])
def test_compiled_blocks_of_two_processes_train_like_one(
    fields: dict[str, Any], text_folder: Path, folder: Path
) -> None:
    spec = make("mixture", "adamw", text_folder, 2, compiled=True, **fields)
    found = run(spec, folder)
    assert all(of_process["graphs"] > 0 for of_process in found)
    assert_alike(found, oracle("mixture", "adamw", text_folder, folder, spec))


HOPS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "over data": [
        (4, {"zero_stage": 3}),
        (2, {"zero_stage": 1}),
        (1, {}),
        (4, {"zero_stage": 2, "shard": 2}),
        (4, {"zero_stage": 0}),
    ],
    "over everything": [
        (4, {"zero_stage": 3, "tensor": 2, "expert_tensor": 2}),
        (2, {"zero_stage": 1, "expert": 2}),
        (1, {}),
        (4, {"zero_stage": 3, "context": 2, "expert": 2}),
        (2, {"tensor": 2, "expert_tensor": 1}),
    ],
    "over stages": [
        (4, {"pipeline": 2, "schedule": "zero-bubble", "zero_stage": 1}),
        (1, {}),
        (4, {"pipeline": 4, "zero_stage": 3}),
        (2, {"tensor": 2, "expert_tensor": 2}),
        (4, {"pipeline": 2, "virtual_stages": 2, "zero_stage": 3, "expert": 2}),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hops", "optimizer"),
    [
        pytest.param(hops, optimizer, marks=[] if (place + turn) % 2 == 0 else [pytest.mark.exhaustive])
        for place, hops in enumerate(HOPS)
        for turn, optimizer in enumerate(("adamw", "muon"))
    ],
)
def test_a_run_goes_on_with_the_same_losses_on_other_processes(
    optimizer: str, hops: str, text_folder: Path, folder: Path
) -> None:
    layers = DEEP if hops == "over stages" else SHALLOW
    whole = make("mixture", optimizer, text_folder, layers=layers, micro_batch=2)
    expected = [row["loss"] for row in oracle("mixture", optimizer, text_folder, folder, whole, 10)["rows"]]
    losses: list[float] = []
    for place, (processes, parallel) in enumerate(HOPS[hops]):
        moved = make("mixture", optimizer, text_folder, processes, layers, micro_batch=2, **parallel)
        moved = moved.model_copy(update={"name": "moved"})
        home = folder / "runs" / f"moved-{hops}-{optimizer}".replace(" ", "-")
        with open_run(moved, resume=place > 0, folder=home) as session:
            losses += together(processes, train_on, session.folder, moved, place > 0, 2)[0]
    assert losses == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_is_whole_for_one(text_folder: Path, folder: Path) -> None:
    spec = make("mixture", "adamw", text_folder, 4, zero_stage=3, tensor=2, pipeline=2, expert_tensor=2)
    with open_run(spec, folder=folder / "runs" / "whole") as session:
        together(4, train_on, session.folder, spec, False, 0)
    saved = checkpoint.newest_good(session.folder)
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
    assert len(list(saved.glob("shard-*"))) == 4
    decoder, drawn = Decoder(spec.model), Decoder(spec.model)
    drawn.initialize(spec.train.seed)
    checkpoint.load_weights(saved, decoder)
    for name, tensor in drawn.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "masked"),
    [
        pytest.param(32_768, False, id="one document"),
        pytest.param(8_192, True, id="documents apart"),
        pytest.param(32_768, True, id="documents apart, as long", marks=pytest.mark.exhaustive),
    ],
)
def test_two_context_ranks_train_on_long_sequences_like_one_process(
    length: int, masked: bool, text_folder: Path, folder: Path, tmp_path: Path
) -> None:
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(text_folder.glob("*.txt"))).split(" ")
    for part in range(12):  # documents of some three thousand tokens
        (tmp_path / f"{part}.txt").write_text(" ".join(words[part::7] + words[part::5]), encoding="utf-8")
    found = {}
    for processes in (1, 2):
        spec = make("dense", "adamw", tmp_path, processes, layers=1, micro_batch=1, context=processes)
        small = {"hidden": 16, "heads": 1, "kv_heads": 1, "head_dim": 16, "ffn_hidden": 16, "context": length}
        long = {"seq_len": length, "global_batch": 1, "tokens": length, "validation_tokens": 1, "document_mask": masked}
        values = spec.model_dump(mode="json", exclude_none=True)
        values["model"] |= small | {"attention_softcap": 30.0}
        values["train"] |= long
        values["data"] |= {"validation_fraction": 0.0}
        values["name"] = f"long-{length}-{masked}-{processes}"
        spec = run_from(values)
        with open_run(spec, folder=folder / "runs" / spec.name) as session:
            found[processes] = together(processes, first_step, session.folder, spec)
    expected = found[1][0]
    for of_process in found[2]:
        assert of_process["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        for name, gradient in of_process["gradients"].items():
            assert largest_difference(gradient, expected["gradients"][name]) < 1e-4, name
