"""Token importance: how much each calibration token counts in the Hessian (RSQ, arXiv 2503.01820, section 4).

Every strategy gives one raw score a token of one sample; :func:`weights` turns scores into the weights ``w_t`` of
``H = sum_t w_t x_t x_t^T``:

    r = (raw - min) / (max - min) * (r_max - r_min) + r_min,        w_t = r_t^p / mean(r^p)

so that every sample has the same total mass. ``p = 1`` is what the authors' code does, ``p = 2`` what the paper writes.
"""

from dataclasses import dataclass

import torch
from compress.kernels.attention_mass import attention_mass
from torch import Tensor

STRATEGIES = ("attention", "act_norm", "act_diff", "token_freq", "token_sim", "first_n", "first_last_n")
NEEDS_ATTENTION = frozenset({"attention"})
NEEDS_OUTPUT = frozenset({"act_diff"})


@dataclass(frozen=True)
class Spread:
    """The range that raw scores are mapped to, and the power they are raised to."""

    low: float = 0.005
    high: float = 1.0
    power: float = 1.0


def weights(raw: Tensor, spread: Spread) -> Tensor:
    """Importance weights of mean one.

    Args:
        raw: scores ``[T]`` of one sample.
        spread: the range and power.

    Returns:
        ``w [T]`` float32, mean 1. Equal scores give exactly one everywhere.
    """
    raw = raw.to(torch.float32)
    low, high = raw.min(), raw.max()
    if not torch.isfinite(raw).all() or high == low:
        return torch.ones_like(raw)
    r = ((raw - low) / (high - low) * (spread.high - spread.low) + spread.low).clamp(spread.low, spread.high)
    powered = r if spread.power == 1.0 else r.pow(spread.power)
    return powered / powered.mean()


def attention_concentration(q: Tensor, k: Tensor, *, scaling: float, window: int | None = None) -> Tensor:
    """How much attention every token receives: ``r_t = sum_heads sum_i A[head, i, t]``, causal softmax in float32.

    Args:
        q: queries after rotary embedding ``[heads, T, head_dim]``.
        k: keys after rotary embedding ``[kv_heads, T, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        scaling: factor of the scores.
        window: how many last keys a query sees, itself included, in a sliding-window layer.

    Returns:
        ``r [T]`` float32; sums to ``heads * T``.
    """
    return attention_mass(q[None], k[None], None, scaling, window, sum_heads=True)[0]


def act_norm(layer_input: Tensor) -> Tensor:
    """Length of the layer's input, ``[T, hidden] -> [T]``: larger is heavier."""
    return layer_input.float().norm(dim=-1)


def act_diff(layer_input: Tensor, layer_output: Tensor) -> Tensor:
    """Minus the distance between the layer's output and its input ``[T, hidden]``: little changed is heavier."""
    return -(layer_output.float() - layer_input.float()).norm(dim=-1)


def token_freq(ids: Tensor, counts: Tensor) -> Tensor:
    """Minus how often each token of the sample stands in the calibration set: rare is heavier.

    Args:
        ids: the sample ``[T]``.
        counts: occurrences of every token of the vocabulary ``[vocab]``.
    """
    return -counts[ids].float()


def token_sim(layer_input: Tensor) -> Tensor:
    """Mean squared distance to all tokens of the sample, ``[T, hidden] -> [T]``: unlike the others is heavier.

    ``mean_u |x_t - x_u|^2 = |x_t|^2 - 2 x_t . mean(x) + mean |x_u|^2``, so nothing of size T x T is made.
    """
    x = layer_input.double()
    squares = x.square().sum(-1)
    return (squares - 2 * (x @ x.mean(0)) + squares.mean()).float()


def first_n(length: int, device: torch.device | str = "cpu") -> Tensor:
    """One for the first eighth of the tokens, zero for the rest: ``[T]``."""
    raw = torch.zeros(length, device=device)
    raw[: max(length // 8, 1)] = 1.0
    return raw


def first_last_n(length: int, device: torch.device | str = "cpu") -> Tensor:
    """One for the first and last thirty-second of the tokens, zero between: ``[T]``."""
    raw = torch.zeros(length, device=device)
    edge = max(length // 32, 1)
    raw[:edge] = raw[-edge:] = 1.0
    return raw
