"""Bar charts, line charts and pies. What is to be read stands on the axis or between two of its lines."""

from __future__ import annotations

from modelworks.data.pictures.drawing import Question, Sheet
from modelworks.data.pictures.words import SHORT, TITLES

_TOPS = (10, 20, 50, 100)
"""Where an axis ends; it has five lines, and values are tenths of it."""
_TICKS = 5


def bars(sheet: Sheet) -> list[Question]:
    """Two to four bars with a name each."""
    count = sheet.random.randint(2, 4)
    names, values, title = _drawn_axes(sheet, count)
    plot, places = _plot(sheet, names, title)
    left, top, right, bottom = plot
    share = sheet.random.uniform(0.5, 0.75)
    half = (right - left) / count * share / 2
    colors = sheet.colors(count) if sheet.random.random() < 0.5 else sheet.colors(1) * count
    scale = _axis(sheet, plot)
    said = [level * scale // 10 for level in values]
    for place, level, value, color in zip(places, values, said, colors, strict=True):
        end = round(bottom - (bottom - top) * level / 10)
        sheet.draw.rectangle((place - half, end, place + half, bottom), fill=color)
        sheet.note((place, end + 4), str(value))
    sheet.draw.line((left, bottom, right, bottom), fill=sheet.palette.ink)
    return [
        *_value_questions(names, said, "bar"),
        Question("count", "How many bars are there?", str(count)),
        *_title_question(title),
    ]


def lines(sheet: Sheet) -> list[Question]:
    """One line through three or four marked points with a name each."""
    count = sheet.random.randint(3, 4)
    names, values, title = _drawn_axes(sheet, count)
    plot, places = _plot(sheet, names, title)
    left, top, right, bottom = plot
    scale = _axis(sheet, plot)
    said = [level * scale // 10 for level in values]
    color = sheet.colors(1)[0]
    points = [(place, round(bottom - (bottom - top) * level / 10)) for place, level in zip(places, values, strict=True)]
    sheet.draw.line(points, fill=color, width=2)
    for (x, y), value in zip(points, said, strict=True):
        sheet.draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=color)
        sheet.note((x, y), str(value))
    sheet.draw.line((left, bottom, right, bottom), fill=sheet.palette.ink)
    at = sheet.random.randrange(count - 1)
    questions = [
        *_value_questions(names, said, "point"),
        *_title_question(title),
    ]
    if values[at] != values[at + 1]:
        answer = "up" if values[at + 1] > values[at] else "down"
        questions.append(Question("trend", f"Does the line go up or down from {names[at]} to {names[at + 1]}?", answer))
    return questions


def pie(sheet: Sheet) -> list[Question]:
    """Two to four sectors in tenths, with a legend."""
    count = sheet.random.randint(2, 4)
    names = sheet.random.sample(SHORT, count)
    cuts = sorted(sheet.random.sample(range(1, 10), count - 1))
    tenths = [after - before for before, after in zip([0, *cuts], [*cuts, 10], strict=True)]
    colors = sheet.colors(count)
    radius = sheet.height / 2 - 6
    middle = (radius + 6, sheet.height / 2)
    box = (middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius)
    start = -90
    for part, color in zip(tenths, colors, strict=True):
        sheet.draw.pieslice(box, start, start + part * 36, fill=color, outline=sheet.palette.paper)
        start += part * 36
    first = sheet.height / 2 - (count - 1) * 8
    for row, (name, color) in enumerate(zip(names, colors, strict=True)):
        y = first + row * 16
        sheet.draw.rectangle((sheet.width - 46, y - 5, sheet.width - 36, y + 5), fill=color)
        sheet.write((sheet.width - 31, y), name, 12)
    questions = [
        Question("share", f"How many percent is {name}?", str(part * 10))
        for name, part in zip(names, tenths, strict=True)
    ]
    return questions + _highest(names, tenths, "Which sector is the largest?")


def _drawn_axes(sheet: Sheet, count: int) -> tuple[list[str], list[int], str | None]:
    """Names, heights in tenths of the axis, and the title of some charts."""
    names = sheet.random.sample(SHORT, count)
    values = [sheet.random.randint(1, 10) for _ in range(count)]
    return names, values, sheet.random.choice(TITLES) if sheet.random.random() < 0.3 else None


def _plot(sheet: Sheet, names: list[str], title: str | None) -> tuple[tuple[int, int, int, int], list[float]]:
    """The area within the axes (left, top, right, bottom), and the middle of each name's place."""
    left, top = 24 + sheet.random.randint(0, 3), 6 if title is None else 16
    right, bottom = sheet.width - sheet.random.randint(2, 6), sheet.height - 15
    if title is not None:
        sheet.write(((left + right) / 2, 7), title, 11, "mm")
    step = (right - left) / len(names)
    places = [left + step * (number + 0.5) for number in range(len(names))]
    size = sheet.fitting(names, step - 2, sheet.random.choice((11, 12)))
    for place, name in zip(places, names, strict=True):
        sheet.write((place, sheet.height - 7), name, size, "mm")
    return (left, top, right, bottom), places


def _axis(sheet: Sheet, plot: tuple[int, int, int, int]) -> int:
    """Draw the lines of the axis with their numbers; returns where it ends."""
    left, top, right, bottom = plot
    end = sheet.random.choice(_TOPS)
    faint = sheet.random.random() < 0.8
    for tick in range(_TICKS + 1):
        y = round(bottom - (bottom - top) * tick / _TICKS)
        sheet.draw.line((left if faint else left - 3, y, right if faint else left, y), fill=sheet.palette.grid)
        sheet.write((left - 4, y), str(end * tick // _TICKS), 10, "rm")
    sheet.draw.line((left, top, left, bottom), fill=sheet.palette.ink)
    return end


def _value_questions(names: list[str], values: list[int], thing: str) -> list[Question]:
    asked = [
        Question("value", f"What is the value of {name}?", str(value))
        for name, value in zip(names, values, strict=True)
    ]
    return [
        *asked,
        *_highest(names, values, f"Which {thing} is the highest?"),
        Question("all", f"List each {thing}.", ", ".join(f"{n} {v}" for n, v in zip(names, values, strict=True))),
    ]


def _highest(names: list[str], values: list[int], text: str) -> list[Question]:
    """The question for the largest, where there is one."""
    if values.count(max(values)) > 1:
        return []
    return [Question("highest", text, names[max(range(len(values)), key=values.__getitem__)])]


def _title_question(title: str | None) -> list[Question]:
    return [] if title is None else [Question("title", "What is the title?", title)]
