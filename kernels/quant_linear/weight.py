"""The packed weight of a linear layer, and loss-free ways from and to the words that checkpoints store.

A weight stands for w[n, k] = scale[n, k // G] * (code[n, k] - zero[n, k // G]); symmetric codes have zero 2^(bits-1)
and store none. Scales may be negative. Two layouts hold the same codes: "planes" for the Triton kernels (`planes.py`)
and "rows" for the C++ ones (`rows.py`); each is one byte tensor, and nothing but the scales' own dtype goes beside it.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from compress.kernels.packing import (
    BIT_WIDTHS,
    from_gptq_words,
    pack,
    pack_columns,
    packed_words,
    symmetric_zero_words,
    to_gptq_words,
    to_gptq_zeros,
    unpack,
    unpack_columns,
)
from compress.kernels.quant_linear import planes, rows
from torch import Tensor

Layout = Literal["planes", "rows"]
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QuantWeight:
    """Packed weights [N, K] of one linear layer.

    Attributes:
        codes: uint8, in the layout's own order.
        scale: float16, bfloat16 or float32; [K / G, N] in "planes", [ceil(N / 16), K / G, 16] in "rows".
        zero: uint8, shaped like scale, or None for symmetric codes.
        shape: (N, K).
        bits: 2, 3, 4 or 8.
        group_size: G, the inputs that share a scale; divides K.
        layout: "planes" or "rows".
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: tuple[int, int]
    bits: int
    group_size: int
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.zero) if t is not None)

    def to(self, device: torch.device | str) -> "QuantWeight":
        """The same weight on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        codes, scale = self.codes.to(device), self.scale.to(device)
        return QuantWeight(codes, scale, zero, self.shape, self.bits, self.group_size, self.layout)


def from_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, layout: Layout
) -> QuantWeight:
    """Pack plain codes.

    Args:
        codes: [N, K] uint8, values in [0, 2^bits).
        scale: [N, K / G] float16, bfloat16 or float32; its dtype is kept.
        zero: [N, K / G] uint8, or None for symmetric codes.
        bits: 2, 3, 4 or 8.
        group_size: G, a divisor of K; -1 or K is one group a row.
        layout: "planes" or "rows".

    Raises:
        ValueError: a width, layout, shape or dtype that doesn't fit.
    """
    shape = (codes.shape[0], codes.shape[1])
    size = _check(shape, bits, group_size, layout)
    _check_tensor("codes", codes, shape, (torch.uint8,))
    packed = (rows if layout == "rows" else planes).pack(codes, bits, size)
    return _with_scales(QuantWeight(packed, scale, zero, shape, bits, size, layout))


def to_codes(weight: QuantWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The codes [N, K] uint8, scales [N, K / G] and zero points [N, K / G] uint8 or None that were packed."""
    zero = weight.zero
    if weight.layout == "rows":
        codes = rows.unpack(weight.codes, weight.bits, weight.group_size, weight.shape)
        scale = rows.unpack_by_group(weight.scale, weight.shape[0])
        return codes, scale, None if zero is None else rows.unpack_by_group(zero, weight.shape[0])
    codes = planes.unpack(weight.codes, weight.bits, weight.group_size, weight.shape)
    return codes, weight.scale.T.contiguous(), None if zero is None else zero.T.contiguous()


