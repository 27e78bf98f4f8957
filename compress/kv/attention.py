"""The attention function of every method that changes attention at run time, and its mask, for transformers.

A cache driven by an attention plan (``compress/runtime/plan_cache.py``) returns handles in the place of keys and
values; the function asks the layer behind a handle to attend. Layers that the plan leaves alone return tensors, and for
those the function is transformers' ``sdpa`` with the mask that ``sdpa`` would have got; what other layers take from
them is held for these (``compress/share/echo.py``). Causal masks stay two-dimensional until then, so that a long prompt
doesn't cost a matrix of its length squared; all others, and those of a static cache, whose room is longer than what it
holds, are made by transformers.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, flash_attention_mask, sdpa_mask

from compress.kv.layer import NO_GRADIENTS, Handle
from compress.share.echo import ECHO, Echo

NAME = "compress_plan"
_HARMLESS = (
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "num_items_in_batch",
)  # fmt: skip
_SDPA = ("sliding_window", "position_bias", "softcap", "output_attentions")
"""What ``sdpa`` computes, finds in its mask, or refuses by itself."""


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
    echo: Echo | None = getattr(module, ECHO, None)
    if not isinstance(key, Handle):
        _refuse(module, kwargs, _SDPA)
        mask = _sdpa_mask(query, key, attention_mask)
        if echo is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            index: Any = module.layer_idx
            led = echo.lead(index, query, key, value, mask, scale)
            if led is not None:
                return led.transpose(1, 2), None
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if echo is not None:
        raise ValueError(f"layer {module.layer_idx} shares its attention and packs, searches or drops tokens too")
    _refuse(module, kwargs, packed=True)
    if dropout or (attention_mask is not None and attention_mask.dim() != 2):
        what = "dropout" if dropout else f"a mask of {attention_mask.dim()} dimensions"  # type: ignore[union-attr]
        raise _unknown(module, what, packed=True)
    if query.requires_grad:
        raise ValueError(NO_GRADIENTS)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = key.layer.attend(query, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, kwargs: dict[str, Any], known: tuple[str, ...] = (), packed: bool = False) -> None:
    """Raise for an argument that would change attention."""
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise _unknown(module, "attention that isn't causal", packed)
    for name, held in kwargs.items():
        if name in known or held is None or held is False or name == "is_causal":
            continue
        if name not in _HARMLESS or name == "output_attentions":
            raise _unknown(module, name, packed)


def _unknown(module: nn.Module, what: str, packed: bool) -> ValueError:
    problem = f"the attention function {NAME!r} doesn't compute {what} (of {type(module).__name__})"
    if packed:
        problem += "; for a function that does, make the cache with PlanCache(..., materialize=True)"
    return ValueError(problem)


def _sdpa_mask(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask that transformers' ``sdpa`` would have got."""
    if mask is not None and mask.dim() != 2:
        return mask
    count, length = query.shape[2], key.shape[2]
    return sdpa_mask(
        batch_size=len(query),
        q_length=count,
        kv_length=length,
        q_offset=length - count,
        attention_mask=mask,
        device=query.device,
    )


def plan_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: "int | Tensor" = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers makes for :func:`plan_attention`; the signature is transformers'.

    Returns:
        For causal attention of the last tokens [batch, tokens] bool, None without padding; else what ``sdpa`` gets.
    """
    last = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    make = flash_attention_mask if last and mask_function is causal_mask_function else sdpa_mask
    if not last:
        kwargs["allow_is_causal_skip"] = False  # without a mask, queries are taken for the last tokens
    return make(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


AttentionInterface.register(NAME, plan_attention)
AttentionMaskInterface.register(NAME, plan_mask)
