"""Text in images, by PaddleOCR's models in RapidOCR, which carries them in its wheel.

Lines are given as they stand: from top to bottom, what stands beside each other on one line, with the columns' gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from modelworks.assistant.documents.limits import allow_ocr

_SURE = 0.5
"""What a line is read with at least, of 1."""
_OPTIONS = {
    "Global.log_level": "error",
    "Global.use_cls": False,  # whether a line stands on its head: rare, and slow to ask for each
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}


@lru_cache(maxsize=1)
def reader() -> Callable[[Any], str] | None:
    """What reads an image, an array (height, width, 3); None if the extra ``ocr`` isn't installed."""
    if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
        return None
    allow_ocr()
    from rapidocr import RapidOCR

    engine: Any = RapidOCR(params=_OPTIONS)

    def read(image: Any) -> str:
        found: Any = engine(image)
        if found.txts is None:
            return ""
        lines = zip(found.boxes, found.txts, found.scores, strict=True)
        sure = [(box, line) for box, line, score in lines if score >= _SURE]
        return laid_out([(*map(float, (min(box[:, 0]), min(box[:, 1]), max(box[:, 1]))), line) for box, line in sure])

    return read


def laid_out(words: list[tuple[float, float, float, str]]) -> str:
    """Pieces (left, top, bottom, text) as lines; what overlaps a line by half its height stands on it."""
    lines: list[list[tuple[float, float, float, str]]] = []
    for word in sorted(words, key=lambda word: word[1] + word[2]):
        middle = (word[1] + word[2]) / 2
        if lines and lines[-1][0][1] <= middle <= lines[-1][0][2]:
            lines[-1].append(word)
        else:
            lines.append([word])
    return "\n".join("   ".join(word[3] for word in sorted(line)) for line in lines)
