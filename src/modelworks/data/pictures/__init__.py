"""Pictures with questions about them: charts, tables, diagrams, receipts, screenshots and lines of text.

Three ideas. A picture is a function of a seed, a split, a kind and an index, so any of them is had without the ones
before it. The held-out split has random numbers, typefaces and palettes of its own, so that what is measured there is
reading and not memory. Each picture has all of its questions, so that a network that looks at it once learns from each.

>>> from modelworks.data.pictures import picture
>>> shown = picture(7, seed=1, kinds=("bars",))
>>> shown.image.size
(96, 96)
>>> shown == picture(7, seed=1, kinds=("bars",))
True
"""

from modelworks.data.pictures.drawing import Picture, Question
from modelworks.data.pictures.kinds import KINDS, kinds_of, picture
from modelworks.data.pictures.looks import SPLITS, Split, split_of
from modelworks.data.pictures.squares import signs_in_squares
from modelworks.data.pictures.written import write_pictures

__all__ = [
    "KINDS",
    "SPLITS",
    "Picture",
    "Question",
    "Split",
    "kinds_of",
    "picture",
    "signs_in_squares",
    "split_of",
    "write_pictures",
]
