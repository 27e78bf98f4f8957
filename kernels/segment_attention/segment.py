"""Keys and values in one storage format: a class of packed tokens, the window, the sinks, the newest token."""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 4, 8, 16)  # of a code; 16: not quantized
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Segment:
    """Keys and values of up to C slots a sequence and KV head; attention doesn't care for their order.

    A key's channels are ``c (s code + z) + mu``, with its own s and z and its head's c and mu (arXiv 2405.14256, the
    channel-separable tokenwise scheme; per-channel keys have c and mu alone); values likewise. Codes lie as
    :func:`compress.kernels.kv_pack.kv_pack` writes them. The last dimension of every tensor is contiguous.

    Attributes:
        keys: codes ``[B, Hkv, C, D * bits / 8]`` uint8 for 2 and 4 bits, ``[B, Hkv, C, D]`` int8 for 8 bits, or floats.
        values: likewise.
        key_bits: 2, 4, 8 or 16, which means not quantized. Keys and values may differ.
        value_bits: likewise.
        key_params: float16 ``[B, Hkv, C, 2]``, s and z; ``[B, Hkv, C, 1]``, s, for 8 bits; None (s = 1, z = 0) for
            per-channel codes and for 16 bits.
        value_params: likewise.
        key_channels: float16 or float32 ``[B, Hkv, 2, D]``, c and mu; None for c = 1, mu = 0.
        value_channels: likewise.
        bounds: int32 ``[B, Hkv, 2]``, the first slot that exists and one past the last; none where they are equal.
        longest: the largest number of slots between bounds, as known to the host; 0 lets the segment be skipped.

    Raises:
        ValueError: tensors that don't fit each other.
    """

    keys: Tensor
    values: Tensor
    key_bits: int
    value_bits: int
    key_params: Tensor | None
    value_params: Tensor | None
    key_channels: Tensor | None
    value_channels: Tensor | None
    bounds: Tensor
    longest: int

    def __post_init__(self) -> None:
        _check_side("key", self.keys, self.key_bits, self.key_params, self.key_channels)
        _check_side("value", self.values, self.value_bits, self.value_params, self.value_channels)
        key_shape, value_shape = (
            (*self.keys.shape[:3], self.width),
            (*self.values.shape[:3], _width(self.values, self.value_bits)),
        )
        if key_shape != value_shape:
            raise ValueError(f"keys and values hold different slots: [B, Hkv, C, D] {key_shape} and {value_shape}")
        if self.bounds.shape != (*self.keys.shape[:2], 2) or self.bounds.dtype != torch.int32:
            raise ValueError(
                f"bounds must be int32 [B, Hkv, 2] = {[*self.keys.shape[:2], 2]}, "
                f"got {self.bounds.dtype} {list(self.bounds.shape)}"
            )
        if not 0 <= self.longest <= self.keys.shape[2]:
            raise ValueError(f"longest={self.longest}, but there are {self.keys.shape[2]} slots")

    @property
    def width(self) -> int:
        """D, the channels of a head."""
        return _width(self.keys, self.key_bits)


def _width(codes: Tensor, bits: int) -> int:
    return codes.shape[-1] * (8 // bits if bits < 8 else 1)


def _check_side(side: str, codes: Tensor, bits: int, params: Tensor | None, channels: Tensor | None) -> None:
    if bits not in BITS:
        raise ValueError(f"{side}_bits={bits}: choose from {', '.join(map(str, BITS))}")
    dtypes = FLOATS if bits == 16 else (torch.int8,) if bits == 8 else (torch.uint8,)
    if codes.dim() != 4 or codes.dtype not in dtypes:
        raise ValueError(
            f"{side}s of {bits} bits must be [B, Hkv, C, ...] {dtypes}, got {codes.dtype} {list(codes.shape)}"
        )
    wanted = (*codes.shape[:3], 1 if bits == 8 else 2)
    if params is None:
        if bits == 8:
            raise ValueError(f"{side}s of 8 bits need {side}_params, their scales [B, Hkv, C, 1]")
    elif bits == 16 or params.shape != wanted or params.dtype != torch.float16:
        raise ValueError(
            f"{side}_params must be {'None' if bits == 16 else f'float16 {list(wanted)}'} for {bits} bits, "
            f"got {params.dtype} {list(params.shape)}"
        )
    wanted = (*codes.shape[:2], 2, _width(codes, bits))
    if channels is not None and (channels.shape != wanted or channels.dtype not in (torch.float16, torch.float32)):
        raise ValueError(
            f"{side}_channels must be float16 or float32 [B, Hkv, 2, D] = {list(wanted)}, "
            f"got {channels.dtype} {list(channels.shape)}"
        )
