"""The attention function of every method that changes attention at run time, and its mask, for transformers.

A cache driven by an attention plan (``plan_cache.py``) returns handles in the place of keys and values; the function
asks the layer behind a handle to attend. Layers that the plan leaves alone return tensors, and for those the function
is transformers' ``sdpa`` with the mask that ``sdpa`` would have got. Masks stay two-dimensional until then, so that a
long prompt doesn't cost a matrix of its length squared.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    flash_attention_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from compress.kv.layer import Handle

NAME = "compress_plan"
_HARMLESS = ("position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "output_hidden_states")


def plan_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over what the cache returned; the signature is transformers'.

    Args:
        module: the model's attention module.
        query: [batch, heads, new, head_dim].
        key: [batch, KV heads, tokens, head_dim], or a handle of a packed layer.
        value: alike.
        attention_mask: [batch, tokens] bool, False for padding; None where there is none.
        dropout: must be 0 over a handle.
        scaling: factor of the scores; None for ``head_dim ** -0.5``.
        kwargs: what a model family adds; refused where it would change attention and isn't computed here.

    Returns:
        [batch, new, heads, head_dim], and None for the weights.

    Raises:
        ValueError: an argument that isn't computed here, or one that needs gradients through a packed cache.
    """
    if not isinstance(key, Handle):
        return _plain(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    window = kwargs.pop("sliding_window", None)
    strange = [
        name for name, held in kwargs.items() if name not in _HARMLESS and held is not None and held is not False
    ]
    if window is not None:
        strange.append("sliding_window")
    if kwargs.get("output_attentions"):
        strange.append("output_attentions")
    if strange or dropout or (attention_mask is not None and attention_mask.dim() != 2):
        what = strange[0] if strange else "dropout" if dropout else f"a mask of {attention_mask.dim()} dimensions"  # type: ignore[union-attr]
        raise ValueError(f"attention over a packed KV cache doesn't compute {what} (of {type(module).__name__})")
    if query.requires_grad:
        raise ValueError("a packed KV cache has no gradients; call the model under torch.no_grad()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = key.layer.attend(query, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` with its own mask."""
    if mask is None or mask.dim() == 2:
        count, length, window = query.shape[2], key.shape[2], kwargs.get("sliding_window")
        seen = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        mask = sdpa_mask(
            batch_size=len(query),
            q_length=count,
            kv_length=length,
            q_offset=length - count,
            mask_function=seen,
            attention_mask=None if mask is None else mask[:, -length:],
            local_size=window,
            device=query.device,
        )
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, plan_attention)
AttentionMaskInterface.register(NAME, flash_attention_mask)
