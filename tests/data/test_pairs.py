"""Pairs of answers become tokens of which each answer's are numbered, and what a file does wrong is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.records import prepared_as, text

from modelworks.data.pairs import PairDataset
from modelworks.spec import InputError

QUESTION = {"role": "user", "content": "who?"}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def prepared(tokenizer: Path, *records: Any, **fields: Any) -> PairDataset:
    return prepared_as(PairDataset, "pairs", tokenizer, records, fields)


def test_the_last_answers_of_both_sides_stand_in_one_sequence_and_no_others_are_learnt(tokenizer: Path) -> None:
    before = [QUESTION, says("me"), QUESTION]
    data = prepared(tokenizer, {"messages": before, "chosen": "Zoë", "rejected": "nobody"})
    tokens, numbers = data.sequences("train", 0, 1, 200, seed=1)[0]
    asked = "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"
    sides = [part[part != data.separator] for part in np.split(tokens, np.flatnonzero(tokens == data.separator))]
    assert [text(tokenizer, side) for side in sides if len(side)] == [
        f"{asked}me<|im_end|>\n{asked}{answer}<|im_end|>\n" for answer in ("Zoë", "nobody")
    ]
    assert text(tokenizer, tokens[numbers == 1]) == "Zoë<|im_end|>"
    assert text(tokenizer, tokens[numbers == 2]) == "nobody<|im_end|>"
    assert numbers.max() == 2
    assert data.manifest["documents"] == 1


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [QUESTION], "chosen": says("me"), "rejected": says("you")},
        {"prompt": [QUESTION], "chosen": [says("me")], "rejected": [says("you")]},
        {"prompt": "who?", "chosen": "me", "rejected": "you", "score_chosen": 5.0},
        {"prompt": "who?", "chosen": [QUESTION, says("me")], "rejected": [QUESTION, says("you")]},
        {"chosen": [QUESTION, says("me")], "rejected": [QUESTION, says("you")]},
    ],
    ids=["messages", "lists", "texts", "whole with a prompt", "whole"],
)
def test_pairs_are_read_in_each_form_that_data_sets_have(tokenizer: Path, record: Any) -> None:
    found = prepared(tokenizer, record).sequences("train", 0, 1, 120, seed=1)
    plain = prepared(tokenizer, {"messages": [QUESTION], "chosen": "me", "rejected": "you"})
    assert np.array_equal(found, plain.sequences("train", 0, 1, 120, seed=1))


def test_pairs_stay_together_and_one_that_is_longer_than_a_sequence_is_left_out(tokenizer: Path) -> None:
    records = [{"prompt": f"question {n}", "chosen": "yes " * (n % 5 + 1), "rejected": f"no {n}"} for n in range(20)]
    long = {"prompt": "why", "chosen": "yes", "rejected": "no " * 300}
    data = prepared(tokenizer, *records, long)
    assert data.cut("train", 220) == 1
    found = data.sequences("train", 0, data.sequence_count("train", 220), 220, seed=3)
    seen = []
    for tokens, numbers in found:
        for chosen in range(1, int(numbers.max()), 2):
            assert text(tokenizer, tokens[numbers == chosen]).startswith("yes ")
            seen.append(text(tokenizer, tokens[numbers == chosen + 1]))
    assert sorted(seen) == sorted(f"no {n}<|im_end|>" for n in range(20))
    assert len(found) < 15
    with pytest.raises(InputError, match=r"train\.seq_len = 16 is not accepted: no pair of the train split"):
        data.sequences("train", 0, 1, 16, seed=1)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "who?", "chosen": "me"}, "the field 'rejected' is missing"),
        ({"prompt": "who?", "chosen": "me", "rejected": " "}, "rejected: message 2, the assistant's, is empty"),
        ({"prompt": "who?", "chosen": "me", "rejected": "me"}, "the chosen and the rejected answer are equal"),
        ({"chosen": "me", "rejected": "you"}, "a prompt, as 'messages' or 'prompt', is needed"),
        ({"prompt": "", "chosen": "me", "rejected": "you"}, "message 1, the user's, is empty"),
        ({"messages": [QUESTION, says("me")], "chosen": "a", "rejected": "b"}, "the answer is to follow a user's"),
        (
            {"prompt": "why?", "chosen": [QUESTION, says("a")], "rejected": [QUESTION, says("b")]},
            "what stands before the chosen answer isn't the prompt",
        ),
        ({"prompt": "who?", "chosen": QUESTION, "rejected": "me"}, "chosen: the last message is the user's"),
        ({"prompt": "who?", "chosen": "a<|im_end|>", "rejected": "b"}, "the tokenizer's special token <|im_end|>"),
        (["me", "you"], "a record with 'chosen' and 'rejected' is needed"),
    ],
    ids=[
        "no rejected", "empty answer", "equal", "no prompt", "empty prompt", "prompt answered",
        "two prompts", "role", "special token", "list",
    ],
)  # fmt: skip
def test_a_pair_that_teaches_nothing_is_named_with_its_line(tokenizer: Path, record: Any, reason: str) -> None:
    good = {"prompt": "who?", "chosen": "me", "rejected": "you"}
    with pytest.raises(InputError, match=r"1 of 2 pairs cannot be learnt from.*pairs\.jsonl:2: ") as refused:
        prepared(tokenizer, good, record)
    assert reason in str(refused.value)
    assert not list((tokenizer.parent / "prepared").glob("*/*"))  # nothing half-written


def test_answers_that_a_template_makes_equal_are_refused(tokenizer: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}"
    (tokenizer.parent / "trims.jinja").write_text(template)
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: the answers are equal"):
        prepared(
            tokenizer,
            {"prompt": "who?", "chosen": "me", "rejected": "me "},
            chat_template=str(tokenizer.parent / "trims.jinja"),
        )
