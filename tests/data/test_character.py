"""The dialogues of the assistant's character keep what they promise."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from modelworks.data.character import (
    HELD_OUT,
    Dialogue,
    alike,
    check,
    dialogue_from,
    dialogues,
    held_out,
    slurs,
    training,
    words,
    write_dialogues,
)
from modelworks.spec.errors import InputError
from modelworks.spec.modes import FUN, REGULAR


def test_there_are_enough_dialogues_of_each_kind_and_mode() -> None:
    modes = Counter(dialogue.mode for dialogue in dialogues())
    kinds = Counter(dialogue.kind for dialogue in dialogues())
    polish = [one for one in dialogues() if set("ąćęłńśźż") & set(" ".join(one.turns).lower())]
    assert modes.total() >= 600
    assert min(modes[REGULAR], modes[FUN]) >= 250
    assert kinds["identity"] >= 80
    assert kinds["refusal"] >= 40
    assert kinds["careful"] >= 25
    assert len(polish) >= 30


def test_no_two_dialogues_of_a_mode_are_alike() -> None:
    assert list(alike(dialogues(), 0.3)) == []
    asked = Counter((one.mode, " ".join(words(one.turns[0]))) for one in dialogues())
    assert [question for question, count in asked.items() if count > 1] == []


def test_answers_are_short_enough_for_a_small_model() -> None:
    lengths = sorted(len(answer.split()) for one in dialogues() for answer in one.answers)
    assert lengths[-1] <= 120
    assert 15 <= lengths[len(lengths) // 2] <= 60


def test_a_tenth_is_held_out_and_nothing_is_in_both_parts() -> None:
    assert set(training()).isdisjoint(held_out())
    assert len(training()) + len(held_out()) == len(dialogues())
    assert len(held_out()) == pytest.approx(HELD_OUT * len(dialogues()), rel=0.3)
    assert {one.mode for one in held_out()} == {REGULAR, FUN}


def test_each_mode_is_taught_with_the_prompt_that_the_chat_gives_it() -> None:
    personas = pytest.importorskip("modelworks.assistant.personas")
    for one in dialogues():
        assert one.messages[0] == {"role": "system", "content": personas.BUILT_IN[one.mode]}


def test_the_files_to_train_on_hold_one_record_a_line(tmp_path: Path) -> None:
    counts = write_dialogues(tmp_path)
    plain = [one for one in training() if one.mode == REGULAR and one.kind == "identity"]
    assert counts == {"train.jsonl": len(training()) + len(plain), "held-out.jsonl": len(held_out())}
    for name, count in counts.items():
        records = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert len(records) == count
        assert all(record["messages"][-1]["role"] == "assistant" for record in records)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"mode": "grumpy", "kind": "answer", "messages": []}, "mode = 'grumpy'"),
        ({"mode": "fun", "kind": "song", "messages": []}, "kind = 'song'"),
        ({"mode": "fun", "kind": "answer", "messages": []}, "roles"),
        ({"mode": "fun", "kind": "answer", "messages": [{"role": "user", "content": "Hi"}]}, "roles user"),
        (
            {
                "mode": "fun",
                "kind": "answer",
                "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}],
            },
            "message 2 is empty",
        ),
    ],
    ids=["mode", "kind", "nothing", "no-answer", "empty-answer"],
)
def test_a_record_that_cannot_be_learnt_from_is_refused(record: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        dialogue_from(record, "fun.jsonl:1")


def test_a_dialogue_written_twice_is_refused_and_one_of_the_other_mode_is_not() -> None:
    first = Dialogue(FUN, "answer", ("Why is the sea salty?", "Rivers bring salt, the sun takes only the water back."))
    again = Dialogue(FUN, "answer", ("Why is the sea salty?", "Rivers bring salt; the sun takes only the water away."))
    check([first, Dialogue(REGULAR, "answer", again.turns)])
    with pytest.raises(InputError, match="are the same"):
        check([first, again])


def test_slurs_and_long_answers_are_refused() -> None:
    assert slurs("What a " + "dedrater"[::-1] + ", he said.")
    assert not slurs("A retardation of two seconds, and then the train was off.")
    with pytest.raises(InputError, match="too long"):
        check([Dialogue(FUN, "answer", ("Hm?", "so " * 121))])
