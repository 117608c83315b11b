"""The search finds what trying everything finds, and says what no layout can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelworks.plan.block import Setting
from modelworks.plan.layout import PRECISIONS, Layouts, fits_model, joined, layouts
from modelworks.plan.search import GROUP, WITHIN, Space, candidates, evaluations, pareto, search
from modelworks.plan.step import Evaluation, evaluate
from modelworks.spec.model import ModelSpec

MakeSetting = Callable[..., Setting]
BATCH = 16
SMALL = ModelSpec(
    name="small", layers=6, hidden=512, ffn_hidden=1024, heads=8, kv_heads=2, head_dim=64, vocab=8192, context=2048,
    moe={"experts": 4, "top_k": 2, "expert_hidden": 1024},
)  # fmt: skip


def space(devices: int, memory: float, **accepted: tuple[object, ...]) -> Space:
    return Space(
        most_devices=devices, least_devices=devices, devices_per_node=8, domain=8, island=512, memory_limit=memory,
        accepted={"precision": (PRECISIONS.index("bf16"),)} | accepted,
    )  # fmt: skip


def everything(model: ModelSpec, seq_len: int, devices: int) -> Layouts:
    """All layouts of a small model by trying every number, whatever divides."""
    numbers = [n for n in range(1, devices + 1) if devices % n == 0]
    found = []
    for tensor, pipeline, context in product(numbers, range(1, model.layers + 1), numbers):
        if devices % (tensor * pipeline * context):
            continue
        data = devices // (tensor * pipeline * context)
        for micro, virtual, expert, inner, parallel in product(
            range(1, BATCH + 1), range(1, model.layers + 1), range(1, 5), numbers, (True, False)
        ):
            if tensor == 1 and not parallel:
                continue
            if BATCH % (data * micro) or tensor % inner or pipeline * virtual > model.layers:
                continue
            if virtual > 1 and (pipeline == 1 or (BATCH // (data * micro)) % pipeline):
                continue
            middle = -(-model.layers // (pipeline * virtual)) * virtual
            short = pipeline * middle - model.layers
            if pipeline > 1 and short - short // 2 > middle - 1:
                continue
            schedules = (1,) if virtual > 1 else (0, 2) if pipeline > 1 else (0,)
            for schedule in schedules:
                found.append((tensor, pipeline, context, data, micro, virtual, expert, inner, parallel, schedule))
    columns = dict(zip(
        ("tensor", "pipeline", "context", "data", "micro_batch", "virtual_stages", "expert", "expert_tensor",
         "sequence_parallel", "schedule"),
        np.array(found).T, strict=True,
    ))  # fmt: skip
    columns["sequence_parallel"] = columns["sequence_parallel"].astype(np.bool_)
    made = layouts(**columns)
    return made.take(fits_model(model, seq_len, BATCH, made))


def key(found: Layouts) -> set[tuple[int, ...]]:
    names = (*GROUP, "data", "micro_batch", "virtual_stages", "schedule", "sequence_parallel")
    return set(zip(*(getattr(found, name).astype(int).tolist() for name in names), strict=True))


@pytest.mark.parametrize("devices", [1, 8, 16])
def test_the_space_is_every_layout_that_divides_and_no_other(setting: MakeSetting, devices: int) -> None:
    base = setting(SMALL, seq_len=1024)
    every = candidates(base, BATCH, space(devices, 1e15))
    listed = every.at(np.arange(len(every)))
    assert key(listed) == key(everything(SMALL, 1024, devices))
    assert fits_model(SMALL, 1024, BATCH, listed).all()
    assert (listed.devices == devices).all()
    rows = np.stack([listed.recompute, listed.recompute_share * 100, listed.zero_stage, listed.shards])
    whole = np.concatenate([rows, [getattr(listed, name) for name in (*GROUP, "data", "micro_batch", "virtual_stages",
                                                                      "schedule", "sequence_parallel")]])  # fmt: skip
    sharded = listed.zero_stage > 0
    distinct = np.unique(whole[:, ~sharded], axis=1)
    assert distinct.shape[1] == np.count_nonzero(~sharded), "no candidate stands twice but where places coincide"


def all_of(base: Setting, where: Space) -> Iterator[Evaluation]:
    for _, found in evaluations(base, BATCH, candidates(base, BATCH, where)):
        yield found


@pytest.mark.parametrize("gib", [4.0, 5.0, 80.0])
def test_the_best_of_the_search_is_the_best_of_all(setting: MakeSetting, gib: float) -> None:
    base = setting(SMALL, seq_len=1024)
    where = space(16, gib * 2**30)
    found = search(base, BATCH, where)
    parts = list(all_of(base, where))
    step = np.concatenate([np.where(part.fits, part.step_time_s, np.inf) for part in parts])
    assert np.isfinite(step).any()
    assert found.distinct.step_time_s[0] == pytest.approx(step.min(), rel=1e-12)
    # Each distinct layout that stands within the search's reach is there with its own best.
    every = joined([part.layouts for part in parts])
    names = (*GROUP, "data")
    for index in range(min(20, len(found.distinct.layouts))):
        same = np.logical_and.reduce(
            [getattr(every, name) == getattr(found.distinct.layouts, name)[index] for name in names]
        )
        assert found.distinct.step_time_s[index] == pytest.approx(step[same].min(), rel=1e-12)
    assert (np.diff(found.distinct.step_time_s) >= 0).all()
    assert found.evaluated < 3 * len(step)


def test_what_is_close_holds_every_candidate_that_a_tenth_more_could_make_the_best(setting: MakeSetting) -> None:
    base = setting(SMALL, seq_len=1024)
    where = space(16, 4.0 * 2**30)
    found = search(base, BATCH, where)
    near = 0
    for part in all_of(base, where):
        near += np.count_nonzero(
            (part.step_time_s <= found.distinct.step_time_s[0] * WITHIN) & (part.memory_bytes <= 4.0 * 2**30 * WITHIN)
        )
    assert len(found.close) == near


def test_choices_that_are_stated_are_kept(setting: MakeSetting) -> None:
    base = setting(SMALL, seq_len=1024)
    found = search(base, BATCH, space(16, 80 * 2**30, tensor=(2,), zero_stage=(3,), recompute=(3,)))
    best = found.distinct.layouts
    assert (best.tensor == 2).all()
    assert (best.zero_stage == 3).all()
    assert (best.recompute == 3).all()


def test_where_nothing_fits_the_leanest_is_named(setting: MakeSetting) -> None:
    base = setting(SMALL, seq_len=1024)
    where = space(16, 1.0 * 2**30)
    found = search(base, BATCH, where)
    assert len(found.distinct.layouts) == 0
    least = min(part.memory_bytes.min() for part in all_of(base, replace(where, memory_limit=1e15)))
    assert found.least_memory.memory_bytes[0] == pytest.approx(least, rel=1e-9)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_no_point_of_the_front_is_beaten_and_every_other_point_is(points: list[tuple[int, int, int]]) -> None:
    front = pareto(*np.array(points, dtype=np.float64).T)
    for index, point in enumerate(points):
        beaten = any(all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points)
        assert front[index] == (not beaten)


def test_the_same_layouts_are_found_whatever_the_memory_allows_beside_them(setting: MakeSetting) -> None:
    """More memory never makes the best slower."""
    base = setting(SMALL, seq_len=1024)
    best = [search(base, BATCH, space(16, gib * 2**30)).distinct.step_time_s[:1] for gib in (4.0, 5.0, 8.0, 80.0)]
    times = [float(found[0]) for found in best if len(found)]
    assert times == sorted(times, reverse=True)
    assert evaluate(base, BATCH, layouts(data=16)).step_time_s[0] >= times[-1]
