"""The C++ path of `segment_attention` (``kernels/native/segment_attention.h``)."""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from compress.kernels.kv_pack.cpu import KINDS
from compress.kernels.native import Library
from compress.kernels.segment_attention.segment import Segment
from torch import Tensor

_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p


class CompressSide(ctypes.Structure):
    """`CompressSide` of segment_attention.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("codes", "params", "channels")),
        *((name, _SIZE) for name in ("bits", "kind", "channel_kind", "batch", "head", "token")),
        *((name, _SIZE) for name in ("params_batch", "params_head", "params_token")),
    )


class CompressSegment(ctypes.Structure):
    """`CompressSegment` of segment_attention.h."""

    _fields_ = (("keys", CompressSide), ("values", CompressSide), ("bounds", _POINTER))


class CompressSegments(ctypes.Structure):
    """`CompressSegments` of segment_attention.h."""

    _fields_ = (
        ("segments", ctypes.POINTER(CompressSegment)),
        *((name, _POINTER) for name in ("q", "out", "lse")),
        *((name, _SIZE) for name in ("count", "batch", "heads", "kv_heads", "rows", "width", "threads")),
        ("scaling", ctypes.c_double),
    )


class Prepared:
    """Segments ready for the C++ function of one build; keeps their tensors alive, and reads their bounds at each call.

    Args:
        segments: as for `segment_attention`; those that are always empty may be left out.
        build: of the library.
        threads: share the KV heads of all sequences.
    """

    def __init__(self, segments: Sequence[Segment], build: Library, threads: int = 1) -> None:
        self._functions, self._threads = declared(build), threads
        self._held = [_owned(segment) for segment in segments if segment.longest]
        self._segments = (CompressSegment * len(self._held))(*map(_described, self._held))

    def __call__(self, q: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """See :func:`compress.kernels.segment_attention.segment_attention`; computed in float32.

        Raises:
            MemoryError: no memory for the scores.
        """
        batch, heads, rows, width = q.shape
        query = q.float().contiguous()
        out, lse = torch.empty_like(query), torch.empty(batch, heads, rows)
        kv_heads = self._held[0].keys.shape[1] if self._held else heads
        call = CompressSegments(
            *(self._segments, query.data_ptr(), out.data_ptr(), lse.data_ptr(), len(self._held)),
            *(batch, heads, kv_heads, rows, width, self._threads, scaling),
        )
        if self._functions.compress_segment_attention(call):
            raise MemoryError("no memory for the scores of attention")
        return out.to(q.dtype), lse


def segment_attention(q: Tensor, segments: Sequence[Segment], scaling: float, build: Library) -> tuple[Tensor, Tensor]:
    """See :func:`compress.kernels.segment_attention.segment_attention`; computed in float32."""
    return Prepared(segments, build)(q, scaling)


@cache
def declared(build: Library) -> ctypes.CDLL:
    """The library's function with the types of the arguments that it takes."""
    build.functions.compress_segment_attention.argtypes = (ctypes.POINTER(CompressSegments),)
    build.functions.compress_segment_attention.restype = _SIZE
    return build.functions


def _owned(segment: Segment) -> Segment:
    """The segment with channel vectors, bounds and floats as the C++ function reads them."""
    sides: dict[str, Tensor | None] = {}
    for side, bits in (("key", segment.key_bits), ("value", segment.value_bits)):
        vectors: Tensor | None = getattr(segment, f"{side}_channels")
        states: Tensor = getattr(segment, f"{side}s")
        sides[f"{side}_channels"] = None if vectors is None else vectors.contiguous()
        sides[f"{side}s"] = states.float() if bits == 16 and states.dtype not in KINDS else states
    if all(getattr(segment, name) is held for name, held in sides.items()) and segment.bounds.is_contiguous():
        return segment
    return Segment(**{**vars(segment), **sides, "bounds": segment.bounds.contiguous()})


def _described(segment: Segment) -> CompressSegment:
    keys = _side(segment.keys, segment.key_bits, segment.key_params, segment.key_channels)
    values = _side(segment.values, segment.value_bits, segment.value_params, segment.value_channels)
    return CompressSegment(keys, values, segment.bounds.data_ptr())


def _side(codes: Tensor, bits: int, params: Tensor | None, channels: Tensor | None) -> CompressSide:
    return CompressSide(
        *(codes.data_ptr(), None if params is None else params.data_ptr()),
        *(None if channels is None else channels.data_ptr(), bits, KINDS.get(codes.dtype, 0)),
        *(0 if channels is None else KINDS[channels.dtype], *codes.stride()[:3]),
        *((0, 0, 0) if params is None else params.stride()[:3]),
    )
