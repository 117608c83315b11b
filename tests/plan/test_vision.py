"""A vision tower in the plan: counted by hand, on the first stage, and never cheaper with more to see."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from modelworks.plan.block import COMPONENTS, Setting
from modelworks.plan.emit import emit
from modelworks.plan.layout import layouts
from modelworks.plan.memory import MEMORY, stage_parameters
from modelworks.plan.pipeline import deal_layers
from modelworks.plan.planner import plan, setting_for, software_spec
from modelworks.plan.report import page
from modelworks.plan.step import REASONS, evaluate
from modelworks.plan.vision import tower_times
from modelworks.spec.errors import InputError
from modelworks.spec.files import cluster_spec, device_spec, loads_run, model_spec
from modelworks.spec.flops import vision_flop_per_sequence
from modelworks.spec.model import ModelSpec

from .ideal import RATE, Ideal

VISION = COMPONENTS.index("vision")


def seeing(images: int = 2, tiles: int = 5, **changed: Any) -> ModelSpec:
    model = model_spec("grok-1.5v")
    assert model.vision is not None
    vision = model.vision.model_copy(update={"images": images, "tiles": tiles} | changed)
    return model.model_copy(update={"vision": vision})


def ideal(setting: Setting) -> Setting:
    """The same on a device that multiplies at `RATE` and takes no time for anything else."""
    software = setting.software.model_copy(update={"launch_s": 0.0, "socket_skew_s": 0.0})
    calibration = setting.calibration.model_copy(
        update={"sustained": {}, "sustained_default": {"bf16": 1.0}, "attention_backward": 2.0}
    )
    fabric = replace(setting.fabric, kernels=Ideal())
    return replace(setting, kernels=Ideal(), fabric=fabric, software=software, calibration=calibration)


def test_the_towers_time_at_peak_is_that_of_its_flops(setting: Callable[..., Setting]) -> None:
    where = ideal(setting(seeing(), seq_len=8192))
    for batch in (1, 3):
        times = tower_times(where, layouts(micro_batch=batch))
        assert times is not None
        done = times.forward[VISION, 0] * RATE
        assert done == pytest.approx(batch * vision_flop_per_sequence(where.model), rel=1e-9)
        # Backward twice that, but for the pixels, which need no gradient.
        vision = where.model.vision
        assert vision is not None
        pixels = batch * vision.tiles_per_sequence * vision.patches * 2 * 588 * 1152
        assert times.backward[VISION, 0] * RATE == pytest.approx(2 * done - pixels, rel=1e-9)
        assert times.forward.sum() == times.forward[VISION].sum()


def test_tensor_parallelism_splits_the_tower_and_context_parallelism_repeats_it(
    setting: Callable[..., Setting],
) -> None:
    where = ideal(setting(seeing(), seq_len=8192))
    times = tower_times(where, layouts(tensor=np.array([1, 1]), context=np.array([1, 4])))
    assert times is not None
    assert times.forward[VISION, 0] == times.forward[VISION, 1]
    split = tower_times(where, layouts(tensor=np.array([1, 8])))
    assert split is not None
    # An eighth of the products, and an all-reduce behind each half of a layer and behind the connector.
    exchanges = 2 * (7 / 8) * 2.0 / 1e9 * 10 * (27 * 2 * 729 * 1152 + 81 * 6144)
    weights = vision_flop_per_sequence(where.model) - 10 * 729 * 2 * 588 * 1152
    products = (weights / 8 + 10 * 729 * 2 * 588 * 1152) / RATE
    overlapped = 1.0 - where.software.tensor_overlap_forward
    layers = exchanges * 27 * 2 * 729 * 1152 / (27 * 2 * 729 * 1152 + 81 * 6144)
    expected = products + overlapped * layers + (exchanges - layers)
    assert split.forward[VISION, 1] == pytest.approx(expected, rel=1e-6)


def test_the_first_stage_holds_the_tower_and_no_other(setting: Callable[..., Setting]) -> None:
    blind, eyes = setting("grok-1", seq_len=8192), setting(seeing(), seq_len=8192)
    c = layouts(tensor=np.array([1, 8, 8]), pipeline=np.array([8, 8, 1]), expert=8, data=8)
    stages = deal_layers(64, c)
    without = stage_parameters(blind.model, c, stages)
    found = stage_parameters(eyes.model, c, stages)
    added = eyes.model.parameters.vision
    assert found[0].plain[0] - without[0].plain[0] == pytest.approx(added)
    assert np.array_equal(found[1].plain, without[1].plain)
    assert np.array_equal(found[2].plain[:2], without[2].plain[:2])
    # Split in eight but for the embedding of patches, the positions and the norms.
    whole = (589 + 729) * 1152 + (27 * 2 + 1) * 2 * 1152
    assert found[0].plain[1] - without[0].plain[1] == pytest.approx(whole + (added - whole) / 8)
    assert found[2].plain[2] - without[2].plain[2] == pytest.approx(whole + (added - whole) / 8)


def test_activations_of_the_tower_are_korthikantis_count_for_its_shape(setting: Callable[..., Setting]) -> None:
    """arXiv:2205.05198, section 4: 34 s b h bytes a layer of 4 h feed-forward width with dropout, whose three masks
    (two of s b h, and none in flash attention) this software doesn't keep; here the width is 4304 and not 4 h."""
    one, two = (setting(seeing(images=images), seq_len=8192) for images in (1, 2))
    c = layouts(pipeline=8, expert=8, data=8, micro_batch=1)
    row = MEMORY.index("activations")
    kept = [evaluate(where, 512, c).memory[row, 0] for where in (one, two)]
    tokens = 5 * 729
    layer = tokens * 2 * (2 * 1152 + 2 * 1152 + 3 * 1152 + 1152 + 2 * 4304)
    ends = tokens * 2 * 2 * 1152 + 5 * 81 * 2 * 2 * 6144
    # 1F1B holds as many micro batches as there are stages.
    assert kept[1] - kept[0] == pytest.approx(8 * (27 * layer + ends), rel=1e-9)


@settings(max_examples=25)
@given(images=st.integers(1, 8), tiles=st.integers(1, 9), tensor=st.sampled_from([1, 2, 4, 8]))
def test_more_to_see_never_takes_less_and_the_parts_make_the_step(images: int, tiles: int, tensor: int) -> None:
    where = (cluster_spec("colossus-100k", 1024), device_spec("h100-sxm"), software_spec("megatron-core"))
    c = layouts(
        tensor=tensor, pipeline=np.array([1, 4, 8]), expert=8, data=8, recompute=np.array([0, 3, 1]), micro_batch=1
    )
    steps = []
    for model in (model_spec("grok-1"), seeing(images, tiles), seeing(images + 1, tiles)):
        found = evaluate(setting_for(model, 8192, *where), 512, c)
        assert found.reasons.sum(axis=0) == pytest.approx(found.step_time_s)
        steps.append(found)
    assert np.all(steps[0].step_time_s < steps[1].step_time_s)
    assert np.all(steps[1].step_time_s < steps[2].step_time_s)
    assert np.all(steps[1].memory_bytes >= steps[0].memory_bytes)
    assert np.all(steps[0].reasons[REASONS.index("vision")] == 0.0)
    assert np.all(steps[1].reasons[REASONS.index("vision"), 0] > 0.0)


def test_recomputing_the_decoder_recomputes_the_tower(setting: Callable[..., Setting]) -> None:
    where = ideal(setting(seeing(), seq_len=8192))
    times = tower_times(where, layouts())
    assert times is not None
    layers = 10 * (729 * 27 * (2 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * 1152 * 729))
    assert times.again[3, 0] * RATE == pytest.approx(layers, rel=1e-9)
    assert times.again[0, 0] == 0.0


RUN = """
model = "grok-1.5v"
[train]
seq_len = 8192
global_batch = 512
tokens = "1T"
[cluster]
preset = "colossus-100k"
gpus = 1024
"""


def test_a_plan_says_what_the_tower_takes() -> None:
    found = plan(loads_run(RUN))
    assert sum(loss.share for loss in found.waterfall) + found.mfu == pytest.approx(1.0)
    shares = {loss.reason: loss.share for loss in found.waterfall}
    assert shares["vision"] > 0
    (note,) = [note for note in found.notes if note.startswith("vision:")]
    assert "4 x 5 tiles a sequence make 1,620 of its 8,192 tokens" in note
    written = io.StringIO()
    Console(file=written, width=160).print(page(found))
    assert "the vision tower" in written.getvalue()
    assert "# not expressed: the vision tower" in emit(found.run, "megatron")


def test_more_images_than_a_sequence_holds_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"model\.vision\.images = 30 of 5 tiles make 12150 tokens, more than"):
        loads_run(RUN, ["model.vision.images=30"])


def test_a_tensor_degree_that_does_not_split_the_tower_is_refused() -> None:
    with pytest.raises(InputError, match=r"parallel\.tensor = 24 doesn't divide model.vision.heads = 16"):
        loads_run(RUN, ["parallel.tensor=24"])
