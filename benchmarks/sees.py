"""Whether a small network learns to read bar charts and lines of text within half an hour on two cores.

`modelworks train examples/sees.toml` trains it on pictures that are drawn as it goes; then it is asked about held-out
ones, in typefaces and colours that it has never seen.

    python benchmarks/sees.py                    trains and asks
    python benchmarks/sees.py --run sees-asked   asks a run that is there
    python benchmarks/sees.py --set train.tokens=100K --set name=short
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from modelworks.data.pictures import KINDS
from modelworks.evaluate.questions import generated
from modelworks.evaluate.scores import exact, wilson
from modelworks.evaluate.sight import Sight
from modelworks.spec.files import load_run
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec
from modelworks.spec.stages import chain

EXAMPLE = Path(__file__).parents[1] / "examples" / "sees.toml"


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run that is there, instead of training one")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as of `modelworks train`")
    parser.add_argument("--count", type=int, default=1000, help="questions")
    arguments = parser.parse_args()
    spec = load_run(runs_folder() / arguments.run / "run.toml") if arguments.run else trained(arguments.set)
    sight, found = Sight(spec.name), defaultdict[str, list[float]](list)
    for question in generated(arguments.count, 0, tuple(spec.data.kinds) or KINDS):
        right = exact(sight.ask(question.content, 64), question.answers)
        for name in ("all", question.kind, f"{question.kind}: {question.about}"):
            found[name].append(right)
    for name, each in sorted(found.items()):
        score = sum(each) / len(each)
        low, high = wilson(score, len(each))
        print(f"{name:20} {score:6.1%} exact of {len(each):5,} (95 %: {low:.1%} to {high:.1%})")


def trained(overrides: list[str]) -> RunSpec:
    """Train the example; the spec of its last stage."""
    settings = [part for override in overrides for part in ("--set", override)]
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "modelworks", "train", str(EXAMPLE), *settings], check=True)
    print(f"trained in {(time.perf_counter() - begun) / 60:.1f} minutes, preparation, drawing and release included")
    return chain(load_run(EXAMPLE, overrides))[-1]


if __name__ == "__main__":
    main()
