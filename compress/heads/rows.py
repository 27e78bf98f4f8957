"""Attention probabilities of chosen rows, block by block, and what is measured on them for every KV head."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.evalsuite.head import evaluating
from compress.heads.layers import Layers
from compress.tap import Seen

BLOCK_ELEMENTS = 1 << 22
"""Probabilities that exist at once; a single row of all heads does in any case."""

Measure = Callable[[Seen], Tensor]
"""One figure for every query head ``[heads]`` from one layer's attention."""


def probabilities(seen: Seen, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal attention of chosen rows of a single sequence.

    Args:
        seen: queries and keys of a layer, batch 1; the last query is at the last key.
        rows: positions among the keys, ascending ``[R]``.

    Yields:
        Blocks of the rows ``[r]``, and their probabilities ``[heads, r, n]``, float32, over the first n keys, behind
        which none of them sees any.
    """
    heads, count = seen.query.shape[1:3]
    kv_heads, length = seen.key.shape[1:3]
    group = heads // kv_heads
    for block in rows.split(max(1, BLOCK_ELEMENTS // (heads * length))):
        keys = seen.key[0, :, : int(block[-1]) + 1].float()
        query = seen.query[0, :, block - (length - count)].float() * seen.scaling
        scores = query.reshape(kv_heads, group * len(block), -1) @ keys.transpose(1, 2)
        scores = scores.view(kv_heads, group, len(block), -1)
        later = torch.arange(keys.shape[1], device=keys.device) > block.to(keys.device)[:, None]
        yield block, scores.masked_fill_(later, -torch.inf).softmax(-1).view(heads, len(block), -1)


def measured(model: PreTrainedModel, sequences: Iterator[tuple[Tensor, Measure]]) -> Tensor:
    """Run sequences through a model and measure the attention of every layer.

    Args:
        model: a causal language model; it is left as it was.
        sequences: tokens ``[T]``, and what is measured on them.

    Returns:
        Means over the sequences, the largest of a group's query heads, ``[layers, KV heads]`` float32 on the CPU.
        Layers with a sliding window of the model's own have 0: a plan leaves them alone.
    """
    layers = Layers(model)
    found = torch.zeros(layers.count, layers.config.num_attention_heads)
    count = 0
    with evaluating(model), layers.tapped():
        for ids, measure in sequences:

            def tap(seen: Seen, measure: Measure = measure) -> Tensor:
                if seen.layer in layers.full:
                    found[seen.layer] += measure(seen).cpu()
                return seen.attend()

            model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1, tap=tap)
            count += 1
    return by_kv_head(found / count, layers.kv_heads)


def by_kv_head(found: Tensor, kv_heads: int) -> Tensor:
    """The largest figure of every group: ``[layers, heads]`` to ``[layers, KV heads]``."""
    return found.view(len(found), kv_heads, -1).amax(-1)
