"""Predictions against measurements, drawn: one mark for each run, on the diagonal where the planner was right.

`scatter_svg` is an image to stand in a document; `scatter_html` a page of its own, in which a mark says which run it
is, sources can be hidden and the runs stand in a table that can be sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelworks.plan.accuracy import RunResult, summary
from modelworks.plan.chart import Axis, Point, Rule, Series, axis_over, escaped, marker_colour, scatter
from modelworks.plan.document import document, table, write_whole
from modelworks.plan.words import percent, round_seconds, seconds
from modelworks.spec.errors import InputError

_HEAD = ("Run", "Source", "GPU", "Measured", "Predicted", "Error")
_BAND = 1.10
"""The dashed lines: ten per cent too much, ten per cent too little."""


def write_scatter(results: Sequence[RunResult], path: Path) -> None:
    """Write the scatter plot as the file's ending says, ``.svg`` or ``.html``.

    Raises
    ------
    InputError
        If the ending is another one.
    OperationError
        If the file can't be written.
    """
    makers = {".svg": scatter_svg, ".html": scatter_html}
    if path.suffix not in makers:
        raise InputError(f"--plot {path} is not accepted: a file that ends in .svg or .html is")
    write_whole(path, makers[path.suffix](results))


def scatter_svg(results: Sequence[RunResult]) -> str:
    """An SVG image of predicted against measured step times, on logarithmic axes, coloured by source."""
    return _drawing(results, image=True)


def scatter_html(results: Sequence[RunResult]) -> str:
    """A page with the same drawing, what each mark is, and all runs in a table, the worst first."""
    kept, failed = _predicted(results), [result for result in results if result.predicted_s is None]
    whole = summary(list(results))
    said = f"{len(results)} measured runs" + (f", {len(failed)} of which couldn't be represented" if failed else "")
    if whole.mape is not None and whole.bias is not None:
        said += f". Mean absolute error {percent(whole.mape)}, bias {percent(whole.bias, sign=True)}."
    legend = "".join(
        f'<button type="button" class="key" aria-pressed="true" data-toggles="{escaped(name)}">'
        f'<i style="background:{marker_colour(number)}"></i>{escaped(name)}</button>'
        for number, name in enumerate(_by_source(kept))
    )
    rows = sorted(kept, key=lambda result: -abs(result.error or 0.0))
    cells = [
        (
            escaped(result.run_id), escaped(result.source), escaped(result.gpu),
            (seconds(result.measured_s), result.measured_s),
            (seconds(result.predicted_s), result.predicted_s or 0.0),
            (percent(result.error or 0.0, sign=True), result.error or 0.0),
        )
        for result in rows
    ]  # fmt: skip
    body = [
        "<h1>Predicted against measured</h1>",
        f'<p class="lead">{escaped(said)} On the line the prediction is right; between the dashed ones it is less '
        "than 10 % off.</p>",
        f'<section class="panel"><div class="keys">{legend}</div>{_drawing(kept, image=False)}</section>',
        f'<section class="panel"><h2>Runs</h2>{table(_HEAD, cells)}</section>',
    ]
    if failed:
        items = "".join(
            f"<li><b>{escaped(result.run_id)}</b> {escaped(result.failure or '')}</li>" for result in failed
        )
        body.append(f'<section class="panel"><h2>Not represented</h2><ul>{items}</ul></section>')
    return document("Predicted against measured", "".join(body))


def _predicted(results: Sequence[RunResult]) -> list[RunResult]:
    return [result for result in results if result.predicted_s is not None]


def _by_source(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Runs by source, the largest source first, so that its marks lie below the others'."""
    sources: dict[str, list[RunResult]] = {}
    for result in results:
        sources.setdefault(result.source, []).append(result)
    return dict(sorted(sources.items(), key=lambda item: -len(item[1])))


def _drawing(results: Sequence[RunResult], image: bool) -> str:
    kept = _predicted(results)
    both = [time for result in kept for time in (result.measured_s, result.predicted_s) if time]
    ends = axis_over("", both, least_room=1.5)
    low, high = ends.low, ends.high
    series = []
    for source, runs in _by_source(kept).items():
        mape = summary(runs).mape
        name = source if not image or mape is None else f"{source}: {len(runs)} runs, {percent(mape)}"
        series.append(Series(name, [Point(run.measured_s, run.predicted_s or 0.0, _tip(run)) for run in runs]))
    rules = [
        Rule((low, low), (high, high), dashed=False),
        Rule((low, low * _BAND), (high / _BAND, high)),
        Rule((low * _BAND, low), (high, high / _BAND)),
    ]
    x = Axis("measured step time", low, high, round_seconds)
    y = Axis("predicted step time", low, high, round_seconds)
    return scatter(series, x, y, "Predicted against measured step times", 540, image, rules, identity="accuracy")


def _tip(run: RunResult) -> str:
    return (
        f"{run.run_id}\n{run.gpu}\nmeasured {seconds(run.measured_s)}, predicted {seconds(run.predicted_s)}\n"
        f"error {percent(run.error or 0.0, sign=True)}"
    )
