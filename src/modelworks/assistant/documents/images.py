"""Images: brought into a shape that a model takes, and read by OCR for those that take none."""

from __future__ import annotations

import io
from pathlib import Path

from modelworks.assistant.documents.blocks import Block, Picture, Read, Remark
from modelworks.spec.picture import open_picture

SHORTEST_SIDE = 8
_SHOWN_SIDE = 1536
"""Of what a model is given; more detail than this is lost on them."""
_READ_SIDE = 2400
"""Of what OCR is given."""


def image(path: Path, name: str) -> Read:
    """The first frame upright and in RGB, as a JPEG of up to 1536 pixels; and the text in it, if OCR is here."""
    import numpy as np

    from modelworks.assistant.documents.ocr import reader

    flat = open_picture(path, name, SHORTEST_SIDE)
    shown = flat.copy()
    shown.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    content = io.BytesIO()
    shown.save(content, "JPEG", quality=88)
    yield Picture(content.getvalue())
    look = reader()
    if look is None:
        yield Remark("models without sight can't read it: that needs pip install 'modelworks[ocr]'")
        return
    flat.thumbnail((_READ_SIDE, _READ_SIDE))
    if text := look(np.asarray(flat)):
        yield Block(text, "read by OCR")
        yield Remark("read by OCR for models that take text only")
    else:
        yield Remark("OCR found no text in it: models that take text only are given nothing")
