"""The ``pack-quantized`` format of compressed-tensors, which transformers and vLLM load natively.

A linear layer ``NAME`` of shape ``[rows, columns]`` becomes

    NAME.weight_packed      int32 [rows, ceil(columns * bits / 32)], codes + 2^(bits-1) as a little-endian bit stream
    NAME.weight_scale       [rows, groups] in the storage dtype
    NAME.weight_zero_point  int32 [ceil(rows * bits / 32), groups], asymmetric only, packed along the rows
    NAME.weight_shape       int64 [2] = (rows, columns)
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from torch import Tensor

from compress.kernels.packing import pack, pack_columns, unpack, unpack_columns
from compress.scheme import Scheme

FORMAT = "pack-quantized"


def packed_tensors(
    name: str, codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of one linear layer.

    Args:
        name: of the module.
        codes: signed codes ``[rows, columns]`` int8.
        scale: ``[rows, groups]``, representable in ``dtype``.
        zero: signed zero points ``[rows, groups]``, stored for an asymmetric scheme only.
        scheme: how it is stored.
        dtype: storage type of the scales.
    """
    offset = 2 ** (scheme.bits - 1)
    tensors = {
        f"{name}.weight_packed": pack((codes.to(torch.int16) + offset).to(torch.uint8), scheme.bits),
        f"{name}.weight_scale": scale.to(dtype).contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        unsigned = (zero + offset).to(torch.uint8)
        tensors[f"{name}.weight_zero_point"] = pack_columns(unsigned, scheme.bits)
    return {key: tensor.cpu() for key, tensor in tensors.items()}


def dequantized(tensors: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
    """The inverse: the weight ``[rows, columns]`` float32 that a reader computes in float32."""
    scale = tensors[f"{name}.weight_scale"].float()
    return (centred_codes(tensors, name, bits) * scale.unsqueeze(-1)).flatten(1)


def centred_codes(tensors: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
    """What the scales of a matrix multiply: codes less zero points, float32 ``[rows, groups, columns a group]``."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    groups = tensors[f"{name}.weight_scale"].shape[1]
    codes = unpack(tensors[f"{name}.weight_packed"], bits, columns).float().view(rows, groups, -1)
    zeros = tensors.get(f"{name}.weight_zero_point")
    return codes - (2 ** (bits - 1) if zeros is None else unpack_columns(zeros, bits, rows).float().unsqueeze(-1))


def quantization_config(schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The block ``quantization_config`` of ``config.json``.

    Args:
        schemes: of every quantized module, by name. The commonest one applies to all linear layers, the others name
            their modules.
        ignore: linear layers that stay as they are.
    """
    counts: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        counts.setdefault(scheme, []).append(name)
    ordered = sorted(counts, key=lambda scheme: -len(counts[scheme]))
    groups = {
        f"group_{index}": QuantizationScheme(
            targets=["Linear"] if index == 0 else counts[scheme],
            weights=_args(scheme),
            format=FORMAT,
        )
        for index, scheme in enumerate(ordered)
    }
    config = QuantizationConfig(
        config_groups=groups,
        quant_method="compressed-tensors",
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    block: dict[str, Any] = config.model_dump(mode="json")
    if not all(scheme.symmetric for scheme in ordered):
        # transformers' other way of loading expects zero points unpacked, and then unpacks them (5.23, 0.20)
        block["dequantize"] = True
    return block


def schemes_of(block: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Scheme]]:
    """Targets and scheme of every group of a ``quantization_config`` block."""
    found = []
    for group in block.get("config_groups", {}).values():
        weights = group["weights"]
        size = weights["group_size"] if weights["strategy"] == "group" else -1
        found.append((tuple(group["targets"]), Scheme(weights["num_bits"], size, weights["symmetric"])))
    return found


def scheme_of(name: str, schemes: Sequence[tuple[tuple[str, ...], Scheme]]) -> Scheme | None:
    """The scheme of a layer by :func:`schemes_of`: a group that names it comes before one for all linear layers."""
    for wanted in (name, "Linear"):
        for targets, scheme in schemes:
            if any(_matches(target, wanted) for target in targets):
                return scheme
    return None


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _args(scheme: Scheme) -> QuantizationArgs:
    shape = {"strategy": "channel"} if scheme.group_size == -1 else {"strategy": "group"}
    size = {} if scheme.group_size == -1 else {"group_size": scheme.group_size}
    return QuantizationArgs(num_bits=scheme.bits, type="int", symmetric=scheme.symmetric, **shape, **size)
