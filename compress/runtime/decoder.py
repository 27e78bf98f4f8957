"""A decoder that answers one new token in fused steps on a CPU.

A decoder layer of the common block costs two dozen calls into PyTorch for one token, most of them tiny. Here it costs
four: one C++ call from the hidden state to queries and keys after RoPE, the cache's ``update``, attention, and one C++
call from its output to the next layer's hidden state (``kernels/block``).

The decoder is the family's own class with another ``forward``, so all around it stays transformers': ``generate``,
positions, masks, the cache. It takes the fused way for a call where that is exact, and for every other call (a prompt,
gradients, hooks, hidden states or attention weights asked for, parts that were exchanged, another device or type) runs
what it inherits. Attention isn't part of the fused steps: it reads what the cache returned, through the function that
``attn_implementation`` names. That of ``sdpa`` alone is replaced by ours, for the same keys, values and mask.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from compress.families import Family
from compress.kv.growing import GrowingCache
from compress.plan import AttentionPlan
from compress.runtime.fusion import SLIDING, Answer, Fusion, Step, fusion_of
from compress.runtime.plan_cache import PlanCache

MOST_ROWS = 8  # sequences that answer at once; more are faster as a matrix product
_MASKS: dict[str, Callable[..., Tensor | None]] = {
    "full_attention": create_causal_mask,
    SLIDING: create_sliding_window_causal_mask,
}


class FusedDecoder(nn.Module):
    """What is put before the family's decoder class; see the module's text."""

    config: Any
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    attention_plan: AttentionPlan | None = None
    _fusion: Fusion | None = None  # one value: threads never see the steps of one state and the parts of another

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the family's decoder returns for the same arguments, with a cache of ours where it would make one."""
        if past_key_values is None and caches(self, use_cache, inputs_embeds):
            plan = self.attention_plan
            past_key_values = GrowingCache(self.config) if plan is None else PlanCache(self.config, plan)
        if past_key_values is not None and inputs_embeds is None and self._asked(input_ids, attention_mask, kwargs):
            assert input_ids is not None
            steps = self._current_steps(past_key_values)
            if steps is not None:
                inputs_embeds, input_ids = self.embed_tokens(input_ids), None
                if _readable(inputs_embeds):
                    return self._answer(steps, inputs_embeds, attention_mask, position_ids, past_key_values)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _asked(self, ids: Tensor | None, mask: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the fused steps can answer these arguments."""
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or ids.shape[0] > MOST_ROWS or ids.device.type != "cpu":
            return False
        if kwargs.get("return_dict") is False or any(
            value is not None and value is not False for key, value in kwargs.items() if key != "return_dict"
        ):
            return False
        config = self.config
        if config._attn_implementation == "eager" or self.training or config.output_hidden_states:
            return False  # eager attention is asked for to look at its weights
        return mask is None or isinstance(mask, Tensor)

    def _current_steps(self, past: Any) -> tuple[Step, ...] | None:
        """The steps if they give what the inherited way gives, made anew where a part was exchanged."""
        fusion = self._fusion
        if fusion is None or not fusion.current():
            self._fusion = fusion = fusion_of(self)
        if fusion.steps is None or fusion.patched():
            return None
        if torch.is_grad_enabled() and (fusion.trained() or _differentiable(past)):
            return None
        return fusion.steps

    def _answer(
        self, steps: tuple[Step, ...], hidden: Tensor, attention_mask: Any, position_ids: Tensor | None, past: Any
    ) -> Any:
        batch = hidden.shape[0]
        if position_ids is None:
            position_ids = torch.full((1, 1), past.get_seq_length())
        masks = {
            kind: _MASKS[kind](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=past,
                position_ids=position_ids,
            )
            for kind in dict.fromkeys(step.kind for step in steps)
        }
        cos, sin = (
            table.view(table.shape[0], -1).expand(batch, -1).contiguous()
            for table in self.rotary_emb(hidden, position_ids=position_ids)
        )
        answer = Answer((cos, sin), past, masks, self.config._attn_implementation, {})
        flat = hidden.view(batch, -1).clone()  # the layers write into it, and the embedding's output isn't theirs
        for step in steps:
            flat = step(flat, answer)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(flat.unsqueeze(1)), past_key_values=past)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._fusion = None  # the steps point into tensors that are now replaced
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fusion": None}  # addresses aren't those of a copy


def caches(decoder: Any, use_cache: bool | None, embeds: Tensor | None) -> bool:
    """Whether a cache is to be made that is written in place: not where a gradient may go through it."""
    if not (decoder.config.use_cache if use_cache is None else use_cache):
        return False
    if not torch.is_grad_enabled():
        return True
    return not (embeds is not None and embeds.requires_grad) and not any(p.requires_grad for p in decoder.parameters())


def fused_class(family: Family) -> type[Any]:
    """The family's decoder class with a fused way."""
    base: Any = family.load_class("Model")
    return _fused(base)


@cache
def _fused(base: Any) -> type[Any]:
    members = {"__module__": __name__, "__doc__": f"{base.__name__} with fused steps."}
    return type(f"Fused{base.__name__}", (FusedDecoder, base), members)


def _readable(hidden: Tensor) -> bool:
    """Whether hidden states are what the first step reads; a hook may have changed those of the embedding."""
    if hidden.requires_grad and torch.is_grad_enabled():
        return False
    return hidden.dtype == torch.float32 and hidden.device.type == "cpu" and hidden.is_contiguous()


def _differentiable(past: Any) -> bool:
    """Whether a cache holds keys or values that want a gradient."""
    held = (getattr(layer, name, None) for layer in getattr(past, "layers", ()) for name in ("keys", "values"))
    return any(isinstance(states, Tensor) and states.requires_grad for states in held)