def dequantize(weight: QuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weights [N, K]; computed in float32, then rounded to `dtype`."""
    codes, scale, zero = to_codes(weight)
    rows_, columns = weight.shape
    point = torch.tensor(float(1 << (weight.bits - 1))) if zero is None else zero.float()[..., None]
    groups = codes.view(rows_, columns // weight.group_size, weight.group_size).float()
    return ((groups - point.to(groups.device)) * scale.float()[..., None]).view(rows_, columns).to(dtype)


def from_compressed_tensors(
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    layout: Layout,
) -> QuantWeight:
    """Pack the tensors of a compressed-tensors `pack-quantized` layer.

    Args:
        words: `weight_packed`, int32 [N, ceil(K * bits / 32)].
        scale: `weight_scale`, [N, K / G] float16, bfloat16 or float32.
        zero_point: `weight_zero_point`, int32 [ceil(N * bits / 32), K / G], or None for symmetric codes.
        shape: `weight_shape`, (N, K).
        bits: 2, 3, 4 or 8.
        group_size: G; -1 is one group a row.
        layout: "planes" or "rows".

    Raises:
        ValueError: a shape or dtype that doesn't fit, with what was expected.
    """
    size = _check(shape, bits, group_size, layout)
    _check_tensor("packed weight", words, (shape[0], packed_words(shape[1], bits)), (torch.int32,))
    zero = None
    if zero_point is not None:
        expected = (packed_words(shape[0], bits), shape[1] // size)
        _check_tensor("packed zero point", zero_point, expected, (torch.int32,))
        zero = unpack_columns(zero_point, bits, shape[0])
    if layout == "rows":
        packed = rows.pack_slices(lambda start, end: unpack(words[start:end], bits, shape[1]), shape, bits, size)
    else:
        packed = planes.pack(unpack(words, bits, shape[1]), bits, size)
    return _with_scales(QuantWeight(packed, scale, zero, shape, bits, size, layout))


def to_compressed_tensors(weight: QuantWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """`weight_packed`, `weight_scale` and `weight_zero_point` (None for symmetric codes), bit for bit what was read."""
    codes, scale, zero = to_codes(weight)
    return pack(codes, weight.bits), scale, None if zero is None else pack_columns(zero, weight.bits)


def from_gptq(words: Tensor, scale: Tensor, zeros: Tensor, bits: int, layout: Layout, version: int = 1) -> QuantWeight:
    """Pack the tensors of a GPTQ layer whose inputs are in order (`desc_act` false); the group size is K by groups.

    Args:
        words: `qweight`, int32 [K * bits / 32, N].
        scale: `scales`, [K / G, N].
        zeros: `qzeros`, int32 [K / G, N * bits / 32].
        bits: 2, 3, 4 or 8.
        layout: "planes" or "rows".
        version: 1 stores zero points less one (`checkpoint_format: gptq`), 2 as they are (`gptq_v2`).

    Raises:
        ValueError: a shape or dtype that doesn't fit, or an unknown version.
    """
    _check_width(bits)
    if version not in (1, 2):
        raise ValueError(f"version={version}: unknown GPTQ checkpoint version; allowed: 1, 2")
    if words.dim() != 2 or words.shape[0] * 32 % bits or scale.dim() != 2 or not scale.shape[0]:
        raise ValueError(
            f"qweight {list(words.shape)} and scales {list(scale.shape)} aren't those of a {bits}-bit layer"
        )
    shape = (words.shape[1], words.shape[0] * 32 // bits)
    groups = scale.shape[0]
    if shape[1] % groups:
        raise ValueError(f"{shape[1]} inputs can't be shared among {groups} groups of scales")
    size = _check(shape, bits, shape[1] // groups, layout)
    _check_tensor("qweight", words, (words.shape[0], shape[0]), (torch.int32,))
    _check_tensor("qzeros", zeros, (groups, packed_words(shape[0], bits)), (torch.int32,))
    points = (unpack(zeros, bits, shape[0]) + (2 - version)) & ((1 << bits) - 1)
    symmetric = bool((points == 1 << (bits - 1)).all())
    codes = unpack(from_gptq_words(words), bits, shape[1])
    return from_codes(codes, scale.T.contiguous(), None if symmetric else points.T.contiguous(), bits, size, layout)


def to_gptq(weight: QuantWeight, version: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`qweight`, `scales` and `qzeros` of the same weight.

    Raises:
        ValueError: K * bits or N * bits isn't a multiple of 32, an unknown version, or a zero point 0 in version 1.
    """
    words, scale, zero_point = to_compressed_tensors(weight)
    rows_, columns = weight.shape
    if columns * weight.bits % 32:
        raise ValueError(f"GPTQ needs whole words: {columns} inputs of {weight.bits} bits aren't a multiple of 32 bits")
    if zero_point is None:
        zeros = symmetric_zero_words(weight.bits, rows_, version).repeat(scale.shape[1], 1)
    else:
        zeros = to_gptq_zeros(zero_point, weight.bits, rows_, version)
    return to_gptq_words(words), scale.T.contiguous(), zeros


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in C order, in hex."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def check_checksum(name: str, tensor: Tensor, expected: str) -> None:
    """Raise ValueError, with both sums, unless the tensor's bytes have the expected :func:`checksum`."""
    found = checksum(tensor)
    if found != expected.lower():
        raise ValueError(f"{name}: the checksum is {found}, expected {expected.lower()}; the file is damaged")


def _with_scales(weight: QuantWeight) -> QuantWeight:
    """The weight once its scales and zero points, given as [N, K / G], are checked and in the layout's order."""
    shape = (weight.shape[0], weight.shape[1] // weight.group_size)
    _check_tensor("scale", weight.scale, shape, SCALE_DTYPES)
    if weight.zero is not None:
        _check_tensor("zero point", weight.zero, shape, (torch.uint8,))

    def ordered(values: Tensor) -> Tensor:
        return rows.pack_by_group(values) if weight.layout == "rows" else values.T.contiguous()

    zero = None if weight.zero is None else ordered(weight.zero)
    return replace(weight, scale=ordered(weight.scale), zero=zero)


def _check_width(bits: int) -> None:
    if bits not in BIT_WIDTHS:
        raise ValueError(f"bits={bits}: unknown width; allowed: {', '.join(map(str, BIT_WIDTHS))}")


def _check(shape: tuple[int, int], bits: int, group_size: int, layout: str) -> int:
    """The group size in inputs, once everything that needs no tensor is checked."""
    _check_width(bits)
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r}: unknown; allowed: {', '.join(get_args(Layout))}")
    if shape[0] < 1 or shape[1] < 1:
        raise ValueError(f"a packed weight of shape {list(shape)} holds nothing")
    size = shape[1] if group_size == -1 else group_size
    if size < 1 or shape[1] % size:
        raise ValueError(f"group_size={group_size} doesn't divide the {shape[1]} inputs")
    return size


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(
            f"{name}: expected {allowed} of shape {list(shape)}, "
            f"got {str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
        )
