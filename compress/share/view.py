"""A model whose layers share attention, seen layer by layer."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compress.checkpoint import Checkpoint
from compress.model import ModelFacts, ModelView
from compress.plan import Share
from compress.share.echo import ECHO, Echo
from compress.share.modules import consumer_of, share_layers
from compress.tap import NAME


class SharedView(ModelView):
    """As :class:`compress.model.ModelView`, for ``facts.shares``.

    Layers must be run in their order: what an owner leaves is what it was called with last, in the same thread.
    """

    def __init__(self, facts: ModelFacts, checkpoint: Checkpoint, path: Path, trust_remote_code: bool) -> None:
        super().__init__(facts, checkpoint, path, trust_remote_code)
        self.echo = Echo()

    def _shape_layer(self, module: nn.Module, layer: int) -> None:
        name, share = self.family.attention, self.facts.shares.get(layer)
        attention: Any = module.get_submodule(name)
        if share is not None:
            setattr(module, name, consumer_of(attention, share, self.echo))
        elif any(other.source == layer for other in self.facts.shares.values()):
            setattr(attention, ECHO, self.echo)
            attention.config._attn_implementation = NAME

    def _shape_model(self, model: PreTrainedModel) -> None:
        share_layers(model, self.facts.shares)


def shared_view(view: ModelView, checkpoint: Checkpoint, shares: Mapping[int, Share]) -> SharedView:
    """A model whose layers share, of the facts and files of one whose layers didn't."""
    facts = replace(view.facts, shares=dict(shares))
    return SharedView(facts, checkpoint, view.path, view.trust_remote_code)
