"""How many pictures with questions a core draws in a second, by kind: ``python benchmarks/pictures.py``."""

from __future__ import annotations

import time

from modelworks.data.pictures import KINDS, picture

PICTURES = 500


def main() -> None:
    """Print a line for each kind."""
    for kind in KINDS:
        picture(0, kinds=(kind,))
        begin = time.process_time()
        questions = sum(len(picture(index, kinds=(kind,)).questions) for index in range(PICTURES))
        rate = PICTURES / (time.process_time() - begin)
        width, height = picture(0, kinds=(kind,)).image.size
        print(f"{kind:8} {width:3} x {height:3} {rate:6,.0f} pictures/s {questions / PICTURES:4.1f} questions each")


if __name__ == "__main__":
    main()
