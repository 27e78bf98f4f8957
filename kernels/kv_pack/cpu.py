"""The C++ path of `kv_pack` (``kernels/native/kv_pack.h``), which can also write behind what a cache holds already."""

import ctypes
from functools import cache

import torch
from compress.kernels.native import Library
from torch import Tensor

_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # CompressKind of quant_linear.h

Out = tuple[Tensor, Tensor | None]


class CompressPack(ctypes.Structure):
    """`CompressPack` of kv_pack.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "channels", "codes", "params")),
        *((name, _SIZE) for name in ("channel_kind", "batch", "heads", "tokens", "width")),
        *((f"{name}_{place}", _SIZE) for name in ("x", "codes", "params") for place in ("batch", "head", "token")),
        *((name, _SIZE) for name in ("bits", "clip")),
    )


def kv_pack(
    x: Tensor, bits: int, channels: Tensor | None, choices: tuple[bool, bool], build: Library, out: Out | None = None
) -> Out:
    """See :func:`compress.kernels.kv_pack.kv_pack`.

    Args:
        x: as there; computed in float32.
        bits: as there.
        channels: as there.
        choices: ``clip`` and ``per_token`` of there.
        build: of the library.
        out: codes and parameters to write into, of the right shapes and in any strides but a contiguous last dimension.

    Raises:
        MemoryError: no memory for a row.
    """
    clip, per_token = choices
    codes, params = empty(x, bits, per_token) if out is None else out
    x = x.float()
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    if channels is not None:
        channels = channels.contiguous()
    call = CompressPack(
        *(x.data_ptr(), None if channels is None else channels.data_ptr(), codes.data_ptr()),
        *(None if params is None else params.data_ptr(), 0 if channels is None else KINDS[channels.dtype]),
        *x.shape,
        *x.stride()[:3],
        *codes.stride()[:3],
        *((0, 0, 0) if params is None else params.stride()[:3]),
        *(bits, int(clip)),
    )
    if x.numel() and declared(build).compress_kv_pack(call):
        raise MemoryError("no memory for a row of keys or values")
    return codes, params


def empty(x: Tensor, bits: int, per_token: bool) -> Out:
    """Codes and parameters of ``x`` [B, H, T, D], not filled."""
    shape = x.shape[:3]
    if bits == 8:
        return torch.empty(x.shape, dtype=torch.int8), torch.empty(*shape, 1, dtype=torch.float16)
    codes = torch.empty(*shape, x.shape[3] * bits // 8, dtype=torch.uint8)
    return codes, torch.empty(*shape, 2, dtype=torch.float16) if per_token else None


@cache
def declared(build: Library) -> ctypes.CDLL:
    """The library's function with the types of the arguments that it takes."""
    build.functions.compress_kv_pack.argtypes = (ctypes.POINTER(CompressPack),)
    build.functions.compress_kv_pack.restype = _SIZE
    return build.functions
