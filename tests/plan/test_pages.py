"""A plan's pages say what the plan says: on 80 columns, as a page that stands alone, and side by side."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.plan import report
from modelworks.plan.page import (
    comparison_html,
    memory_markup,
    plan_html,
    waterfall_markup,
    write_comparison,
    write_plan,
)
from modelworks.plan.planner import LOSSES, Loss, Plan, plan
from modelworks.plan.scatter import scatter_html
from modelworks.plan.waterfall import MEANINGS, MEMORY_NAMES, largest_first
from modelworks.plan.words import duration, gib, layout_name, money, percent, seconds
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import run_from

from .markup import Balanced
from .markup import run as measured_run

CHROMIUM = Path("/usr/bin/chromium")


def plan_of(name: str = "eight-billion", gpus: int = 64, wide: bool = False, **parallel: object) -> Plan:
    values = {
        "name": name,
        "model": "llama-3.1-8b",
        "train": {"tokens": 10**12, "seq_len": 8192, "global_batch": 128},
        "cluster": {"preset": "h100-superpod", "gpus": gpus},
        "parallel": parallel,
    }
    return plan(run_from(values), wide=wide)


@pytest.fixture(scope="module")
def staged() -> Plan:
    """A plan with stages: memory by stage, alternatives, sensitivity."""
    return plan_of(pipeline=4, recompute="none", zero_stage=1)


@pytest.fixture(scope="module")
def wide() -> Plan:
    """A plan that was searched over fewer devices as well: it has a front."""
    return plan_of("wide", 32, wide=True, context=1, pipeline=1)


def printed(shown: RenderableType, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(shown)
    return stream.getvalue()


class Text(HTMLParser):
    """What a page says, its styles and scripts left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipping = tag in {"style", "script"}

    def handle_endtag(self, tag: str) -> None:
        self._skipping = False

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)

    @property
    def said(self) -> str:
        return " ".join(self.parts)


@st.composite
def waterfalls(draw: st.DrawFn) -> tuple[list[Loss], float]:
    weights = draw(st.lists(st.floats(0, 1), min_size=len(LOSSES) + 1, max_size=len(LOSSES) + 1).filter(any))
    shares = [weight / sum(weights) for weight in weights]
    losses = [Loss(name, words, share) for (name, words), share in zip(LOSSES.items(), shares[1:], strict=True)]
    return losses, shares[0]


