"""Scores of answers, held against the definitions of the benchmarks and against published values."""

from __future__ import annotations

import pytest

from modelworks.evaluate.scores import anls, choice, edit_distance, exact, open_answer, relaxed, wilson


def test_exact_match_forgives_case_spaces_and_a_full_stop_alone() -> None:
    assert exact(" Green  market. ", ["Green Market"]) == 1
    assert exact("Green Markets", ["Green Market"]) == 0
    assert exact("7", ["12", "7"]) == 1


@pytest.mark.parametrize(
    ("given", "answer", "score"),
    [
        ("95", "100", 1),
        ("105", "100", 1),
        ("94.9", "100", 0),
        ("-105", "-100", 1),
        ("100", "-100", 0),
        ("1,050", "1000", 1),
        ("52%", "50%", 1),
        ("0.52", "50%", 1),
        ("50", "50%", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Norway", "norway", 1),
        ("Norwey", "norway", 0),
        ("nan", "3", 0),
    ],
)
def test_relaxed_accuracy_is_within_five_percent_of_numbers_and_exact_for_words(
    given: str, answer: str, score: float
) -> None:
    assert relaxed(given, [answer]) == score


def test_anls_is_one_minus_the_distance_and_nothing_from_half_on() -> None:
    assert edit_distance("kitten", "sitting") == 3  # Levenshtein's own textbook case
    assert anls("sitting", ["kitten", "mitten"]) == pytest.approx(1 - 3 / 7)
    assert anls("ab", ["ax"]) == 0
    assert anls("", ["ax"]) == 0
    assert anls("  Coca  COLA ", ["coca cola", "x"]) == 1


@pytest.mark.parametrize(
    ("given", "letter"),
    [
        ("B", "B"),
        ("(c).", "C"),
        ("**D**", "D"),
        ("The answer is B, since A is a cat.", "B"),
        ("Answer: (C)", "C"),
        ("It is not (A) but (D)", "D"),
        ("B. a dog", "B"),
        ("A dog is seen, so a dog", "B"),
        ("This shows a BIRD.", "C"),
        ("I can't tell", None),
        ("E", None),
    ],
)
def test_the_chosen_letter_is_found_in_what_models_say(given: str, letter: str | None) -> None:
    assert choice(given, ["a cat", "a dog", "a bird", "a fish"]) == letter


def test_an_open_answer_is_named_and_not_only_contained() -> None:
    assert open_answer("So the net income is $1,234.50.", ["1234.5"]) == 1
    assert open_answer("It is 12345", ["1234.5"]) == 0
    assert open_answer("There is nothing", ["no"]) == 0
    assert open_answer("That would be Los Angeles", ["LA", "Los Angeles"]) == 1


def test_the_interval_is_that_of_the_literature() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20, method 3 (score)."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(0.5, 0) == (0, 1)
