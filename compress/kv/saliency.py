"""Which tokens are salient: the normalised attention that they receive from a few probe rows.

``p_i = sum_{k in P, k >= i} A[k, i] / |{k in P : k >= i}|`` (ZipCache, arXiv 2405.14256, equation 8), over a set P of
recent and of random rows. The published code divides by how many rows of the whole prompt see a token instead, which
makes nearly every recent token salient; ``normalizer="official"`` does that, for comparison.
"""

import math

import torch
from torch import Tensor

from compress.kernels.attention_mass import attention_mass
from compress.plan import Packing


def probe_rows(length: int, packing: Packing, layer: int) -> Tensor:
    """Rows of a prompt whose attention is looked at, ascending: the most recent ones, and one of each equal stretch.

    Args:
        length: tokens of the prompt.
        packing: shares of recent and random rows, the largest number of both together, and the seed.
        layer: draws differ between layers.
    """
    most = length if packing.probe_cap == 0 else packing.probe_cap
    recent = min(max(1, math.ceil(packing.probe_recent * length)), max(1, most // 2), length)
    rest = length - recent
    chosen = min(round(packing.probe_random * length), max(0, most - recent), rest)
    last = torch.arange(rest, length)
    if chosen == 0:
        return last
    generator = torch.Generator().manual_seed(hash((packing.seed, layer, length)) % 2**63)
    edges = torch.arange(chosen + 1) * rest // chosen
    drawn = edges[:-1] + (torch.rand(chosen, generator=generator) * (edges[1:] - edges[:-1])).long()
    return torch.cat([drawn, last])


def prompt_mass(query: Tensor, key: Tensor, rows: Tensor, scaling: float) -> Tensor:
    """Attention that every key of one sequence receives from probe rows, added up over the heads of a group.

    Args:
        query: [1, heads, tokens, head_dim].
        key: [1, KV heads, tokens, head_dim].
        rows: [P], the probes.
        scaling: factor of the scores.

    Returns:
        [1, KV heads, tokens] float32.
    """
    probes = rows.to(query.device)
    mass = attention_mass(query[:, :, probes], key, probes, scaling)
    return mass.view(1, key.shape[1], -1, key.shape[2]).sum(2)


def late_mass(query: Tensor, key: Tensor, lse: Tensor, scaling: float, seen: Tensor | None = None) -> Tensor:
    """Attention that some keys receive, where the whole log-sum-exp of every row is known already.

    Args:
        query: [batch, heads, P, head_dim].
        key: [batch, KV heads, T, head_dim].
        lse: [batch, heads, P] over these keys and all others.
        scaling: factor of the scores.
        seen: [batch, 1, P, T] bool, which row sees which key; None: all.

    Returns:
        [batch, KV heads, T] float32.
    """
    batch, heads, count, width = query.shape
    grouped = query.float().reshape(batch, key.shape[1], -1, width)
    scores = (grouped @ key.float().transpose(-1, -2)).view(batch, heads, count, -1) * scaling
    weights = (scores - lse[..., None]).exp()
    if seen is not None:
        weights = weights.masked_fill(~seen, 0.0)
    return weights.view(batch, key.shape[1], -1, key.shape[2]).sum(2)


def witnesses(rows: Tensor, length: int, official: bool) -> Tensor:
    """By how many rows each of ``length`` tokens could be seen, [length] float32: of the probes, or of all rows."""
    if official:
        return torch.arange(length, 0, -1, dtype=torch.float32)
    return (rows[:, None] >= torch.arange(length)).sum(0).float()


def salient(score: Tensor, share: float) -> Tensor:
    """The tokens with the highest scores, [batch, heads, tokens] to bool: ``round(share * tokens)`` of each head."""
    count = round(share * score.shape[2])
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter_(2, score.topk(count, dim=2).indices, True) if count else chosen
