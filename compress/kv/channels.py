"""Channel vectors of a block of tokens: what keys and values are centred on and divided by before they are packed.

Keys by channel (ZipCache, KIVI): step ``s_i = (max_t - min_t) / (2^b - 1)`` and minimum of every channel over the
tokens. Channel-separable (CST): ``c_i = sqrt(max_t |x[t, i]|)``, which leaves half of an outlier to the channel and
half to the token's own scale.
"""

import torch
from torch import Tensor

_LEAST = 2.0**-14  # the smallest normal float16: a channel of zeros is divided by something


def centre(x: Tensor) -> Tensor:
    """Mean over the tokens, [batch, heads, tokens, head_dim] to [batch, heads, head_dim]."""
    return x.float().mean(2)


def separable(x: Tensor, middle: Tensor | None = None) -> Tensor:
    """``(c, mu)`` of channel-separable quantization, [batch, heads, 2, head_dim] float16.

    Args:
        x: [batch, heads, tokens, head_dim].
        middle: [batch, heads, head_dim] that is subtracted first; None is zero.
    """
    middle = torch.zeros_like(x[:, :, 0], dtype=torch.float32) if middle is None else middle.half().float()
    low, high = x.float().amin(2), x.float().amax(2)  # ten times as fast as aminmax along this dimension
    largest = torch.maximum(high - middle, middle - low)
    return _pair(largest.sqrt(), middle)


def plain(x: Tensor, middle: Tensor | None = None) -> Tensor | None:
    """As :func:`separable` with ``c = 1``; None where nothing is to be done."""
    return None if middle is None else _pair(torch.ones_like(middle), middle)


def by_channel(x: Tensor, bits: int) -> Tensor:
    """``(step, minimum)`` of every channel over the tokens, [batch, heads, 2, head_dim] float16."""
    low, high = x.float().amin(2), x.float().amax(2)  # ten times as fast as aminmax along this dimension
    return _pair((high - low) / (2**bits - 1), low)


def _pair(scale: Tensor, shift: Tensor) -> Tensor:
    return torch.stack([scale.clamp(min=_LEAST), shift], 2).half()
