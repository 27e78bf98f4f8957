"""Attention with a mask of its own for every row, a block of rows at a time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kv.window import Tokens

ROWS = 256  # that share one mask in memory


def masked_attention(
    query: Tensor, held: Tokens, places: Tensor, seen: Callable[[Tensor], Tensor], scaling: float
) -> Tensor:
    """``softmax(scaling q k^T) v`` over what each row sees; memory for the mask of ``ROWS`` rows.

    Args:
        query: [batch, heads, rows, head_dim].
        held: keys and values [batch, KV heads, tokens, head_dim].
        places: of the rows, [batch, rows]; negative for padding, whose output is zero.
        seen: gives for the places of some rows what they see, [batch, rows, tokens] bool on the CPU.
        scaling: factor of the scores.

    Returns:
        Shaped like ``query``.
    """
    out = torch.empty_like(query)
    for start in range(0, query.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        padding = (places[:, rows] < 0).to(query.device)
        mask = seen(places[:, rows]).to(query.device) | padding[..., None]  # a row that sees nothing has no softmax
        found = F.scaled_dot_product_attention(
            query[:, :, rows], held.keys, held.values, attn_mask=mask[:, None], scale=scaling, enable_gqa=True
        )
        out[:, :, rows] = found.masked_fill_(padding[:, None, :, None], 0.0)
    return out
