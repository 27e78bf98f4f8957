"""The transformers model around packed layers: its class, and the cache that it answers with."""

from functools import cache
from typing import Any, NoReturn

from transformers import DynamicCache, PreTrainedModel

from compress.families import Family
from compress.runtime.cache import GrowingCache


class Answering:
    """What is added to a transformers model with a language head: its own cache where the caller passes none."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        made: Any = model_kwargs.get("past_key_values")
        if given is None and type(made) is DynamicCache and not made.offloading:
            made.layers = GrowingCache.growing(made.layers)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Packed layers have no form of their own on disk.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a packed model isn't saved again: copy the folder that it was loaded from, or load it with packed=False"
        )


def answering_class(family: Family) -> type[PreTrainedModel]:
    """The family's class with a language head and :class:`Answering`."""
    base: Any = family.load_class("ForCausalLM")
    return _answering(base)


@cache
def _answering(base: Any) -> type[PreTrainedModel]:
    members = {"__module__": __name__, "__doc__": f"{base.__name__} with packed layers."}
    return type(f"Packed{base.__name__}", (Answering, base), members)
