"""What is read as text: lines, tables, receipts, dialogs, and diagrams of steps."""

from __future__ import annotations

import itertools

from modelworks.data.pictures.drawing import Question, Sheet
from modelworks.data.pictures.words import (
    BUTTONS,
    COLUMNS,
    DIALOGS,
    FIELDS,
    GOODS,
    SHOPS,
    STEPS,
    WORDS,
    code,
    in_hundredths,
    line,
    price,
    scrap,
)


def text(sheet: Sheet) -> list[Question]:
    """Two or three lines of large print, one below another."""
    count = sheet.random.randint(2, 3)
    questions = []
    for number in range(1, count + 1):
        said = line(sheet.random)
        size = sheet.fitting([said], sheet.width - 8, sheet.random.randint(16, 21), 10)
        room = sheet.width - 5 - sheet.width_of(said, size)
        y = sheet.height / count * (number - 0.5) + sheet.random.randint(-1, 1)
        color = sheet.palette.ink if sheet.random.random() < 0.7 else sheet.colors(1)[0]
        sheet.write((2 + sheet.random.uniform(0, min(8.0, max(0.0, room))), y), said, size, color=color)
        questions.append(Question("text", f"What does line {number} say?", said))
    return questions


def page(sheet: Sheet) -> list[Question]:
    """Full of words, numbers and codes, line below line."""
    size = sheet.random.randint(14, 21)
    y, step = size * sheet.random.uniform(0.5, 1.0), size * sheet.random.uniform(1.05, 1.6)
    questions: list[Question] = []
    while y < sheet.height - size * 0.4:
        x = sheet.random.uniform(1, 10)
        said = scrap(sheet.random)
        while x + sheet.width_of(longer := f"{said} {scrap(sheet.random)}", size) < sheet.width:
            said = longer
        color = sheet.palette.ink if sheet.random.random() < 0.7 else sheet.colors(1)[0]
        sheet.write((x, y), said, size, color=color)
        questions.append(Question("text", f"What does line {len(questions) + 1} say?", said))
        y += step
    return questions


def table(sheet: Sheet) -> list[Question]:
    """Two or three columns of numbers behind one of names."""
    rows, columns = sheet.random.randint(2, 5), sheet.random.randint(2, 3)
    names = sheet.random.sample(GOODS, rows)
    heads = sheet.random.sample(COLUMNS, columns)
    cells = [[str(sheet.random.randint(1, 999)) for _ in heads] for _ in names]
    step, first = (sheet.width - 60) / columns, 16
    ruled = sheet.random.random() < 0.6
    for place, head in enumerate(heads):
        sheet.write((58 + step * (place + 1), 10), head, 11, "rm")
    sheet.draw.line((2, 18, sheet.width - 2, 18), fill=sheet.palette.ink)
    for row, name in enumerate(names):
        y = first + 12 + row * 16
        sheet.write((4, y), name, 12)
        for place, cell in enumerate(cells[row]):
            sheet.write((58 + step * (place + 1), y), cell, 12, "rm")
        if ruled:
            sheet.draw.line((2, y + 8, sheet.width - 2, y + 8), fill=sheet.palette.grid)
    return [
        Question("cell", f"What is the {head} of {name}?", cells[row][place])
        for row, name in enumerate(names)
        for place, head in enumerate(heads)
    ] + [Question("count", "How many rows are there?", str(rows))]


def receipt(sheet: Sheet) -> list[Question]:
    """A shop's name, a date, two to five goods with prices, and their sum."""
    count = sheet.random.randint(2, 5)
    shop, names = sheet.random.choice(SHOPS), sheet.random.sample(GOODS, count)
    amounts = [price(sheet.random) for _ in names]
    date = f"{sheet.random.randint(2015, 2029)}-{sheet.random.randint(1, 12):02}-{sheet.random.randint(1, 28):02}"
    total = in_hundredths(sum(amounts))
    right = sheet.width - 6
    sheet.write((sheet.width / 2, 12), shop, 14, "mm")
    sheet.write((sheet.width / 2, 28), date, 11, "mm")
    sheet.draw.line((6, 38, right, 38), fill=sheet.palette.grid)
    for row, (name, amount) in enumerate(zip(names, amounts, strict=True)):
        sheet.write((6, 48 + row * 16), name, 12)
        sheet.write((right, 48 + row * 16), in_hundredths(amount), 12, "rm")
    y = 48 + count * 16
    sheet.draw.line((6, y - 6, right, y - 6), fill=sheet.palette.ink)
    sheet.write((6, y + 5), "Total", 13)
    sheet.write((right, y + 5), total, 13, "rm")
    return [
        Question("total", "What is the total?", total),
        Question("shop", "What is the name of the shop?", shop),
        Question("date", "What is the date?", date),
        *(
            Question("price", f"What does {name} cost?", in_hundredths(amount))
            for name, amount in zip(names, amounts, strict=True)
        ),
    ]


