"""The page that plans: a model, machines and a batch are chosen with sliders, and the plan answers while they move.

Each change asks `plan.live` in a thread; changes that come while it answers are answered together, by the last one.
What it found is near the best. The full search is a button away, as a page to keep; so is the run spec to train with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request
from nicegui import background_tasks, ui

from modelworks.plan import page as markup
from modelworks.plan.chart import escaped
from modelworks.plan.layout import RECOMPUTE
from modelworks.plan.live import Quick, quick, sizes
from modelworks.plan.planner import Candidate, candidate, plan, resolved, waterfall, why_slower
from modelworks.plan.words import (
    count,
    duration,
    gib,
    layout_details,
    layout_name,
    layout_sentence,
    money,
    percent,
    seconds,
)
from modelworks.spec import catalog
from modelworks.spec.errors import InputError
from modelworks.spec.files import cluster_spec, device_spec, dumps, model_spec, run_from
from modelworks.spec.model import ModelSpec
from modelworks.spec.run import RunSpec
from modelworks.web.frame import frame
from modelworks.web.services import Services

BEST = "best"
_SIZES = sorted({*(2**n for n in range(18)), *(3 * 2**n for n in range(16)), 100_000})
_BATCHES = [2**n for n in range(15)]
_LENGTHS = [2**n for n in range(9, 21)]
_TOKENS = [digit * 10**zeros for zeros in range(8, 14) for digit in (1, 2, 5)]
_ROW_KEY = """(event) => {
  const row = event.target.closest("tr[data-key]");
  if (row) emit(row.dataset.key);
}"""
_SHOWN = 6
"""Layouts in the table."""


def register(services: Services) -> None:
    """Add the page ``/plan``."""

    @ui.page("/plan")
    def plan_page(request: Request) -> None:
        with frame(request, services, "/plan", "Plan") as side:
            with side.bar:
                ui.html("<h1>Plan</h1>")
            PlanPage()


@dataclass(frozen=True)
class Choices:
    """What is asked, in the page's terms."""

    model: str = "grok-1"
    cluster: str = "colossus-100k"
    device: str = "h100-sxm"
    gpus: int = 1024
    seq_len: int = 8192
    global_batch: int = 1024
    tokens: int = 2 * 10**12
    precision: str = "bf16"
    recompute: str = BEST
    degrees: dict[str, int] = field(default_factory=dict)
    """By the spec's field; those that aren't in it are the planner's."""

    def run(self) -> RunSpec:
        """The run spec of these choices.

        Raises
        ------
        InputError
            If they don't go together, saying why.
        """
        parallel: dict[str, Any] = {name: value for name, value in self.degrees.items() if name != "micro_batch"}
        if self.recompute != BEST:
            parallel["recompute"] = self.recompute
        train: dict[str, Any] = {
            "tokens": self.tokens,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "precision": self.precision,
            "micro_batch": self.degrees.get("micro_batch", "auto"),
        }
        values = {
            "name": self.model,
            "model": {"preset": self.model},
            "train": train,
            "cluster": {"preset": self.cluster, "device": self.device, "gpus": self.gpus},
            "parallel": parallel,
        }
        return run_from(values, where="plan")


@dataclass(frozen=True)
class Answer:
    """Markup of what is shown, by place."""

    headline: str
    said: str = ""
    waterfall: str = ""
    memory: str = ""
    layouts: str = ""
    front: str = ""
    found: Quick | None = None


def answer(choices: Choices) -> Answer:
    """Find a layout and set it out."""
    try:
        found = quick(choices.run())
    except InputError as error:
        return Answer(f'<p class="notice">{escaped(str(error).removeprefix("plan: "))}</p>')
    best = found.best
    if best is None:
        return _refusal(choices, found)
    front, beaten = sizes(found)
    model, seq_len = found.run.model, choices.seq_len
    return Answer(
        headline=_headline(choices, found, best),
        said=_said(found, best),
        waterfall=markup.waterfall_markup(waterfall(model, seq_len, best), best.mfu),
        memory=markup.memory_markup(best, found.device.memory_bytes),
        layouts=markup.layouts_table(_next_best(found)),
        front=markup.frontier_markup(front, beaten, choose=False),
        found=found,
    )


