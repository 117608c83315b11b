"""A network that comes into being part by part: built on the meta device, split, and only then given memory.

No process ever holds more of the network than its own parts and a few rows of one tensor, so a network may be as large
as all processes' memory. The values are those of the whole network on one process (`model.initialization`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from modelworks.model import adapters
from modelworks.model.decoder import Decoder
from modelworks.model.initial import InitialWeights
from modelworks.model.initialization import fill

if TYPE_CHECKING:
    from modelworks.train.parallelize import Place


def fill_parts(decoder: Decoder, places: Mapping[str, Place], seed: int, initial: InitialWeights | None = None) -> None:
    """Give what this process holds of each parameter the values that `Decoder.initialize` gives it, or others to begin
    with.

    Parameters
    ----------
    decoder
        Split, with memory for this process's parts.
    places
        Where each part stands in its whole, by name; what has none is whole.
    seed
        The run's.
    initial
        The weights to begin with, if not random ones.
    """
    for name, parameter in decoder.named_parameters():
        part: Tensor = parameter.detach()
        if isinstance(part, DTensor):
            part = part.to_local()
        place = places.get(name)
        shape: Sequence[int] = () if place is None else place.shape
        start = () if place is None else start_of(place)
        if adapters.is_of_adapter(name):
            adapters.fill(part, seed, name)
        elif initial is None or not initial.fill(part, name, shape, start):
            fill(part, decoder.spec, seed, name, shape, start)


def start_of(place: Place) -> tuple[int, ...]:
    """Where in the whole a part begins, per dimension."""
    _, start = compute_local_shape_and_global_offset(place.shape, place.mesh, place.placements)
    return tuple(start)
