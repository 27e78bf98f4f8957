"""KIVI's cache, to measure against: keys by channel in groups of tokens, values by token in groups of channels.

KIVI (arXiv 2402.02750) rounds keys channel by channel, because their outliers sit in channels, in groups of 32 tokens;
values token by token in groups of 32 channels. What isn't rounded yet waits in 16 bits: keys until ``residual`` of them
are together, of values always the last ``residual``. Codes are packed and never rounded again; every call unpacks all
of them for transformers' own attention, which is as exact as a kernel of its own, and slower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin, get_layer_types_and_kwargs

from compress.evalsuite.efficiency import allocated
from compress.kernels.kv_pack import kv_pack, kv_unpack
from compress.kv import channels
from compress.kv.arena import Change
from compress.kv.bytes import KVBytes
from compress.kv.window import stored_dtype

GROUP = 32


@dataclass(frozen=True)
class KiviFormat:
    """How a layer keeps its tokens.

    Attributes:
        bits: 2 or 4.
        residual: keys that are rounded together, a multiple of ``GROUP``; values that wait in 16 bits.
        recent: further keys, and further values, that wait in 16 bits.
    """

    bits: int
    residual: int = 128
    recent: tuple[int, int] = (0, 0)


class Packed:
    """Codes with their parameters, token by token or group by group of tokens, in the order of the tokens.

    Attributes:
        codes: [batch, KV heads, tokens, head_dim * bits / 8] uint8.
        params: [batch, KV heads, groups, ...] float16.
        tokens: how many there are.
    """

    def __init__(self) -> None:
        self.codes: Tensor | None = None
        self.params: Tensor | None = None
        self.tokens = 0

    def append(self, codes: Tensor, params: Tensor) -> None:
        """Put more behind what is there; both without spare room."""
        self.tokens += codes.shape[2]
        if self.codes is None or self.params is None:
            self.codes, self.params = codes, params
            return
        self.codes, self.params = torch.cat([self.codes, codes], 2), torch.cat([self.params, params], 2)

    def change(self, change: Change) -> None:
        """Apply a function of the batch's dimension."""
        if self.codes is not None and self.params is not None:
            self.codes, self.params = change(self.codes), change(self.params)


class KiviLayer(CacheLayerMixin):
    """One layer of full attention.

    Args:
        format: how tokens are kept.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, format: KiviFormat) -> None:
        super().__init__()
        self.format = format
        self.packed_keys, self.packed_values = Packed(), Packed()
        self.keys: Any = None
        self.values: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type, device and shape from the first keys [batch, KV heads, tokens, head_dim].

        Raises:
            ValueError: a head size that can't be packed.
        """
        if key_states.shape[-1] % 8 or value_states.shape[-1] % 8:
            raise ValueError(f"head_dim {key_states.shape[-1]} can't be packed: it isn't a multiple of 8")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x[:, :, :0].to(stored_dtype(self.dtype)) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in [batch, KV heads, new, head_dim]; returns all keys and values, the new ones as they came."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        shown = self._all(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states.to(self.keys.dtype)], 2)
        self.values = torch.cat([self.values, value_states.to(self.values.dtype)], 2)
        self._pack_keys()
        self._pack_values()
        return shown

    def get_seq_length(self) -> int:
        """Tokens that are held."""
        return self.packed_keys.tokens + self.keys.shape[2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that new queries are shown, and where the first of them stands."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order, as beam search does."""
        self._change(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._change(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: "Tensor | Sequence[int]") -> None:
        """Keep some of the sequences."""
        self._change(lambda held: held[torch.as_tensor(indices, device=held.device)])

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.format)  # type: ignore[misc]

    def _change(self, change: Change) -> None:
        if self.is_initialized:
            self.packed_keys.change(change)
            self.packed_values.change(change)
            self.keys, self.values = change(self.keys), change(self.values)

    def nbytes(self) -> KVBytes:
        """Bytes of codes and 16-bit tokens, the same with parameters, and of all tensors."""
        if not self.is_initialized:
            return KVBytes(0, 0, 0)
        packed = (self.packed_keys, self.packed_values)
        payload = self.keys.nbytes + self.values.nbytes + sum(x.codes.nbytes for x in packed if x.codes is not None)
        stored = payload + sum(x.params.nbytes for x in packed if x.params is not None)
        return KVBytes(
            payload, stored, allocated((self.packed_keys, self.packed_values, self.keys, self.values)).nbytes
        )

    def _all(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        keys = [self._unpacked_keys(), self.keys.to(self.dtype), key_states]
        values = [self._unpacked_values(), self.values.to(self.dtype), value_states]
        return torch.cat(keys, 2), torch.cat(values, 2)

    def _pack_keys(self) -> None:
        """Every whole ``residual`` of keys, in groups of tokens that share a step and a minimum a channel."""
        residual, (recent, _) = self.format.residual, self.format.recent
        count = max(0, self.keys.shape[2] - recent) // residual * residual
        if not count:
            return
        batch, heads, _, width = self.keys.shape
        groups = self.keys[:, :, :count].reshape(batch, -1, GROUP, width)
        steps = channels.by_channel(groups, self.format.bits)
        codes, _ = kv_pack(groups, self.format.bits, steps, per_token=False)
        self.packed_keys.append(codes.view(batch, heads, count, -1), steps.view(batch, heads, -1, 2, width))
        self.keys = self.keys[:, :, count:].clone()

    def _pack_values(self) -> None:
        """All values but the last, in groups of channels that share a step and a minimum a token."""
        count = self.values.shape[2] - self.format.residual - self.format.recent[1]
        if count <= 0:
            return
        batch, heads, _, width = self.values.shape
        groups = self.values[:, :, :count].reshape(batch, heads, -1, self._value_group(width))
        codes, params = kv_pack(groups, self.format.bits)
        assert params is not None
        self.packed_values.append(codes.view(batch, heads, count, -1), params.view(batch, heads, count, -1))
        self.values = self.values[:, :, count:].clone()

    def _unpacked_keys(self) -> Tensor:
        codes, steps = self.packed_keys.codes, self.packed_keys.params
        if codes is None or steps is None:
            return self.keys[:, :, :0].to(self.dtype)
        batch, heads, tokens, _ = codes.shape
        width = steps.shape[-1]
        groups = codes.view(batch, heads * tokens // GROUP, GROUP, -1)
        found = kv_unpack(groups, None, self.format.bits, steps.view(batch, -1, 2, width))
        return found.view(batch, heads, tokens, width).to(self.dtype)

    def _unpacked_values(self) -> Tensor:
        codes, params = self.packed_values.codes, self.packed_values.params
        if codes is None or params is None:
            return self.values[:, :, :0].to(self.dtype)
        batch, heads, tokens, _ = codes.shape
        width = self.values.shape[3]
        groups = tokens * width // self._value_group(width)
        found = kv_unpack(codes.view(batch, heads, groups, -1), params.view(batch, heads, groups, 2), self.format.bits)
        return found.view(batch, heads, tokens, width).to(self.dtype)

    @staticmethod
    def _value_group(width: int) -> int:
        return math.gcd(width, GROUP)


class KiviCache(Cache):
    """A KIVI cache for a model; layers with a sliding window or a recurrence are transformers' own.

    Args:
        config: of the model.
        format: of every layer with full attention.
    """

    def __init__(self, config: PreTrainedConfig, format: KiviFormat) -> None:
        kinds, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        layers = [
            KiviLayer(format) if kind == "full_attention" else DYNAMIC_LAYER_TYPE_MAPPING[kind](**own)
            for kind, own in zip(kinds, arguments, strict=True)
        ]
        super().__init__(layers=layers)
