"""A model's Markdown is shown as it is meant, and can't do anything to the page."""

import html
import html.parser
import random

import pytest

from modelworks.web.markdown import render, split_stable


class Elements(html.parser.HTMLParser):
    """What a browser would find in a piece of HTML."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "hello <b onmouseover=alert(1)>you</b>",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](vbscript:x)",
    "![x](javascript:alert(1))",
    '![" onerror="alert(1)](https://example.org/x.png)',
    "[a](https://example.org/\"onmouseover='alert(1)')",
    "<svg/onload=alert(1)>",
    "<https://example.org/'onclick='alert(1)>",
    "<javascript:alert(1)>",
    '```"><img/src=x/onerror=alert(1)>\ncode\n```',
    "```html\n<img src=x onerror=alert(1)>\n```",
    "| a |\n|---|\n| <img src=x onerror=alert(1)> |",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "[x]: javascript:alert(1)\n\n[x]",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_markdown_becomes_no_active_element(source):
    page = Elements(render(source))
    for tag, attributes in page.found:
        assert tag not in {"script", "img", "svg", "iframe", "object", "embed", "style", "form", "b"}
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "https://").lower().startswith(("https://", "http://", "mailto:"))


def test_raw_html_is_shown_as_the_text_that_it_is():
    assert Elements(render("a <b>bold</b> claim")).text.strip() == "a <b>bold</b> claim"


def test_code_is_highlighted_and_its_text_unchanged():
    code = 'def f(x: int) -> str:\n    return "<b>" + str(x) & 1\n'
    page = Elements(render(f"```python\n{code}```"))
    assert code in page.text
    assert len([tag for tag, attributes in page.found if tag == "span" and attributes.get("class")]) > 5


def test_code_in_an_unknown_language_is_shown_plain():
    assert "x <- 1" in Elements(render("```nosuchlanguage\nx <- 1\n```")).text


def test_tables_lists_and_links_are_drawn():
    page = Elements(render("| a | b |\n|---|---|\n| 1 | 2 |\n\n1. one\n2. two\n\n[site](https://example.org)"))
    tags = [tag for tag, _ in page.found]
    assert tags.count("td") == 2
    assert tags.count("li") == 2
    assert [a["rel"] for tag, a in page.found if tag == "a"] == ["noopener noreferrer nofollow"]


LONG = r"""# Title

First paragraph with *emphasis*
over two lines.

- one

- two
  continued

    code in a list?

```python
x = 1

y = 2
```

$$
x

\[
y
- z
\]

> quote
> more

| a | b |
|---|---|
| 1 | 2 |

Last words."""


def test_blocks_drawn_one_by_one_look_like_the_whole():
    blocks, rest = split_stable(LONG)
    assert "".join(blocks) + rest == LONG
    assert len(blocks) >= 5
    assert "".join(render(part) for part in [*blocks, rest]) == render(LONG)


@pytest.mark.parametrize("seed", range(20))
def test_a_block_called_finished_stays_as_it_is_while_the_text_grows(seed):
    chance = random.Random(seed)
    finished: list[str] = []
    rest, position = "", 0
    while position < len(LONG):
        step = chance.randint(1, 9)
        rest += LONG[position : position + step]
        position += step
        blocks, rest = split_stable(rest)
        finished += blocks
    assert "".join(render(part) for part in [*finished, rest]) == render(LONG)


def formulas(source: str) -> list[tuple[str, bool]]:
    found = [attributes for _, attributes in Elements(render(source)).found if attributes.get("class") == "formula"]
    return [(attributes["data-tex"], "data-display" in attributes) for attributes in found]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("area $\\pi r^2$ here", [("\\pi r^2", False)]),
        ("so \\(a_1*b*c_2\\), then", [("a_1*b*c_2", False)]),
        ("in a line $$x<y$$ on", [("x<y", True)]),
        ("$$\na\n- b\n# c\n$$", [("a\n- b\n# c", True)]),
        ("\\[ 1 \\\\[2pt] 2 \\]\nmore", [("1 \\\\[2pt] 2", True)]),
        ("1. one\n\n   $$\n   x\n   $$\n2. two", [("x", True)]),
        ("> \\[\n> x\n> \\]", [("x", True)]),
        ("$a$, $b$ and $5", [("a", False), ("b", False)]),
        ("$\\$5 + x$", [("\\$5 + x", False)]),
    ],
)
def test_formulas_are_found_by_each_of_their_marks(source, expected):
    assert formulas(source) == expected


NO_FORMULAS = [
    "$5 and $10",
    "US$5, AU$7$",
    "\\$x\\$",
    "`$x$` and `\\(y\\)`",
    "```\n$$\nx\n$$\n```",
    "    $$x$$",
    "$a `b$ c`",
    "half of $x^2",
    "half of \\(x",
    "$$\nx +",
    "\\[\nx",
    "$$\nx\n\ny\n$$",
    "$$$$ and $ $",
]


@pytest.mark.parametrize("source", NO_FORMULAS)
def test_prices_code_and_half_written_formulas_stay_text(source):
    assert formulas(source) == []


def test_a_formulas_words_can_not_leave_its_attribute():
    page = Elements(render('$x"><img src=x onerror=alert(1)>$'))
    assert [tag for tag, _ in page.found] == ["p", "span"]
    assert page.found[1][1]["data-tex"] == 'x"><img src=x onerror=alert(1)>'


def test_a_formula_is_not_split_while_it_is_written():
    text = "Before.\n\n$$\na\n- b\n- c\n$$\n\nAfter."
    finished: list[str] = []
    rest = ""
    for letter in text:
        blocks, rest = split_stable(rest + letter)
        finished += blocks
    assert "".join(render(part) for part in [*finished, rest]) == render(text)


def test_a_diagram_is_one_when_its_fence_is_closed():
    for source, expected in (("```mermaid\na\n", 0), ("```mermaid\na\n```", 1), ("> ```mermaid\n> a\n> ```\nx", 1)):
        page = Elements(render(source))
        assert len([1 for _, a in page.found if "diagram" in (a.get("class") or "")]) == expected
        assert "a\n" in page.text
