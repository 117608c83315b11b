"""Processes arranged as a grid, of which each process knows the groups that it is in itself.

PyTorch's own `DeviceMesh` makes every group of every dimension on every process: on 100,000 processes that is as many
groups again, most of them for others. Here a process makes one group for each dimension.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh


def mesh_of(grid: Tensor, names: tuple[str, ...]) -> DeviceMesh:
    """A grid of all processes' numbers as a mesh, one name for each dimension.

    Every process must call it, with the same grid.
    """
    place = (grid == dist.get_rank()).nonzero()[0].tolist()
    groups = []
    for dim in range(grid.dim()):
        along = tuple(slice(None) if axis == dim else place[axis] for axis in range(grid.dim()))
        groups.append(_group(grid[along].tolist(), names[dim]))
    return DeviceMesh.from_group(groups, "cpu", mesh=grid, mesh_dim_names=names)


def _group(ranks: list[int], name: str) -> ProcessGroup:
    """This process and those that stand in one line of the grid with it."""
    if len(ranks) == dist.get_world_size():
        everyone = dist.group.WORLD
        assert everyone is not None
        return everyone
    group = dist.new_group(ranks, use_local_synchronization=True, group_desc=name)
    assert isinstance(group, ProcessGroup)
    return group
