"""Attention as the merge of two segments, sinks and all other tokens, of which one is given another weight.

With the outputs ``Os`` and ``Ot`` of the two and the share ``m`` of attention that the sinks have,
``m = 1 / (1 + exp(lse_t - lse_s))``, attention is ``m Os + (1 - m) Ot``, and calibrated by ``beta`` it is

    O' = beta m Os + (1 - beta m) Ot

which is what multiplying the sinks' probabilities by beta gives, where all other tokens share what was taken in
proportion to theirs (arXiv 2406.15765, equations 3 and 4). The two are calls of the flash kernel: every query head of a
group hides other tokens, and does so by a further channel of its queries and of the group's keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels.flash_prefill import flash_prefill

HIDDEN = 2.0**14  # what is taken from the score of a hidden token
UNIT = 2.0**6  # of the queries' further channels: HIDDEN alone would overflow the keys of float16
ALIGNED = 8  # further channels come in multiples of it


@dataclass(frozen=True)
class Split:
    """Attention of some rows in two segments.

    Attributes:
        sinks: output over the sinks, [batch, heads, rows, head_dim]; anything where a row sees none.
        others: output over all other tokens.
        share: of attention that the sinks have, [batch, heads, rows, 1] float32.
    """

    sinks: Tensor
    others: Tensor
    share: Tensor

    def merged(self, beta: float) -> Tensor:
        """The output with sinks of ``beta`` times their weight."""
        weight = beta * self.share
        out = weight * self.sinks.float() + (1 - weight) * self.others.float()
        return out.to(self.others.dtype)

    def slope(self) -> Tensor:
        """The derivative of the output by beta, ``m (Os - Ot)``, float32."""
        return self.share * (self.sinks.float() - self.others.float())


def split(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, scaling: float) -> Split:
    """Causal attention of the last rows of a text, in two segments; memory grows with tokens, not with their square.

    Args:
        query: [batch, heads, rows, head_dim].
        key: [batch, KV heads, tokens, head_dim].
        value: alike.
        sinks: [batch, heads, tokens] bool, never the first token.
        scaling: factor of the scores.
    """
    width, group = query.shape[3], query.shape[1] // key.shape[1]
    further = -(-group // ALIGNED) * ALIGNED
    own = torch.eye(group, further, dtype=query.dtype, device=query.device).mul_(UNIT).repeat(key.shape[1], 1)
    wide = torch.cat([query, own[None, :, None].expand(*query.shape[:3], further)], 3)
    padded = F.pad(value, (0, further))
    hides = sinks.unflatten(1, (key.shape[1], group)).transpose(2, 3)  # [batch, KV heads, tokens, group]
    found = []
    for hidden in (~hides, hides):
        channels = F.pad(hidden.to(key.dtype) * (-HIDDEN / UNIT / scaling), (0, further - group))
        out, lse = flash_prefill(wide, torch.cat([key, channels], 3), padded, scaling)
        found.append((out[..., :width], lse))
    (inside, lse_inside), (outside, lse_outside) = found
    return Split(inside, outside, torch.sigmoid(lse_inside - lse_outside)[..., None])


def calibrated(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, how: tuple[float, float]) -> Tensor:
    """The last rows of a text, [batch, heads, rows, head_dim], by ``how`` (beta, scaling); see `split`."""
    beta, scaling = how
    if not bool(sinks.any()):
        return flash_prefill(query, key, value, scaling)[0]
    return split(query, key, value, sinks, scaling).merged(beta)


def calibrated_row(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, how: tuple[float, float]) -> Tensor:
    """The output of one row that sees all tokens, or those that aren't hidden.

    One row's scores are a vector, which is held, and keys are read once.

    Args:
        query: [batch, heads, 1, head_dim].
        key: [batch, KV heads, tokens, head_dim].
        value: alike.
        sinks: [batch, heads, tokens] int8: 1 for sinks, 0 for others, -1 for slots without a token.
        how: beta and the factor of the scores.
    """
    beta, scaling = how
    kinds = sinks.unflatten(1, (key.shape[1], -1))
    scores = query.float().unflatten(1, kinds.shape[1:3])[..., 0, :] @ key.float().transpose(2, 3) * scaling
    scores = scores.masked_fill(kinds < 0, -torch.inf)
    whole = scores.logsumexp(-1, keepdim=True)
    inside = (scores - whole).exp().masked_fill(kinds != 1, 0.0)
    outside = scores.masked_fill(kinds == 1, -torch.inf).softmax(-1)
    weights = beta * inside + (1 - beta * inside.sum(-1, keepdim=True)) * outside
    return (weights @ value.float()).flatten(1, 2)[:, :, None].to(query.dtype)
