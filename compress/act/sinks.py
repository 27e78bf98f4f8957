"""Which tokens are sinks: columns of attention whose mean, over the rows that see them, is above a threshold.

Section 3 of arXiv 2406.15765. The first token is never among them. Column sums come from the kernel
``attention_mass``, without a matrix of probabilities, so that the rows of a prompt are gone through twice.
"""

import torch
from torch import Tensor

from compress.kernels.attention_mass import attention_mass
from compress.plan import Calibration


def received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention that each token gets from the last rows of a text, [batch, heads, tokens] float32.

    Args:
        query: of the last rows, [batch, heads, rows, head_dim].
        key: [batch, KV heads, tokens, head_dim].
        scaling: factor of the scores.
    """
    return attention_mass(query, key, None, scaling)


def sight(rows: int, tokens: int, device: torch.device) -> Tensor:
    """By how many of the last rows each token is seen, [tokens] float32."""
    return (tokens - torch.arange(tokens, device=device)).clamp(max=rows).float()


def sinks(sums: Tensor, seen: Tensor, calibration: Calibration) -> Tensor:
    """Which tokens are sinks.

    Args:
        sums: attention that they got, [batch, heads, tokens].
        seen: from how many rows, [tokens].
        calibration: its threshold, by the number of tokens where it is relative.

    Returns:
        [batch, heads, tokens] bool, False for the first token and for those that no row saw.
    """
    tokens = sums.shape[-1]
    bound = calibration.threshold / tokens if calibration.relative else calibration.threshold
    found = sums > bound * seen  # no row, no attention
    found[..., :1] = False
    return found
