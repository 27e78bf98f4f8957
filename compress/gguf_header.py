"""The header of a GGUF file: metadata and tensor table, with every size checked against the file.

The ``gguf`` package's reader turns each of the ~100,000 tokens and merges into numpy objects (4 s and 160 MB for a
135M model) and follows a damaged length wherever it leads; here they are stepped over. Its tables of block sizes and
its dequantisation are used as they are.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from compress.calibrate.errors import InputError

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor stands in the file; the shape is in PyTorch's order."""

    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (an array of strings is given as its length) and tensors, by the names in the file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _TruncatedError(Exception):
    """The header points beyond the end of the file."""


class _Cursor:
    """Reads values one after another and never beyond the end; arrays of strings only if ``strings`` is set."""

    def __init__(self, buffer: mmap.mmap, strings: bool = False) -> None:
        self.buffer = buffer
        self.strings = strings
        self.at = 0

    def skip(self, count: int) -> int:
        start = self.at
        if start + count > len(self.buffer):
            raise _TruncatedError
        self.at = start + count
        return start

    def scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self.buffer, self.skip(struct.calcsize(form)))[0]

    def string(self) -> str:
        size = self.scalar("<Q")
        start = self.skip(size)
        return self.buffer[start : start + size].decode("utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == GGUFValueType.STRING:
            return self.string()
        item = GGUFValueType(self.scalar("<I"))
        count = self.scalar("<Q")
        if item in _SCALARS:
            size = struct.calcsize(_SCALARS[item])
            start = self.skip(count * size)
            return list(struct.unpack_from(f"<{count}{_SCALARS[item][1]}", self.buffer, start))
        if item != GGUFValueType.STRING:
            raise ValueError(f"an array of {item.name}")
        if self.strings:
            return [self.string() for _ in range(count)]
        for _ in range(count):
            self.skip(self.scalar("<Q"))
        return count


def _mapped(path: Path, source: str) -> mmap.mmap:
    try:
        with path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError("--model", source, f"{path.name} can't be read ({error.strerror})") from error


def read_header(path: Path, source: str) -> GgufHeader:
    """Read the header of a GGUF file and check that all of its tensors are in the file.

    Raises:
        InputError: not a GGUF file, another version, damaged or truncated, one part of several, or stored in a type
            that can't be dequantised.
    """
    if path.stat().st_size < 24:
        raise InputError("--model", source, f"{path.name} is too short to be a GGUF file")
    with _mapped(path, source) as buffer:
        if buffer[:4] != b"GGUF":
            raise InputError("--model", source, f"{path.name} isn't a GGUF file (it doesn't begin with 'GGUF')")
        cursor = _Cursor(buffer)
        cursor.skip(4)
        version = cursor.scalar("<I")
        if version not in _VERSIONS:
            problem = f"{path.name} is GGUF version {version}, or was written on a big-endian machine"
            raise InputError("--model", source, problem, allowed="versions 2 and 3, little-endian")
        try:
            header = _parse(cursor)
        except _TruncatedError as error:
            problem = f"{path.name} ({len(buffer):,} bytes) is truncated: its header goes beyond the end of the file"
            raise InputError("--model", source, problem, fix="download it again") from error
        except (ValueError, struct.error) as error:
            problem = f"{path.name} has a damaged header ({error})"
            raise InputError("--model", source, problem, fix="download it again") from error
        size = len(buffer)
    _check(header, size, path, source)
    return header


def read_strings(path: Path, prefix: str) -> dict[str, Any]:
    """All metadata whose key begins with ``prefix``, arrays of strings included, of a file whose header was read."""
    with _mapped(path, str(path)) as buffer:
        cursor = _Cursor(buffer, strings=True)
        cursor.skip(16)
        metadata = {}
        for _ in range(cursor.scalar("<Q")):
            key = cursor.string()
            value = cursor.value(GGUFValueType(cursor.scalar("<I")))
            if key.startswith(prefix):
                metadata[key] = value
    return metadata


def _parse(cursor: _Cursor) -> GgufHeader:
    tensor_count, metadata_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(GGUFValueType(cursor.scalar("<I")))
    table = [_parse_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {alignment}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: GgufTensor(tensor.shape, tensor.qtype, start + tensor.offset, tensor.nbytes) for name, tensor in table
    }
    return GgufHeader(metadata, tensors)


def _parse_tensor(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """One row of the tensor table; its offset counts from the start of the data."""
    name = cursor.string()
    shape = tuple(cursor.scalar("<Q") for _ in range(cursor.scalar("<I")))[::-1]
    qtype = GGMLQuantizationType(cursor.scalar("<I"))
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    if not shape or shape[-1] % block:
        raise ValueError(f"{name} has the shape {list(shape)}, which {qtype.name} can't hold")
    return name, GgufTensor(shape, qtype, cursor.scalar("<Q"), prod(shape) // block * block_bytes)


def _check(header: GgufHeader, size: int, path: Path, source: str) -> None:
    parts = header.metadata.get("split.count", 1)
    if parts > 1:
        fix = "merge them with llama.cpp's `llama-gguf-split --merge`"
        raise InputError("--model", source, f"{path.name} is one of {parts} parts", fix=fix)
    needed = max((tensor.offset + tensor.nbytes for tensor in header.tensors.values()), default=0)
    if needed > size:
        problem = f"{path.name} is truncated: {size:,} bytes where its header calls for {needed:,}"
        raise InputError("--model", source, problem, fix="download it again")
    for qtype in {tensor.qtype for tensor in header.tensors.values()}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[qtype][1]), dtype=np.uint8), qtype)
        except NotImplementedError as error:
            problem = f"its tensors are stored as {qtype.name}, which the gguf package can't dequantise"
            raise InputError("--model", source, problem, fix="give the original model") from error
