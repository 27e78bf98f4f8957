"""Attention over heads of unequal length: the definition, cluster by cluster, every probability held at once."""

from collections.abc import Sequence

import torch
from compress.kernels.flash_prefill.reference import attend
from compress.kernels.ragged_decode.cluster import Cluster
from torch import Tensor


def ragged_decode(q: Tensor, clusters: Sequence[Cluster], scaling: float) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.ragged_decode.ragged_decode`; in float64 where q is, else in float32."""
    batch, heads, count, width = q.shape
    kv_heads = sum(len(cluster.heads) for cluster in clusters)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, count, width)
    out = torch.empty_like(grouped)
    lse = torch.empty(grouped.shape[:4], device=q.device)
    for cluster in clusters:
        slots = torch.arange(cluster.keys.shape[2], device=q.device)
        seen = (slots >= cluster.bounds[..., :1]) & (slots < cluster.bounds[..., 1:])
        keys, values = (x.masked_fill(~seen[..., None], 0.0) for x in (cluster.keys, cluster.values))
        own = grouped[:, list(cluster.heads)]
        found, total = attend(own.flatten(1, 2), keys, values, scaling, seen[:, :, None])
        out[:, list(cluster.heads)] = found.reshape(own.shape)
        lse[:, list(cluster.heads)] = total.reshape(own.shape[:4]).float()
    return out.reshape(q.shape), lse.reshape(batch, heads, count)
