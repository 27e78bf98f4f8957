"""Attention of the newest tokens over KV heads that hold unequally many tokens."""

from collections.abc import Sequence

from compress.kernels import dispatch
from compress.kernels.flash_prefill.triton import supports
from compress.kernels.ragged_decode import cpu
from compress.kernels.ragged_decode import reference as _reference
from compress.kernels.ragged_decode import triton as _triton
from compress.kernels.ragged_decode.cluster import MAX_CLUSTERS, Cluster
from torch import Tensor

__all__ = ["MAX_CLUSTERS", "Cluster", "path", "ragged_decode"]


def ragged_decode(q: Tensor, clusters: Sequence[Cluster], scaling: float | None = None) -> tuple[Tensor, Tensor]:
    """``softmax(scaling q K^T) V`` over what every KV head holds, and its log-sum-exp.

    Every row sees every slot within bounds: which tokens a cache holds for them is its owner's affair. Plans by head
    make the lengths of heads differ a hundredfold, and a GPU that gives each head equally many programs waits for the
    longest. So the tiles of all heads are one list, of which every program takes an equal run, across the borders of
    heads (stream-K, as LeanAttention does it, arXiv 2405.10480, section 4); what a head's runs come to is merged by
    log-sum-exp in a fixed order, without atomics.

    Args:
        q: queries after rotary embedding ``[B, H, R, D]``, float16, bfloat16 or float32 (float64 on a CPU); on a GPU at
            most 64 rows ``R * H / Hkv`` a KV head.
        clusters: 1 to 3, in the dtype of q, whose heads together are all Hkv KV heads, each once; H is a multiple of
            Hkv.
        scaling: factor of the scores; None for ``1 / sqrt(D)``.

    Returns:
        Output ``[B, H, R, D]`` in the dtype of q, and the natural log-sum-exp of the scores ``[B, H, R]`` float32.
        Where a KV head of a sequence has no slot: zeros and minus infinity.

    Raises:
        ValueError: shapes or heads that don't fit; a GPU that can't run the kernel.
    """
    _check(q, clusters)
    scale = q.shape[3] ** -0.5 if scaling is None else scaling
    if path(q) == "triton":
        return _triton.ragged_decode(q, clusters, scale)
    if q.device.type == "cpu":
        return cpu.ragged_decode(q, clusters, scale)
    return _reference.ragged_decode(q, clusters, scale)


def path(q: Tensor) -> dispatch.Path:
    """The path that `ragged_decode` takes; "reference" is PyTorch, on a CPU its blockwise attention."""
    return dispatch.pick(q.device, has_triton=supports(q))


def _check(q: Tensor, clusters: Sequence[Cluster]) -> None:
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"queries must be floats [B, H, R, D], got {q.dtype} of shape {list(q.shape)}")
    if not 1 <= len(clusters) <= MAX_CLUSTERS:
        raise ValueError(f"there must be 1 to {MAX_CLUSTERS} clusters, got {len(clusters)}")
    heads = sorted(head for cluster in clusters for head in cluster.heads)
    if not heads or heads != list(range(len(heads))) or q.shape[1] % len(heads):
        raise ValueError(f"clusters must hold each KV head of {q.shape[1]} query heads once, they hold {heads}")
    for number, cluster in enumerate(clusters):
        shape = cluster.keys.shape
        if shape[0] != q.shape[0] or shape[3] != q.shape[3] or cluster.keys.dtype != q.dtype:
            raise ValueError(
                f"queries {q.dtype} [B, H, R, D] = {list(q.shape)} don't fit cluster {number}, "
                f"{cluster.keys.dtype} [B, n, C, D] = {list(shape)}"
            )