@given(waterfalls())
def test_the_points_of_a_waterfall_add_up_to_the_peak_and_its_bars_follow_each_other(
    given_: tuple[list[Loss], float],
) -> None:
    losses, mfu = given_
    markup = waterfall_markup(losses, mfu)
    values = [float(text.replace("−", "-")) for text in re.findall(r'<td class="number">([^<]*)</td>', markup)]
    peak, *lost, achieved = values
    assert peak == 100
    assert peak + sum(lost) == pytest.approx(achieved, abs=0.05 * (len(values) + 1))
    bars = [(float(left), float(width)) for left, width in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", markup)]
    end = 100.0
    for left, width in bars[1:-1]:
        assert left + width == pytest.approx(end, abs=0.01)
        end = left
    assert bars[-1] == (0.0, pytest.approx(end, abs=0.02))


@given(waterfalls())
def test_small_losses_are_told_together_and_none_is_lost(given_: tuple[list[Loss], float]) -> None:
    losses, _ = given_
    told = largest_first(losses)
    assert sum(loss.share for loss in told) == pytest.approx(sum(loss.share for loss in losses))
    named = [loss for loss in told if loss.reason != "other"]
    assert [loss.share for loss in named] == sorted((loss.share for loss in named), reverse=True)


def test_every_loss_and_component_of_memory_has_its_words(staged: Plan) -> None:
    assert set(MEANINGS) == set(LOSSES) == set(staged.best.reasons)
    assert set(MEMORY_NAMES) == set(staged.best.memory)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_terminal_of_any_width_shows_the_plan_without_a_line_that_is_too_long(staged: Plan, width: int) -> None:
    text = printed(report.page(staged), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert f"{100 * staged.mfu:.1f}" in text


def test_the_terminal_says_the_answer_first_and_all_of_the_plans_numbers(staged: Plan) -> None:
    text = " ".join(printed(report.page(staged)).split())
    first = text[:600]
    for said in (
        layout_name(staged.best.layout), seconds(staged.step_time_s), percent(staged.mfu), duration(staged.run_time_s),
        money(staged.cost.rent_usd), gib(staged.memory_bytes), gib(staged.device.memory_bytes),
    ):  # fmt: skip
        assert said in first
    for component, held in staged.best.memory.items():
        if held:
            assert re.search(rf"{re.escape(MEMORY_NAMES[component])}\W.*?{re.escape(gib(held))}", text)
    for stage, held in staged.memory_by_stage.items():
        assert f"{stage} stage" in text
        assert gib(sum(held.values())) in text
    for other in staged.alternatives:
        assert percent(other.candidate.mfu) in text
    for row in staged.sensitivity:
        assert f"{row.resource} {percent(row.same_layout)} {percent(row.searched)}" in text


def test_losses_in_the_terminal_add_up_to_what_is_achieved(staged: Plan) -> None:
    text = printed(report.waterfall_table(staged.waterfall, staged.mfu), 100)
    values = [float(found[1]) for line in text.splitlines() if (found := re.search(r"([-+]?\d+\.\d)\s*$", line))]
    assert values[0] == 100
    assert sum(values[:-1]) == pytest.approx(values[-1], abs=0.05 * (len(values) + 1))
    assert values[-1] == pytest.approx(100 * staged.mfu, abs=0.05)


def test_the_page_is_well_formed_and_says_what_the_terminal_says(staged: Plan) -> None:
    page = plan_html(staged)
    Balanced(page)
    said = Text(page).said
    for word in (
        layout_name(staged.best.layout), seconds(staged.step_time_s), percent(staged.mfu), duration(staged.run_time_s),
        money(staged.cost.rent_usd), gib(staged.memory_bytes), staged.software.name,
    ):  # fmt: skip
        assert word in said
    for other in staged.alternatives:
        assert other.why in said
        assert layout_name(other.candidate.layout) in said
    for fact in staged.assumptions:
        assert fact.source in said
    assert page.count("data-sheet=") == 1 + len(staged.alternatives)
    assert page.count('" hidden>') == len(staged.alternatives)


def test_the_page_asks_no_network_for_anything(staged: Plan) -> None:
    page = plan_html(staged)
    assert not re.search(r"<(link|img|iframe)|\b(src|href)=\"(?!#)|url\(|@import|fetch\(", page)
    assert "default-src 'none'" in page


def test_a_front_of_time_and_devices_has_a_mark_for_each_of_its_points(wide: Plan) -> None:
    page = plan_html(wide)
    assert len(wide.frontier) > 1
    for point in wide.frontier:
        assert f'data-tip="{point.devices:,} devices: {duration(point.days * 86400)}' in page
    assert "Time against cost and devices" in printed(report.page(wide))


def test_plans_side_by_side_have_a_column_each(staged: Plan, wide: Plan) -> None:
    text = printed(report.comparison([staged, wide]))
    assert max(len(line) for line in text.splitlines()) <= 80
    achieved = re.search(r"achieved: MFU\s+([\d.]+)\s+([\d.]+)", text)
    assert achieved is not None
    assert [float(value) for value in achieved.groups()] == [
        pytest.approx(100 * one.mfu, abs=0.05) for one in (staged, wide)
    ]
    page = comparison_html([staged, wide])
    Balanced(page)
    assert Text(page).said.count(percent(staged.mfu)) >= 1


def test_a_name_from_a_file_is_text_on_every_page(staged: Plan) -> None:
    attack = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&[bold]"
    hostile = replace(staged, name=attack, notes=(attack,))
    for page in (plan_html(hostile), comparison_html([hostile, staged])):
        parsed = Balanced(page)
        assert parsed.seen.count("script") == 1
        assert "img" not in parsed.seen
        assert attack in Text(page).said
    assert "[bold]" in printed(report.page(hostile))
    assert "[bold]" in printed(report.comparison([hostile, staged]), 200)


def test_a_page_is_written_whole_or_not_at_all(staged: Plan, tmp_path: Path) -> None:
    write_plan(staged, tmp_path / "plan.html")
    write_comparison([staged, staged], tmp_path / "both.html")
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == plan_html(staged)
    with pytest.raises(OperationError, match="can't be written: Is a directory"):
        write_plan(staged, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.html", "plan.html"]


RUN = """
name = "{name}"
model = "smollm2-135m"
train = {{ tokens = 1_000_000_000, seq_len = 2048, global_batch = 64 }}
cluster = {{ preset = "h100-superpod", gpus = {gpus} }}
"""


def test_the_command_writes_the_page_and_names_the_file(tmp_path: Path) -> None:
    files = [tmp_path / "a.toml", tmp_path / "b.toml"]
    for file, gpus in zip(files, (8, 16), strict=True):
        file.write_text(RUN.format(name=f"on-{gpus}", gpus=gpus), encoding="utf-8")
    one, both = tmp_path / "one.html", tmp_path / "both.html"
    shown = CliRunner().invoke(app, ["plan", str(files[0]), "--html", str(one)])
    assert shown.exit_code == 0, shown.output
    assert str(one) in shown.output.replace("\n", "")
    assert "on-8: smollm2-135m on 8 × h100-sxm" in Text(one.read_text(encoding="utf-8")).said
    shown = CliRunner().invoke(app, ["plan", "--compare", *map(str, files), "--html", str(both)])
    assert shown.exit_code == 0, shown.output
    assert "achieved: MFU" in shown.output
    assert "on-8 · on-16" in Text(both.read_text(encoding="utf-8")).said
    refused = CliRunner().invoke(app, ["plan", "--budget", "1e6", "--html", str(one)])
    assert isinstance(refused.exception, InputError)


def test_memory_beyond_the_device_is_said_and_marked(staged: Plan) -> None:
    small = 0.5 * staged.memory_bytes
    markup = memory_markup(staged.best, small)
    assert f"{gib(staged.memory_bytes - small)} too much" in markup
    assert 'class="plan-stack over"' in markup
    stack = markup.split('class="plan-bars"')[0]
    widths = [float(width) for width in re.findall(r'<i style="width:([\d.]+)%', stack)]
    assert sum(widths) == pytest.approx(100, abs=0.01)
    assert "left:50.00%" in stack


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page's text as a file, without a network, and fails on what its console or its requests say."""
    context = browser.new_context(offline=True, viewport={"width": 390, "height": 800})
    troubles: list[str] = []

    def open_(text: str):
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or troubles.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_
    context.close()
    assert troubles == []


@pytest.mark.slow
@pytest.mark.browser
def test_in_a_browser_a_row_shows_its_layout_and_a_head_sorts(opened, staged: Plan) -> None:
    page = opened(plan_html(replace(staged, name="<script>alert(1)</script>")))
    assert page.title() == "<script>alert(1)</script>: plan"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shown = page.locator("[data-sheet]:not([hidden])")
    assert seconds(staged.step_time_s) in shown.inner_text()
    other = staged.alternatives[-1].candidate
    page.locator("tr[data-key]").last.click()
    assert shown.count() == 1
    assert seconds(other.step_time_s) in shown.inner_text()
    assert gib(other.memory_bytes) in shown.inner_text()
    head = page.get_by_role("button", name="Step", exact=True)
    head.click()
    head.click()
    column = page.locator("tr[data-key] td:nth-child(2)")
    values = [float(column.nth(row).get_attribute("data-value")) for row in range(column.count())]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    shown.locator("tr.loss").first.hover()
    page.wait_for_timeout(600)  # a tip goes when the page scrolls, and the click on the row scrolled it
    shown.locator("tr.loss").first.hover(position={"x": 9, "y": 9})
    assert "of the step" in page.locator(".plan-tip.shown").inner_text()


@pytest.mark.slow
@pytest.mark.browser
def test_in_a_browser_a_source_can_be_hidden_from_the_scatter(opened) -> None:
    page = opened(scatter_html([measured_run("one", 1.0, 1.1, "here"), measured_run("two", 2.0, 1.9, "there")]))
    there = page.locator('g[data-series="there"]')
    assert there.is_visible()
    page.get_by_role("button", name="there").click()
    assert not there.is_visible()
    page.locator('g[data-series="here"] use').hover()
    assert "error +10.0 %" in page.locator(".plan-tip.shown").inner_text()
