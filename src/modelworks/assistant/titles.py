"""A conversation's title, as the model finds it that has answered first; nothing where it finds none."""

from __future__ import annotations

import re
from contextlib import aclosing

from modelworks.assistant.search import words_of
from modelworks.serve.engine import Engine

MOST_WORDS = 6
_TOKENS = 24
_SEEN = 600
"""Characters of the question and of the answer that are shown to the model."""
_ASKED = "Name the subject of this conversation in two to five words. Write the words alone, on one line."
_SMALL_WORDS = {"the", "a", "an", "of", "and", "in", "on", "to", "for", "is", "how", "what"}
_LEAD = re.compile(r"^(the )?(title|subject|topic|conversation)( of (this|the) conversation)?( is)?\s*[:–—-]\s*", re.I)
_NOT_A_TITLE = re.compile(
    r"^(untitled|title|subject|conversation|new conversation|chat|none|n/?a|hello|hi|sure|okay?|yes|no|thank you)$"
    r"|^this (is|conversation)\b|\b(i'm|i am|i can|i'll|as an ai|sorry|here is|here's|you are|assistant)\b",
    re.I,
)


async def title_by(engine: Engine, model: str, question: str, answer: str) -> str | None:
    """Ask a model for a title of at most six words; None if what it says can't be one.

    Raises
    ------
    InputError, OperationError
        If the engine refuses or fails.
    """
    said = ""
    asked = [{"role": "user", "content": f"{question[:_SEEN]}\n\n{answer[:_SEEN]}\n\n{_ASKED}"}]
    async with aclosing(engine.chat(model, asked, temperature=0, max_tokens=_TOKENS)) as deltas:
        async for delta in deltas:
            said += delta.text
    return sensible(said, f"{question} {answer}")


def sensible(said: str, about: str) -> str | None:
    """What of a model's words can be the title of a conversation about something; None if nothing can."""
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    bare = _LEAD.sub("", line.strip("#*_`\"'“”‘’«» "))
    title = " ".join(bare.strip("#*_`\"'“”‘’«»:;,. ").split())
    words = title.split()
    fits = 0 < len(words) <= MOST_WORDS and len(title) <= 60 and title.isprintable()
    if not fits or not any(character.isalpha() for character in title) or _NOT_A_TITLE.search(title):
        return None
    named = set(words_of(title)) - _SMALL_WORDS
    repeats = len(set(words_of(title))) * 2 < len(words)
    if repeats or re.search(r"[<>{}|\\\[\]]", title) or not named & set(words_of(about)):
        return None
    return title[0].upper() + title[1:]
