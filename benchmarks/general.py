"""General tasks for where no data set can be downloaded: what a model knows of words, asked before and after tuning.

From WordNet (Princeton University; Debian's package `wordnet-base`) it writes three tasks for lm-evaluation-harness, in
which a model chooses one of four by its log-likelihoods: the word of a definition, the kind of thing that a word
names, the word that an example sentence lacks. They ask about words that WordNet's authors found often in texts, in
their most frequent sense, and are the same on every machine. They aren't those by which models are usually compared.

    python benchmarks/general.py general
    modelworks eval BASE  --include general --task word_defined,word_kind,word_missing --out base.json
    modelworks eval TUNED --include general --task word_defined,word_kind,word_missing --out tuned.json
    modelworks eval tuned.json --against base.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
PARTS = ("noun", "verb", "adj")
OFTEN = 8
"""How often a word must have been found in WordNet's texts, in any sense."""


@dataclass(frozen=True)
class Sense:
    """A word in its most frequent sense."""

    word: str
    part: str
    definition: str
    examples: tuple[str, ...]
    words: tuple[str, ...]
    """All words for it."""
    kinds: tuple[str, ...]
    """Words for what it is a kind of: the next step up, then the steps above it."""


def senses(wordnet: Path) -> list[Sense]:
    """The frequent words of three parts of speech, in the order of WordNet's index."""
    counts: dict[tuple[str, str], int] = {}
    for line in (wordnet / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        word, part = key.split("%")
        part = {"1": "noun", "2": "verb", "3": "adj", "5": "adj"}.get(part[0], "")
        counts[word, part] = counts.get((word, part), 0) + int(count)
    found = []
    for part in PARTS:
        entries = dict(_entries(wordnet / f"data.{part}"))
        for line in (wordnet / f"index.{part}").read_text().splitlines():
            word, *fields = line.split(" ")
            if word.isalpha() and counts.get((word, part), 0) >= OFTEN:
                first = fields[int(fields[2]) + 5]  # behind the pointers and two counts, synsets by their frequency
                found.append(_sense(word, part, first, entries))
    return found


def _entries(file: Path) -> Iterator[tuple[str, tuple[list[str], list[str], str]]]:
    """Of each synset: its words, the synsets it is a kind of, its gloss; by its offset."""
    for line in file.read_text().splitlines():
        if line.startswith("  "):
            continue
        facts, gloss = line.split(" | ", 1)
        fields = facts.split()
        count = int(fields[3], 16)
        words = [fields[4 + 2 * place].split("(")[0].replace("_", " ") for place in range(count)]
        rest = fields[4 + 2 * count + 1 :]
        above = [rest[4 * place + 1] for place in range(int(fields[4 + 2 * count])) if rest[4 * place] == "@"]
        yield fields[0], (words, above, gloss.strip())


def _sense(word: str, part: str, offset: str, entries: dict[str, tuple[list[str], list[str], str]]) -> Sense:
    words, above, gloss = entries[offset]
    pieces = gloss.split('; "')
    kinds: list[str] = []
    while above and len(kinds) < 40:
        kinds += entries[above[0]][0]
        above = entries[above[0]][1]
    examples = tuple(piece.strip('"; ') for piece in pieces[1:])
    return Sense(word, part, pieces[0].strip(), examples, tuple(words), tuple(kinds))


def questions(known: list[Sense], count: int) -> dict[str, list[dict[str, Any]]]:
    """So many of each task."""
    draw = random.Random(0)
    return {
        "word_defined": list(_some(draw, known, count, _defined)),
        "word_kind": list(_some(draw, known, count, _kind)),
        "word_missing": list(_some(draw, known, count, _missing)),
    }


def _some(draw: random.Random, known: list[Sense], count: int, make: Any) -> Iterator[dict[str, Any]]:
    order, made = draw.sample(known, len(known)), 0
    for sense in order:
        others = [draw.choice(known) for _ in range(200)]
        question = make(draw, sense, [one for one in others if one.part == sense.part])
        if question is not None and made < count:
            made += 1
            yield question


def _question(draw: random.Random, text: str, right: str, wrong: list[str], behind: str = "") -> dict[str, Any] | None:
    choices = [right, *list(dict.fromkeys(one for one in wrong if one != right))[:3]]
    if len(choices) < 4:
        return None
    draw.shuffle(choices)
    answer = choices.index(right)
    return {"text": text, "choices": [f" {choice}{behind}" for choice in choices], "answer": answer}


def _defined(draw: random.Random, sense: Sense, others: list[Sense]) -> dict[str, Any] | None:
    if sense.word in sense.definition.lower():
        return None
    wrong = [one.word for one in others if one.word not in sense.words]
    return _question(draw, f"Question: Which word means: {sense.definition}?\nAnswer:", sense.word, wrong)


def _kind(draw: random.Random, sense: Sense, others: list[Sense]) -> dict[str, Any] | None:
    if sense.part != "noun" or len(sense.kinds) < 4 or sense.word in sense.kinds[0]:
        return None
    wrong = [one.kinds[0] for one in others if one.kinds and one.kinds[0] not in sense.kinds + sense.words]
    asked = f"Question: What kind of thing does the word {sense.word!r} name?\nAnswer: It is a kind of"
    return _question(draw, asked, sense.kinds[0], wrong)


def _missing(draw: random.Random, sense: Sense, others: list[Sense]) -> dict[str, Any] | None:
    for example in sense.examples:
        words = example.split(" ")
        if sense.word in words[1:] and len(words) > 3:
            place = words.index(sense.word, 1)
            wrong = [one.word for one in others if one.word not in sense.words]
            behind = " ".join(["", *words[place + 1 :]])
            return _question(draw, " ".join(words[:place]), sense.word, wrong, behind)
    return None


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--count", type=int, default=400, help="questions of each task")
    given = parser.parse_args()
    if not (given.wordnet / "index.noun").exists():
        parser.error(f"no WordNet in {given.wordnet}: install Debian's wordnet-base, or name its folder with --wordnet")
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, made in questions(senses(given.wordnet), given.count).items():
        file = (given.folder / f"{name}.jsonl").resolve()
        file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made))
        (given.folder / f"{name}.yaml").write_text(TASK.format(name=name, file=json.dumps(str(file))))
        print(f"{name}: {len(made)} questions")


if __name__ == "__main__":
    main()
