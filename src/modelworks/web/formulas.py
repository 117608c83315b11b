r"""Formulas in Markdown: ``$..$``, ``\(..\)`` within a line, ``$$..$$``, ``\[..\]`` on lines of their own or in one.

What is found is handed on as text, with its TeX beside it; the browser sets it (KaTeX, `static/drawings.js`). A
dollar is a price more often than a formula's end: as in Pandoc, a formula has no space inside its dollars and no digit
behind them. A formula has no blank line and no backtick, so that one that is never closed swallows no more than a
paragraph and nothing of a piece of code.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

GROWING = "growing"
"""Set in the parser's environment while a text grows: an open formula then lasts to the text's end."""
_LONGEST = 4000
"""In characters; what is longer is no formula."""
_INLINE = (
    # An escaped dollar belongs to the formula, a bare one ends it, rightly or not.
    (re.compile(r"\$\$(?!\$)((?:[^$\\`]|\\.){1,4000}?)\$\$", re.DOTALL), True),
    (re.compile(r"(?<![\w$])\$(?![\s$])((?:[^$\\`]|\\.){1,4000}?)(?<!\s)\$(?![\d$])", re.DOTALL), False),
    (re.compile(r"\\\(((?:[^\\`]|\\[^()]){1,4000}?)\\\)", re.DOTALL), False),
    (re.compile(r"\\\[((?:[^\\`]|\\[^\[\]]){1,4000}?)\\\]", re.DOTALL), True),
)
_BLOCK_ENDS = {"$$": re.compile(r"(?<!\\)\$\$"), r"\[": re.compile(r"(?<!\\)\\[\[\]]")}
"""What ends a block's formula, rightly or (a second beginning) not. Two backslashes are a new line in TeX."""
_MOST_LINES = 100


def add_formulas(parser: MarkdownIt) -> None:
    """Have a parser find formulas."""
    parser.inline.ruler.before("escape", "formula", _inline)
    parser.block.ruler.before(
        "fence", "formula_block", _block, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    parser.add_render_rule("formula", _render)
    parser.add_render_rule("formula_block", _render)


def _inline(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] not in "$\\":
        return False
    for pattern, display in _INLINE:
        found = pattern.match(state.src, state.pos, state.posMax)
        if found and found[1].strip():
            if not silent:
                token = state.push("formula", "span", 0)
                token.content, token.markup, token.meta = found[0], found[1], {"display": display}
            state.pos = found.end()
            return True
    return False


def _block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    if state.is_code_block(start):
        return False
    opening = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]][:2]
    ending = _BLOCK_ENDS.get(opening)
    if ending is None:
        return False
    line, lines = start, list[str]()
    while line < min(end, start + _MOST_LINES) and not state.isEmpty(line):
        if line > start and state.sCount[line] < state.blkIndent:
            return False
        lines.append(state.getLines(line, line + 1, state.blkIndent, False))
        found = ending.search(lines[-1], lines[-1].index(opening) + 2 if line == start else 0)
        line += 1
        if found:
            whole = found[0] != r"\[" and not lines[-1][found.end() :].strip()
            return whole and _push(state, start, line, "\n".join(lines).strip(), silent)
    if line < end or not state.env.get(GROWING):
        return False
    return _push(state, start, line, "\n".join(lines).strip(), silent)


def _push(state: StateBlock, start: int, after: int, text: str, silent: bool) -> bool:
    tex = text[2:-2].strip()
    if not tex or "`" in tex or len(tex) > _LONGEST:
        return False
    if not silent:
        state.line = after
        token = state.push("formula_block", "div", 0)
        token.map, token.content, token.markup, token.meta = [start, after], text, tex, {"display": True}
    return True


def _render(_renderer: Any, tokens: Any, index: int, _options: Any, _env: Any) -> str:
    token = tokens[index]
    display = " data-display" if token.meta["display"] else ""
    shown = escape(token.content, quote=False)
    return f'<{token.tag} class="formula" data-tex="{escape(token.markup)}"{display}>{shown}</{token.tag}>'