def dialog(sheet: Sheet) -> list[Question]:
    """A window with a title, filled fields, a box to tick, and buttons."""
    title = sheet.random.choice(DIALOGS)
    fields = sheet.random.sample(FIELDS, sheet.random.randint(1, 2))
    filled = [code(sheet.random) if field in ("Code", "Phone") else sheet.random.choice(WORDS) for field in fields]
    buttons = sheet.random.sample(BUTTONS, 2)
    ticked = sheet.random.random() < 0.5
    color, palette = sheet.colors(1)[0], sheet.palette
    sheet.draw.rectangle((2, 2, sheet.width - 3, sheet.height - 3), outline=palette.ink)
    sheet.draw.rectangle((2, 2, sheet.width - 3, 20), fill=color)
    sheet.write((8, 11), title, 13, color=palette.paper)
    for row, (field, content) in enumerate(zip(fields, filled, strict=True)):
        y = 34 + row * 22
        sheet.write((8, y), field, 12)
        sheet.draw.rectangle((56, y - 9, sheet.width - 10, y + 9), outline=palette.grid)
        sheet.write((60, y), content, 12)
    y = 78
    sheet.draw.rectangle((8, y - 5, 18, y + 5), outline=palette.ink)
    if ticked:
        sheet.draw.line((10, y, 12, y + 3, 17, y - 4), fill=palette.ink, width=2)
    sheet.write((24, y), "Remember", 12)
    for place, button in enumerate(buttons):
        left = sheet.width - 124 + place * 60
        sheet.draw.rectangle((left, 94, left + 54, 112), outline=palette.ink, fill=color if place else None)
        sheet.write((left + 27, 103), button, 12, "mm", palette.paper if place else None)
    return [
        Question("title", "What is the title of the window?", title),
        *(
            Question("field", f"What is in the field {field}?", content)
            for field, content in zip(fields, filled, strict=True)
        ),
        Question("box", "Is Remember ticked?", "yes" if ticked else "no"),
        Question("button", "What does the filled button say?", buttons[1]),
    ]


def flow(sheet: Sheet) -> list[Question]:
    """Three or four steps in a row or a column; the arrows between them go either way."""
    names = sheet.random.sample(STEPS, sheet.random.randint(3, 4))
    upwards = sheet.random.random() < 0.5
    order = names[::-1] if upwards else names
    step = (sheet.height - 8) / len(names)
    left, right = sheet.width / 2 - 34, sheet.width / 2 + 34
    rounded = sheet.random.choice((0, 6))
    for row, name in enumerate(order):
        y = 4 + step * row
        end = y + step - 14
        sheet.draw.rounded_rectangle((left, y, right, end), rounded, outline=sheet.palette.ink)
        sheet.write((sheet.width / 2, (y + end) / 2), name, 13, "mm")
        if row + 1 < len(order):
            _arrow(sheet, sheet.width / 2, *((end + 14, end) if upwards else (end, end + 14)))
    return [
        Question("first", "Which step is the first?", names[0]),
        Question("last", "Which step is the last?", names[-1]),
        *(Question("next", f"Which step comes after {before}?", after) for before, after in itertools.pairwise(names)),
    ]


def _arrow(sheet: Sheet, x: float, begin: float, end: float) -> None:
    """An arrow along a column."""
    back = end + (5 if begin > end else -5)
    sheet.draw.line((x, begin, x, back), fill=sheet.palette.ink, width=2)
    sheet.draw.polygon(((x - 5, back), (x + 5, back), (x, end)), fill=sheet.palette.ink)
