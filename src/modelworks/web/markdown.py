"""Markdown that a model wrote, as HTML that is safe to show.

A model's words are a stranger's words. Raw HTML in them is shown as text and never parsed, links go only to http,
https and mailto, and images aren't fetched (an address in an answer could carry the conversation away). What comes out
is cleaned once more in the browser, by DOMPurify. Formulas and diagrams leave here as text: the browser draws them.
"""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape
from itertools import pairwise
from typing import Any

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from modelworks.web.formulas import GROWING, add_formulas
from modelworks.web.language import say

_FORMATTER = HtmlFormatter(nowrap=True)
_ALLOWED_LINK = re.compile(r"^(https?://|mailto:)", re.IGNORECASE)


def render(text: str) -> str:
    """Markdown (CommonMark with tables and strikethrough) as HTML."""
    return str(_parser().render(text))


def split_stable(text: str) -> tuple[list[str], str]:
    """What of a growing text won't change any more, and its last block, which may.

    Returns
    -------
    tuple
        Sources of finished top-level blocks, and the source of the last one. Joined they are `text`.
    """
    tokens = _parser().parse(text, {GROWING: True})
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]
    if len(starts) < 2:
        return [], text
    lines = text.splitlines(keepends=True)
    bounds = [0, *starts[1:], len(lines)]
    blocks = ["".join(lines[start:end]) for start, end in pairwise(bounds)]
    return blocks[:-1], blocks[-1]


def code_styles() -> str:
    """The style sheet of highlighted code, for light and for dark pages."""
    light: Any = HtmlFormatter(style="xcode", nobackground=True)
    dark: Any = HtmlFormatter(style="github-dark", nobackground=True)
    shared = f"@media (prefers-color-scheme: dark) {{ {dark.get_style_defs('body.shared .code')} }}"
    return f"{light.get_style_defs('.code')}\n{dark.get_style_defs('.body--dark .code')}\n{shared}\n"


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable(["table", "strikethrough"])
    parser.validateLink = lambda url: bool(_ALLOWED_LINK.match(url.strip()))  # type: ignore[method-assign]
    add_formulas(parser)
    parser.add_render_rule("fence", _fence)
    parser.add_render_rule("code_block", _fence)
    parser.add_render_rule("image", _image)
    parser.add_render_rule("link_open", _link)
    parser.add_render_rule("table_open", lambda *_: '<div class="table" tabindex="0"><table>')
    parser.add_render_rule("table_close", lambda *_: "</table></div>")
    return parser


def _fence(_renderer: Any, tokens: Any, index: int, _options: Any, _env: Any) -> str:
    token = tokens[index]
    language = token.info.split()[0] if token.info.split() else ""
    is_diagram = language == "mermaid" and _is_closed(token)
    toggle = (
        f'<button type="button" class="code-toggle" aria-pressed="false">{say("Code")}</button>' if is_diagram else ""
    )
    return (
        f'<div class="code{" diagram" if is_diagram else ""}"><div class="code-head">'
        f"<span>{escape(language) or 'text'}</span>{toggle}"
        f'<button type="button" class="code-copy" aria-label="{say("Copy code")}">{say("Copy")}</button></div>'
        f'<pre tabindex="0"><code>{_highlighted(token.content, language)}</code></pre></div>'
    )


def _is_closed(fence: Any) -> bool:
    """Whether a fence has its last line; one that is still being written doesn't."""
    begin, end = fence.map
    return bool(end - begin == fence.content.count("\n") + 2)


def _highlighted(code: str, language: str) -> str:
    try:
        return str(highlight(code, get_lexer_by_name(language), _FORMATTER))
    except ClassNotFound:
        return escape(code)


def _image(_renderer: Any, tokens: Any, index: int, _options: Any, _env: Any) -> str:
    token = tokens[index]
    address = str(token.attrs.get("src", ""))
    label = escape(token.content or address)
    return f'<a href="{escape(address)}" rel="noopener noreferrer nofollow">{label}</a>'


def _link(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    tokens[index].attrs |= {"rel": "noopener noreferrer nofollow"}
    return str(renderer.renderToken(tokens, index, options, env))
