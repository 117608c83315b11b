"""The page Plan answers its sliders: in the process as its elements say, and in a browser as a person would see it."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("nicegui")

from nicegui import ui
from nicegui.testing import User
from nicegui.testing.user_simulation import user_simulation

from modelworks.assistant.chat import Assistant
from modelworks.assistant.store import ConversationStore
from modelworks.plan.layout import RECOMPUTE
from modelworks.plan.words import layout_name, percent, seconds
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.store import Store
from modelworks.spec.files import model_spec, run_from
from modelworks.web import plan as page
from modelworks.web.services import Services


@st.composite
def choices(draw: st.DrawFn) -> page.Choices:
    """Anything that can be set on the page."""
    model = draw(st.sampled_from(["grok-1", "llama-3.1-8b", "deepseek-v3", "smollm2-135m"]))
    cluster = draw(st.sampled_from(["colossus-100k", "h100-superpod"]))
    device = draw(st.sampled_from(page._devices(cluster)))
    degrees = {
        name: draw(st.sampled_from(values))
        for _, name, values in page._degree_values(model_spec(model))
        if draw(st.booleans())
    }
    return page.Choices(
        model=model,
        cluster=cluster,
        device=device,
        gpus=draw(st.sampled_from(page._counts(cluster))),
        seq_len=draw(st.sampled_from(page._LENGTHS)),
        global_batch=draw(st.sampled_from(page._BATCHES)),
        tokens=draw(st.sampled_from(page._TOKENS)),
        precision=draw(st.sampled_from(page._precisions(device))),
        recompute=draw(st.sampled_from([page.BEST, *RECOMPUTE])),
        degrees=degrees,
    )


@settings(max_examples=40)
@given(choices())
def test_whatever_is_chosen_is_answered_with_a_layout_or_with_the_reason_why_there_is_none(
    chosen: page.Choices,
) -> None:
    shown = page.answer(chosen)
    if shown.found is None or shown.found.best is None:
        assert 'class="notice"' in shown.headline
        assert shown.waterfall == ""
        return
    best = shown.found.best
    assert best.fits
    assert layout_name(best.layout) in shown.said
    assert seconds(best.step_time_s) in shown.said
    assert percent(best.mfu) in shown.said
    assert f">{100 * best.mfu:.1f}</td>" in shown.waterfall
    for name, value in chosen.degrees.items():
        assert best.layout[name] == value


def test_what_does_not_go_together_is_said_in_a_sentence() -> None:
    shown = page.answer(page.Choices(gpus=8, model="llama-3.1-405b"))
    assert "doesn&#x27;t fit 8 h100-sxm" in shown.headline
    assert "GiB too much" in shown.memory
    shown = page.answer(page.Choices(degrees={"tensor": 8, "pipeline": 64, "context": 4}, gpus=1024))
    assert "tensor 8 x pipeline 64 x context 4 = 2048" in shown.headline
    shown = page.answer(page.Choices(degrees={"tensor": 8, "pipeline": 1, "context": 1}, gpus=24, global_batch=64))
    assert "No layout of these degrees divides 24 GPUs and a global batch of 64" in shown.headline


def test_more_gpus_never_make_the_run_longer_along_the_slider() -> None:
    days = []
    for gpus in (256, 512, 1024, 2048, 4096):
        found = page.answer(page.Choices(gpus=gpus)).found
        assert found is not None
        assert found.best is not None
        days.append(found.best.step_time_s)
    assert days == sorted(days, reverse=True)


@pytest.fixture
async def user(home: Path) -> AsyncIterator[User]:
    store = Store()
    engine = LlamaCppEngine(store, EngineSettings(slots=1))
    assistant = Assistant(ConversationStore(home / "modelworks.db"), engine, {})
    async with user_simulation() as user:
        page.register(Services(store, engine, assistant))
        yield user
    await assistant.close()


async def answered(user: User, text: str) -> None:
    """Wait until the answer says a text."""
    for _ in range(200):
        if any(text in element.content for element in user.find(ui.html).elements):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"no answer says {text!r}")


def slider(user: User, title: str) -> ui.slider:
    return next(one for one in user.find(ui.slider).elements if one.props.get("aria-label") == title)


def select(user: User, title: str) -> ui.select:
    return next(one for one in user.find(ui.select).elements if one.props.get("label") == title)


async def test_a_slider_moves_the_answer(user: User) -> None:
    await user.open("/plan")
    await answered(user, "on 1,024 h100-sxm")
    gpus = slider(user, "GPUs")
    gpus.set_value(page._counts("colossus-100k").index(4096))
    await answered(user, "on 4,096 h100-sxm")
    slider(user, "Tensor parallel").set_value(1)
    slider(user, "Pipeline parallel").set_value(4)
    await answered(user, "<b>PP8 ")


async def test_another_model_brings_its_own_degrees_and_lengths(user: User) -> None:
    await user.open("/plan")
    await answered(user, "Training grok-1")
    slider(user, "Expert parallel").set_value(1)
    select(user, "Model").set_value("smollm2-135m")
    await answered(user, "Training smollm2-135m")
    assert not any(one.props.get("aria-label") == "Expert parallel" for one in user.find(ui.slider).elements)
    assert slider(user, "Sequence length").props["max"] == str(len(page._lengths("smollm2-135m")) - 1)


async def test_the_run_spec_that_is_handed_over_is_what_the_page_shows(user: User) -> None:
    await user.open("/plan")
    await answered(user, "on 1,024 h100-sxm")
    user.find("Run spec").click()
    response = await user.download.next()
    run = run_from(tomllib.loads(response.text))
    shown = page.answer(page.Choices()).found
    assert shown is not None
    assert shown.best is not None
    assert run.cluster.gpus == 1024
    for name in ("tensor", "pipeline", "context", "expert", "data", "virtual_stages", "recompute"):
        assert getattr(run.parallel, name) == shown.best.layout[name]
