"""The one cache of every method: each layer as the attention plan has it."""

from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from compress.kernels.hadamard import rotation
from compress.kv.bytes import KVBytes
from compress.kv.layer import LayerFormat, PackedLayer
from compress.plan import AttentionPlan, KVBits
from compress.runtime.cache import GrowingLayer

FULL = "full_attention"


class PlanCache(Cache):
    """A cache for ``model.generate(..., past_key_values=PlanCache(model.config, plan))``.

    The model must attend through ``compress_plan`` (``model.set_attn_implementation``) if a layer is packed. Layers
    that aren't in the plan, and those with a sliding window or a recurrence, are transformers' own.

    Args:
        config: of the model.
        plan: made for this model.

    Raises:
        InputError: a plan for another model, or one that asks for what this version doesn't run.
    """

    def __init__(self, config: PreTrainedConfig, plan: AttentionPlan) -> None:
        decoder = config.get_text_config(decoder=True)
        plan.check(decoder)
        self.plan = plan
        turned = plan.packing is not None and plan.packing.rotate
        width = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        self._rotation = rotation(width, "hadamard", 0)[0].float() if turned else None
        kinds, arguments = get_layer_types_and_kwargs(decoder)
        layers = [self._layer(index, kind, own) for index, (kind, own) in enumerate(zip(kinds, arguments, strict=True))]
        super().__init__(layers=layers)

    def _layer(self, index: int, kind: str, arguments: dict[str, Any]) -> Any:
        if kind != FULL:
            return DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
        bits = self._bits(index)
        if bits is None or self.plan.packing is None:
            return GrowingLayer()
        return PackedLayer(LayerFormat(self.plan.packing, bits, index, self._rotation))

    def _bits(self, index: int) -> KVBits | None:
        return self.plan.layers[index].heads[0].kv

    def nbytes(self) -> KVBytes:
        """Bytes of all layers; what isn't packed is payload."""
        return sum((self._layer_bytes(layer) for layer in self.layers), KVBytes(0, 0, 0))

    def _layer_bytes(self, layer: Any) -> KVBytes:
        if isinstance(layer, PackedLayer):
            return layer.nbytes()
        if not isinstance(layer.keys, Tensor) or layer.keys.numel() == 0:
            return KVBytes(0, 0, 0)
        held = layer.keys.nbytes + layer.values.nbytes
        rooms = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (layer.keys, layer.values)}
        return KVBytes(held, held, sum(rooms.values()))
