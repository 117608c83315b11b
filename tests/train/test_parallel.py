"""Every layout of several processes trains like one process: the same losses and the same gradients.

The layouts are all that the spec's degrees allow. One process on the same micro batches is the oracle.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from processes import together

from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder
from modelworks.spec.errors import InputError
from modelworks.spec.files import run_from
from modelworks.spec.run import RunSpec
from modelworks.train.layout import layout
from modelworks.train.loop import Trainer
from modelworks.train.parallelize import Parallel
from modelworks.train.ranks import Ranks
from modelworks.train.session import MemberSession, open_run
from modelworks.train.view import NoView

STEPS = 20
FEWER = int(os.environ.get("MODELWORKS_TEST_STEPS", "8"))
"""Of the many layouts of four and eight processes, for the sake of time."""
TOLERANCE = 1e-5
SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1))
"""With the chunks that each has on a stage."""
SHALLOW, DEEP = 2, 5
"""Layers of the networks: two, for a pipeline such that they don't divide by its stages, and for many stages five."""
NETWORKS: dict[str, dict[str, Any]] = {
    "mixture": {
        "activation": "gelu",
        "norm_placement": "sandwich",
        "attention_softcap": 30.0,
        "embedding_multiplier": 8.0,
        "tied_embeddings": True,
        "moe": {"experts": 4, "top_k": 2, "expert_hidden": 64},
    },
    # Fewer experts than processes that share their weights, or as many as can't be dealt out evenly.
    "few": {"moe": {"experts": 2, "top_k": 1, "expert_hidden": 64}},
    "odd": {"moe": {"experts": 3, "top_k": 2, "expert_hidden": 64}},
    "residual": {
        "activation": "gelu",
        "norm_placement": "sandwich",
        "ffn_hidden": 96,
        "attention_softcap": 30.0,
        "attention_temperature_length": 8,
        "output_softcap": 20.0,
        "moe": {"experts": 4, "top_k": 2, "expert_hidden": 64, "residual": True, "router_softcap": 1.0},
    },
    "windowed": {"ffn_hidden": 96, "sliding_window": 10, "nope_interval": 2},
    "biased": {"ffn_hidden": 96, "qkv_bias": True, "sliding_window": 10},
    "dense": {
        "ffn_hidden": 96,
        "tied_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
        "output_softcap": 20.0,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder for all tests of this file, so that the text is packed once."""
    folder = tmp_path_factory.mktemp("parallel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELWORKS_HOME", str(folder / "home"))
        yield folder


def make(
    network: str,
    optimizer: str,
    text: Path | None = None,
    processes: int = 1,
    layers: int | None = None,
    micro_batch: int | None = None,
    compiled: bool = False,
    **parallel: Any,
) -> RunSpec:
    """A tiny run of a network on so many processes.

    A process without a pipeline has two micro batches in a step where it has all data, for the sake of time.
    """
    stages = parallel.get("pipeline", 1)
    chunks = stages * parallel.get("virtual_stages", 1)
    layers = layers or (SHALLOW if stages == 1 else SHALLOW + 1 if chunks == 2 else DEEP)
    micro_batch = micro_batch or (4 if parallel.get("data", 1) == stages == 1 else 2)
    model = {"layers": layers, "hidden": 64, "heads": 4, "kv_heads": 4, "vocab": 512, "context": 64}
    return run_from(
        {
            "name": f"{network}-{optimizer}-"
            + "-".join(map(str, (layers, micro_batch, processes, *parallel.values()))),
            "model": model | NETWORKS[network],
            "data": {"source": "files", "files": [str(text or "text")], "validation_fraction": 0.2},
            "train": {
                "tokens": 40 * 8 * 32,
                "seq_len": 32,
                "global_batch": 8,
                "micro_batch": micro_batch,
                "precision": "fp32",
                "optimizer": optimizer,
                "compile": compiled,
                "validation_tokens": 512,
            },
            "parallel": parallel,
            "cluster": {"preset": "local"} | dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), processes),
        }
    )


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


def train_some(ranks: Ranks, folder: Path, spec: RunSpec, steps: int) -> dict[str, Any]:
    """The losses of a new run's first steps, and of its first step the gradients, whole."""
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    counters.clear()
    trainer._compile()
    graphs = counters["stats"]["unique_graphs"]
    gradients: dict[str, Any] = {}
    forget = trainer.optimizers.zero_grad

    def keep_first() -> None:
        if not gradients:
            for name, parameter in trainer.decoder.named_parameters():
                assert parameter.grad is not None
                whole = trainer.parallel.whole(name, parameter.grad)
                gradients[name] = (whole.full_tensor() if isinstance(whole, DTensor) else whole).clone().numpy()
        forget()

    trainer.optimizers.zero_grad = keep_first  # type: ignore[method-assign]
    rows = [trainer.one_step() for _ in range(steps)]
    validation = trainer._validate()
    trainer.close()
    return {"rows": rows, "gradients": gradients, "validation": validation, "graphs": graphs}


def run(spec: RunSpec, folder: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """Train a new run of a spec on as many processes as its cluster has devices."""
    with open_run(spec, folder=folder / "runs" / spec.name) as session:
        return together(spec.cluster.gpus, train_some, session.folder, spec, steps)


def largest_difference(left: Any, right: Any) -> float:
    """The largest difference of two tensors over the second's size."""
    left, right = torch.as_tensor(left), torch.as_tensor(right)
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-12))


def assert_alike(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Hold losses, norms, loads and gradients that several processes report against the oracle's."""
    seen = set()
    for of_process in found:
        for name, gradient in of_process["gradients"].items():
            seen.add(name)
            assert largest_difference(gradient, expected["gradients"][name]) < 1e-4, name
        for row, oracle in zip(of_process["rows"], expected["rows"], strict=True):
            for quantity in ("loss", "cross_entropy", "load_balance_loss", "router_z_loss"):
                expectation = pytest.approx(oracle[quantity], rel=TOLERANCE, abs=1e-12)
                assert row[quantity] == expectation, (row["step"], quantity)
        row, oracle = of_process["rows"][0], expected["rows"][0]
        assert row["grad_norm"] == pytest.approx(oracle["grad_norm"], rel=TOLERANCE)
        assert row["expert_load"] == pytest.approx(oracle["expert_load"], rel=1e-6)
        assert of_process["validation"] == pytest.approx(expected["validation"], rel=TOLERANCE)
    assert seen == set(expected["gradients"])  # each stage of a pipeline has some


_oracles: dict[str, dict[str, Any]] = {}


def oracle(network: str, optimizer: str, text: Path, folder: Path, like: RunSpec, steps: int = STEPS) -> dict[str, Any]:
    """What one process makes of a run of as many layers, on the same micro batches."""
    micro_batch = like.train.micro_batch
    assert micro_batch != "auto"
    spec = make(network, optimizer, text, layers=like.model.layers, micro_batch=micro_batch)
    spec = spec.model_copy(update={"name": f"{spec.name}-{steps}"})
    if spec.name not in _oracles:
        _oracles[spec.name] = run(spec, folder, steps)[0]
    return _oracles[spec.name]


def check_layout(
    network: str, optimizer: str, processes: int, fields: dict[str, Any], text: Path, folder: Path
) -> None:
    steps = STEPS if processes == 2 else FEWER
    spec = make(network, optimizer, text, processes, **fields)
    expected = oracle(network, optimizer, text, folder, spec, steps)
    assert expected["rows"][-1]["loss"] < expected["rows"][0]["loss"]
    assert_alike(run(spec, folder, steps), expected)


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
    alone = make("mixture", "adamw", text_folder, layers=DEEP, micro_batch=1)
    alone = alone.model_copy(update={"name": "alone-of-eight"})
    if alone.name not in _oracles:
        _oracles[alone.name] = run(alone, folder, FEWER // 2)[0]
    assert_alike(run(spec, folder, FEWER // 2), _oracles[alone.name])


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
    expected = oracle("mixture", "adamw", text_folder, folder, spec, FEWER)
    assert_alike(run(spec, folder, FEWER), expected)


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
    found = run(spec, folder, FEWER)
    assert all(of_process["graphs"] > 0 for of_process in found)
    assert_alike(found, oracle("mixture", "adamw", text_folder, folder, spec, FEWER))


def train_on(ranks: Ranks, folder: Path, spec: RunSpec, resume: bool, steps: int) -> list[float]:
    """The losses of a run's next steps, after which a checkpoint is saved."""
    trainer = Trainer(MemberSession(folder, spec, resume, ranks.first), NoView(), ranks)
    losses = [trainer.one_step()["loss"] for _ in range(steps)]
    trainer._save()
    trainer.saving.finish()
    trainer.close()
    return losses


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
    expected = [row["loss"] for row in oracle("mixture", optimizer, text_folder, folder, whole)["rows"]]
    losses: list[float] = []
    for place, (processes, parallel) in enumerate(HOPS[hops]):
        moved = make("mixture", optimizer, text_folder, processes, layers, micro_batch=2, **parallel)
        moved = moved.model_copy(update={"name": "moved"})
        home = folder / "runs" / f"moved-{hops}-{optimizer}".replace(" ", "-")
        with open_run(moved, resume=place > 0, folder=home) as session:
            losses += together(processes, train_on, session.folder, moved, place > 0, 4)[0]
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


LONG = 32_768


def first_step(ranks: Ranks, folder: Path, spec: RunSpec) -> dict[str, Any]:
    """The loss of a new run's first step, and its gradients, whole."""
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    gradients: dict[str, Any] = {}

    def keep() -> None:
        for name, parameter in trainer.decoder.named_parameters():
            assert parameter.grad is not None
            whole = trainer.parallel.whole(name, parameter.grad)
            gradients[name] = (whole.full_tensor() if isinstance(whole, DTensor) else whole).clone().numpy()

    trainer.optimizers.zero_grad = keep  # type: ignore[method-assign]
    row = trainer.one_step()
    trainer.close()
    return {"loss": row["loss"], "gradients": gradients}


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["one document", "documents apart"])
def test_two_context_ranks_train_on_32768_tokens_like_one_process(
    masked: bool, text_folder: Path, folder: Path, tmp_path: Path
) -> None:
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(text_folder.glob("*.txt"))).split(" ")
    for part in range(12):  # documents of some three thousand tokens
        (tmp_path / f"{part}.txt").write_text(" ".join(words[part::7] + words[part::5]), encoding="utf-8")
    found = {}
    for processes in (1, 2):
        spec = make("dense", "adamw", tmp_path, processes, layers=1, micro_batch=1, context=processes)
        small = {"hidden": 16, "heads": 1, "kv_heads": 1, "head_dim": 16, "ffn_hidden": 16, "context": LONG}
        long = {"seq_len": LONG, "global_batch": 1, "tokens": LONG, "validation_tokens": 1, "document_mask": masked}
        values = spec.model_dump(mode="json", exclude_none=True)
        values["model"] |= small | {"attention_softcap": 30.0}
        values["train"] |= long
        values["data"] |= {"validation_fraction": 0.0}
        values["name"] = f"long-{masked}-{processes}"
        spec = run_from(values)
        with open_run(spec, folder=folder / "runs" / spec.name) as session:
            found[processes] = together(processes, first_step, session.folder, spec)
    expected = found[1][0]
    for of_process in found[2]:
        assert of_process["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        for name, gradient in of_process["gradients"].items():
            assert largest_difference(gradient, expected["gradients"][name]) < 1e-4, name
