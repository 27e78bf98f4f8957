"""Stream-K on a GPU with few multiprocessors, so that programs cross heads; only for a process that interprets."""

from dataclasses import replace
from unittest import mock

import torch
from compress.kernels.proofs import error, same_bits
from compress.kernels.ragged_decode import Cluster, triton
from compress.kernels.ragged_decode.spec import Part, arguments, exact
from torch import Tensor

PARTS = (
    Part((1, 3), 70, [[[0, 70], [3, 40]], [[69, 70], [70, 70]]]),
    Part((2,), 300, [[[0, 300]], [[10, 290]]]),
    Part((0,), 1),
)


def errors(processors: list[int]) -> list[float]:
    """The error with so many multiprocessors, from more tiles than programs to more programs than tiles."""
    made = arguments(2, (2, 1, 32), PARTS, torch.Generator().manual_seed(0), torch.float32)
    wanted, found = exact(*made), []
    for count in processors:
        with mock.patch.object(triton, "multiprocessors", lambda device, count=count: count):
            found.append(error(triton.ragged_decode(*made), wanted))
    return found


def _one_cluster(batch: int, part: Part) -> tuple[Tensor, Cluster, float]:
    made = arguments(1, (batch, 1, 32), (part,), torch.Generator().manual_seed(0), torch.float32)
    return made[0], made[1][0], made[2]


def wild_bounds_are_cut() -> bool:
    """Bounds outside of the slots read nothing there: what stands beside them is not a number."""
    q, cluster, scaling = _one_cluster(3, Part((0,), 40))
    room = torch.full((2, 3, 1, 100, 32), torch.nan)
    keys, values = room[:, :, :, 30:70].copy_(torch.stack([cluster.keys, cluster.values]))
    held = replace(cluster, keys=keys, values=values)
    wild, cut = torch.tensor([[[[-9, 60]], [[50, 60]], [[-9, -3]]], [[[0, 40]], [[40, 40]], [[0, 0]]]]).int()
    found = [triton.ragged_decode(q, (replace(held, bounds=bounds),), scaling) for bounds in (wild, cut)]
    return same_bits(*found) and not found[0][0].isnan().any()


def nan_stays() -> bool:
    """A key that isn't a number makes its head's output none, and no other's."""
    q, cluster, scaling = _one_cluster(1, Part((0, 1), 5))
    cluster.keys[0, 1] = torch.nan
    out, lse = triton.ragged_decode(q, (cluster,), scaling)
    return all(bool(x[:, 1].isnan().all()) and bool(x[:, 0].isfinite().all()) for x in (out, lse))
