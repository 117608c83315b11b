"""Tasks over long contexts, generated: needles in haystacks, and the kinds of task that RULER is made of.

Needle in a haystack: Kamradt 2023 (github.com/gkamradt/LLMTest_NeedleInAHaystack). The others follow RULER (Hsieh et
al. 2024, arXiv:2404.06654): several needles, chains of variables, words to be counted. The wording is our own, made to
be continued by models that follow no instructions. A task makes the same sample for the same seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from modelworks.evaluate.haystack import Haystack, Sample

NEEDLE = "Note {key} {value}."
QUESTION = "Note {key}"
KEYS = (
    "acorn", "amber", "anchor", "apron", "arrow", "autumn", "badger", "bamboo", "barley", "basket", "beacon", "beaver",
    "bishop", "blanket", "bonnet", "bottle", "branch", "breeze", "bridge", "bronze", "bucket", "butter", "button",
    "cabin", "camel", "candle", "canoe", "carpet", "carrot", "castle", "cedar", "cellar", "cherry", "chimney", "cider",
    "clover", "cobalt", "comet", "copper", "coral", "cotton", "cradle", "cricket", "crystal", "dagger", "daisy",
    "desert", "dragon", "eagle", "ember", "engine", "falcon", "feather", "fiddle", "forest", "fossil", "fountain",
    "garden", "garlic", "ginger", "glacier", "granite", "hammer", "harbour", "hazel", "helmet", "heron", "hollow",
    "honey", "island", "ivory", "jacket", "jasmine", "jungle", "kettle", "ladder", "lagoon", "lantern", "lemon",
    "linen", "lizard", "magnet", "maple", "marble", "meadow", "melon", "mirror", "mustard", "needle", "nettle",
    "orchid", "otter", "oyster", "paddle", "panther", "parrot", "pebble", "pepper", "pigeon", "pillow", "planet",
    "plaster", "pocket", "poplar", "quarry", "rabbit", "ribbon", "river", "saddle", "saffron", "salmon", "shadow",
    "shovel", "silver", "sparrow", "spider", "spiral", "summit", "temple", "thistle", "thunder", "timber", "tulip",
    "tunnel", "velvet", "violin", "walnut", "willow",
)  # fmt: skip
"""What numbers are given to: words that a tokenizer has in one piece or two."""
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
DISTRACTORS, VALUES, QUERIES, HOPS, CHAINS = 8, 4, 4, 4, 2
COMMON, OFTEN, SELDOM = 5, 20, 2
"""Common words, how often each of them stands in the list, and how often each other word does."""


def word(chance: random.Random, syllables: int = 3) -> str:
    """A word that means nothing: so many syllables of a consonant and a vowel."""
    return "".join(chance.choice(_CONSONANTS) + chance.choice(_VOWELS) for _ in range(syllables))


def number(chance: random.Random) -> str:
    """A number of two digits: one token or two, and found by chance once in ninety times."""
    return f"{chance.randrange(10, 100)}"


def words(chance: random.Random, count: int) -> list[str]:
    """So many words, each another."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(chance)] = None
    return list(found)


def needle(haystack: Haystack, length: int, depth: float, seed: str) -> Sample:
    """One line with a key's number at a depth of the text; the number is asked at the end."""
    chance = random.Random(f"needle {seed}")
    key, value = chance.choice(KEYS), number(chance)
    return haystack.sample(
        seed,
        length,
        [(depth, NEEDLE.format(key=key, value=value))],
        [(QUESTION.format(key=key), f" {value}")],
        depth=depth,
    )


def multi_key(haystack: Haystack, length: int, seed: str) -> Sample:
    """Many keys have numbers; one is asked for."""
    chance = random.Random(f"multi key {seed}")
    numbers = {key: number(chance) for key in chance.sample(KEYS, DISTRACTORS)}
    hidden = [(chance.random(), NEEDLE.format(key=key, value=value)) for key, value in numbers.items()]
    asked = chance.choice(list(numbers))
    return haystack.sample(seed, length, hidden, [(QUESTION.format(key=asked), f" {numbers[asked]}")])


def multi_query(haystack: Haystack, length: int, seed: str) -> Sample:
    """Many keys have numbers; several are asked for, one after another."""
    chance = random.Random(f"multi query {seed}")
    numbers = {key: number(chance) for key in chance.sample(KEYS, DISTRACTORS)}
    hidden = [(chance.random(), NEEDLE.format(key=key, value=value)) for key, value in numbers.items()]
    asked = chance.sample(list(numbers), QUERIES)
    ends = [("" if place == 0 else ".\n") + QUESTION.format(key=key) for place, key in enumerate(asked)]
    return haystack.sample(
        seed, length, hidden, [(end, f" {numbers[key]}") for end, key in zip(ends, asked, strict=True)]
    )


