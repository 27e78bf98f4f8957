"""The grid of SEA's compressed attention: W pixels a row, stretched over the keys that it sees (arXiv 2310.01777).

Pixel c of a row with t visible keys covers keys ``[round(c t / W), round((c + 1) t / W))``, halves rounded up. It is
integer arithmetic, so that rows of a million keys are exact. Where t < W some pixels cover no key.
"""

import torch
from torch import Tensor


def first_key(pixel: Tensor, visible: Tensor, width: int) -> Tensor:
    """The first key of pixels 0 to W; that of pixel W is t. Shapes broadcast, int64."""
    return (2 * pixel * visible + width) // (2 * width)


def pixel_of(key: Tensor, visible: Tensor, width: int) -> Tensor:
    """The pixel that covers a key ``0 <= key < visible``. Shapes broadcast, int64."""
    return (width * (2 * key + 1) - 1) // (2 * visible)


def resize(logits: Tensor, visible: Tensor, length: int, jitter: Tensor | None = None) -> Tensor:
    """Compressed attention of chosen rows over all keys (eq. 6 and section 3.3): every key reads its pixel.

    Args:
        logits: ``[B, H, R, W]``, or the logarithm of compressed attention.
        visible: keys that each row sees ``[R]``, from 1 to ``length``.
        length: T.
        jitter: what is added to the keys' indices ``[R, T]``, in keys, while learning.

    Returns:
        Log-probabilities ``[B, H, R, T]``; minus infinity at keys that a row doesn't see.
    """
    width = logits.shape[-1]
    key, seen = torch.arange(length, device=logits.device), visible[:, None]
    index = pixel_of(key, seen, width)
    if jitter is not None:
        index = ((key + 0.5 + jitter) / seen * width - 1e-4).floor().long()
    index = index.clamp(0, width - 1).expand(*logits.shape[:-1], length)
    return logits.gather(-1, index).masked_fill(key >= seen, -torch.inf).log_softmax(-1)


def compress(probabilities: Tensor, visible: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Full attention on the grid: the inverse direction, for pictures and for a mean map.

    Args:
        probabilities: ``[B, H, R, T]``.
        visible: keys that each row sees ``[R]``.
        width: W.

    Returns:
        Mass of every pixel ``[B, H, R, W]``, and the share of the row's keys that it covers ``[R, W]``.
    """
    edges = first_key(torch.arange(width + 1, device=visible.device), visible[:, None], width)
    sums = torch.nn.functional.pad(probabilities.cumsum(-1), (1, 0))
    ends = sums.gather(-1, edges.expand(*probabilities.shape[:-1], width + 1))
    return ends.diff(dim=-1), edges.diff(dim=-1) / visible[:, None]
