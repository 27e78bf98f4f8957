"""How promising chunks of keys are: the inner stage of HiP's search."""

from collections.abc import Callable

import torch
from compress.kernels import dispatch
from compress.kernels.chunk_scores import cpu
from compress.kernels.chunk_scores import reference as _reference
from compress.kernels.chunk_scores import triton as _triton
from torch import Tensor

__all__ = ["chunk_scores", "descend", "path"]

MOST_ROWS = 128  # of pooled queries, which a GPU holds at once


def chunk_scores(q: Tensor, k: Tensor, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> Tensor:
    """Scores of chunks by a binary descent: the pruning stage of InfiniteHiP (arXiv 2502.08910, section 3).

    In every chunk ``[l, r)`` two keys stand for its halves, those at ``(l + c) // 2`` and ``(c + r) // 2`` with
    ``c = (l + r) // 2``; each scores ``max_p q_p . k`` over the query rows, and the better half, of equal ones the
    right, is halved in turn until one key is left. A chunk's score is the largest that was met.

    Args:
        q: query rows, pooled or not ``[N, P, D]``, P at most 128 on a GPU.
        k: keys of all sequences and heads, one after the other ``[S, D]``.
        base: int32 ``[N]``, where the keys of each n begin.
        starts: int32 ``[N, C]``, first slot of every chunk, counted from ``base``; a negative one is no chunk.
        ends: int32 ``[N]``, one past the last slot that may be looked at; what begins behind it is no chunk, and of
            what reaches beyond it the last slot stands for the rest.
        chunk: slots of a chunk, a power of two, at least 2.

    Returns:
        ``[N, C]`` float32, minus infinity where there is no chunk.

    Raises:
        ValueError: shapes or a chunk that don't fit; a GPU that can't run the kernel.
    """
    _check(q, k, base, starts, ends, chunk)
    if path(q) == "triton":
        return _triton.chunk_scores(q, k, base, starts, ends, chunk)
    if q.device.type == "cpu":
        return cpu.chunk_scores(q, k, base, starts, ends, chunk)
    return _reference.chunk_scores(q, k, base, starts, ends, chunk)


def descend(
    q: Tensor, read: Callable[[Tensor], Tensor], base: Tensor, starts: Tensor, ends: Tensor, chunk: int
) -> Tensor:
    """:func:`chunk_scores` of keys that lie elsewhere; PyTorch on every device, nothing is checked.

    Args:
        q: as there.
        read: keys ``[n, D]`` float32 in slots ``[n]``, which are counted over all keys.
        base: as there.
        starts: as there.
        ends: as there.
        chunk: as there.
    """
    return cpu.descend(q, read, base, starts, ends, chunk)


def path(q: Tensor) -> dispatch.Path:
    """The path that `chunk_scores` takes; "reference" is PyTorch, on a CPU by blocks of rows."""
    return dispatch.pick(q.device, has_triton=q.dtype in (torch.float16, torch.bfloat16, torch.float32))


def _check(q: Tensor, k: Tensor, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> None:
    if q.dim() != 3 or k.dim() != 2 or q.shape[2] != k.shape[1] or q.dtype != k.dtype or q.shape[1] == 0:
        shapes = f"{q.dtype} {list(q.shape)} and {k.dtype} {list(k.shape)}"
        raise ValueError(f"queries [N, P, D] don't fit keys [S, D]: {shapes}")
    if q.device.type != "cpu" and q.shape[1] > MOST_ROWS:
        raise ValueError(f"{q.shape[1]} query rows, at most {MOST_ROWS} on a GPU")
    for name, tensor, shape in (("base", base, (len(q),)), ("starts", starts, (len(q), -1)), ("ends", ends, (len(q),))):
        if tensor.dim() != len(shape) or len(tensor) != len(q) or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if chunk < 2 or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk}: must be a power of two, at least 2")
