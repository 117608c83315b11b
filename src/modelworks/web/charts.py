"""Line charts of a run's metrics, drawn by ECharts in the browser from data that the server hands over.

Colours are chosen to be read on light and on dark pages alike, since a canvas doesn't follow the theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ["#0d9488", "#6366f1", "#d97706", "#db2777", "#65a30d", "#0284c7", "#9333ea", "#b45309"]
_INK, _LINE = "#8a8c93", "rgba(128,128,128,.18)"
MOST_POINTS = 800
"""More points than pixels make a chart slow and no clearer."""


def options(series: Sequence[str], percent: bool = False) -> dict[str, Any]:
    """An empty chart with named lines over the steps of a run."""
    label = {"color": _INK, "fontSize": 11} | ({"formatter": "{value} %"} if percent else {})
    axis = {"axisLabel": label, "splitLine": {"lineStyle": {"color": _LINE}}}
    return {
        "animation": False,
        "color": COLOURS,
        "title": {
            "text": "Nothing measured yet",
            "left": "center",
            "top": "middle",
            "textStyle": {"color": _INK, "fontSize": 13, "fontWeight": "normal"},
        },
        "grid": {"left": 8, "right": 12, "top": 34 if len(series) > 1 else 14, "bottom": 6, "containLabel": True},
        "legend": {
            "show": len(series) > 1,
            "type": "scroll",
            "top": 0,
            "left": 0,
            "itemWidth": 14,
            "itemHeight": 8,
            "textStyle": {"color": _INK, "fontSize": 11},
        },
        "tooltip": {"trigger": "axis", "confine": True, "axisPointer": {"lineStyle": {"color": _INK}}},
        "xAxis": {
            "type": "value",
            "min": "dataMin",
            "max": "dataMax",
            "minInterval": 1,
            "axisLabel": {"color": _INK, "fontSize": 11, "hideOverlap": True},
            "axisLine": {"lineStyle": {"color": _LINE}},
            "splitLine": {"show": False},
        },
        "yAxis": {"type": "value", "scale": True, **axis},
        "series": [
            {"name": name, "type": "line", "showSymbol": False, "lineStyle": {"width": 1.8}, "data": []}
            for name in series
        ],
    }


def points(rows: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> list[list[float]]:
    """The (step, value) pairs of a metric, where it was logged; thinned to what a screen can show.

    Of a stretch of steps that share a pixel the mean is drawn, at the stretch's last step.
    """
    found = [
        (row["step"], row[key] * factor)
        for row in rows
        if isinstance(row.get(key), int | float) and row[key] is not None
    ]
    stretch = -(-len(found) // MOST_POINTS) or 1
    thinned = [found[start : start + stretch] for start in range(0, len(found), stretch)]
    return [[part[-1][0], _rounded(sum(value for _, value in part) / len(part))] for part in thinned]


def expert_load(rows: Sequence[Mapping[str, Any]], layer: int) -> list[list[float]]:
    """The (step, load) pairs of one layer with experts; 1 is an even load."""
    flat = [
        {"step": row["step"], "load": row["expert_load"][layer]}
        for row in rows
        if isinstance(row.get("expert_load"), list) and layer < len(row["expert_load"])
    ]
    return points(flat, "load")


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
