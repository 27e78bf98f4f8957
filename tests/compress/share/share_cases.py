"""Text that a tiny model learns in seconds."""

import torch
from torch import Tensor

FIRST, KINDS = 3, 32  # tokens of the made-up text
TWIN = (1, 3, 0, 2)  # the head of the earlier layer whose attention each head of the later layer has


def made_up(windows: int, length: int, seed: int) -> Tensor:
    """Windows [N, T] in which a token follows from the one two or three before it, as the last one is low or high.

    Every tenth is drawn.
    """
    draw = torch.Generator().manual_seed(seed)
    follows = torch.stack([torch.randperm(KINDS, generator=torch.Generator().manual_seed(99 + way)) for way in (0, 1)])
    ids = torch.randint(KINDS, (windows, length), generator=draw)
    chance = torch.rand(windows, length, generator=draw) < 0.1
    for place in range(3, length):
        low = ids[:, place - 1] < KINDS // 2
        wanted = torch.where(low, follows[0][ids[:, place - 2]], follows[1][ids[:, place - 3]])
        ids[:, place] = torch.where(chance[:, place], ids[:, place], wanted)
    return ids + FIRST
