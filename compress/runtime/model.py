"""The transformers model around its layers: its class, and the cache that it answers with."""

from functools import cache
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from compress.families import Family
from compress.kv.attention import NAME
from compress.kv.growing import GrowingCache
from compress.plan import AttentionPlan
from compress.runtime.decoder import FusedDecoder, caches
from compress.runtime.plan_cache import PlanCache
from compress.share.config import shares_of
from compress.share.modules import is_shared, share_layers


class Caching:
    """What is added to a transformers model with a language head: a cache of ours where the caller passes none."""

    config: Any
    attention_plan: AttentionPlan | None = None

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        made: Any = model_kwargs.get("past_key_values")
        if given is not None or made is None:
            return
        usual = type(made) is DynamicCache and not made.offloading
        if self.attention_plan is not None:
            if not usual:
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} knows nothing of this model's "
                    "attention plan; leave it out, or load the model without its plan (kv=False)"
                )
            model_kwargs["past_key_values"] = PlanCache(self.config, self.attention_plan)
        elif usual:
            made.layers = GrowingCache.growing(made.layers)


class Answering(Caching):
    """A model over packed layers."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Packed layers have no form of their own on disk.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a packed model isn't saved again: copy the folder that it was loaded from, or load it with packed=False"
        )


class PlannedDecoder(nn.Module):
    """A decoder of plain layers that makes the cache of an attention plan where the caller passes none."""

    config: Any
    attention_plan: AttentionPlan

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
        """What the family's decoder returns for the same arguments."""
        if past_key_values is None and caches(self, use_cache, inputs_embeds):
            past_key_values = PlanCache(self.config, self.attention_plan)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


def answering_class(family: Family) -> type[PreTrainedModel]:
    """The family's class with a language head and :class:`Answering`."""
    base: Any = family.load_class("ForCausalLM")
    return _answering(base)


def follow(model: PreTrainedModel, plan: AttentionPlan) -> None:
    """Let a model that was just loaded attend as a plan says, through the plan's cache where a caller passes none.

    Layers that share, as the plan says, give up what they don't need any more.

    Args:
        model: packed or dense; whether its layers share already or not.
        plan: made for this model.

    Raises:
        InputError: it was made for another one.
    """
    plan.check(model.config)
    decoder: Any = model.base_model
    shares = shares_of(plan)
    if shares and not is_shared(model):
        share_layers(model, shares)
    classes: tuple[Any, Any] = type(model), type(decoder)
    model.set_attn_implementation(NAME)
    if not isinstance(model, Caching):
        model.__class__ = _with(Caching, classes[0])
    if not isinstance(decoder, FusedDecoder):
        decoder.__class__ = _with(PlannedDecoder, classes[1])
    model.attention_plan = decoder.attention_plan = plan


@cache
def _answering(base: Any) -> type[PreTrainedModel]:
    members = {"__module__": __name__, "__doc__": f"{base.__name__} with packed layers."}
    return type(f"Packed{base.__name__}", (Answering, base), members)


@cache
def _with(first: Any, base: Any) -> Any:
    """The base under its own name, which ``save_pretrained`` writes down, with another class before it."""
    return type(base.__name__, (first, base), {"__module__": __name__, "__doc__": base.__doc__})
