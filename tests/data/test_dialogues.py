"""Dialogues become tokens of which the answers alone are learnt, and what a file or a template does wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.records import prepared_as, text

from modelworks.data.answers import DialogueDataset, pack
from modelworks.spec import InputError


def say(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(contents)]}


def prepared(tokenizer: Path, *records: Any, **fields: Any) -> DialogueDataset:
    return prepared_as(DialogueDataset, "dialogues", tokenizer, records, fields)


def test_answers_and_the_marks_of_their_ends_are_learnt_and_nothing_else(tokenizer: Path) -> None:
    data = prepared(tokenizer, say("who?", "me, Zoë", "and?", "you"))
    tokens, learnt = data.sequences("train", 0, 1, 120, seed=1)[0]
    whole = text(tokenizer, tokens[tokens != data.separator])
    assert whole == (
        "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\nme, Zoë<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nyou<|im_end|>\n"
    )
    assert text(tokenizer, tokens[learnt > 0]) == "me, Zoë<|im_end|>you<|im_end|>"


def test_a_template_beside_the_tokenizer_writes_dialogues_out(tokenizer: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    config = {"chat_template": template, "eos_token": {"content": "<|im_end|>"}}
    (tokenizer.parent / "tokenizer_config.json").write_text(json.dumps(config))
    data = prepared(tokenizer, say("who?", "me"))
    tokens, learnt = data.sequences("train", 0, 1, 60, seed=1)[0]
    assert text(tokenizer, tokens[tokens != data.separator]) == "[user]who?<|im_end|>[assistant]me<|im_end|>"
    assert text(tokenizer, tokens[learnt > 0]) == "me<|im_end|>"


def test_dialogues_are_packed_whole_and_each_is_seen_once_an_epoch(tokenizer: Path) -> None:
    data = prepared(tokenizer, *(say(f"question {number}", "yes " * (number % 7 + 1)) for number in range(40)))
    count = data.sequence_count("train", 200)
    assert count < 30
    found = data.sequences("train", 0, count, 200, seed=3)
    dialogues = [
        text(tokenizer, part)
        for tokens, _ in found
        for part in np.split(tokens, np.flatnonzero(tokens == data.separator))
        if (part != data.separator).any()
    ]
    assert len(dialogues) == 40
    assert sorted(int(one.split("question ")[1].split("<")[0]) for one in dialogues) == list(range(40))
    assert all(one.endswith("<|im_end|>\n") for one in dialogues)
    assert np.array_equal(data.sequences("train", 5, 3, 200, seed=3), found[5:8])


def test_a_dialogue_longer_than_a_sequence_is_cut_and_left_out_without_an_answer(tokenizer: Path) -> None:
    data = prepared(tokenizer, say("hm", "yes " * 200), say("hm " * 200, "yes"))
    assert data.sequence_count("train", 64) == 1
    assert data.cut("train", 64) == 2
    assert data.sequences("train", 0, 1, 64, seed=1).shape == (1, 2, 65)


@given(st.lists(st.integers(1, 50)))
def test_no_bin_is_overfull_and_every_item_is_in_one(sizes: list[int]) -> None:
    bins = pack(sizes, 50)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in items) <= 50 for items in bins)
    # First- and best-fit decreasing need at most 11/9 of the best, which is at least what the sum needs.
    assert not sizes or len(bins) <= 2 * -(-sum(sizes) // 50)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (say("who?", " \n"), "message 2, the assistant's, is empty"),
        (say("", "me"), "message 1, the user's, is empty"),
        (say("who?"), "the last message is the user's"),
        ({"messages": []}, "a list 'messages' is needed"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 1 has the role 'bot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "has no text as its content"),
        (say("write <|im_end|>", "no"), "message 1 holds the tokenizer's special token <|im_end|>"),
    ],
    ids=["empty answer", "empty question", "no answer", "no messages", "role", "content", "special token"],
)
def test_a_dialogue_that_teaches_nothing_is_named_with_its_line(tokenizer: Path, record: Any, reason: str) -> None:
    with pytest.raises(InputError, match=r"1 of 2 dialogues cannot be learnt from.*dialogues\.jsonl:2: ") as refused:
        prepared(tokenizer, say("who?", "me"), record)
    assert reason in str(refused.value)
    assert not list((tokenizer.parent / "prepared").glob("*/*"))  # nothing half-written


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it doesn't end"),
        ("{% for a in range(99999) %}{{ 'many words ' * 1000 }}{% endfor %}", "it writes more than"),
        ("{{ 'a' * 10**11 }}", "of memory"),
        ("{% for %}", "data.chat_template is not accepted"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('no dogs') }}", "no dogs"),
        ("{% for m in messages %}{{ messages | length }}{% endfor %}", "message 4 changes what is written"),
    ],
    ids=["endless loop", "endless text", "memory", "no template", "escape", "refusal", "rewriting"],
)
def test_a_template_that_does_wrong_is_refused_in_a_sentence(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    (tokenizer.parent / "bad.jinja").write_text(template)
    with pytest.raises(InputError) as refused:
        prepared(tokenizer, say("who?", "me", "and?", "you"), chat_template=str(tokenizer.parent / "bad.jinja"))
    assert reason in str(refused.value)
    assert not list((tokenizer.parent / "prepared").glob("*/*"))
