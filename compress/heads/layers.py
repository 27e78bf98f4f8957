"""A model in memory, run one decoder layer at a time, each call of attention shown to a tap (``compress.tap``)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.fingerprint import sliding_layers
from compress.share.modules import shares
from compress.tap import NAME, Tap


class Layers:
    """The parts of a transformers model of one of our families, weights frozen.

    Args:
        model: with a language head or without.

    Attributes:
        sliding: layers with a sliding window of the model's own.
        full: layers whose heads may be told to see less: those that slide, share or are shared stay as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config.get_text_config(decoder=True)
        self.device = model.device
        self.count = int(self.config.num_hidden_layers)
        self.kv_heads = int(self.config.num_key_value_heads)
        self._model: Any = model
        self._decoder: Any = model.base_model
        self.sliding = set(sliding_layers(self.config))
        shared = {index for index, layer in enumerate(self._decoder.layers) if shares(layer.self_attn)}
        self.full = tuple(sorted(set(range(self.count)) - self.sliding - shared))

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Let the model attend through the tap, its weights frozen; afterwards it is as it was."""
        config, before = self._model.config, self._model.config._attn_implementation
        learning = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        self._model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            config._attn_implementation = before
            for parameter in learning:
                parameter.requires_grad_(True)

    def embed(self, ids: Tensor) -> Tensor:
        """The residual stream before the first layer ``[1, T, hidden]`` of tokens ``[T]``."""
        embedded: Tensor = self._model.get_input_embeddings()(ids.to(self.device)[None])
        return embedded

    def positions(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a sequence ``[1, T, hidden]``."""
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        cos, sin = self._decoder.rotary_emb(hidden, places)
        return cos, sin

    def run(self, index: int, hidden: Tensor, positions: tuple[Tensor, Tensor], tap: Tap | None) -> Tensor:
        """One layer on a whole sequence ``[1, T, hidden]``; within :meth:`tapped`."""
        mask = self._mask(index, hidden)
        output: Tensor = self._decoder.layers[index](
            hidden, attention_mask=mask, position_embeddings=positions, tap=tap
        )
        return output

    def norm(self, hidden: Tensor) -> Tensor:
        """The last norm, float32."""
        normed: Tensor = self._decoder.norm(hidden)
        return normed.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the residual stream behind the last layer, ``[..., hidden]`` to ``[..., vocabulary]``."""
        found: Tensor = self._model.get_output_embeddings()(self._decoder.norm(hidden))
        return found

    def _mask(self, index: int, hidden: Tensor) -> Tensor | None:
        """As :meth:`compress.model.ModelView.attention_mask`."""
        length = hidden.shape[1]
        if index not in self.sliding or self.config.sliding_window >= length:
            return None
        place = torch.arange(length, device=hidden.device)
        distance = place[:, None] - place[None, :]
        return ((distance >= 0) & (distance < self.config.sliding_window))[None, None]
