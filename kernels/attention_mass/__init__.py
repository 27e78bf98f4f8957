"""How much attention every key receives from chosen query rows: RSQ's token importance and ZipCache's saliency."""

import torch
from compress.kernels import dispatch
from compress.kernels.attention_mass import cpu
from compress.kernels.attention_mass import reference as _reference
from compress.kernels.attention_mass import triton as _triton
from torch import Tensor

__all__ = ["attention_mass", "path"]


def attention_mass(
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    scaling: float,
    window: int | None = None,
    sum_heads: bool = False,
) -> Tensor:
    """Column sums of causal attention probabilities, ``mass[b, h, j] = sum_r softmax_j(scaling q_r . k_j)``.

    RSQ's attention concentration (arXiv 2503.01820, section 4) is the sum over all rows and heads; ZipCache's saliency
    (arXiv 2405.14256, equation 8) takes probe rows and divides by how many of them can see a key. Memory is O(T), the
    probabilities never exist together, and two runs agree bit for bit.

    Args:
        q: queries after rotary embedding ``[B, H, R, D]``, float16, bfloat16 or float32.
        k: keys after rotary embedding ``[B, Hkv, T, D]``; H is a multiple of Hkv.
        rows: position of every query row among the keys, integers ``[R]`` in any order; a negative one sees nothing.
            None: the last R positions, in order.
        scaling: factor of the scores.
        window: how many last keys a row sees, itself included, in a sliding-window layer.
        sum_heads: whether to add up the heads.

    Returns:
        ``[B, H, T]``, or ``[B, T]`` with ``sum_heads``, float32. A head's sums add up to the number of rows that see a
        key.

    Raises:
        ValueError: shapes or a window that don't fit; a GPU that can't run the kernel.
    """
    _check(q, k, rows, window)
    if path(q, k) == "triton":
        return _triton.attention_mass(q, k, rows, scaling, window, sum_heads)
    if q.device.type == "cpu":
        return cpu.attention_mass(q, k, rows, scaling, window, sum_heads)
    return _reference.attention_mass(q, k, rows, scaling, window, sum_heads)


def path(q: Tensor, k: Tensor) -> dispatch.Path:
    """The path that `attention_mass` takes; "reference" is PyTorch, on a CPU by blocks of queries."""
    return dispatch.pick(q.device, has_triton=q.dtype in (torch.float16, torch.bfloat16, torch.float32))


def _check(q: Tensor, k: Tensor, rows: Tensor | None, window: int | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"queries [B, H, R, D] don't fit keys [B, Hkv, T, D]: {list(q.shape)} and {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads aren't a multiple of {k.shape[1]} KV heads")
    if rows is None and q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} query rows without positions don't fit {k.shape[2]} keys")
    if rows is not None and (rows.shape != q.shape[2:3] or rows.dtype.is_floating_point):
        raise ValueError(f"rows must be integers [{q.shape[2]}], got {rows.dtype} of shape {list(rows.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a row sees at least itself")
