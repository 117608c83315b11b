"""Markdown that a model wrote, as HTML that is safe to show.

A model's words are a stranger's words. Raw HTML in them is shown as text and never parsed, links go only to http,
https and mailto, and images aren't fetched (an address in an answer could carry the conversation away). What comes out
is cleaned once more in the browser, by DOMPurify.
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
    starts = [token.map[0] for token in _parser().parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    if len(starts) < 2:
        return [], text
    lines = text.splitlines(keepends=True)
    bounds = [0, *starts[1:], len(lines)]
    blocks = ["".join(lines[start:end]) for start, end in pairwise(bounds)]
    return blocks[:-1], blocks[-1]


def code_styles() -> str:
    """The style sheet of highlighted code, for light and for dark pages."""
    light: Any = HtmlFormatter(style="friendly", nobackground=True)
    dark: Any = HtmlFormatter(style="github-dark", nobackground=True)
    return f"{light.get_style_defs('.code')}\n{dark.get_style_defs('.body--dark .code')}\n"


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable(["table", "strikethrough"])
    parser.validateLink = lambda url: bool(_ALLOWED_LINK.match(url.strip()))  # type: ignore[method-assign]
    parser.add_render_rule("fence", _fence)
    parser.add_render_rule("code_block", _fence)
    parser.add_render_rule("image", _image)
    parser.add_render_rule("link_open", _link)
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>')
    parser.add_render_rule("table_close", lambda *_: "</table></div>")
    return parser


def _fence(_renderer: Any, tokens: Any, index: int, _options: Any, _env: Any) -> str:
    token = tokens[index]
    language = token.info.split()[0] if token.info.split() else ""
    return (
        f'<div class="code"><div class="code-head"><span>{escape(language) or "text"}</span>'
        '<button type="button" class="code-copy" aria-label="Copy code">Copy</button></div>'
        f"<pre><code>{_highlighted(token.content, language)}</code></pre></div>"
    )


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