def multi_value(haystack: Haystack, length: int, seed: str) -> Sample:
    """One key has several numbers; all are asked for, in the order of the text."""
    chance = random.Random(f"multi value {seed}")
    key, values = chance.choice(KEYS), [number(chance) for _ in range(VALUES)]
    depths = sorted(chance.random() for _ in values)
    hidden = [(depth, NEEDLE.format(key=key, value=value)) for depth, value in zip(depths, values, strict=True)]
    first = f"Note the numbers of {key}, in the order of the text:"
    asked = [(first if place == 0 else ",", f" {value}") for place, value in enumerate(values)]
    return haystack.sample(seed, length, hidden, asked)


def variable_tracking(haystack: Haystack, length: int, seed: str) -> Sample:
    """A number is handed from variable to variable; all that hold it are asked for. Another chain is there too."""
    chance = random.Random(f"variable tracking {seed}")
    names, hidden = words(chance, CHAINS * (HOPS + 1)), []
    chains = [names[start::CHAINS] for start in range(CHAINS)]
    values = [number(chance) for _ in chains]
    for chain, value in zip(chains, values, strict=True):
        depths = sorted(chance.random() for _ in chain)
        lines = [f"{chain[0]} = {value}", *(f"{now} = {before}" for before, now in itertools.pairwise(chain))]
        hidden += list(zip(depths, lines, strict=True))
    first = f"The variables that hold {values[0]}, in the order of the text, are"
    asked = [(first if place == 0 else ",", f" {name}") for place, name in enumerate(chains[0])]
    return haystack.sample(seed, length, hidden, asked)


def common_words(haystack: Haystack, length: int, seed: str) -> Sample:
    """A list of words in which a few stand often; these are asked for, in alphabetical order."""
    chance = random.Random(f"common words {seed}")
    common = sorted(words(chance, COMMON))
    first = "The most common words of the list, in alphabetical order, are"
    asked = [(first if place == 0 else ",", f" {name}") for place, name in enumerate(common)]
    return _listed(haystack, length, chance, common, OFTEN, asked)


def frequent_words(haystack: Haystack, length: int, seed: str) -> Sample:
    """A text of words that are the less frequent the later they come in a ranking; the first three are asked for."""
    chance = random.Random(f"frequent words {seed}")
    ranked = words(chance, 60)
    first = "The three most frequent words of the list, the most frequent first, are"
    asked = [(first if place == 0 else ",", f" {name}") for place, name in enumerate(ranked[:3])]
    ends = sum(len(haystack.encode(part)) for piece in asked for part in piece)
    per_word = max(len(haystack.encode(f" {name}")) for name in ranked)
    count = max(60, (length - ends - 8) // per_word)
    # Zipf's law with exponent 1.5; the first three are told apart even in a short list.
    weights = [1.0 / (rank + 1) ** 1.5 for rank in range(len(ranked))]
    total = sum(weights)
    drawn = [name for name, weight in zip(ranked, weights, strict=True) for _ in range(int(count * weight / total))]
    chance.shuffle(drawn)
    return _of_list(haystack, length, drawn, asked)


def _listed(
    haystack: Haystack, length: int, chance: random.Random, common: list[str], often: int, asked: list[tuple[str, str]]
) -> Sample:
    """A shuffled list with some words standing `often` and as many others as there is room for."""
    ends = sum(len(haystack.encode(part)) for piece in asked for part in piece)
    drawn = common * often
    room = length - ends - 8 - sum(len(haystack.encode(f" {name}")) for name in drawn)
    while room > 0:
        other = word(chance)
        room -= SELDOM * len(haystack.encode(f" {other}"))
        if room > 0 and other not in common:
            drawn += [other] * SELDOM
    chance.shuffle(drawn)
    return _of_list(haystack, length, drawn, asked)


def _of_list(haystack: Haystack, length: int, drawn: list[str], asked: list[tuple[str, str]]) -> Sample:
    text = haystack.encode("".join(f" {name}" for name in drawn) + "\n")
    ids, answers = list(text), []
    for words_before, answer in asked:
        ids += haystack.encode(words_before)
        found = haystack.encode(answer)
        answers.append((len(ids), len(ids) + len(found)))
        ids += found
    return Sample(ids, answers, length)


Task = Callable[[Haystack, int, str], Sample]
RULER: dict[str, Task] = {
    "multi-key": multi_key,
    "multi-query": multi_query,
    "multi-value": multi_value,
    "variable-tracking": variable_tracking,
    "common-words": common_words,
    "frequent-words": frequent_words,
}