def _headline(choices: Choices, found: Quick, best: Candidate) -> str:
    devices = int(found.distinct.layouts.devices[0])
    whole, cost = found.seconds(best.step_time_s), found.cost(devices, best.step_time_s)
    spent = f" and costs {money(cost.rent_usd)} to rent" if cost.rent_usd is not None else ""
    text = (
        f"Training {choices.model} on {count(choices.tokens)} tokens takes {duration(whole)}{spent}, on {devices:,} "
        f"{found.device.name}."
    )
    if devices < choices.gpus:
        text += f" {choices.gpus - devices:,} stay idle."
    return f'<p class="headline">{escaped(text)}</p>'


def _said(found: Quick, best: Candidate) -> str:
    devices = int(found.distinct.layouts.devices[0])
    cost = found.cost(devices, best.step_time_s)
    full = " The memory is nearly full." if best.memory_bytes > 0.95 * found.device.memory_bytes else ""
    figures = [
        (seconds(best.step_time_s), "a step"),
        (percent(best.mfu), "MFU"),
        (f"{count(best.tokens_per_s)}", "tokens a second"),
        (gib(best.memory_bytes), f"of {gib(found.device.memory_bytes)} a device"),
        (f"{cost.device_hours:,.0f}", "GPU hours"),
        (f"{cost.power_w / 1e6:,.3g} MW", "power while it runs"),
    ]
    return (
        f'<p class="lead"><b>{escaped(layout_name(best.layout))}</b>. {escaped(layout_sentence(best.layout))} '
        f"In {escaped(layout_details(best.layout))}.{full}</p>{markup.figures(figures)}"
    )


def _refusal(choices: Choices, found: Quick) -> Answer:
    if found.leanest is None:
        text = (
            f"No layout of these degrees divides {choices.gpus:,} GPUs and a global batch of {choices.global_batch:,}: "
            "set a degree to best, or take another number of GPUs or a larger batch."
        )
        return Answer(f'<p class="notice">{escaped(text)}</p>', found=found)
    leanest, capacity = found.leanest, found.device.memory_bytes
    text = (
        f"{choices.model} doesn't fit {choices.gpus:,} {found.device.name} in {found.tried:,} layouts tried: the "
        f"leanest, {layout_name(leanest.layout)}, needs {gib(leanest.memory_bytes)} of {gib(capacity)} a device. Take "
        "more GPUs, more recomputation, or set a degree to best."
    )
    return Answer(
        f'<p class="notice">{escaped(text)}</p>',
        memory=markup.memory_markup(leanest, capacity),
        found=found,
    )


def _shown(found: Quick) -> list[Candidate]:
    """The layouts of the table, fastest first."""
    return [candidate(found.distinct, index) for index in range(min(_SHOWN, len(found.distinct.layouts)))]


def _next_best(found: Quick) -> list[tuple[Candidate, str]]:
    best, *others = _shown(found)
    return [(best, "the best found"), *((other, why_slower(best, other)) for other in others)]


