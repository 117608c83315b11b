"""Pictures with questions: the same from the same index, two splits that share nothing, folders that are whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageColor
from typer.testing import CliRunner

from modelworks.cli import app
from modelworks.data.pictures import KINDS, picture, signs_in_squares, write_pictures
from modelworks.data.pictures.looks import PALETTES, TYPEFACES, Palette
from modelworks.spec.errors import InputError


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_had_by_its_index_alone(kind: str) -> None:
    before = picture(5, 1, kinds=(kind,))
    for index in (0, 9, 2):
        picture(index, 1, kinds=(kind,))
    assert picture(5, 1, kinds=(kind,)) == before
    others = [picture(6, 1, kinds=(kind,)), picture(5, 2, kinds=(kind,)), picture(5, 1, "held-out", (kind,))]
    assert all(other.image != before.image for other in others)
    assert before.image.width % 16 == before.image.height % 16 == 0


def test_the_splits_share_no_typeface_family_and_no_palette() -> None:
    packages = [{face.package for face in TYPEFACES[split]} for split in ("train", "held-out")]
    palettes = [{palette.series for palette in PALETTES[split]} for split in ("train", "held-out")]
    assert not packages[0] & packages[1]
    assert not palettes[0] & palettes[1]


@pytest.mark.parametrize("palette", [*PALETTES["train"], *PALETTES["held-out"]], ids=lambda palette: palette.name)
def test_ink_and_bars_stand_out_from_the_paper(palette: Palette) -> None:
    """By the contrast ratio of WCAG 2.1, which wants 4.5 for text; large shapes need less."""
    paper = _luminance(palette.paper)
    assert _contrast(paper, _luminance(palette.ink)) > 4.5
    assert all(_contrast(paper, _luminance(color)) > 2.5 for color in palette.series)


def test_a_bar_is_as_high_as_its_value_says() -> None:
    """Read back by counting pixels of the bar between the axis and its top."""
    for index in range(40):
        shown = picture(index, 3, kinds=("bars",))
        values = [int(question.answer) for question in shown.questions if question.about == "value"]
        palette = next(palette for palette in PALETTES["train"] if palette.name == shown.palette)
        colors = {ImageColor.getrgb(color) for color in palette.series}
        pixels = shown.image.load()
        heights = []
        for x in range(24, shown.image.width):
            column = [pixels[x, y] in colors for y in range(shown.image.height)]
            heights.append(sum(column))
        bars = [height for before, height in zip([0, *heights], heights, strict=False) if height and height != before]
        tallest = max(heights)
        for value in values:
            assert any(abs(height / tallest - value / max(values)) < 0.06 for height in bars), (index, values, bars)


def test_each_line_of_a_text_is_asked_for() -> None:
    """Counted by the rows of pixels that are nothing but paper."""
    for index in range(40):
        shown = picture(index, 3, kinds=("text",))
        palette = next(palette for palette in PALETTES["train"] if palette.name == shown.palette)
        paper = ImageColor.getrgb(palette.paper)
        width, height = shown.image.size
        inked = [any(shown.image.getpixel((x, y)) != paper for x in range(width)) for y in range(height)]
        lines = sum(here and not above for above, here in zip([False, *inked], inked, strict=False))
        asked = sorted(question.text for question in shown.questions)
        assert asked == [f"What does line {number} say?" for number in range(1, lines + 1)]


def test_answers_follow_from_one_another() -> None:
    for index in range(60):
        shown = picture(index, 4, kinds=("bars", "lines"))
        value = {q.text.split()[-1].rstrip("?"): int(q.answer) for q in shown.questions if q.about == "value"}
        for question in shown.questions:
            if question.about == "highest":
                assert Counter(value.values())[max(value.values())] == 1
                assert value[question.answer] == max(value.values())
            elif question.about == "all":
                assert {part.split()[0]: int(part.split()[1]) for part in question.answer.split(", ")} == value
    for index in range(30):
        shown = picture(index, 4, kinds=("receipt",))
        prices = [round(100 * float(q.answer)) for q in shown.questions if q.about == "price"]
        total = next(q.answer for q in shown.questions if q.about == "total")
        assert sum(prices) == round(100 * float(total))


def test_pictures_are_written_whole_and_go_on_after_a_stop(tmp_path: Path) -> None:
    whole = write_pictures(tmp_path / "whole", 12, seed=2, kinds=("bars", "text"))

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        write_pictures(out, 12, seed=2, kinds=("bars", "text"), progress=stop)
    assert not out.exists()
    with (tmp_path / "stopped.part" / "pictures.jsonl").open("a") as lines:
        lines.write('{"half')
    with pytest.raises(InputError, match="begun with other words"):
        write_pictures(out, 12, seed=3, kinds=("bars", "text"))
    told: list[int] = []
    assert write_pictures(out, 12, seed=2, kinds=("bars", "text"), progress=lambda n, of: told.append(n)) == whole
    assert told == [8, 9, 10, 11, 12]
    for path in (path for path in (tmp_path / "whole").rglob("*") if path.is_file()):
        assert (out / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_a_line_stands_sign_by_sign_in_the_squares_of_its_height() -> None:
    lines = whole = 0
    for index in range(60):
        shown = picture(index, 5, kinds=("text",))
        squares = signs_in_squares(shown, 12)
        rows = ["".join(sign or "" for sign in squares[12 * row : 12 * row + 12]) for row in range(12)]
        for number, line in enumerate(shown.written, 1):
            said = next(one.answer for one in shown.questions if f"line {number} " in one.text)
            middle = int(line.y * 12 / shown.drawn[1])
            stands = [row for row in rows[middle - 1 : middle + 2] if row]
            assert len(stands) in (1, 2)
            signs = iter(said.replace(" ", ""))
            assert all(sign in signs for sign in stands[0]), (stands[0], said)  # in their order
            lines, whole = lines + 1, whole + (stands[0] == said.replace(" ", ""))
    assert whole / lines > 0.9  # of three narrow letters in one square the last has no place


def test_the_value_of_a_bar_stands_at_its_upper_end_as_if_it_were_written_there() -> None:
    for index in range(20):
        shown = picture(index, 5, kinds=("bars",))
        values = {q.text.split()[-1].strip("?"): q.answer for q in shown.questions if q.about == "value"}
        names = [line for line in shown.written if line.text in values]
        assert [line.text for line in shown.meant] == [values[name.text] for name in names]
        for name, value in zip(names, shown.meant, strict=True):
            assert name.at[0] == value.at[0]
            (x, y), size, drawn = value.at, shown.image.size, shown.drawn
            above, below = (
                shown.image.getpixel((int(x * size[0] / drawn[0]), int((y + step) * size[1] / drawn[1])))
                for step in (-8, 0)
            )
            assert above != below
            signs, row, column = signs_in_squares(shown, 12), int(y * 12 / drawn[1]), int(x * 12 / drawn[0])
            near = [12 * (row + down) + column + right for down in (-1, 0, 1) for right in (-1, 0, 1)]
            assert any((signs[square] or "no sign") in value.text for square in near)


def test_where_a_sign_stands_there_is_ink() -> None:
    for kind in KINDS:
        shown = picture(3, 6, kinds=(kind,))
        width, height = shown.image.size
        side, pixels = 16, shown.image.load()
        for place, sign in enumerate(signs_in_squares(shown, side)):
            row, column = divmod(place, side)
            # A sign that had to make room stands one square to the right of its own.
            xs = range(max(0, column - 1) * width // side, (column + 1) * width // side)
            # Of small letters the row that is named beside the line's own may hold nothing.
            ys = range(max(0, row - 1) * height // side, min(side, row + 2) * height // side)
            assert not sign or len({pixels[x, y] for x in xs for y in ys}) > 1, (kind, row, column, sign)


def test_the_command_writes_conversations_with_the_picture_in_the_first_message(tmp_path: Path) -> None:
    out = tmp_path / "set"
    arguments = ["data", "pictures", str(out), "--count", "10", "--split", "held-out", "--json"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    entries = [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == [*KINDS, KINDS[0]]
    assert report["questions"] == sum(len(entry["about"]) for entry in entries)
    first = entries[0]["messages"]
    with Image.open(out / first[0]["content"][0]["image"]) as image:
        assert image.convert("RGB") == picture(0, 0, "held-out").image
    assert [message["role"] for message in first] == ["user", "assistant"] * len(entries[0]["about"])
    assert first[1]["content"] == picture(0, 0, "held-out").questions[0].answer


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kinds", "bars,maps"], "--kinds maps"),
        (["--kinds", "bars,bars"], "twice"),
        (["--split", "test"], "--split test"),
        (["--count", "0"], "--count 0"),
    ],
)
def test_words_that_cannot_be_used_are_named(tmp_path: Path, words: list[str], said: str) -> None:
    told = CliRunner().invoke(app, ["data", "pictures", str(tmp_path / "set"), *words])
    assert isinstance(told.exception, InputError)
    assert said in str(told.exception)
    assert not list(tmp_path.iterdir())


def _luminance(color: str) -> float:
    parts = [part / 255 for part in ImageColor.getrgb(color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
