"""A baseline: how far back a head looks by its mean query and key alone, re-made from the description of kvpress.

A layer's queries and keys before rotary embedding are averaged over text. With the mean key at every position and the
mean query at the last, attention depends on distance alone; the score is the area under its cumulative sum from the
oldest position on: 0.5 for a head that looks everywhere alike, near 0 for one that looks at the newest tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compress.evalsuite.head import evaluating
from compress.fingerprint import fingerprint_of
from compress.heads.layers import Layers
from compress.tap import Seen

POSITIONS = 500
"""How often mean key and query are repeated."""


def mean_qk_scores(model: PreTrainedModel, windows: Sequence[Tensor]) -> Tensor:
    """The score of every KV head, the mean over its query heads as the baseline has it.

    Args:
        model: of a family that turns queries and keys as Llama does; it is left as it was.
        windows: text, ``[T]`` each.

    Returns:
        ``[layers, KV heads]``, float32 on the CPU; 0 in layers with a sliding window of the model's own.
    """
    layers = Layers(model)
    width = fingerprint_of(model.config).head_dim
    heads = layers.config.num_attention_heads
    scaling = torch.zeros(layers.count)
    queries = torch.zeros(layers.count, heads, width)
    keys = torch.zeros(layers.count, layers.kv_heads, width)
    with evaluating(model), layers.tapped():
        for ids in windows:
            cos, sin = layers.positions(layers.embed(ids))
            scale = cos.square() + sin.square()  # other than 1 where a RoPE variant scales its sines

            def tap(
                seen: Seen, cos: Tensor = cos / scale, sin: Tensor = -sin / scale, count: int = len(windows)
            ) -> Tensor:
                query, key = apply_rotary_pos_emb(seen.query, seen.key, cos, sin)
                queries[seen.layer] += query[0].float().mean(1).cpu() / count
                keys[seen.layer] += key[0].float().mean(1).cpu() / count
                scaling[seen.layer] = seen.scaling
                return seen.attend()

            model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1, tap=tap)
        cos, sin = (part.cpu().float() for part in layers.positions(layers.embed(windows[0].new_zeros(POSITIONS))))
    found = torch.zeros(layers.count, layers.kv_heads)
    for layer in layers.full:
        query = queries[layer].unsqueeze(1).expand(-1, POSITIONS, -1)
        key = keys[layer].unsqueeze(1).expand(-1, POSITIONS, -1)
        query, key = (part[0] for part in apply_rotary_pos_emb(query[None], key[None], cos, sin))
        last = query[:, -1:].view(layers.kv_heads, -1, width)
        mass = (last @ key.transpose(1, 2) * scaling[layer]).softmax(-1)
        found[layer] = mass.cumsum(-1).mean(-1).mean(-1)
    return found
