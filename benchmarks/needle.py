"""Whether a small model, extended from 2,048 tokens to 16,384, finds a needle that it doesn't find before.

Text is generated for each stage, in which numbers are paired with words and asked for again over the distances of that
stage, among lines of the standard library (its held-out files left to the evaluation); `modelworks train` trains the
stages of examples/needle.toml; and base and extended model are asked at all lengths and depths, the base at the
longer lengths both as it is and with a larger rotary base alone.

    python benchmarks/needle.py text examples/needle
    modelworks train examples/needle.toml
    python benchmarks/needle.py ask --plot needle.svg --json needle.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelworks.data.tokenizer import train_tokenizer
from modelworks.evaluate.haystack import held_out, lines_of
from modelworks.evaluate.models import load_model
from modelworks.evaluate.picture import write_picture
from modelworks.evaluate.suite import evaluate
from modelworks.evaluate.tasks import KEYS, NEEDLE, number

BYTES_PER_TOKEN = 2.7
"""Of this text with a vocabulary of 1,024: how distances in tokens become distances in characters."""
TEXTS = {
    "short": (0, 1.0, 3_000_000, 2.0),
    "512": (512, 0.8, 1_000_000, 2.0),
    "2048": (2048, 0.6, 5_000_000, 2.0),
    "4096": (4096, 0.5, 1_000_000, 1.0),
}
"""Of each text: how far back is asked at most (0: `short_document`), which share of lines tells or asks, how many
tokens, and how distances are spread: a number drawn evenly from 0 to 1 to this power, so that with 2 short ones lie
closer together."""
VOCAB = 1024
LENGTHS = (1024, 2048, 4096, 8192, 16384)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    text = steps.add_parser("text", help="generate the texts of all stages, and their tokenizer")
    text.add_argument("folder", type=Path)
    ask = steps.add_parser("ask", help="hold the extended model against the base")
    ask.add_argument("--base", default="needle-2k")
    ask.add_argument("--extended", default="needle-4k")
    ask.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    ask.add_argument("--depths", type=int, default=11)
    ask.add_argument("--samples", type=int, default=1)
    ask.add_argument("--plot", type=Path)
    ask.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "text":
        write_texts(arguments.folder)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Ask both models, and draw what they find beside each other."""
    lengths = [int(part) for part in arguments.lengths.split(",")]
    reports: list[dict[str, Any]] = []
    for name in (arguments.base, arguments.extended):
        model = load_model(name, [f"model.context={max(lengths)}"])
        out = Path(f"{name}-needle.json")
        reports.append(evaluate(model, "needle", lengths, arguments.depths, arguments.samples, out=out))
        found = ", ".join(f"{score:.0%} at {int(length):,}" for length, score in reports[-1]["by_length"].items())
        print(f"{name}: {found}", flush=True)
    if arguments.plot:
        write_picture(reports, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


def write_texts(folder: Path) -> None:
    """Write the text of each stage, and a tokenizer trained on two of them.

    A question is a line that stood before, so that its number can be foretold; each is asked once. How far back it
    stands is drawn as `TEXTS` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, spoken = held_out(False), []
    for name, (reach, density, tokens, power) in TEXTS.items():
        chance, texts, written = random.Random(name), [], 0
        lines = lines_of(files, chance)
        while written < tokens * BYTES_PER_TOKEN:
            far = int(reach * BYTES_PER_TOKEN)
            texts.append(document(chance, files, far, density, power) if reach else short_document(chance, lines))
            written += len(texts[-1])
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        print(f"{folder / name}.jsonl: {written:,} characters", flush=True)
        if name in ("short", "2048"):
            spoken += texts
    # The short texts have every key often enough to be a token of its own.
    train_tokenizer(spoken, VOCAB).save(str(folder / "tokenizer.json"))


def short_document(chance: random.Random, lines: Iterator[str]) -> str:
    """A few pairs told, and each of them asked for four times; or a row of words and numbers said again; or lines of
    the library as they stand.

    In rows of ever other lengths the next word follows from what came after this one before, and from nothing else: of
    so many questions the network learns to look back, which it doesn't learn from pairs alone (not in 3 M tokens). That
    takes a head that looks at the token before, which only the lines reward by itself: where each key is one token,
    rows and pairs alone brought nothing in 12 M.
    """
    form = chance.random()
    if form < 0.35:
        said = ""
        while len(said) < 300:
            said += next(lines) + "\n"
        return said
    if form < 0.75:
        items = [
            chance.choice(KEYS) if chance.random() < 0.6 else number(chance) for _ in range(chance.randrange(4, 40))
        ]
        return "".join(f" {item}" for item in items) * chance.randrange(2, 5)
    told = [f" {key} {number(chance)}" for key in chance.sample(KEYS, chance.choice((1, 2, 2, 3, 3, 4, 6)))]
    asked = told * 4
    chance.shuffle(asked)
    return "".join(told + asked)


def document(
    chance: random.Random, files: tuple[tuple[str, ...], ...], reach: int, density: float, power: float
) -> str:
    """One document, several times as long as questions reach back (in characters)."""
    lines: list[str] = []
    told: list[tuple[int, str]] = []
    last: dict[str, int] = {}  # where each key was last told or asked
    place = 0
    text = lines_of(files, chance)
    while place < max(20_000, 4 * reach):
        line = ""
        if chance.random() < density:
            told = [entry for entry in told if place - entry[0] <= reach]
            free = [key for key in KEYS if place - last.get(key, -reach) >= reach]
            if told and (not free or chance.random() < 0.5):
                back = reach * chance.random() ** power
                entry = min(told, key=lambda entry: abs(place - back - entry[0]))
                told.remove(entry)
                line = entry[1]
            elif free:
                line = NEEDLE.format(key=chance.choice(free), value=number(chance))
                told.append((place, line))
            if line:
                last[line.split()[-2]] = place
        line = line or next(text)
        lines.append(line)
        place += len(line) + 1
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