class PlanPage:
    """The controls, and the answer to them."""

    def __init__(self) -> None:
        self._choices = Choices()
        self._asked, self._answered, self._busy = 1, 0, False
        self._found: Quick | None = None
        with ui.element("div").classes("sheet plan wide"):
            self._headline = _place("plan-headline")
            with ui.element("section").classes("panel answer"):
                self._said = _place("")
                with ui.element("div").classes("row-line"):
                    self._spec = ui.button("Run spec", icon="download", on_click=self._download_spec)
                    self._full = ui.button("Search every layout", icon="travel_explore", on_click=self._search_all)
                    for button in (self._spec, self._full):
                        button.props("flat no-caps dense padding='4px 12px'").classes("quiet")
            with ui.element("div").classes("plan-split"):
                with ui.element("div").classes("panel controls"):
                    self._controls()
                with ui.element("div").classes("results"):
                    with ui.element("div").classes("columns uneven"):
                        self._waterfall = _panel("From peak to achieved, in points of MFU")
                        self._memory = _panel("Memory of the fullest stage's devices")
                    self._front = _panel("Fewer and more GPUs")
                    self._layouts = _panel("Next-best layouts, and why they lose", "A row sets the degrees to its own.")
                    self._layouts.on("click", self._take, js_handler=_ROW_KEY)
            ui.html(
                '<p class="lead">These answers come from a thinned set of layouts, so that they follow the sliders. '
                "<b>Search every layout</b> leaves none out, and hands over a page with sensitivity, sources "
                "and what is assumed.</p>"
            )
        background_tasks.create(self._answer())

    # --- controls -----------------------------------------------------------------------------------------------------

    def _controls(self) -> None:
        self._select("Model", "model", catalog.names("models"), self._model_changed)
        clusters = [name for name in catalog.names("clusters") if name != "local"]
        self._select("Cluster", "cluster", clusters, self._cluster_changed)
        self._device = self._select("GPU", "device", _devices(self._choices.cluster), self._device_changed)
        self._gpus = self._slider("GPUs", "gpus", _counts(self._choices.cluster), "{:,}".format)
        self._length = self._slider("Sequence length", "seq_len", _lengths(self._choices.model), "{:,}".format)
        self._slider("Global batch", "global_batch", _BATCHES, "{:,}".format)
        self._slider("Tokens to train on", "tokens", _TOKENS, count)
        self._precision = self._select("Precision", "precision", _precisions(self._choices.device))
        self._select("Recomputation", "recompute", [BEST, *RECOMPUTE])
        ui.html("<h3>Degrees</h3>")
        self._degree_place = ui.element("div").classes("degrees")
        self._degrees()

    def _select(
        self, title: str, name: str, options: Sequence[str], then: Callable[[], None] | None = None
    ) -> ui.select:
        def changed(event: Any) -> None:
            self._set(**{name: event.value})
            if then is not None:
                then()

        return (
            ui.select(list(options), label=title, value=getattr(self._choices, name), on_change=changed)
            .props("dense outlined options-dense")
            .classes("wide-field")
        )

    def _slider(self, title: str, name: str, values: Sequence[int], say: Callable[[int], str]) -> _Slider:
        return _Slider(title, values, getattr(self._choices, name), say, lambda value: self._set(**{name: value}))

    def _degrees(self) -> None:
        """Draw the sliders of the degrees anew: which there are depends on the model."""
        self._degree_place.clear()
        with self._degree_place:
            self._degree_sliders = {
                name: _Slider(title, [0, *values], 0, lambda value: f"{value:,}" if value else BEST, self._degree(name))
                for title, name, values in _degree_values(model_spec(self._choices.model))
            }

    def _degree(self, name: str) -> Callable[[int], None]:
        def changed(value: int) -> None:
            kept = {key: degree for key, degree in self._choices.degrees.items() if key != name}
            self._set(degrees=kept | ({name: value} if value else {}))

        return changed

    def _model_changed(self) -> None:
        self._set(degrees={})
        self._length.offer(_lengths(self._choices.model))
        self._degrees()

    def _cluster_changed(self) -> None:
        own = cluster_spec(self._choices.cluster).device
        self._gpus.offer(_counts(self._choices.cluster))
        self._device.set_options(_devices(self._choices.cluster), value=own)

    def _device_changed(self) -> None:
        offered = _precisions(self._choices.device)
        chosen = self._choices.precision if self._choices.precision in offered else offered[0]
        self._precision.set_options(offered, value=chosen)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _set(self, **changes: Any) -> None:
        changed = replace(self._choices, **changes)
        if changed == self._choices:
            return
        self._choices = changed
        self._asked += 1
        if not self._busy:
            background_tasks.create(self._answer())

    async def _answer(self) -> None:
        """Answer the choices as they stand, until they stand still."""
        if self._busy:
            return
        self._busy = True
        try:
            while self._answered != self._asked:
                asked = self._asked
                self._draw(await asyncio.to_thread(answer, self._choices))
                self._answered = asked
        finally:
            self._busy = False

    def _draw(self, shown: Answer) -> None:
        self._found = shown.found
        self._headline.set_content(shown.headline)
        self._said.set_content(shown.said)
        for place, content in (
            (self._waterfall, shown.waterfall),
            (self._memory, shown.memory),
            (self._layouts, shown.layouts),
            (self._front, shown.front),
        ):
            place.set_content(content)
            place.parent_slot.parent.set_visibility(bool(content))  # type: ignore[union-attr]
        self._spec.set_enabled(shown.found is not None and shown.found.best is not None)

    async def _search_all(self) -> None:
        self._full.props("loading")
        try:
            made = await asyncio.to_thread(lambda: plan(self._choices.run()))
        except InputError as error:
            ui.notify(str(error), position="top", type="warning", multi_line=True)
        else:
            ui.download.content(markup.plan_html(made).encode(), f"{made.name}-plan.html", "text/html")
        finally:
            self._full.props(remove="loading")

    def _take(self, event: Any) -> None:
        """Set the degrees to those of the layout whose row was clicked."""
        if self._found is None:
            return
        for one in _shown(self._found):
            if markup.layout_key(one) == event.args:
                for name, slider in self._degree_sliders.items():
                    slider.choose(one.layout[name])

    def _download_spec(self) -> None:
        found = self._found
        if found is None or found.best is None:
            return
        devices = int(found.distinct.layouts.devices[0])
        run = resolved(found.run, found.best.layout, devices, found.setting.software.name)
        ui.download.content(dumps(run).encode(), f"{run.name}.toml", "application/toml")


