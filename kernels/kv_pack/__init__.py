"""Keys and values of a cache as packed codes of 2, 4 or 8 bits, and back."""

import torch
from compress.kernels import dispatch, native
from compress.kernels.kv_pack import cpu
from compress.kernels.kv_pack import reference as _reference
from compress.kernels.kv_pack import triton as _triton
from torch import Tensor

__all__ = ["kv_pack", "kv_unpack", "path"]


def kv_pack(
    x: Tensor, bits: int, channels: Tensor | None = None, clip: bool = False, per_token: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Quantize every token of every head and pack its codes.

    Channel-separable tokenwise quantization (ZipCache, arXiv 2405.14256, section 4.2): channels are divided by c, which
    takes half of an outlier, and every token is rounded between its own least and largest channel,

        y = (x - mu) / c,  s = (max y - min y) / (2^b - 1),  z = min y,  code = clamp(round((y - z) / s), 0, 2^b - 1).

    s and z are rounded to float16 before the codes are found, so that these are the best for what is stored. ``clip``
    shrinks the range about its middle by the one of seven ratios (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7) that has the
    least squared error of x; the larger ratio wins a tie. Without ``per_token`` c and mu are a channel's own step and
    minimum (ZipCache's and KIVI's keys) and nothing is stored for a token. 8 bits are symmetric, ``s = max |x| / 127``.

    Half of the channels share bytes with the other half, so that codes unpack without a shuffle: byte j holds, from the
    low bits up, channels j and j + D/2 at 4 bits; j, j + D/4, j + D/2 and j + 3D/4 at 2 bits.

    Args:
        x: ``[B, H, T, D]`` float16, bfloat16 or float32 (float64 on a CPU), any of B, H and T may be 0.
            Where a token isn't finite, neither are its parameters, and its codes mean nothing.
        bits: 2, 4 or 8.
        channels: float16 or float32 ``[B, H, 2, D]``, c > 0 and mu; None for c = 1, mu = 0, the only choice for 8 bits.
        clip: search for the range, which pays at 2 bits; no matter for 8 bits or without ``per_token``.
        per_token: whether a token has its own s and z; no matter for 8 bits.

    Returns:
        Codes uint8 ``[B, H, T, D * bits / 8]``, int8 ``[B, H, T, D]`` for 8 bits; and parameters float16
        ``[B, H, T, 2]``, s and z, or ``[B, H, T, 1]``, s alone, for 8 bits, or None without ``per_token``.

    Raises:
        ValueError: bits or shapes that don't fit, a D that isn't a multiple of 8; a GPU that can't run the kernel.
    """
    _check(x, bits, channels, per_token)
    if path(x) == "triton":
        return _triton.kv_pack(x, bits, channels, clip, per_token)
    build = native.library() if path(x) != "reference" else None
    if build is not None:
        return cpu.kv_pack(x, bits, channels, (clip, per_token), build)
    return _reference.kv_pack(x, bits, channels, clip, per_token)


def kv_unpack(codes: Tensor, params: Tensor | None, bits: int, channels: Tensor | None = None) -> Tensor:
    """What packed codes stand for, ``c (s code + z) + mu``; PyTorch on every device, for tests and for export.

    Args:
        codes: ``[B, H, T, D * bits / 8]``, as `kv_pack` returns them.
        params: its parameters; None for s = 1, z = 0.
        bits: 2, 4 or 8.
        channels: ``[B, H, 2, D]``, c and mu; None for c = 1, mu = 0.

    Returns:
        ``[B, H, T, D]`` float32.

    Raises:
        ValueError: bits other than 2, 4 or 8.
    """
    _check_bits(bits)
    return _reference.kv_unpack(codes, params, bits, channels)


def path(x: Tensor) -> dispatch.Path:
    """The path that `kv_pack` takes."""
    known = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return dispatch.pick(x.device, has_triton=known, has_native=known)


def _check(x: Tensor, bits: int, channels: Tensor | None, per_token: bool) -> None:
    _check_bits(bits)
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floats [B, H, T, D], got {x.dtype} of shape {list(x.shape)}")
    if x.shape[3] % 8 or x.shape[3] == 0:
        raise ValueError(f"D={x.shape[3]}: the channels of a head must be a multiple of 8 to be packed")
    if bits == 8:
        if channels is not None:
            raise ValueError("codes of 8 bits have no channel vectors: channels must be None")
        return
    if channels is None and not per_token:
        raise ValueError("without parameters of their own, tokens need the steps and minima of their channels")
    wanted = [*x.shape[:2], 2, x.shape[3]]
    if channels is not None and (
        list(channels.shape) != wanted or channels.dtype not in (torch.float16, torch.float32)
    ):
        raise ValueError(
            f"channels must be float16 or float32 [B, H, 2, D] = {wanted}, "
            f"got {channels.dtype} of shape {list(channels.shape)}"
        )


def _check_bits(bits: int) -> None:
    if bits not in _reference.BITS:
        raise ValueError(f"bits={bits}: choose from {', '.join(map(str, _reference.BITS))}")
