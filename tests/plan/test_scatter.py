"""The scatter plot shows every run where its two times put it, and takes no name for markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelworks.plan.scatter import scatter_html, scatter_svg, write_scatter
from modelworks.spec.errors import InputError, OperationError

from .markup import Balanced, run

SVG = "{http://www.w3.org/2000/svg}"


def marks(svg: str) -> list[tuple[float, float, str]]:
    """Marks in the series' groups: place from the left in per cent, from the top in pixels, and what is said."""
    return [
        (float(use.get("x", "").rstrip("%")), float(use.get("y", "")), use.findtext(f"{SVG}title") or "")
        for group in ET.fromstring(svg).iter(f"{SVG}g")
        if group.get("data-series")
        for use in group.iter(f"{SVG}use")
    ]


times = st.floats(1e-3, 1e4)


@example([(2862.0, 2819.0)])
@given(st.lists(st.tuples(times, times), min_size=1, max_size=12))
def test_marks_lie_above_the_diagonal_where_too_much_is_predicted_and_below_it_where_too_little(
    pairs: list[tuple[float, float]],
) -> None:
    found = marks(scatter_svg([run(f"r{i}", measured, predicted) for i, (measured, predicted) in enumerate(pairs)]))
    assert len(found) == len(pairs)
    diagonal = list(ET.fromstring(scatter_svg([run("r", *pairs[0])])).iter(f"{SVG}line"))[-3]
    left, right = float(diagonal.get("x1", "").rstrip("%")), float(diagonal.get("x2", "").rstrip("%"))
    low, high = float(diagonal.get("y1", "")), float(diagonal.get("y2", ""))
    for x, y, said in found:
        measured, predicted = pairs[int(re.match(r"r(\d+)", said)[1])]  # type: ignore[index]
        on_line = low + (x - left) / (right - left) * (high - low)
        if abs(predicted / measured - 1) > 0.02:
            assert (y < on_line) == (predicted > measured)
        else:
            assert y == pytest.approx(on_line, abs=12)


def test_the_page_is_well_formed_and_takes_a_name_from_a_file_as_text() -> None:
    attack = "</title><script>alert(1)</script>\"'&\x00"
    page = scatter_html([run(attack, 1.0, 2.0, source=attack), run(attack, 1.0, None)])
    parsed = Balanced(page)
    assert parsed.seen.count("script") == 1
    assert "alert(1)&lt;/script&gt;" in page
    ET.fromstring(scatter_svg([run(attack, 1.0, 2.0, source=attack)]))


def test_runs_that_could_not_be_represented_are_listed_with_the_reason() -> None:
    page = scatter_html([run("one", 1.0, 1.1), run("two", 1.0, None)])
    assert "2 measured runs, 1 of which couldn&#x27;t be represented" in page
    assert "<b>two</b> no such thing" in page


def test_a_plot_without_a_single_prediction_is_drawn_all_the_same() -> None:
    assert marks(scatter_svg([run("one", 1.0, None)])) == []
    Balanced(scatter_html([]))


def test_the_ending_of_the_file_decides_and_others_are_refused(tmp_path: Path) -> None:
    results = [run("one", 1.0, 1.1)]
    write_scatter(results, tmp_path / "plot.svg")
    write_scatter(results, tmp_path / "plot.html")
    ET.fromstring((tmp_path / "plot.svg").read_text(encoding="utf-8"))
    Balanced((tmp_path / "plot.html").read_text(encoding="utf-8"))
    with pytest.raises(InputError, match=r"plot\.png is not accepted: a file that ends in \.svg or \.html is"):
        write_scatter(results, tmp_path / "plot.png")
    with pytest.raises(OperationError, match="can't be written: No such file or directory"):
        write_scatter(results, tmp_path / "missing" / "plot.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.html", "plot.svg"]