class _Slider:
    """A slider over the places of a list, with its value in words."""

    def __init__(
        self, title: str, values: Sequence[int], value: int, say: Callable[[int], str], then: Callable[[int], None]
    ) -> None:
        self._values, self._say, self._then = list(values), say, then
        place = _nearest(self._values, value)
        with ui.element("div").classes("plan-slider"):
            with ui.element("div").classes("row-line"):
                ui.label(title)
                ui.space()
                self._label = ui.label(say(self._values[place])).classes("value")
            self._slider = ui.slider(min=0, max=len(self._values) - 1, step=1, value=place, on_change=self._moved)
            self._slider.props(f'dense aria-label="{title}"')
            self._tell(self._values[place])

    def offer(self, values: Sequence[int]) -> None:
        """Offer other values, the nearest to the present one chosen."""
        now = self._values[int(self._slider.value)]
        self._values = list(values)
        place = _nearest(self._values, now)
        self._slider.props(f"max={len(self._values) - 1}")
        self._slider.set_value(place)
        self._tell(self._values[place])
        self._then(self._values[place])

    def choose(self, value: int) -> None:
        """Move to a value, or to the nearest one there is."""
        self._slider.set_value(_nearest(self._values, value))

    def _moved(self, event: Any) -> None:
        value = self._values[min(int(event.value), len(self._values) - 1)]
        self._tell(value)
        self._then(value)

    def _tell(self, value: int) -> None:
        """Say the value, also to those who don't see it."""
        self._label.set_text(self._say(value))
        self._slider.props(f'aria-valuetext="{self._say(value)}"')


def _nearest(values: Sequence[int], value: int) -> int:
    return min(range(len(values)), key=lambda place: abs(values[place] - value))


def _place(classes: str) -> ui.html:
    return ui.html("", sanitize=False, tag="div").classes(classes)


def _panel(title: str, hint: str = "") -> ui.html:
    with ui.element("section").classes("panel"):
        ui.html(f"<h2>{escaped(title)}</h2>", sanitize=False)
        if hint:
            ui.label(hint).classes("hint")
        return _place("")


def _devices(cluster: str) -> list[str]:
    """The GPUs that may stand in a cluster's nodes: its own, and those that no cluster of another kind is built of."""
    own = cluster_spec(cluster)
    elsewhere = {
        other.device
        for other in map(cluster_spec, catalog.names("clusters"))
        if other.scale_up_domain != own.scale_up_domain
    }
    names = [name for name in catalog.names("hardware") if device_spec(name).kind == "gpu"]
    return [name for name in names if name == own.device or name not in elsewhere]


def _counts(cluster: str) -> list[int]:
    """Numbers of GPUs that fill a cluster's nodes."""
    node = cluster_spec(cluster).gpus_per_node
    return [size for size in _SIZES if size % node == 0 or size < node]


def _lengths(model: str) -> list[int]:
    """Sequence lengths up to a model's context."""
    context = model_spec(model).context
    return [length for length in _LENGTHS if length <= context] or [context]


def _precisions(device: str) -> list[str]:
    rates = device_spec(device).peak_flops
    return [name for name in ("bf16", "fp8", "fp32") if name in rates]


def _degree_values(model: ModelSpec) -> list[tuple[str, str, list[int]]]:
    """The degrees that may be stated for a model: their titles, fields and values."""
    powers = [2**n for n in range(8)]
    stages = sorted({p for p in range(1, 65) if model.layers % p == 0} | {p for p in powers if p <= model.layers})
    found = [
        ("Tensor parallel", "tensor", [p for p in powers if model.heads % p == 0 and p <= 64]),
        ("Pipeline parallel", "pipeline", stages),
        ("Context parallel", "context", powers[:6]),
    ]
    if model.moe is not None:
        found.append(("Expert parallel", "expert", [e for e in range(1, 257) if model.moe.experts % e == 0]))
    return [*found, ("Micro batch", "micro_batch", powers[:6])]
