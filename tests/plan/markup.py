"""What tests of pages need: a parser that insists on well-formed markup, and measured runs to draw."""

from __future__ import annotations

from html.parser import HTMLParser

from modelworks.plan.accuracy import RunResult

VOID = {"meta", "br", "img", "link", "input", "hr"}


def run(run_id: str, measured: float, predicted: float | None, source: str = "source") -> RunResult:
    return RunResult(
        run_id=run_id,
        source=source,
        gpu="gpu",
        predicted_s=predicted,
        measured_s=measured,
        error=None if predicted is None else predicted / measured - 1,
        predicted_gib=None,
        measured_gib=None,
        filled=(),
        failure="no such thing" if predicted is None else None,
    )


class Balanced(HTMLParser):
    """A parser that insists that every element is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag
